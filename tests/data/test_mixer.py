"""Which tasks a step draws, worked by hand where it is fixed; and the laws that every mixer obeys.

python -m pytest tests/data/test_mixer.py
"""

import time
from collections import Counter
from fractions import Fraction
from heapq import heappop, heappush
from itertools import accumulate, chain, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtl_dist.config import Config, UserError, dump, load
from mtl_dist.data.mixer import (
    BLOCK,
    Annealed,
    AnyMixer,
    Draw,
    Explicit,
    Joint,
    Mixer,
    Order,
    Proportional,
    RoundRobin,
    Sampled,
    SampledOrder,
    Sequential,
    Size,
    Sizes,
    Temperature,
    Uniform,
    UniMax,
    balanced,
)

CS224N = {"sst": Size(8544, 32), "quora": Size(141506, 32), "sts": Size(6041, 32)}
SEED = (0, 0)

FIXED: dict[str, Mixer] = {
    "joint": Joint(),
    "joint, shortest": Joint(epoch_ends="shortest"),
    "round robin": RoundRobin(),
    "round robin, drop out": RoundRobin(when_dry="drop_out"),
    "sequential": Sequential(),
}
RANDOM: dict[str, Sampled] = {
    "temperature": Temperature(),
    "annealed": Annealed(),
    "annealed over steps": Annealed(over="steps"),
    "unimax": UniMax(max_epochs=1000),
    "proportional": Proportional(draws_per_step=1),
    "uniform": Uniform(draws_per_step=7),
}
BALANCED = {f"{name}, balanced": mixer.model_copy(update={"draw": "balanced"}) for name, mixer in RANDOM.items()}
SAMPLED = RANDOM | BALANCED
MIXERS = FIXED | SAMPLED

every_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
some_sizes = st.dictionaries(
    st.sampled_from("abcd"), st.builds(Size, rows=st.integers(1, 60), batch_size=st.integers(1, 9)), min_size=1
)


def rows(batch_size: int = 1, **rows_of: int) -> dict[str, Size]:
    return {task: Size(n, batch_size) for task, n in rows_of.items()}


def drawn(order: Order, start: int = 0, stop: int | None = None) -> list[Draw]:
    return [draw for step in range(start, order.steps if stop is None else stop) for draw in order.draws(step)]


def tasks(draws: list[Draw]) -> list[str]:
    return [task for task, _ in draws]


def written(draws: list[Draw]) -> str:
    return " ".join(f"{task}{number}" for task, number in draws)


def shares(mixer: Mixer, sizes: Sizes) -> list[float]:
    """How many of 1,000 steps' draws are each task's."""
    expected = mixer.order(sizes, SEED, epochs=1, steps=1000).expected().values()
    return [n / sum(expected) for n in expected]


# The length of an epoch


@pytest.mark.parametrize(
    ("batch_sizes", "epochs", "steps"),
    [
        # 8544 / 8 = 1068 steps; quora needs 1003.6 and sts 1006.8
        ((8, 141, 6), 1, 1068),
        ((8, 141, 6), 10, 10680),
        ((2, 35, 1), 1, 6041),
        ((32, 32, 32), 1, 4423),  # 4422.1: the last rows are a step of their own
        ((32, 32, 32), 10, 44221),  # 44220.6: but only once
        ((32, 32, 32), 0.5, 2212),
        ((32, 32, 32), 1e-9, 1),
    ],
)
def test_the_longest_task_sets_the_epoch_of_joint(batch_sizes: tuple[int, ...], epochs: float, steps: int) -> None:
    sizes = {task: Size(CS224N[task].rows, n) for task, n in zip(CS224N, batch_sizes, strict=True)}
    assert Joint().order(sizes, SEED, epochs).steps == steps


@pytest.mark.parametrize(
    ("mixer", "one", "ten"),
    [
        (Joint(epoch_ends="shortest"), 1004, 10036),  # of quora, 1003.59
        (RoundRobin(), 3 * 1068, 3 * 10680),
        (RoundRobin(when_dry="drop_out"), 1068 + 1004 + 1007, 10680 + 10036 + 10069),  # of sts, 1006.83
        (Sequential(), 1068 + 1004 + 1007, 10680 + 10036 + 10069),
        (Temperature(), 1027, 10262),  # 3078.42 draws, three a step
        (Temperature(draws_per_step=10), 308, 3079),
    ],
)
def test_the_other_mixers_epochs(mixer: Mixer, one: int, ten: int) -> None:
    sizes = {"sst": Size(8544, 8), "quora": Size(141506, 141), "sts": Size(6041, 6)}
    assert (mixer.order(sizes, SEED, 1).steps, mixer.order(sizes, SEED, 10).steps) == (one, ten)


def test_epochs_are_counted_exactly() -> None:
    # 29 / 7 is a little more to a computer, and 7 times that would round up to 30; so is 0.1.
    assert Joint().order(rows(7, a=29), SEED, 7).steps == 29
    assert Joint().order(rows(a=30), SEED, 0.1).steps == 3


@every_mixer
def test_a_stage_may_be_given_in_steps_and_may_have_none(mixer: Mixer) -> None:
    assert mixer.order(CS224N, SEED, epochs=1, steps=5).steps == 5
    nothing = mixer.order(CS224N, SEED, epochs=0)
    assert nothing.steps == 0
    assert nothing.expected() == dict.fromkeys(CS224N, 0)


def reads_every_row_each_epoch(mixer: Mixer) -> bool:
    return isinstance(mixer, Sequential | RoundRobin) or (isinstance(mixer, Joint) and mixer.epoch_ends == "longest")


@every_mixer
@given(sizes=some_sizes, epochs=st.integers(0, 9))
@settings(max_examples=50)
def test_epochs_take_as_many_steps_as_their_rows_need(mixer: Mixer, sizes: Sizes, epochs: int) -> None:
    order = mixer.order(sizes, SEED, epochs=1, steps=100)
    steps = order.steps_of(Fraction(epochs))
    assert order.steps_of(Fraction(epochs) + Fraction(1, 1000)) >= steps
    if reads_every_row_each_epoch(mixer):
        stage = mixer.order(sizes, SEED, epochs, steps)
        assert all(drawn >= epochs * sizes[task].batches for task, drawn in stage.expected().items())
        if steps and not isinstance(mixer, RoundRobin):  # whose last turn may be that of a task that was through
            shorter = mixer.order(sizes, SEED, epochs, steps - 1)
            assert any(drawn < epochs * sizes[task].batches for task, drawn in shorter.expected().items())


# Fixed orders, with as many batches as rows


def test_joint_draws_every_task_every_step() -> None:
    sizes = rows(a=3, b=2)
    assert written(drawn(Joint().order(sizes, SEED, 1))) == "a0 b0 a1 b1 a2 b2"
    assert written(drawn(Joint(epoch_ends="shortest").order(sizes, SEED, 1))) == "a0 b0 a1 b1"


def test_round_robin_draws_in_turn() -> None:
    sizes = rows(a=2, b=3, c=1)
    assert written(drawn(RoundRobin().order(sizes, SEED, 1))) == "a0 b0 c0 a1 b1 c1 a2 b2 c2"


def test_a_task_that_is_through_may_leave_its_turns_to_others() -> None:
    order = RoundRobin(when_dry="drop_out").order(rows(a=2, b=3, c=1), SEED, 2)
    assert written(drawn(order)) == "a0 b0 c0 a1 b1 b2 a2 b3 c1 a3 b4 b5"


def test_sequential_draws_one_task_after_the_other() -> None:
    sizes = {"a": Size(3, 2), "b": Size(2, 1)}  # a's second batch is half of the second epoch, which has one less
    assert written(drawn(Sequential().order(sizes, SEED, 2))) == "a0 a1 b0 b1 a2 b2 b3"
    assert written(drawn(Sequential(order=["b", "a"]).order(sizes, SEED, 2))) == "b0 b1 a0 a1 b2 b3 a2"
    assert written(drawn(Sequential().order(sizes, SEED, 1.5))) == "a0 a1 b0 b1 a2 b2"  # 1.5 of 3 steps, and up


@pytest.mark.parametrize("mixer", [RoundRobin(when_dry="drop_out"), Sequential()], ids=["drop out", "sequential"])
@given(sizes=some_sizes)
def test_an_epoch_has_the_draws_that_begin_in_it(mixer: Mixer, sizes: Sizes) -> None:
    order = mixer.order(sizes, SEED, 5)
    for epoch in range(5):
        counts = Counter(tasks(drawn(order, order.steps_of(Fraction(epoch)), order.steps_of(Fraction(epoch + 1)))))
        for task, size in sizes.items():
            first, behind = (-(-e * size.rows // size.batch_size) for e in (epoch, epoch + 1))
            assert counts[task] == behind - first


@given(sizes=st.dictionaries(st.sampled_from("abcdef"), st.builds(Size, st.integers(1, 9), st.just(1)), min_size=1))
def test_drop_out_goes_round_those_that_are_left(sizes: Sizes) -> None:
    left = {task: size.rows for task, size in sizes.items()}
    turns = []
    while any(left.values()):
        for task in sizes:
            if left[task]:
                left[task] -= 1
                turns.append(task)
    assert tasks(drawn(RoundRobin(when_dry="drop_out").order(sizes, SEED, 1))) == turns


# Probabilities


@pytest.mark.parametrize(
    ("temperature", "p"),
    [
        (1.0, [0.055, 0.907, 0.039]),
        (2.0, [0.17, 0.69, 0.14]),
        (5.0, [0.27, 0.48, 0.25]),
        ("inf", [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_temperature_evens_out_the_sizes(temperature: object, p: list[float]) -> None:
    mixer = Temperature.model_validate({"temperature": temperature})
    assert shares(mixer, CS224N) == pytest.approx(p, abs=5e-4 if temperature == 1 else 5e-3)


def test_temperature_scales_then_caps_then_roots() -> None:
    # 90, 4000, 10 -> 9, 400, 1 -> 9, 36, 1 -> 3, 6, 1
    assert shares(Temperature(scale=0.1, cap=36), rows(a=90, b=4000, c=10)) == pytest.approx([0.3, 0.6, 0.1])


def test_annealed_goes_from_the_sizes_to_nearly_even_epoch_by_epoch() -> None:
    # Alpha is 1, .6, .2, so a is drawn 32, 8, 2 times as often as b. An epoch is 16.5 steps of two draws.
    order = Annealed().order(rows(a=32, b=1), SEED, 3)
    assert order.expected() == pytest.approx(
        {"a": 34 * 32 / 33 + 32 * 8 / 9 + 34 * 2 / 3, "b": 34 / 33 + 32 / 9 + 34 / 3}
    )
    last_epoch_begun = Annealed().order(rows(a=32, b=1), SEED, 1, steps=34)
    assert last_epoch_begun.expected()["b"] == pytest.approx(34 / 33 + 32 / 9 + 2 / 3)


def test_annealed_over_steps() -> None:
    order = Annealed(over="steps").order(rows(a=32, b=1), SEED, 1, steps=3)
    assert order.expected()["b"] == pytest.approx(2 / 33 + 2 / 9 + 2 / 3)


@pytest.mark.parametrize("mixer", [Annealed(), Annealed(over="steps")], ids=["epochs", "steps"])
def test_annealed_starts_with_the_sizes(mixer: Annealed) -> None:
    assert mixer.order(rows(a=32, b=1), SEED, 1, steps=1).expected() == pytest.approx({"a": 64 / 33, "b": 2 / 33})


def test_annealed_changes_at_most_a_thousand_times() -> None:
    order = Annealed(over="steps").order(rows(a=32, b=1), SEED, 1, steps=5000)
    assert isinstance(order, SampledOrder)
    assert order.slice_starts == list(range(0, 5000, 5))
    assert order.p_EK[[0, -1], 1].tolist() == pytest.approx([1 / 33, 1 / 3])


def test_annealed_draws_each_epoch_with_its_own_probabilities() -> None:
    order = Annealed().order(rows(a=32_000, b=1_000), SEED, 3)
    for epoch, p in enumerate([1 / 33, 1 / 9, 1 / 3]):
        draws = drawn(order, epoch * 16_500, (epoch + 1) * 16_500)
        assert abs(tasks(draws).count("b") - 33_000 * p) < 3.9 * (33_000 * p * (1 - p)) ** 0.5  # once in 10,000


class InTurn(Sampled):
    """Five steps of a, then four of b, then c."""

    def slice_starts(self, order: SampledOrder) -> list[int]:
        return [0, 5, 9]

    def weights(self, order: SampledOrder) -> NDArray[np.float64]:
        return np.eye(3)


def test_probabilities_change_with_the_slices_first_step() -> None:
    order = InTurn(draws_per_step=2).order(rows(a=1, b=1, c=1), SEED, 1, steps=12)
    assert "".join(tasks(drawn(order))) == "aaaaaaaaaabbbbbbbbcccccc"
    assert order.expected() == {"a": 10, "b": 8, "c": 6}


def test_unimax_caps_the_small_and_shares_the_rest_evenly() -> None:
    # 210 draws, 70 each; a may take 2 x 10, which leaves 190.
    order = UniMax(max_epochs=2).order(rows(a=10, b=100, c=100), SEED, 1)
    assert order.expected() == pytest.approx({"a": 20, "b": 95, "c": 95})
    # a may take 15 of 70; of the 195 left b may take 30 of 97.5.
    order = UniMax(max_epochs=1.5).order(rows(a=10, c=180, b=20), SEED, 1)
    assert order.expected() == pytest.approx({"a": 15, "c": 165, "b": 30})


def test_unimax_counts_epochs_in_a_tasks_own_batches() -> None:
    # 100 + 10 draws; a may take 2 x 10 batches of ten rows.
    order = UniMax(max_epochs=2).order({"a": Size(100, 10), "b": Size(100, 1)}, SEED, 1)
    assert order.expected() == pytest.approx({"a": 20, "b": 90})


def test_unimax_refuses_more_draws_than_it_may_make() -> None:
    sizes = rows(a=10, b=21)
    with pytest.raises(
        UserError, match=r"^mixer: 31 steps draw 62 batches, max_epochs 1 allows only 31; raise it or train for less$"
    ):
        UniMax(max_epochs=1).order(sizes, SEED, 2)
    # 31 draws are 16 steps of two, one draw too many; a last step need not be full.
    assert UniMax(max_epochs=1).order(sizes, SEED, 1).expected() == pytest.approx(
        {"a": 32 * 10 / 31, "b": 32 * 21 / 31}
    )


def test_proportional_uniform_and_explicit() -> None:
    sizes = {"a": Size(10, 1), "b": Size(30, 9), "c": Size(60, 2)}
    assert shares(Proportional(), sizes) == pytest.approx([0.1, 0.3, 0.6])
    assert shares(Uniform(), sizes) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert shares(Explicit(p={"c": 3.0, "a": 1.0, "b": 0.0}), sizes) == pytest.approx([0.25, 0, 0.75])
    assert shares(Explicit(p={"a": 1e308, "b": 1e308, "c": 1e308}), sizes) == pytest.approx([1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("draw", ["random", "balanced"])
@pytest.mark.parametrize("never", ["a", "b", "c"])
def test_a_task_of_no_weight_is_never_drawn(draw: str, never: str) -> None:
    p = {"a": 1.0, "b": 2.0, "c": 3.0} | {never: 0.0}
    order = Explicit.model_validate({"p": p, "draw": draw}).order(rows(a=1, b=1, c=1), SEED, 1, steps=3000)
    assert set(tasks(drawn(order))) == set("abc") - {never}


# What the user writes


class Stage(Config):
    mixer: AnyMixer


def read(tmp_path: Path, mixer: str) -> Mixer:
    path = tmp_path / "stage.yaml"
    path.write_text(f"mixer: {mixer}\n")
    config = load(Stage, path)
    path.write_text(dump(config))
    assert load(Stage, path) == config
    return config.mixer


@pytest.mark.parametrize("inf", ["inf", ".inf"])
def test_the_temperature_may_be_infinite(tmp_path: Path, inf: str) -> None:
    assert read(tmp_path, f"{{kind: temperature, temperature: {inf}}}") == Temperature(temperature=float("inf"))


def test_sequential_is_read_with_its_order(tmp_path: Path) -> None:
    assert read(tmp_path, "{kind: sequential, order: [b, a]}") == Sequential(order=["b", "a"])


@pytest.mark.parametrize(
    ("mixer", "complaint"),
    [
        ("{kind: temprature}", "mixer.kind is 'temprature'; did you mean 'temperature'?"),
        ("{kind: temperature, temperature: 0.5}", "mixer.temperature is 0.5; must be greater than or equal to 1"),
        ("{kind: temperature, temperature: -1}", "mixer.temperature is -1; must be greater than or equal to 1"),
        ("{kind: temperature, temperature: .nan}", "mixer.temperature is NaN; must be greater than or equal to 1"),
        ("{kind: temperature, cap: 0}", "mixer.cap is 0; must be greater than 0"),
        ("{kind: unimax, max_epochs: .inf}", "mixer.max_epochs is Infinity; must be a finite number"),
        ("{kind: uniform, draws_per_step: 0}", "mixer.draws_per_step is 0; must be greater than 0"),
        ("{kind: explicit, p: {a: -1, b: 1}}", "mixer.p.a is -1; must be greater than or equal to 0"),
        ("{kind: explicit, p: {a: .nan, b: 1}}", "mixer.p.a is NaN; must be a finite number"),
        ("{kind: explicit, p: {a: 0, b: 0}}", "mixer.p: {'a': 0.0, 'b': 0.0} is zero for every task"),
    ],
)
def test_what_is_refused(tmp_path: Path, mixer: str, complaint: str) -> None:
    with pytest.raises(UserError) as refusal:
        read(tmp_path, mixer)
    assert str(refusal.value) == f"{tmp_path / 'stage.yaml'}:1: {complaint}"


@pytest.mark.parametrize(
    ("mixer", "field"),
    [
        (Explicit(p={"b": 1.0, "a": 1.0}), "p"),
        (Sequential(order=["b", "a"]), "order"),
    ],
)
def test_the_tasks_named_must_be_the_stages(mixer: Mixer, field: str) -> None:
    mixer.refuse_others(["a", "b"])
    for stage in (["a"], ["a", "c"], ["a", "b", "c"]):
        with pytest.raises(
            ValueError, match=f"^{field} names b, a; the tasks are {', '.join(stage)}; name each of them once$"
        ):
            mixer.refuse_others(stage)


def test_no_task_is_named_twice() -> None:
    with pytest.raises(ValueError, match=r"^order names a, b, a; the tasks are a, b; name each of them once$"):
        Sequential(order=["a", "b", "a"]).refuse_others(["a", "b"])


# Laws


def assert_numbered_without_gap_or_repeat(draws: list[Draw]) -> None:
    counts: Counter[str] = Counter()
    for task, number in draws:
        assert number == counts[task]
        counts[task] += 1


@every_mixer
def test_the_draws_of_a_task_are_numbered(mixer: Mixer) -> None:
    assert_numbered_without_gap_or_repeat(drawn(mixer.order(CS224N, SEED, 1, steps=2 * BLOCK)))


@pytest.mark.parametrize("mixer", FIXED.values(), ids=FIXED)
@given(sizes=some_sizes)
def test_the_draws_of_a_task_are_numbered_whatever_the_sizes(mixer: Mixer, sizes: Sizes) -> None:
    assert_numbered_without_gap_or_repeat(drawn(mixer.order(sizes, SEED, 1, steps=100)))


@every_mixer
def test_a_step_is_the_same_wherever_an_order_starts(mixer: Mixer) -> None:
    # As on another rank, or after a resume. Of three draws each, steps 1365 and 2730 reach into the next block.
    sizes = {"a": Size(16, 8), "b": Size(900, 32), "c": Size(300, 8)}
    going_on = mixer.order(sizes, SEED, 1, steps=3000)
    steps = [going_on.draws(step) for step in range(3000)]
    assert BLOCK == 4096
    for start in (0, 17, 1364, 1365, 1366, 2730, 2999):
        assert mixer.order(sizes, SEED, 1, steps=3000).draws(start) == steps[start]
    for step in (2999, 2730, 1366, 1365, 1365, 17, 0, 1500):
        assert going_on.draws(step) == steps[step]


@pytest.mark.parametrize("mixer", FIXED.values(), ids=FIXED)
@given(sizes=some_sizes, asked=st.lists(st.integers(0, 150), min_size=1))
def test_fixed_orders_can_be_asked_for_any_step(mixer: Mixer, sizes: Sizes, asked: list[int]) -> None:
    going_on, jumping = (mixer.order(sizes, SEED, 1, steps=151) for _ in range(2))
    steps = [going_on.draws(step) for step in range(151)]
    assert [jumping.draws(step) for step in asked] == [steps[step] for step in asked]


@every_mixer
def test_random_draws_alone_depend_on_the_seed_and_the_stage(mixer: Mixer) -> None:
    orders = {tuple(drawn(mixer.order(CS224N, seed, 1, steps=100))) for seed in [(0, 0), (1, 0), (0, 1), (1, 1)]}
    assert len(orders) == (4 if mixer in RANDOM.values() else 1)


@every_mixer
@given(sizes=some_sizes, steps=st.integers(0, 60))
@settings(max_examples=15)
def test_expected_draws_are_all_draws(mixer: Mixer, sizes: Sizes, steps: int) -> None:
    order = mixer.order(sizes, SEED, 1, steps=steps)
    counts, expected = Counter(tasks(drawn(order))), order.expected()
    assert list(expected) == list(sizes)
    assert sum(expected.values()) == pytest.approx(counts.total())
    if mixer in FIXED.values():
        assert expected == {task: counts[task] for task in sizes}
    elif mixer in BALANCED.values():
        assert all(abs(expected[task] - counts[task]) < 1 + 1e-5 for task in sizes)


@pytest.mark.parametrize("mixer", RANDOM.values(), ids=RANDOM)
def test_random_draws_are_as_frequent_as_expected(mixer: Sampled) -> None:
    sizes = rows(sst=9, quora=142, sts=6)
    order = mixer.order(sizes, SEED, 1, steps=30_000 // (mixer.draws_per_step or 3))
    counts = Counter(tasks(drawn(order)))
    # Chi-square of 2 degrees: exceeded once in 10,000. A p of .17 that were .18 would add 20.
    assert sum((counts[task] - n) ** 2 / n for task, n in order.expected().items()) < 18.4


def test_random_draws_do_not_depend_on_those_before() -> None:
    draws = tasks(drawn(Uniform().order(rows(a=1, b=1, c=1), SEED, 1, steps=30_000)))
    pairs = Counter(zip(draws[0::2], draws[1::2], strict=True))
    assert sum((n - 5000) ** 2 / 5000 for n in pairs.values()) < 31.8  # chi-square of 8 degrees: once in 10,000
    assert len(pairs) == 9
    assert draws[:BLOCK] != draws[BLOCK : 2 * BLOCK]


@every_mixer
def test_no_task_starves(mixer: Mixer) -> None:
    sizes = rows(small=1, large=1000)
    order = mixer.order(sizes, SEED, 1, steps=12_000)
    assert 0 < Counter(tasks(drawn(order)))["small"] == pytest.approx(order.expected()["small"], rel=0.9)


def test_a_rare_task_is_drawn_at_random() -> None:
    order = Explicit(p={"a": 1.0, "b": 999.0}).order(rows(a=1, b=1), SEED, 1, steps=10_000)
    assert 4 <= tasks(drawn(order)).count("a") <= 40  # 20 on average; beyond these once in 10,000


def test_a_rare_task_is_drawn_in_time_when_balanced() -> None:
    p = {"a": 1.0, "b": 400.0, "c": 599.0}
    order = Explicit(p=p, draw="balanced", draws_per_step=1).order(rows(a=1, b=1, c=1), SEED, 1, steps=5000)
    places = [n for n, task in enumerate(tasks(drawn(order)), start=1) if task == "a"]
    assert [-(-place // 1000) for place in places] == [1, 2, 3, 4, 5]


# Balanced draws


def off_quota(p_EK: NDArray[np.float64], starts: list[int], draws: int) -> float:
    """By how much any task was ever off its quota."""
    num_tasks = p_EK.shape[1]
    places = np.fromiter(islice(balanced(p_EK, starts), draws), np.int64)
    counts_NK = np.cumsum(places[:, None] == np.arange(num_tasks), axis=0)
    slices = np.searchsorted(starts, np.arange(draws), side="right") - 1
    return float(np.abs(counts_NK - np.cumsum(p_EK[slices], axis=0)).max())


weights = st.floats(1e-3, 1e3)


@given(weights_K=st.lists(weights, min_size=1, max_size=12))
def test_after_any_number_of_balanced_draws_each_task_is_within_one_of_its_quota(weights_K: list[float]) -> None:
    p_K = np.array(weights_K) / sum(weights_K)
    assert off_quota(p_K[None], [0], draws=500) < 1 + 1e-5


@given(
    num_tasks=st.integers(1, 6),
    lengths=st.lists(st.integers(0, 120), max_size=6),
    data=st.data(),
)
def test_the_quota_may_change_on_the_way(num_tasks: int, lengths: list[int], data: st.DataObject) -> None:
    table = st.lists(weights, min_size=num_tasks, max_size=num_tasks)
    weight_EK = np.array([data.draw(table) for _ in range(len(lengths) + 1)])
    p_EK = weight_EK / weight_EK.sum(axis=1, keepdims=True)
    starts = [0, *accumulate(lengths)]
    assert off_quota(p_EK, starts, draws=starts[-1] + 100) < 1 + 1e-5


def test_a_long_balanced_stage_stays_within_one() -> None:
    order = Temperature(draw="balanced", draws_per_step=1).order(CS224N, SEED, 1, steps=100_000)
    assert isinstance(order, SampledOrder)
    assert off_quota(order.p_EK, [0], draws=100_000) < 1 + 1e-5


def test_balanced_draws_by_hand() -> None:
    # Dates of 1/2, 1/4, 1/4: a at 2, 4, 6, 8; b and c at 4 and 8. The first date wins, of equal ones the first task.
    order = Explicit(p={"a": 2.0, "b": 1.0, "c": 1.0}, draw="balanced").order(rows(a=1, b=1, c=1), SEED, 1, steps=4)
    assert written(drawn(order)) == "a0 b0 a1 c0 a2 b1 a3 c1 a4 b2 a5 c2"


@given(ulps=st.lists(st.integers(-3, 3), min_size=4, max_size=4))
def test_another_processors_rounding_changes_no_balanced_draw(ulps: list[int]) -> None:
    p_K = np.array([8, 4, 2, 1]) / 15
    nearly_K = p_K + np.array(ulps) * np.spacing(p_K)
    exact, near = (list(islice(balanced(p[None], [0]), 300)) for p in (p_K, nearly_K))
    assert exact == near


# Cost


def seconds_per_draw(mixer: Mixer, sizes: Sizes) -> float:
    """Of about 16,000 draws and all that is made ready for them."""
    steps = -(-16_000 // len(mixer.order(sizes, SEED, 1, steps=1).draws(0)))
    start = time.process_time()
    draws = drawn(mixer.order(sizes, SEED, 1, steps=steps))
    return (time.process_time() - start) / len(draws)


def seconds_per_heap_move(tasks: int) -> float:
    """Of taking the first of so many tasks from a heap and putting it back, as the measure of this machine."""
    heap = [(float(k), k) for k in range(tasks)]
    start = time.process_time()
    for _ in range(16_000):
        when, k = heappop(heap)
        heappush(heap, (when + tasks, k))
    return (time.process_time() - start) / 16_000


def heap_moves_per_draw(mixer: Mixer, sizes: Sizes) -> float:
    """The best of five of both, taken in turns, as other work may slow some."""
    pairs = [(seconds_per_draw(mixer, sizes), seconds_per_heap_move(len(sizes))) for _ in range(5)]
    draws, moves = zip(*pairs, strict=True)
    return min(draws) / min(moves)


@every_mixer
def test_a_draw_among_a_thousand_tasks_costs_some_moves_in_a_heap(mixer: Mixer) -> None:
    rng = np.random.default_rng(0)
    sizes = {f"t{k}": Size(int(rows), 32) for k, rows in enumerate(rng.integers(1, 100_000, 1000))}
    assert heap_moves_per_draw(mixer, sizes) < 20  # at most 10, and mostly 2; a walk over all tasks takes 35 and more


@pytest.mark.parametrize("mixer", [RoundRobin(when_dry="drop_out"), Sequential()], ids=["drop out", "sequential"])
def test_short_epochs_cost_no_more(mixer: Mixer) -> None:
    sizes = {f"t{k}": Size(1 + k % 32, 32) for k in range(1000)}  # about 500 draws an epoch
    assert heap_moves_per_draw(mixer, sizes) < 10  # about 3


# Anybody's loaders


def test_names_over_loaders_are_those_of_their_batches() -> None:
    loaders = {"sst": range(6), "sts": range(2), "nli": 4}
    order = Temperature(temperature=1, draws_per_step=2, draw="balanced").order_over(loaders, seed=3, epochs=2)
    steps = list(order.names())
    assert len(steps) == order.steps == 12
    assert Counter(chain.from_iterable(steps)) == {"sst": 12, "sts": 4, "nli": 8}
    # After a resume, and on another rank: the same.
    again = Temperature(temperature=1, draws_per_step=2, draw="balanced").order_over(loaders, seed=3, epochs=2)
    assert list(again.names(start=7)) == steps[7:]
    assert list(RoundRobin().order_over({"a": 2, "b": 1}).names()) == [["a"], ["b"], ["a"], ["b"]]


def test_loaders_without_a_length_and_other_tasks_are_refused() -> None:
    with pytest.raises(UserError, match="the loader of 'sst' has no length; give its batches of an epoch instead"):
        Uniform().order_over({"sst": iter([])})  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"mixer\.p names sst; the tasks are sst, sts; name each of them once"):
        Explicit(p={"sst": 1.0}).order_over({"sst": 3, "sts": 3})
