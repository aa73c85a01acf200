"""Every row once an epoch, the same global batch on any number of ranks, and a fair share for each.

python -m pytest tests/data/test_batches.py
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtl_dist.data.batches import Batch, RowOrder, TrainBatches, deal, eval_batches, make_batch, permute
from mtl_dist.data.prepare import Split


class Rows(Split):
    """Row i has inputs of i's own token; of a pair, the second sentence has one token more."""

    def __init__(self, lengths: Sequence[int], sentences: int = 1) -> None:
        self.lengths = lengths
        self.sentences = sentences

    def __len__(self) -> int:
        return len(self.lengths)

    def inputs(self, row: int) -> list[NDArray[np.int32]]:
        return [np.full(self.lengths[row] + side, 10 * row + side, np.int32) for side in range(self.sentences)]

    def length(self, row: int) -> int:
        return sum(map(len, self.inputs(row)))

    def second_from(self, row: int) -> int:
        return self.lengths[row] - 1

    def label(self, row: int) -> float:
        return row / 2


def skewed(num_rows: int) -> list[int]:
    lengths = np.random.default_rng(0).lognormal(3, 0.8, num_rows)
    return np.clip(lengths, 3, 512).astype(int).tolist()  # type: ignore[no-any-return]


# The order of rows


def test_permute_is_a_bijection() -> None:
    for num_rows in range(1, 601):
        rows = permute(np.arange(num_rows), num_rows, "key")
        assert sorted(rows.tolist()) == list(range(num_rows))


@pytest.mark.parametrize("sampled", [np.arange(16_000), np.arange(16_000) * 62_500 + 7], ids=["a run", "spread"])
def test_permute_spreads_a_billion_rows(sampled: NDArray[np.int64]) -> None:
    rows = permute(sampled, 10**9, "key")
    assert len(set(rows.tolist())) == 16_000
    assert rows.min() >= 0
    assert rows.max() < 10**9
    counts = np.bincount(rows * 16 // 10**9, minlength=16)
    assert ((counts - 1000) ** 2 / 1000).sum() < 44.3  # chi-square of 15 degrees: exceeded once in 10,000


def test_another_key_is_another_order() -> None:
    orders = {tuple(permute(np.arange(50), 50, str(key)).tolist()) for key in range(100)}
    assert len(orders) == 100
    firsts = Counter(order[0] for order in orders)
    assert max(firsts.values()) <= 10  # each row comes first about twice


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 25])
def test_every_row_comes_once_an_epoch(batch: int) -> None:
    order = RowOrder(10, seed=0, task="sst")
    stream = np.concatenate([order.rows(start, start + batch) for start in range(0, 10 * batch, batch)])
    epochs = stream.reshape(batch, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == batch  # each shuffled anew


def test_the_order_is_the_seeds_and_the_tasks() -> None:
    orders = [RowOrder(100, seed, task).rows(0, 100).tolist() for seed in (0, 1) for task in ("sst", "sts")]
    assert all(orders.count(order) == 1 for order in orders)
    assert RowOrder(100, 0, "sst").rows(0, 100).tolist() == orders[0]


# What a rank gets of a draw


def share(batches: TrainBatches, draw: int, micro_batches: int) -> list[Batch]:
    return list(batches.of_draw("sst", draw, micro_batches))


def ranks(split: Split, size: int, world: int) -> list[TrainBatches]:
    return [TrainBatches({"sst": split}, {"sst": size}, seed=0, rank=rank, world=world) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("size", [1, 3, 6, 16, 130])  # fewer rows than ranks; more than there are
def test_the_ranks_share_the_global_batch(world: int, micro_batches: int, size: int) -> None:
    split = Rows(skewed(100))
    for draw in range(3):
        shares = [share(batches, draw, micro_batches) for batches in ranks(split, size, world)]
        micros = [batch for of_rank in shares for batch in of_rank]
        rows = [row for batch in micros for row in batch.rows[batch.weight_N.numpy() > 0].tolist()]
        expected = RowOrder(100, 0, "sst").rows(draw * size, (draw + 1) * size)
        assert sorted(rows) == sorted(expected.tolist())  # whatever the world
        assert {len(of_rank) for of_rank in shares} == {min(micro_batches, -(-size // world))}
        assert all(any(batch.weight_N.any() for batch in of_rank) for of_rank in shares) == (size >= world)
        fillers = [batch.packed.num_tokens for batch in micros if not batch.weight_N.all()]
        assert set(fillers) <= {min(split.length(row) for row in rows)}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_get_nearly_equal_tokens(world: int, micro_batches: int) -> None:
    def tokens(batches: TrainBatches) -> int:
        return sum(batch.packed.num_tokens for draw in range(100) for batch in share(batches, draw, micro_batches))

    totals = [tokens(batches) for batches in ranks(Rows(skewed(2000)), 32, world)]
    assert max(totals) < 1.05 * min(totals)


@given(lengths=st.lists(st.integers(1, 512), max_size=40), hands=st.integers(1, 9))
def test_a_deal_is_fair(lengths: list[int], hands: int) -> None:
    dealt = deal(lengths, hands)
    assert sorted(index for hand in dealt for index in hand) == list(range(len(lengths)))
    assert sum(not hand for hand in dealt) == max(0, hands - len(lengths))  # empty only for want of rows
    totals = [sum(lengths[index] for index in hand) for hand in dealt]
    assert max(totals) - min(totals) <= max(lengths, default=0)


def test_a_deal_worked_by_hand() -> None:
    # 9 | 7, then 5 to the 7, 4 to the 9, 3 to the 12, 2 to the 13
    assert deal([2, 3, 4, 5, 7, 9], 2) == [[5, 2, 0], [4, 3, 1]]


# Packing


def test_a_pairs_first_sentences_come_first() -> None:
    batch = make_batch("sts", Rows([1, 2, 1], sentences=2), np.array([2, 1]))
    assert batch.packed.tokens_T.tolist() == [20, 10, 10, 21, 21, 11, 11, 11]
    assert batch.packed.offsets.tolist() == [0, 1, 3, 5, 8]
    assert batch.packed.segments_T.tolist() == [0] * 8
    assert batch.gold_N.tolist() == [1.0, 0.5]
    assert batch.weight_N.tolist() == [1.0, 1.0]
    assert make_batch("sts", Rows([1]), np.array([0]), filler=True).weight_N.tolist() == [0.0]


def test_a_joint_input_has_two_segments() -> None:
    batch = make_batch("sts", Rows([2, 3]), np.array([1, 0]))
    assert batch.packed.tokens_T.tolist() == [10, 10, 10, 0, 0]
    assert batch.packed.segments_T.tolist() == [0, 0, 1, 0, 1]


def test_a_batch_moves_as_a_whole() -> None:
    moved = make_batch("sts", Rows([2, 3]), np.array([1, 0])).to(torch.device("meta"))
    assert moved.gold_N.is_meta
    assert moved.weight_N.is_meta
    assert moved.packed.tokens_T.is_meta


@pytest.mark.parametrize("max_tokens", [1, 64, 512, 10**9])
def test_evaluation_sees_every_row_once(max_tokens: int) -> None:
    split = Rows(skewed(200))
    rows = np.arange(1, 200, 2)
    batches = list(eval_batches("sst", split, rows, max_tokens))
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == rows.tolist()
    assert all(batch.packed.num_tokens <= max_tokens or len(batch.rows) == 1 for batch in batches)
    fullest = sum(split.length(row) for row in rows.tolist())
    assert len(batches) <= 2 * fullest / max_tokens + 1  # no two neighbours could have been one


def test_evaluation_of_no_rows_is_nothing() -> None:
    assert list(eval_batches("sst", Rows([3]), np.arange(0), 10)) == []
