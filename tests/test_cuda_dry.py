"""What a GPU would see of a training: every wait of the host for it by file and function, and nothing that it refuses.

pytest tests/test_cuda_dry.py
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mtl_dist.config import load
from mtl_dist.experiment import Experiment
from mtl_dist.model.objectives import LossConfig
from mtl_dist.surgery.rows import Coming
from mtl_dist.training.engine import Engine
from mtl_dist.training.loop import train
from tests.distributed import on_ranks
from tests.pretend_cuda import CUDA, pretended_cuda, pretended_ranks

STEPS = 4
# Two of three tasks are pooled by mean, and nothing is scored: what is looked at are steps.
QUIET = [
    *(f"tasks.{task}.dev=null" for task in ("mood", "same", "near")),
    *("tasks.same.pooling=mean", "tasks.near.pooling=mean", "log.tensorboard=false", "log.every_steps=100"),
]
BF16 = ["precision=bf16", "encoder.attention_dropout=0"]  # which the varlen kernel is for
PCGRAD = "gradients.combiner.kind=pcgrad"
# These only come before the first step, or after the last one: the model goes to the GPU, and is saved.
ONCE = ("engine.py __init__", "engine.py scaling", "rows.py _lay_out", "checkpoint.py", "resume.py", "save_")


def dry(world: int, config: Path, *overrides: str, mistake: Callable[[], Any] = nullcontext) -> dict[str, Any]:
    """What is seen of a training on the first of so many GPUs."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU"):  # of the process that this runs in
        os.environ.pop(name, None)
    experiment = load(Experiment, config, [f"steps={STEPS}", *QUIET, *overrides])
    ranks = pretended_ranks(world) if world > 1 else nullcontext()
    with pretended_cuda() as gpu, ranks, mistake():
        train(experiment)
    waits: Counter[str] = Counter()
    for (what, where), number in gpu.waits.items():
        if not any(once in where for once in ONCE):
            waits[f"{where}: {what}"] += number
    kernels = Counter({place: number // STEPS for place, number in gpu.kernels.items()})
    return {"waits": dict(waits), "problems": dict(gpu.problems), "kernels": kernels, "sent": dict(gpu.sent)}


AVERAGE = "optim.average={decay: 0.9}"
PLAIN = {"training/books.py settle: event": STEPS}  # what came of a step, read while the next one is under way
SURGERY = PLAIN | {"surgery/rows.py summed: copy from the GPU": STEPS}  # the inner products


@pytest.mark.parametrize(
    ("world", "overrides", "waits"),
    [
        (1, BF16, PLAIN),
        (1, [*BF16, "gradients.accumulation=3"], PLAIN),
        (1, ["precision=fp32"], PLAIN),
        (1, ["precision=fp16"], PLAIN),
        (1, ["precision=fp16", PCGRAD], SURGERY),
        (1, [*BF16, PCGRAD], SURGERY),
        (1, [*BF16, PCGRAD, "gradients.every=4", "gradients.between=held"], PLAIN | {next(reversed(SURGERY)): 1}),
        (8, [*BF16, PCGRAD], SURGERY),
        (
            8,
            [*BF16, PCGRAD, "tasks.same.head=sbert", "tasks.same.ranking={}", "tasks.mood.r_drop=1", AVERAGE],
            SURGERY,
        ),
        (1, [*BF16, "stages=[{objective: mlm}]"], PLAIN),
        (8, [*BF16, PCGRAD, "gradients.accumulation=2", "gradients.buffer_dtype=bf16"], SURGERY),
        (8, [*BF16, PCGRAD, "gradients.reduce=reduce_scatter"], SURGERY),
        # Ours decides on the CPU whether to step. Moments that are carried on do not add to that.
        (
            1,
            [
                *BF16,
                "optim.implementation=foreach",
                "steps=null",
                "stages=[{steps: 2}, {steps: 2, carry_moments: true}]",
            ],
            PLAIN | {"training/engine.py _step_if_finite: _local_scalar_dense": STEPS},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_step_waits_once_and_with_surgery_twice(
    tiny: Path, world: int, overrides: list[str], waits: dict[str, int]
) -> None:
    (seen,) = on_ranks(1, dry, world, tiny, *overrides)
    assert seen["problems"] == {}
    assert seen["waits"] == waits


BERT = "encoder.shape={hidden_size: 24, num_hidden_layers: 12, num_attention_heads: 12, intermediate_size: 96}"


@pytest.mark.parametrize(
    ("world", "overrides", "most"),
    [
        (1, [], 30),
        (8, [], 60),
        (8, ["gradients.reduce=reduce_scatter"], 60),
        (8, ["gradients.buffer_dtype=bf16"], 60),
        (1, ["gradients.scope=layers"], 80),
    ],
)
def test_surgery_on_twelve_layers_takes_few_kernels(tiny: Path, world: int, overrides: list[str], most: int) -> None:
    (seen,) = on_ranks(1, dry, world, tiny, *BF16, BERT, PCGRAD, *overrides)
    kernels = {
        place: number
        for place, number in seen["kernels"].items()
        if place.startswith("surgery/") and place != "surgery/rows.py backward"  # which is the model's
    }
    assert 10 < sum(kernels.values()) <= most, kernels


def adds_a_cpu_tensor() -> Any:
    forward = Engine.forward
    return patch.object(Engine, "forward", lambda engine, *inputs: forward(engine, *inputs) + torch.ones(1))


def reads_each_loss() -> Any:
    def reading(loss: LossConfig, raw_NO: Tensor, *others: Any) -> Tensor:
        raw_NO.sum().item()
        return raw_NO.sum(dim=1)

    return patch("mtl_dist.model.objectives.Mse.per_example", reading)


def reads_too_early() -> Any:
    return patch.object(Coming, "read", lambda coming: coming.numbers + 0)


def sends_from_the_cpu() -> Any:
    return patch("mtl_dist.surgery.rows.on_device", lambda values, device: torch.as_tensor(values, dtype=torch.float64))


def takes_pageable_memory() -> Any:
    return patch("mtl_dist.data.batches.moved", lambda tensor, device: tensor.to(device))


@pytest.mark.parametrize(
    ("mistake", "seen_as"),
    [
        (adds_a_cpu_tensor, "aten.add.Tensor of tensors on the GPU and on the CPU"),
        (reads_each_loss, "_local_scalar_dense"),
        (reads_too_early, "a copy from the GPU is read that nobody waited for"),
        (sends_from_the_cpu, "of tensors on the GPU and on the CPU"),
        (takes_pageable_memory, "copy to the GPU"),
    ],
)
def test_mistakes_are_seen(tiny: Path, mistake: Callable[[], Any], seen_as: str) -> None:
    (seen,) = on_ranks(1, mistaken, mistake, tiny, *BF16, PCGRAD)
    assert seen_as in seen


def mistaken(mistake: Callable[[], Any], config: Path, *overrides: str) -> str:
    """What is said of a training with a mistake in it, on eight ranks."""
    seen = dry(8, config, *overrides, mistake=mistake)
    return " ".join([*map(str, seen["problems"]), *(where for where in seen["waits"] if where not in SURGERY)])


def test_the_tool_itself() -> None:
    with pretended_cuda() as gpu:
        numbers = torch.ones(3, device=CUDA)
        assert numbers.is_cuda and (numbers * 2).device == CUDA and not gpu.waits
        assert numbers.sum().item() == 3
        assert sum(gpu.waits.values()) == 1
        with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
            numbers.numpy()
