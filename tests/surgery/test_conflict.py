"""What a Gram matrix says of its gradients, worked by hand.

python -m pytest tests/surgery/test_conflict.py
"""

import math

import pytest
import torch

from mtl_dist.surgery.conflict import conflict, mean_of

# Two parameters of two elements. a = (3, 4 | 0, 0), b = (-3, 0 | 1, 0).
GRAMS_SKK = torch.tensor([[[25.0, -9.0], [-9.0, 9.0]], [[0.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)


def test_two_gradients_that_conflict_in_one_parameter() -> None:
    found = conflict(["a", "b"], GRAMS_SKK, torch.ones(2, 2, dtype=torch.float64))
    assert found.norm == pytest.approx({"a": 5, "b": math.sqrt(10)})
    assert found.cosine == pytest.approx({"a.b": -9 / (5 * math.sqrt(10))})
    assert found.conflicting_pairs == 1
    assert found.conflicting_parameters == 0.5
    assert found.weight == {"a": 1, "b": 1}
    assert (found.norm_ratio, found.similarity_to_sum) == pytest.approx((1, 1))


def test_weights_of_each_parameter() -> None:
    # a alone in the first parameter, twice b in the second: (3, 4 | 2, 0) against the sum (0, 4 | 1, 0).
    found = conflict(["a", "b"], GRAMS_SKK, torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
    assert found.norm_ratio == pytest.approx((5 / 4 + 2 / 1) / 2)
    assert found.similarity_to_sum == pytest.approx(18 / math.sqrt(29 * 17))
    assert found.weight == {"a": 0.5, "b": 1}


def test_a_gradient_of_zero_conflicts_with_nothing() -> None:
    found = conflict(["a", "b"], torch.zeros(1, 2, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    assert (found.cosine, found.conflicting_pairs, found.norm_ratio) == ({"a.b": 0}, 0, 1)


def test_means_are_over_the_steps_that_had_a_task() -> None:
    ones = torch.ones(2, 2, dtype=torch.float64)
    both, alone = conflict(["a", "b"], GRAMS_SKK, ones), conflict(["a"], 4 * GRAMS_SKK[:, :1, :1], ones[:, :1])
    overflowed = conflict(["a", "b"], GRAMS_SKK * math.inf, ones)
    means = mean_of([both, alone, overflowed])
    assert means is not None
    assert means["norm"] == pytest.approx({"a": 7.5, "b": math.sqrt(10)})
    assert means["conflicting_pairs"] == 0.5
    assert mean_of([]) is mean_of([overflowed]) is None
