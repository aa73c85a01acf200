"""Which rows a step trains on, on which rank, and how they become packed tokens.

All of it is a pure function of (seed, task, draw): a task's rows form an endless stream of shuffled epochs, draw d
takes rows d*B to (d+1)*B of it, and these are dealt to the ranks so that each gets nearly as many tokens as the others.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl_dist.data.prepare import Split
from mtl_dist.model.encoder import Packed, pack

FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class Batch:
    """Rows of one task, packed for the encoder. For pairs, all first sentences come before all second ones."""

    task: str
    rows: NDArray[np.int64]
    packed: Packed
    gold_N: Tensor
    weight_N: Tensor  # 1 for a real row; 0 for the filler of a rank that would have none

    def to(self, device: torch.device) -> "Batch":
        """The same rows on `device`."""
        return replace(
            self, packed=self.packed.to(device), gold_N=self.gold_N.to(device), weight_N=self.weight_N.to(device)
        )


def make_batch(task: str, split: Split, rows: NDArray[np.int64], filler: bool = False) -> Batch:
    """Packs some rows of a task; a filler's rows weigh nothing."""
    inputs = [split.inputs(row) for row in rows.tolist()]
    sentences = [tokens for side in zip(*inputs, strict=True) for tokens in side]
    second_from = [split.second_from(row) for row in rows.tolist()] if len(inputs[0]) == 1 else None
    return Batch(
        task=task,
        rows=rows,
        packed=pack(sentences, second_from),
        gold_N=torch.tensor([split.label(row) for row in rows.tolist()], dtype=torch.float32),
        weight_N=torch.full((len(rows),), 0.0 if filler else 1.0),
    )


class RowOrder:
    """The endless stream of a split's rows: every row once, shuffled; then every row once, shuffled anew."""

    def __init__(self, num_rows: int, seed: int, task: str) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.task = task

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """The rows at positions `start` to `stop` of the stream."""
        epochs, positions = np.divmod(np.arange(start, stop), self.num_rows)
        return np.concatenate(
            [
                permute(positions[epochs == epoch], self.num_rows, f"{self.seed}/{self.task}/{epoch}")
                for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
            ]
        )


def permute(positions: NDArray[np.int64], num_rows: int, key: str) -> NDArray[np.int64]:
    """Where a shuffle of `num_rows` rows puts some positions, without a list of all rows.

    A Feistel network is a bijection on pairs of half-words, whatever its rounds compute; positions that land beyond the
    last row walk on along their cycle until they land on one.
    """
    half_bits = max(1, ((num_rows - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    round_keys = np.frombuffer(digest, dtype="<u8")

    rows = positions.astype(np.uint64)
    walking = np.arange(len(rows))
    while len(walking):
        left, right = rows[walking] >> np.uint64(half_bits), rows[walking] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        rows[walking] = (left << np.uint64(half_bits)) | right
        walking = walking[rows[walking] >= num_rows]
    return rows.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The finaliser of splitmix64: every bit of the input moves every bit of the output.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Deals rows to `hands` so that their total lengths are nearly equal: longest first, each to the lightest hand."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    totals = [0] * hands
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        lightest = totals.index(min(totals))
        dealt[lightest].append(index)
        totals[lightest] += lengths[index]
    return dealt


class TrainBatches:
    """One rank's share of what each draw of a task trains on."""

    def __init__(self, splits: dict[str, Split], batch_sizes: dict[str, int], seed: int, rank: int, world: int) -> None:
        self.splits = splits
        self.batch_sizes = batch_sizes
        self.orders = {task: RowOrder(len(split), seed, task) for task, split in splits.items()}
        self.rank = rank
        self.world = world

    def of_draw(self, task: str, draw: int, micro_batches: int) -> Iterator[Batch]:
        """This rank's micro-batches of a task's `draw`-th global batch; every rank gets the same number of them."""
        split, size = self.splits[task], self.batch_sizes[task]
        rows = self.orders[task].rows(draw * size, (draw + 1) * size)
        lengths = [split.length(row) for row in rows.tolist()]
        mine = deal(lengths, self.world)[self.rank]
        shortest = rows[[np.argmin(lengths)]]
        for hand in deal([lengths[i] for i in mine], min(micro_batches, math.ceil(size / self.world))):
            # A rank that has run out of rows must still take part in what all ranks compute together.
            yield make_batch(task, split, rows[mine][hand] if hand else shortest, filler=not hand)


def eval_batches(task: str, split: Split, rows: NDArray[np.int64], max_tokens: int) -> Iterator[Batch]:
    """Packs `rows` in batches of similar lengths and at most `max_tokens` tokens (or of one row)."""
    lengths = np.array([split.length(row) for row in rows.tolist()])
    batch: list[int] = []
    tokens = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        if batch and tokens + lengths[index] > max_tokens:
            yield make_batch(task, split, rows[batch])
            batch, tokens = [], 0
        batch.append(index)
        tokens += int(lengths[index])
    if batch:
        yield make_batch(task, split, rows[batch])
