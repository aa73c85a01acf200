"""What the inner products of the tasks' gradients say: how far they agree, and what a combination made of them.

All of it comes from the K x K numbers that the combination needs anyway.
"""

# Shape suffixes: K = tasks of the step, S = shared parameters.

from dataclasses import dataclass
from itertools import combinations
from math import isfinite
from statistics import fmean
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Conflict:
    """One step's task gradients, of the shared parameters."""

    norm: dict[str, float]
    weight: dict[str, float]  # in the combined gradient; where layers have their own, on average over the parameters
    cosine: dict[str, float]  # by pair: "sst.sts"
    conflicting_pairs: float  # share of pairs whose cosine is negative
    conflicting_parameters: float  # share of parameters for which some pair's gradients have a negative inner product
    norm_ratio: float  # of the combined gradient to the plain sum, on average over the parameters
    similarity_to_sum: float  # cosine of the combined gradient and the plain sum


def mean_of(conflicts: list[Conflict]) -> dict[str, Any] | None:
    """The numbers of several steps, on average; of tasks and pairs over the steps that had them."""
    records = [vars(one) for one in conflicts if all(map(isfinite, one.norm.values()))]  # fp16 may have overflowed
    if not records:
        return None
    means: dict[str, Any] = {}
    for name, value in records[0].items():
        values = [record[name] for record in records]
        if isinstance(value, dict):
            keys = dict.fromkeys(key for each in values for key in each)
            means[name] = {key: fmean(each[key] for each in values if key in each) for key in keys}
        else:
            means[name] = fmean(values)
    return means


def conflict(tasks: list[str], grams_SKK: Tensor, weights_SK: Tensor) -> Conflict:
    """What a step's Gram matrices, one for each shared parameter, and its weights say."""
    gram_KK = grams_SKK.sum(0)
    norm_K = gram_KK.diagonal().clamp(min=0).sqrt()
    cosine_KK = gram_KK / (norm_K[:, None] * norm_K).clamp(min=1e-300)
    pairs = list(combinations(range(len(tasks)), 2))
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
        cosine={f"{tasks[i]}.{tasks[j]}": cosine_KK[i, j].item() for i, j in pairs},
        conflicting_pairs=sum(cosine_KK[i, j].item() < 0 for i, j in pairs) / max(1, len(pairs)),
        conflicting_parameters=negative_S.double().mean().item(),
        norm_ratio=ratio.mean().item() if len(ratio) else 1.0,
        similarity_to_sum=(both_S.sum() / total).item() if total > 0 else 1.0,
    )


def _inner(grams_SKK: Tensor, left_SK: Tensor, right_SK: Tensor) -> Tensor:
    return (left_SK[:, None] @ grams_SKK @ right_SK[:, :, None]).reshape(-1)
