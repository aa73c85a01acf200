"""The sentences of a batch as one row of tokens: no padding, but where attention computes groups of like length.

packed = pack([[101, 7592, 102], [101, 2088, 999, 102]])
"""

# Shape suffixes: T = tokens of all sentences, P = the same with padding inside groups, S = sentences, N = sentences of
# a group, L = its longest sentence.

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.integer[Any]]


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
    to_padded_P: Tensor | None  # the token of every slot of the groups; None: the groups are T
    to_packed_T: Tensor | None  # the slot of every token

    def to(self, device: torch.device) -> "Packed":
        """The same sentences on `device`, without waiting for it."""
        move = partial(moved, device=device)
        fields = {name: move(value) for name, value in vars(self).items()}
        groups = tuple(group._replace(real_NL=move(group.real_NL)) for group in self.groups)
        return replace(self, **(fields | {"groups": groups}))

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)


def moved(value: Any, device: torch.device) -> Any:
    """A tensor on `device`; what is no tensor stays."""
    if not isinstance(value, Tensor):
        return value
    # From pageable memory a GPU takes a copy only while the CPU waits.
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


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
    groups, slots, reals, start = [], [], [], 0
    while start < len(by_length):
        longest = int(lengths[by_length[start]])
        # Eight tokens of padding cost less than one more kernel launch.
        stop = int(np.searchsorted(-lengths[by_length], -min(0.75 * longest, longest - 8), side="right"))
        members, start = by_length[start:stop], stop
        column = np.arange(longest)
        real_NL = column < lengths[members, None]
        # Padding repeats a sentence's last token: were it always the same one, a GPU would add up all their gradients,
        # zeros, in one place, one after the other.
        slots.append((offsets[members, None] + np.minimum(column, lengths[members, None] - 1)).ravel())
        reals.append(real_NL.ravel())
        groups.append(Group(len(members), longest, None if real_NL.all() else torch.from_numpy(real_NL)))
    token_of_slot, real = np.concatenate(slots), np.concatenate(reals)
    if np.array_equal(token_of_slot, np.arange(offsets[-1])):
        return tuple(groups), None, None
    slot_of_token = np.empty(offsets[-1], dtype=np.int64)
    slot_of_token[token_of_slot[real]] = np.flatnonzero(real)
    return tuple(groups), torch.from_numpy(token_of_slot), torch.from_numpy(slot_of_token)
