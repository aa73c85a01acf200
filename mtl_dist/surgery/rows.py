"""This rank's part of each task's gradient, averaged over all ranks: whole on every rank, or scattered over them.

    rows.start()
    with rows.of_task("sst"): ... backward passes ...   # its reduction runs while the next task computes
    grams = rows.grams()                                # inner products of the tasks' gradients, for each parameter
    rows.deposit(weights)                               # the combined gradient becomes the parameters' .grad

A row holds what the tasks share. What belongs to one task, its head, is averaged beside it and left as it is.
"""

# Shape suffixes: K = tasks of a step, P = elements of the shared parameters, N = those of a row that this rank holds,
# S = shared parameters.

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

CHUNK = 1 << 18  # elements whose products are summed at once

Parameters = Sequence[nn.Parameter]


class Rows(ABC):
    """The rows of one step's tasks, in the order in which the tasks came."""

    scattered: bool  # each rank holds other columns
    rows_KN: Tensor
    slices: list[slice]  # the columns of each shared parameter, as far as this rank holds them

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def start(self) -> None:
        """Begins a step."""
        self.tasks = []

    @abstractmethod
    def of_task(self, task: str) -> AbstractContextManager[None]:
        """Around the backward passes of a task's micro-batches; once in a step."""

    @abstractmethod
    def deposit(self, weights_SK: Tensor) -> None:
        """Makes the combination of the rows, and every head's own gradient, the gradients of the parameters."""

    @abstractmethod
    def finish(self) -> None:
        """Waits for the reductions that are under way."""

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

    def __init__(
        self,
        shared: Parameters,
        own: Mapping[str, Parameters],
        used: Mapping[str, Parameters],
        most_tasks: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`used` are the shared parameters that a task's forward pass reaches, `own` those that no other task has."""
        super().__init__()
        self.shared = list(shared)
        self.own = own
        self.used = {task: {id(parameter) for parameter in parameters} for task, parameters in used.items()}
        ends = [0, *accumulate(parameter.numel() for parameter in self.shared)]
        self.columns = [slice(start, stop) for start, stop in pairwise(ends)]
        self.own_rows = {
            task: torch.zeros(sum(p.numel() for p in parameters), device=self.shared[0].device)
            for task, parameters in own.items()
        }
        self.pending: list[dist.Work] = []
        self._allocate(ends[-1], most_tasks, dtype)

    def _allocate(self, elements: int, most_tasks: int, dtype: torch.dtype) -> None:
        self.slices = self.columns
        device = self.shared[0].device
        self.rows_KN = torch.zeros(most_tasks, elements, dtype=dtype, device=device)
        # Gradients are fp32; rows of another precision are rounded from one buffer that all tasks fill in turn.
        self.filled_P = None if dtype == torch.float32 else torch.zeros(elements, device=device)

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
        for flat, parameters in ((shared_P, self.shared), (own, self.own[task])):
            flat.zero_()
            point_at(flat, parameters)
        yield
        for parameter in (*self.shared, *self.own[task]):
            parameter.grad = None
        if self.world > 1:
            shared_P.div_(self.world)
            own.div_(self.world)
        self._reduce(k, shared_P)
        self._all_reduce(own)

    def finish(self) -> None:
        """Waits for the reductions that are under way."""
        for work in self.pending:
            work.wait()
        self.pending.clear()

    def deposit(self, weights_SK: Tensor) -> None:
        """Makes the combination of the rows, and every head's own gradient, the gradients of the parameters."""
        point_at(self.whole(self.combined(weights_SK)), self.shared)
        reached = set().union(*(self.used[task] for task in self.tasks))
        for parameter in self.shared:
            if id(parameter) not in reached:
                parameter.grad = None  # a zero would let the optimizer move it
        for task in self.tasks:
            point_at(self.own_rows[task], self.own[task])

    def whole(self, combined_N: Tensor) -> Tensor:
        """The combined gradient of all columns."""
        return combined_N


class Scattered(Replicated):
    """Under DDP with half the traffic: a rank keeps its columns of every row; the combination alone is gathered."""

    scattered = True

    def _allocate(self, elements: int, most_tasks: int, dtype: torch.dtype) -> None:
        device = self.shared[0].device
        width = -(-elements // self.world)
        first = self.rank * width
        # Columns before this rank's first one are empty slices at its start, those behind its last at its end.
        self.slices = [
            slice(*(min(max(end - first, 0), width) for end in (columns.start, columns.stop)))
            for columns in self.columns
        ]
        self.rows_KN = torch.zeros(most_tasks, width, dtype=dtype, device=device)
        # One is on its way while the next task fills the other.
        self.buffers = [torch.zeros(width * self.world, dtype=dtype, device=device) for _ in range(2)]
        self.on_the_way: list[dist.Work | None] = [None, None]
        self.filled_P = None if dtype == torch.float32 else torch.zeros(width * self.world, device=device)

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
        self.on_the_way[k % 2] = dist.reduce_scatter_tensor(self.rows_KN[k], self.buffers[k % 2], async_op=True)

    def finish(self) -> None:
        """Waits for the reductions that are under way."""
        super().finish()
        self._wait_for_buffer(0)
        self._wait_for_buffer(1)

    def whole(self, combined_N: Tensor) -> Tensor:
        """The combined gradient of all columns."""
        whole_P = combined_N.new_empty(len(combined_N) * self.world)
        dist.all_gather_into_tensor(whole_P, combined_N)
        return whole_P


def point_at(flat: Tensor, parameters: Parameters) -> None:
    """Makes stretches of a flat tensor the gradients of parameters."""
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
