"""A BERT encoder over packed tokens: sentences lie end to end in one row, so no layer ever computes padding.

Linear and LayerNorm see a plain (T, D) matrix of real tokens. Only attention looks at where a sentence ends: the varlen
kernel reads the boundaries on a GPU, elsewhere sentences of similar length form dense groups (`_grouped_attention`).
Both have one signature and are tested against each other and against Hugging Face's BertModel.
"""

# Shape suffixes: T = tokens of all sentences, P = the same with padding inside groups, S = sentences, N = sentences of
# a group, L = its longest sentence, D = hidden size, H = heads, E = width of a head.

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_dist.config import Config
from mtl_dist.data.packed import Packed


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
