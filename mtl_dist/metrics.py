"""How good the predictions are: one score per metric, and the two overall scores that the reports disagree on; how far
a score can be trusted, and how far a model's own probabilities.

A correlation is None where it is undefined; nothing here ever returns NaN. A prediction may be NaN, where the model
gave no number: it is wrong as a label, and no correlation is defined with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

CORRELATIONS = ("pearson", "spearman")
OVERALL = {"overall_a": "mean, correlations as (r+1)/2", "overall_b": "mean"}
Z_95 = NormalDist().inv_cdf(0.975)  # so many standard errors to either side hold 95 %
ECE_BINS = 15  # as in Guo et al. 2017


def evaluate(
    kind: Literal["classification", "binary", "regression"], pred: ArrayLike, gold: ArrayLike, num_classes: int = 2
) -> dict[str, float | None]:
    """Every metric of a kind of label; predictions are labels for the first two kinds, values for regression."""
    if kind == "regression":
        return {"pearson": pearson(pred, gold), "spearman": spearman(pred, gold), "mse": mse(pred, gold)}
    return {"accuracy": accuracy(pred, gold), "macro_f1": macro_f1(pred, gold, num_classes)}


def overall(main: Mapping[str, tuple[str, float | None]]) -> dict[str, float]:
    """Overall scores A and B, from the metric and the score of each task.

    B is the mean over the tasks. A is the same with each correlation r first moved from [-1, 1] to [0, 1], as (r+1)/2.
    An undefined score counts as 0 (a correlation: as r = 0), so that a collapsed model cannot win by it.
    """
    assert main, "no tasks to average"
    scores = [(metric, 0.0 if score is None else score) for metric, score in main.values()]
    return {
        "overall_a": sum((r + 1) / 2 if metric in CORRELATIONS else r for metric, r in scores) / len(scores),
        "overall_b": sum(score for _, score in scores) / len(scores),
    }


def accuracy(pred: ArrayLike, gold: ArrayLike) -> float:
    """Share of rows whose label is right."""
    pred, gold = _pair(pred, gold)
    return float(np.mean(pred == gold))


def macro_f1(pred: ArrayLike, gold: ArrayLike, num_classes: int) -> float:
    """F1 averaged over the classes that occur, in the predictions or in the truth."""
    counts = confusion_matrix(pred, gold, num_classes)
    occurrences = counts.sum(axis=0) + np.bincount(np.asarray(gold, np.int64), minlength=num_classes)
    present = occurrences > 0
    # F1 = 2 tp / (2 tp + fp + fn), and a class occurs once for each fp or fn, twice for each tp.
    return float(np.mean(2 * counts.diagonal()[present] / occurrences[present]))


def confusion_matrix(pred: ArrayLike, gold: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Rows counted at [gold, pred], but for those whose prediction is NaN."""
    pred, gold = _pair(pred, gold)
    given = ~np.isnan(pred.astype(np.float64))
    pred, gold = pred[given], gold[given]
    assert all(np.isin(x, range(num_classes)).all() for x in (pred, gold)), f"a label is not in 0..{num_classes - 1}"
    cells = gold.astype(np.int64) * num_classes + pred.astype(np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def pearson(pred: ArrayLike, gold: ArrayLike) -> float | None:
    """Linear correlation; None for fewer than two rows, a constant side, or a value that is not finite."""
    if np.size(gold) < 2:
        return None
    pred, gold = (x.astype(np.float64) for x in _pair(pred, gold))
    if not all(np.isfinite(x).all() and x.min() < x.max() for x in (pred, gold)):
        return None
    return float(np.clip(_direction(pred) @ _direction(gold), -1, 1))


def spearman(pred: ArrayLike, gold: ArrayLike) -> float | None:
    """Pearson's correlation of the ranks, None where that of the values is."""
    if pearson(pred, gold) is None:
        return None
    return pearson(_ranks(pred), _ranks(gold))


def mse(pred: ArrayLike, gold: ArrayLike) -> float | None:
    """Mean squared error; None where it is not finite."""
    pred, gold = _pair(pred, gold)
    error = float(np.mean((pred.astype(np.float64) - gold) ** 2))
    return error if math.isfinite(error) else None


def accuracy_interval(right: int, rows: int) -> tuple[float, float]:
    """95 % interval of an accuracy (Wilson 1927): stays within 0 and 1, and has a width where all rows are right."""
    share, extra = right / rows, Z_95**2 / rows
    middle = share + extra / 2
    half = math.sqrt(extra * (share * (1 - share) + extra / 4))
    return max((middle - half) / (1 + extra), 0.0), min((middle + half) / (1 + extra), 1.0)


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % interval of a mean, as the normal distribution has it; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = Z_95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def pearson_interval(r: float, rows: int) -> tuple[float, float] | None:
    """95 % interval of a linear correlation (Fisher 1921); None for fewer than four rows."""
    if rows < 4:
        return None
    if abs(r) == 1:
        return r, r
    half = Z_95 / math.sqrt(rows - 3)
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


@dataclass(frozen=True)
class Bin:
    """The rows whose prediction is as sure as this: more than `above`, at most `up_to`."""

    above: float
    up_to: float
    rows: int
    confidence: float  # on average
    accuracy: float


def reliability(confidence: NDArray[np.float64], right: NDArray[np.bool_], bins: int = ECE_BINS) -> list[Bin]:
    """Accuracy against confidence, in equal bins of the confidence; those without rows are left out."""
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.searchsorted(edges, confidence, side="left") - 1
    return [
        Bin(
            float(edges[i]),
            float(edges[i + 1]),
            int((bin_of == i).sum()),
            float(confidence[bin_of == i].mean()),
            float(right[bin_of == i].mean()),
        )
        for i in np.unique(bin_of).tolist()
    ]


def ece(bins: list[Bin]) -> float:
    """Expected calibration error (Guo et al. 2017): how far accuracy and confidence are apart, on average over rows."""
    return sum(b.rows * abs(b.accuracy - b.confidence) for b in bins) / sum(b.rows for b in bins)


def best_threshold(p_yes: NDArray[np.float64], gold: NDArray[np.float64]) -> tuple[float, int]:
    """The threshold above which a probability had best meant yes, and how many rows are right then.

    It lies midway between two rows; among equally good ones it is the nearest to 0.5.
    """
    thresholds = np.convolve(np.concatenate([[0.0], np.unique(p_yes), [1.0]]), [0.5, 0.5], mode="valid")
    thresholds = np.append(thresholds, 0.5)
    of_no, of_yes = (np.sort(p_yes[gold == label]) for label in (0, 1))
    right = np.searchsorted(of_no, thresholds, side="right") + len(of_yes)
    right -= np.searchsorted(of_yes, thresholds, side="right")
    best = max(range(len(thresholds)), key=lambda i: (right[i], -abs(thresholds[i] - 0.5)))
    return float(thresholds[best]), int(right[best])


def _pair(pred: ArrayLike, gold: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    pred, gold = np.asarray(pred), np.asarray(gold)
    # Otherwise (rows, 1) against (rows,) would broadcast, and compare every row with every other.
    assert pred.shape == gold.shape == (gold.size,) != (0,), f"predictions {pred.shape}, truth {gold.shape}"
    return pred, gold


def _direction(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """`x` centred and scaled to length 1, without overflow and without losing a spread that is tiny beside the mean."""
    x = np.ldexp(x, -np.frexp(np.abs(x).max())[1])  # by a power of two: nothing is rounded
    x = x - x[0]  # exact where values are close, unlike the mean
    x = x - x.mean()
    return x / np.linalg.norm(x)


def _ranks(x: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return ranks[inverse]
