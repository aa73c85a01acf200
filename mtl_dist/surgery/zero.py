"""DeepSpeed's ZeRO from the inside: the averaged gradients that it steps with, its fp32 weights and its moments.

Stages 1 to 3 flatten the parameters of a group, and each rank keeps a part of that in fp32, with its moments. They
have in common `averaged_gradients`: this rank's parts of the gradients, between the backward passes and the step.
All that touches DeepSpeed's internals is here; the tests against one process guard it.
"""

# Shape suffixes: as in rows.py.

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_dist.config import UserError
from mtl_dist.surgery.rows import Parameters, Rows, add


@dataclass(frozen=True)
class Place:
    """Where this rank keeps its part of a parameter."""

    flat: Tensor  # the rank's fp32 weights of the whole group; the optimizer's moments have the same shape
    inside: slice  # of the flat tensor; empty where other ranks keep all of the parameter
    first: int  # the part's first element in the parameter
    shape: torch.Size  # of the whole parameter

    def gather(self, flat: Tensor) -> Tensor:
        """All of the parameter, or of a moment of it; every rank must ask for it."""
        whole = torch.zeros(self.shape, device=flat.device)
        part = flat[self.inside]
        whole.view(-1)[self.first : self.first + len(part)] = part
        dist.all_reduce(whole)
        return whole

    def scatter(self, whole: Tensor, flat: Tensor) -> None:
        """Keeps this rank's part of a parameter, or of a moment of it."""
        part = flat[self.inside]
        part.copy_(whole.reshape(-1)[self.first : self.first + len(part)])


def places(zero: Any) -> dict[nn.Parameter, Place]:
    """Where this rank keeps the parameters that are trained."""
    found: dict[nn.Parameter, Place] = {}
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        for group in zero.fp16_groups:
            for parameter in group:
                index, start, elements = zero.grad_position[zero.get_param_id(parameter)]
                first = dist.get_rank() * elements
                here = min(elements, max(0, parameter.ds_numel - first))  # the last ones are padded
                flat = zero.fp32_partitioned_groups_flat[index]
                found[parameter] = Place(flat, slice(start, start + here), first, parameter.ds_shape)
        return found
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            inside, first = slice(0, 0), 0
            if (mapping := parameter._hp_mapping) is not None:
                address = mapping.get_hp_fragment_address()
                inside = slice(address.start, address.start + address.numel)
                first = mapping.lp_fragment_address.start
            found[parameter] = Place(flat, inside, first, parameter.shape)
    return found


def groups_in(zero: Any) -> dict[Tensor, list[nn.Parameter]]:
    """The parameters behind each flat tensor that the optimizer steps."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        return dict(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
    return dict(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))


def forget(zero: Any) -> None:
    """Clears the averaged gradients.

    Stage 3 would else apply those of a head that went unused again and again; stages 1 and 2 would add one task's to
    the next one's, where they add up in another precision than the model's.
    """
    if hasattr(zero, "grad_partitions_flat_buffer"):
        zero.grad_partitions_flat_buffer.zero_()
    else:
        zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))  # in place: the parameters refer to it


def averaged_parts(zero: Any) -> dict[nn.Parameter, Tensor]:
    """This rank's parts of the averaged gradients; what is written to them is what ZeRO steps with."""
    if hasattr(zero, "grad_partitions_flat_buffer"):
        return {
            parameter: part
            for i, group in enumerate(zero.fp16_groups)
            for parameter, part in zip(group, zero.averaged_gradients[i], strict=True)
        }
    return {
        parameter: parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        for group in zero.bit16_groups
        for parameter in group
        if parameter._hp_mapping is not None
    }


class Partitioned(Rows):
    """The rows of tasks under ZeRO: read after each visit, and their combination written once, before the step."""

    steps = True

    def __init__(self, model: Any, shared: Parameters, rest: Parameters, dtype: torch.dtype, scaler: Any) -> None:
        self.zero = model.optimizer
        _refuse(self.zero)
        super().__init__(model, shared, rest, dtype, scaler)
        # ZeRO-3 frees its weights with the first backward pass (deepspeedai/DeepSpeed#8135).
        self.retains = not hasattr(self.zero, "fp32_partitioned_groups_flat")
        # ZeRO-1 averages what the last backward pass of a step goes through, and nothing else.
        self.sums = getattr(self.zero, "partition_gradients", True)
        self.places = places(self.zero)
        self.groups = groups_in(self.zero)
        self.names = {parameter: name for name, parameter in model.module.named_parameters()}
        self.device = next(iter(self.places.values())).flat.device
        self._lay_out([self.places[p].inside.stop - self.places[p].inside.start for p in shared])
        self.step_reached: Set[nn.Parameter] = set()
        self.hooks.append(self.zero.optimizer.register_step_pre_hook(self._pass_over_unused))

    def _group(self) -> Any:
        return self.zero.dp_process_group

    def close(self) -> None:
        """Lets go of the model, whose engine counts its micro-batches again."""
        super().close()
        self.model.set_gradient_accumulation_boundary(None)

    def start(self) -> None:
        """Begins a step."""
        super().start()
        forget(self.zero)

    @contextmanager
    def micro_batch(self, averages: bool) -> Iterator[None]:
        """Around a backward pass; whether ZeRO then averages."""
        # The loop's own no_sync, of accelerator.accumulate, must not keep a visit's gradient back.
        inside, self.model.inside_no_sync_ctxt = self.model.inside_no_sync_ctxt, False
        self.model.set_gradient_accumulation_boundary(averages)
        try:
            with super().micro_batch(averages):
                yield
        finally:
            self.model.inside_no_sync_ctxt = inside

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Adds to the gradients."""
        self.model.backward(loss, retain_graph=retain_graph)  # accelerator.backward would step as well

    @property
    def loss_scale(self) -> Tensor:
        """The factor that keeps fp16 gradients in range; they still have it when they are combined."""
        return torch.full((), float(self.zero.loss_scale), device=self.device)

    @contextmanager
    def of_task(self, task: str, last: bool) -> Iterator[None]:
        """Around the backward passes of a visit of a task."""
        k, _ = self._visit(task)
        forget(self.zero)
        yield
        parts = averaged_parts(self.zero)
        found = [
            (self.rows[k][columns], parts[parameter].reshape(-1)[: columns.stop - columns.start])
            for parameter, columns in zip(self.shared, self.slices, strict=True)
            if parameter in parts
        ]
        add([into for into, _ in found], [gradient for _, gradient in found])
        self._keep_own(k, [(parameter, parts[parameter].clone()) for parameter in self.rest if parameter in parts])

    def settle(self, reached: Set[nn.Parameter]) -> None:
        """Refuses a step that would move what it did not reach: ZeRO steps all parameters of a group as one."""
        self.step_reached = reached
        for members in self.groups.values():
            here = [parameter for parameter in members if parameter in reached]
            if here and len(here) < len(members):
                away = next(parameter for parameter in members if parameter not in reached)
                raise UserError(
                    f"ZeRO moves all parameters of an optimizer's group as one, and this step reached "
                    f"'{self.names[here[0]]}' but not '{self.names[away]}' of the same group; freeze what no task "
                    "uses, and before prepare give what not every step uses a group of its own: "
                    "split_groups(optimizer, model, 'HEAD', ...)"
                )

    def _pass_over_unused(self, *_: object) -> None:
        for flat, members in self.groups.items():
            if self.step_reached.isdisjoint(members):
                flat.grad = None

    def deposit(self, weights_GK: Tensor | None, group_of_S: Sequence[int], reached: Set[nn.Parameter]) -> None:
        """Makes the combination of the rows, and the sum of what is not combined, what ZeRO will step with."""
        combined_N = self.combined(weights_GK, group_of_S)
        own = self.summed_own()
        columns = dict(zip(self.shared, self.slices, strict=True))
        for parameter, part in averaged_parts(self.zero).items():
            part.zero_()
            if parameter in columns:
                here = combined_N[columns[parameter]]
                part.view(-1)[: len(here)].copy_(here)
            elif parameter in own:
                part.copy_(own[parameter])


def _refuse(zero: Any) -> None:
    """Refuses ways of ZeRO that keep gradients where they cannot be read."""
    if not (hasattr(zero, "fp32_partitioned_groups_flat") or hasattr(zero, "single_partition_of_fp32_groups")):
        raise UserError(
            f"DeepSpeed steps with {type(zero).__name__}, which hides its gradients; use zero_optimization.stage 1, 2 "
            "or 3 (1 not in bf16 with grad_accum_dtype fp32)"
        )
    for attribute, key in (
        ("cpu_offload", "offload_optimizer"),
        ("offload_optimizer", "offload_optimizer"),
        ("offload_param", "offload_param"),
        ("round_robin_gradients", "round_robin_gradients"),  # it keeps parameters elsewhere than it says
    ):
        if getattr(zero, attribute, False):
            raise UserError(f"DeepSpeed's zero_optimization.{key} is not supported; leave it out")


def split_groups(optimizer: Optimizer, model: nn.Module, *modules: str) -> None:
    """Gives the parameters of each of these submodules groups of their own, before ZeRO flattens the groups.

    What a step may leave out must not share a group with what it moves.
    """
    part_of = {parameter: path for path in modules for parameter in model.get_submodule(path).parameters()}
    divided: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_part: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_part.setdefault(part_of.get(parameter, ""), []).append(parameter)
        divided += [{**group, "params": parameters} for parameters in by_part.values()]
    optimizer.param_groups[:] = divided
