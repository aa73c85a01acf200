"""What the inner products of the tasks' gradients say: how far they agree, and what a combination made of them.

All of it comes from the K x K numbers that the combination needs anyway.
"""

# Shape suffixes: K = tasks of the step, S = shared parameters.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isfinite
from statistics import fmean
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Conflict:
    """One step's task gradients, of the shared parameters or of those of one layer."""

    norm: dict[str, float]
    weight: dict[str, float]  # in the combined gradient; where layers have their own, on average over the parameters
    cosine: dict[str, float]  # by pair, in the order of the alphabet: "sst.sts"
    conflicting_pairs: float  # share of pairs whose cosine is negative
    conflicting_parameters: float  # share of parameters for which some pair's gradients have a negative inner product
    norm_ratio: float  # of the combined gradient to the plain sum, on average over the parameters
    similarity_to_sum: float  # cosine of the combined gradient and the plain sum
    layers: "dict[str, Conflict] | None" = None  # the same of each layer by itself, where that was asked for

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Conflict":
        """What `dataclasses.asdict` was made of."""
        layers = values["layers"]
        return cls(**values | {"layers": layers and {name: cls.from_dict(layer) for name, layer in layers.items()}})


def mean_of(conflicts: list[Conflict]) -> dict[str, Any] | None:
    """The numbers of several steps, on average; of tasks and pairs over the steps that had them."""
    finite = [one for one in conflicts if all(map(isfinite, one.norm.values()))]  # fp16 may have overflowed
    return _mean(finite) if finite else None


def _mean(values: list[Any]) -> Any:
    """Of numbers their mean; of what holds them by name, the mean of each name over those that have it."""
    if isinstance(values[0], Conflict):
        values = [{name: value for name, value in vars(one).items() if value is not None} for one in values]
    if isinstance(values[0], dict):
        names = dict.fromkeys(name for each in values for name in each)
        return {name: _mean([each[name] for each in values if name in each]) for name in names}
    return fmean(values)


def conflict(
    tasks: list[str],
    grams_SKK: Tensor,
    weights_SK: Tensor,
    layers: Mapping[str, Sequence[int]] | None = None,
) -> Conflict:
    """What a step's Gram matrices, one for each shared parameter, and its weights say.

    `layers` are the places of each layer's parameters.
    """
    gram_KK = grams_SKK.sum(0)
    norm_K = gram_KK.diagonal().clamp(min=0).sqrt()
    cosine_KK = (gram_KK / (norm_K[:, None] * norm_K).clamp(min=1e-300)).tolist()
    # By name: steps may draw the same tasks in another order.
    pairs = combinations(sorted(range(len(tasks)), key=tasks.__getitem__), 2)
    cosine = {f"{tasks[i]}.{tasks[j]}": cosine_KK[i][j] for i, j in pairs}
    negative_S = (grams_SKK < 0).any(-1).any(-1)
    # Squared norms, for each parameter: of the combination, of the plain sum, and their inner product.
    after_S = _inner(grams_SKK, weights_SK, weights_SK)
    before_S = grams_SKK.sum((-1, -2))
    both_S = _inner(grams_SKK, weights_SK, weights_SK.new_ones(weights_SK.shape))
    moved_S = before_S > 0
    ratio = (after_S[moved_S].clamp(min=0) / before_S[moved_S]).sqrt()
    total = (after_S.sum() * before_S.sum()).clamp(min=0).sqrt()
    return Conflict(
        norm=dict(zip(tasks, norm_K.tolist(), strict=True)),
        weight=dict(zip(tasks, weights_SK.mean(0).tolist(), strict=True)),
        cosine=cosine,
        conflicting_pairs=sum(value < 0 for value in cosine.values()) / max(1, len(cosine)),
        conflicting_parameters=negative_S.double().mean().item(),
        norm_ratio=ratio.mean().item() if len(ratio) else 1.0,
        similarity_to_sum=(both_S.sum() / total).item() if total > 0 else 1.0,
        layers={name: conflict(tasks, grams_SKK[list(at)], weights_SK[list(at)]) for name, at in layers.items()}
        if layers
        else None,
    )


def _inner(grams_SKK: Tensor, left_SK: Tensor, right_SK: Tensor) -> Tensor:
    return (left_SK[:, None] @ grams_SKK @ right_SK[:, :, None]).reshape(-1)
