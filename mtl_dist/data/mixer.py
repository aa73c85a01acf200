"""Which tasks does a step draw, and when is an epoch over.

A mixer is a rule. Laid over the sizes of a stage's tasks it gives an `Order`, whose every step is a function of (seed,
stage, step): all ranks draw the same, and a run resumes at any step. What an order remembers only saves counting anew.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from itertools import accumulate, count, islice, pairwise, takewhile
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from mtl_dist.config import Config, UserError

# Shape suffixes: K = tasks, E = slices of a stage in which the probabilities stay the same.

BLOCK = 4096  # so many draws are made at a time
MOST_SLICES = 1000  # of a stage whose probabilities change with the steps

Draw = tuple[str, int]  # a task, and how often the stage has drawn it before: the number of its batch
Seed = tuple[int, int]  # the experiment's, and the number of the stage


@dataclass(frozen=True)
class Size:
    """How much there is of a task."""

    rows: int  # of an epoch
    batch_size: int  # rows of a draw

    @property
    def batches(self) -> Fraction:
        """Of an epoch. Draws go on where the last one stopped, so a batch may reach into the next epoch."""
        return Fraction(self.rows, self.batch_size)

    def whole_batches(self, epochs: int) -> int:
        """That some epochs take, the last one filled up."""
        return -(-epochs * self.rows // self.batch_size)  # in whole numbers: fractions take ten times as long


Sizes = Mapping[str, Size]


def _as_written(epochs: float) -> Fraction:
    return Fraction(repr(float(epochs)))  # 0.1 is a tenth, not the nearest binary number


class Order(ABC):
    """The draws of a stage's steps."""

    def __init__(self, sizes: Sizes, epochs: float, steps: int | None) -> None:
        self.sizes = sizes
        self.steps = self.steps_of(_as_written(epochs)) if steps is None else steps

    @abstractmethod
    def steps_of(self, epochs: Fraction) -> int:
        """How many steps some epochs take."""

    @abstractmethod
    def draws(self, step: int) -> list[Draw]:
        """What a step trains on."""

    def names(self, start: int = 0) -> Iterator[list[str]]:
        """The tasks of each step, from some step on: the same on all ranks, and after every resume."""
        return ([task for task, _ in self.draws(step)] for step in range(start, self.steps))

    @abstractmethod
    def expected(self) -> dict[str, float]:
        """How often the stage draws each task; of random draws, on average."""


class Mixer(Config):
    """A rule for drawing tasks."""

    def refuse_others(self, tasks: list[str]) -> None:
        """Raises a ValueError if the mixer speaks of other tasks than the stage has."""

    def most_tasks(self, tasks: int) -> int:
        """How many of a stage's tasks a step can have."""
        return 1

    @abstractmethod
    def order(self, sizes: Sizes, seed: Seed, epochs: float, steps: int | None = None) -> Order:
        """The draws of a stage that lasts for some epochs, or for some steps."""

    def order_over(
        self, loaders: Mapping[str, Sized | int], *, seed: int = 0, epochs: float = 1.0, steps: int | None = None
    ) -> Order:
        """The draws from anybody's loaders, each a draw of one batch; of a loader without a length, give that."""
        sizes = {}
        for task, loader in loaders.items():
            try:
                sizes[task] = Size(loader if isinstance(loader, int) else len(loader), 1)
            except TypeError:
                raise UserError(f"the loader of '{task}' has no length; give its batches of an epoch instead") from None
        try:
            self.refuse_others(list(sizes))
        except ValueError as error:
            raise UserError(f"mixer.{error}") from None
        return self.order(sizes, (seed, 0), epochs, steps)


def _refuse_unlike(field: str, named: list[str], tasks: list[str]) -> None:
    if sorted(named) != sorted(tasks):
        raise ValueError(f"{field} names {', '.join(named)}; the tasks are {', '.join(tasks)}; name each of them once")


# ------------------------------------------------------------------------------------------------------ fixed orders


class Joint(Mixer):
    """Draws every task once a step; losses are added up. Tasks that are through before the epoch ends start over."""

    kind: Literal["joint"] = "joint"
    epoch_ends: Literal["longest", "shortest"] = "longest"  # with the last row of the longest task, or of the shortest

    def most_tasks(self, tasks: int) -> int:
        return tasks

    def order(self, sizes: Sizes, seed: Seed, epochs: float, steps: int | None = None) -> Order:
        batches = [size.batches for size in sizes.values()]
        return JointOrder(sizes, epochs, steps, max(batches) if self.epoch_ends == "longest" else min(batches))


class JointOrder(Order):
    """Step s draws every task's batch s."""

    def __init__(self, sizes: Sizes, epochs: float, steps: int | None, batches: Fraction) -> None:
        self.batches = batches  # of an epoch
        super().__init__(sizes, epochs, steps)

    def steps_of(self, epochs: Fraction) -> int:
        return math.ceil(epochs * self.batches)

    def draws(self, step: int) -> list[Draw]:
        return [(task, step) for task in self.sizes]

    def expected(self) -> dict[str, float]:
        return dict.fromkeys(self.sizes, self.steps)


class RoundRobin(Mixer):
    """Draws one task a step, each in its turn."""

    kind: Literal["round_robin"] = "round_robin"
    # What a task does that is through before the longest one is: start over, or leave its turns to the others.
    when_dry: Literal["cycle", "drop_out"] = "cycle"

    def order(self, sizes: Sizes, seed: Seed, epochs: float, steps: int | None = None) -> Order:
        return (TurnsOrder if self.when_dry == "cycle" else DropOutOrder)(sizes, epochs, steps)


class TurnsOrder(Order):
    """The tasks' first batches in turn, then their second ones."""

    def __init__(self, sizes: Sizes, epochs: float, steps: int | None) -> None:
        self.tasks = list(sizes)
        self.batches = max(size.batches for size in sizes.values())
        super().__init__(sizes, epochs, steps)

    def steps_of(self, epochs: Fraction) -> int:
        return len(self.tasks) * math.ceil(epochs * self.batches)

    def draws(self, step: int) -> list[Draw]:
        turn, place = divmod(step, len(self.tasks))
        return [(self.tasks[place], turn)]

    def expected(self) -> dict[str, float]:
        turns, places = divmod(self.steps, len(self.tasks))
        return {task: turns + (place < places) for place, task in enumerate(self.tasks)}


class EpochwiseOrder(Order):
    """One task a step, and within an epoch every task as often as its rows take."""

    def __init__(self, sizes: Sizes, epochs: float, steps: int | None) -> None:
        super().__init__(sizes, epochs, steps)
        self.tasks = list(sizes)
        self.batches = sum((size.batches for size in sizes.values()), Fraction())
        self._enter(0)

    def _enter(self, epoch: int) -> None:
        self.epoch = epoch
        self.before, after = ([size.whole_batches(e) for size in self.sizes.values()] for e in (epoch, epoch + 1))
        self.first_step, self.end_step = sum(self.before), sum(after)
        self.counts = [b - a for a, b in zip(self.before, after, strict=True)]

    def _seek(self, step: int) -> None:
        """Enters the epoch of a step."""
        if not self.first_step <= step < self.end_step:
            # Each task adds less than one draw to its exact share, so the guess is at most a little late.
            self._enter(int(step / self.batches))
            while step < self.first_step:
                self._enter(self.epoch - 1)

    def steps_of(self, epochs: Fraction) -> int:
        before, after = (
            sum(size.whole_batches(whole) for size in self.sizes.values())
            for whole in (math.floor(epochs), math.floor(epochs) + 1)
        )
        return before + math.ceil((epochs % 1) * (after - before))

    def draws(self, step: int) -> list[Draw]:
        self._seek(step)
        place, index = self.locate(step - self.first_step)
        return [(self.tasks[place], self.before[place] + index)]

    @abstractmethod
    def locate(self, position: int) -> tuple[int, int]:
        """Which task stands at a position of the epoch, and for how many-th time."""

    def expected(self) -> dict[str, float]:
        self._seek(self.steps)
        last_epoch = Counter(self.locate(position)[0] for position in range(self.steps - self.first_step))
        return {task: self.before[place] + last_epoch[place] for place, task in enumerate(self.tasks)}


class DropOutOrder(EpochwiseOrder):
    """In turn, passing over the tasks that are through."""

    def _enter(self, epoch: int) -> None:
        super()._enter(epoch)
        self.levels = sorted({0, *self.counts})  # turns before which some task drops out
        ordered = sorted(self.counts)
        turns = ((b - a) * (len(ordered) - bisect_right(ordered, a)) for a, b in pairwise(self.levels))
        self.level_starts = [0, *accumulate(turns)]
        self.level = -1

    def locate(self, position: int) -> tuple[int, int]:
        level = bisect_right(self.level_starts, position) - 1
        if level != self.level:
            self.level = level
            self.active = [place for place, n in enumerate(self.counts) if n > self.levels[level]]
        turn, place = divmod(position - self.level_starts[level], len(self.active))
        return self.active[place], self.levels[level] + turn


class Sequential(Mixer):
    """Draws one task a step: in each epoch all rows of the first task, then all of the next."""

    kind: Literal["sequential"] = "sequential"
    task_order: list[str] | None = Field(None, alias="order", min_length=1)  # by default as the tasks are listed

    def refuse_others(self, tasks: list[str]) -> None:
        if self.task_order is not None:
            _refuse_unlike("order", self.task_order, tasks)

    def order(self, sizes: Sizes, seed: Seed, epochs: float, steps: int | None = None) -> Order:
        return SequentialOrder({task: sizes[task] for task in self.task_order or sizes}, epochs, steps)


class SequentialOrder(EpochwiseOrder):
    """One task after the other."""

    def _enter(self, epoch: int) -> None:
        super()._enter(epoch)
        self.starts = [0, *accumulate(self.counts)]

    def locate(self, position: int) -> tuple[int, int]:
        place = bisect_right(self.starts, position) - 1
        return place, position - self.starts[place]


# ---------------------------------------------------------------------------------------------------- sampled orders


class Sampled(Mixer):
    """Draws several tasks a step, each with some probability. An epoch has as many draws as all tasks have batches."""

    draws_per_step: PositiveInt | None = None  # by default as many as there are tasks
    draw: Literal["random", "balanced"] = "random"  # balanced: after n draws each task was drawn n p times, within one

    def order(self, sizes: Sizes, seed: Seed, epochs: float, steps: int | None = None) -> Order:
        return SampledOrder(self, sizes, seed, epochs, steps)

    def most_tasks(self, tasks: int) -> int:
        return min(self.draws_per_step or tasks, tasks)

    def slice_starts(self, order: "SampledOrder") -> list[int]:
        """The steps at which the probabilities change."""
        return [0]

    @abstractmethod
    def weights(self, order: "SampledOrder") -> NDArray[np.float64]:
        """What the probabilities of each slice are proportional to, (E, K)."""


def _rows(order: Order) -> NDArray[np.float64]:
    return np.array([size.rows for size in order.sizes.values()], dtype=np.float64)


class Temperature(Sampled):
    """p ~ size ** (1 / temperature), where the size is min(rows x scale, cap)."""

    kind: Literal["temperature"] = "temperature"
    # 1 follows the sizes; the larger, the more even; inf is uniform.
    temperature: float = Field(2.0, ge=1, allow_inf_nan=True)
    scale: PositiveFloat = 1.0
    cap: PositiveFloat | None = None  # rows; beyond it a task is no larger than others

    @field_validator("temperature", mode="before")
    @classmethod
    def _inf(cls, temperature: object) -> object:
        return math.inf if temperature == "inf" else temperature  # YAML itself would have it written .inf

    def weights(self, order: "SampledOrder") -> NDArray[np.float64]:
        size_K = np.minimum(_rows(order) * self.scale, self.cap or math.inf)
        return size_K[None] ** (1 / self.temperature)


class Annealed(Sampled):
    """p ~ rows ** alpha, where alpha falls from 1 to 0.2 (Stickland & Murray 2019): from by size to nearly even."""

    kind: Literal["annealed"] = "annealed"
    over: Literal["epochs", "steps"] = "epochs"  # alpha falls after every epoch, or step by step (at most 1,000 times)

    def slice_starts(self, order: "SampledOrder") -> list[int]:
        if self.over == "epochs":
            ends = (order.steps_of(Fraction(epoch)) for epoch in count(1))
            # An epoch of few rows may be shorter than a step.
            return list(dict.fromkeys([0, *takewhile(lambda end: end < order.steps, ends)]))
        slices = max(1, min(order.steps, MOST_SLICES))
        return [order.steps * i // slices for i in range(slices)]

    def weights(self, order: "SampledOrder") -> NDArray[np.float64]:
        alpha_E = np.linspace(1.0, 0.2, len(order.slice_starts))  # of one slice: 1
        return _rows(order) ** alpha_E[:, None]


class UniMax(Sampled):
    """Every task alike, but none for more than `max_epochs`; the others share what it leaves (Chung et al. 2023)."""

    kind: Literal["unimax"] = "unimax"
    max_epochs: PositiveFloat = 4.0

    def weights(self, order: "SampledOrder") -> NDArray[np.float64]:
        most_K = self.max_epochs * np.array([float(size.batches) for size in order.sizes.values()])
        budget = float(order.steps * order.draws_per_step)
        if most_K.sum() < budget - order.draws_per_step:
            raise UserError(
                f"mixer: {order.steps:,} steps draw {budget:,.0f} batches, max_epochs {self.max_epochs:g} allows only "
                f"{most_K.sum():,.0f}; raise it or train for less"
            )
        share_K = np.zeros_like(most_K)
        for done, k in enumerate(np.argsort(most_K)):  # what a small task cannot take is left to the larger ones
            share_K[k] = min(most_K[k], budget / (len(most_K) - done))
            budget -= share_K[k]
        # Before the first step everything is zero; any shares will do.
        return (share_K if share_K.any() else np.ones_like(share_K))[None]


class Proportional(Sampled):
    """p ~ rows."""

    kind: Literal["proportional"] = "proportional"

    def weights(self, order: "SampledOrder") -> NDArray[np.float64]:
        return _rows(order)[None]


class Uniform(Sampled):
    """Every task alike, whatever its size."""

    kind: Literal["uniform"] = "uniform"

    def weights(self, order: "SampledOrder") -> NDArray[np.float64]:
        return np.ones((1, len(order.sizes)))


class Explicit(Sampled):
    """The given p, scaled to sum to 1."""

    kind: Literal["explicit"] = "explicit"
    p: dict[str, NonNegativeFloat]

    @field_validator("p")
    @classmethod
    def _not_all_zero(cls, p: dict[str, float]) -> dict[str, float]:
        if not any(p.values()):
            raise ValueError(f"{p} is zero for every task")
        return p

    def refuse_others(self, tasks: list[str]) -> None:
        _refuse_unlike("p", list(self.p), tasks)

    def weights(self, order: "SampledOrder") -> NDArray[np.float64]:
        largest = max(self.p.values())  # so that huge ones do not add up to infinity
        return np.array([[self.p[task] / largest for task in order.sizes]])


class SampledOrder(Order):
    """Draws in blocks; a block is made of the seed and its number, and its counts of those before it."""

    def __init__(self, mixer: Sampled, sizes: Sizes, seed: Seed, epochs: float, steps: int | None) -> None:
        self.seed = seed
        self.tasks = list(sizes)
        self.draws_per_step = mixer.draws_per_step or len(sizes)
        self.batches = sum((size.batches for size in sizes.values()), Fraction())
        super().__init__(sizes, epochs, steps)
        self.slice_starts = mixer.slice_starts(self)
        weight_EK = mixer.weights(self)
        self.p_EK = weight_EK / weight_EK.sum(axis=1, keepdims=True)
        self.balanced = mixer.draw == "balanced"
        self._start_over()

    def steps_of(self, epochs: Fraction) -> int:
        return math.ceil(epochs * self.batches / self.draws_per_step)

    def draws(self, step: int) -> list[Draw]:
        start, stop = step * self.draws_per_step, (step + 1) * self.draws_per_step
        drawn: list[Draw] = []
        while start < stop:
            block, offset = divmod(start, BLOCK)
            self._seek(block)
            drawn += self._drawn[offset : offset + stop - start]
            start = (block + 1) * BLOCK
        return drawn

    def expected(self) -> dict[str, float]:
        lengths_E = np.diff([*self.slice_starts, self.steps]) * self.draws_per_step
        return dict(zip(self.tasks, (lengths_E @ self.p_EK).tolist(), strict=True))

    def _start_over(self) -> None:
        self._block = -1
        self._counts_K = np.zeros(len(self.tasks), dtype=np.int64)
        self._balanced = balanced(self.p_EK, [start * self.draws_per_step for start in self.slice_starts])

    def _seek(self, block: int) -> None:
        if block < self._block:
            self._start_over()
        while self._block < block:
            self._next_block()

    def _next_block(self) -> None:
        self._block += 1
        places = np.fromiter(islice(self._balanced, BLOCK), np.int64, BLOCK) if self.balanced else self._random()
        # The number of each draw: how many of the block's earlier draws are of its task, and how many before it.
        by_task = np.argsort(places, kind="stable")
        drawn_K = np.bincount(places, minlength=len(self.tasks))
        numbers = np.empty(BLOCK, dtype=np.int64)
        numbers[by_task] = np.arange(BLOCK) - np.repeat(np.cumsum(drawn_K) - drawn_K, drawn_K)
        numbers += self._counts_K[places]
        self._counts_K += drawn_K
        self._drawn = [(self.tasks[k], number) for k, number in zip(places.tolist(), numbers.tolist(), strict=True)]

    def _random(self) -> NDArray[np.int64]:
        uniform = np.random.default_rng((*self.seed, self._block)).random(BLOCK)
        steps = np.arange(self._block * BLOCK, (self._block + 1) * BLOCK) // self.draws_per_step
        slices = np.searchsorted(self.slice_starts, steps, side="right") - 1
        places = np.empty(BLOCK, dtype=np.int64)
        for e in np.unique(slices):
            cumulative_K = np.cumsum(self.p_EK[e])
            here = slices == e
            places[here] = np.searchsorted(cumulative_K / cumulative_K[-1], uniform[here], side="right")
        return places


def balanced(p_EK: NDArray[np.float64], slice_starts: list[int]) -> Iterator[int]:
    """An endless sequence of tasks in which each is, after any number of draws, within one of its quota.

    A task's j-th draw is due when its quota reaches j, and may come once the quota has passed j - 1. Always taking, of
    those that may come, the one that is due first meets every such date (Tijdeman 1980; Baruah et al. 1996).
    """
    lengths = np.diff(slice_starts)
    quota_EK = np.concatenate([np.zeros((1, p_EK.shape[1])), np.cumsum(p_EK[:-1] * lengths[:, None], axis=0)])
    quotas: list[list[float]] = quota_EK.T.tolist()
    rates: list[list[float]] = p_EK.T.tolist()

    def due(k: int, j: int) -> float:
        e = bisect_right(quotas[k], j) - 1 if len(slice_starts) > 1 else 0
        # Rounded, so that equal dates stay equal: processors differ in the last digit of a power.
        return round(slice_starts[e] + (j - quotas[k][e]) / rates[k][e], 6)

    waiting = [(0.0, k, 1) for k in range(p_EK.shape[1]) if p_EK[:, k].any()]  # (not before, task, j)
    ready: list[tuple[float, int, int]] = []  # (due, task, j)
    for n in count():
        while waiting and (waiting[0][0] < n + 1 or not ready):
            _, k, j = heappop(waiting)
            heappush(ready, (due(k, j), k, j))
        when, k, j = heappop(ready)
        yield k
        heappush(waiting, (when, k, j + 1))


AnyMixer = Annotated[
    Joint | RoundRobin | Sequential | Temperature | Annealed | UniMax | Proportional | Uniform | Explicit,
    Field(discriminator="kind"),
]
