"""Trains an experiment: everything is set up, then one loop that reads from top to bottom.

A step draws its tasks, runs forward and backward on each one's micro-batches, clips and steps; then, always in this
order: report, evaluate, keep the best.
"""

import math
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim import Optimizer

from mtl_dist.config import CONFIG_FILE, UserError, dump, refusing
from mtl_dist.data.batches import Batch, TrainBatches
from mtl_dist.data.prepare import Split
from mtl_dist.data.read import place
from mtl_dist.distributed import describe, first_then_others, on_one, processes, seed_step
from mtl_dist.evaluate import Scores, deciding_score, main_scores, score_all
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import BEST, MultiTaskModel, drafts, save_model
from mtl_dist.model.weights import build_encoder
from mtl_dist.optim import build_optimizer, set_lr
from mtl_dist.telemetry import METRICS, TENSORBOARD, Recorder, Screen, StepReport, counting, make_console, score_table
from mtl_dist.tokenizer import load_tokenizer

REJECTED = "rejected.tsv"
# All that a run leaves in its folder.
RUN_FILES = {CONFIG_FILE, REJECTED, METRICS, TENSORBOARD, BEST, *drafts(BEST)}

Splits = dict[str, dict[str, Split]]  # by the name of the split, then by task


def train(config: Experiment, overwrite: bool = False) -> Scores:
    """Trains from the first step to the last. Returns the best model's scores; all else is in `config.output_dir`."""
    with processes(config.distributed, config.precision) as accelerator:
        return _train(accelerator, config, overwrite)


def _train(accelerator: Accelerator, config: Experiment, overwrite: bool) -> Scores:
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    console = make_console(accelerator.is_main_process)
    tokenizer = first_then_others(accelerator, lambda: load_tokenizer(config.encoder.tokenizer_source))
    splits = first_then_others(accelerator, lambda: load_data(config, tokenizer, console))
    model, optimizer = first_then_others(accelerator, lambda: build_model(config, tokenizer, device.type))
    on_one(accelerator, lambda: start_run_folder(config, splits, overwrite))
    ddp_model, optimizer = accelerator.prepare(model, optimizer)
    model = accelerator.unwrap_model(ddp_model)

    rows = {name: len(split) for name, split in splits["train"].items()}
    sizes = {name: task.batch_size for name, task in config.tasks.items()}
    batches = TrainBatches(splits["train"], sizes, config.seed, rank, world)
    total_steps = config.steps or config.mixer.steps(rows, sizes, config.epochs)

    console.print(data_table(splits))
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters:,} parameters, {total_steps:,} steps, {describe(accelerator)}", highlight=False)
    recorder = Recorder(config.output_dir, config.log.tensorboard) if accelerator.is_main_process else None
    if recorder:
        recorder.text("config", dump(config))
    meter = Meter(accelerator, sizes)
    best: Scores = {}
    with Screen(list(config.tasks), total_steps, console) as screen:
        for step in range(total_steps):
            seed_step(config.seed, step, rank)
            set_lr(optimizer, config.optim.lr * config.optim.schedule.factor(step, total_steps))
            draws = config.mixer.draws(list(config.tasks), step)
            micro_batches = [
                batch.to(device)
                for task, draw in draws.items()
                for batch in batches.of_draw(task, draw, config.gradients.accumulation)
            ]
            for batch in micro_batches:
                task = config.tasks[batch.task]
                # DDP reduces the gradients once a step, while the last micro-batch computes its own.
                with nullcontext() if batch is micro_batches[-1] else accelerator.no_sync(ddp_model):
                    raw_NO = ddp_model(batch.task, batch.packed)
                    loss_N = task.loss.per_example(raw_NO, batch.gold_N, task.label) * batch.weight_N
                    # The ranks' mean of this is the mean over the global batch, however the rows are dealt.
                    accelerator.backward(task.weight * loss_N.sum() * (world / task.batch_size))
                meter.micro_batch(batch, loss_N.detach().sum())
            if config.gradients.clip_norm is not None:
                meter.norm = accelerator.clip_grad_norm_(model.parameters(), config.gradients.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            meter.step(draws)

            done = step + 1
            if done % config.log.every_steps == 0 or done == total_steps:
                report = meter.report(done, optimizer)
                screen.steps(report)
                if recorder:
                    recorder.record(done, "train", report.as_record())
            if evaluation_is_due(config, rows, sizes, done, total_steps):
                with meter.paused():
                    scores = score_all(accelerator, model, config.tasks, splits["dev"], config.evaluate.max_tokens)
                    screen.scores(done, main_scores(config.tasks, scores), scores)
                    if recorder:
                        recorder.record(done, "dev", scores)
                    if not best or deciding_score(config, scores) > deciding_score(config, best):
                        best = {"step": done, **scores}
                        if accelerator.is_main_process:
                            save_model(model, tokenizer, config.output_dir / BEST, best)
    if recorder:
        recorder.close()
        console.print(score_table(best, {name: task.metric for name, task in config.tasks.items()}))
        screen.line(f"best of {total_steps} steps was {best['step']}, by {config.evaluate.best_by}")
        screen.line(f"run folder   {config.output_dir}\nbest model   {config.output_dir / BEST}")
        if config.log.tensorboard:
            screen.line(f"TensorBoard  tensorboard --logdir {config.output_dir / TENSORBOARD}")
    return best


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


def build_model(config: Experiment, tokenizer: Tokenizer, device_type: str) -> tuple[MultiTaskModel, Optimizer]:
    """The model and its optimizer; refuses a task that would change no parameter."""
    torch.manual_seed(config.seed)
    model = MultiTaskModel(build_encoder(config.encoder, tokenizer), config.tasks)
    optimizer = build_optimizer(model.named_parameters(), config.optim, device_type)
    for name, task in config.tasks.items():
        used = [model.encoder.embeddings, model.encoder.layers, model.heads[name]]
        used += [model.encoder.pooler] if task.pooling == "pooler" else []
        if not any(parameter.requires_grad for part in used for parameter in part.parameters()):
            raise UserError(f"task '{name}' has nothing to train: optim.rules freeze the encoder and all of its head")
    return model, optimizer


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


def evaluation_is_due(
    config: Experiment, rows: dict[str, int], sizes: dict[str, int], done: int, total_steps: int
) -> bool:
    """Whether the dev sets are scored after `done` steps: at intervals, or whenever an epoch ends, and at the end."""
    if done == total_steps:
        return True
    if config.evaluate.every_steps is not None:
        return done % config.evaluate.every_steps == 0
    before, after = (math.floor(config.mixer.epochs(rows, sizes, steps)) for steps in (done - 1, done))
    return after > before


def data_table(splits: Splits) -> Table:
    """What the prepared data holds, and what was left out of it."""
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in ("task", "split", "rows", "tokens", "skipped rows", "cut inputs"):
        table.add_column(column, justify="left" if column in ("task", "split") else "right")
    for split_name, by_task in splits.items():
        for name, split in by_task.items():
            numbers = (len(split), split.num_tokens, split.num_rejected, split.num_truncated)
            table.add_row(name, split_name, *(f"{number:,}" for number in numbers))
    return table


class Meter:
    """Adds up what happened since the last report; waits for the device only when a report is due."""

    def __init__(self, accelerator: Accelerator, sizes: dict[str, int]) -> None:
        self.accelerator = accelerator
        self.sizes = sizes
        self.draws = dict.fromkeys(sizes, 0)
        self.skipped = 0
        self.loss_scale = self._loss_scale()
        self.norm: Tensor | None = None
        self._restart()

    def _restart(self) -> None:
        self.loss_sums = {task: torch.zeros((), device=self.accelerator.device) for task in self.sizes}
        self.new_draws = dict.fromkeys(self.sizes, 0)
        self.tokens = 0
        self.steps = 0
        self.since = time.perf_counter()

    def micro_batch(self, batch: Batch, loss_sum: Tensor) -> None:
        """Counts a micro-batch of this rank."""
        self.loss_sums[batch.task] += loss_sum
        self.tokens += batch.packed.num_tokens

    def step(self, draws: Iterable[str]) -> None:
        """Counts a step of all ranks."""
        for task in draws:
            self.new_draws[task] += 1
        self.steps += 1
        # A fused optimizer skips an overflow by itself; only the scale tells.
        before, self.loss_scale = self.loss_scale, self._loss_scale()
        self.skipped += self.loss_scale < before

    def _loss_scale(self) -> float:
        """The factor that keeps fp16 gradients in range, which falls when a step overflowed and was skipped."""
        return 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens inside out of the speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def report(self, step: int, optimizer: Optimizer) -> StepReport:
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
            loss={task: s / drawn[task] for task, s in zip(self.sizes, loss_sums, strict=True) if drawn[task]},
            draws=dict(self.draws),
            examples={task: draws * self.sizes[task] for task, draws in self.draws.items()},
            lr={group["name"]: group["lr"] for group in optimizer.param_groups},
            tokens_per_second=tokens / seconds,
            seconds_per_step=seconds / self.steps,
            gradient_norm=None if self.norm is None else float(self.norm),
            skipped_steps=self.skipped,
        )
        self._restart()
        return report
