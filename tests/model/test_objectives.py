"""Labels as users write them become numbers or a reason; every loss has the value worked by hand.

python -m pytest tests/model/test_objectives.py
"""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mtl_dist.model.heads import Cosine
from mtl_dist.model.objectives import Label, Loss

CLASSES = {"kind": "classification", "num_classes": 5}
NAMES = {"kind": "classification", "names": ["bad", "so so", "good"]}
BINARY = {"kind": "binary"}
WORDS = {"kind": "binary", "names": ["no", "yes"]}
SCORE = {"kind": "regression"}  # from 0 to 5
RATIO = {"kind": "regression", "min": -1, "max": 0.5}


def label(fields: dict[str, Any]) -> Label:
    return TypeAdapter(Label).validate_python(fields)


def loss(kind: str, **fields: Any) -> Loss:
    return TypeAdapter(Loss).validate_python({"kind": kind, **fields})


# ---------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("fields", "value", "number"),
    [
        (CLASSES, "0", 0),
        (CLASSES, " 4\n", 4),
        (CLASSES, "3.0", 3),  # as pandas writes a whole number
        (CLASSES, 2, 2),
        (CLASSES, 2.0, 2),
        (NAMES, "bad", 0),
        (NAMES, " so so ", 1),
        (NAMES, 2, 2),  # as a hub's class labels come
        (BINARY, "1", 1),
        (BINARY, "0.0", 0),
        (BINARY, True, 1),
        (BINARY, False, 0),
        (WORDS, "no", 0),
        (WORDS, " yes ", 1),
        (WORDS, True, 1),
        (WORDS, 0, 0),
        (SCORE, "0", 0),
        (SCORE, "5", 5),
        (SCORE, " 3.80", 3.8),
        (SCORE, "1e-1", 0.1),
        (SCORE, 2, 2),
        (RATIO, "-1", -1),
    ],
)
def test_a_label_is_a_number(fields: dict[str, Any], value: object, number: float) -> None:
    parsed = label(fields).parse(value)
    assert isinstance(parsed, float) and parsed == number


@pytest.mark.parametrize(
    ("fields", "value", "reason"),
    [
        (CLASSES, "5", "is 5, none of the classes 0 to 4"),
        (CLASSES, "-1", "is -1, none of the classes 0 to 4"),
        (CLASSES, "1.5", "is 1.5, none of the classes 0 to 4"),
        (CLASSES, "nan", "is nan, none of the classes 0 to 4"),
        (CLASSES, "inf", "is inf, none of the classes 0 to 4"),
        (CLASSES, "good", "is 'good', not a number; for words say label: {kind: classification, names: [...]}"),
        (CLASSES, True, "is True, not a number"),
        (CLASSES, "0_1", "is '0_1', not a number"),
        (NAMES, "0", "is '0', none of bad, so so, good"),
        (NAMES, "Good", "is 'Good', none of bad, so so, good"),
        (NAMES, 3, "is 3, none of the classes 0 to 2"),
        (NAMES, -1, "is -1, none of the classes 0 to 2"),
        (BINARY, "2", "is 2, none of the classes 0 to 1"),
        (BINARY, "yes", "is 'yes', not a number; for words say label: {kind: binary, names: [no, yes]}"),
        (WORDS, "1", "is '1', none of no, yes"),
        (WORDS, "Yes", "is 'Yes', none of no, yes"),
        (WORDS, 2, "is 2, none of the classes 0 to 1"),
        (SCORE, " 5.01\n", "is 5.01, outside the range [0, 5]"),
        (SCORE, "-0.1", "is -0.1, outside the range [0, 5]"),
        (SCORE, "nan", "is nan, outside the range [0, 5]"),
        (SCORE, math.inf, "is inf, outside the range [0, 5]"),
        (SCORE, "4,5", "is '4,5', not a number"),
        (SCORE, True, "is True, not a number"),
        (SCORE, [1], "is [1], not a number"),
        (SCORE, 10**400, f"is 1{17 * '0'}...{19 * '0'}, not a number"),  # too large for a float
        (SCORE, 40 * "word ", "is 'word word wo...rd word word ', not a number"),  # a shifted column
        (NAMES, 40 * "word ", "is 'word word wo...ord word word', none of bad, so so, good"),
        (RATIO, "0.6", "is 0.6, outside the range [-1, 0.5]"),
        *(
            (fields, blank, "is blank")
            for fields in (CLASSES, NAMES, BINARY, WORDS, SCORE)
            for blank in ("", " \t", None)
        ),
    ],
)
def test_no_other_value_is_a_label(fields: dict[str, Any], value: object, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        label(fields).parse(value)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kind": "classification"}, "needs either num_classes or names"),
        (CLASSES | NAMES, "needs either num_classes or names"),
        ({"kind": "classification", "num_classes": 1}, "needs at least 2 classes, not 1"),
        ({"kind": "classification", "names": []}, "needs at least 2 classes, not 0"),
        ({"kind": "classification", "names": ["a", "b", "a"]}, "names a class twice: a, b, a"),
        ({"kind": "binary", "names": ["a", "a"]}, "names a class twice: a, a"),
        ({"kind": "binary", "names": ["a", "b", "c"]}, "needs two names, first that of no, not 3"),
        (SCORE | {"min": 5}, "is an empty range: min 5, max 5"),
    ],
)
def test_labels_that_cannot_be_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        label(fields)
    assert [str(mistake["ctx"]["error"]) for mistake in caught.value.errors()] == [reason]


# ---------------------------------------------------------------------------------------------------------- losses

LOG2, LOG3 = math.log(2), math.log(3)
BINS = {"bins": 2}


@pytest.mark.parametrize(
    ("kind", "fields", "of", "raw_NO", "gold_N", "expected_N"),
    [
        ("cross_entropy", {}, BINARY, [[LOG3, 0], [LOG3, 0]], [0, 1], [math.log(4 / 3), math.log(4)]),
        ("cross_entropy", {}, NAMES, [[0, 0, LOG2]], [2], [LOG2]),
        ("bce", {}, BINARY, [[LOG3], [LOG3], [0]], [0, 1, 1], [math.log(4), math.log(4 / 3), LOG2]),
        # A fifth of each label is spread over both classes: 0.9 of it stays.
        ("cross_entropy", {"label_smoothing": 0.2}, BINARY, [[LOG3, 0]], [0], [math.log(4 / 3) + 0.1 * LOG3]),
        (
            "bce",
            {"label_smoothing": 0.2},
            BINARY,
            [[LOG3], [LOG3]],
            [1, 0],
            [math.log(4 / 3) + 0.1 * LOG3, math.log(4) - 0.1 * LOG3],
        ),
        ("mse", {}, SCORE, [[3], [3]], [5, 2.5], [4, 0.25]),
        ("mse", {}, BINARY, [[0.5], [-1]], [1, 0], [0.25, 1]),
        ("l1", {}, SCORE, [[3], [3]], [5, 2.5], [2, 0.5]),
        ("l1", {}, BINARY, [[0.5], [-1]], [1, 0], [0.5, 1]),
        # Outputs of a cosine head are up to 5 here; from 2.5 on, a pair counts as alike.
        ("cosine_embedding", {}, SCORE, [[4], [4], [-4]], [2.5, 2.4, 0], [0.2, 0.8, 0]),
        ("cosine_embedding", {"alike_from": 3.8, "margin": 0.5}, SCORE, [[4], [2], [-5]], [3.7, 0, 3.8], [0.3, 0, 2]),
        ("cosine_embedding", {}, BINARY, [[0.8], [0.8]], [1, 0], [0.2, 0.8]),
        # Report 001 says -1 for 0 to 2 and +1 for 3 to 5.
        ("cosine_embedding", {}, SCORE, [[5]] * 6, range(6), [1, 1, 1, 0, 0, 0]),
        # The label furthest from zero is as far as a cosine head goes.
        ("cosine_embedding", {}, SCORE | {"min": -4, "max": 1}, [[-4], [4]], [0, -4], [2, 1]),
        ("bins", BINS, SCORE, [[LOG3, 0]] * 4, [0, 2.4, 2.5, 5], [*[math.log(4 / 3)] * 2, *[math.log(4)] * 2]),
        ("bins", BINS, RATIO, [[LOG3, 0]] * 2, [-0.3, -0.25], [math.log(4 / 3), math.log(4)]),
    ],
)
def test_each_example_costs(
    kind: str, fields: dict[str, Any], of: dict[str, Any], raw_NO: list[Any], gold_N: list[float], expected_N: list[Any]
) -> None:
    rule = loss(kind, **fields)
    raw, gold = torch.tensor(raw_NO, dtype=torch.float32), torch.tensor(list(gold_N), dtype=torch.float32)
    assert raw.shape[1] == rule.outputs(label(of))
    torch.testing.assert_close(rule.per_example(raw, gold, label(of)), torch.tensor(expected_N, dtype=torch.float32))


@pytest.mark.parametrize(
    ("kind", "fields", "raw_NO", "other_NO", "expected_N"),
    [
        # From 3/4, 1/4 to 1/2, 1/2, there and back: 1/4 of log 3/2 - log 1/2.
        ("cross_entropy", {}, [[LOG3, 0]], [[0, 0]], [LOG3 / 4]),
        ("bce", {}, [[LOG3], [0]], [[0], [0]], [LOG3 / 4, 0]),
        ("bins", BINS, [[0, 0]], [[5, 5 + LOG3]], [LOG3 / 4]),
        ("mse", {}, [[3], [1]], [[1], [1]], [4, 0]),
        ("cosine_embedding", {}, [[3]], [[2]], [1]),
    ],
)
def test_two_outputs_are_so_far_apart(
    kind: str, fields: dict[str, Any], raw_NO: list[Any], other_NO: list[Any], expected_N: list[float]
) -> None:
    raw, other = torch.tensor(raw_NO, dtype=torch.float32), torch.tensor(other_NO, dtype=torch.float32)
    rule = loss(kind, **fields)
    for one, two in ((raw, other), (other, raw)):
        torch.testing.assert_close(rule.divergence(one, two), torch.tensor(expected_N, dtype=torch.float32))


@pytest.mark.parametrize(
    ("kind", "fields", "of", "raw_NO", "expected_N"),
    [
        ("cross_entropy", {}, NAMES, [[0, 2, 1], [3, 2, 1]], [1, 0]),
        ("cross_entropy", {}, BINARY, [[0, 1], [-2, -3]], [1, 0]),
        ("bce", {}, BINARY, [[0.1], [-0.1]], [1, 0]),  # a logit
        ("mse", {}, BINARY, [[0.6], [0.4]], [1, 0]),  # a guess at 0 or 1
        ("l1", {}, BINARY, [[0.6], [0.4]], [1, 0]),
        ("cosine_embedding", {}, BINARY, [[0.6], [-0.9]], [1, 0]),
        ("mse", {}, SCORE, [[3.25], [-1]], [3.25, -1]),
        ("l1", {}, SCORE, [[3.25]], [3.25]),
        ("cosine_embedding", {}, SCORE, [[4]], [4]),
        ("bins", BINS, SCORE, [[0, 0], [LOG3, 0], [-99, 99]], [2.5, 0.75 * 1.25 + 0.25 * 3.75, 3.75]),
        ("bins", BINS, RATIO, [[0, 0], [99, -99]], [-0.25, -0.625]),
    ],
)
def test_each_output_predicts(
    kind: str, fields: dict[str, Any], of: dict[str, Any], raw_NO: list[Any], expected_N: list[float]
) -> None:
    predicted: Tensor = loss(kind, **fields).predict(torch.tensor(raw_NO, dtype=torch.float32), label(of))
    assert predicted.tolist() == pytest.approx(expected_N)
    assert predicted.is_floating_point() == (of["kind"] == "regression")


def test_outputs_that_stand_for_probabilities() -> None:
    raw_NO = torch.tensor([[0.0, LOG3], [1000.0, 0.0]])
    of_classes = loss("cross_entropy").probabilities(raw_NO)
    torch.testing.assert_close(of_classes, torch.tensor([[0.25, 0.75], [1, 0]], dtype=torch.float64))
    of_yes = loss("bce").probabilities(torch.tensor([[LOG3], [-LOG3], [-40.0]]))
    torch.testing.assert_close(of_yes[:2], torch.tensor([[0.25, 0.75], [0.75, 0.25]], dtype=torch.float64))
    assert of_yes[2, 1].item() == pytest.approx(math.exp(-40))  # no less, though fp32 has no 1 - p as close to 1
    giving = [kind for kind in ("cross_entropy", "bce", "mse", "l1", "cosine_embedding", "bins")
              if loss(kind).gives_probabilities]  # fmt: skip
    assert giving == ["cross_entropy", "bce"]


@pytest.mark.parametrize("bins", [25, 5, 100])
@pytest.mark.parametrize("bounds", [(0, 5), (-5, 5), (1, 6)])
def test_scores_on_an_edge_belong_to_the_bin_above(bounds: tuple[float, float], bins: int) -> None:
    low, high = bounds
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    expected = [*range(bins), bins - 1]  # only the largest score has no bin above it
    rule, of = loss("bins", bins=bins), label(SCORE | {"min": low, "max": high})
    certain = 100 * torch.eye(bins)[expected]
    for step in (0.0, 0.2 * (high - low) / bins):
        gold = torch.tensor([min(edge + step, high) for edge in edges], dtype=torch.float32)
        assert (rule.per_example(certain, gold, of) < 1e-3).all()
    # The middle of each bin is what it stands for.
    assert rule.predict(certain[:-1], of).tolist() == pytest.approx(
        [edge + (high - low) / (2 * bins) for edge in edges[:-1]], abs=1e-5
    )


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_cosine_embedding_is_pytorchs(margin: float) -> None:
    u, v = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gold = torch.arange(64) % 6.0
    of = label(SCORE)
    raw_NO = Cosine(kind="cosine").build(8, 1, 0.0, of.scale)(torch.cat([u, v]))
    ours = loss("cosine_embedding", alike_from=3, margin=margin).per_example(raw_NO, gold, of)
    target = torch.where(gold >= 3, 1.0, -1.0)
    theirs = torch.nn.CosineEmbeddingLoss(margin, reduction="none")(u, v, target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), (u, v), retain_graph=True) for each in (ours, theirs)))
