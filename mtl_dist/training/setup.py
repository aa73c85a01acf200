"""From a config to a run that can start: data, orders, model, run folder, and the checkpoint that it goes on from."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count, takewhile
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_dist.checkpoint import Checkpoint, RunLock
from mtl_dist.config import UserError
from mtl_dist.data.batches import Hiding, RowStream, TrainBatches, TrainRows
from mtl_dist.data.mixer import Order
from mtl_dist.data.prepare import Split, train_rows_in_dev
from mtl_dist.data.tokenizer import checkpoint_folder, load_tokenizer
from mtl_dist.distributed import describe, engine_name, first_then_others, on_one, refuse_differences
from mtl_dist.experiment import Experiment, Stage
from mtl_dist.model.multitask import MultiTaskModel
from mtl_dist.model.weights import build_encoder, load_words
from mtl_dist.optim import build_optimizer
from mtl_dist.surgery.combiners import Sum
from mtl_dist.surgery.surgery import Surgery, by_layer, groups_of
from mtl_dist.tasks import HiddenWordsLoss
from mtl_dist.training.engine import AVERAGE, Engine, start_engine
from mtl_dist.training.folder import Splits, start_run_folder
from mtl_dist.training.resume import (
    OF_A_NODE,
    about,
    carried_moments,
    changes,
    checkpoint_to_resume,
    compared,
    counted,
    load_weights,
    moments_of,
    place_of,
    take_best_along,
)
from mtl_dist.watch.screen import counting, make_console, plain_table

SHARED = "encoder"  # what the tasks' gradients are combined in


@dataclass
class Run:
    """A run: what it is, which stays, and where it stands, which changes."""

    accelerator: Accelerator
    config: Experiment
    console: Console
    tokenizer: Tokenizer
    splits: Splits
    stages: list[Stage]
    orders: list[Order]
    about: dict[str, Any]  # what its checkpoints say of it
    resumed: Checkpoint | None  # what it goes on from

    model: MultiTaskModel
    done: int = 0  # steps
    carried: dict[Tensor, dict[str, Any]] = field(default_factory=dict)  # moments that a later stage may go on with

    @property
    def total_steps(self) -> int:
        return sum(order.steps for order in self.orders)

    @property
    def first(self) -> tuple[int, int]:
        """The number of the stage, and its step, with which it begins or goes on."""
        if self.resumed is None:
            return 0, 0
        return place_of(self.resumed, [order.steps for order in self.orders])

    def goes_on_in(self, stage: Stage) -> bool:
        """Whether it was saved within this stage, or at its end."""
        return self.resumed is not None and stage.number == self.first[0]

    def first_step(self, stage: Stage) -> int:
        """The step of a stage with which it begins or goes on."""
        return self.first[1] if self.goes_on_in(stage) else 0


def set_up(
    accelerator: Accelerator, config: Experiment, lock: RunLock, overwrite: bool, resume: str, allow_changes: bool
) -> Run:
    """All that a run needs before its first step, and a few lines about it."""
    _refuse_what_the_engine_cannot(accelerator, config)
    console = make_console(accelerator.is_main_process)
    tokenizer = first_then_others(accelerator, lambda: load_tokenizer(config.encoder.tokenizer_source))
    # What the first process of a machine has checked, the others need not.
    checked = not accelerator.is_local_main_process
    splits = first_then_others(accelerator, lambda: load_data(config, tokenizer, console, checked))
    stages = config.all_stages()
    rows = {name: len(split) for name, split in splits["train"].items()}
    orders = [stage.order(rows, config.seed) for stage in stages]
    model = first_then_others(accelerator, lambda: build_model(config, tokenizer, accelerator.device.type))
    now = about(accelerator, config, splits["train"])
    refuse_differences(accelerator, compared(now, OF_A_NODE))
    now["rows"] = on_one(accelerator, lambda: counted(splits["train"]))
    folder, auto = config.output_dir, resume == "auto"
    # First of all the lock: whoever has the folder may still be saving.
    on_one(accelerator, lambda: lock.take(folder, 120 if auto else 0, console.print))
    resumed = on_one(accelerator, lambda: checkpoint_to_resume(resume, now, folder, allow_changes, console.print))
    goes_on_here = on_one(accelerator, lambda: start_run_folder(config, splits, overwrite or auto, resumed))
    if resumed is not None and not goes_on_here:
        on_one(accelerator, lambda: take_best_along(resumed, folder))
    run = Run(accelerator, config, console, tokenizer, splits, stages, orders, now, resumed, model)

    console.print(data_table(splits))
    for line in on_one(accelerator, lambda: train_rows_in_dev(splits["train"], splits["dev"])):
        console.print(line, highlight=False, markup=False)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters:,} parameters, {run.total_steps:,} steps, {describe(accelerator)}", highlight=False)
    if resumed is not None:
        _go_on(run, resumed, allow_changes)
    return run


def _go_on(run: Run, resumed: Checkpoint, allow_changes: bool) -> None:
    """Puts a run where it was when it was saved."""
    run.done = resumed.step
    first_then_others(run.accelerator, lambda: load_weights(resumed, run.model, allow_changes))
    run.carried = carried_moments(resumed, run.model)
    run.console.print(f"going on after step {run.done:,} of {resumed.path}", highlight=False)
    if (table := changes(resumed, run.about)) is not None:
        run.console.print(table)
    if run.done >= run.total_steps:
        run.console.print("the run is finished: nothing is left to train")


def _refuse_what_the_engine_cannot(accelerator: Accelerator, config: Experiment) -> None:
    """Refuses what DDP and one process can do, and DeepSpeed and FSDP2 cannot."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        for stage in config.all_stages():
            if stage.carry_moments:
                raise UserError(
                    f"{stage.label}carry_moments needs DDP or one process: {engine_name(accelerator)} "
                    "spreads the moments over the ranks; leave it out"
                )


def load_data(config: Experiment, tokenizer: Tokenizer, console: Console, checked: bool = False) -> Splits:
    """Opens every task's train and dev rows, after preparing those that the cache does not have."""
    splits: Splits = {"train": {}, "dev": {}}
    for name in config.tasks:
        for split_name in ("train", "dev"):
            with counting(console, f"preparing {name} {split_name}") as on_rows:
                split = config.open_split(name, split_name, tokenizer, on_rows, checked)
            if split is not None:
                splits[split_name][name] = split
    return splits


def build_model(config: Experiment, tokenizer: Tokenizer, device_type: str) -> MultiTaskModel:
    """The model, after checking that every stage can train its tasks."""
    torch.manual_seed(config.seed)
    finds_words = any(stage.finds_words for stage in config.all_stages())
    model = MultiTaskModel(build_encoder(config.encoder, tokenizer), config.tasks, finds_words)
    if model.words is not None and config.encoder.from_ is not None:
        load_words(model.words, checkpoint_folder(config.encoder.from_))
    for stage in config.all_stages():
        hiding(config, stage, tokenizer)
        stage_optimizer(model, stage, device_type)
        reached = {name for name, parameter in reached_in(model, stage) if parameter.requires_grad}
        shared = [name for name in reached if name.startswith(f"{SHARED}.")]
        try:
            groups_of(shared, stage.gradients, by_layer(shared, (f"{SHARED}.",)))
        except UserError as error:
            raise UserError(f"{stage.label}gradients.{error}") from None
    return model


def reached_in(model: MultiTaskModel, stage: Stage) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that some task's forward pass goes through, with their names."""
    for task in stage.tasks:
        yield from model.reached_by(task, stage.finds_words)


def hiding(config: Experiment, stage: Stage, tokenizer: Tokenizer) -> Hiding | None:
    """How a stage hides words, if it does."""
    if not isinstance(stage.objective, HiddenWordsLoss):
        return None
    mask = tokenizer.token_to_id("[MASK]")
    if mask is None:
        raise UserError(f"{stage.label}objective: {config.encoder.tokenizer_source} has no [MASK] to hide words with")
    tokens = tokenizer.get_vocab()
    special = np.zeros(max(tokens.values()) + 1, dtype=np.bool_)
    special[[tokens[word] for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if word in tokens]] = True
    return Hiding(stage.objective.share, mask, special, f"{config.seed}/{stage.number}")


def stage_optimizer(model: MultiTaskModel, stage: Stage, device_type: str) -> Optimizer:
    """The optimizer of a stage; refuses a task that would change no parameter."""
    others = "heads." if stage.finds_words else "words."
    idle = [name for name, _ in model.named_parameters() if name.startswith(others)]
    named = {name for name, _ in model.named_parameters() for pattern in stage.trains if re.search(pattern, name)}
    if named and named <= set(idle):
        raise UserError(
            f"{stage.label}trains names nothing that {stage.objective.kind} goes through: "
            f"{', '.join(stage.trains)}; its head is {'^words' if stage.finds_words else '^heads'}"
        )
    try:
        optimizer = build_optimizer(model.named_parameters(), stage.optim, device_type, stage.trains, idle)
    except UserError as error:
        raise UserError(f"{stage.label}{error}") from None
    for name in stage.tasks:
        if not any(parameter.requires_grad for _, parameter in model.reached_by(name, stage.finds_words)):
            raise UserError(
                f"{stage.label}task '{name}' has nothing to train: "
                "trains and optim.rules freeze the encoder and all of its head"
            )
    return optimizer


@dataclass(frozen=True)
class Trainer:
    """What trains in a stage."""

    stage: Stage
    order: Order
    batches: TrainBatches  # this rank's
    optimizer: Optimizer
    engine: Engine[MultiTaskModel]
    surgery: Surgery


def start_stage(run: Run, stage: Stage) -> Trainer:
    """What trains in a stage, as it was when the run was saved within it; else the optimizer begins anew, but for
    moments that the stage says it goes on with.
    """
    accelerator, order = run.accelerator, run.orders[stage.number]
    optimizer = stage_optimizer(run.model, stage, accelerator.device.type)
    shared = [name for name, p in run.model.named_parameters() if p.requires_grad and name.startswith(f"{SHARED}.")]
    rows = shared if stage.gradients.always_apart else []
    engine = start_engine(
        accelerator,
        run.model,
        optimizer,
        clip_norm=stage.gradients.clip_norm,
        average=stage.optim.average,
        apart=run.model.apart(),
        rows=rows,
    )
    if stage.carry_moments:
        engine.restore(
            {
                name: {key: value for key, value in run.carried[p].items() if key != AVERAGE}  # every stage has its own
                for name, p in run.model.named_parameters()
                if p in run.carried
            }
        )
    settings = stage.gradients.of_surgery()
    if not shared:
        settings |= {"combiner": Sum() if stage.gradients.operates else stage.gradients.combiner, "measure": False}
    surgery = Surgery(
        engine.model, shared=SHARED, accelerator=accelerator, seed=(run.config.seed, stage.number), **settings
    )
    if run.resumed is not None and stage.number == run.resumed.state["stage"] and run.first_step(stage) > 0:
        engine.restore(moments_of(run.resumed, "moments"))
        engine.restore_scaling(run.resumed.state["scaling"])
        surgery.state = run.resumed.state["combiner"]
    rank, world = accelerator.process_index, accelerator.num_processes
    hidden = hiding(run.config, stage, run.tokenizer)
    batches = train_batches(run.config, stage, order, run.splits["train"], rank, world, hidden)
    return Trainer(stage, order, batches, optimizer, engine, surgery)


def train_batches(
    config: Experiment,
    stage: Stage,
    order: Order,
    splits: Mapping[str, Split],
    rank: int,
    world: int,
    hidden: Hiding | None = None,
) -> TrainBatches:
    """This rank's batches of a stage."""
    rows = {
        name: TrainRows(
            splits[name],
            RowStream(len(splits[name]), config.seed, stage.number, name, task.subsample),
            task.batch_size,
            config.length_window,
            1 if stage.finds_words else task.copies,
        )
        for name, task in stage.tasks.items()
    }
    return TrainBatches(rows, order, rank, world, stage.gradients.accumulation, stage.gradients.max_tokens, hidden)


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


def data_table(splits: Splits) -> Table:
    """What the prepared data holds, and what was left out of it."""
    table = plain_table("task", "split", "rows", "tokens", "skipped rows", "cut inputs", texts=("task", "split"))
    for split_name, by_task in splits.items():
        for name, split in by_task.items():
            numbers = (len(split), split.num_tokens, split.num_rejected, split.num_truncated)
            table.add_row(name, split_name, *(f"{number:,}" for number in numbers))
    return table
