"""How long a training step takes, from its parts: compute, the queue of collectives beside it, surgery on the rows.

A model, not a measurement: `benchmarks/scale.py` checks its form on gloo ranks and prints it for GPUs, whose figures
are the assumptions here. Collectives run one after the other, beside compute and as if for nothing; what is left of
them when compute is over is waited for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log2

# Assumptions. Of an H100 (SXM, its data sheet), and how much of it is reached.
PEAK_FLOPS, REACHED_FLOPS = 989e12, 0.4  # bf16, dense
MEMORY, REACHED_MEMORY = 3.35e12, 0.8  # bytes per second
KERNEL_S = 6e-6  # of the host, for each operation of torch in eager mode
OPERATIONS = 60  # that surgery starts in a step, at most, as scale.py and tests/test_cuda_dry.py count them
# Of networks, in bytes per second and one way: of a GPU's NVLink; out of a node of eight.
NODE = 8
NVLINK = 450e9
NETWORKS = {"InfiniBand NDR, 50 GB/s per GPU": 8 * 50e9, "Ethernet, 100 Gb/s per node": 12.5e9}
REACHED_NETWORK = 0.8
HOP_S = 5e-6
SMALL, SMALL_S = 2, 60e-6  # collectives of a few numbers in a step with surgery, each of which the host waits for
BUCKET = 25 * 2**20  # of DDP; the last one has no backward pass left to run beside
SKETCH = 2**16  # numbers of a task's sketch


@dataclass(frozen=True)
class Link:
    """What collectives of so many ranks take; rings that use every network card of a node."""

    ranks: int
    bandwidth: float  # bytes per second that each link of the ring passes on
    hop_s: float = HOP_S
    small_s: float = SMALL_S

    def scatter(self, size: float) -> float:
        """A reduce-scatter or a gathering of so many bytes."""
        if self.ranks == 1:
            return 0.0
        return (self.ranks - 1) / self.ranks * size / self.bandwidth + log2(self.ranks) * self.hop_s

    def reduce(self, size: float) -> float:
        """An all-reduce."""
        return 2 * self.scatter(size)

    def agree(self) -> float:
        """What the ranks tell each other about tasks, parameters, inner products and weights."""
        return 0.0 if self.ranks == 1 else SMALL * self.small_s


def link(network: str, ranks: int) -> Link:
    """The GPUs of nodes of eight."""
    stated = NVLINK if ranks <= NODE else min(NVLINK, NETWORKS[network])
    return Link(ranks, REACHED_NETWORK * stated)


@dataclass(frozen=True)
class Step:
    """The parts of a step on one rank."""

    size: float  # of one gradient in fp32, in bytes
    tasks: int
    micro_batches: int  # of each task
    compute_s: float  # forward and backward of a micro-batch, two thirds of it backward
    optimizer_s: float
    row_s: float  # to clear a row, and to form its square on several ranks
    products_s: float  # of all rows; each rank forms those of its share
    combine_s: float  # the weighted sum of whole rows
    operations_s: float  # to start all that
    pass_s: float  # to read a gradient once

    @property
    def of_task_s(self) -> float:
        """The compute of a task."""
        return self.micro_batches * self.compute_s

    def combined_s(self, held: int, ranks: int) -> float:
        """Inner products and sum, where a rank holds one part of so many of each row."""
        return max(self.products_s / ranks + self.combine_s / held, self.operations_s)

    @property
    def backward_s(self) -> float:
        """A backward pass."""
        return self.compute_s * 2 / 3

    def alone(self) -> float:
        """A plain step on one rank."""
        return self.tasks * self.of_task_s + self.optimizer_s


def bert_base(tokens: int, tasks: int = 3, micro_batches: int = 1) -> Step:
    """A step on an H100, with so many tokens in a micro-batch."""
    parameters = 109.5e6
    read = 4 * parameters / (REACHED_MEMORY * MEMORY)
    return Step(
        size=4 * parameters,
        tasks=tasks,
        micro_batches=micro_batches,
        compute_s=6 * parameters * tokens / (REACHED_FLOPS * PEAK_FLOPS),
        optimizer_s=7 * read,  # weights, two moments read and written, the gradient read
        row_s=2 * read,
        products_s=tasks * read,
        combine_s=(2 + 3 * (tasks - 1)) * read,  # each addition reads two rows and writes one
        operations_s=OPERATIONS * KERNEL_S,
        pass_s=read,
    )


def plain(step: Step, link: Link) -> float:
    """DDP: the sum is reduced beside the last backward pass, but for the last bucket."""
    if link.ranks == 1:
        return step.alone()
    tail = link.reduce(min(BUCKET, step.size))
    return step.alone() + max(tail, link.reduce(step.size) - step.backward_s)


def all_reduce(step: Step, link: Link, row: float = 1.0) -> float:
    """Every row is reduced while the next task computes; `row` is its share of fp32's bytes."""
    now = done = 0.0
    for _ in range(step.tasks):
        now += step.of_task_s + step.row_s
        done = max(done, now) + link.reduce(row * step.size)
    return done + step.combined_s(1, link.ranks) + link.agree() + step.optimizer_s


def reduce_scatter(step: Step, link: Link, row: float = 1.0) -> float:
    """Every row is scattered while the next task computes, two at a time at most; the combination is gathered."""
    now, landed = 0.0, [0.0, 0.0]
    for _ in range(step.tasks):
        now = max(now, landed[-2]) + step.of_task_s + step.row_s
        landed.append(max(landed[-1], now) + link.scatter(row * step.size))
    combined = step.combined_s(link.ranks, link.ranks) + link.agree()
    return landed[-1] + combined + link.scatter(step.size) + step.optimizer_s


def sketch(step: Step, link: Link) -> float:
    """Inner products of sketches, in a small all-reduce; then the weighted sum of the rank's rows, in a large one."""
    sketches = 2 * step.tasks * step.pass_s + link.reduce(4 * SKETCH * step.tasks)
    return step.alone() + sketches + 3 * step.tasks * step.pass_s + link.agree() + link.reduce(step.size)


def held(step: Step, link: Link, every: int, combined: Callable[[Step, Link], float]) -> float:
    """Surgery in every n-th step, and between them losses with the weights that it found: plain steps."""
    return (combined(step, link) + (every - 1) * plain(step, link)) / every


def zero2(step: Step, link: Link, surgery: bool = True) -> float:
    """ZeRO-2 in bf16: an all-reduce of each micro-batch beside its backward pass, and the weights gathered at last."""
    visits = step.tasks * step.micro_batches
    waits = max(link.reduce(min(2 * 32e6, step.size / 2)), link.reduce(step.size / 2) - step.backward_s)
    filled = 3 * step.tasks * step.pass_s / link.ranks
    combined = filled + step.combined_s(link.ranks, link.ranks) if surgery else 0.0
    stepped = step.optimizer_s / link.ranks + link.scatter(step.size / 2)
    agreed = link.agree() if surgery else 0.0
    return visits * (step.compute_s + (waits if link.ranks > 1 else 0.0)) + combined + agreed + stepped


def fsdp2(step: Step, link: Link, surgery: bool = True, layers: int = 12) -> float:
    """FSDP2 in bf16: layers are gathered beside the ones before, and each task's gradients scattered in fp32."""
    forward = max(step.compute_s - step.backward_s, link.scatter(step.size / 2))
    gathers = link.scatter(step.size / 2)
    alone = forward + max(step.backward_s, gathers)
    scattered = forward + max(step.backward_s, gathers + link.scatter(step.size))
    edges = 2 * link.scatter(step.size / layers)  # the first layer's gathering, and the last one's gradient
    visits, averaged = step.tasks * step.micro_batches, step.tasks if surgery else 1
    filled = 3 * step.tasks * step.pass_s / link.ranks
    combined = filled + step.combined_s(link.ranks, link.ranks) if surgery else 0.0
    total = (visits - averaged) * alone + averaged * scattered + visits * edges
    return total + combined + (link.agree() if surgery else 0.0) + step.optimizer_s / link.ranks
