"""From token vectors to a task's raw outputs: pooling, and the heads, each configured beside its code."""

# Shape suffixes: T = tokens, S = sentences, N = examples (S, or S / 2 for pairs), D = hidden size, M = hidden words,
# V = the vocabulary.

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from mtl_dist.config import Config
from mtl_dist.data.packed import Packed
from mtl_dist.model.encoder import ACTIVATIONS, Encoder, Shape, init_weights

Pooling = Literal["cls", "pooler", "mean", "max"]


def pool(x_TD: Tensor, packed: Packed, pooling: Pooling, encoder: Encoder) -> Tensor:
    """One vector per sentence: its first token's (`pooler`: through BERT's dense-tanh), or all tokens' mean or max."""
    lengths_S = packed.offsets.diff().long()
    if pooling == "mean":
        # In fp32: a sum of hundreds of bf16 terms would lose its last digits. Checked, the lengths would be waited for.
        return torch.segment_reduce(x_TD.float(), "mean", lengths=lengths_S, unsafe=True).to(x_TD.dtype)
    if pooling == "max":
        numbers_S = torch.arange(len(lengths_S), device=x_TD.device)
        sentence_TD = numbers_S.repeat_interleave(lengths_S, output_size=len(x_TD))[:, None].expand_as(x_TD)
        # Tokens with the same maximum share its gradient; segment_reduce would give each of them all of it, negated.
        return x_TD.new_empty(len(lengths_S), x_TD.shape[1]).scatter_reduce(
            0, sentence_TD, x_TD, "amax", include_self=False
        )
    first_SD = x_TD.index_select(0, packed.offsets[:-1].long())
    return first_SD if pooling == "cls" else torch.tanh(encoder.pooler(first_SD))


class HeadConfig(Config):
    """What the head reads and how it is built."""

    sentences: ClassVar[int] = 2  # what it reads: one text, or a pair
    joint: ClassVar[bool] = False  # the pair is one input: [CLS] a [SEP] b [SEP]

    @abstractmethod
    def build(self, width: int, outputs: int, dropout: float, scale: float) -> nn.Module:
        """The module: pooled vectors (S, width) -> raw outputs (N, outputs)."""


class Linear(HeadConfig):
    """A linear layer on the vector of a single sentence."""

    kind: Literal["linear"]
    sentences: ClassVar = 1

    def build(self, width: int, outputs: int, dropout: float, scale: float) -> nn.Module:
        return Layers(1, [width, outputs], dropout)


class Mlp(HeadConfig):
    """Hidden layers, a GELU after each, on the vector of a single sentence."""

    kind: Literal["mlp"]
    hidden: tuple[PositiveInt, ...] = ()  # widths; by default one layer as wide as the encoder
    sentences: ClassVar = 1

    def build(self, width: int, outputs: int, dropout: float, scale: float) -> nn.Module:
        return Layers(1, [width, *(self.hidden or [width]), outputs], dropout)


class CrossEncoder(HeadConfig):
    """Layers on the vector of a pair that the encoder reads as one input."""

    kind: Literal["cross_encoder"]
    hidden: tuple[PositiveInt, ...] = ()
    joint: ClassVar = True

    def build(self, width: int, outputs: int, dropout: float, scale: float) -> nn.Module:
        return Layers(1, [width, *self.hidden, outputs], dropout)


class Concat(HeadConfig):
    """Layers on (u, v), the two sentences' vectors."""

    kind: Literal["concat"]
    hidden: tuple[PositiveInt, ...] = ()

    def build(self, width: int, outputs: int, dropout: float, scale: float) -> nn.Module:
        return Layers(2, [2 * width, *self.hidden, outputs], dropout)


class Sbert(HeadConfig):
    """Layers on (u, v, |u - v|), as in Sentence-BERT."""

    kind: Literal["sbert"]
    hidden: tuple[PositiveInt, ...] = ()

    def build(self, width: int, outputs: int, dropout: float, scale: float) -> nn.Module:
        return Layers(3, [3 * width, *self.hidden, outputs], dropout)


class Cosine(HeadConfig):
    """The cosine of the two vectors, times `scale`."""

    kind: Literal["cosine"]
    scale: PositiveFloat | None = None  # by default the largest label: 5 for similarities from 0 to 5, 1 for yes or no

    def build(self, width: int, outputs: int, dropout: float, scale: float) -> nn.Module:
        return CosineHead([nn.Identity()], dropout, self.scale or scale)


class ProjectedCosine(HeadConfig):
    """The cosine of the two vectors after linear layers: `widths: [100, 768]` projects to 100, then to 768."""

    kind: Literal["projected_cosine"]
    widths: tuple[PositiveInt, ...] = Field(min_length=1)
    activation: Literal["none", "gelu"] = "none"  # between the layers
    shared: bool = True  # one projection for both sentences, or one for each
    scale: PositiveFloat | None = None

    def build(self, width: int, outputs: int, dropout: float, scale: float) -> nn.Module:
        widths = [width, *self.widths]
        sides = [nn.Sequential(*_linears(widths, self.activation)) for _ in range(1 if self.shared else 2)]
        return CosineHead(sides, dropout, self.scale or scale)


Head = Annotated[
    Linear | Mlp | CrossEncoder | Concat | Sbert | Cosine | ProjectedCosine,
    Field(discriminator="kind"),
]


def _linears(widths: Sequence[int], activation: Literal["none", "gelu"]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        if layers and activation == "gelu":
            layers.append(nn.GELU())
        layers.append(nn.Linear(before, after))
    return layers


class Layers(nn.Module):
    """Layers on the first `parts` of (u, v, |u - v|). A pair's vectors come as all first sentences, then all second."""

    def __init__(self, parts: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.parts = parts
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(*_linears(widths, "gelu"))
        self.apply(partial(init_weights, std=0.02))

    def forward(self, pooled_SD: Tensor) -> Tensor:
        x = self.dropout(pooled_SD)
        if self.parts > 1:
            u, v = x.chunk(2)
            x = torch.cat([u, v, (u - v).abs()][: self.parts], dim=1)
        return self.layers(x)  # type: ignore[no-any-return]


class HiddenWords(nn.Module):
    """From the vectors of hidden words to a score for each token of the vocabulary, by the words' own embeddings."""

    def __init__(self, shape: Shape, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.activation = ACTIVATIONS[shape.hidden_act]
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        init_weights(self.dense, shape.initializer_range)

    def forward(self, x_MD: Tensor, embeddings_VD: Tensor) -> Tensor:
        return F.linear(self.norm(self.activation(self.dense(x_MD))), embeddings_VD, self.bias)


class CosineHead(nn.Module):
    """The scaled cosine of a pair's two vectors, after the layers that both sides share or one side's own."""

    def __init__(self, sides: Sequence[nn.Module], dropout: float, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.sides = nn.ModuleList(sides)
        self.apply(partial(init_weights, std=0.02))

    def forward(self, pooled_SD: Tensor) -> Tensor:
        u, v = self.dropout(pooled_SD).chunk(2)
        # In fp32: the vectors of close sentences differ in digits that bf16 does not have.
        cosine_N = F.cosine_similarity(self.sides[0](u).float(), self.sides[-1](v).float())
        return self.scale * cosine_N[:, None]
