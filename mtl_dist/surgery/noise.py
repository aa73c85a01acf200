"""How much of the tasks' gradients is more than the noise of their batches: is there a conflict, or only chance?

Two independent parts of a batch, of two ranks say, have the true gradient in common and nothing else. So from the
squared lengths of the parts and of their sum both the true gradient's and the noise's follow without bias (McCandlish
et al. 2018, appendix A). Inner products of two tasks need no correction, as long as their rows have nothing in common.
Single steps say little; over the steps of a report, or of a run, the means become known, and how well.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

SURE = 2.0  # standard errors from which on something counts as real
ENOUGH = 10  # steps for a verdict: the errors of fewer are guesses


@dataclass(frozen=True)
class Sample:
    """What one step says of its tasks. Without bias, so that a squared length may come out below zero."""

    rows: dict[str, float]  # of each task's batch
    signal: dict[str, float]  # squared length of the true gradient
    noise: dict[str, float]  # what the choice of its rows adds to that of the batch's gradient
    inner: dict[str, float]  # product of two tasks' true gradients, by pair in the order of the alphabet: "sst.sts"


class Parts(NamedTuple):
    """Some parts of a task's batch, all of its ranks' or one: their numbers added up."""

    rows: float  # of the whole batch
    squares: float  # squared lengths of what they contributed to the batch's gradient
    shares: float  # of the rows
    square_shares: float


def sample(tasks: list[str], gram_KK: np.ndarray[Any, Any], parts: Mapping[str, Parts]) -> Sample | None:
    """What the inner products of a step's gradients say, with parts of the batches of some tasks."""
    rows, signal, noise = {}, {}, {}
    for k, task in enumerate(tasks):
        if (of := parts.get(task)) and of.shares > of.square_shares:
            whole = gram_KK[k, k].item()
            rows[task] = of.rows
            # A part of share s has s^2 of the true gradient's squared length, and s of the noise's.
            signal[task] = (of.shares * whole - of.squares) / (of.shares - of.square_shares)
            noise[task] = whole - signal[task]
    if not all(map(math.isfinite, signal.values())):  # fp16 may have overflowed
        return None
    pairs = combinations(sorted((k for k, task in enumerate(tasks) if task in rows), key=tasks.__getitem__), 2)
    inner = {f"{tasks[i]}.{tasks[j]}": gram_KK[i, j].item() for i, j in pairs}
    return Sample(rows, signal, noise, inner) if rows else None


class Noise:
    """The samples of some steps, added up."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[float]] = {}  # steps, and the sums of rows, noise, signal and the signal's square
        # Of each pair: steps, the sums of (product, signal, signal), and of the products of these three.
        self.pairs: dict[str, list[float]] = {}

    def add(self, found: Sample) -> None:
        """Adds a step."""
        for task, signal in found.signal.items():
            _add(self.tasks, task, [1.0, found.rows[task], found.noise[task], signal, signal**2])
        for first, second in combinations(sorted(found.rows), 2):
            pair = f"{first}.{second}"
            three = np.array([found.inner[pair], found.signal[first], found.signal[second]])
            _add(self.pairs, pair, [1.0, *three, *np.outer(three, three).ravel()])

    def state(self) -> dict[str, Any]:
        """The sums."""
        return {"tasks": self.tasks, "pairs": self.pairs}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.tasks = {name: list(sums) for name, sums in state["tasks"].items()}
        self.pairs = {name: list(sums) for name, sums in state["pairs"].items()}

    def scale(self, task: str) -> float:
        """The gradient noise scale: the rows of a batch whose noise is as long as the true gradient."""
        steps, rows, noise, signal, _ = self.tasks[task]
        return rows / steps * max(noise, 0.0) / signal if signal > 0 else math.inf

    def shortage(self, task: str) -> float:
        """How many times a batch is at least smaller than its task's noise scale."""
        steps, _, noise, *sums = self.tasks[task]
        signal, square = sums[0] / steps, sums[1] / steps
        error = math.sqrt(max(square - signal**2, 0.0) / max(steps - 1, 1))
        return max(noise, 0.0) / steps / max(signal + SURE * error, 1e-300)

    def cosine(self, pair: str) -> tuple[float, float] | None:
        """The cosine of two tasks' true gradients, and its standard error; None where they cannot be told from zero."""
        steps, *sums = self.pairs[pair]
        mean, squares = np.array(sums[:3]) / steps, np.reshape(sums[3:], (3, 3)) / steps
        covariance = (squares - np.outer(mean, mean)) / max(steps - 1, 1)  # of the means
        inner, *signals = mean
        if steps < 2 or any(
            signal <= SURE * math.sqrt(max(covariance[i, i], 0.0)) for i, signal in enumerate(signals, start=1)
        ):
            return None
        length = math.sqrt(signals[0] * signals[1])
        cosine = inner / length
        # By how much the cosine moves with each of the three.
        slope = np.array([1 / length, *(-cosine / 2 / signal for signal in signals)])
        return cosine, math.sqrt(max(slope @ covariance @ slope, 0.0))

    def summary(self) -> dict[str, Any] | None:
        """For a report: the cosines and their errors, where they are known, and every task's noise scale in rows."""
        if not self.tasks:
            return None
        known = {pair: found for pair in self.pairs if (found := self.cosine(pair)) is not None}
        return {
            "cosine": {pair: cosine for pair, (cosine, _) in known.items()},
            "error": {pair: error for pair, (_, error) in known.items()},
            "scale": {task: self.scale(task) for task in self.tasks},
        }

    def verdict(self) -> Iterator[str]:
        """What a person should know at the end of a run, a line each."""
        known = {pair: self.cosine(pair) for pair, sums in self.pairs.items() if sums[0] >= ENOUGH}
        told = {pair: f"{pair.replace('.', '-')} {_cosine(found)}" for pair, found in known.items()}
        real = [pair for pair, found in known.items() if found is not None and found[0] < -SURE * found[1]]
        if len(known) <= 6:
            yield from (f"{line}, {_judged(known[pair])}" for pair, line in told.items())
        else:
            some = f": {', '.join(told[pair] for pair in real[:6])}{', ...' * (len(real) > 6)}" if real else ""
            yield f"{len(real)} of {len(known)} pairs of tasks conflict by more than {SURE:g} standard errors{some}"
        for task, (steps, rows, *_) in self.tasks.items():
            if steps >= ENOUGH and self.shortage(task) >= 2:
                times = self.scale(task) / (rows / steps)
                by = f"{times:,.0f} times" if math.isfinite(times) else f"{self.shortage(task):,.0f} times or more"
                yield (
                    f"batch of {task} is {by} smaller than its noise scale: more rows a step help it more than "
                    "surgery would"
                )


def _add(sums: dict[str, list[float]], name: str, values: list[float]) -> None:
    before = sums.get(name, [0.0] * len(values))
    sums[name] = [float(a + b) for a, b in zip(before, values, strict=True)]


def _cosine(found: tuple[float, float] | None) -> str:
    return "cosine unknown" if found is None else f"cosine {found[0]:.2f} +- {found[1]:.2f}"


def _judged(found: tuple[float, float] | None) -> str:
    if found is None:
        return "one of them is lost in the noise of its batches"
    cosine, error = found
    if cosine < -SURE * error:
        return "a conflict"
    return "no conflict" if cosine > SURE * error else "no conflict that could be told from noise"
