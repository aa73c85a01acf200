"""What trains a stage's model on all ranks together: DDP or one process, DeepSpeed's ZeRO, FSDP2. The launcher chooses.

The loop is the same for all of them. They differ in how gradients are averaged, how the optimizer steps, and where the
weights are; for scoring and saving, and from one stage to the next, `whole` has them all on every rank.
"""

import copy
import logging
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mtl_dist.distributed import autocast, precision_of
from mtl_dist.surgery.rows import Layout, Replicated, Rows, Scattered, Sharded
from mtl_dist.surgery.zero import Partitioned, averaged_parts, forget, places

M = TypeVar("M", bound=nn.Module)
Reached = Mapping[str, Set[str]]  # the names of the parameters that each task goes through


@dataclass(frozen=True)
class Stepped:
    """What became of a step."""

    norm: float  # of the gradient, before clipping
    skipped: bool  # because of an overflow that fp16's scaling is there for, or because the norm is no number


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
        self.tasks = tasks

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
        """Clips, steps, and clears the gradients; without a step where they are not finite."""
        before = self.loss_scale
        largest = math.inf if self.clip_norm is None else self.clip_norm
        norm = float(_whole(self.accelerator.clip_grad_norm_(self.module.parameters(), largest)))
        # The same on all ranks, because the gradients are. With a scaler the optimizer finds out by itself.
        finite = math.isfinite(norm)
        if finite or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        # A fused optimizer skips an overflow by itself; only the scale tells.
        return Stepped(norm, skipped=not finite or self.loss_scale < before)

    def moments(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What the optimizer knows of each parameter that it moved, whole; every rank must ask for all of them."""
        for name, parameter in self.module.named_parameters():
            if state := self.optimizer.state.get(parameter):
                yield name, {key: _whole(value) for key, value in state.items()}

    def restore(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Makes the optimizer go on with what `moments` once gave."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if (state := moments.get(names[parameter])) is not None:
                    steps_on = parameter.device if group.get("fused", False) else "cpu"
                    self.optimizer.state[parameter] = {
                        key: value.to(steps_on) if key == "step" else _like(parameter, value)
                        for key, value in state.items()
                    }

    def scaling(self) -> dict[str, Any]:
        """How fp16 losses are scaled."""
        return {} if self.accelerator.scaler is None else dict(self.accelerator.scaler.state_dict())

    def restore_scaling(self, scaling: dict[str, Any]) -> None:
        """Makes fp16 losses be scaled as `scaling` once said."""
        if scaling and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaling)

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

    def gather(self, parameter: nn.Parameter) -> Tensor:
        return _whole(parameter.detach())


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
        self.places = places(self.model.optimizer)
        # DeepSpeed makes its fp32 weights of those that it has just rounded to the model's precision.
        for ours, theirs in zip(self.copy.parameters(), self.module.parameters(), strict=True):
            if (place := self.places.get(theirs)) is not None:
                place.scatter(ours.detach().to(accelerator.device), place.flat.detach())

    def start(self, tasks: Collection[str]) -> None:
        super().start(tasks)
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
        return Partitioned(layout, self.model.optimizer, self.places)

    @property
    def loss_scale(self) -> float:
        return float(self.model.optimizer.loss_scale)

    def step(self) -> Stepped:
        zero = self.model.optimizer
        parts = averaged_parts(zero).values()
        square = torch.stack([part.double().square().sum() for part in parts]).sum()
        dist.all_reduce(square)
        norm = math.sqrt(square) / self.loss_scale
        # In fp16 DeepSpeed finds out by itself; else it would step.
        if math.isfinite(norm) or precision_of(self.accelerator) == "fp16":
            self.model.step()
        return Stepped(norm, skipped=not math.isfinite(norm) or zero.overflow)

    def gather(self, parameter: nn.Parameter) -> Tensor:
        place = self.places[parameter]
        return place.gather(place.flat.detach())

    def moments(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.module.named_parameters():
            if (place := self.places.get(parameter)) and (
                state := self.model.optimizer.optimizer.state.get(place.flat)
            ):
                yield name, {key: value if key == "step" else place.gather(value) for key, value in state.items()}

    def restore(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        states = self.model.optimizer.optimizer.state
        for name, parameter in self.module.named_parameters():
            if name in moments and (place := self.places.get(parameter)):
                kept = states.setdefault(place.flat, {})
                for key, value in moments[name].items():
                    if key == "step":
                        kept[key] = value.clone()
                    else:
                        place.scatter(value.to(place.flat.device), kept.setdefault(key, torch.zeros_like(place.flat)))

    def scaling(self) -> dict[str, Any]:
        scaler = vars(self.model.optimizer.loss_scaler)
        return {name: value for name, value in scaler.items() if isinstance(value, int | float)}

    def restore_scaling(self, scaling: dict[str, Any]) -> None:
        vars(self.model.optimizer.loss_scaler).update(scaling)

    def close(self) -> M:
        model = super().close()
        self.model.destroy()
        return model


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 may have spread over the ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """A whole tensor as this rank keeps the parameter: all of it, or a shard."""
    whole = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


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
