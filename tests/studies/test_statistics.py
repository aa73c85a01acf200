"""Statistics of a few seeds, against scipy and numbers worked by hand.

python -m pytest tests/studies/test_statistics.py
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mtl_dist.studies.statistics import Difference, Spread, paired, spread, standard_error, t_quantile, t_tails


def test_the_spread_is_that_of_a_sample() -> None:
    assert spread([1.0, 2.0, 4.5]) == Spread(3, 2.5, pytest.approx(math.sqrt((2.25 + 0.25 + 4) / 2)))
    assert spread([0.5]) == Spread(1, 0.5, None)
    assert spread([]) is None


@given(st.floats(-50, 50), st.integers(1, 200))
def test_the_tails_of_t_are_scipys(t: float, df: int) -> None:
    assert t_tails(t, df) == pytest.approx(2 * stats.t.sf(abs(t), df), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("df", [1, 2, 4, 9, 60])
def test_the_quantiles_of_t_are_scipys(df: int) -> None:
    assert t_quantile(0.95, df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)
    assert t_quantile(0.5, df) == pytest.approx(stats.t.ppf(0.75, df), rel=1e-9)


scores = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=2, max_size=12)


@given(scores)
def test_the_paired_test_is_scipys(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    found = paired(ours, theirs)
    assert found is not None
    if found.p is None:  # the differences are all the same
        differences = [a - b for a, b in pairs]
        assert max(differences) - min(differences) < 1e-10
        return
    reference = stats.ttest_rel(ours, theirs)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-5, abs=1e-12)
    low, high = reference.confidence_interval(0.95)
    assert found.interval == pytest.approx((low, high), rel=1e-5, abs=1e-9)


def test_what_cannot_be_tested_is_not() -> None:
    assert paired([0.5], [0.4]) == Difference(1, pytest.approx(0.1))
    assert paired([0.5, 0.7], [0.4, 0.6]) == Difference(2, pytest.approx(0.1))  # by rounding not quite the same
    assert paired([], []) is None


def test_a_dev_set_measures_so_finely() -> None:
    assert standard_error("accuracy", 0.5, 1101) == pytest.approx(0.01507, abs=5e-6)  # sqrt(0.25 / 1101)
    assert standard_error("pearson", 0.8, 865) == pytest.approx(0.36 / math.sqrt(864))
    assert standard_error("pearson", 1.0, 865) == 0
    assert standard_error("accuracy", 0.5, 1) is None
    assert standard_error("macro_f1", 0.5, 1101) is None
