"""python -m pytest tests/test_metrics.py"""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics

from mtl_dist.metrics import (
    accuracy,
    accuracy_interval,
    best_threshold,
    confusion_matrix,
    ece,
    evaluate,
    macro_f1,
    mean_interval,
    mse,
    overall,
    pearson,
    pearson_interval,
    reliability,
    spearman,
)

# Few distinct whole numbers, so that ties are common.
columns = st.integers(2, 30).flatmap(lambda n: st.tuples(*[st.lists(st.integers(-5, 5), min_size=n, max_size=n)] * 2))


@pytest.mark.parametrize("seed", range(20))
def test_correlations_agree_with_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 6, size=50)  # ties on this side always
    pred = gold + rng.normal(size=50) if seed % 2 else rng.integers(0, 4, size=50)
    assert pearson(pred, gold) == pytest.approx(stats.pearsonr(pred, gold).statistic, rel=1e-9)
    assert spearman(pred, gold) == pytest.approx(stats.spearmanr(pred, gold).statistic, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_label_metrics_agree_with_sklearn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pred, gold = rng.choice([0, 1, 2, 4], size=(2, 12))  # class 3 never occurs, others often on one side only
    assert accuracy(pred, gold) == pytest.approx(sklearn_metrics.accuracy_score(gold, pred))
    assert macro_f1(pred, gold, 5) == pytest.approx(
        sklearn_metrics.f1_score(gold, pred, average="macro", zero_division=0)
    )
    np.testing.assert_array_equal(
        confusion_matrix(pred, gold, 5), sklearn_metrics.confusion_matrix(gold, pred, labels=range(5))
    )


def test_label_metrics_by_hand() -> None:
    pred, gold = [0, 0, 1, 2], [0, 1, 1, 1]
    assert accuracy(pred, gold) == 0.5
    # F1 of the classes: 2/3 (one of two predicted, one of one found), 1/2 and 0; class 3 does not occur.
    assert macro_f1(pred, gold, 4) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert confusion_matrix(pred, gold, 3).tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_a_prediction_that_is_no_number_is_wrong() -> None:
    pred, gold = [np.nan, 1, 1, np.nan], [0, 0, 1, 1]
    assert accuracy(pred, gold) == 0.25
    # Class 0: none of two found. Class 1: one of two predicted, one of two found.
    assert macro_f1(pred, gold, 2) == pytest.approx((0 + 1 / 2) / 2)
    assert confusion_matrix(pred, gold, 2).tolist() == [[0, 1], [0, 1]]
    assert evaluate("regression", pred, gold) == {"pearson": None, "spearman": None, "mse": None}
    assert evaluate("binary", [np.nan] * 2, [0, 1]) == {"accuracy": 0.0, "macro_f1": 0.0}


def test_correlations_by_hand() -> None:
    # Centred: (-1, 0, 1) and (-2, -1, 3), so r = 5 / sqrt(2 * 14).
    assert pearson([1, 2, 3], [0, 1, 5]) == pytest.approx(5 / 28**0.5)
    assert spearman([1, 2, 3], [0, 1, 5]) == pytest.approx(1)
    # The tie shares rank 1.5: (1.5, 1.5, 3) against (1, 2, 3), so r = 1.5 / sqrt(1.5 * 2).
    assert spearman([7, 7, 9], [1, 2, 3]) == pytest.approx(1.5 / 3**0.5)


@given(columns)
def test_correlations_are_bounded_and_symmetric(pair: tuple[list[int], list[int]]) -> None:
    pred, gold = pair
    for metric in (pearson, spearman):
        r = metric(pred, gold)
        assert (r is None) == (len(set(pred)) == 1 or len(set(gold)) == 1)
        assert r is None or -1 <= r <= 1
        assert r == metric(gold, pred)


@given(columns, st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_correlations_survive_affine_maps(pair: tuple[list[int], list[int]], scale: float, shift: float) -> None:
    pred, gold = np.array(pair[0]), np.array(pair[1])
    for metric in (pearson, spearman):
        r = metric(pred, gold)
        assert metric(scale * pred + shift, gold) == (r if r is None else pytest.approx(r, abs=1e-6))
        assert metric(-scale * pred + shift, gold) == (r if r is None else pytest.approx(-r, abs=1e-6))


@given(columns)
def test_spearman_sees_ranks_only(pair: tuple[list[int], list[int]]) -> None:
    pred, gold = pair
    r = spearman(pred, gold)
    assert spearman(np.exp(pred), gold) == (r if r is None else pytest.approx(r))


def test_pearson_survives_huge_values_and_tiny_spreads() -> None:
    gold = np.array([1.0, 2.0, 4.0, 8.0])
    expected = pearson(gold, [4, 1, 2, 8])
    for pred in (
        gold * 1e307,
        gold * 1e-320,
        1 + gold * 2.0**-52,
        1e9 + gold * 1e-3,
        np.float32(gold) * np.float32(1e37),
    ):
        assert pearson(pred, [4, 1, 2, 8]) == pytest.approx(expected, rel=1e-3)
    assert pearson([-1.7e308, 0, 1.7e308], [1, 2, 3]) == pytest.approx(1)


@pytest.mark.parametrize("metric", [pearson, spearman])
def test_correlation_is_none_where_undefined(metric) -> None:
    assert metric([], []) is None
    assert metric([1.0], [2.0]) is None
    assert metric([0.1, 0.1, 0.1], [1, 2, 3]) is None  # their mean is not 0.1 in floating point
    assert metric([1, 2, 3], [4, 4, 4]) is None
    assert metric([1, np.nan, 3], [1, 2, 3]) is None
    assert metric([1, np.inf, 3], [1, 2, 3]) is None


def test_mse() -> None:
    assert mse([1, 2], [1, 5]) == 4.5
    assert mse([1, np.inf], [1, 5]) is None


def test_columns_of_another_shape_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"predictions \(3, 1\), truth \(3,\)"):
        accuracy(np.zeros((3, 1)), np.zeros(3))
    with pytest.raises(AssertionError, match=r"predictions \(0,\), truth \(0,\)"):
        accuracy([], [])
    with pytest.raises(AssertionError, match=r"not in 0\.\.4"):
        macro_f1([0, 5], [0, 1], 5)
    with pytest.raises(AssertionError, match=r"not in 0\.\.1"):
        confusion_matrix([0, -1], [0, 1], 2)


def test_evaluate_gives_the_metrics_of_each_kind() -> None:
    assert evaluate("classification", [0, 2], [0, 1], num_classes=3) == {
        "accuracy": 0.5,
        "macro_f1": pytest.approx(1 / 3),
    }
    assert evaluate("binary", [1, 1], [1, 1]) == {"accuracy": 1.0, "macro_f1": 1.0}
    assert evaluate("regression", [2.0, 2.0], [1.0, 3.0]) == {"pearson": None, "spearman": None, "mse": 1.0}


def test_overall_scores_reproduce_the_published_rows() -> None:
    mean_pooling = {"sst": ("accuracy", 0.511), "para": ("accuracy", 0.882), "sts": ("pearson", 0.846)}
    assert overall(mean_pooling)["overall_a"] == pytest.approx(0.772, abs=5e-4)
    cosine_heads = {"sst": ("accuracy", 0.505), "para": ("accuracy", 0.719), "sts": ("pearson", 0.786)}
    assert overall(cosine_heads)["overall_b"] == pytest.approx(0.670, abs=5e-4)


def test_an_undefined_score_counts_as_zero() -> None:
    scores = overall({"sst": ("macro_f1", 0.5), "sts": ("spearman", None)})
    assert scores == {"overall_a": 0.5, "overall_b": 0.25}  # r = 0 is 0.5 on the scale of A


@pytest.mark.parametrize(("right", "rows"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 7), (500, 2000)])
def test_the_interval_of_an_accuracy_is_wilsons(right: int, rows: int) -> None:
    expected = stats.binomtest(right, rows).proportion_ci(method="wilson")
    assert accuracy_interval(right, rows) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_intervals_of_means_and_correlations() -> None:
    rng = np.random.default_rng(0)
    values, others = rng.normal(size=(2, 30))
    expected = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected)
    assert mean_interval(values[:1]) is None
    found = stats.pearsonr(values, values + others)
    interval = found.confidence_interval()
    assert pearson_interval(found.statistic, 30) == pytest.approx((interval.low, interval.high))
    assert pearson_interval(0.5, 3) is None
    assert pearson_interval(-1.0, 4) == (-1, -1)


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.2, 0.18, 0.5, 0.52, 0.9, 0.9, 0.9, 1.0])
    right = np.array([True, False, True, True, True, False, False, True])
    bins = reliability(confidence, right)
    # A fifteenth is 0.0667: 0.2 ends a bin, 14/15 = 0.933 ends the last but one.
    assert [(b.rows, round(b.above * 15), round(b.up_to * 15)) for b in bins] == [(2, 2, 3), (2, 7, 8), (3, 13, 14),
                                                                              (1, 14, 15)]  # fmt: skip
    assert [b.confidence for b in bins] == pytest.approx([0.19, 0.51, 0.9, 1])
    assert [b.accuracy for b in bins] == pytest.approx([0.5, 1, 1 / 3, 1])
    assert ece(bins) == pytest.approx((2 * 0.31 + 2 * 0.49 + 3 * (0.9 - 1 / 3) + 0) / 8)


def test_the_best_threshold_by_hand() -> None:
    # Above 0.45 three of four are right; above 0.25 all are.
    assert best_threshold(np.array([0.1, 0.2, 0.3, 0.9]), np.array([0.0, 0, 1, 1])) == (pytest.approx(0.25), 4)
    assert best_threshold(np.array([0.1, 0.8]), np.array([0.0, 1])) == (0.5, 2)  # no other is better
    assert best_threshold(np.array([0.1, 0.8]), np.array([1.0, 1])) == (pytest.approx(0.05), 2)
    assert best_threshold(np.array([0.1, 0.8]), np.array([0.0, 0])) == (pytest.approx(0.9), 2)
    assert best_threshold(np.array([0.7, 0.7, 0.7]), np.array([0.0, 0, 1])) == (pytest.approx(0.85), 2)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 1)), min_size=1, max_size=20))
def test_no_threshold_is_better(rows: list[tuple[int, int]]) -> None:
    p_yes, gold = np.array(rows, dtype=float).T / [[20], [1]]
    threshold, right = best_threshold(p_yes, gold)
    assert right == ((p_yes > threshold) == gold).sum()
    assert right == max(((p_yes > each) == gold).sum() for each in [-1, *p_yes] if each >= 0 or p_yes.min() > 0)


def test_metrics_import_nothing_heavy() -> None:
    code = "import sys, mtl_dist.metrics; print(sorted({'torch', 'scipy', 'sklearn', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
