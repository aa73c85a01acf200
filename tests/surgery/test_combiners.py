"""The weights of every combiner: numbers worked by hand, TorchJD's results, and the laws that a method claims to obey.

python -m pytest tests/surgery/test_combiners.py
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torchjd import aggregation, scalarization
from torchjd.linalg import QuadprogProjector

from mtl_dist.surgery.combiners import (
    DWA,
    FAMO,
    IMTLG,
    MGDA,
    AlignedMTL,
    AnyCombiner,
    AnyGramCombiner,
    AnyLossCombiner,
    Balanced,
    CAGrad,
    GradVac,
    GramCombiner,
    LossCombiner,
    Mean,
    NashMTL,
    PCGrad,
    Random,
    State,
    Sum,
    Uncertainty,
    UPGrad,
    cagrad,
    gradvac,
    mgda,
    nash_mtl,
    pcgrad,
)

# Shape suffixes: T = tasks, P = parameters. A matrix of gradients is J_TP.


class Tempered(GramCombiner):
    """Half-way from the sum to `balanced`: a combiner of one's own, as the docs show it."""

    kind: Literal["tempered"] = "tempered"

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        norm_T = gram_TT.diagonal().sqrt()
        return torch.where(norm_T > 0, (norm_T[norm_T > 0].mean() / norm_T).sqrt(), 0.0)


@dataclass(frozen=True)
class Method:
    """A combiner and what it claims. One more combiner is one more entry below."""

    combiner: GramCombiner
    total: float  # of the weights of four orthogonal gradients of norm 1
    harms_none: bool = False  # the combined gradient has no negative inner product with any task's
    directions_only: bool = False  # its direction does not depend on the norms of the tasks' gradients
    averages: bool = False  # it is a mean over all tasks, those of zero gradient included
    grows: int = 1  # s times the gradients: s ** grows times the combination


METHODS = {
    "sum": Method(Sum(), 4),
    "mean": Method(Mean(), 1, averages=True),
    "pcgrad": Method(PCGrad(), 4),
    "pcgrad, mean": Method(PCGrad(reduction="mean"), 1, averages=True),
    "gradvac": Method(GradVac(), 4),
    "cagrad": Method(CAGrad(), 1.5, averages=True),
    "cagrad, c = 1": Method(CAGrad(c=1.0), 2, averages=True, harms_none=True),
    "mgda": Method(MGDA(), 1, harms_none=True),
    "imtl_g": Method(IMTLG(), 1, directions_only=True),
    "aligned_mtl": Method(AlignedMTL(), 1, averages=True),
    "nash_mtl": Method(NashMTL(), 2, harms_none=True, directions_only=True, grows=0),
    "nash_mtl, no limit": Method(NashMTL(max_norm=None), 4, harms_none=True, directions_only=True, grows=0),
    "upgrad": Method(UPGrad(), 1, averages=True, harms_none=True),
    "balanced": Method(Balanced(), 4, directions_only=True),
    "one's own": Method(Tempered(), 4),
}
# Random weights are a mere function of the generator; they obey what follows from their sum alone.
EVERY = METHODS | {"random": Method(Random(), 4)}

GRAM_COMBINERS = {name: method.combiner for name, method in EVERY.items()}
LOSS_COMBINERS: dict[str, LossCombiner] = {
    "uncertainty": Uncertainty(),
    "dwa": DWA(window_steps=2),
    "famo": FAMO(),
}

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_combiner = pytest.mark.parametrize("combiner", GRAM_COMBINERS.values(), ids=GRAM_COMBINERS)
each_loss_combiner = pytest.mark.parametrize("combiner", LOSS_COMBINERS.values(), ids=LOSS_COMBINERS)


def claiming(claim: str) -> pytest.MarkDecorator:
    claimants = {name: method.combiner for name, method in METHODS.items() if getattr(method, claim)}
    return pytest.mark.parametrize("combiner", claimants.values(), ids=claimants)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(seed: int, tasks: int = 4, parameters: int = 9) -> Tensor:
    """Random ones whose norms differ by about e."""
    generator = rng(seed)
    scale_T1 = torch.randn(tasks, 1, generator=generator, dtype=torch.float64).exp()
    return scale_T1 * torch.randn(tasks, parameters, generator=generator, dtype=torch.float64)


def weights(combiner: GramCombiner, J_TP: Tensor, seed: int = 0, state: State | None = None) -> Tensor:
    names = [f"task{i}" for i in range(len(J_TP))]
    return combiner.weights(J_TP @ J_TP.T, names, {} if state is None else state, rng(seed))


def test_the_table_has_every_combiner() -> None:
    assert {type(combiner) for combiner in GRAM_COMBINERS.values()} == {*get_args(AnyGramCombiner), Tempered}
    assert {type(combiner) for combiner in LOSS_COMBINERS.values()} == {*get_args(AnyLossCombiner)}


@pytest.mark.parametrize("combiner", get_args(AnyGramCombiner) + get_args(AnyLossCombiner))
def test_a_kind_alone_is_a_config(combiner: type[GramCombiner | LossCombiner]) -> None:
    assert TypeAdapter(AnyCombiner).validate_python({"kind": combiner.model_fields["kind"].default}) == combiner()


# ------------------------------------------------------------------------------------------------------------- laws


@each_combiner
@pytest.mark.parametrize("norm", [1e-18, 0.0, 3.0, 1e18])
def test_one_task_alone_has_weight_one(combiner: GramCombiner, norm: float) -> None:
    assert weights(combiner, torch.full((1, 1), norm, dtype=torch.float64)).tolist() == [1.0]


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_weights_of_orthogonal_gradients_sum_to_what_the_docs_say(method: Method) -> None:
    weight_T = weights(method.combiner, torch.eye(4, dtype=torch.float64))
    assert weight_T.sum().item() == pytest.approx(method.total, rel=1e-7)


def outcomes(combiner: GramCombiner, J_TP: Tensor) -> set[tuple[float, ...]]:
    """Of three tasks, over all orders in which a method may visit them."""
    return {tuple(round(weight, 5) for weight in weights(combiner, J_TP, seed).tolist()) for seed in range(60)}


@each_method
@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_the_tasks_does_not_matter(method: Method, seed: int) -> None:
    J_TP = gradients(seed, tasks=3, parameters=4)
    J_TP[1] -= J_TP[0]
    permuted = {(b, c, a) for a, b, c in outcomes(method.combiner, J_TP)}
    assert outcomes(method.combiner, J_TP[[1, 2, 0]]) == permuted


def test_an_order_is_drawn_where_it_matters() -> None:
    J_TP = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    assert len(outcomes(PCGrad(), J_TP)) > 1 and len(outcomes(GradVac(), J_TP)) > 1
    assert all(len(outcomes(combiner, J_TP)) == 1 for combiner in (CAGrad(), MGDA(), NashMTL(), UPGrad()))


@each_combiner
def test_the_generator_alone_decides_what_is_drawn(combiner: GramCombiner) -> None:
    J_TP = gradients(0, tasks=6, parameters=4)
    torch.manual_seed(1)
    first = weights(combiner, J_TP, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, weights(combiner, J_TP, seed=5))


@each_method
@pytest.mark.parametrize("scale", [1e-9, 7.0, 1e9])
def test_scaled_gradients(method: Method, scale: float) -> None:
    J_TP = gradients(3)
    combined = weights(method.combiner, J_TP) @ J_TP
    rescaled = weights(method.combiner, scale * J_TP) @ (scale * J_TP)
    torch.testing.assert_close(rescaled, scale**method.grows * combined, rtol=1e-6, atol=0)


@claiming("directions_only")
@pytest.mark.parametrize("seed", range(3))
def test_the_direction_does_not_depend_on_norms(combiner: GramCombiner, seed: int) -> None:
    J_TP = gradients(seed)
    one, other = (weights(combiner, M_TP) @ M_TP for M_TP in (J_TP, J_TP * torch.tensor([[3.0], [0.1], [1.0], [40.0]])))
    assert torch.cosine_similarity(one, other, dim=0).item() == pytest.approx(1, abs=1e-9)


@claiming("harms_none")
@pytest.mark.parametrize("seed", range(20))
def test_no_task_is_harmed(combiner: GramCombiner, seed: int) -> None:
    J_TP = gradients(seed, tasks=2 + seed % 5)
    J_TP[0] -= 2 * J_TP[1]
    combined_P = weights(combiner, J_TP) @ J_TP
    assert combined_P.norm() > 0
    assert ((J_TP @ combined_P) / (J_TP.norm(dim=1) * combined_P.norm())).min() > -1e-6


@pytest.mark.parametrize("combiner", [Sum(), PCGrad(), GradVac(), CAGrad(), IMTLG(), AlignedMTL()])
def test_the_law_of_no_harm_is_not_empty(combiner: GramCombiner) -> None:
    # Those that do not claim it do harm a task in one case or another.
    harms = []
    for seed in range(60):
        J_TP = gradients(seed, tasks=6, parameters=6)
        harms.append((J_TP @ (weights(combiner, J_TP) @ J_TP)).min().item())
    assert min(harms) < -1e-3


@each_method
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_zero_gradient_changes_nothing_for_the_others(method: Method, place: int) -> None:
    J_TP = gradients(8)
    with_zero = torch.cat([J_TP[:place], torch.zeros(1, 9, dtype=torch.float64), J_TP[place:]])
    # A generator visits five tasks in other orders than four; gradients in agreement leave nothing to visit.
    if isinstance(method.combiner, PCGrad | GradVac):
        J_TP, with_zero = J_TP.abs(), with_zero.abs()
    weight_T = weights(method.combiner, with_zero)
    assert weight_T.isfinite().all()
    share = 4 / 5 if method.averages else 1
    torch.testing.assert_close(
        weight_T @ with_zero, share * (weights(method.combiner, J_TP) @ J_TP), rtol=1e-6, atol=1e-9
    )


@each_combiner
def test_nothing_but_zero_gradients(combiner: GramCombiner) -> None:
    assert weights(combiner, torch.zeros(3, 5, dtype=torch.float64)).isfinite().all()


@each_method
def test_identical_gradients_count_alike_and_keep_their_direction(method: Method) -> None:
    J_TP = torch.tensor([[3.0, 4.0]], dtype=torch.float64).repeat(3, 1)
    weight_T = weights(method.combiner, J_TP)
    assert (weight_T > 0.01).all()
    torch.testing.assert_close(weight_T, weight_T.mean().expand(3), rtol=1e-5, atol=0)


HARD = {
    "norms far apart": lambda J_TP: J_TP * torch.tensor([[1e-18], [1e18], [1.0], [1e-9], [1e9]]),
    "tiny": lambda J_TP: 1e-18 * J_TP / J_TP.norm(dim=1, keepdim=True),
    "huge": lambda J_TP: 1e18 * J_TP / J_TP.norm(dim=1, keepdim=True),
    "opposite": lambda J_TP: torch.cat([J_TP[:4], -J_TP[:1]]),
    "nearly opposite": lambda J_TP: torch.cat([J_TP[:4], -3 * J_TP[:1] + 1e-9 * J_TP[4:]]),
    "nearly opposite, in fp32": lambda J_TP: torch.cat([J_TP[:4], -J_TP[:1]]).float(),
    "all opposite": lambda J_TP: torch.cat([J_TP[:1], -J_TP[:1], J_TP[:1], -2 * J_TP[:1], 1e-9 * J_TP[:1]]),
    "twice the same": lambda J_TP: torch.cat([J_TP[:4], J_TP[:1]]),
    "nearly the same": lambda J_TP: J_TP[:1] + 1e-9 * J_TP,
    "of rank two": lambda J_TP: J_TP[:, :2],
    "summing to zero": lambda J_TP: torch.cat([J_TP[:4], -J_TP[:4].sum(0, keepdim=True)]),
    "one so small that its square is zero": lambda J_TP: torch.cat([J_TP[:4], 1e-170 * J_TP[4:]]),
}


@each_combiner
@pytest.mark.parametrize("case", HARD.values(), ids=HARD)
def test_weights_are_finite_however_hard_the_case(combiner: GramCombiner, case: Callable[[Tensor], Tensor]) -> None:
    state: State = {}
    for seed in range(5):
        J_TP = case(gradients(seed, tasks=5))
        weight_T = weights(combiner, J_TP, seed, state)
        assert weight_T.isfinite().all()
        assert weight_T.dtype == torch.float64
        # Few methods ever blow gradients up: Nash-MTL's length is its own, and IMTL-G divides by what the parts leave.
        if not isinstance(combiner, NashMTL | IMTLG | Random):
            assert (weight_T @ J_TP.double()).norm() <= 2.01 * J_TP.double().norm(dim=1).sum()
    assert json.loads(json.dumps(state, allow_nan=False)) == state


@each_combiner
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_weights_and_not_in_the_state(combiner: GramCombiner, value: float) -> None:
    state: State = {}
    J_TP = gradients(1)
    weights(combiner, J_TP, state=state)
    before = json.dumps(state)
    J_TP[2, 3] = value
    assert weights(combiner, J_TP, state=state).isnan().all()
    assert json.dumps(state) == before


@each_combiner
def test_the_state_survives_a_checkpoint_and_a_change_of_tasks(combiner: GramCombiner) -> None:
    def run(saved: bool) -> list[list[float]]:
        state: State = {}
        results = []
        for step, tasks in enumerate((["a", "b", "c"], ["c", "a"], ["b"], ["d", "a", "b", "c"]) * 3):
            J_TP = gradients(step, len(tasks)) + 0.5  # so that targets rise
            results.append(combiner.weights(J_TP @ J_TP.T, tasks, state, rng(step)).tolist())
            state = json.loads(json.dumps(state)) if saved else state
        return results

    assert run(saved=True) == run(saved=False)


# -------------------------------------------------------------------------------------------------- numbers by hand

ORTHOGONAL = [[1.0, 0.0], [0.0, 2.0]]
CONFLICT = [[1.0, 0.0], [-1.0, 1.0]]

BY_HAND: dict[str, tuple[GramCombiner, list[list[float]], list[float]]] = {
    "mean": (Mean(), CONFLICT, [1 / 2, 1 / 2]),
    # Norms 1 and 2 are both made 1.5.
    "balanced": (Balanced(), ORTHOGONAL, [1.5, 0.75]),
    # g1 loses its part against g2 -> (.5, .5) = g1 + g2 / 2; g2 against g1 -> (0, 1) = g2 + g1.
    "pcgrad": (PCGrad(), CONFLICT, [2.0, 1.5]),
    "pcgrad, mean": (PCGrad(reduction="mean"), CONFLICT, [1.0, 0.75]),
    "pcgrad without a conflict": (PCGrad(), ORTHOGONAL, [1.0, 1.0]),
    # Targets start at 0, where turning is projecting.
    "gradvac at first": (GradVac(), CONFLICT, [2.0, 1.5]),
    # g0 = 1/2, so d is in [1/4, 3/4]; min(2 d, -d) is largest at 1/4 = 2 x 1/2 - 3/4.
    "cagrad, opposite": (CAGrad(), [[2.0], [-1.0]], [0.5, 0.75]),
    # g0 = (1/2, 1), a ball of radius |g0| / 2 about it; g1 is worse off and remains so: d goes along g1 alone.
    "cagrad, orthogonal": (CAGrad(), ORTHOGONAL, [0.5 + 5**0.5 / 4, 0.5]),
    "cagrad, c = 0": (CAGrad(c=0.0), CONFLICT, [1 / 2, 1 / 2]),
    # (.8, .4): the foot of the perpendicular from zero on the line from (1, 0) to (0, 2).
    "mgda": (MGDA(), ORTHOGONAL, [0.8, 0.2]),
    # From (1, 0) to (2, 1) all is longer than (1, 0) itself.
    "mgda at a corner": (MGDA(), [[1.0, 0.0], [2.0, 1.0]], [1.0, 0.0]),
    "mgda of opposite gradients": (MGDA(), [[2.0], [-1.0]], [1 / 3, 2 / 3]),
    # (2/3, 2/3) has the same part along both axes.
    "imtl_g": (IMTLG(), ORTHOGONAL, [2 / 3, 1 / 3]),
    "imtl_g of opposite gradients": (IMTLG(), [[2.0], [-1.0]], [1 / 3, 2 / 3]),
    # The second direction is cut to the length of the first.
    "aligned_mtl": (AlignedMTL(), ORTHOGONAL, [1 / 2, 1 / 4]),
    # w1 = 1 / w1 and 4 w2 = 1 / w2.
    "nash_mtl, no limit": (NashMTL(max_norm=None), ORTHOGONAL, [1.0, 0.5]),
    # The same, sqrt(2) long, cut to 1.
    "nash_mtl": (NashMTL(), ORTHOGONAL, [0.5**0.5, 0.5 * 0.5**0.5]),
    # Two tasks: half of PCGrad.
    "upgrad": (UPGrad(), CONFLICT, [1.0, 0.75]),
    "upgrad of opposite gradients": (UPGrad(), [[2.0], [-1.0]], [1 / 2 * (1 + 1 / 2), 1 / 2 * (1 + 2)]),
}


@pytest.mark.parametrize(("combiner", "rows", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_weights_by_hand(combiner: GramCombiner, rows: list[list[float]], expected: list[float]) -> None:
    actual = weights(combiner, torch.tensor(rows, dtype=torch.float64))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_pcgrad_of_three_tasks_in_both_orders() -> None:
    J_TP = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    found = {tuple(weight.tolist()) for weight in (pcgrad(J_TP @ J_TP.T, rng(seed)) for seed in range(30))}
    # g1 becomes g1 + g2 / 2 + g3 / 2 either way. g2 and g3 are orthogonal: g2 becomes g2 + g1, which conflicts with g3
    # and gets g3 / 2 if that comes after g1; likewise g3.
    assert found == {(3.0, 1.5, 1.5), (3.0, 1.5, 2.0), (3.0, 2.0, 1.5), (3.0, 2.0, 2.0)}


@pytest.mark.parametrize("seed", range(10))
def test_pcgrad_equals_the_algorithm_on_the_gradients_themselves(seed: int) -> None:
    J_TP = gradients(seed, tasks=6, parameters=2)  # crowded: a projected gradient may even point away from what it was
    generator = rng(seed)
    combined_P = torch.zeros(2, dtype=torch.float64)
    for i, g_P in enumerate(J_TP):
        projected_P = g_P.clone()
        for j in torch.randperm(6, generator=generator).tolist():
            if j != i and projected_P @ J_TP[j] < 0:
                projected_P -= projected_P @ J_TP[j] / J_TP[j].square().sum() * J_TP[j]
        combined_P += projected_P
    torch.testing.assert_close(pcgrad(J_TP @ J_TP.T, rng(seed)) @ J_TP, combined_P)


def test_a_gradvac_target_is_met_and_moves() -> None:
    gram_TT = torch.eye(2, dtype=torch.float64)
    target_TT = torch.tensor([[0.0, 0.6], [0.0, 0.0]], dtype=torch.float64)
    # g1 -> (1, .75), 1.25 long, whose cosine with g2 is .6; g2 is where its target has it.
    torch.testing.assert_close(gradvac(gram_TT, target_TT, 0.5, rng(0)), torch.tensor([1.0, 1.75], dtype=torch.float64))
    assert target_TT.tolist() == [[0.0, 0.3], [0.0, 0.0]]  # half-way from .6 to the cosine that was, 0


def test_a_gradvac_target_of_one_turns_a_gradient_within_bounds() -> None:
    weight_T = gradvac(torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64), 0.01, rng(0))
    assert weight_T.tolist() == [101.0, 101.0]


def test_gradvac_keeps_its_targets_by_pair() -> None:
    state: State = {}
    gram_TT = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    GradVac(beta=0.5).weights(gram_TT, ["a", "b"], state, rng(0))
    assert state == {"a|b": 0.25, "b|a": 0.25}
    GradVac(beta=0.5).weights(gram_TT, ["b", "c"], state, rng(0))
    assert state == {"a|b": 0.25, "b|a": 0.25, "b|c": 0.25, "c|b": 0.25}
    GradVac(beta=0.5).weights(torch.eye(2), ["c", "a"], state, rng(0))
    assert state == {"a|b": 0.25, "b|a": 0.25, "b|c": 0.25, "c|b": 0.25, "a|c": 0.0, "c|a": 0.0}


def test_random_weights_sum_to_the_number_of_tasks_and_are_even_on_average() -> None:
    drawn = torch.stack([weights(Random(), gradients(0), seed) for seed in range(400)])
    torch.testing.assert_close(drawn.sum(1), torch.full((400,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(drawn.mean(0), torch.ones(4, dtype=torch.float64), rtol=0, atol=0.2)
    assert drawn.min() > 0 and drawn.std() > 0.3


# -------------------------------------------------------------------------------------- against TorchJD, and optimality

# By default it would change the matrix by 1e-4.
exact_projector = QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
REFERENCES: dict[str, tuple[GramCombiner, Callable[[], Any], float]] = {
    "pcgrad": (PCGrad(), aggregation.PCGrad, 1e-9),
    "gradvac": (GradVac(beta=0.1), lambda: aggregation.GradVac(beta=0.1, eps=0.0), 1e-9),
    "cagrad": (CAGrad(c=0.4), lambda: aggregation.CAGrad(c=0.4, norm_eps=1e-8), 1e-3),  # theirs is an approximation
    "cagrad, c = 1": (CAGrad(c=1.0), lambda: aggregation.CAGrad(c=1.0, norm_eps=1e-8), 1e-3),
    "mgda": (MGDA(), lambda: aggregation.MGDA(epsilon=1e-7, max_iters=1000), 5e-2),  # so is this, of Frank and Wolfe
    "imtl_g": (IMTLG(), aggregation.IMTLG, 1e-9),
    "aligned_mtl": (AlignedMTL(), aggregation.AlignedMTL, 1e-9),
    "upgrad": (UPGrad(), lambda: aggregation.UPGrad(projector=exact_projector), 1e-6),
}


@pytest.mark.parametrize(("combiner", "make", "bound"), REFERENCES.values(), ids=REFERENCES)
@pytest.mark.parametrize("tasks", [2, 3, 5, 8])
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_torchjd(
    combiner: GramCombiner,
    make: Callable[[], Any],
    bound: float,
    tasks: int,
    reverse: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # TorchJD draws its orders from the global state: here both visit tasks from the first to the last, or back.
    def ordered(n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.arange(n).flip(0) if reverse else torch.arange(n)

    monkeypatch.setattr(torch, "randperm", ordered)
    aggregator = make()
    state: State = {}
    for step in range(6):
        J_TP = gradients(100 * tasks + step, tasks, parameters=12)
        expected_P = aggregator(J_TP)
        actual_P = weights(combiner, J_TP, state=state) @ J_TP
        assert (actual_P - expected_P).norm() <= bound * expected_P.norm()


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
def test_nash_mtl_equals_torchjd_where_that_has_converged() -> None:
    converged = 0
    for seed in range(8):
        J_TP = gradients(seed, tasks=3 + seed % 4, parameters=12)
        aggregator = aggregation.NashMTL(len(J_TP), max_norm=0.0, optim_niter=100)
        expected_P = aggregator(J_TP)
        # A solution of G w = 1 / w is sqrt(T) long.
        if expected_P.norm().item() == pytest.approx(len(J_TP) ** 0.5, rel=1e-6):
            converged += 1
            combined_P = nash_mtl(J_TP @ J_TP.T) @ J_TP
            torch.testing.assert_close(combined_P, expected_P, rtol=0, atol=2e-6)
    assert converged >= 3


@pytest.mark.parametrize("tasks", [2, 7, 20])
def test_nash_mtl_solves_its_equation(tasks: int) -> None:
    J_TP = gradients(tasks, tasks, parameters=40)
    weight_T = nash_mtl(J_TP @ J_TP.T)
    product_T = weight_T * (J_TP @ J_TP.T @ weight_T)
    torch.testing.assert_close(product_T, torch.ones_like(product_T), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(10))
def test_mgda_is_the_shortest_of_all(seed: int) -> None:
    # In four dimensions, all on one side: many gradients are in use on the way that are not in the end.
    J_TP = gradients(seed, tasks=3 + 2 * seed, parameters=24 if seed < 5 else 4)
    J_TP[:, 0] = J_TP.norm(dim=1) / 4
    weight_T = mgda(J_TP @ J_TP.T)
    combined_P = weight_T @ J_TP
    # What makes it so: along the combination no gradient has less than that itself, and those in use as much.
    excess_T = (J_TP @ combined_P) / combined_P.square().sum() - 1
    assert weight_T.min() >= 0 and weight_T.sum().item() == pytest.approx(1)
    assert excess_T.min() > -1e-6 and (excess_T * weight_T).abs().max() < 1e-6


@pytest.mark.parametrize("c", [0.2, 0.5, 0.9, 3.0])
@pytest.mark.parametrize("seed", range(6))
def test_cagrad_is_the_best_of_its_ball(c: float, seed: int) -> None:
    J_TP = gradients(seed, tasks=2 + 3 * seed, parameters=24)
    mean_P = J_TP.mean(dim=0)
    added_T = cagrad(J_TP @ J_TP.T, c) - 1 / len(J_TP)
    combined_P = mean_P + added_T @ J_TP
    # What makes it so: on the surface, it is away from the mean along gradients of the worst-off tasks alone.
    assert ((combined_P - mean_P).norm() / (c * mean_P.norm())).item() == pytest.approx(1, rel=1e-6)
    gain_T = J_TP @ combined_P / (mean_P.norm() * J_TP.norm(dim=1).min())
    assert added_T.min() >= 0
    assert ((gain_T - gain_T.min()) * added_T / added_T.sum()).max() < 1e-6


def test_sixty_four_tasks() -> None:
    J_TP = gradients(0, tasks=64, parameters=100)
    for method in METHODS.values():
        weight_T = weights(method.combiner, J_TP)
        assert weight_T.isfinite().all()
        if method.harms_none:
            combined_P = weight_T @ J_TP
            assert ((J_TP @ combined_P) / (J_TP.norm(dim=1) * combined_P.norm())).min() > -1e-5


# --------------------------------------------------------------------------------------------- weights from the losses


@each_loss_combiner
def test_loss_weights_are_one_at_first_and_change_with_the_losses(combiner: LossCombiner) -> None:
    state: State = {}
    assert combiner.loss_weights(["a", "b"], state) == {"a": 1.0, "b": 1.0}
    for step in range(8):
        combiner.observe({"a": 2.0 * 0.8**step, "b": 2.0}, state)
    now = combiner.loss_weights(["a", "b", "new"], state)
    assert now["a"] != now["b"] and all(weight > 0 for weight in now.values())


@each_loss_combiner
def test_a_loss_that_is_not_finite_leaves_no_trace(combiner: LossCombiner) -> None:
    state: State = {}
    for step in range(6):
        combiner.observe({"a": 1.0 + step, "b": [math.nan, math.inf, 1.0][step % 3]}, state)
    combiner.observe({"a": 0.0, "b": 1e300}, state)
    assert all(math.isfinite(weight) for weight in combiner.loss_weights(["a", "b", "c"], state).values())
    json.dumps(state, allow_nan=False)


@each_loss_combiner
def test_the_state_of_loss_weights_survives_a_checkpoint(combiner: LossCombiner) -> None:
    def run(saved: bool) -> list[dict[str, float]]:
        state: State = {}
        results = []
        for step in range(20):
            losses = {task: 1 + math.sin(step + i) / 3 for i, task in enumerate("abc") if (step + i) % 3}
            results.append(combiner.loss_weights(list(losses), state))
            combiner.observe(losses, state)
            state = json.loads(json.dumps(state)) if saved else state
        return results

    assert run(saved=True) == run(saved=False)


def test_uncertainty_by_hand_and_in_the_end() -> None:
    state: State = {}
    combiner = Uncertainty(lr=0.5)
    combiner.observe({"a": 3.0}, state)
    assert state == {"a": 1.0}  # 0 - .5 (1 - 3)
    assert combiner.loss_weights(["a"], state) == {"a": math.exp(-1)}
    for _ in range(200):
        combiner.observe({"a": 4.0, "b": 0.25}, state)
    assert combiner.loss_weights(["a", "b"], state) == pytest.approx({"a": 1 / 4, "b": 4})
    combiner.observe({"a": 1e30}, state)
    assert combiner.loss_weights(["a"], state) == {"a": math.exp(-10)}


def test_dwa_equals_torchjd() -> None:
    ours, state = DWA(window_steps=3, temperature=1.5), State()
    theirs = scalarization.DWA(temperature=1.5)
    for step in range(15):
        losses = torch.tensor([1.0 / (1 + step), 2.0 - 0.1 * step, 1.0], dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(theirs(losses), losses)
        assert list(ours.loss_weights(["a", "b", "c"], state).values()) == pytest.approx(expected.tolist())
        ours.observe(dict(zip("abc", losses.tolist(), strict=True)), state)
        if step % 3 == 2:
            theirs.step()
    assert expected.tolist() != [1.0, 1.0, 1.0]


def test_dwa_of_tasks_drawn_unevenly() -> None:
    combiner, state = DWA(window_steps=2, temperature=1.0), State()
    for losses in ({"a": 4.0, "b": 1.0}, {"a": 2.0}, {"b": 2.0}, {"a": 6.0}):
        combiner.observe(losses, state)
    # The mean loss of a goes from 3 to 6, that of b from 1 to 2: either doubles.
    assert combiner.loss_weights(["a", "b"], state) == pytest.approx({"a": 1, "b": 1})
    combiner.observe({"a": 6.0}, state)
    combiner.observe({"a": 6.0}, state)
    # a stays, so its rate is 1; b was not drawn, and keeps its rate of 2.
    expected = {"a": 2 * math.e / (math.e + math.e**2), "b": 2 * math.e**2 / (math.e + math.e**2)}
    assert combiner.loss_weights(["a", "b"], state) == pytest.approx(expected)
    assert combiner.loss_weights(["b"], state) == pytest.approx({"b": expected["b"]})


def test_famo_by_hand() -> None:
    state: State = {}
    combiner = FAMO(lr=0.5, decay=0.1)
    combiner.observe({"a": 1.0, "b": 3.0}, state)
    # z = (1/2, 1/2); z / loss = (1/2, 1/6), and its mean is 1/3.
    assert combiner.loss_weights(["b", "a"], state) == pytest.approx({"a": 1.5, "b": 0.5})
    assert combiner.loss_weights(["b"], state) == pytest.approx({"b": 0.5})
    # a improves by log 2, b not at all; the mean by log 2 / 2. The logits go .5 x 1/2 x log 2 / 2 either way.
    combiner.observe({"a": 0.5, "b": 3.0}, state)
    assert state["logits"] == pytest.approx({"a": -math.log(2) / 8, "b": math.log(2) / 8})
    assert state["losses"] == {"a": 0.5, "b": 3.0}
    # Nothing improves: all that moves the logits is their decay.
    combiner.observe({"b": 3.0}, state)
    assert state["logits"] == pytest.approx({"a": -0.95 * math.log(2) / 8, "b": 0.95 * math.log(2) / 8})
