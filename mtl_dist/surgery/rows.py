"""A wrapped model's gradients on their way from losses to optimizer: each task's, averaged, in a row of its own.

    rows.start()
    with rows.of_task("sst", last=True), rows.micro_batch(averages): ... forward, rows.backward(loss) ...
    grams = rows.grams()                                # inner products of the tasks' gradients, for each parameter
    rows.deposit(weights, group_of, reached)            # the combined gradient is what the optimizer will see

A row holds what the tasks share, whole on every rank or this rank's part of it. What is not combined, such as heads, is
averaged beside it and added up. `ddp.py`, `fsdp2.py` and `zero.py` say how each of them averages, and who holds what.

In a row every parameter begins with a new chunk, the rest of its last one is zero: so a few kernels form the inner
products of all chunks, and add them up for each parameter, however many parameters there are.
"""

# Shape suffixes: K = tasks of a step, P = elements of a whole row, N = those of a row that this rank holds, S = shared
# parameters, G = groups of them that are combined as one, C = chunks of a row, R = runs of chunks of one parameter.

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist.config import UserError

CHUNK = 1024  # elements whose products are summed in fp32; the sums of chunks are added up in fp64
RUN = 64  # chunks whose sums one thread of a GPU adds up
PRODUCTS = 1 << 22  # of chunks, which are in memory at once
CONVERTED = 1 << 24  # elements of rows in bf16 that are in memory in fp32 at once

Parameters = Sequence[nn.Parameter]


class Coming:
    """Numbers on their way from the device to the CPU: the later they are read, the less that waits."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self.numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrived.record()

    def read(self) -> Tensor:
        """The numbers, on the CPU."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers


def on_device(values: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """Numbers as fp64 on a device, without waiting for it."""
    numbers = torch.as_tensor(values, dtype=torch.float64)
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


def summed(known: Sequence[float], computed: Iterable[Tensor], device: torch.device, group: Any = None) -> Tensor:
    """Numbers that are known here, and such that the device still computes, summed over the ranks, on the device."""
    numbers = torch.cat([on_device(known, device), *(tensor.reshape(-1).double() for tensor in computed)])
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(numbers, group=group)
    return numbers


@contextmanager
def in_full_precision(device_type: str) -> Iterator[None]:
    """Keeps fp32 products from autocast, and from TF32 or bf16 where the user lets the model have them."""
    torch_backends: Any = torch.backends
    backends = torch_backends.cuda.matmul, torch_backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class Rows(ABC):
    """The rows of one step's tasks, in the order in which the tasks came first.

    A task may come several times in a step (once for each micro-batch, say); what it brings adds up in its row.
    """

    scattered = True  # each rank holds other columns
    averaged_by_engine = True  # with the last micro-batch of each visit; else by the rows themselves
    retains = True  # several losses may come from one forward pass
    steps = False  # the engine steps, in the place of the optimizer
    sums = True  # the engine can average the sum of a step that goes through some parameters only
    slices: list[slice]  # where each shared parameter's gradient lies in what backward passes fill
    ends: list[int]  # the chunks at which the shared parameters end in what this rank holds of a row; it begins with 0
    width: int  # of what this rank holds of a row

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
        self.rows: list[Tensor] = []  # of `rows_KN`
        self.rows_KN = torch.empty(0, device=self.device)
        self.fp32_N: Tensor | None = None  # the combination of rows in bf16
        self.tasks: list[str] = []
        self.own: list[dict[nn.Parameter, Tensor]] = []  # each task's gradients of what is not combined
        self.dropped: set[str] = set()
        # Of each row's part, if asked for: this rank's contribution, or that of a first micro-batch.
        self.keeps_squares = False
        self.squares: dict[int, Tensor] = {}
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
        self.tasks, self.own, self.dropped, self.squares = [], [], set(), {}

    def give_up(self) -> None:
        """Leaves a step that failed."""
        # What is on its way may never come, if only this rank failed: the next step takes other tensors.
        self.rows, self.pending, self.rows_KN = [], [], self.rows_KN.new_empty(0)

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
    def loss_scale(self) -> Tensor:
        """The factor that keeps fp16 gradients in range; they still have it when they are combined."""
        one = torch.ones((), device=self.device)
        return one if self.scaler is None else self.scaler.scale(one)

    @abstractmethod
    def of_task(self, task: str, last: bool) -> AbstractContextManager[None]:
        """Around the backward passes of a visit of a task; `last` lets its reduction start at once."""

    # ------------------------------------------------------------------------------------------------------ the rows

    def _lay_out(self, elements: Sequence[int]) -> None:
        """So many elements of each shared parameter are in a row."""
        ends = [0, *accumulate(-(-number // CHUNK) for number in elements)]
        self.slices = [slice(end * CHUNK, end * CHUNK + number) for end, number in zip(ends, elements, strict=False)]
        self.ends = self._held(ends)
        self.width = self._chunks(ends[-1]) * CHUNK
        # This rank's share of the products: of the chunks that it holds, or of those that all hold.
        first, stop = self._share()
        shares_S = [(max(start, first), min(end, stop)) for start, end in pairwise(self.ends)]
        self.first_chunk = first
        runs_S = [_runs(end - start) if end > start else [] for start, end in shares_S]
        self.runs_R = [run for runs in runs_S for run in runs]
        self.run_lengths_R = torch.tensor(self.runs_R, dtype=torch.int64, device=self.device)
        self.runs_of_S = torch.tensor([len(runs) for runs in runs_S], dtype=torch.int64, device=self.device)

    def _held(self, ends: list[int]) -> list[int]:
        """Where the parameters end in what this rank holds of a row, counted in chunks."""
        return ends

    def _chunks(self, chunks: int) -> int:
        """How many of so many chunks this rank holds."""
        return chunks

    def _share(self) -> tuple[int, int]:
        """The first chunk of a row whose products this rank computes, and the one behind the last."""
        return 0, self.width // CHUNK

    def reserve(self, tasks: int) -> None:
        """Makes rows for so many tasks."""
        if (have := len(self.rows)) >= tasks:
            return
        self.wait()  # what is under way goes to the rows that there are
        rows_KN = torch.zeros(tasks, self.width, dtype=self.dtype, device=self.device)
        if have:
            rows_KN[:have] = self.rows_KN
        self.rows_KN, self.rows = rows_KN, list(rows_KN)

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

    def wait(self) -> None:
        """Waits for the reductions that are under way."""
        for work in self.pending:
            work.wait()
        self.pending.clear()

    def finish(self) -> None:
        """Begins the reductions that are left, and waits for all."""
        self.wait()

    @torch.no_grad()
    def grams(self) -> Tensor:
        """This rank's share of the inner products of the tasks' gradients, for each shared parameter: (S, K, K).

        Norms under 1e-19 count as zero, and those over 1e19 as infinite, as they do where gradients are clipped.
        """
        K = len(self.tasks)
        most = PRODUCTS // K**2
        if self.dtype != torch.float32:
            most = min(most, CONVERTED // (K * CHUNK))
        sums, chunk, run = [], self.first_chunk, 0
        for chunks, runs in _pieces(self.runs_R, most):
            columns = slice(chunk * CHUNK, (chunk + chunks) * CHUNK)
            x_CKN = self.rows_KN[:K, columns].float().view(K, chunks, CHUNK).transpose(0, 1)
            with in_full_precision(self.device.type):
                products_CKK = torch.bmm(x_CKN, x_CKN.mT)
            sums.append(_sums(products_CKK.double(), self.run_lengths_R[run : run + runs]))
            chunk, run = chunk + chunks, run + runs
        if not sums:
            return torch.zeros(len(self.slices), K, K, dtype=torch.float64, device=self.device)
        return _sums(torch.cat(sums), self.runs_of_S)

    def keep_square(self, task: str) -> None:  # noqa: B027 - where engines average, nobody sees a part
        """Notes the squared length of what has come to a task's row so far."""

    def _square(self, row_P: Tensor) -> Tensor:
        pieces = [row_P] if self.dtype == torch.float32 else torch.split(row_P, CONVERTED)
        with in_full_precision(self.device.type):
            parts = [(x := piece.float().view(-1, 1, CHUNK)).bmm(x.mT).double().sum() for piece in pieces]
        return torch.stack(parts).sum()

    def summed(self, known: Sequence[float], computed: Iterable[Tensor]) -> Tensor:
        """Numbers that are known here, and such that the device still computes, summed over the ranks, on the CPU.

        One collective, and a wait for the device.
        """
        return summed(known, computed, self.device, self.group).cpu()

    @torch.no_grad()
    def combined(self, weights_GK: Tensor | None, group_of_S: Sequence[int]) -> Tensor:
        """The sum of the rows in fp32, the columns of each parameter by the weights of its group.

        It takes the place of the first row, where that is in fp32.
        """
        first_N, *others = self.rows[: len(self.tasks)]
        into_N = first_N if self.dtype == torch.float32 else self._in_fp32(first_N)
        if weights_GK is None:
            for row_N in others:
                into_N.add_(row_N)
            return into_N
        # One dimension each, which bf16 rows are multiplied with in fp32.
        weights = [weight_K.unsqueeze(1) for weight_K in weights_GK.float()]
        start = 0
        for group, members in groupby(zip(group_of_S, self.ends[1:], strict=True), key=lambda member: member[0]):
            columns = slice(start * CHUNK, (start := max(end for _, end in members)) * CHUNK)
            into_N[columns].mul_(weights[group][0])
            for row_N, weight in zip(others, weights[group][1:], strict=True):
                into_N[columns].addcmul_(row_N[columns], weight)
        return into_N

    def _in_fp32(self, row_N: Tensor) -> Tensor:
        if self.fp32_N is None:
            self.fp32_N = torch.empty(self.width, device=self.device)
        return self.fp32_N.copy_(row_N)

    @abstractmethod
    def deposit(self, weights_GK: Tensor | None, group_of_S: Sequence[int], reached: Set[nn.Parameter]) -> None:
        """Makes the combination of the rows, and the sum of what is not combined, the gradients of the parameters.

        Without weights it is the plain sum. Those that no task reached, on any rank, get none: a zero would let the
        optimizer move them.
        """

    def settle(self, reached: Set[nn.Parameter]) -> None:  # noqa: B027 - most have nothing to settle
        """Hears what the step reached on any rank, before anything is deposited."""


def add(into: list[Tensor], gradients: list[Tensor]) -> None:
    """Adds tensors to others, all at once."""
    if into:
        torch._foreach_add_(into, gradients)


def row_length(sizes: Iterable[int]) -> int:
    """The elements of a row for parameters of these sizes."""
    return CHUNK * sum(-(-size // CHUNK) for size in sizes)


def _runs(chunks: int) -> list[int]:
    """The lengths of runs that make up so many chunks."""
    return [RUN] * (chunks // RUN) + ([chunks % RUN] if chunks % RUN else [])


def _pieces(runs: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Takes runs together to pieces of at most so many chunks, or of one run: the chunks and runs of each piece."""
    chunks = number = 0
    for run in runs:
        if number and chunks + run > most:
            yield chunks, number
            chunks = number = 0
        chunks, number = chunks + run, number + 1
    if number:
        yield chunks, number


def _sums(matrices: Tensor, lengths: Tensor) -> Tensor:
    """The sums of neighbouring matrices, so many at a time."""
    # Checked, the lengths would be waited for.
    flat = torch.segment_reduce(matrices.flatten(1), "sum", lengths=lengths, unsafe=True)
    return flat.view(len(lengths), *matrices.shape[1:])
