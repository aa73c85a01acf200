"""This rank's part of each task's gradient, averaged over all ranks: whole on every rank, or scattered over them.

    rows.start()
    with rows.of_task("sst"): ... backward passes ...   # its reduction runs while the next task computes
    grams = rows.grams()                                # inner products of the tasks' gradients, for each parameter
    rows.deposit(weights)                               # the combined gradient is what the optimizer will see

A row holds what the tasks share. What belongs to one task, its head, is averaged beside it and left as it is.
"""

# Shape suffixes: K = tasks of a step, P = elements of the shared parameters, N = those of a row that this rank holds,
# S = shared parameters.

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

CHUNK = 1 << 18  # elements whose products are summed at once

# Their names from torch 2.13 on, and before.
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

Parameters = Sequence[nn.Parameter]


@dataclass(frozen=True)
class Layout:
    """What the rows are made of."""

    shared: list[nn.Parameter]
    used: dict[str, list[nn.Parameter]]  # the shared ones that a task's forward pass reaches
    own: dict[str, list[nn.Parameter]]  # those that no other task has
    most_tasks: int  # of a step
    dtype: torch.dtype  # of the rows

    def reached(self, tasks: Iterable[str]) -> set[nn.Parameter]:
        """The shared parameters that some of these tasks go through."""
        return {parameter for task in tasks for parameter in self.used[task]}


class Rows(ABC):
    """The rows of one step's tasks, in the order in which the tasks came."""

    scattered = True  # each rank holds other columns
    averaged_by_engine = True  # with the last micro-batch of each task; else by the rows themselves
    slices: list[slice]  # the columns of each shared parameter, as far as this rank holds them
    rows_KN: Tensor

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.tasks: list[str] = []
        self.pending: list[dist.Work] = []
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def _allocate(self, elements: Iterable[int]) -> None:
        """Makes the rows, of so many elements of each shared parameter."""
        ends, width = self._held([0, *accumulate(elements)])
        self.slices = [slice(start, stop) for start, stop in pairwise(ends)]
        device = self.layout.shared[0].device
        self.rows_KN = torch.zeros(self.layout.most_tasks, width, dtype=self.layout.dtype, device=device)

    def _held(self, ends: list[int]) -> tuple[list[int], int]:
        """Where the parameters end in what this rank holds of a row, and how long that is."""
        return ends, ends[-1]

    def start(self) -> None:
        """Begins a step."""
        self.tasks = []
        self.dropped: set[str] = set()

    @property
    def kept(self) -> list[str]:
        """The tasks that take part in the step."""
        return [task for task in self.tasks if task not in self.dropped]

    @torch.no_grad()
    def drop(self, task: str) -> None:
        """Leaves a task out of the step: its row becomes zero, and its head gets no gradient."""
        self.dropped.add(task)
        self.rows_KN[self.tasks.index(task)].zero_()

    @abstractmethod
    def of_task(self, task: str) -> AbstractContextManager[None]:
        """Around the backward passes of a task's micro-batches; once in a step."""

    @abstractmethod
    def deposit(self, weights_SK: Tensor) -> None:
        """Makes the combination of the rows, and every head's own gradient, the gradients of the parameters."""

    def finish(self) -> None:
        """Waits for the reductions that are under way."""
        for work in self.pending:
            work.wait()
        self.pending.clear()

    @torch.no_grad()
    def grams(self) -> Tensor:
        """The inner products of the tasks' gradients, for each shared parameter: (S, K, K) in fp64 on the CPU."""
        self.finish()
        rows_KN = self.rows_KN[: len(self.tasks)]
        grams_SKK = rows_KN.new_zeros(len(self.slices), len(rows_KN), len(rows_KN), dtype=torch.float64)
        for gram_KK, columns in zip(grams_SKK, self.slices, strict=True):
            for part in range(columns.start, columns.stop, CHUNK):
                x = rows_KN[:, part : min(part + CHUNK, columns.stop)].double()  # in fp32, squares over- and underflow
                gram_KK += x @ x.T
        if self.scattered and self.world > 1:
            dist.all_reduce(grams_SKK)
        return grams_SKK.cpu()

    @torch.no_grad()
    def combined(self, weights_SK: Tensor) -> Tensor:
        """The sum of the rows in fp32, each parameter's columns by its own weights."""
        rows_KN = self.rows_KN[: len(self.tasks)]
        combined_N = torch.zeros(rows_KN.shape[1], device=rows_KN.device)
        weights_SK = weights_SK.float()
        start = 0
        for s, columns in enumerate(self.slices):
            # Neighbours with the same weights, mostly all of them, are one product.
            if s + 1 == len(self.slices) or not weights_SK[s].equal(weights_SK[s + 1]):
                part = slice(start, columns.stop)
                for row_N, weight in zip(rows_KN, weights_SK[s].tolist(), strict=True):
                    combined_N[part].add_(row_N[part], alpha=weight)
                start = columns.stop
        return combined_N


class Replicated(Rows):
    """Under DDP: gradients accumulate straight into rows that every rank holds whole, and these are all-reduced."""

    scattered = False
    averaged_by_engine = False

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._allocate(parameter.numel() for parameter in layout.shared)
        self.own_rows = {
            task: torch.zeros(sum(p.numel() for p in parameters), device=self.rows_KN.device)
            for task, parameters in layout.own.items()
        }
        # Gradients are fp32; rows of another precision are rounded from one buffer that all tasks fill in turn.
        self.filled_P = (
            None if layout.dtype == torch.float32 else self.rows_KN.new_zeros(self._width(), dtype=torch.float32)
        )

    def _width(self) -> int:
        """Elements of a gradient before it is averaged."""
        return self.rows_KN.shape[1]

    def _to_fill(self, k: int) -> Tensor:
        return self.rows_KN[k] if self.filled_P is None else self.filled_P

    def _reduce(self, k: int, filled_P: Tensor) -> None:
        if self.filled_P is not None:
            self.rows_KN[k].copy_(filled_P)
        self._all_reduce(self.rows_KN[k])

    def _all_reduce(self, row: Tensor) -> None:
        if self.world > 1 and len(row):
            self.pending.append(dist.all_reduce(row, async_op=True))

    @contextmanager
    def of_task(self, task: str) -> Iterator[None]:
        """Around the backward passes of a task's micro-batches; once in a step."""
        k = len(self.tasks)
        self.tasks.append(task)
        shared_P, own = self._to_fill(k), self.own_rows[task]
        for flat, parameters in ((shared_P, self.layout.shared), (own, self.layout.own[task])):
            flat.zero_()
            point_at(flat, parameters)
        yield
        for parameter in (*self.layout.shared, *self.layout.own[task]):
            parameter.grad = None
        if self.world > 1:
            shared_P.div_(self.world)
            own.div_(self.world)
        self._reduce(k, shared_P)
        self._all_reduce(own)

    def deposit(self, weights_SK: Tensor) -> None:
        """Makes the combination of the rows, and every head's own gradient, the gradients of the parameters."""
        point_at(self.whole(self.combined(weights_SK)), self.layout.shared)
        for parameter in set(self.layout.shared) - self.layout.reached(self.kept):
            parameter.grad = None  # a zero would let the optimizer move it
        for task in self.kept:
            point_at(self.own_rows[task], self.layout.own[task])

    def whole(self, combined_N: Tensor) -> Tensor:
        """The combined gradient of all columns."""
        return combined_N


class Scattered(Replicated):
    """Under DDP with half the traffic: a rank keeps its columns of every row; the combination alone is gathered."""

    scattered = True

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        # One is on its way while the next task fills the other.
        self.buffers = [self.rows_KN.new_zeros(self._width()) for _ in range(2)]
        self.on_the_way: list[dist.Work | None] = [None, None]

    def _held(self, ends: list[int]) -> tuple[list[int], int]:
        width = -(-ends[-1] // self.world)
        first = self.rank * width
        # Columns before this rank's first one are empty slices at its start, those behind its last at its end.
        return [min(max(end - first, 0), width) for end in ends], width

    def _width(self) -> int:
        return self.rows_KN.shape[1] * self.world

    def _to_fill(self, k: int) -> Tensor:
        if self.filled_P is not None:
            return self.filled_P
        self._wait_for_buffer(k)
        return self.buffers[k % 2]

    def _wait_for_buffer(self, k: int) -> None:
        work, self.on_the_way[k % 2] = self.on_the_way[k % 2], None
        if work is not None:
            work.wait()

    def _reduce(self, k: int, filled_P: Tensor) -> None:
        if self.filled_P is not None:
            self._wait_for_buffer(k)
            self.buffers[k % 2].copy_(filled_P)
        self.on_the_way[k % 2] = reduce_scatter(self.rows_KN[k], self.buffers[k % 2], async_op=True)

    def finish(self) -> None:
        """Waits for the reductions that are under way."""
        super().finish()
        self._wait_for_buffer(0)
        self._wait_for_buffer(1)

    def whole(self, combined_N: Tensor) -> Tensor:
        """The combined gradient of all columns."""
        whole_P = combined_N.new_empty(len(combined_N) * self.world)
        all_gather(whole_P, combined_N)
        return whole_P


class Sharded(Rows):
    """Under FSDP2, whose backward passes leave in `.grad` this rank's shard of the averaged gradient."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._allocate(local(parameter).numel() for parameter in layout.shared)

    @contextmanager
    def of_task(self, task: str) -> Iterator[None]:
        """Around the backward passes of a task's micro-batches; once in a step."""
        row_N = self.rows_KN[len(self.tasks)]
        self.tasks.append(task)
        yield
        for parameter, columns in zip(self.layout.shared, self.slices, strict=True):
            if parameter.grad is None:
                row_N[columns].zero_()
            else:
                row_N[columns].copy_(local(parameter.grad).reshape(-1))
                parameter.grad = None
        # A head's gradient may stay where it is: no other task adds to it.

    def deposit(self, weights_SK: Tensor) -> None:
        """Makes the combination of the rows, and every head's own gradient, the gradients of the parameters."""
        combined_N = self.combined(weights_SK)
        for task in self.dropped:
            for parameter in self.layout.own[task]:
                parameter.grad = None
        reached = self.layout.reached(self.kept)
        for parameter, columns in zip(self.layout.shared, self.slices, strict=True):
            if parameter in reached:
                assert isinstance(parameter, DTensor)
                shard = combined_N[columns].view_as(local(parameter))
                parameter.grad = DTensor.from_local(
                    shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
                )


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that FSDP2 spreads over the ranks."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def point_at(flat: Tensor, parameters: Parameters) -> None:
    """Makes stretches of a flat tensor the gradients of parameters."""
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
