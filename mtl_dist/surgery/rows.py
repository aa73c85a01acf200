"""A wrapped model's gradients on their way from losses to optimizer: each task's, averaged, in a row of its own.

    rows.start()
    with rows.of_task("sst", last=True), rows.micro_batch(averages): ... forward, rows.backward(loss) ...
    grams = rows.grams()                                # inner products of the tasks' gradients, for each parameter
    rows.deposit(weights, reached)                      # the combined gradient is what the optimizer will see

A row holds what the tasks share, whole on every rank or this rank's part of it. What is not combined, such as heads, is
averaged beside it and added up. `ddp.py`, `fsdp2.py` and `zero.py` say how each of them averages, and who holds what.
"""

# Shape suffixes: K = tasks of a step, P = elements of the shared parameters, N = those of a row that this rank holds,
# S = shared parameters.

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist.config import UserError

CHUNK = 1 << 18  # elements whose products are summed at once

Parameters = Sequence[nn.Parameter]


class Rows(ABC):
    """The rows of one step's tasks, in the order in which the tasks came first.

    A task may come several times in a step (once for each micro-batch, say); what it brings adds up in its row.
    """

    scattered = True  # each rank holds other columns
    averaged_by_engine = True  # with the last micro-batch of each visit; else by the rows themselves
    retains = True  # several losses may come from one forward pass
    steps = False  # the engine steps, in the place of the optimizer
    sums = True  # the engine can average the sum of a step that goes through some parameters only
    slices: list[slice]  # the columns of each shared parameter, as far as this rank holds them
    width: int  # of a row

    def __init__(self, model: Any, shared: Parameters, rest: Parameters, dtype: torch.dtype, scaler: Any) -> None:
        self.model = model  # as its engine has wrapped it
        self.shared = shared
        self.rest = rest  # what is trained and not combined
        self.dtype = dtype
        self.scaler = scaler
        self.group = self._group()
        self.world = dist.get_world_size(self.group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(self.group) if dist.is_initialized() else 0
        self.device = next(iter((*shared, *rest))).device
        self.rows: list[Tensor] = []
        self.tasks: list[str] = []
        self.own: list[dict[nn.Parameter, Tensor]] = []  # each task's gradients of what is not combined
        self.dropped: set[str] = set()
        self.pending: list[dist.Work] = []
        self.reached: set[nn.Parameter] = set()  # by the backward passes since it was last cleared
        self.expects = False  # whether it is our backward pass that runs
        self.hooks: list[Any] = []
        for parameter in (*shared, *rest):
            self.hooks.append(parameter.register_post_accumulate_grad_hook(self._sees))  # type: ignore[no-untyped-call]

    def _group(self) -> Any:
        """The ranks that average; None for all."""
        return None

    def _sees(self, parameter: nn.Parameter) -> None:
        if not self.expects:
            raise UserError(
                "a backward pass outside of surgery: its gradients would be lost; give every loss to surgery.backward, "
                "or end the surgery by surgery.close()"
            )
        self.reached.add(parameter)

    def close(self) -> None:
        """Lets go of the model."""
        for hook in self.hooks:
            hook.remove()

    # -------------------------------------------------------------------------------------- from losses to gradients

    def start(self) -> None:
        """Begins a step."""
        self.tasks, self.own, self.dropped = [], [], set()

    def give_up(self) -> None:
        """Leaves a step that failed."""
        # What is on its way may never come, if only this rank failed: the next step takes other tensors.
        self.rows, self.pending = [], []

    def _refuse_left_over(self, gradients: Iterable[Tensor]) -> None:
        """Refuses to begin a step over gradients that are not zero: they would be lost, or counted twice."""
        found = [gradient.any() for gradient in gradients]
        if found and torch.stack(found).any():
            raise UserError(
                "there are gradients of the step before: clear them after each step, with optimizer.zero_grad(); where "
                "micro-batches add up, give last=False with all but the last"
            )

    @contextmanager
    def micro_batch(self, averages: bool) -> Iterator[None]:
        """Around a backward pass, and forward if one can; whether the engine averages what has come together."""
        self.expects = True
        try:
            yield
        finally:
            self.expects = False

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Adds to the gradients."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward(retain_graph=retain_graph)

    @property
    def loss_scale(self) -> float:
        """The factor that keeps fp16 gradients in range; they still have it when they are combined."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    @abstractmethod
    def of_task(self, task: str, last: bool) -> AbstractContextManager[None]:
        """Around the backward passes of a visit of a task; `last` lets its reduction start at once."""

    # ------------------------------------------------------------------------------------------------------ the rows

    def _lay_out(self, elements: Iterable[int]) -> None:
        """So many elements of each shared parameter are in a row."""
        ends, self.width = self._held([0, *accumulate(elements)])
        self.slices = [slice(start, stop) for start, stop in pairwise(ends)]

    def _held(self, ends: list[int]) -> tuple[list[int], int]:
        """Where the parameters end in what this rank holds of a row, and how long that is."""
        return ends, ends[-1]

    def reserve(self, tasks: int) -> None:
        """Makes rows for so many tasks."""
        while len(self.rows) < tasks:
            self.rows.append(torch.zeros(self.width, dtype=self.dtype, device=self.device))

    def _visit(self, task: str) -> tuple[int, bool]:
        """The number of a task's row, and whether the task is new; its row is then zero."""
        if task in self.tasks:
            return self.tasks.index(task), False
        self.tasks.append(task)
        self.own.append({})
        self.reserve(len(self.tasks))
        self.rows[len(self.tasks) - 1].zero_()
        return len(self.tasks) - 1, True

    def _keep_own(self, k: int, gradients: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        own = self.own[k]
        for parameter, gradient in gradients:
            own[parameter] = own[parameter].add_(gradient) if parameter in own else gradient

    def _take_own(self, k: int) -> None:
        """Takes the gradients of what is not combined away from the parameters."""
        for parameter in self.rest:
            if (gradient := parameter.grad) is not None:
                self._keep_own(k, [(parameter, gradient)])
                parameter.grad = None

    def summed_own(self) -> dict[nn.Parameter, Tensor]:
        """The gradients of what is not combined, over the tasks that take part."""
        summed: dict[nn.Parameter, Tensor] = {}
        for task, own in zip(self.tasks, self.own, strict=True):
            if task not in self.dropped:
                for parameter, gradient in own.items():
                    summed[parameter] = summed[parameter] + gradient if parameter in summed else gradient
        return summed

    @property
    def kept(self) -> list[str]:
        """The tasks that take part in the step."""
        return [task for task in self.tasks if task not in self.dropped]

    @torch.no_grad()
    def drop(self, task: str) -> None:
        """Leaves a task out of the step: its row becomes zero, and its head gets no gradient."""
        self.dropped.add(task)
        self.rows[self.tasks.index(task)].zero_()

    def finish(self) -> None:
        """Waits for the reductions that are under way."""
        for work in self.pending:
            work.wait()
        self.pending.clear()

    @torch.no_grad()
    def grams(self) -> Tensor:
        """The inner products of the tasks' gradients, for each shared parameter: (S, K, K) in fp64 on the CPU."""
        rows = self.rows[: len(self.tasks)]
        grams_SKK = torch.zeros(len(self.slices), len(rows), len(rows), dtype=torch.float64, device=self.device)
        longest = max((columns.stop - columns.start for columns in self.slices), default=0)
        chunk_KC = grams_SKK.new_empty(len(rows), min(CHUNK, longest))  # in fp32, squares over- and underflow
        for gram_KK, columns in zip(grams_SKK, self.slices, strict=True):
            for start in range(columns.start, columns.stop, CHUNK):
                stop = min(start + CHUNK, columns.stop)
                x = chunk_KC[:, : stop - start]
                for part, row in zip(x, rows, strict=True):
                    part.copy_(row[start:stop])
                gram_KK += x @ x.T
        if self.scattered and self.world > 1:
            dist.all_reduce(grams_SKK, group=self.group)
        return grams_SKK.cpu()

    @torch.no_grad()
    def combined(self, weights_SK: Tensor) -> Tensor:
        """The sum of the rows in fp32, each parameter's columns by its own weights."""
        combined_N = torch.zeros(self.width, device=self.device)
        weights_SK = weights_SK.float()
        start = 0
        for s, columns in enumerate(self.slices):
            # Neighbours with the same weights, mostly all of them, are one product.
            if s + 1 == len(self.slices) or not weights_SK[s].equal(weights_SK[s + 1]):
                part = slice(start, columns.stop)
                for row_N, weight in zip(self.rows, weights_SK[s].tolist(), strict=False):
                    combined_N[part].add_(row_N[part], alpha=weight)
                start = columns.stop
        return combined_N

    @abstractmethod
    def deposit(self, weights_SK: Tensor, reached: Set[nn.Parameter]) -> None:
        """Makes the combination of the rows, and the sum of what is not combined, the gradients of the parameters.

        Those that no task reached, on any rank, get none: a zero would let the optimizer move them.
        """

    def settle(self, reached: Set[nn.Parameter]) -> None:  # noqa: B027 - most have nothing to settle
        """Hears what the step reached on any rank, before anything is deposited."""
