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


def test_each_layer_by_itself() -> None:
    # a alone in the first parameter, twice b in the second: (3, 4) against the sum (0, 4), and (2, 0) against (1, 0).
    weights = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    layers = conflict(["a", "b"], GRAMS_SKK, weights, {"first": [0], "second": [1], "both": [0, 1]}).layers
    assert layers is not None and list(layers) == ["first", "second", "both"]
    first, second = layers["first"], layers["second"]
    assert (first.norm, first.weight) == ({"a": 5, "b": 3}, {"a": 1, "b": 0})
    assert first.cosine == pytest.approx({"a.b": -9 / 15})
    assert (first.conflicting_pairs, first.conflicting_parameters) == (1, 1)
    assert (first.norm_ratio, first.similarity_to_sum) == pytest.approx((5 / 4, 16 / (5 * 4)))
    assert (second.norm, second.weight) == ({"a": 0, "b": 1}, {"a": 0, "b": 2})
    assert (second.cosine, second.conflicting_pairs, second.conflicting_parameters) == ({"a.b": 0}, 0, 0)
    assert (second.norm_ratio, second.similarity_to_sum) == pytest.approx((2, 1))
    assert layers["both"] == conflict(["a", "b"], GRAMS_SKK, weights)


def test_means_of_layers() -> None:
    ones, layers = torch.ones(2, 2, dtype=torch.float64), {"first": [0], "second": [1]}
    both = conflict(["a", "b"], GRAMS_SKK, ones, layers)
    alone = conflict(["a"], 4 * GRAMS_SKK[:, :1, :1], ones[:, :1], layers)
    means = mean_of([both, alone])
    assert means is not None and list(means["layers"]) == ["first", "second"]
    assert means["layers"]["first"]["norm"] == {"a": 7.5, "b": 3}
    assert means["layers"]["first"]["cosine"] == pytest.approx({"a.b": -0.6})
    assert means["layers"]["first"]["conflicting_parameters"] == 0.5
    assert "layers" not in means["layers"]["first"]


def test_without_layers_a_record_has_none() -> None:
    means = mean_of([conflict(["a", "b"], GRAMS_SKK, torch.ones(2, 2, dtype=torch.float64))])
    assert means is not None and "layers" not in means


def test_a_pair_has_one_name_in_whatever_order_a_step_draws_it() -> None:
    ones = torch.ones(2, 2, dtype=torch.float64)
    turned = conflict(["b", "a"], GRAMS_SKK.flip(-1, -2), ones)
    assert turned.norm == pytest.approx({"a": 5, "b": math.sqrt(10)})
    means = mean_of([turned, conflict(["a", "b"], GRAMS_SKK, ones)])
    assert means is not None and means["cosine"] == pytest.approx({"a.b": -9 / (5 * math.sqrt(10))})
