"""What trains a stage's model on all ranks together: DDP or one process, DeepSpeed's ZeRO, FSDP2. The launcher chooses.

The loop is the same for all of them. How gradients are averaged is surgery's business; here is how the optimizer steps,
and where weights and moments are. For scoring and saving, and from one stage to the next, `whole` has the weights on
every rank.
"""

import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mtl_dist.distributed import autocast, precision_of
from mtl_dist.optim import Average
from mtl_dist.surgery.zero import averaged_parts, places, split_groups

M = TypeVar("M", bound=nn.Module)
AVERAGE = "average"  # what it is called among the optimizer's moments


@dataclass(frozen=True)
class Stepped:
    """What became of a step, as the device may still compute it."""

    norm: Tensor  # of the gradient, before clipping; where it is no number, the step was skipped
    loss_scale: Tensor  # of the next step


class Engine(ABC, Generic[M]):
    """A stage's model and its optimizer."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: M,
        optimizer: Optimizer,
        clip_norm: float | None = None,
        average: Average | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.clip_norm = clip_norm
        self.average = average
        self.model: Any
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.module: M = accelerator.unwrap_model(self.model)  # the same without wrappers, for its parameters

    @property
    def own_optimizer(self) -> Optimizer:
        """The optimizer without wrappers, of the tensors that it moves on this rank."""
        own: Optimizer = self.optimizer.optimizer
        return own

    def forward(self, *inputs: Any) -> Any:
        """What the model makes of its inputs, in the run's precision."""
        return self.model(*inputs)

    def step(self, number: int) -> Stepped:
        """Clips, steps, and clears the gradients; without a step where they are not finite.

        `number` is the step's in its stage, from 0.
        """
        stepped = self._step()
        if self.average is not None:
            self._move_averages(self.average.share(number + 1))
        return stepped

    @torch.no_grad()
    def _move_averages(self, share: float) -> None:
        """Moves the averages so far towards the weights. They are the optimizer's, saved and spread as its moments."""
        # Heads of tasks that were not drawn yet have no state, and with an average alone it would not be made.
        states: Mapping[Tensor, dict[str, Tensor]] = {p: each for p, each in self.own_optimizer.state.items() if each}
        for parameter, state in states.items():
            if AVERAGE not in state:
                state[AVERAGE] = parameter.detach().clone()
        if states:
            torch._foreach_lerp_([state[AVERAGE] for state in states.values()], list(states), share)

    def _step(self) -> Stepped:
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        device, scaler = self.accelerator.device, self.accelerator.scaler
        if not parameters:  # every task was dropped
            norm = torch.full((), math.nan, device=device)
        else:
            self.accelerator.unscale_gradients()
            total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if self.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, total)
            norm = _whole(total)
            self._step_if_finite(norm)
        self.optimizer.zero_grad()
        one = torch.ones((), device=device)
        return Stepped(norm, one if scaler is None else scaler.scale(one))

    def _step_if_finite(self, norm: Tensor) -> None:
        """Steps, if the norm is a number: the same on all ranks, because the gradients are."""
        optimizer: Any = self.own_optimizer
        if self.accelerator.scaler is not None:  # which finds out by itself
            self.optimizer.step()
        elif optimizer.param_groups[0].get("fused"):  # decides on the device
            optimizer.found_inf = norm.isfinite().logical_not().float()
            self.optimizer.step()
        elif norm.isfinite():
            self.optimizer.step()

    def moments(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What the optimizer knows of each parameter that it moved, whole; every rank must ask for all of them."""
        for name, parameter in self.module.named_parameters():
            if state := self.optimizer.state.get(parameter):
                yield name, {key: _whole(value) for key, value in state.items()}

    def restore(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Makes the optimizer go on with what `moments` once gave; with no average that nobody moves any more."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if (state := moments.get(names[parameter])) is not None:
                    self.optimizer.state[parameter] = {
                        key: _count(group, parameter, value) if key == "step" else _like(parameter, value)
                        for key, value in state.items()
                        if self._goes_on_with(key)
                    }

    def _goes_on_with(self, moment: str) -> bool:
        return moment != AVERAGE or self.average is not None

    def scaling(self) -> dict[str, Any]:
        """How fp16 losses are scaled."""
        return {} if self.accelerator.scaler is None else dict(self.accelerator.scaler.state_dict())

    def restore_scaling(self, scaling: dict[str, Any]) -> None:
        """Makes fp16 losses be scaled as `scaling` once said."""
        if scaling and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaling)

    @abstractmethod
    def whole(self, averaged: bool = False) -> AbstractContextManager[M]:
        """The model as it stands, or with its averaged weights where these are asked for and there are some.

        All weights are on this rank's device; every rank must ask for it.
        """

    @abstractmethod
    def close(self) -> M:
        """Ends the stage; the model that the next one begins with."""


class Replicas(Engine[M]):
    """One process, or DDP: every rank has the model and the optimizer."""

    def __init__(
        self, accelerator: Accelerator, model: M, optimizer: Optimizer, rows: Collection[str], **settings: Any
    ) -> None:
        """`rows` names parameters whose gradients surgery averages in every step: DDP would keep buckets for them."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if trained.keys() <= set(rows):  # DDP wants some
            rows = ()
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, rows)
        super().__init__(accelerator, model, optimizer, **settings)
        if accelerator.num_processes > 1:
            for name in rows:  # as DDP does with what it averages
                dist.broadcast(trained[name].data, src=0)

    @contextmanager
    def whole(self, averaged: bool = False) -> Iterator[M]:
        state = self.optimizer.state
        averages = {p: state[p][AVERAGE] for p in self.module.parameters() if averaged and AVERAGE in state.get(p, {})}
        weights = {parameter: parameter.data for parameter in averages}
        try:
            for parameter, average in averages.items():
                parameter.data = average
            yield self.module
        finally:
            for parameter, weight in weights.items():
                parameter.data = weight

    def close(self) -> M:
        self.accelerator.free_memory()
        model: M = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return model


class Split(Engine[M]):
    """The weights, or what the optimizer keeps of them, are spread over the ranks; a whole copy waits on the CPU."""

    def __init__(self, accelerator: Accelerator, model: M, optimizer: Optimizer, **settings: Any) -> None:
        self.copy = copy.deepcopy(model).cpu()
        super().__init__(accelerator, model, optimizer, **settings)

    @abstractmethod
    def gather(self, parameter: nn.Parameter, averaged: bool) -> Tensor:
        """All of a parameter that is trained, in fp32."""

    def _copied(self, averaged: bool = False) -> M:
        with torch.no_grad():
            for ours, theirs in zip(self.copy.parameters(), self.module.parameters(), strict=True):
                if ours.requires_grad:
                    ours.copy_(self.gather(theirs, averaged))
        return self.copy

    @contextmanager
    def whole(self, averaged: bool = False) -> Iterator[M]:
        yield self._copied(averaged).to(self.accelerator.device)
        self.copy.cpu()

    def _weights(self, kept: Tensor, averaged: bool) -> Tensor:
        """What is kept here of some weights, or of their average."""
        average = self.own_optimizer.state.get(kept, {}).get(AVERAGE) if averaged else None
        return (kept if average is None else average).detach()

    def close(self) -> M:
        model = self._copied()
        self.accelerator.free_memory()
        return model.to(self.accelerator.device)


class Fsdp2(Split[M]):
    """FSDP2: weights, gradients and moments are shards, which forward and backward gather and scatter."""

    def forward(self, *inputs: Any) -> Any:
        with autocast(self.accelerator):  # which Accelerate adds under DDP only
            return self.model(*inputs)

    def gather(self, parameter: nn.Parameter, averaged: bool) -> Tensor:
        return _whole(self._weights(parameter, averaged))


class Zero(Split[M]):
    """DeepSpeed's ZeRO 1, 2 and 3: its engine averages, clips and steps."""

    def __init__(
        self, accelerator: Accelerator, model: M, optimizer: Optimizer, clip_norm: float | None, **settings: Any
    ) -> None:
        # Our AdamW is not on DeepSpeed's list; the tests vouch for it.
        logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
        accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = clip_norm or 0.0
        super().__init__(accelerator, model, optimizer, **settings)
        self.places = places(self.model.optimizer)
        # DeepSpeed makes its fp32 weights of those that it has just rounded to the model's precision.
        for ours, theirs in zip(self.copy.parameters(), self.module.parameters(), strict=True):
            if (place := self.places.get(theirs)) is not None:
                place.scatter(ours.detach().to(accelerator.device), place.flat.detach())

    @property
    def own_optimizer(self) -> Optimizer:
        own: Optimizer = self.model.optimizer.optimizer
        return own

    def _step(self) -> Stepped:
        zero = self.model.optimizer
        parts = averaged_parts(zero).values()
        square = torch.stack([part.double().square().sum() for part in parts]).sum()
        dist.all_reduce(square)
        norm = square.sqrt() / zero.loss_scale
        # In fp16 DeepSpeed finds out by itself; else it would step.
        if precision_of(self.accelerator) == "fp16" or norm.isfinite():
            self.model.step()
        norm = torch.full_like(norm, math.inf) if zero.overflow else norm
        return Stepped(norm, torch.full_like(norm, zero.loss_scale))

    def gather(self, parameter: nn.Parameter, averaged: bool) -> Tensor:
        place = self.places[parameter]
        return place.gather(self._weights(place.flat, averaged))

    def moments(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.module.named_parameters():
            if (place := self.places.get(parameter)) and (state := self.own_optimizer.state.get(place.flat)):
                yield name, {key: value if key == "step" else place.gather(value) for key, value in state.items()}

    def restore(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        optimizer = self.own_optimizer
        group = optimizer.param_groups[0]  # all are fused, or none
        for name, parameter in self.module.named_parameters():
            if name in moments and (place := self.places.get(parameter)):
                kept = optimizer.state.setdefault(place.flat, {})
                for key, value in moments[name].items():
                    if not self._goes_on_with(key):
                        continue
                    if key == "step":
                        kept[key] = _count(group, place.flat, value)
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


def _count(group: Mapping[str, Any], parameter: Tensor, step: Tensor) -> Tensor:
    """A step count where the optimizer reads it: a fused one beside the weights, others without waiting for a GPU."""
    return step.to(parameter.device if group.get("fused", False) else "cpu", copy=True)


def _like(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """A whole tensor as this rank keeps the parameter: all of it, or a shard."""
    whole = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def start_engine(
    accelerator: Accelerator,
    model: M,
    optimizer: Optimizer,
    clip_norm: float | None = None,
    average: Average | None = None,
    apart: Sequence[str] = (),
    rows: Collection[str] = (),
) -> Engine[M]:
    """The engine that the launcher asked for; `apart` names submodules that not every step goes through, `rows`
    parameters whose gradients surgery averages in every step.
    """
    settings: dict[str, Any] = {"clip_norm": clip_norm, "average": average}
    if accelerator.distributed_type == DistributedType.FSDP:
        return Fsdp2(accelerator, model, optimizer, **settings)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        split_groups(optimizer, model, *apart)
        return Zero(accelerator, model, optimizer, **settings)
    return Replicas(accelerator, model, optimizer, rows, **settings)
