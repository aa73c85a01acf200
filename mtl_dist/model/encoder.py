"""A BERT encoder over packed tokens: sentences lie end to end in one row, so no layer ever computes padding.

Linear and LayerNorm see a plain (T, D) matrix of real tokens. Only attention looks at where a sentence ends: the varlen
kernel reads the boundaries on a GPU, elsewhere sentences of similar length form dense groups (`_grouped_attention`).
Both have one signature and are tested against each other and against Hugging Face's BertModel.
"""

# Shape suffixes: T = tokens of all sentences, P = the same with padding inside groups, S = sentences, N = sentences of
# a group, L = its longest sentence, D = hidden size, H = heads, E = width of a head.

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_dist.config import Config

IntArray = NDArray[np.integer[Any]]


class Shape(Config):
    """The shape of a BERT encoder but for its vocabulary, in the words of Hugging Face's config.json."""

    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1)
    max_position_embeddings: PositiveInt = 512
    type_vocab_size: PositiveInt = 2
    initializer_range: NonNegativeFloat = 0.02
    layer_norm_eps: NonNegativeFloat = 1e-12

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "Shape":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class Group(NamedTuple):
    """Sentences of similar length that attention computes as one dense block."""

    sentences: int  # N
    longest: int  # L
    real_NL: Tensor | None  # False marks padding; None where every sentence has length L


@dataclass(frozen=True)
class Packed:
    """Sentences end to end, and where each one lies."""

    tokens_T: Tensor
    positions_T: Tensor
    segments_T: Tensor
    offsets: Tensor  # (S + 1,) int32: sentence s is tokens[offsets[s]:offsets[s + 1]]
    longest: int
    groups: tuple[Group, ...]
    to_padded_P: Tensor | None  # the token of every slot of the groups, 0 where it is padding; None: the groups are T
    to_packed_T: Tensor | None  # the slot of every token

    def to(self, device: torch.device) -> "Packed":
        """The same sentences on `device`."""
        move = partial(_move, device=device)
        fields = {name: move(value) for name, value in vars(self).items()}
        groups = tuple(group._replace(real_NL=move(group.real_NL)) for group in self.groups)
        return replace(self, **(fields | {"groups": groups}))

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def pack(sentences: Sequence[IntArray], second_from: Sequence[int] | None = None) -> Packed:
    """Lays token sequences end to end; from `second_from[s]` on, a sentence's tokens are of segment 1."""
    assert len(sentences) and all(len(sentence) for sentence in sentences)
    lengths = np.fromiter((len(sentence) for sentence in sentences), dtype=np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    segments = np.zeros_like(positions)
    if second_from is not None:
        segments = (positions >= np.repeat(second_from, lengths)).astype(np.int64)
    groups, to_padded, to_packed = _group(lengths, offsets)
    return Packed(
        tokens_T=torch.from_numpy(np.concatenate(sentences).astype(np.int64)),
        positions_T=torch.from_numpy(positions),
        segments_T=torch.from_numpy(segments),
        offsets=torch.from_numpy(offsets.astype(np.int32)),
        longest=int(lengths.max()),
        groups=groups,
        to_padded_P=to_padded,
        to_packed_T=to_packed,
    )


def _group(lengths: IntArray, offsets: IntArray) -> tuple[tuple[Group, ...], Tensor | None, Tensor | None]:
    """Groups sentences by length so that a group is at most about a quarter padding."""
    by_length = np.argsort(-lengths, kind="stable")
    groups, slots, start = [], [], 0
    while start < len(by_length):
        longest = int(lengths[by_length[start]])
        # Eight tokens of padding cost less than one more kernel launch.
        stop = int(np.searchsorted(-lengths[by_length], -min(0.75 * longest, longest - 8), side="right"))
        members, start = by_length[start:stop], stop
        column = np.arange(longest)
        real_NL = column < lengths[members, None]
        slots.append(np.where(real_NL, offsets[members, None] + column, -1).ravel())
        groups.append(Group(len(members), longest, None if real_NL.all() else torch.from_numpy(real_NL)))
    token_of_slot = np.concatenate(slots)
    if np.array_equal(token_of_slot, np.arange(offsets[-1])):
        return tuple(groups), None, None
    slot_of_token = np.empty(offsets[-1], dtype=np.int64)
    real = token_of_slot >= 0
    slot_of_token[token_of_slot[real]] = np.flatnonzero(real)
    return tuple(groups), torch.from_numpy(token_of_slot.clip(0)), torch.from_numpy(slot_of_token)


def attention(qkv_T3HE: Tensor, packed: Packed, dropout: float) -> Tensor:
    """Self-attention within each sentence, (T, 3, H, E) -> (T, H, E)."""
    if _varlen_can(qkv_T3HE, dropout):
        return _varlen_attention(qkv_T3HE, packed)
    return _grouped_attention(qkv_T3HE, packed, dropout)


def _varlen_can(qkv_T3HE: Tensor, dropout: float) -> bool:
    """Whether the varlen kernel can do this: half precision on an Ampere or later, some widths, no dropout."""
    if not qkv_T3HE.is_cuda or dropout or qkv_T3HE.dtype not in (torch.float16, torch.bfloat16):
        return False
    E = qkv_T3HE.shape[-1]
    return torch.cuda.get_device_capability(qkv_T3HE.device) >= (8, 0) and E % 8 == 0 and E <= 256


def _varlen_attention(qkv_T3HE: Tensor, packed: Packed) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q_THE, k_THE, v_THE = qkv_T3HE.unbind(1)
    offsets, longest = packed.offsets, packed.longest
    out_THE = varlen_attn(q_THE, k_THE, v_THE, offsets, offsets, longest, longest)
    assert isinstance(out_THE, Tensor)
    return out_THE


def _grouped_attention(qkv_T3HE: Tensor, packed: Packed, dropout: float) -> Tensor:
    _, _, H, E = qkv_T3HE.shape
    qkv_P3HE = qkv_T3HE if packed.to_padded_P is None else qkv_T3HE.index_select(0, packed.to_padded_P)
    outs = []
    start = 0
    for group in packed.groups:
        stop = start + group.sentences * group.longest
        q, k, v = (
            qkv_P3HE[start:stop].view(group.sentences, group.longest, 3, H, E).permute(2, 0, 3, 1, 4)
        )  # each (N, H, L, E)
        mask = None if group.real_NL is None else group.real_NL[:, None, None, :]
        dense = _plain_attention if q.device.type == "cpu" and group.longest <= 256 else _sdpa
        outs.append(dense(q, k, v, mask, dropout).transpose(1, 2).reshape(-1, H, E))
        start = stop
    out_PHE = torch.cat(outs)
    return out_PHE if packed.to_packed_T is None else out_PHE.index_select(0, packed.to_packed_T)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    # On CPUs, SDPA's backward takes two to eight times as long as this on short sentences.
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1), dropout) @ v


class Embeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(self, shape: Shape, vocab_size: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, shape.hidden_size)
        self.position = nn.Embedding(shape.max_position_embeddings, shape.hidden_size)
        self.segment = nn.Embedding(shape.type_vocab_size, shape.hidden_size)
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.dropout = nn.Dropout(shape.hidden_dropout_prob)

    def forward(self, packed: Packed) -> Tensor:
        x_TD = self.word(packed.tokens_T) + self.segment(packed.segments_T) + self.position(packed.positions_T)
        return self.dropout(self.norm(x_TD))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Multi-head self-attention; one matrix product gives queries, keys and values."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_attention_heads
        self.attention_dropout = shape.attention_probs_dropout_prob
        self.qkv = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.out = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, x_TD: Tensor, packed: Packed) -> Tensor:
        qkv_T3HE = self.qkv(x_TD).view(len(x_TD), 3, self.num_heads, -1)
        dropout = self.attention_dropout if self.training else 0.0
        return self.out(attention(qkv_T3HE, packed, dropout).reshape(x_TD.shape))  # type: ignore[no-any-return]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """The two-layer network that every token passes alone."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size)
        self.activation = ACTIVATIONS[shape.hidden_act]

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_TD)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and feed-forward, each added to its input and then normalised (post-norm, as in BERT)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = SelfAttention(shape)
        self.attention_norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.feed_forward = FeedForward(shape)
        self.output_norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.dropout = nn.Dropout(shape.hidden_dropout_prob)

    def forward(self, x_TD: Tensor, packed: Packed) -> Tensor:
        x_TD = self.attention_norm(x_TD + self.dropout(self.attention(x_TD, packed)))
        return self.output_norm(x_TD + self.dropout(self.feed_forward(x_TD)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """BERT: packed tokens in, one hidden vector per token out."""

    def __init__(self, shape: Shape, vocab_size: int, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.activation_checkpointing = activation_checkpointing
        self.embeddings = Embeddings(shape, vocab_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.pooler = nn.Linear(shape.hidden_size, shape.hidden_size)  # applied by heads.pool, to the first token
        self.apply(partial(init_weights, std=shape.initializer_range))

    def forward(self, packed: Packed) -> Tensor:
        x_TD = self.embeddings(packed)
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                x_TD = checkpoint(layer, x_TD, packed, use_reentrant=False)
            else:
                x_TD = layer(x_TD, packed)
        return x_TD  # type: ignore[no-any-return]


def init_weights(module: nn.Module, std: float) -> None:
    """BERT's initialisation: normal weights, zero biases; norms keep PyTorch's ones and zeros."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
