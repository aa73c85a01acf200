"""Where a model is wrong, as its predictions tell: rows from the most wrong on, slices, calibration, threshold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtl_dist.data.prepare import Split
from mtl_dist.data.read import Example
from mtl_dist.metrics import (
    Bin,
    accuracy_interval,
    best_threshold,
    ece,
    mean_interval,
    pearson,
    pearson_interval,
    reliability,
)
from mtl_dist.model.objectives import Binary, Regression
from mtl_dist.runs.predict import class_names, shown, shown_probabilities
from mtl_dist.runs.slices import slices_of
from mtl_dist.tasks import TaskConfig
from mtl_dist.training.scores import Predicted, Scores, score


@dataclass(frozen=True)
class Measured:
    """A score and its 95 % interval; None where one is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SliceScore:
    """How the model does on some of the rows."""

    kind: str
    name: str
    rows: int
    share: float  # of all rows
    score: Measured  # accuracy, or the mean absolute error
    rest: float | None  # the same score of all other rows
    worse: bool  # than all rows, by more than the interval
    pearson: Measured | None  # of regression


@dataclass(frozen=True)
class Calibration:
    """How far the probability of the predicted class is how often it is right."""

    ece: float
    confidence: float  # on average
    accuracy: float
    bins: list[Bin]


@dataclass(frozen=True)
class Threshold:
    """The probability of yes above which yes would have been the best answer on these very rows."""

    yes: str  # as the files call it
    threshold: float
    accuracy: float


@dataclass(frozen=True)
class WrongRow:
    """A row as errors.jsonl has it."""

    id: str
    line: int
    sentences: tuple[str, ...]
    gold: str | int | float | None
    prediction: str | int | float | None  # nothing where the model gave no number
    how_wrong: float | None
    slices: list[str]
    probabilities: dict[str, float] | None = None


@dataclass(frozen=True)
class Analysis:
    """What is told of a task's predictions."""

    rows: list[WrongRow]  # the most wrong first
    num_wrong: int | None  # of classes
    scores: Scores
    measure: str  # accuracy, or mean absolute error
    score: Measured
    pearson: Measured | None
    slices: list[SliceScore]
    calibration: Calibration | None
    threshold: Threshold | None


def analyse(task: TaskConfig, split: Split, examples: Sequence[Example], predicted: Predicted) -> Analysis:
    """Compares predictions with the labels of a split, of which at least one row has a number."""
    gold = split.labels(np.arange(len(split)))
    values, probabilities_NC = predicted.values, predicted.probabilities
    regression = isinstance(task.label, Regression)
    names = [] if regression else class_names(task)
    slices = slices_of(task.label, names, examples, gold)
    wrong = how_wrong(task, gold, predicted)
    names_of = [[f"{each.kind}: {each.name}" for each in slices if each.rows[row]] for row in range(len(gold))]
    rows = [
        WrongRow(
            id=examples[row].id,
            line=examples[row].line,
            sentences=examples[row].sentences,
            gold=shown(task, gold[row]),
            prediction=shown(task, values[row]),
            how_wrong=round(float(wrong[row]), 6) if np.isfinite(wrong[row]) else None,
            slices=names_of[row],
            probabilities=None if probabilities_NC is None else shown_probabilities(task, probabilities_NC[row]),
        )
        for row in np.argsort(-wrong, kind="stable").tolist()
    ]
    everything = np.ones(len(gold), dtype=bool)
    score_of = _error if regression else _accuracy
    whole = score_of(values, gold, everything)
    return Analysis(
        rows=rows,
        num_wrong=None if regression else int((values != gold).sum()),
        scores=score(task, split, values),
        measure="mean absolute error" if regression else "accuracy",
        score=whole,
        pearson=_pearson(values, gold, everything) if regression else None,
        slices=[
            SliceScore(
                each.kind,
                each.name,
                rows=int(each.rows.sum()),
                share=float(each.rows.mean()),
                score=(measured := score_of(values, gold, each.rows)),
                rest=score_of(values, gold, ~each.rows).value,
                worse=_is_worse(measured, whole, regression),
                pearson=_pearson(values, gold, each.rows) if regression else None,
            )
            for each in slices
        ],
        calibration=None if probabilities_NC is None else _calibration(values, gold, probabilities_NC),
        threshold=_threshold(names[1], gold, probabilities_NC)
        if probabilities_NC is not None and isinstance(task.label, Binary)
        else None,
    )


def how_wrong(task: TaskConfig, gold: NDArray[np.float64], predicted: Predicted) -> NDArray[np.float64]:
    """Of each row: how far a number is off; -log of the gold class's probability; without such, 1 where it is wrong.

    Infinite where the model gave no number.
    """
    if isinstance(task.label, Regression):
        wrong = np.abs(predicted.values - gold)
    elif predicted.probabilities is not None:
        of_gold = np.take_along_axis(predicted.probabilities, gold.astype(np.int64)[:, None], axis=1)[:, 0]
        wrong = -np.log(of_gold.clip(min=np.finfo(np.float64).tiny))
    else:
        wrong = (predicted.values != gold).astype(np.float64)
    return np.where(np.isnan(predicted.values), np.inf, wrong)


def _accuracy(values: NDArray[np.float64], gold: NDArray[np.float64], rows: NDArray[np.bool_]) -> Measured:
    right, count = int((values == gold)[rows].sum()), int(rows.sum())
    return Measured(right / count, *accuracy_interval(right, count))


def _error(values: NDArray[np.float64], gold: NDArray[np.float64], rows: NDArray[np.bool_]) -> Measured:
    """Over the rows that have a number."""
    off = np.abs(values - gold)[rows & np.isfinite(values)]
    if not len(off):
        return Measured(None)
    low, high = mean_interval(off) or (None, None)
    return Measured(float(off.mean()), None if low is None else max(low, 0.0), high)


def _pearson(values: NDArray[np.float64], gold: NDArray[np.float64], rows: NDArray[np.bool_]) -> Measured:
    r = pearson(values[rows], gold[rows])
    return Measured(r) if r is None else Measured(r, *(pearson_interval(r, int(rows.sum())) or ()))


def _is_worse(part: Measured, whole: Measured, regression: bool) -> bool:
    if part.low is None or part.high is None or whole.value is None:
        return False
    return part.low > whole.value if regression else part.high < whole.value


def _calibration(
    values: NDArray[np.float64], gold: NDArray[np.float64], probabilities_NC: NDArray[np.float64]
) -> Calibration:
    given = np.isfinite(values)
    chosen = values[given].astype(np.int64)
    confidence = np.take_along_axis(probabilities_NC[given], chosen[:, None], axis=1)[:, 0]
    right = chosen == gold[given]
    bins = reliability(confidence, right)
    return Calibration(ece(bins), float(confidence.mean()), float(right.mean()), bins)


def _threshold(yes: str, gold: NDArray[np.float64], probabilities_NC: NDArray[np.float64]) -> Threshold:
    given = np.isfinite(probabilities_NC[:, 1])
    threshold, right = best_threshold(probabilities_NC[given, 1], gold[given])
    return Threshold(yes, threshold, right / len(gold))
