"""Trains an experiment: everything is set up, then one loop that reads from top to bottom.

A step draws its tasks, runs forward and backward on each one's micro-batches, clips and steps; then, always in this
order: report, evaluate (and keep the best), save. Stages follow each other on one model, each with an own optimizer.
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from itertools import count, takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim import Optimizer

from mtl_dist.checkpoint import CHECKPOINTS, LOCK, Checkpoint, RunLock, all_in, step_of
from mtl_dist.config import CONFIG_FILE, UserError, dump, refusing
from mtl_dist.data.batches import RowStream, TrainBatches, TrainRows, prefetched
from mtl_dist.data.mixer import Draw, Order
from mtl_dist.data.prepare import Split, train_rows_in_dev
from mtl_dist.data.read import place
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.distributed import (
    Stops,
    Watchdog,
    describe,
    engine_name,
    first_then_others,
    lost_ranks,
    on_one,
    processes,
    refuse_differences,
    seed_step,
)
from mtl_dist.experiment import Experiment, Stage
from mtl_dist.files import drafts, faults, put_back
from mtl_dist.model.multitask import BEST, MODEL_FILES, SCORES, MultiTaskModel, save_model
from mtl_dist.model.weights import build_encoder
from mtl_dist.optim import build_optimizer, set_lr
from mtl_dist.surgery.gradients import Gradients, groups_of
from mtl_dist.training.books import Alarms, Meter, enough_memory
from mtl_dist.training.engine import Engine, start_engine
from mtl_dist.training.resume import (
    OF_A_NODE,
    Saver,
    about,
    changes,
    checkpoint_to_resume,
    compared,
    load_weights,
    moments_of,
)
from mtl_dist.training.scores import Scores, deciding_score, main_scores, score_all
from mtl_dist.watch.recorder import DRAFT, METRICS, TENSORBOARD, Recorder
from mtl_dist.watch.screen import Screen, counting, make_console, plain_table, score_table, stage_table

REJECTED = "rejected.tsv"
# All that a run leaves in its folder.
RUN_FILES = {CONFIG_FILE, REJECTED, METRICS, DRAFT, TENSORBOARD, CHECKPOINTS, LOCK, BEST, *drafts(BEST)}

T = TypeVar("T")
Splits = dict[str, dict[str, Split]]  # by the name of the split, then by task


def train(config: Experiment, overwrite: bool = False, resume: str = "never", allow_changes: bool = False) -> Scores:
    """Trains from the first step, or from a checkpoint, to the last, or to a signal that stops it.

    Returns the best model's scores; all else is in `config.output_dir`. `resume` is never, auto or a path.
    """
    with (
        processes(config.distributed, config.precision) as accelerator,
        Stops(accelerator) as stops,
        RunLock() as lock,
        lost_ranks(),
    ):
        return _train(accelerator, config, overwrite, resume, allow_changes, stops, lock)


def _train(
    accelerator: Accelerator,
    config: Experiment,
    overwrite: bool,
    resume: str,
    allow_changes: bool,
    stops: Stops,
    lock: RunLock,
) -> Scores:
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    refuse_what_the_engine_cannot(accelerator, config)
    console = make_console(accelerator.is_main_process)
    tokenizer = first_then_others(accelerator, lambda: load_tokenizer(config.encoder.tokenizer_source))
    splits = first_then_others(accelerator, lambda: load_data(config, tokenizer, console))
    stages = config.all_stages()
    rows = {name: len(split) for name, split in splits["train"].items()}
    orders = [stage.order(rows, config.seed) for stage in stages]
    model = first_then_others(accelerator, lambda: build_model(config, tokenizer, device.type))
    now = about(accelerator, config, splits["train"])
    refuse_differences(accelerator, compared(now, OF_A_NODE))
    folder, auto = config.output_dir, resume == "auto"
    # First of all the lock: whoever has the folder may still be saving.
    on_one(accelerator, lambda: lock.take(folder, 120 if auto else 0, console.print))
    resumed = on_one(accelerator, lambda: checkpoint_to_resume(resume, now, folder, allow_changes, console.print))
    goes_on_here = on_one(accelerator, lambda: start_run_folder(config, splits, overwrite or auto, resumed))

    console.print(data_table(splits))
    for line in train_rows_in_dev(splits["train"], splits["dev"]):
        console.print(line, highlight=False, markup=False)
    parameters = sum(p.numel() for p in model.parameters())
    total_steps = sum(order.steps for order in orders)
    console.print(f"{parameters:,} parameters, {total_steps:,} steps, {describe(accelerator)}", highlight=False)
    meter = Meter(accelerator, {name: task.batch_size for name, task in config.tasks.items()})
    carried: dict[Tensor, dict[str, Any]] = {}  # the optimizers' moments, as far as a later stage goes on with them
    done, first_stage, first_step = 0, 0, 0
    if resumed is not None:
        done, first_stage, first_step = resumed.step, resumed.state["stage"], resumed.state["step"]
        first_then_others(accelerator, lambda: load_weights(resumed, model, allow_changes))
        meter.load(resumed.state["meter"])
        named = dict(model.named_parameters())
        carried = {named[name]: state for name, state in moments_of(resumed, "carried").items()}
        console.print(f"going on after step {done:,} of {resumed.path}", highlight=False)
        if (table := changes(resumed, now)) is not None:
            console.print(table)
        if done >= total_steps:
            console.print("the run is finished: nothing is left to train")
    recorder = Recorder(config.output_dir, config.log.tensorboard, done) if accelerator.is_main_process else None
    if recorder and resumed is None:
        recorder.text("config", dump(config))
    stop: signal.Signals | None = None
    with (
        Screen(list(config.tasks), total_steps, console) as screen,
        Saver(accelerator, config, now, screen.line) as saver,
        Watchdog(config.distributed.timeout_s, world) as watchdog,
    ):
        judge = Judge(accelerator, config, splits["dev"], tokenizer, screen, recorder, watchdog.watch)
        alarms = Alarms(accelerator, meter, splits["train"], screen, recorder)
        if resumed is not None:
            alarms.load(resumed.state["alarms"])
            if goes_on_here:  # elsewhere the best model was left behind
                judge.load(resumed.state)

        def state(stage: Stage, step: int, gradients: Gradients) -> dict[str, Any]:
            """Where the run is: so many steps of a stage are done; and what is known of it until then."""
            counted = {"meter": meter.state(), "alarms": alarms.state(), "combiner": gradients.state}
            return {"stage": stage.number, "step": step, **counted, **judge.state()}

        for stage, order in zip(stages, orders, strict=True):
            if stage.number < first_stage:
                continue
            start = first_step if stage.number == first_stage else 0
            ended_before = resumed is not None and stage.number == first_stage and start >= order.steps
            if len(stages) > 1:
                screen.line(f"stage {stage.name}: {', '.join(stage.tasks)}, {order.steps:,} steps")
            optimizer, engine, gradients = start_stage(accelerator, model, stage, carried, config.seed, screen)
            meter.start_clock()
            if resumed is not None and start > 0:
                engine.restore(moments_of(resumed, "moments"))
                engine.restore_scaling(resumed.state["scaling"])
                gradients.state = resumed.state["combiner"]
            batches = train_batches(config, stage, order, splits["train"], rank, world)
            evaluations = evaluation_steps(config, order)
            next_evaluation = next((step for step in evaluations if step > start), None)
            steps = range(start, order.steps)
            for step, (draws, micro_batches) in zip(
                steps, meter.waits(prefetched(batches.of_step, steps)), strict=True
            ):
                watchdog.watch()
                seed_step(config.seed, done, rank)
                set_lr(optimizer, stage.optim.lr * stage.optim.schedule.factor(step, order.steps))
                rows_averaged = rows_of_mean(stage, draws)
                micro_batches = [batch.to(device) for batch in micro_batches]
                by_task = {name: [batch for batch in micro_batches if batch.task == name] for name, _ in draws}
                meter.start(task for task, _ in draws)
                gradients.start(step, list(by_task))
                loss_weight = gradients.loss_weights()
                for name, batches_of_task in by_task.items():
                    task = stage.tasks[name]
                    # The ranks' mean of losses scaled so is the mean over the global batch, however rows are dealt.
                    scale = task.weight * loss_weight[name] * world / rows_averaged[name]
                    with gradients.of_task(name):
                        for batch in batches_of_task:
                            last = batch is batches_of_task[-1]
                            with enough_memory(batch, done + 1), gradients.micro_batch(last):
                                raw_NO = engine.forward(name, batch.packed)
                                loss_N = task.loss.per_example(raw_NO, batch.gold_N, task.label) * batch.weight_N
                                engine.backward(loss_N.sum() * scale)
                            meter.micro_batch(batch, loss_N)
                meter.conflict(gradients.combine())
                stepped = engine.step()
                done += 1
                losses = meter.step(stepped, gradients.dropped)
                gradients.observe(losses)
                alarms.after(done, stage, stepped, gradients.dropped, losses)

                if done % config.log.every_steps == 0 or step + 1 == order.steps:
                    report = meter.report(stage.name, done, optimizer)
                    screen.steps(report)
                    if recorder:
                        recorder.record(done, "train", report.as_record())
                if evaluate := step + 1 == next_evaluation:
                    next_evaluation = next(evaluations, None)
                    with meter.paused(), engine.whole() as whole:
                        judge.evaluate(whole, stage.name, done)
                if step + 1 < order.steps:  # after the last one both come in any case
                    stop = stops.agreed()
                    if stop or saver.is_due(done, evaluate):
                        with meter.paused():
                            watchdog.watch()
                            saver.save(done, engine, carried, state(stage, step + 1, gradients))
                    if stop:
                        break
            if stop:
                break
            if not (ended_before and judge.is_up_to_date):
                with meter.paused(), engine.whole() as whole:
                    judge.evaluate(whole, stage.name, done)
                watchdog.watch()
                saver.save(done, engine, carried, state(stage, order.steps, gradients))
            carried = carried | optimizer.state if any(s.carry_moments for s in stages[stage.number + 1 :]) else {}
            model = engine.close()
            if not ended_before and stage is not stages[-1] and (stop := stops.agreed()):
                break
        watchdog.watch()
        on_one(accelerator, lambda: saver.finish(stop))
    if judge.unsaved and not stop:
        raise UserError(judge.unsaved)
    if recorder:
        recorder.close()
        if stop:
            screen.line(f"{stop.name}: saved after step {done:,} of {total_steps:,}; go on with --resume auto")
        else:
            show_results(config, judge, screen, total_steps)
    if saver.writer.failed:  # or the run would be taken for a finished one, which it is not for --resume auto
        raise UserError(saver.writer.failed)
    return judge.best


def refuse_what_the_engine_cannot(accelerator: Accelerator, config: Experiment) -> None:
    """Refuses what DDP and one process can do, and DeepSpeed and FSDP2 cannot."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        for stage in config.all_stages():
            if stage.carry_moments:
                raise UserError(
                    f"{stage.label}carry_moments needs DDP or one process: {engine_name(accelerator)} "
                    "spreads the moments over the ranks; leave it out"
                )


def load_data(config: Experiment, tokenizer: Tokenizer, console: Console) -> Splits:
    """Opens every task's train and dev rows, after preparing those that the cache does not have."""
    splits: Splits = {"train": {}, "dev": {}}
    for name in config.tasks:
        for split_name in ("train", "dev"):
            with counting(console, f"preparing {name} {split_name}") as on_rows:
                split = config.open_split(name, split_name, tokenizer, on_rows)
            if split is not None:
                splits[split_name][name] = split
    return splits


def build_model(config: Experiment, tokenizer: Tokenizer, device_type: str) -> MultiTaskModel:
    """The model, after checking that every stage can train its tasks."""
    torch.manual_seed(config.seed)
    model = MultiTaskModel(build_encoder(config.encoder, tokenizer), config.tasks)
    for stage in config.all_stages():
        stage_optimizer(model, stage, device_type)
        reached = {name for task in stage.tasks for name, p in model.reached_by(task) if p.requires_grad}
        shared = [name for name in reached if name.startswith("encoder.")]
        if shared and not groups_of(shared, stage.gradients):
            raise UserError(
                f"{stage.label}gradients.match matches no shared parameter that is trained: '{stage.gradients.match}'"
            )
    return model


def stage_optimizer(model: MultiTaskModel, stage: Stage, device_type: str) -> Optimizer:
    """The optimizer of a stage; refuses a task that would change no parameter."""
    try:
        optimizer = build_optimizer(model.named_parameters(), stage.optim, device_type, stage.trains)
    except UserError as error:
        raise UserError(f"{stage.label}{error}") from None
    for name in stage.tasks:
        if not any(parameter.requires_grad for _, parameter in model.reached_by(name)):
            raise UserError(
                f"{stage.label}task '{name}' has nothing to train: "
                "trains and optim.rules freeze the encoder and all of its head"
            )
    return optimizer


def start_stage(
    accelerator: Accelerator,
    model: MultiTaskModel,
    stage: Stage,
    carried: Mapping[Tensor, dict[str, Any]],
    seed: int,
    screen: Screen,
) -> tuple[Optimizer, Engine[MultiTaskModel], Gradients]:
    """What trains in a stage; the optimizer goes on with `carried` moments, where the stage says so."""
    optimizer = stage_optimizer(model, stage, accelerator.device.type)
    if stage.carry_moments:
        optimizer.state.update({p: carried[p] for p in model.parameters() if p.requires_grad and p in carried})
    reached = {name: {parameter for parameter, _ in model.reached_by(name)} for name in stage.tasks}
    engine = start_engine(accelerator, model, optimizer, stage.gradients.clip_norm, reached)
    gradients = Gradients(engine, stage.gradients, stage.mixer.most_tasks(len(stage.tasks)), (seed, stage.number))
    if gradients.rows is None and (stage.gradients.operates or stage.gradients.measure):
        screen.line("the tasks share nothing that is trained: there are no gradients to combine or to measure")
    return optimizer, engine, gradients


def train_batches(
    config: Experiment, stage: Stage, order: Order, splits: Mapping[str, Split], rank: int, world: int
) -> TrainBatches:
    """This rank's batches of a stage."""
    rows = {
        name: TrainRows(
            splits[name],
            RowStream(len(splits[name]), config.seed, stage.number, name, task.subsample),
            task.batch_size,
            config.length_window,
        )
        for name, task in stage.tasks.items()
    }
    return TrainBatches(rows, order, rank, world, stage.gradients.accumulation, stage.gradients.max_tokens)


def rows_of_mean(stage: Stage, draws: list[Draw]) -> dict[str, float]:
    """How many rows the losses of each task are averaged over."""
    sizes = {name: task.batch_size for name, task in stage.tasks.items()}
    if stage.gradients.reweight == "per_task":
        return dict(sizes)
    return dict.fromkeys(sizes, sum(sizes[task] for task, _ in draws) / len(draws))


def start_run_folder(config: Experiment, splits: Splits, overwrite: bool, resumed: Checkpoint | None) -> bool:
    """Writes what is known before the first step, and says whether it is the folder of the run that goes on.

    Another run that is in it is replaced, if that was asked for.
    """
    folder = config.output_dir
    with refusing(f"output_dir: cannot write {folder}"):
        goes_on_here = resumed is not None and resumed.path.parent == (folder / CHECKPOINTS).resolve()
        if resumed is not None and goes_on_here:
            for path in all_in(folder / CHECKPOINTS):
                if step_of(path) > resumed.step:  # it will come again
                    shutil.rmtree(path)
            put_back(folder / BEST)
        else:
            clear(folder, overwrite)
        for name in (REJECTED, CONFIG_FILE):
            (folder / name).unlink(missing_ok=True)  # it may be a link
        with (folder / REJECTED).open("w", encoding="utf-8") as file:
            for by_task in splits.values():
                for task, split in by_task.items():
                    file.writelines(f"{task}\t{place(split.source, b.line)}\t{b.message}\n" for b in split.rejected())
        (folder / CONFIG_FILE).write_text(dump(config), encoding="utf-8")
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
    return goes_on_here


def clear(folder: Path, overwrite: bool) -> None:
    """Makes room for a run where there is none, or one that may be replaced."""
    found = {path.name for path in folder.iterdir()} - {LOCK}
    foreign = sorted(found - RUN_FILES)
    if foreign or (found and REJECTED not in found):
        raise UserError(f"output_dir: {folder} holds {(foreign or sorted(found))[0]}, not a run; choose another folder")
    if found and not overwrite:
        raise UserError(
            f"output_dir: {folder} holds a run; go on with it by --resume auto, replace it with --overwrite, "
            "or choose another folder"
        )
    for name in sorted(found, key=lambda name: name == REJECTED):  # last what shows that it is a run
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def evaluation_steps(config: Experiment, order: Order) -> Iterator[int]:
    """After which steps of a stage the dev sets are scored, besides the last: at intervals, or after each epoch."""
    if (every := config.evaluate.every_steps) is not None:
        yield from range(every, order.steps, every)
        return
    before = 0
    for end in takewhile(lambda end: end < order.steps, (order.steps_of(Fraction(epoch)) for epoch in count(1))):
        if end > before:  # epochs of few rows may be shorter than a step
            yield end
        before = end


class Judge:
    """Scores the dev sets, and keeps the best model."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: Experiment,
        splits: dict[str, Split],
        tokenizer: Tokenizer,
        screen: Screen,
        recorder: Recorder | None,
        on_batch: Callable[[], object],
    ) -> None:
        """`on_batch` hears of every batch that is scored."""
        self.accelerator = accelerator
        self.config = config
        self.splits = splits
        self.tokenizer = tokenizer
        self.screen = screen
        self.recorder = recorder
        self.on_batch = on_batch
        self.best: Scores = {}
        self.after_stage: dict[str, Scores] = {}
        self.unsaved: str | None = None  # why the best model so far is not in the run folder

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from these scores, if they can be compared and the model is there; every rank must ask for it."""
        best = state["best"]
        if best and best["tasks"].keys() != self.splits.keys():
            return
        self.after_stage, self.unsaved = state["after_stage"], state["unsaved"]
        if on_one(self.accelerator, lambda: saved_scores(self.config.output_dir / BEST)) == best:
            self.best = best
        elif best:
            self.screen.line(
                f"{BEST} is not, or no longer, the model of step {best['step']}: the next one scored replaces it"
            )

    def state(self) -> dict[str, Any]:
        """The scores so far."""
        return {"best": self.best, "after_stage": self.after_stage, "unsaved": self.unsaved}

    @property
    def is_up_to_date(self) -> bool:
        """Whether the run folder has the best model so far."""
        return bool(self.best) and not self.unsaved

    def evaluate(self, model: MultiTaskModel, stage: str, step: int) -> None:
        """Scores all tasks after a step; every rank must take part."""
        config = self.config
        scores = score_all(
            self.accelerator, model, config.tasks, self.splits, config.evaluate.max_tokens, self.on_batch
        )
        self.after_stage[stage] = scores
        self.screen.scores(step, main_scores(config.tasks, scores), scores)
        if self.recorder:
            self.recorder.record(step, "dev", {"stage": stage, **scores})
        # With nothing to score the last model is the best.
        if not self.splits or not self.best or deciding_score(config, scores) > deciding_score(config, self.best):
            best = {"step": step, **scores}
            try:
                on_one(self.accelerator, lambda: save_model(model, self.tokenizer, config.output_dir / BEST, best))
                self.best, self.unsaved = best, None
            except UserError as error:
                self.unsaved = f"step {step}: the best model is not saved: {error}"
                self.screen.line(self.unsaved)


def saved_scores(folder: Path) -> Any:
    """The scores of the model in a folder, if there is a whole one."""
    if faults(folder, MODEL_FILES):
        return None
    try:
        return json.loads((folder / SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def data_table(splits: Splits) -> Table:
    """What the prepared data holds, and what was left out of it."""
    table = plain_table("task", "split", "rows", "tokens", "skipped rows", "cut inputs", texts=("task", "split"))
    for split_name, by_task in splits.items():
        for name, split in by_task.items():
            numbers = (len(split), split.num_tokens, split.num_rejected, split.num_truncated)
            table.add_row(name, split_name, *(f"{number:,}" for number in numbers))
    return table


def show_results(config: Experiment, judge: Judge, screen: Screen, total_steps: int) -> None:
    """What came of the run, and where it is."""
    metrics = {name: task.metric for name, task in config.tasks.items()}
    if len(judge.after_stage) > 1:
        screen.console.print(stage_table(judge.after_stage, metrics))
        screen.line(f"\nthe best model, after step {judge.best['step']}:")
    screen.console.print(score_table(judge.best, metrics))
    screen.line(f"best of {total_steps} steps was {judge.best['step']}, by {config.evaluate.best_by}")
    screen.line(f"run folder   {config.output_dir}\nbest model   {config.output_dir / BEST}")
    if config.log.tensorboard:
        screen.line(f"TensorBoard  tensorboard --logdir {config.output_dir / TENSORBOARD}")
