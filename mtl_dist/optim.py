"""How a step moves the weights: a hand-built AdamW, ordered rules over parameter names, the learning rate by the step.

A rule names parameters by a regular expression and sets some aspects of them. Each aspect of a parameter is decided by
the first matching rule that sets it, so a rule about decay does not hide a later one about learning rates:

    rules:
      - {match: '(bias|norm\\.weight)$', weight_decay: 0}
      - {match: '^encoder\\.', layer_decay: 0.95}
      - {match: '.*'}
"""

import math
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_dist.config import Config, Pattern, UserError

# Bounded, so that their products are numbers.
Rate = Annotated[float, Field(gt=0, le=1e15)]
WeightDecay = Annotated[float, Field(ge=0, le=1e15)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(gt=0, le=1)]

FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu", "hpu")


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), in a few kernels for all parameters together.

    Both bias corrections go into the step size (Kingma & Ba 2015, end of section 2). With eps scaled to match, this is
    `torch.optim.AdamW`, down to the state: each loads the other's state dict.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Heads of tasks that sat out some steps lag behind the rest, so each step count gets an update of its own.
            params_by_step = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    params_by_step[self._count_step(param)].append(param)
            for step, params in params_by_step.items():
                self._update(params, step, group)
        return loss

    def _count_step(self, param: Tensor) -> int:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)  # on the CPU, where reading it does not wait for the GPU
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        return int(state["step"])

    def _update(self, params: list[Tensor], step: int, group: dict[str, Any]) -> None:
        grads: list[Any] = [param.grad for param in params]
        means = [self.state[param]["exp_avg"] for param in params]
        squares = [self.state[param]["exp_avg_sq"] for param in params]
        lr, (beta1, beta2) = group["lr"], group["betas"]
        correction = math.sqrt(1 - beta2**step)

        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, group["eps"] * correction)
        torch._foreach_addcdiv_(params, means, denominators, -lr * correction / (1 - beta1**step))


class Schedule(Config):
    """The learning rate as a share of `lr`: climbs in equal steps over the warm-up, then follows `decay`."""

    warmup_steps: NonNegativeInt = 0
    warmup_share: Share = 0.0  # the same as a share of all steps; give one or the other

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_share:
            raise ValueError(f"give warmup_steps ({self.warmup_steps}) or warmup_share ({self.warmup_share}), not both")
        return self

    def factor(self, step: int, total_steps: int) -> float:
        """What to multiply `lr` by at `step`, counted from 0; `total_steps` is one past the last."""
        warmup = self.warmup_steps or round(self.warmup_share * total_steps)
        if step < warmup:
            return (step + 1) / warmup
        return self.decay((step - warmup) / (total_steps - warmup) if step < total_steps else 1.0)

    @abstractmethod
    def decay(self, progress: float) -> float:
        """The factor after the warm-up, when `progress` goes from 0 to 1."""


class Constant(Schedule):
    """Stays at `lr`."""

    kind: Literal["constant"] = "constant"

    def decay(self, progress: float) -> float:
        return 1.0


class Linear(Schedule):
    """Falls on a straight line."""

    kind: Literal["linear"] = "linear"
    final_share: Share = 0.0  # of `lr`, reached at the end

    def decay(self, progress: float) -> float:
        return 1 - (1 - self.final_share) * progress


class Cosine(Schedule):
    """Falls along half a cosine wave."""

    kind: Literal["cosine"] = "cosine"
    final_share: Share = 0.0  # of `lr`, reached at the end

    def decay(self, progress: float) -> float:
        return self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * progress)) / 2


AnySchedule = Annotated[Constant | Linear | Cosine, Field(discriminator="kind")]


EVERYTHING: Sequence[str] = (".",)


class Rule(Config):
    """What holds for the parameters that `match` fits; an aspect left out is for later rules to decide."""

    match: Pattern
    lr_scale: Rate | None = None  # the learning rate, as a share of `lr`
    layer_decay: Decay | None = None  # multiplies it once more for each layer below the top one; embeddings come last
    weight_decay: WeightDecay | None = None  # in place of the optimizer's
    freeze: bool | None = None


class Average(Config):
    """The model that is scored and kept has a running mean of the weights: average = d x average + (1 - d) x weights.

    After t steps d is t / (t + 9) until that is `decay`, so that the first weights are soon forgotten.
    """

    decay: float = Field(0.999, gt=0, lt=1)

    def share(self, steps: int) -> float:
        """How far the average goes towards the weights, after so many steps of a stage."""
        return 1 - min(self.decay, steps / (steps + 9))


class OptimConfig(Config):
    """AdamW, its learning rate over time, and what differs between parameters."""

    lr: Rate = 1e-5
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-6
    weight_decay: WeightDecay = 0.0
    implementation: Literal["auto", "foreach", "fused"] = "auto"  # foreach: ours; fused: torch's; auto: fused on CUDA
    schedule: AnySchedule = Constant()
    average: Average | None = None  # by default the model as it is
    rules: list[Rule] = Field([Rule(match=r"(bias|norm\.weight)$", weight_decay=0.0), Rule(match=".*")])


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    device_type: str,
    trains: Sequence[str] = EVERYTHING,
    idle: Collection[str] = (),
) -> Optimizer:
    """AdamW over what the rules let train of that which `trains` matches, but for `idle` ones; `requires_grad` is set
    to agree.
    """
    parameters = dict(named_parameters)
    _check_rules(config.rules, parameters)
    for pattern in trains:
        _refuse_unmatched("trains", pattern, parameters)
    num_layers = 1 + max((_layer_of(name) for name in parameters), default=-1)
    params_by_setting = defaultdict(list)
    for name, param in parameters.items():
        setting = _setting_of(name, config)
        trained = name not in idle and any(re.search(pattern, name) for pattern in trains)
        param.requires_grad_(trained and not setting["freeze"])
        if param.requires_grad:
            lr_scale = setting["lr_scale"] * setting["layer_decay"] ** _depth(name, num_layers)
            params_by_setting[lr_scale, setting["weight_decay"]].append(param)
    if not params_by_setting:
        raise UserError("optim.rules freeze every parameter that the stage trains; leave some to train")

    groups = [
        {
            "name": f"lr x {lr_scale:.4g}, decay {weight_decay:g}",
            "params": params,
            "lr": config.lr * lr_scale,
            "lr_scale": lr_scale,
            "weight_decay": weight_decay,
        }
        for (lr_scale, weight_decay), params in params_by_setting.items()
    ]
    if config.implementation == "foreach" or (config.implementation == "auto" and device_type != "cuda"):
        return AdamW(groups, betas=config.betas, eps=config.eps)
    if device_type not in FUSED_DEVICES:
        raise UserError(f"optim.implementation is 'fused', which torch lacks on '{device_type}'; use 'auto'")
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Gives each group its share of `lr`; the rate is written every step, so there is no scheduler state to save."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _check_rules(rules: list[Rule], names: Collection[str]) -> None:
    for i, rule in enumerate(rules):
        _refuse_unmatched(f"optim.rules[{i}]", rule.match, names)
    for name in names:
        if not any(re.search(rule.match, name) for rule in rules):
            raise UserError(f"optim.rules match nothing for '{name}'; end the list with a '.*' rule")


def _refuse_unmatched(where: str, pattern: str, names: Collection[str]) -> None:
    if not any(re.search(pattern, name) for name in names):
        near = get_close_matches(pattern, {part for name in names for part in name.split(".")}, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"{where} matches no parameter: '{pattern}'{hint}")


def _setting_of(name: str, config: OptimConfig) -> dict[str, Any]:
    setting = {"lr_scale": 1.0, "layer_decay": 1.0, "weight_decay": config.weight_decay, "freeze": False}
    for rule in reversed(config.rules):  # the first one writes last, and so wins
        if re.search(rule.match, name):
            setting |= rule.model_dump(exclude={"match"}, exclude_none=True)
    return setting


def _layer_of(name: str) -> int:
    layer = re.match(r"encoder\.layers\.(\d+)\.", name)
    return int(layer[1]) if layer else -1


def _depth(name: str, num_layers: int) -> int:
    """How far below the top layer: 0 for the top layer and all above it, `num_layers` for the embeddings."""
    if name.startswith("encoder.embeddings"):
        return num_layers
    return num_layers - 1 - _layer_of(name) if _layer_of(name) >= 0 else 0
