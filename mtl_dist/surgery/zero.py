"""DeepSpeed's ZeRO from the inside: the averaged gradients that it steps with, its fp32 weights and its moments.

Stages 1 to 3 flatten the parameters of a group, and each rank keeps a part of that in fp32, with its moments. They
have in common `averaged_gradients`: this rank's parts of the gradients, between the backward passes and the step.
All that touches DeepSpeed's internals is here; the tests against one process guard it.
"""

# Shape suffixes: as in surgery/rows.py.

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist.surgery.rows import Layout, Rows


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
    """The rows of tasks under ZeRO: read after each task, and their combination written once, before the step."""

    def __init__(self, layout: Layout, zero: Any, places: Mapping[nn.Parameter, Place]) -> None:
        super().__init__(layout)
        self.zero = zero
        self._allocate(places[p].inside.stop - places[p].inside.start for p in layout.shared)
        self.own_parts: dict[nn.Parameter, Tensor] = {}

    def start(self) -> None:
        """Begins a step."""
        super().start()
        self.own_parts.clear()

    @contextmanager
    def of_task(self, task: str) -> Iterator[None]:
        """Around the backward passes of a task's micro-batches; once in a step."""
        row_N = self.rows_KN[len(self.tasks)]
        self.tasks.append(task)
        forget(self.zero)
        yield
        parts = averaged_parts(self.zero)
        for parameter, columns in zip(self.layout.shared, self.slices, strict=True):
            if parameter in parts:
                row_N[columns].copy_(parts[parameter].reshape(-1)[: columns.stop - columns.start])
        self.own_parts |= {p: parts[p].clone() for p in self.layout.own[task] if p in parts}

    def deposit(self, weights_SK: Tensor) -> None:
        """Makes the combination of the rows, and every head's own gradient, what ZeRO will step with."""
        combined_N = self.combined(weights_SK)
        dropped = {parameter for task in self.dropped for parameter in self.layout.own[task]}
        columns = dict(zip(self.layout.shared, self.slices, strict=True))
        for parameter, part in averaged_parts(self.zero).items():
            part.zero_()
            if parameter in columns:
                here = combined_N[columns[parameter]]
                part.view(-1)[: len(here)].copy_(here)
            elif parameter in self.own_parts and parameter not in dropped:
                part.copy_(self.own_parts[parameter])
