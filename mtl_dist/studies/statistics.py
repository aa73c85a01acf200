"""What a few seeds tell: mean and spread, a paired t-test, and how finely a dev set measures at all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtl_dist.metrics import CORRELATIONS

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Some values in short."""

    n: int
    mean: float
    sd: float | None  # of the values, not of their mean; of one value there is none


@dataclass(frozen=True)
class Difference:
    """By how much one system scores better than another, from runs in pairs of the same seed."""

    n: int  # pairs
    mean: float
    interval: tuple[float, float] | None = None  # in which the true difference lies, at 95 %
    p: float | None = None  # two-sided, of a difference at least as large where there is none


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation (with n - 1); nothing of nothing."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(1, mean, None)
    return Spread(len(values), mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference | None:
    """The paired t-test. Of one pair there is a difference and no test, and so of pairs that all differ by the same."""
    found = spread([a - b for a, b in zip(ours, theirs, strict=True)])
    if found is None:
        return None
    if found.sd is None or found.sd <= 1e-12 * max(map(abs, [*ours, *theirs])):  # rounding apart, always the same
        return Difference(found.n, found.mean)
    error = found.sd / math.sqrt(found.n)
    reach = error * t_quantile(CONFIDENCE, found.n - 1)
    p = t_tails(found.mean / error, found.n - 1)
    return Difference(found.n, found.mean, (found.mean - reach, found.mean + reach), p)


def t_tails(t: float, df: int) -> float:
    """How probable it is that Student's t with `df` degrees of freedom is at least as far from zero."""
    inside = t * t / (df + t * t)
    return 1 - _beta(inside, 0.5, df / 2) if inside < 0.5 else _beta(df / (df + t * t), df / 2, 0.5)  # no digits lost


def t_quantile(confidence: float, df: int) -> float:
    """The t that `confidence` of all values lie within, on both sides of zero."""
    high = 1.0
    while t_tails(high, df) > 1 - confidence:
        high *= 2
    return _bisected(lambda t: t_tails(t, df) - (1 - confidence), 0.0, high)


def _bisected(falls: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(middle) > 0 else (low, middle)
    return (low + high) / 2


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # on the other side the fraction converges at once
        return 1 - _beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    # Its continued fraction (Abramowitz & Stegun 26.5.8), from the front, by Lentz's method.
    tiny = 1e-300
    fraction, c, d = 1.0, 1.0, 0.0
    for i in range(1, 1000):
        m = i // 2
        step = (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
            if i % 2 == 0
            else -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        )
        d = 1 / ((1 + step * d) or tiny)
        c = (1 + step / c) or tiny
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front / (a * fraction)


def standard_error(metric: str, score: float, rows: int) -> float | None:
    """How far a score on so many rows is from that on endless ones, as a standard error; unknown for F1."""
    if rows < 2:
        return None
    if metric == "accuracy":
        return math.sqrt(max(0.0, score * (1 - score)) / rows)
    return (1 - score * score) / math.sqrt(rows - 1) if metric in CORRELATIONS else None
