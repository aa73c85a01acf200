"""What an experiment is going to do, before it does it: draws, repetition, steps, tokens, bytes, memory and time.

config, splits -> plan -> (measure: a few timed steps) -> tables, or JSON with the fields below as keys
"""

import io
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from statistics import median

from rich.console import RenderableType
from rich.filesize import decimal
from rich.text import Text
from tokenizers import Tokenizer
from torch import nn

from mtl_dist.data.mixer import Explicit, Order, SampledOrder
from mtl_dist.data.prepare import Split
from mtl_dist.distributed import ENGINES, EngineName, Precision
from mtl_dist.experiment import Experiment, LogConfig, Stage, StageConfig
from mtl_dist.studies.cost import StageCost, Work, cost_of
from mtl_dist.surgery.rows import row_length
from mtl_dist.training.folder import Splits
from mtl_dist.training.loop import train
from mtl_dist.training.setup import build_model, stage_optimizer
from mtl_dist.watch.recorder import METRICS
from mtl_dist.watch.screen import plain_table

MOST_READS = 4  # of a row, up to which reading it again is nearly as good as reading another one
RECORDED_STEPS, RECORDS = 4, 3  # of each stage in a timed run


@dataclass(frozen=True)
class TaskPlan:
    """What a stage draws of a task; of random draws, on average."""

    rows: int  # of the train split
    epoch_rows: int  # fewer where the task is subsampled
    probability: tuple[float, float]  # of a draw: the stage's first, and its last
    draws: float
    rows_drawn: float
    epochs: float
    times_read: float  # how often each row that the task may read was read when the stage ends, over all stages so far
    repeated: bool  # whether that is more than MOST_READS, and the stage draws the task
    tokens: float


@dataclass(frozen=True)
class StagePlan:
    """One stage; its times are None until they are measured."""

    name: str
    steps: int
    tokens: float
    trained_parameters: int
    cost: StageCost
    tasks: dict[str, TaskPlan]
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None  # of all ranks together
    seconds: float | None = None  # evaluations not included


@dataclass(frozen=True)
class Plan:
    """All stages, and their sums."""

    ranks: int
    engine: EngineName
    precision: Precision
    steps: int
    tokens: float
    stages: list[StagePlan]
    seconds: float | None = None
    verdict: list[str] = field(default_factory=list)  # on the tasks' gradients, where the timed steps keep them apart


def plan(
    config: Experiment, tokenizer: Tokenizer, splits: Splits, ranks: int, engine: EngineName, precision: Precision
) -> Plan:
    """What training on these splits does, on so many ranks."""
    model = build_model(config, tokenizer, "cpu")
    train_splits = splits["train"]
    rows = {name: len(split) for name, split in train_splits.items()}
    read: dict[str, float] = defaultdict(float)  # rows of each task, by all stages so far
    stages = []
    for stage in config.all_stages():
        order = stage.order(rows, config.seed)
        stage_optimizer(model, stage, "cpu")  # which sets what the stage trains
        trained = _elements(model, trained=True)
        draws_per_step = sum(order.expected().values()) / (order.steps or 1)
        work = Work(
            parameters=_elements(model),
            layers=_elements(model.encoder.layers),
            trained=trained,
            shared=_elements(model.encoder, trained=True),
            row=row_length(p.numel() for p in model.encoder.parameters() if p.requires_grad),
            tasks=stage.mixer.most_tasks(len(stage.tasks)),
            micro_batches=draws_per_step * stage.gradients.accumulation,
            moments=2 + (stage.optim.average is not None),
        )
        cost = cost_of(work, stage.gradients, engine, precision, ranks)
        probability = probabilities(order)
        tasks = {}
        for name, draws in order.expected().items():
            task, size = stage.tasks[name], order.sizes[name]
            drawn = draws * size.batch_size
            read[name] += drawn
            fixed = task.subsample is not None and task.subsample.subset == "fixed"
            times_read = read[name] / (size.rows if fixed else rows[name])
            tasks[name] = TaskPlan(
                rows=rows[name],
                epoch_rows=size.rows,
                probability=probability[name],
                draws=draws,
                rows_drawn=drawn,
                epochs=drawn / size.rows,
                times_read=times_read,
                # As it is shown: filling up the last batch of four epochs makes no fifth one.
                repeated=draws > 0 and round(times_read, 1) > MOST_READS,
                tokens=tokens_of_draws(stage, name, draws, train_splits[name]),
            )
        tokens = sum(task.tokens for task in tasks.values())
        stages.append(StagePlan(stage.name, order.steps, tokens, trained, cost, tasks))
    steps, tokens = sum(stage.steps for stage in stages), sum(stage.tokens for stage in stages)
    return Plan(ranks, engine, precision, steps, tokens, stages)


def tokens_of_draws(stage: Stage, name: str, draws: float, split: Split) -> float:
    """About how many tokens some draws of a task are."""
    task = stage.tasks[name]
    copies = 1 if stage.finds_words else task.copies
    return draws * task.batch_size * copies * split.num_tokens / len(split)


def _elements(module: nn.Module, trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)


def probabilities(order: Order) -> dict[str, tuple[float, float]]:
    """Of each task, to be the stage's first draw and its last; where nothing is random, its share of all draws."""
    if isinstance(order, SampledOrder):
        return dict(zip(order.tasks, zip(order.p_EK[0].tolist(), order.p_EK[-1].tolist(), strict=True), strict=True))
    draws = order.expected()
    return {name: (number / (sum(draws.values()) or 1),) * 2 for name, number in draws.items()}


def measure(config: Experiment, plan: Plan) -> Plan:
    """The plan with times, from a few steps of real training that leave nothing behind.

    All ranks must call it, and instead of `train`: a process can join the others only once. The first one gets times.
    """
    times: dict[str, list[float]] = defaultdict(list)
    verdict: list[str] = []
    if plan.steps:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            train(timed_run(config, plan, Path(folder)))
            if not (Path(folder) / METRICS).exists():  # one rank alone writes them
                return plan
            for record in map(json.loads, (Path(folder) / METRICS).read_text(encoding="utf-8").splitlines()):
                if record["kind"] == "train":
                    times[record["stage"]].append(record["seconds_per_step"])
                elif record["kind"] == "gradients":
                    verdict = record["verdict"]

    def timed(stage: StagePlan) -> StagePlan:
        if not stage.steps:
            return replace(stage, seconds=0.0)
        per_step = median(times[stage.name][1:])  # in the first record everything warms up
        seconds = stage.steps * per_step
        return replace(stage, seconds_per_step=per_step, tokens_per_second=stage.tokens / seconds, seconds=seconds)

    stages = [timed(stage) for stage in plan.stages]
    seconds = sum(stage.seconds or 0.0 for stage in stages)
    return replace(plan, stages=stages, seconds=seconds, verdict=verdict)


def timed_run(config: Experiment, plan: Plan, folder: Path) -> Experiment:
    """A few steps of each stage that has any, whose draws are those of the whole stage in small."""
    stages = []
    for stage, planned in zip(config.stages or [StageConfig()], plan.stages, strict=True):
        if planned.steps:
            draws = {name: task.draws for name, task in planned.tasks.items()}
            # Its own mixer would start with the first task, or at the first probabilities.
            mixer = Explicit(p=draws, draws_per_step=round(sum(draws.values()) / planned.steps), draw="balanced")
            length = {"steps": RECORDED_STEPS * RECORDS, "epochs": None}
            stages.append(stage.model_copy(update={"name": planned.name, "mixer": mixer, **length}))
    tasks = {name: task.model_copy(update={"dev": None}) for name, task in config.tasks.items()}
    log = LogConfig(every_steps=RECORDED_STEPS, tensorboard=False)
    # Copied, not checked again: a best model is asked for, and nothing is scored.
    return config.model_copy(update={"output_dir": folder, "stages": stages, "tasks": tasks, "log": log})


def tables(plan: Plan) -> Iterator[RenderableType]:
    """The plan for people."""
    several = len(plan.stages) > 1
    for stage in plan.stages:
        if several:
            yield Text(f"stage {stage.name}", style="bold")
        table = plain_table(
            "task", "rows of an epoch", "probability", "draws", "rows drawn", "epochs", "", texts=("task", "")
        )
        for name, task in stage.tasks.items():
            rows = f"{task.epoch_rows:,}" + (f" of {task.rows:,}" if task.epoch_rows < task.rows else "")
            first, last = (f"{probability:.1%}" for probability in task.probability)
            share = first if first == last else f"{first} -> {last}"
            mark = Text(f"! {task.times_read:.1f} times" if task.repeated else "", style="bold red")
            table.add_row(
                name, rows, share, f"{task.draws:,.0f}", f"{task.rows_drawn:,.0f}", f"{task.epochs:.1f}", mark
            )
        yield table
        yield ""
    if any(task.repeated for stage in plan.stages for task in stage.tasks.values()):
        counted = "; stages add up" if several else ""
        yield f"! rows read more than {MOST_READS} times teach little new (Muennighoff et al. 2023){counted}\n"

    memory = ("weights", "gradients", "of tasks", "moments")
    table = plain_table("stage", "steps", "tokens", "trained", "sent per step", *memory, texts=["stage"])
    for stage in plan.stages:
        counts = (f"{number:,.0f}" for number in (stage.steps, stage.tokens, stage.trained_parameters))
        cost = stage.cost
        held = (cost.weight_bytes, cost.gradient_bytes, cost.task_gradient_bytes, cost.moment_bytes)
        table.add_row(
            stage.name, *counts, *(decimal(size) if size else "none" for size in (cost.bytes_sent_per_step, *held))
        )
    if several:
        table.add_row("total", f"{plan.steps:,}", f"{plan.tokens:,.0f}")
    yield table
    ranks = f"{plan.ranks} rank{'s' * (plan.ranks > 1)}"
    yield f"on each of {ranks} with {ENGINES[plan.engine]} in {plan.precision}: sent, and held besides activations"

    if plan.seconds is not None:
        table = plain_table("stage", "seconds per step", "tokens per second", "estimated time", texts=["stage"])
        for stage in plan.stages:
            speeds = (f"{stage.seconds_per_step or 0:.4f}", f"{stage.tokens_per_second or 0:,.0f}")
            table.add_row(stage.name, *(speeds if stage.steps else ("", "")), _duration(stage.seconds))
        if several:
            table.add_row("total", "", "", _duration(plan.seconds))
        yield ""
        yield table
        yield "measured here; evaluations come on top"
        yield from plan.verdict


def _duration(seconds: float | None) -> str:
    return str(timedelta(seconds=round(seconds or 0.0)))
