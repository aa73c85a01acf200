"""What trains a stage's model on all ranks together: DDP or one process, DeepSpeed's ZeRO, FSDP2. The launcher chooses.

The loop is the same for all of them. They differ in how gradients are averaged, how the optimizer steps, and where the
weights are; for scoring and saving, and from one stage to the next, `whole` has them all on every rank.
"""

import copy
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mtl_dist.distributed import autocast
from mtl_dist.surgery.rows import Layout, Replicated, Rows, Scattered, Sharded
from mtl_dist.surgery.zero import Partitioned, forget

M = TypeVar("M", bound=nn.Module)
Reached = Mapping[str, Set[str]]  # the names of the parameters that each task goes through


@dataclass(frozen=True)
class Stepped:
    """What became of a step."""

    norm: float | Tensor | None  # of the gradient before clipping, where it is clipped
    skipped: bool  # because a gradient overflowed


class Engine(ABC, Generic[M]):
    """A stage's model and its optimizer."""

    def __init__(
        self, accelerator: Accelerator, model: M, optimizer: Optimizer, clip_norm: float | None, reached: Reached
    ) -> None:
        self.accelerator = accelerator
        self.clip_norm = clip_norm
        self.reached = reached
        self.model: Any
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.module: M = accelerator.unwrap_model(self.model)  # the same without wrappers, for its parameters

    def forward(self, *inputs: Any) -> Any:
        """What the model makes of its inputs, in the run's precision."""
        return self.model(*inputs)

    def start(self, tasks: Collection[str]) -> None:
        """Begins a step that draws these tasks."""

    def micro_batch(self, averages: bool) -> AbstractContextManager[None]:
        """Around forward and backward; whether the engine then averages what has come together over the ranks."""
        return nullcontext() if averages else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients."""
        self.accelerator.backward(loss)

    @abstractmethod
    def rows(self, layout: Layout, scatter: bool) -> Rows:
        """Where the tasks' gradients are kept apart; DDP scatters them over the ranks only when told."""

    @property
    def loss_scale(self) -> float:
        """The factor that keeps fp16 gradients in range; they still have it when they are combined."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def step(self) -> Stepped:
        """Clips, steps, and clears the gradients."""
        before = self.loss_scale
        norm = None
        if self.clip_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # A fused optimizer skips an overflow by itself; only the scale tells.
        return Stepped(norm, skipped=self.loss_scale < before)

    @abstractmethod
    def whole(self) -> AbstractContextManager[M]:
        """The model as it stands, with all weights on this rank's device; every rank must ask for it."""

    @abstractmethod
    def close(self) -> M:
        """Ends the stage; the model that the next one begins with."""


class Replicas(Engine[M]):
    """One process, or DDP: every rank has the model and the optimizer."""

    def rows(self, layout: Layout, scatter: bool) -> Rows:
        return Scattered(layout) if scatter and self.accelerator.num_processes > 1 else Replicated(layout)

    @contextmanager
    def whole(self) -> Iterator[M]:
        yield self.module

    def close(self) -> M:
        self.accelerator.free_memory()
        model: M = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return model


class Split(Engine[M]):
    """The weights, or what the optimizer keeps of them, are spread over the ranks; a whole copy waits on the CPU."""

    def __init__(
        self, accelerator: Accelerator, model: M, optimizer: Optimizer, clip_norm: float | None, reached: Reached
    ) -> None:
        self.copy = copy.deepcopy(model).cpu()
        super().__init__(accelerator, model, optimizer, clip_norm, reached)

    @abstractmethod
    def gather(self, parameter: nn.Parameter) -> Tensor:
        """All of a parameter that is trained, in fp32."""

    def _copied(self) -> M:
        with torch.no_grad():
            for ours, theirs in zip(self.copy.parameters(), self.module.parameters(), strict=True):
                if ours.requires_grad:
                    ours.copy_(self.gather(theirs))
        return self.copy

    @contextmanager
    def whole(self) -> Iterator[M]:
        yield self._copied().to(self.accelerator.device)
        self.copy.cpu()

    def close(self) -> M:
        model = self._copied()
        self.accelerator.free_memory()
        return model.to(self.accelerator.device)


class Fsdp2(Split[M]):
    """FSDP2: weights, gradients and moments are shards, which forward and backward gather and scatter."""

    def forward(self, *inputs: Any) -> Any:
        with autocast(self.accelerator):  # which Accelerate adds under DDP only
            return self.model(*inputs)

    def rows(self, layout: Layout, scatter: bool) -> Rows:
        return Sharded(layout)

    def step(self) -> Stepped:
        stepped = super().step()
        return Stepped(stepped.norm.full_tensor(), False) if isinstance(stepped.norm, DTensor) else stepped

    def gather(self, parameter: nn.Parameter) -> Tensor:
        assert isinstance(parameter, DTensor)
        whole: Tensor = parameter.full_tensor()
        return whole


class Zero(Split[M]):
    """DeepSpeed's ZeRO 1, 2 and 3: its engine averages, clips and steps."""

    def __init__(
        self, accelerator: Accelerator, model: M, optimizer: Optimizer, clip_norm: float | None, reached: Reached
    ) -> None:
        # ZeRO steps all parameters of a group as one. So what goes unused together makes a group of its own,
        optimizer.param_groups[:] = grouped_by_use(optimizer.param_groups, dict(model.named_parameters()), reached)
        # and the optimizer passes over those that a step left unused: a gradient of zero would move them.
        optimizer.register_step_pre_hook(self._pass_over_unused)
        # Our AdamW is not on DeepSpeed's list; the tests vouch for it.
        logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
        accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = clip_norm or 0.0
        super().__init__(accelerator, model, optimizer, clip_norm, reached)

    def start(self, tasks: Collection[str]) -> None:
        self.tasks = tasks
        forget(self.model.optimizer)

    def _pass_over_unused(self, optimizer: Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            if group["tasks"].isdisjoint(self.tasks):
                for parameter in group["params"]:
                    parameter.grad = None

    def micro_batch(self, averages: bool) -> AbstractContextManager[None]:
        self.model.set_gradient_accumulation_boundary(averages)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)  # accelerator.backward would step as well

    def rows(self, layout: Layout, scatter: bool) -> Rows:
        return Partitioned(layout, self.model.optimizer)

    @property
    def loss_scale(self) -> float:
        return float(self.model.optimizer.loss_scale)

    def step(self) -> Stepped:
        self.model.step()
        norm = None if self.clip_norm is None else self.model.get_global_grad_norm()
        return Stepped(norm, skipped=self.model.optimizer.overflow)

    def gather(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param  # its import takes seconds

        whole: Tensor = safe_get_full_fp32_param(parameter)
        return whole

    def close(self) -> M:
        model = super().close()
        self.model.destroy()
        return model


def grouped_by_use(
    groups: list[dict[str, Any]], parameters: Mapping[str, nn.Parameter], reached: Reached
) -> list[dict[str, Any]]:
    """An optimizer's groups, divided so that each holds parameters that the same tasks go through."""
    tasks_of = {
        p: frozenset(task for task, names in reached.items() if name in names) for name, p in parameters.items()
    }
    divided = []
    for group in groups:
        by_tasks = defaultdict(list)
        for parameter in group["params"]:
            by_tasks[tasks_of[parameter]].append(parameter)
        divided += [{**group, "params": params, "tasks": tasks} for tasks, params in by_tasks.items()]
    return divided


def start_engine(
    accelerator: Accelerator, model: M, optimizer: Optimizer, clip_norm: float | None, reached: Reached
) -> Engine[M]:
    """The engine that the launcher asked for."""
    engines: dict[DistributedType, type[Engine[M]]] = {DistributedType.DEEPSPEED: Zero, DistributedType.FSDP: Fsdp2}
    engine = engines.get(accelerator.distributed_type, Replicas)
    return engine(accelerator, model, optimizer, clip_norm, reached)
