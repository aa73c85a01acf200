"""How a step's gradients come together: in one reduction, or task by task, with surgery before the optimizer.

    with gradients.of_task("sst"):
        with gradients.micro_batch(last): ... forward, backward ...
    conflict = gradients.combine()

Average first, then combine: every task's gradient is the mean over all ranks before its inner products are formed, so
any number of ranks computes what one would compute with the whole global batch.
"""

# Shape suffixes: K = tasks of the step, S = shared parameters, G = groups of them that are combined by themselves.

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.distributed as dist
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from mtl_dist.config import Config, Pattern
from mtl_dist.surgery.combiners import AnyCombiner, GramCombiner, LossCombiner, Sum
from mtl_dist.surgery.conflict import Conflict, conflict
from mtl_dist.surgery.rows import Layout, Rows
from mtl_dist.training.engine import Engine


class GradientsConfig(Config):
    """How a step's gradients are gathered and combined."""

    combiner: AnyCombiner = Sum()
    # What is combined as one: all shared parameters, or each layer of the encoder by itself.
    scope: Literal["shared", "layers"] = "shared"
    match: Pattern = "."  # only shared parameters of these names; the others' gradients are added up
    every: PositiveInt = 1  # surgery on every n-th step, the plain sum on those between
    # How far the tasks' gradients agree, also where they are only added up; `layers`: in each layer by itself as well.
    measure: bool | Literal["layers"] = False
    # Under DDP. all_reduce sends 2 K P elements a step; reduce_scatter (K + 1) P, and keeps K P / W of them.
    reduce: Literal["all_reduce", "reduce_scatter"] = "all_reduce"
    buffer_dtype: Literal["fp32", "bf16"] = "fp32"  # of the tasks' gradients
    # per_task: a draw counts by its mean loss; per_sample: every row of a step counts alike, so large batches win.
    reweight: Literal["per_task", "per_sample"] = "per_task"
    accumulation: PositiveInt = 1  # micro-batches that each process computes a draw in; changes memory alone
    max_tokens: PositiveInt | None = None  # of a micro-batch: there are as many more of them as this takes
    clip_norm: PositiveFloat | None = None  # largest norm of the gradient, over all parameters
    # A gradient that is infinite or NaN: the step is left out, the task that it comes from is, or the run ends.
    nonfinite: Literal["skip_step", "drop_task", "stop"] = "skip_step"
    most_nonfinite: PositiveInt = 10  # steps in a row with such a gradient, after which the run ends

    @model_validator(mode="after")
    def _drops_what_it_can_tell_apart(self) -> Self:
        if self.nonfinite == "drop_task" and not (self.measure or (self.operates and self.every == 1)):
            raise ValueError(
                "nonfinite is drop_task, which needs the tasks' gradients apart in every step: set measure"
            )
        return self

    @property
    def operates(self) -> bool:
        """Whether the combination is another than the sum."""
        return isinstance(self.combiner, GramCombiner) and not isinstance(self.combiner, Sum)


class Gradients:
    """What a stage does with its gradients.

    Without surgery the engine averages their sum, with the last micro-batch. With it every task has a row.
    """

    def __init__(self, engine: Engine[Any], config: GradientsConfig, most_tasks: int, seed: tuple[int, int]) -> None:
        self.engine = engine
        self.accelerator = engine.accelerator
        self.config = config
        self.seed = seed
        self.state: dict[str, dict[str, Any]] = {}  # the combiner's, for each group of parameters
        trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        reached = {task: [name for name in trained if name in names] for task, names in engine.reached.items()}
        everywhere = set().union(*reached.values())
        shared = [name for name in trained if name in everywhere and name.startswith("encoder.")]
        self.groups = groups_of(shared, config)
        self.layers = by_layer(shared) if config.measure == "layers" else None
        self.rows: Rows | None = None
        if (config.operates or config.measure) and shared:
            layout = Layout(
                shared=[trained[name] for name in shared],
                used={task: [trained[name] for name in names if name in shared] for task, names in reached.items()},
                own={task: [trained[name] for name in names if name not in shared] for task, names in reached.items()},
                most_tasks=most_tasks,
                dtype=torch.bfloat16 if config.buffer_dtype == "bf16" else torch.float32,
            )
            self.rows = engine.rows(layout, scatter=config.reduce == "reduce_scatter")

    def start(self, step: int, tasks: list[str]) -> None:
        """Begins a step of the stage, which draws these tasks."""
        self.step = step
        self.tasks = tasks
        self.operates_now = self.config.operates and step % self.config.every == 0
        self.filled = self.rows if self.operates_now or self.config.measure else None
        self.engine.start(tasks)
        if self.filled is not None:
            self.filled.start()

    def loss_weights(self) -> dict[str, float]:
        """What the losses of the step's tasks are multiplied with, besides their own weights."""
        if isinstance(self.config.combiner, GramCombiner):
            return dict.fromkeys(self.tasks, 1.0)
        return self.config.combiner.loss_weights(self.tasks, self.state.setdefault("losses", {}))

    def observe(self, losses: dict[str, float]) -> None:
        """Learns from the mean losses of the step's tasks, before any weight."""
        if isinstance(self.config.combiner, LossCombiner):
            self.config.combiner.observe(losses, self.state.setdefault("losses", {}))

    def of_task(self, task: str) -> AbstractContextManager[None]:
        """Around all micro-batches of a task; once in a step, in the order of the step's tasks."""
        self.is_last_task = task == self.tasks[-1]
        return nullcontext() if self.filled is None else self.filled.of_task(task)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; `last` is its task's last one."""
        return self.engine.micro_batch(
            averages=last and (self.is_last_task if self.filled is None else self.filled.averaged_by_engine)
        )

    @property
    def dropped(self) -> set[str]:
        """The tasks that the step at hand goes without."""
        return set() if self.filled is None else self.filled.dropped

    def combine(self) -> Conflict | None:
        """Leaves the combined gradient in the parameters; says what the tasks' were like, where they are known."""
        if self.filled is None:
            return None
        grams_SKK = self.filled.grams()
        grams_SKK /= self.engine.loss_scale**2
        if self.config.nonfinite == "drop_task":
            for k, task in enumerate(self.filled.tasks):
                if not grams_SKK[:, k, k].sum().isfinite():
                    self.filled.drop(task)
                    grams_SKK[:, k] = grams_SKK[:, :, k] = 0
            self.engine.tasks = self.filled.kept
        weights_SK = self._weights(grams_SKK, self.filled.tasks)
        self.filled.deposit(weights_SK)
        return conflict(self.filled.tasks, grams_SKK, weights_SK, self.layers)

    def _weights(self, grams_SKK: Tensor, tasks: list[str]) -> Tensor:
        """How often each task's gradient of each shared parameter goes into the combined one: the same on all ranks."""
        weights_SK = grams_SKK.new_ones(grams_SKK.shape[:2])
        if not self.operates_now:
            return weights_SK
        if isinstance(self.config.combiner, GramCombiner) and self.accelerator.is_main_process:
            seed = np.random.SeedSequence((*self.seed, self.step)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0]) % 2**63)
            for group, members in self.groups.items():
                state = self.state.setdefault(group, {})
                gram_KK = grams_SKK[members].sum(0)
                weights_SK[members] = self.config.combiner.weights(gram_KK, tasks, state, generator)
        # One rank decides: on another processor a sign near zero could come out the other way.
        if self.accelerator.num_processes > 1:
            on_device = weights_SK.to(self.accelerator.device)
            dist.broadcast(on_device, src=0)
            weights_SK = on_device.cpu()
        return weights_SK


def groups_of(names: Sequence[str], config: GradientsConfig) -> dict[str, list[int]]:
    """The parameters that are combined as one, by their places; those that no group has are added up."""
    groups = by_layer(names) if config.scope == "layers" else {"shared": list(range(len(names)))}
    matched = {
        group: [place for place in places if re.search(config.match, names[place])] for group, places in groups.items()
    }
    return {group: places for group, places in matched.items() if places}


def by_layer(names: Sequence[str]) -> dict[str, list[int]]:
    """The places of the encoder's parameters, by the part of it that they belong to: embeddings, layers.0, ..."""
    layers: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        layer = re.match(r"encoder\.(layers\.\d+|\w+)", name)
        assert layer is not None, name
        layers.setdefault(layer[1], []).append(place)
    return layers
