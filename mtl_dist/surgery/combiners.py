"""How much each task counts in a step: weights from the inner products of the tasks' gradients, or from their losses.

The combined gradient of every method is a linear combination of the tasks' gradients, and the T x T matrix of their
inner products (Gram matrix) is all that its weights depend on. So nothing here knows of models or of machines.

A method is a function, its settings are a class with a `kind`. To add one: write both, list the class at the end.
"""

# Shape suffixes: T = tasks of the step, S = those whose gradient is not zero, U = S and one row more.

from abc import abstractmethod
from collections.abc import Sequence
from math import exp, isfinite, log, sqrt
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from mtl_dist.config import Config

TINY = 1e-12  # rounding, in units of unit gradients
# CAGrad's and Nash-MTL's weights grow as gradients come to cancel each other. This keeps a task's part below 10,000
# times the combination, or fp32 would leave nothing but rounding of it, and costs 1e-8 of exactness.
LIMIT = 1e-8

State = dict[str, Any]  # what a method remembers from step to step: numbers by task, as JSON can hold them


# --------------------------------------------------------------------------------- weights from the inner products


class GramCombiner(Config):
    """A method that looks at the gradients."""

    def weights(
        self,
        gram_TT: Tensor,
        tasks: Sequence[str] | None = None,
        state: State | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """How often each task's gradient goes into the combined one, in fp64 on the CPU.

        The tasks are those of this step, in the matrix's order; by default they are called by their numbers. A method
        that remembers does so in `state`, and one that draws lots does so from `generator`, by default torch's own,
        which ranks do not share. One task alone has weight 1. Where the matrix is not finite (fp16 overflowed) the
        weights are NaN, so that the combined gradient is not finite either, and `state` stays.
        """
        tasks = list(map(str, range(len(gram_TT)))) if tasks is None else list(tasks)
        state = {} if state is None else state
        generator = torch.default_generator if generator is None else generator
        gram_TT = gram_TT.detach().to("cpu", torch.float64)
        if not gram_TT.isfinite().all():
            return torch.full((len(tasks),), torch.nan, dtype=torch.float64)
        if len(tasks) == 1 or not gram_TT.any():
            return torch.ones(len(tasks), dtype=torch.float64)
        return self.combine(gram_TT, tasks, state, generator)

    @abstractmethod
    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        """The weights of two or more tasks, from a finite matrix that is not all zero."""


class Sum(GramCombiner):
    """The sum of the gradients: plain training."""

    kind: Literal["sum"] = "sum"

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        return gram_TT.new_ones(len(tasks))


class Mean(GramCombiner):
    """The mean of the gradients."""

    kind: Literal["mean"] = "mean"

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        return gram_TT.new_full((len(tasks),), 1 / len(tasks))


class Balanced(GramCombiner):
    """Scales every gradient to the mean of their norms: no projection, only a fair share. Equal norms: weights 1."""

    kind: Literal["balanced"] = "balanced"

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        norm_T = gram_TT.diagonal().sqrt()
        return torch.where(norm_T > 0, norm_T[norm_T > 0].mean() / norm_T, 0.0)


class Random(GramCombiner):
    """Random weights that sum to T (Lin et al. 2022): what the others have to beat."""

    kind: Literal["random"] = "random"

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        return len(tasks) * torch.randn(len(tasks), generator=generator, dtype=torch.float64).softmax(0)


def pcgrad(gram_TT: Tensor, generator: torch.Generator) -> Tensor:
    """Each gradient loses its part against every other one that it conflicts with (Yu et al. 2020, Algorithm 1).

    Row i of `mix_TT` is task i's gradient as coefficients over the raw ones, so a projection costs T numbers and no
    communication.
    """
    gram = gram_TT.numpy()  # whose small products take a sixth of torch's time
    mix_TT = np.eye(len(gram))
    for i, mix_T in enumerate(mix_TT):
        for j in torch.randperm(len(gram), generator=generator).tolist():
            overlap = mix_T @ gram[:, j]
            if j != i and overlap < 0 < gram[j, j]:
                mix_T[j] -= overlap / gram[j, j]
    return torch.from_numpy(mix_TT.sum(0))


class PCGrad(GramCombiner):
    """Projects conflicts away, pair by pair. Orthogonal gradients: weights 1, or 1 / T with the mean."""

    kind: Literal["pcgrad"] = "pcgrad"
    reduction: Literal["sum", "mean"] = "sum"  # of the projected gradients; the paper's is the sum

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        weight_T = pcgrad(gram_TT, generator)
        return weight_T if self.reduction == "sum" else weight_T / len(tasks)


def gradvac(gram_TT: Tensor, target_TT: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """Each gradient is turned towards the others until their cosines reach a target (Wang et al. 2021, Algorithm 1).

    The target of a pair is the moving average of its cosines so far; it is updated in place.
    """
    norms = gram_TT.diagonal().sqrt().tolist()
    mix_TT = torch.eye(len(gram_TT), dtype=gram_TT.dtype)
    for i, mix_T in enumerate(mix_TT):
        norm, along_T = norms[i], gram_TT[i]
        for j in torch.randperm(len(gram_TT), generator=generator).tolist():
            if j == i or not norm * norms[j] > 0:
                continue
            cosine = min(max(along_T[j].item() / norm / norms[j], -1.0), 1.0)
            target = target_TT[i, j].item()
            if cosine < target:
                # A target near 1 would turn a gradient all the way onto another, and scale it up without bound.
                sine, target_sine = sqrt(1 - cosine**2), max(sqrt(1 - target**2), 0.01)
                mix_T[j] += norm / norms[j] * (target * sine / target_sine - cosine)
                along_T = mix_T @ gram_TT
                norm = sqrt(max((mix_T @ along_T).item(), 0.0))
            target_TT[i, j] += beta * (cosine - target)
    return mix_TT.sum(dim=0)


class GradVac(GramCombiner):
    """PCGrad with a target for every pair's cosine in the place of 0. Orthogonal gradients: weights 1 at first.

    Its state is the target of each pair: under "sst|sts" of the gradient of sst, as it is turned towards sts.
    """

    kind: Literal["gradvac"] = "gradvac"
    beta: float = Field(0.01, ge=0, le=1)  # how much of a target the newest cosine is

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        target_TT = torch.tensor([[state.get(f"{a}|{b}", 0.0) for b in tasks] for a in tasks], dtype=torch.float64)
        weight_T = gradvac(gram_TT, target_TT, self.beta, generator)
        for a, target_T in zip(tasks, target_TT.tolist(), strict=True):
            state.update({f"{a}|{b}": target for b, target in zip(tasks, target_T, strict=True) if a != b})
        return weight_T


def cagrad(gram_TT: Tensor, c: float) -> Tensor:
    """Best for the worst-off task within a ball about the mean gradient (Liu et al. 2021, Algorithm 1).

    That is, the d that maximises min_i g_i d within |d - g0| <= c |g0|. The d nearest to g0 with g_i d >= gain for all
    i is g0 plus nonnegative parts of the gradients; Newton's method finds the gain that puts it on the ball's surface.
    """
    some_T, norm_S, cosine_SS = _units(gram_TT)
    cosine_SS.diagonal().add_(LIMIT)
    along_S = cosine_SS @ norm_S / len(gram_TT)  # g0's part along each unit gradient
    mean_norm = (norm_S @ along_S / len(gram_TT)).sqrt()
    weight_T = gram_TT.new_full((len(gram_TT),), 1 / len(gram_TT))
    if c > 0:
        gain = norm_S.min() * mean_norm * (1 + c)  # more than any d of the ball can have; the distance is convex in it
        for _ in range(100):
            part_S = _nonnegative_least_squares(cosine_SS, gain / norm_S - along_S)
            distance = (part_S @ cosine_SS @ part_S).sqrt()
            if distance <= c * mean_norm * (1 + TINY):
                break
            gain -= (distance - c * mean_norm) * distance / (part_S / norm_S).sum()
        weight_T[some_T] += part_S / norm_S
    return weight_T


class CAGrad(GramCombiner):
    """Between the mean gradient and MGDA's direction. Orthogonal gradients of equal norm: weights (1 + c) / T.

    Where no direction improves all tasks, the push away from the mean is made of gradients that cancel each other
    (TorchJD takes no step there).
    """

    kind: Literal["cagrad"] = "cagrad"
    c: NonNegativeFloat = 0.5  # radius of the ball as a share of the mean gradient's norm; from 1 on no task is harmed

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        return cagrad(gram_TT, self.c)


def mgda(gram_TT: Tensor) -> Tensor:
    """The shortest convex combination (Désidéri 2012; Sener & Koltun 2018): what improves all tasks, or zero.

    Exact, where Frank-Wolfe's method, the usual one, stops near it. With weights w >= 0 of any sum, |combination|^2 +
    (sum of w - 1)^2 is least along the same line.
    """
    some_T, norm_S, cosine_SS = _units(gram_TT)
    share_S = norm_S.min() / norm_S
    part_S = share_S * _nonnegative_least_squares(cosine_SS + share_S.outer(share_S), share_S)
    return _spread(part_S / part_S.sum(), some_T)


class MGDA(GramCombiner):
    """Favours the tasks with small gradients. Weights sum to 1; orthogonal gradients of equal norm: 1 / T."""

    kind: Literal["mgda"] = "mgda"

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        return mgda(gram_TT)


def imtl_g(gram_TT: Tensor) -> Tensor:
    """The combination, of weights that sum to 1, with equal parts along all gradients (Liu et al. 2021, IMTL-G)."""
    some_T, norm_S, cosine_SS = _units(gram_TT)
    share_S = norm_S.min() / norm_S
    # Unknown are the weights of unit gradients and the part: cosine @ weight = part for all, and share @ weight = 1.
    system_UU = torch.zeros(len(norm_S) + 1, len(norm_S) + 1, dtype=torch.float64)
    system_UU[:-1, :-1], system_UU[:-1, -1], system_UU[-1, :-1] = cosine_SS, -1, share_S
    weight_S = share_S * torch.linalg.pinv(system_UU, rtol=TINY)[:-1, -1]
    return _spread(weight_S / weight_S.sum(), some_T)


class IMTLG(GramCombiner):
    """Counts directions, not norms. Weights sum to 1, may be negative, and are large where gradients nearly depend."""

    kind: Literal["imtl_g"] = "imtl_g"

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        return imtl_g(gram_TT)


def aligned_mtl(gram_TT: Tensor) -> Tensor:
    """The mean of the nearest orthogonal gradients, as long as the weakest direction (Senushkin et al. 2023)."""
    values_T, vectors_TT = torch.linalg.eigh(gram_TT / gram_TT.trace())
    kept_T = values_T > values_T.max() * len(gram_TT) * torch.finfo(torch.float64).eps
    kept_values, kept_vectors = values_T[kept_T], vectors_TT[:, kept_T]
    balance_TT = kept_vectors * (kept_values.min() / kept_values).sqrt() @ kept_vectors.T
    weight_T: Tensor = balance_TT.mean(dim=1)
    return weight_T


class AlignedMTL(GramCombiner):
    """Cuts all directions to the weakest, so steps get small as gradients get alike. Orthogonal, equal norm: 1 / T."""

    kind: Literal["aligned_mtl"] = "aligned_mtl"

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        return aligned_mtl(gram_TT)


def nash_mtl(gram_TT: Tensor) -> Tensor:
    """The bargaining solution: positive weights w with G w = 1 / w (Navon et al. 2022, section 3).

    It is where w G w / 2 - sum log w is least, which Newton's method finds for sure; the paper's code, and TorchJD's,
    go from one approximation to the next and may stop early.
    """
    some_T, norm_S, cosine_SS = _units(gram_TT)
    cosine_SS.diagonal().add_(LIMIT)
    part_S = torch.full_like(norm_S, len(norm_S) ** -0.5)
    for _ in range(100):
        slope_S = cosine_SS @ part_S - 1 / part_S
        step_S = torch.linalg.solve(cosine_SS + (part_S**-2).diag(), slope_S)
        decrement = (slope_S @ step_S).clamp(min=0).sqrt()
        part_S = part_S - step_S / (1 + decrement if decrement > 0.25 else 1)  # all parts stay positive
        if decrement < TINY:
            break
    return _spread(part_S / gram_TT.diagonal()[some_T].sqrt(), some_T)


class NashMTL(GramCombiner):
    """Nash's fair bargain: counts directions, not norms. Orthogonal gradients of norm 1: weights 1, before `max_norm`.

    By the paper's equation the combination is sqrt(T) long, whatever the gradients' norms; so by default every step's
    is 1 long, and a learning rate means something else than with `sum`.
    """

    kind: Literal["nash_mtl"] = "nash_mtl"
    max_norm: PositiveFloat | None = 1.0  # of the combined gradient, before any other clipping; null for no limit

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        weight_T = nash_mtl(gram_TT)
        norm = (weight_T @ gram_TT @ weight_T).clamp(min=0).sqrt().item()
        return weight_T if self.max_norm is None or norm <= self.max_norm else weight_T * (self.max_norm / norm)


def upgrad(gram_TT: Tensor) -> Tensor:
    """The mean of the gradients, each moved the least that makes it harm no task (Quinton & Rey 2024).

    Nonnegative parts of all are added to each. Exact; TorchJD adds 1e-4 of the squared norms to the diagonal.
    """
    some_T, norm_S, cosine_SS = _units(gram_TT)
    added_SS = torch.stack([_nonnegative_least_squares(cosine_SS, -cosine_S) for cosine_S in cosine_SS])
    return _spread(1 + norm_S @ added_SS / norm_S, some_T) / len(gram_TT)


class UPGrad(GramCombiner):
    """The combination that harms no task. Orthogonal gradients: weights 1 / T."""

    kind: Literal["upgrad"] = "upgrad"

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        return upgrad(gram_TT)


def _units(gram_TT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which gradients are not zero, their norms, of which the largest is 1, and their cosines.

    To solve for parts of unit gradients is as exact for norms of 1e-18 beside 1e18 as for equal ones.
    """
    some_T = gram_TT.diagonal() > 0
    norm_S = gram_TT.diagonal()[some_T].sqrt()
    cosine_SS = (gram_TT[some_T][:, some_T] / norm_S / norm_S[:, None]).clamp(-1, 1)
    return some_T, norm_S / norm_S.max(), cosine_SS


def _spread(weight_S: Tensor, some_T: Tensor) -> Tensor:
    """The weights of all tasks: 0 of those whose gradient is zero."""
    weight_T = torch.zeros(len(some_T), dtype=weight_S.dtype)
    weight_T[some_T] = weight_S
    return weight_T


def _nonnegative_least_squares(matrix_SS: Tensor, right_S: Tensor) -> Tensor:
    """The x >= 0 for which x A x / 2 - b x is least (Lawson & Hanson 1974, chapter 23)."""
    # In numpy: torch takes three times as long for so small a matrix. The 1e-10 gives equal gradients equal parts.
    A, b = matrix_SS.numpy() + 1e-10 * np.eye(len(matrix_SS)), right_S.numpy()
    x, free = np.zeros_like(b), np.zeros(len(b), dtype=bool)
    for _ in range(3 * len(b)):
        pull = np.where(free, -np.inf, b - A @ x)
        if pull.max() <= TINY * np.abs(b).max():
            break
        free[pull.argmax()] = True
        while True:
            best = np.zeros_like(b)
            best[free] = np.linalg.solve(A[np.ix_(free, free)], b[free])
            negative = best < 0
            if not negative.any():
                break
            # As far towards the best as all stay nonnegative; whatever gets to zero is held there.
            x += (x[negative] / (x - best)[negative]).min() * (best - x)
            free &= x > TINY * x.max()
        x = best
    return torch.from_numpy(x)


# ------------------------------------------------------------------------------------------ weights from the losses


class LossCombiner(Config):
    """A method that needs no gradients of single tasks: it weights the losses, and so the heads' gradients, too.

    Weights come on top of the tasks' own. There is none for those alone: the sum of the losses is `sum`.
    """

    @abstractmethod
    def loss_weights(self, tasks: list[str], state: State) -> dict[str, float]:
        """What the losses of a step's tasks are multiplied with, from what the steps before it have shown."""

    def observe(self, losses: dict[str, float], state: State) -> None:
        """Learns from a step: of each of its tasks the mean loss over the rows of all ranks, before any weight."""
        self.learn({task: loss for task, loss in losses.items() if isfinite(loss)}, state)

    @abstractmethod
    def learn(self, losses: dict[str, float], state: State) -> None:
        """Updates the state; the losses are finite."""


class Uncertainty(LossCombiner):
    """Weights exp(-s), where gradient steps on exp(-s) loss + s move each task's s (Kendall et al. 2018).

    That leads to 1 / loss. The state is each task's s, the logarithm of a variance; it stays within [-10, 10].
    """

    kind: Literal["uncertainty"] = "uncertainty"
    lr: PositiveFloat = 0.01

    def loss_weights(self, tasks: list[str], state: State) -> dict[str, float]:
        return {task: exp(-state.get(task, 0.0)) for task in tasks}

    def learn(self, losses: dict[str, float], state: State) -> None:
        for task, loss in losses.items():
            s = state.get(task, 0.0)
            state[task] = min(max(s - self.lr * (1 - exp(-s) * loss), -10.0), 10.0)


class DWA(LossCombiner):
    """Weights ~ exp(rate / temperature), rate = the last window's mean loss / the one's before (Liu et al. 2019).

    Over all tasks seen, the weights are 1 on average; at first they are 1.
    """

    kind: Literal["dwa"] = "dwa"
    window_steps: PositiveInt = 100  # the paper's window is an epoch
    temperature: PositiveFloat = 2.0  # the larger, the more even

    def loss_weights(self, tasks: list[str], state: State) -> dict[str, float]:
        means = {task: [1.0, 1.0] for task in tasks} | state.get("means", {})  # of the last window and the one before
        rates = {task: last / before if before > 0 else 1.0 for task, (last, before) in means.items()}
        weights = _softmax({task: rate / self.temperature for task, rate in rates.items()})
        return {task: len(weights) * weights[task] for task in tasks}

    def learn(self, losses: dict[str, float], state: State) -> None:
        sums = state.setdefault("sums", {})
        for task, loss in losses.items():
            total, draws = sums.get(task, [0.0, 0])
            sums[task] = [total + loss, draws + 1]
        state["steps"] = state.get("steps", 0) + 1
        if state["steps"] % self.window_steps == 0:
            means = state.setdefault("means", {})
            for task, (total, draws) in state.pop("sums").items():
                last = total / draws
                means[task] = [last, means[task][0] if task in means else last]


class FAMO(LossCombiner):
    """Weights ~ z / loss, z = softmax(logits): tasks that improve faster than others lose weight (Liu et al. 2023).

    The paper sees improvement by a second pass over the batch just trained on (Algorithm 2). Here it is the change of a
    task's loss from one draw to the next, and the last draw's loss stands for this one's: noisier, but free. Over all
    tasks seen, the weights are 1 on average: T times the paper's.
    """

    kind: Literal["famo"] = "famo"
    lr: PositiveFloat = 0.025
    decay: NonNegativeFloat = 0.001  # pulls the logits to 0

    def loss_weights(self, tasks: list[str], state: State) -> dict[str, float]:
        losses = state.get("losses", {})
        part = {task: z / losses[task] for task, z in _softmax(state.get("logits", {})).items()}
        return {task: len(part) * part[task] / sum(part.values()) if task in part else 1.0 for task in tasks}

    def learn(self, losses: dict[str, float], state: State) -> None:
        logits, last = state.setdefault("logits", {}), state.setdefault("losses", {})
        losses = {task: max(loss, 1e-8) for task, loss in losses.items()}
        z = _softmax(logits)
        gain = {task: log(last[task]) - log(losses[task]) if task in losses else 0.0 for task in last}
        mean_gain = sum(z[task] * gain[task] for task in last)
        for task in last:
            logits[task] -= self.lr * (z[task] * (gain[task] - mean_gain) + self.decay * logits[task])
        for task, loss in losses.items():
            logits.setdefault(task, 0.0)
            last[task] = loss


def _softmax(values: dict[str, float]) -> dict[str, float]:
    powers = {task: exp(value - max(values.values())) for task, value in values.items()}
    return {task: power / sum(powers.values()) for task, power in powers.items()}


AnyGramCombiner = (
    Sum | Mean | Balanced | Random | PCGrad | GradVac | CAGrad | MGDA | IMTLG | AlignedMTL | NashMTL | UPGrad
)
AnyLossCombiner = Uncertainty | DWA | FAMO
AnyCombiner = Annotated[AnyGramCombiner | AnyLossCombiner, Field(discriminator="kind")]
