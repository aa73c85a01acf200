"""The rows of tasks under DeepSpeed's ZeRO, which averages each gradient and keeps what this rank's optimizer steps.

Stages 1 to 3 have in common `averaged_gradients`: this rank's parts of the gradients, between the backward passes and
the step. They are read after each task, and written once before the step. All that touches DeepSpeed's internals for
this is here; the tests against the algorithm written out guard it.
"""

# Shape suffixes: as in rows.py.

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mtl_dist.surgery.rows import Layout, Rows


class Partitioned(Rows):
    """The rows under ZeRO."""

    def __init__(self, layout: Layout, zero: Any) -> None:
        super().__init__(layout)
        self.zero = zero
        self._allocate(elements_here(zero, parameter) for parameter in layout.shared)
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
        parts = parts_here(self.zero)
        for parameter, columns in zip(self.layout.shared, self.slices, strict=True):
            if parameter in parts:
                row_N[columns].copy_(parts[parameter].reshape(-1))
        self.own_parts |= {p: parts[p].clone() for p in self.layout.own[task] if p in parts}

    def deposit(self, weights_SK: Tensor) -> None:
        """Makes the combination of the rows, and every head's own gradient, what ZeRO will step with."""
        combined_N = self.combined(weights_SK)
        columns = dict(zip(self.layout.shared, self.slices, strict=True))
        for parameter, part in parts_here(self.zero).items():
            if parameter in columns:
                part.copy_(combined_N[columns[parameter]].view_as(part))
            elif parameter in self.own_parts:
                part.copy_(self.own_parts[parameter])
            else:
                part.zero_()


def forget(zero: Any) -> None:
    """Clears the averaged gradients. Stage 3 would else apply those of a head that went unused again and again."""
    if hasattr(zero, "grad_partitions_flat_buffer"):
        zero.grad_partitions_flat_buffer.zero_()
    else:
        zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))  # in place: the parameters refer to it


def elements_here(zero: Any, parameter: Any) -> int:
    """How many elements of a parameter's averaged gradient this rank keeps."""
    if hasattr(zero, "grad_partitions_flat_buffer"):
        return int(parameter.partition_numel())
    return 0 if parameter._hp_mapping is None else int(parameter._hp_mapping.lp_fragment_address.numel)


def parts_here(zero: Any) -> dict[nn.Parameter, Tensor]:
    """This rank's parts of the averaged gradients; what is written to them is what ZeRO steps with."""
    if hasattr(zero, "grad_partitions_flat_buffer"):
        groups: Iterable[tuple[int, list[Any]]] = enumerate(zero.fp16_groups)
        return {p: part for i, group in groups for p, part in zip(group, zero.averaged_gradients[i], strict=True)}
    return {
        parameter: parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        for group in zero.bit16_groups
        for parameter in group
        if parameter._hp_mapping is not None
    }
