"""Every row once an epoch, the same global batch on any number of ranks, and a fair share for each.

python -m pytest tests/data/test_batches.py
"""

import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heapreplace
from itertools import pairwise, permutations
from threading import Event

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtl_dist.data.batches import (
    Batch,
    RowStream,
    Subsample,
    TrainBatches,
    TrainRows,
    deal,
    eval_batches,
    make_batch,
    permute,
    prefetched,
)
from mtl_dist.data.mixer import AnyMixer, Joint, RoundRobin, Size, Temperature
from mtl_dist.data.prepare import Split
from tests.limits import limit


class Rows(Split):
    """Row i has inputs of i's own token; of a pair, the second sentence has one token more."""

    def __init__(self, lengths: Sequence[int], sentences: int = 1) -> None:
        self.short = np.array(lengths)
        self.sentences = sentences

    def __len__(self) -> int:
        return len(self.short)

    def inputs(self, row: int) -> list[NDArray[np.int32]]:
        return [np.full(self.short[row] + side, 10 * row + side, np.int32) for side in range(self.sentences)]

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.sentences * self.short[rows] + sum(range(self.sentences))

    def second_from(self, row: int) -> int:
        return int(self.short[row]) - 1

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return rows / 2


def skewed(num_rows: int) -> list[int]:
    lengths = np.random.default_rng(0).lognormal(3, 0.8, num_rows)
    return np.clip(lengths, 3, 512).astype(int).tolist()  # type: ignore[no-any-return]


# The order of rows


def test_permute_is_a_bijection() -> None:
    for num_rows in range(1, 5001):
        rows = permute(np.arange(num_rows), num_rows, "key")
        assert (np.bincount(rows, minlength=num_rows) == 1).all()
        assert len(rows) == num_rows


@pytest.mark.parametrize("sampled", [np.arange(16_000), np.arange(16_000) * 62_500 + 7], ids=["a run", "spread"])
def test_permute_spreads_a_billion_rows(sampled: NDArray[np.int64]) -> None:
    rows = permute(sampled, 10**9, "key")
    assert len(set(rows.tolist())) == 16_000
    assert rows.min() >= 0
    assert rows.max() < 10**9
    counts = np.bincount(rows * 16 // 10**9, minlength=16)
    assert ((counts - 1000) ** 2 / 1000).sum() < 44.3  # chi-square of 15 degrees: exceeded once in 10,000


@pytest.mark.parametrize("num_rows", [4, 5])
def test_few_rows_come_in_every_order_alike(num_rows: int) -> None:
    orders = Counter(tuple(permute(np.arange(num_rows), num_rows, str(key)).tolist()) for key in range(6000))
    expected = 6000 / math.factorial(num_rows)
    chi_square = sum((orders[order] - expected) ** 2 / expected for order in permutations(range(num_rows)))
    assert chi_square < {4: 59, 5: 185}[num_rows]  # of 23 and 119 degrees: exceeded about once in 10,000


def test_another_key_is_another_order() -> None:
    orders = {tuple(permute(np.arange(50), 50, str(key)).tolist()) for key in range(100)}
    assert len(orders) == 100
    firsts = Counter(order[0] for order in orders)
    assert max(firsts.values()) <= 10  # each row comes first about twice


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 25])
def test_every_row_comes_once_an_epoch(batch: int) -> None:
    order = RowStream(10, seed=0, stage=0, task="sst")
    stream = np.concatenate([order.rows(start, start + batch) for start in range(0, 10 * batch, batch)])
    epochs = stream.reshape(batch, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == batch  # each shuffled anew


def test_the_order_is_the_seeds_the_stages_and_the_tasks() -> None:
    orders = [
        RowStream(100, seed, stage, task).rows(0, 100).tolist()
        for seed in (0, 1)
        for stage in (0, 1)
        for task in ("sst", "sts")
    ]
    assert all(orders.count(order) == 1 for order in orders)
    assert RowStream(100, 0, 0, "sst").rows(0, 100).tolist() == orders[0]


def test_a_billion_rows_take_no_memory() -> None:
    order = RowStream(10**9, 0, 0, "web")
    tracemalloc.start()
    rows = np.concatenate([order.rows(start, start + 32) for start in range(10**12, 10**12 + 3200, 32)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(rows.tolist())) == 3200
    assert peak < 200_000


@pytest.mark.parametrize("subset", ["fresh", "fixed"])
def test_a_subsample_has_so_many_rows_an_epoch(subset: str) -> None:
    order = RowStream(50, 0, 0, "quora", Subsample.model_validate({"rows": 20, "subset": subset}))
    epochs = order.rows(0, 200).reshape(10, 20)
    assert all(len(set(epoch)) == 20 for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 10  # shuffled anew in either case
    assert len({frozenset(epoch) for epoch in epochs.tolist()}) == (1 if subset == "fixed" else 10)
    assert epochs.max() > 40  # from all over the split, not its beginning


def test_a_fixed_subset_is_the_same_in_every_stage() -> None:
    fixed = Subsample(rows=20, subset="fixed")
    subsets = [set(RowStream(50, 0, stage, "quora", fixed).rows(0, 20).tolist()) for stage in (0, 1)]
    assert subsets[0] == subsets[1]
    assert subsets[0] != set(RowStream(50, 1, 0, "quora", fixed).rows(0, 20).tolist())


# Rows of like length


@pytest.mark.parametrize("window", [1, 4, 64])
@pytest.mark.parametrize(("num_rows", "size"), [(100, 8), (7, 32), (64, 16), (5, 1)])
def test_a_window_moves_rows_within_their_epoch_only(window: int, num_rows: int, size: int) -> None:
    rows = TrainRows(Rows(skewed(num_rows)), RowStream(num_rows, 0, 0, "sst"), size, window)
    stream = np.concatenate([rows.of_draw(draw) for draw in range(num_rows)])  # `size` epochs
    assert len(stream) == num_rows * size
    assert (np.bincount(stream, minlength=num_rows) == size).all()
    # The first epoch ends in the draw that the stream's own order would end it in.
    last = (num_rows - 1) // size
    first_epoch = np.concatenate([rows.of_draw(draw) for draw in range(last + 1)])
    assert set(first_epoch.tolist()) == set(range(num_rows))


def test_a_window_of_one_draw_leaves_the_stream_as_it_is() -> None:
    order = RowStream(100, 0, 0, "sst")
    rows = TrainRows(Rows(skewed(100)), order, 8)
    for draw in (0, 12, 13):  # the second one reaches into the next epoch
        assert sorted(rows.of_draw(draw).tolist()) == sorted(order.rows(draw * 8, (draw + 1) * 8).tolist())


def test_a_window_brings_like_lengths_together_in_random_order() -> None:
    lengths = skewed(1024)
    rows = TrainRows(Rows(lengths), RowStream(1024, 0, 0, "sst"), 32, window=32)
    means = [np.mean([lengths[row] for row in rows.of_draw(draw)]) for draw in range(32)]
    spreads = [np.ptp([lengths[row] for row in rows.of_draw(draw)]) for draw in range(32)]
    assert np.median(spreads) <= 2  # of lengths from 3 to about 250
    assert means != sorted(means)
    rises = sum(a < b for a, b in pairwise(means))
    assert 8 <= rises <= 23  # about half, as in any order


def test_any_draw_can_be_asked_for_first() -> None:
    def fresh() -> TrainRows:
        return TrainRows(Rows(skewed(100)), RowStream(100, 0, 0, "sst"), 8, window=4)

    going_on = fresh()
    expected = [going_on.of_draw(draw).tolist() for draw in range(40)]
    assert [fresh().of_draw(draw).tolist() for draw in reversed(range(40))] == expected[::-1]


# What a rank gets of a draw


def share(batches: TrainBatches, draw: int) -> list[Batch]:
    return batches.of_step(draw)[1]  # of the one task


def ranks(
    split: Split, size: int, world: int, micro_batches: int = 1, max_tokens: int | None = None
) -> list[TrainBatches]:
    rows = {"sst": TrainRows(split, RowStream(len(split), 0, 0, "sst"), size)}
    order = Joint().order({"sst": Size(len(split), size)}, (0, 0), 1)
    return [TrainBatches(rows, order, rank, world, micro_batches, max_tokens) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("size", [1, 3, 6, 16, 130])  # fewer rows than ranks; more than there are
def test_the_ranks_share_the_global_batch(world: int, micro_batches: int, size: int) -> None:
    split = Rows(skewed(100))
    for draw in range(3):
        shares = [share(batches, draw) for batches in ranks(split, size, world, micro_batches)]
        micros = [batch for of_rank in shares for batch in of_rank]
        rows = [row for batch in micros for row in batch.rows[batch.weight_N.numpy() > 0].tolist()]
        expected = RowStream(100, 0, 0, "sst").rows(draw * size, (draw + 1) * size)
        assert sorted(rows) == sorted(expected.tolist())  # whatever the world
        assert {len(of_rank) for of_rank in shares} == {min(micro_batches, -(-size // world))}
        assert all(any(batch.weight_N.any() for batch in of_rank) for of_rank in shares) == (size >= world)
        fillers = [batch.packed.num_tokens for batch in micros if not batch.weight_N.all()]
        assert set(fillers) <= {split.lengths(np.array(rows)).min()}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("size", "world"), [(32, 2), (32, 4), (8, 4), (6, 4)])
def test_ranks_get_nearly_equal_tokens(size: int, world: int, micro_batches: int) -> None:
    def tokens(batches: TrainBatches) -> int:
        return sum(batch.packed.num_tokens for draw in range(100) for batch in share(batches, draw))

    totals = [tokens(batches) for batches in ranks(Rows(skewed(2000)), size, world, micro_batches)]
    assert max(totals) < 1.06 * min(totals)


def of_one_step(num_tasks: int, size: int, world: int, step: int) -> tuple[list[int], list[int]]:
    """How many rows, and how many tokens, each rank gets of a step that draws every task."""
    split = Rows(skewed(1000))
    sizes = {f"t{k}": Size(1000, size) for k in range(num_tasks)}
    rows = {task: TrainRows(split, RowStream(1000, 0, 0, task), size) for task in sizes}
    order = Joint().order(sizes, (0, 0), 1)
    shares = [TrainBatches(rows, order, rank, world).of_step(step)[1] for rank in range(world)]
    real = [[batch for batch in share if batch.weight_N.any()] for share in shares]
    return [sum(len(b.rows) for b in share) for share in real], [
        sum(b.packed.num_tokens for b in share) for share in real
    ]


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize(("num_tasks", "size", "world"), [(8, 32, 64), (8, 8, 64), (3, 5, 8)])
def test_tasks_of_fewer_rows_than_ranks_fall_on_different_ranks(
    num_tasks: int, size: int, world: int, step: int
) -> None:
    numbers, tokens = of_one_step(num_tasks, size, world, step)
    assert sum(numbers) == num_tasks * size
    assert min(numbers) >= 1
    assert max(tokens) - min(tokens) <= max(skewed(1000))


@pytest.mark.parametrize("step", [0, 1, 7])
def test_no_rank_gets_the_longest_row_of_every_task(step: int) -> None:
    _, one_task = of_one_step(1, 64, 64, step)
    _, tokens = of_one_step(8, 64, 64, step)
    assert max(one_task) - min(one_task) > 50
    assert max(tokens) - min(tokens) <= max(skewed(1000))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("max_tokens", [1, 100, 300, 10**6])
def test_micro_batches_keep_within_max_tokens(world: int, micro_batches: int, max_tokens: int) -> None:
    split = Rows(skewed(100))
    for draw in range(3):
        shares = [share(batches, draw) for batches in ranks(split, 32, world, micro_batches, max_tokens)]
        (number,) = {len(of_rank) for of_rank in shares}  # the same on every rank
        micros = [batch for of_rank in shares for batch in of_rank]
        assert all(batch.packed.num_tokens <= max_tokens or len(batch.rows) == 1 for batch in micros)
        assert sum(int(batch.weight_N.sum()) for batch in micros) == 32
        total = sum(batch.packed.num_tokens for batch in micros)
        # No more of them than it takes: half-full ones could have been joined.
        assert number <= max(micro_batches, 2 * total / world / max_tokens + 1)


def test_max_tokens_worked_by_hand() -> None:
    # 9 + 5 | 7 + 4 on the one rank: 14 and 11 tokens fit into 15, and the lone 25 would not.
    (batches,) = ranks(Rows([9, 5, 7, 4]), 4, world=1, max_tokens=15)
    assert sorted(batch.packed.num_tokens for batch in share(batches, 0)) == [12, 13]


@pytest.mark.parametrize(
    "mixer",
    [Joint(), RoundRobin(when_dry="drop_out"), Temperature(draws_per_step=3), Temperature(draw="balanced")],
    ids=lambda mixer: mixer.kind,
)
def test_a_step_is_the_same_from_the_start_and_after_a_resume(mixer: AnyMixer) -> None:
    sizes = {"sst": Size(40, 8), "sts": Size(11, 3)}

    def fresh(rank: int = 0, world: int = 1) -> TrainBatches:
        rows = {
            task: TrainRows(Rows(skewed(size.rows)), RowStream(size.rows, 0, 0, task), size.batch_size, window=4)
            for task, size in sizes.items()
        }
        return TrainBatches(rows, mixer.order(sizes, (0, 0), 1, steps=30), rank, world)

    def content(step: int, *ranks: TrainBatches) -> list[tuple[str, int]]:
        batches = [batch for of_rank in ranks for batch in of_rank.of_step(step)[1]]
        return sorted((b.task, row) for b in batches for row in b.rows[b.weight_N.numpy() > 0].tolist())

    going_on = fresh()
    expected = [content(step, going_on) for step in range(30)]
    assert [content(step, fresh()) for step in range(30)] == expected
    assert [content(step, fresh(0, 2), fresh(1, 2)) for step in range(30)] == expected


def test_a_row_of_a_large_step_costs_some_moves_in_a_heap() -> None:
    size = 64 * 64
    (batches, *_) = ranks(Rows(skewed(100_000)), size, world=64)

    def seconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def pairs() -> None:
        heap = [(0, hand) for hand in range(64)]
        for length in range(size):
            total, hand = heap[0]
            heapreplace(heap, (total + length, hand))

    # The best of five of both, taken in turns, as other work may slow some.
    taken = [(seconds(lambda step=step: batches.of_step(step)), seconds(pairs)) for step in range(5)]  # type: ignore[misc]
    step_s, pairs_s = (min(column) for column in zip(*taken, strict=True))
    assert step_s < 8 * pairs_s  # about 3; when each row's length was looked up by itself, 19


@given(lengths=st.lists(st.integers(1, 512), max_size=40), hands=st.integers(1, 9))
def test_a_deal_is_fair(lengths: list[int], hands: int) -> None:
    dealt = deal(np.array(lengths, dtype=np.int64), hands)
    assert len(dealt) == len(lengths)
    assert set(dealt.tolist()) == set(range(min(hands, len(lengths))))  # empty only for want of rows
    totals = np.bincount(dealt, weights=lengths, minlength=hands)
    assert max(totals) - min(totals) <= max(lengths, default=0)


def test_a_deal_worked_by_hand() -> None:
    # 9 | 7, then 5 to the 7, 4 to the 9, 3 to the 12, 2 to the 13
    assert deal(np.array([2, 3, 4, 5, 7, 9]), 2).tolist() == [0, 1, 0, 1, 1, 0]


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
    fullest = split.lengths(rows).sum()
    assert len(batches) <= 2 * fullest / max_tokens + 1  # no two neighbours could have been one


def test_evaluation_of_no_rows_is_nothing() -> None:
    assert list(eval_batches("sst", Rows([3]), np.arange(0), 10)) == []


# Ahead of the model


def test_items_are_made_ahead_and_come_in_order() -> None:
    made: list[int] = []

    def make(index: int) -> int:
        made.append(index)
        return index * index

    items = prefetched(make, range(5), ahead=2)
    assert next(items) == 0
    while len(made) < 3:  # two more are under way without being asked for
        time.sleep(0.001)
    assert list(items) == [1, 4, 9, 16]
    assert made == [0, 1, 2, 3, 4]
    assert list(prefetched(make, range(0))) == []


def test_the_next_item_is_made_while_the_model_computes() -> None:
    made = [Event() for _ in range(6)]

    def make(index: int) -> int:
        made[index].set()
        return index

    for index in prefetched(make, range(6)):
        # So long does the model compute; in vain, if the next item were made when it is asked for.
        assert made[min(index + 1, 5)].wait(limit(60))


def test_an_error_in_the_thread_is_the_callers() -> None:
    def make(index: int) -> int:
        return 1 // (2 - index)

    items = prefetched(make, range(5))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(items)
