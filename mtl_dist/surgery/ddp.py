"""One process, or DDP: rows are all-reduced, or reduce-scattered, while the next task computes.

DDP's own averaging is used only in steps without rows, of loops that say when their last backward pass comes.
"""

# Shape suffixes: as in rows.py.

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist.config import UserError
from mtl_dist.surgery.rows import CHUNK, Parameters, Rows, add

# Their names from torch 2.13 on, and before.
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Replicated(Rows):
    """Every rank holds all of every row."""

    scattered = False
    averaged_by_engine = False

    def __init__(self, model: Any, shared: Parameters, rest: Parameters, dtype: torch.dtype, scaler: Any) -> None:
        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        super().__init__(model, shared, rest, dtype, scaler)
        if self.ddp is None and self.world > 1:
            raise UserError(
                f"the model is not wrapped for the {self.world} ranks that run; give it to accelerator.prepare first "
                "(on CPUs with Accelerator(cpu=True), or it does nothing), or to DistributedDataParallel"
            )
        if self.ddp is not None:
            _refuse(self.ddp)
            # Before a forward pass nobody knows which loss will follow. Loops switch this, too: their no_sync restores.
            self.hooks.append(self.ddp.register_forward_pre_hook(self._decide))
        self.sums = self.ddp is None or self.ddp.find_unused_parameters
        self.averages = False  # whether DDP does
        self.begins = True  # whether the next forward pass is the step's first
        self._lay_out([parameter.numel() for parameter in shared])
        # Where rows have the gradients' precision, backward passes add to them as they are.
        self.pointed = all(parameter.dtype == dtype for parameter in shared)
        self.open: set[int] = set()  # rows that wait for their last visit
        self.late: list[tuple[int, Tensor]] = []  # what came to a row that was already on its way

    def _group(self) -> Any:
        return None if self.ddp is None else self.ddp.process_group

    def _share(self) -> tuple[int, int]:
        chunks = self.ends[-1]
        return chunks * self.rank // self.world, chunks * (self.rank + 1) // self.world

    def _decide(self, *_: object) -> None:
        assert self.ddp is not None
        self.ddp.require_backward_grad_sync = self.averages
        if self.begins and torch.is_grad_enabled():  # buffers, as BatchNorm has them: DDP sends them where it averages
            self.ddp.require_forward_param_sync = True
            self.begins = False

    def close(self) -> None:
        """Lets go of the model, which averages by itself again."""
        super().close()
        self._forget_used()
        if self.ddp is not None:
            self.ddp.require_backward_grad_sync = True

    def _forget_used(self) -> None:
        """Makes DDP forget what backward passes reached whose gradients it did not average.

        Else it would ask for gradients of heads that only earlier steps went through.
        """
        if self.ddp is not None and self.ddp.find_unused_parameters:
            self.ddp.reducer._reset_state()

    def start(self) -> None:
        """Begins a step."""
        super().start()
        trained = (*self.shared, *self.rest)
        self._refuse_left_over(parameter.grad for parameter in trained if parameter.grad is not None)
        self._clear()

    def give_up(self) -> None:
        """Leaves a step that failed."""
        super().give_up()
        self._clear()
        self.begins = True

    def _clear(self) -> None:
        self._forget_used()
        self.open.clear()
        self.late.clear()
        for parameter in (*self.shared, *self.rest):
            parameter.grad = None

    @contextmanager
    def micro_batch(self, averages: bool) -> Iterator[None]:
        """Around a backward pass, and the forward pass before it where DDP shall average."""
        self.averages = averages
        try:
            with super().micro_batch(averages):
                yield
        finally:
            self.averages = False

    @contextmanager
    def of_task(self, task: str, last: bool) -> Iterator[None]:
        """Around the backward passes of a visit of a task; `last` lets its reduction start at once."""
        k, new = self._visit(task)
        flat_P = self._to_fill(k, new)
        if self.pointed:
            give(flat_P, self.shared, self.slices)
        yield
        if not self.pointed:
            found = [
                (stretch, parameter.grad)
                for parameter, stretch in zip(self.shared, stretches(flat_P, self.shared, self.slices), strict=True)
                if parameter.grad is not None
            ]
            into, gradients = [stretch for stretch, _ in found], [gradient for _, gradient in found]
            if k in self.open:
                add(into, gradients)
            elif found:  # they are zero; to copy, other than to add, takes one kernel whatever the precisions
                torch._foreach_copy_(into, gradients)
        for parameter in self.shared:
            parameter.grad = None
        self._take_own(k)
        self._filled(k, flat_P, last)

    def _to_fill(self, k: int, new: bool) -> Tensor:
        return self.rows[k] if new or k in self.open else torch.zeros_like(self.rows[k])

    def _filled(self, k: int, flat_P: Tensor, last: bool) -> None:
        if flat_P is not self.rows[k]:
            self.squares.pop(k, None)  # which is not all of its part
            self.late.append((k, flat_P))
            self._average(flat_P)
        elif last:
            self.open.discard(k)
            self._average(flat_P, k)
        else:
            self.open.add(k)

    @torch.no_grad()
    def keep_square(self, task: str) -> None:
        """Notes the squared length of what has come to a task's row so far."""
        if self.pointed and self.world == 1:
            k = self.tasks.index(task)
            self.squares[k] = self._square(self.rows[k])

    @torch.no_grad()
    def _average(self, row: Tensor, k: int | None = None) -> None:
        """Begins to average a tensor over the ranks, or the row of task k."""
        if self.world > 1:
            row.div_(self.world)
            if k is not None and self.keeps_squares:
                self.squares[k] = self._square(row)
            self.pending.append(dist.all_reduce(row, group=self.group, async_op=True))

    def finish(self) -> None:
        """Begins to average the rows whose last visit nobody announced, and waits for all."""
        for k in sorted(self.open):
            self._average(self.rows[k], k)
        self.open.clear()
        super().finish()
        for k, flat_P in self.late:
            self.rows[k].add_(flat_P)
        self.late.clear()

    def deposit(self, weights_GK: Tensor | None, group_of_S: Sequence[int], reached: Set[nn.Parameter]) -> None:
        """Makes the combination of the rows, and the sum of what is not combined, the gradients of the parameters."""
        self.begins = True
        ours = self.summed_own()
        # In one piece, in which every rank has a place for what any of them reached.
        rest = [parameter for parameter in self.rest if parameter in reached] if self.world > 1 else []
        ends = [0, *accumulate(parameter.numel() for parameter in rest)]
        slices = [slice(start, stop) for start, stop in pairwise(ends)]
        flat = torch.zeros(ends[-1], device=self.device)
        for parameter, stretch in zip(rest, stretches(flat, rest, slices), strict=True):
            if parameter in ours:
                stretch.copy_(ours[parameter])
        if rest:
            self._average(flat)
        give(self.whole(self.combined(weights_GK, group_of_S)), self.shared, self.slices)
        for parameter in self.shared:
            if parameter not in reached:
                parameter.grad = None
        self.finish()
        give(flat, rest, slices)
        if self.world == 1:
            for parameter, gradient in ours.items():
                parameter.grad = gradient

    def whole(self, combined_N: Tensor) -> Tensor:
        """The combined gradient of all columns."""
        return combined_N


class Scattered(Replicated):
    """Half the traffic: a rank keeps its columns of every row; the combination alone is gathered."""

    scattered = True

    def __init__(self, model: Any, shared: Parameters, rest: Parameters, dtype: torch.dtype, scaler: Any) -> None:
        super().__init__(model, shared, rest, dtype, scaler)
        self._empty()

    def _empty(self) -> None:
        self.buffers: list[Tensor] = []  # one is on its way while the next visit fills the other
        self.on_the_way: list[tuple[dist.Work, int, Tensor] | None] = [None, None]
        self.turn = 0

    def give_up(self) -> None:
        """Leaves a step that failed."""
        super().give_up()
        self._empty()

    def _chunks(self, chunks: int) -> int:
        return -(-chunks // self.world)

    def _held(self, ends: list[int]) -> list[int]:
        chunks = self._chunks(ends[-1])
        first = self.rank * chunks
        # Parameters before this rank's first chunk end at its start, those behind its last one at its end.
        return [min(max(end - first, 0), chunks) for end in ends]

    def _share(self) -> tuple[int, int]:
        return 0, self.width // CHUNK

    def _to_fill(self, k: int, new: bool) -> Tensor:
        self.turn = 1 - self.turn
        self._land(self.turn)
        if not self.buffers:
            whole = self.width * self.world
            self.buffers = [torch.empty(whole, dtype=self.dtype, device=self.device) for _ in range(2)]
        self.into_N = self.rows[k] if new else torch.empty_like(self.rows[k])
        return self.buffers[self.turn].zero_()

    def _filled(self, k: int, flat_P: Tensor, last: bool) -> None:
        # Every visit is averaged by itself: only then a rank need not keep all columns.
        flat_P.div_(self.world)
        self.squares.pop(k, None)  # which was not all of its part
        if self.keeps_squares and self.into_N is self.rows[k]:
            self.squares[k] = self._square(flat_P)
        work = reduce_scatter(self.into_N, flat_P, group=self.group, async_op=True)
        self.on_the_way[self.turn] = work, k, self.into_N

    def _land(self, turn: int) -> None:
        landing, self.on_the_way[turn] = self.on_the_way[turn], None
        if landing is not None:
            work, k, part_N = landing
            work.wait()
            if part_N is not self.rows[k]:
                self.rows[k].add_(part_N)

    def wait(self) -> None:
        """Waits for the reductions that are under way."""
        super().wait()
        self._land(1 - self.turn)  # the older one first: a later visit of its task adds to it
        self._land(self.turn)

    def whole(self, combined_N: Tensor) -> Tensor:
        """The combined gradient of all columns."""
        # All is in the rows by now, and the buffers are free: for fp32, that is.
        fits = self.dtype == combined_N.dtype
        whole_P = self.buffers[0] if fits else combined_N.new_empty(len(combined_N) * self.world)
        all_gather(whole_P, combined_N, group=self.group)
        return whole_P


def _refuse(ddp: DistributedDataParallel) -> None:
    """Refuses ways of DDP that do not go together with averaging by task."""
    if ddp.static_graph:
        raise UserError(
            "DDP's static_graph reduces gradients by itself whatever it is told; leave it out "
            "(find_unused_parameters is not needed either)"
        )
    if getattr(ddp, "_comm_hooks", None):
        raise UserError(
            "DDP's communication hook would be passed over: surgery averages the gradients by itself; leave it out "
            "(buffer_dtype='bf16' halves what is sent, reduce='reduce_scatter' as well)"
        )


def give(flat: Tensor, parameters: Parameters, slices: Sequence[slice]) -> None:
    """Makes slices of a flat tensor the gradients of parameters; copies them where the precision is another."""
    for parameter, stretch in zip(parameters, stretches(flat, parameters, slices), strict=True):
        parameter.grad = stretch.to(parameter.dtype)


def stretches(flat: Tensor, parameters: Parameters, slices: Sequence[slice]) -> Iterator[Tensor]:
    """Slices of a flat tensor as the parameters lie in memory, because optimizers may go by that."""
    for parameter, columns in zip(parameters, slices, strict=True):
        stretch = flat[columns]
        by_channel = any(
            parameter.dim() == dims and parameter.is_contiguous(memory_format=memory_format)
            for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d))
        )
        if by_channel:
            yield stretch.as_strided(parameter.size(), parameter.stride(), stretch.storage_offset())
        else:
            yield stretch.view_as(parameter)
