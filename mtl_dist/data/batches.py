"""Which rows a step trains on, on which rank, and how they become packed tokens.

All of it is a pure function of (seed, stage, step): a task's rows form an endless stream of shuffled epochs, draw d
takes rows d*B to (d+1)*B of it, and these are dealt to the ranks so that each gets nearly as many tokens as the others,
of every task and of all tasks of a step together.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heapreplace
from itertools import islice
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor

from mtl_dist.config import Config
from mtl_dist.data.mixer import Draw, Order
from mtl_dist.data.packed import Packed, moved, pack
from mtl_dist.data.prepare import Split

# Shape suffixes: W = ranks, R = rows of a rank, H = hands that it deals them to, N = rows of a batch.

FEISTEL_ROUNDS = 6
FEW_ROWS = 64
T = TypeVar("T")


class Subsample(Config):
    """Some of a task's train rows."""

    rows: PositiveInt  # of an epoch
    subset: Literal["fresh", "fixed"] = "fresh"  # fresh: other rows every epoch; fixed: the same ones, reshuffled


@dataclass(frozen=True)
class Hidden:
    """Words of a batch that are to be found again, row by row."""

    places_M: Tensor  # of their tokens in the packed ones
    tokens_M: Tensor  # what they were
    number_N: Tensor  # of them in each row

    def to(self, device: torch.device) -> "Hidden":
        """The same on `device`, without waiting for it."""
        return Hidden(*(moved(value, device) for value in (self.places_M, self.tokens_M, self.number_N)))


@dataclass(frozen=True)
class Batch:
    """Rows of one task, packed for the encoder. For pairs, all first sentences come before all second ones.

    Rows may be packed more than once, all of them one after the other.
    """

    task: str
    rows: NDArray[np.int64]
    packed: Packed
    gold_N: Tensor
    weight_N: Tensor  # 1 for a real row; 0 for the filler of a rank that would have none
    filler: bool
    rows_W: tuple[int, ...] = ()  # of a draw in one micro-batch: how many real rows of it each rank has
    hidden: Hidden | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same rows on `device`, without waiting for it."""
        gold_N, weight_N = moved(self.gold_N, device), moved(self.weight_N, device)
        hidden = self.hidden and self.hidden.to(device)
        return replace(self, packed=self.packed.to(device), gold_N=gold_N, weight_N=weight_N, hidden=hidden)


def make_batch(
    task: str,
    split: Split,
    rows: NDArray[np.int64],
    filler: bool = False,
    copies: int = 1,
    rows_W: tuple[int, ...] = (),
) -> Batch:
    """Packs some rows of a task, each so many times; a filler's rows weigh nothing."""
    inputs = [split.inputs(row) for row in rows.tolist()] * copies
    sentences = [tokens for side in zip(*inputs, strict=True) for tokens in side]
    second_from = [split.second_from(row) for row in rows.tolist()] * copies if len(inputs[0]) == 1 else None
    return Batch(
        task=task,
        rows=rows,
        packed=pack(sentences, second_from),
        gold_N=torch.from_numpy(split.labels(rows).astype(np.float32)),
        weight_N=torch.full((len(rows),), 0.0 if filler else 1.0),
        filler=filler,
        rows_W=rows_W,
    )


@dataclass(frozen=True)
class Hiding:
    """Which words are hidden in each row of each draw, on whatever rank: BERT's pre-training (Devlin et al. 2019).

    Of those chosen, 80 % become [MASK], 10 % any token, and 10 % stay.
    """

    share: float  # of a row's tokens, at least one; never [CLS], [SEP] and the like
    mask: int  # the token [MASK]
    special: NDArray[np.bool_]  # of each token of the vocabulary, whether it stands for no word
    key: str

    def of(self, batch: Batch, draw: int) -> Batch:
        """The batch with words hidden."""
        tokens, offsets = batch.packed.tokens_T.numpy().copy(), batch.packed.offsets.tolist()
        places, found, number = [], [], []
        for n, row in enumerate(batch.rows.tolist()):
            spans = [np.arange(*offsets[s : s + 2]) for s in range(n, len(offsets) - 1, len(batch.rows))]
            words = np.concatenate(spans)
            words = words[~self.special[tokens[words]]]
            digest = hashlib.blake2b(f"{self.key}/{batch.task}/{draw}/{row}".encode(), digest_size=8).digest()
            rng = np.random.default_rng(int.from_bytes(digest))
            chosen = rng.permutation(words)[: max(1, round(self.share * len(words)))]
            fate, others = rng.random(len(chosen)), rng.integers(len(self.special), size=len(chosen))
            places.append(chosen)
            found.append(tokens[chosen])
            number.append(len(chosen))
            tokens[chosen] = np.where(fate < 0.8, self.mask, np.where(fate < 0.9, others, tokens[chosen]))
        places_M, tokens_M = (torch.from_numpy(np.concatenate(part)) for part in (places, found))
        hidden = Hidden(places_M, tokens_M, torch.tensor(number))
        return replace(batch, packed=replace(batch.packed, tokens_T=torch.from_numpy(tokens)), hidden=hidden)


class RowStream:
    """The endless stream of a task's train rows: every row of an epoch once, shuffled; then those of the next epoch."""

    def __init__(self, num_rows: int, seed: int, stage: int, task: str, subsample: Subsample | None = None) -> None:
        self.num_rows = num_rows
        self.epoch_rows = num_rows if subsample is None else subsample.rows
        self.fixed = subsample is not None and subsample.subset == "fixed"
        self.key = f"{seed}/{stage}/{task}"
        self.subset_key = f"{seed}/{task}/subset"  # one for all stages

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """The rows at positions `start` to `stop` of the stream."""
        epochs, positions = np.divmod(np.arange(start, stop), self.epoch_rows)
        return np.concatenate(
            [self._of_epoch(epoch, positions[epochs == epoch]) for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)]
        )

    def _of_epoch(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        key = f"{self.key}/{epoch}"
        if self.fixed:
            return permute(permute(positions, self.epoch_rows, key), self.num_rows, self.subset_key)
        # The first few of a fresh shuffle are a fresh subset.
        return permute(positions, self.num_rows, key)


def permute(positions: NDArray[np.int64], num_rows: int, key: str) -> NDArray[np.int64]:
    """Where a shuffle of `num_rows` rows puts some positions, without a list of all rows.

    A Feistel network is a bijection on pairs of half-words, whatever its rounds compute; positions that land beyond the
    last row walk on along their cycle until they land on one.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    round_keys = np.frombuffer(digest, dtype="<u8")
    if num_rows <= FEW_ROWS:
        # Half-words of one or two bits mix badly; so few rows can be put in the order of their hashes.
        hashes = _mixed(_mixed(np.arange(num_rows, dtype=np.uint64) ^ round_keys[0]) ^ round_keys[1])
        return np.argsort(hashes)[positions]

    half_bits = ((num_rows - 1).bit_length() + 1) // 2
    mask = np.uint64((1 << half_bits) - 1)
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


class TrainRows:
    """The train rows of a task, and which of them each draw takes, on all ranks together.

    Within a window of some draws, and within an epoch, rows are sorted by length, cut into batches, and the batches
    shuffled, so that sentences of like length meet. A window of one draw leaves the stream as it is.
    """

    def __init__(self, split: Split, stream: RowStream, batch_size: int, window: int = 1, copies: int = 1) -> None:
        self.split = split
        self.copies = copies  # of each row in a batch
        self.stream = stream
        self.batch_size = batch_size
        self.window_rows = window * batch_size
        self._batches = lru_cache(maxsize=2)(self._sort_and_cut)  # neighbouring draws share a window, or two

    def of_draw(self, draw: int) -> NDArray[np.int64]:
        """The rows of a draw."""
        position, stop = draw * self.batch_size, (draw + 1) * self.batch_size
        parts = []
        while position < stop:
            window, epoch = position // self.window_rows, position // self.stream.epoch_rows
            start = max(window * self.window_rows, epoch * self.stream.epoch_rows)
            end = min((window + 1) * self.window_rows, (epoch + 1) * self.stream.epoch_rows)
            parts.append(self._batches(start, end)[draw])
            position = end
        return np.concatenate(parts)

    def _sort_and_cut(self, start: int, end: int) -> dict[int, NDArray[np.int64]]:
        """The rows that each draw takes from a stretch of the stream."""
        rows = self.stream.rows(start, end)
        lengths = self.split.lengths(rows)
        draws = np.arange(start // self.batch_size, (end - 1) // self.batch_size + 1)
        # The draws at both ends may lie only partly in the stretch.
        sizes = np.minimum((draws + 1) * self.batch_size, end) - np.maximum(draws * self.batch_size, start)
        shuffled = permute(np.arange(len(draws)), len(draws), f"{self.stream.key}/batches/{start}")
        cuts = np.split(rows[np.argsort(lengths, kind="stable")], np.cumsum(sizes[shuffled])[:-1])
        return dict(zip(draws[shuffled].tolist(), cuts, strict=True))


def deal(lengths: NDArray[np.int64], hands: int) -> NDArray[np.int64]:
    """The hand that each row goes to so that total lengths are nearly equal: longest first, each to the lightest hand.

    No hand is empty if there are as many rows.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    # A hand and what it has are one number, which a heap moves three times as fast as a pair.
    heap = list(range(hands))
    dealt = [heapreplace(heap, heap[0] + length * hands) for length in lengths[longest_first].tolist()]
    hand_of = np.empty(len(lengths), dtype=np.int64)
    hand_of[longest_first] = np.array(dealt, dtype=np.int64) % hands
    return hand_of


class TrainBatches:
    """One rank's share of what each step trains on."""

    def __init__(
        self,
        rows: Mapping[str, TrainRows],
        order: Order,
        rank: int,
        world: int,
        accumulation: int = 1,
        max_tokens: int | None = None,
        hiding: Hiding | None = None,
    ) -> None:
        self.rows = rows
        self.hiding = hiding
        self.order = order
        self.rank = rank
        self.world = world
        self.accumulation = accumulation
        self.max_tokens = max_tokens

    def of_step(self, step: int) -> tuple[list[Draw], list[Batch]]:
        """The draws of a step, and this rank's micro-batches of them."""
        draws = self.order.draws(step)
        tokens_W = np.zeros(self.world, dtype=np.int64)  # of the step so far; each rank is the first of them in turn
        me = (self.rank - draws[0][1]) % self.world
        return draws, [batch for task, draw in draws for batch in self._of_draw(task, draw, tokens_W, me)]

    def _of_draw(self, task: str, draw: int, tokens_W: NDArray[np.int64], me: int) -> Iterator[Batch]:
        """This rank's micro-batches of a task's `draw`-th global batch; every rank gets the same number of them."""
        split, copies = self.rows[task].split, self.rows[task].copies
        rows = self.rows[task].of_draw(draw)
        lengths = split.lengths(rows) * copies
        longest_first = np.argsort(-lengths, kind="stable")  # as dense attention wants them
        rows, lengths = rows[longest_first], lengths[longest_first]
        hand_of = deal(lengths, self.world)
        dealt_W = np.bincount(hand_of, weights=lengths, minlength=self.world).astype(np.int64)
        # Who has least of the step's other tasks gets most of this one, and rows if there are fewer than ranks.
        lightest, most_first = np.argsort(tokens_W, kind="stable"), np.argsort(-dealt_W, kind="stable")
        tokens_W[lightest] += dealt_W[most_first]
        hand_W = np.empty(self.world, dtype=np.int64)  # of the first rank of the step and those after it
        hand_W[lightest] = most_first
        mine = np.flatnonzero(hand_of == hand_W[me])
        rows_W = np.roll(np.bincount(hand_of, minlength=self.world)[hand_W], self.rank - me)
        number = self._micro_batches(lengths, hand_of)
        micro_of = deal(lengths[mine], number)
        for micro in range(number):
            of_micro = rows[mine[micro_of == micro]]
            # A rank that has run out of rows must still take part in what all ranks compute together.
            filler = not len(of_micro)
            here = rows[-1:] if filler else of_micro
            batch = make_batch(task, split, here, filler, copies, tuple(rows_W.tolist()) if number == 1 else ())
            yield batch if self.hiding is None else self.hiding.of(batch, draw)

    def _micro_batches(self, lengths: NDArray[np.int64], hand_of: NDArray[np.int64]) -> int:
        """How many micro-batches keep within `max_tokens` on every rank (or have one row only)."""
        rows_W = np.bincount(hand_of, minlength=self.world)
        most = int(rows_W.max())
        number = min(self.accumulation, most)
        if self.max_tokens is not None:
            lengths_WR = np.zeros((self.world, most), dtype=np.int64)
            lengths_WR[np.arange(most) < rows_W[:, None]] = lengths[np.argsort(hand_of, kind="stable")]
            fewest = -(-int(lengths_WR.sum(axis=1).max()) // self.max_tokens)
            number = min(max(number, fewest), most)
            while number < most and _most_tokens(lengths_WR, number) > self.max_tokens:
                number += 1
        return number


def _most_tokens(lengths_WR: NDArray[np.int64], hands: int) -> int:
    """Of a hand, when each rank deals its rows, longest first, to so many: as `deal` does, for all ranks at once."""
    totals_WH = np.zeros((len(lengths_WR), hands), dtype=np.int64)
    each = np.arange(len(lengths_WR))
    for lengths_W in lengths_WR.T:
        totals_WH[each, totals_WH.argmin(axis=1)] += lengths_W
    return int(totals_WH.max())


def prefetched(make: Callable[[int], T], indices: Iterable[int], ahead: int = 2) -> Iterator[T]:
    """`make` of each index in turn, called in a thread while the caller works on the ones before."""
    waiting: deque[Future[T]] = deque()
    remaining = iter(indices)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        waiting.extend(pool.submit(make, index) for index in islice(remaining, ahead))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(make, index) for index in islice(remaining, 1))
            yield made


def eval_batches(task: str, split: Split, rows: NDArray[np.int64], max_tokens: int) -> Iterator[Batch]:
    """Packs `rows` in batches of similar lengths and at most `max_tokens` tokens (or of one row)."""
    lengths = split.lengths(rows)
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
