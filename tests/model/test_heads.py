"""Every head has the outputs worked by hand, trains both sides, and saves each weight once.

python -m pytest tests/model/test_heads.py
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from mtl_dist.data.packed import pack
from mtl_dist.model.encoder import Encoder, Shape
from mtl_dist.model.heads import Head, pool

WIDTH = 6

# What the experiments need: fields, outputs, and how many weights (biases included) they have.
HEADS: list[tuple[dict[str, Any], int, int]] = [
    ({"kind": "linear"}, 5, 6 * 5 + 5),
    ({"kind": "mlp"}, 5, (6 * 6 + 6) + (6 * 5 + 5)),  # by default as wide as the encoder
    ({"kind": "mlp", "hidden": (4, 3)}, 5, (6 * 4 + 4) + (4 * 3 + 3) + (3 * 5 + 5)),
    ({"kind": "cross_encoder"}, 25, 6 * 25 + 25),
    ({"kind": "cross_encoder", "hidden": (4,)}, 1, (6 * 4 + 4) + (4 + 1)),
    ({"kind": "concat"}, 1, 12 + 1),
    ({"kind": "concat", "hidden": (4,)}, 2, (12 * 4 + 4) + (4 * 2 + 2)),
    ({"kind": "sbert"}, 1, 18 + 1),
    ({"kind": "sbert", "hidden": (4,)}, 2, (18 * 4 + 4) + (4 * 2 + 2)),
    ({"kind": "cosine"}, 1, 0),
    ({"kind": "projected_cosine", "widths": (6,)}, 1, 6 * 6 + 6),
    ({"kind": "projected_cosine", "widths": (2, 6)}, 1, (6 * 2 + 2) + (2 * 6 + 6)),
    ({"kind": "projected_cosine", "widths": (2, 6), "shared": False}, 1, 2 * ((6 * 2 + 2) + (2 * 6 + 6))),
    ({"kind": "projected_cosine", "widths": (6, 6), "activation": "gelu"}, 1, 2 * (6 * 6 + 6)),
]
every_head = pytest.mark.parametrize(("fields", "outputs", "weights"), HEADS)


def build(fields: dict[str, Any], outputs: int = 1, width: int = WIDTH, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    head = TypeAdapter(Head).validate_python(fields).build(width, outputs, dropout, scale=5.0)
    for parameter in head.parameters():  # away from zero biases, so that none can hide
        nn.init.normal_(parameter)
    return head


def filled(fields: dict[str, Any], *weights: list[list[float]], outputs: int = 1) -> nn.Module:
    """A head for vectors of width 2 with these weight matrices, and zero biases."""
    head = build(fields, outputs, width=2)
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = torch.tensor(weight)
        layer.bias.data.zero_()
    return head


def reads(fields: dict[str, Any]) -> int:
    return 1 if fields["kind"] in ("linear", "mlp", "cross_encoder") else 2


@every_head
def test_shapes(fields: dict[str, Any], outputs: int, weights: int) -> None:
    head = build(fields, outputs)
    assert head(torch.randn(3 * reads(fields), WIDTH)).shape == (3, outputs)
    assert sum(parameter.numel() for parameter in head.parameters()) == weights
    assert sum(tensor.numel() for tensor in head.state_dict().values()) == weights  # each under one name only


@every_head
def test_dropout_acts_in_training_only(fields: dict[str, Any], outputs: int, weights: int) -> None:
    head, pooled = build(fields, outputs, dropout=0.5), torch.randn(8, WIDTH)
    assert not torch.equal(head(pooled), head(pooled))
    head.eval()
    assert torch.equal(head(pooled), head(pooled))
    assert torch.equal(head(pooled), build(fields, outputs).train()(pooled))


@every_head
def test_every_input_and_weight_has_a_gradient(fields: dict[str, Any], outputs: int, weights: int) -> None:
    head, pooled = build(fields, outputs), torch.randn(8, WIDTH, requires_grad=True)
    head(pooled).square().sum().backward()
    for tensor in (pooled, *head.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
        assert (tensor.grad != 0).any(dim=-1).all()


def test_hidden_layers_end_in_a_gelu() -> None:
    head = filled({"kind": "mlp", "hidden": (1,)}, [[1.0, 2.0]], [[10.0]])
    gelu_of_3 = 3 * 0.5 * (1 + math.erf(3 / math.sqrt(2)))
    assert head(torch.tensor([[1.0, 1.0]])).item() == pytest.approx(10 * gelu_of_3)


# Two pairs: u = (1, 2) with v = (4, 3), and u = (0, 1) with v = (0, -1).
PAIRS = torch.tensor([[1.0, 2.0], [0.0, 1.0], [4.0, 3.0], [0.0, -1.0]])


@pytest.mark.parametrize(
    ("head", "expected_NO"),
    [
        (filled({"kind": "concat"}, torch.eye(4).tolist(), outputs=4), [[1, 2, 4, 3], [0, 1, 0, -1]]),
        (filled({"kind": "sbert"}, torch.eye(6).tolist(), outputs=6), [[1, 2, 4, 3, 3, 1], [0, 1, 0, -1, 0, 2]]),
        (filled({"kind": "cosine"}), [[5 * 10 / (math.sqrt(5) * 5)], [-5]]),
        (filled({"kind": "cosine", "scale": 0.5}), [[0.5 * 10 / (math.sqrt(5) * 5)], [-0.5]]),
        # Both sides swapped and the second number doubled: (4, 1) with (6, 4), (2, 0) with (-2, 0).
        (
            filled({"kind": "projected_cosine", "widths": (2, 2)}, [[0.0, 1], [1, 0]], [[2.0, 0], [0, 1]]),
            [[5 * 28 / math.sqrt(17 * 52)], [-5]],
        ),
        # The second side alone is swapped: (1, 2) with (3, 4), (0, 1) with (-1, 0).
        (
            filled(
                {"kind": "projected_cosine", "widths": (2,), "shared": False}, [[1.0, 0], [0, 1]], [[0.0, 1], [1, 0]]
            ),
            [[5 * 11 / (math.sqrt(5) * 5)], [0]],
        ),
    ],
)
def test_pairs(head: nn.Module, expected_NO: list[list[float]]) -> None:
    torch.testing.assert_close(head(PAIRS), torch.tensor(expected_NO, dtype=torch.float32))


@pytest.mark.parametrize(("activation", "expected"), [("none", -1), ("gelu", 1)])
def test_a_projection_bends_only_if_told(activation: str, expected: float) -> None:
    head = filled(
        {"kind": "projected_cosine", "widths": (1, 1), "activation": activation, "scale": 1.0}, [[1.0, 0]], [[1.0]]
    )
    u_v = torch.tensor([[3.0, 0], [-0.5, 0]])
    head.sides[0][-1].bias.data.fill_(0.2)  # lifts gelu(-0.5) = -0.15 above zero, but not -0.5
    assert head(u_v).item() == pytest.approx(expected)


def test_768_100_768() -> None:
    widths = {"kind": "projected_cosine", "widths": (100, 768)}
    names = {
        "sides.0.0.weight": (100, 768),
        "sides.0.0.bias": (100,),
        "sides.0.1.weight": (768, 100),
        "sides.0.1.bias": (768,),
    }
    assert {name: tuple(t.shape) for name, t in build(widths, width=768).state_dict().items()} == names


def test_a_cosine_keeps_its_digits_in_bf16() -> None:
    u = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    close = torch.cat([u, u + 0.02 * u.roll(1)])
    exact: Tensor = build({"kind": "cosine"})(close)
    with torch.autocast("cpu", torch.bfloat16):
        assert build({"kind": "cosine"})(close.bfloat16()).item() == pytest.approx(exact.item(), abs=1e-4)


def test_the_mean_of_a_long_sentence_keeps_its_digits_in_bf16() -> None:
    x_TD = torch.rand(512, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = pack([np.arange(512)])
    assert torch.equal(pool(x_TD, packed, "mean", None), x_TD.double().mean(0, keepdim=True).bfloat16())


def test_tokens_with_the_same_maximum_share_its_gradient() -> None:
    packed = pack([np.array([1, 2, 3]), np.array([4])])
    x_TD = torch.tensor([[2.0, 1.0], [2.0, 0.0], [0.0, 1.0], [5.0, 5.0]], requires_grad=True)
    pooled_SD = pool(x_TD, packed, "max", Encoder(Shape(hidden_size=12, num_hidden_layers=1), 9))
    assert pooled_SD.tolist() == [[2, 1], [5, 5]]
    (pooled_SD * torch.tensor([[-4.0, 6.0], [1.0, -1.0]])).sum().backward()
    assert x_TD.grad is not None
    assert x_TD.grad.tolist() == [[-2, 3], [-2, 0], [0, 3], [1, -1]]
