"""Trains an experiment: everything is set up, then one loop that reads from top to bottom.

A step draws its tasks, runs forward and backward on each one's micro-batches, clips and steps; then, always in this
order: report, evaluate, keep the best. Stages follow each other on one model, each with an optimizer of its own.
"""

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from itertools import count, takewhile
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim import Optimizer

from mtl_dist.config import CONFIG_FILE, UserError, dump, refusing
from mtl_dist.data.batches import Batch, RowStream, TrainBatches, TrainRows, prefetched
from mtl_dist.data.mixer import Draw, Order
from mtl_dist.data.prepare import Split
from mtl_dist.data.read import place
from mtl_dist.distributed import describe, engine_name, first_then_others, on_one, processes, seed_step
from mtl_dist.engine import Stepped, start_engine
from mtl_dist.evaluate import Scores, deciding_score, main_scores, score_all
from mtl_dist.experiment import Experiment, Stage
from mtl_dist.model.multitask import BEST, MultiTaskModel, drafts, save_model
from mtl_dist.model.weights import build_encoder
from mtl_dist.optim import build_optimizer, set_lr
from mtl_dist.surgery.conflict import Conflict, mean_of
from mtl_dist.surgery.gradients import Gradients, groups_of
from mtl_dist.telemetry import (
    METRICS,
    TENSORBOARD,
    Recorder,
    Screen,
    StepReport,
    counting,
    make_console,
    plain_table,
    score_table,
    stage_table,
)
from mtl_dist.tokenizer import load_tokenizer

REJECTED = "rejected.tsv"
# All that a run leaves in its folder.
RUN_FILES = {CONFIG_FILE, REJECTED, METRICS, TENSORBOARD, BEST, *drafts(BEST)}

T = TypeVar("T")
Splits = dict[str, dict[str, Split]]  # by the name of the split, then by task


def train(config: Experiment, overwrite: bool = False) -> Scores:
    """Trains from the first step to the last. Returns the best model's scores; all else is in `config.output_dir`."""
    with processes(config.distributed, config.precision) as accelerator:
        return _train(accelerator, config, overwrite)


def _train(accelerator: Accelerator, config: Experiment, overwrite: bool) -> Scores:
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    refuse_what_the_engine_cannot(accelerator, config)
    console = make_console(accelerator.is_main_process)
    tokenizer = first_then_others(accelerator, lambda: load_tokenizer(config.encoder.tokenizer_source))
    splits = first_then_others(accelerator, lambda: load_data(config, tokenizer, console))
    stages = config.all_stages()
    rows = {name: len(split) for name, split in splits["train"].items()}
    orders = [stage.order(rows, config.seed) for stage in stages]
    model = first_then_others(accelerator, lambda: build_model(config, tokenizer, device.type))
    on_one(accelerator, lambda: start_run_folder(config, splits, overwrite))

    console.print(data_table(splits))
    parameters = sum(p.numel() for p in model.parameters())
    total_steps = sum(order.steps for order in orders)
    console.print(f"{parameters:,} parameters, {total_steps:,} steps, {describe(accelerator)}", highlight=False)
    recorder = Recorder(config.output_dir, config.log.tensorboard) if accelerator.is_main_process else None
    if recorder:
        recorder.text("config", dump(config))
    meter = Meter(accelerator, {name: task.batch_size for name, task in config.tasks.items()})
    carried: dict[Tensor, dict[str, Any]] = {}  # the optimizers' moments, as far as a later stage goes on with them
    done = 0
    with Screen(list(config.tasks), total_steps, console) as screen:
        judge = Judge(accelerator, config, splits["dev"], tokenizer, screen, recorder)
        for stage, order in zip(stages, orders, strict=True):
            if len(stages) > 1:
                screen.line(f"stage {stage.name}: {', '.join(stage.tasks)}, {order.steps:,} steps")
            optimizer = stage_optimizer(model, stage, device.type)
            if stage.carry_moments:
                optimizer.state.update({p: carried[p] for p in model.parameters() if p.requires_grad and p in carried})
            reached = {name: {parameter for parameter, _ in model.reached_by(name)} for name in stage.tasks}
            engine = start_engine(accelerator, model, optimizer, stage.gradients.clip_norm, reached)
            most_tasks = stage.mixer.most_tasks(len(stage.tasks))
            gradients = Gradients(engine, stage.gradients, most_tasks, (config.seed, stage.number))
            batches = train_batches(config, stage, order, splits["train"], rank, world)
            evaluations = evaluation_steps(config, order)
            next_evaluation = next(evaluations, None)
            meter.restart()
            for step, (draws, micro_batches) in enumerate(meter.waits(prefetched(batches.of_step, range(order.steps)))):
                seed_step(config.seed, done, rank)
                set_lr(optimizer, stage.optim.lr * stage.optim.schedule.factor(step, order.steps))
                rows_averaged = rows_of_mean(stage, draws)
                micro_batches = [batch.to(device) for batch in micro_batches]
                by_task = {name: [batch for batch in micro_batches if batch.task == name] for name, _ in draws}
                gradients.start(step, rows_of_step(stage, draws))
                loss_weight = gradients.loss_weights()
                for name, batches_of_task in by_task.items():
                    task = stage.tasks[name]
                    # The ranks' mean of losses scaled so is the mean over the global batch, however rows are dealt.
                    scale = task.weight * loss_weight[name] * world / rows_averaged[name]
                    with gradients.of_task(name):
                        for batch in batches_of_task:
                            with gradients.micro_batch(last=batch is batches_of_task[-1]):
                                raw_NO = engine.forward(name, batch.packed)
                                loss_N = task.loss.per_example(raw_NO, batch.gold_N, task.label) * batch.weight_N
                                engine.backward(loss_N.sum() * scale)
                            loss_sum = loss_N.detach().sum()
                            gradients.add_loss(name, loss_sum)
                            meter.micro_batch(batch, loss_sum)
                meter.conflict(gradients.combine())
                meter.step([task for task, _ in draws], engine.step())

                done += 1
                if done % config.log.every_steps == 0 or step + 1 == order.steps:
                    report = meter.report(stage.name, done, optimizer)
                    screen.steps(report)
                    if recorder:
                        recorder.record(done, "train", report.as_record())
                if step + 1 == next_evaluation:
                    next_evaluation = next(evaluations, None)
                    with meter.paused(), engine.whole() as whole:
                        judge.evaluate(whole, stage.name, done)
            with engine.whole() as whole:
                judge.evaluate(whole, stage.name, done)
            carried = carried | optimizer.state if any(s.carry_moments for s in stages[stage.number + 1 :]) else {}
            model = engine.close()
    if recorder:
        recorder.close()
        show_results(config, judge, screen, total_steps)
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
        if not groups_of(
            [name for name, _ in model.named_parameters() if name.startswith("encoder.")], stage.gradients
        ):
            raise UserError(f"{stage.label}gradients.match matches no shared parameter: '{stage.gradients.match}'")
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


def start_run_folder(config: Experiment, splits: Splits, overwrite: bool) -> None:
    """Writes what is known before the first step, in place of an earlier run if that was asked for."""
    folder = config.output_dir
    with refusing(f"output_dir: cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir()}
        foreign = sorted(found - RUN_FILES)
        if foreign or (found and not found >= {CONFIG_FILE, REJECTED}):
            raise UserError(
                f"output_dir: {folder} holds {(foreign or sorted(found))[0]}, not a run; choose another folder"
            )
        if found and not overwrite:
            raise UserError(f"output_dir: {folder} holds a run; choose another folder, or replace it with --overwrite")
        for name in found:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (folder / CONFIG_FILE).write_text(dump(config), encoding="utf-8")
        with (folder / REJECTED).open("w", encoding="utf-8") as file:
            for by_task in splits.values():
                for name, split in by_task.items():
                    file.writelines(f"{name}\t{place(split.source, b.line)}\t{b.message}\n" for b in split.rejected())


def rows_of_step(stage: Stage, draws: list[Draw]) -> dict[str, int]:
    """How many rows a step draws of each of its tasks, in the order of their first draws."""
    rows: dict[str, int] = {}
    for task, _ in draws:
        rows[task] = rows.get(task, 0) + stage.tasks[task].batch_size
    return rows


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
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.splits = splits
        self.tokenizer = tokenizer
        self.screen = screen
        self.recorder = recorder
        self.best: Scores = {}
        self.after_stage: dict[str, Scores] = {}

    def evaluate(self, model: MultiTaskModel, stage: str, step: int) -> None:
        """Scores all tasks after a step; every rank must take part."""
        config = self.config
        scores = score_all(self.accelerator, model, config.tasks, self.splits, config.evaluate.max_tokens)
        self.after_stage[stage] = scores
        self.screen.scores(step, main_scores(config.tasks, scores), scores)
        if self.recorder:
            self.recorder.record(step, "dev", {"stage": stage, **scores})
        # With nothing to score the last model is the best.
        if not self.splits or not self.best or deciding_score(config, scores) > deciding_score(config, self.best):
            self.best = {"step": step, **scores}
            if self.accelerator.is_main_process:
                save_model(model, self.tokenizer, config.output_dir / BEST, self.best)


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


class Meter:
    """Adds up what happened since the last report; waits for the device only when a report is due."""

    def __init__(self, accelerator: Accelerator, sizes: dict[str, int]) -> None:
        self.accelerator = accelerator
        self.sizes = sizes
        self.draws = dict.fromkeys(sizes, 0)
        self.skipped = 0
        self.restart()

    def restart(self) -> None:
        """Begins to count anew."""
        self.loss_sums = {task: torch.zeros((), device=self.accelerator.device) for task in self.sizes}
        self.new_draws = dict.fromkeys(self.sizes, 0)
        self.tokens = 0
        self.steps = 0
        self.waited = 0.0
        self.norm: float | Tensor | None = None
        self.conflicts: list[Conflict] = []
        self.since = time.perf_counter()

    def micro_batch(self, batch: Batch, loss_sum: Tensor) -> None:
        """Counts a micro-batch of this rank."""
        self.loss_sums[batch.task] += loss_sum
        self.tokens += batch.packed.num_tokens

    def conflict(self, conflict: Conflict | None) -> None:
        """Notes how far the task gradients of a step agreed, where that is known."""
        if conflict is not None:
            self.conflicts.append(conflict)

    def waits(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; measures how long they let the loop wait."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield item

    def step(self, draws: Iterable[str], stepped: Stepped) -> None:
        """Counts a step of all ranks."""
        for task in draws:
            self.new_draws[task] += 1
        self.steps += 1
        self.norm = stepped.norm
        self.skipped += stepped.skipped

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens inside out of the speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def report(self, stage: str, step: int, optimizer: Optimizer) -> StepReport:
        """The report of the steps since the last one; every rank must ask for it."""
        here = torch.stack([*self.loss_sums.values(), torch.tensor(self.tokens, device=self.accelerator.device)])
        *loss_sums, tokens = self.accelerator.reduce(here).tolist()
        seconds = time.perf_counter() - self.since
        for task, new in self.new_draws.items():
            self.draws[task] += new
        for task, loss_sum in zip(self.sizes, loss_sums, strict=True):
            if not math.isfinite(loss_sum):
                raise UserError(
                    f"step {step}: the loss of task '{task}' is {loss_sum}; lower optim.lr or clip gradients"
                )
        drawn = {task: new * self.sizes[task] for task, new in self.new_draws.items()}
        report = StepReport(
            step=step,
            stage=stage,
            loss={task: s / drawn[task] for task, s in zip(self.sizes, loss_sums, strict=True) if drawn[task]},
            draws=dict(self.draws),
            examples={task: draws * self.sizes[task] for task, draws in self.draws.items()},
            lr={group["name"]: group["lr"] for group in optimizer.param_groups},
            tokens_per_second=tokens / seconds,
            seconds_per_step=seconds / self.steps,
            data_wait=self.waited / seconds,
            gradient_norm=None if self.norm is None else float(self.norm),
            skipped_steps=self.skipped,
            surgery=mean_of(self.conflicts),
        )
        self.restart()
        return report
