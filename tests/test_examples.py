"""The examples on two gloo ranks, under every engine they are for: PCGrad as it is written out here, with torch alone.

python -m pytest tests/test_examples.py
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate_two_heads
import numpy as np
import pytest
import torch
import torch.distributed as dist
import trainer
import vision_torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import SequentialSampler, default_collate

from mtl_dist import Surgery
from mtl_dist.data.mixer import Temperature
from mtl_dist.distributed import _let_accelerate_use_cpus
from tests.distributed import on_ranks
from tests.trained import ROOT, far_apart

pytestmark = pytest.mark.long

WORLD, PARTS = 2, 2
STEPS = len(accelerate_two_heads.reviews()) // (8 * WORLD * PARTS)
Outcomes = Sequence[dict[str, Any]]  # of the ranks
Losses = Callable[[int], dict[str, Tensor]]  # each task's, over the global batch of a step


# ------------------------------------------------------------------------------------------------------ the reference


def written_out(
    model: nn.Module,
    losses: Losses,
    shared: str,
    *,
    steps: int,
    clip_norm: float,
    weight_decay: float = 0.01,
    projects: bool = True,
) -> dict[str, Tensor]:
    """Training with PCGrad (Yu et al. 2020, Algorithm 1), or with the plain sum, on one process.

    Some steps are clipped and some not: where all were, a gradient that is too large everywhere would not be seen.
    """
    clipped = 0
    names, parameters = zip(*model.named_parameters(), strict=True)
    inside = [name.startswith(f"{shared}.") for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, eps=1e-4, weight_decay=weight_decay)
    for step in range(steps):
        gradients = {
            task: torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for task, loss in losses(step).items()
        }
        raw = {
            task: torch.cat([flat(g, p) for g, p, here in zip(gradient, parameters, inside, strict=True) if here])
            for task, gradient in gradients.items()
        }
        # The paper draws the order of the others at random: here as from Surgery's seed, which is 0, and the step.
        seed = np.random.SeedSequence((0, step)).generate_state(1, np.uint64)
        random = torch.Generator().manual_seed(int(seed[0]) % 2**63)
        combined = torch.zeros_like(next(iter(raw.values())))
        for gradient in raw.values():
            projected = gradient.clone()
            for place in torch.randperm(len(raw), generator=random):
                other = raw[list(raw)[place]]
                if projects and other is not gradient and projected @ other < 0:
                    projected -= (projected @ other) / (other @ other) * other
            combined += projected
        for place, parameter in enumerate(parameters):
            found = [gradient[place] for gradient in gradients.values() if gradient[place] is not None]
            parameter.grad = sum(found) if found else None
            if inside[place]:
                here, combined = combined.split([parameter.numel(), len(combined) - parameter.numel()])
                parameter.grad = here.view_as(parameter).float() if found else None
        clipped += bool(nn.utils.clip_grad_norm_(parameters, clip_norm) > clip_norm)
        optimizer.step()
    assert 0.2 * steps < clipped < 0.8 * steps
    return {name: parameter.detach() for name, parameter in zip(names, parameters, strict=True)}


def flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1).double()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All of each parameter, wherever the engine keeps it."""
    named = getattr(model, "module", model).named_parameters()
    if hasattr(model, "zero_optimization"):
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(parameter) for name, parameter in named}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in named}


def outcome(model: nn.Module, surgery: Surgery) -> dict[str, Any]:
    return {"parameters": whole(model), "conflict": surgery.conflict, "state": surgery.state_dict()}


def check(ranks: Outcomes, steps: int, exact: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """The ranks have the same bits, and are where PCGrad leads; the sum of the losses leads elsewhere."""
    away, sum_away = far_apart(ranks[0]["parameters"], exact), far_apart(plain, exact)
    print(f"{away:.1e} from PCGrad written out; the plain sum is {sum_away:.1e} from it")
    assert away < 1e-6 < 1e-4 < sum_away
    for rank in ranks:
        assert far_apart(rank["parameters"], ranks[0]["parameters"]) == 0
        assert rank["conflict"] == ranks[0]["conflict"]
        assert rank["state"]["step"] == steps


def check_resumed(straight: Outcomes, resumed: Outcomes) -> None:
    """Who went on from a saved state has the same bits as who went straight on."""
    for before, after in zip(straight, resumed, strict=True):
        assert far_apart(after["parameters"], before["parameters"]) == 0
        assert after["conflict"] == before["conflict"]
    assert resumed[0]["state"] == straight[0]["state"]  # the rank that decides keeps it


# -------------------------------------------------------------------------------------------------------- Accelerate

ENGINES = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    },
    "zero2": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(PARTS),
        "ACCELERATE_GRADIENT_CLIPPING": "3.0",
    },
}  # what `accelerate launch` puts into the environment for each


def accelerator(engine: str) -> Accelerator:
    """The example's own, which on GPUs would be of this engine without more ado."""
    os.environ |= ENGINES[engine]
    AcceleratorState._reset_state(reset_partial_state=True)  # of the training before
    if engine == "ddp":
        return Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    _let_accelerate_use_cpus(timedelta(minutes=1))
    gloo = [InitProcessGroupKwargs(backend="gloo")]
    return Accelerator(gradient_accumulation_steps=PARTS, kwargs_handlers=gloo)


def trained_with_accelerate(engine: str, folder: Path) -> list[dict[str, Any]]:
    """What the example comes to: with PCGrad; with GradVac; and with that from step 20 on, where it was saved."""
    save = Accelerator.save_state

    def save_once(accelerator: Accelerator, folder: str) -> None:
        if accelerator._custom_objects[0].number == 20:
            save(accelerator, folder)

    with patch.object(Accelerator, "save_state", save_once):
        return [
            outcome(*accelerate_two_heads.train(accelerator(engine), where, combiner))
            for combiner, where in (("pcgrad", None), ("gradvac", folder), ("gradvac", folder))
        ]


@cache
def two_heads(weight_decay: float = 0.01) -> list[dict[str, Tensor]]:
    """Where PCGrad and the plain sum lead on all reviews."""
    rows = accelerate_two_heads.reviews()
    each, found = len(rows) // STEPS, []
    for projects in (True, False):
        model = accelerate_two_heads.TwoHeads()

        def losses(step: int, model: nn.Module = model) -> dict[str, Tensor]:
            return model(**default_collate(rows[step * each : (step + 1) * each]))

        settings = {"steps": STEPS, "clip_norm": 3.0, "weight_decay": weight_decay, "projects": projects}
        found.append(written_out(model, losses, "bert", **settings))
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_accelerate(tmp_path: Path, engine: str) -> None:
    pcgrad, straight, resumed = zip(*on_ranks(WORLD, trained_with_accelerate, engine, tmp_path / "saved"), strict=True)
    check(pcgrad, STEPS, *two_heads())
    check_resumed(straight, resumed)
    assert straight[0]["state"]["combiner"]["shared"].keys() == {"topic|stars", "stars|topic"}  # GradVac remembers


# ----------------------------------------------------------------------------------------------- Hugging Face's Trainer


def trained_with_trainer(folder: Path) -> list[dict[str, Any]]:
    def in_order(training: trainer.SurgeryTrainer, *_: Any) -> SequentialSampler:
        return SequentialSampler(training.train_dataset)

    trained = []
    with patch.object(trainer.SurgeryTrainer, "_get_train_sampler", in_order):
        for saved in (None, f"{folder}/checkpoint-20"):
            training = trainer.trainer(output_dir=str(folder), save_strategy="steps", save_steps=20)
            training.train(resume_from_checkpoint=saved)
            trained.append(outcome(training.model, training.surgery))
    return trained


def test_trainer(tmp_path: Path) -> None:
    straight, resumed = zip(*on_ranks(WORLD, trained_with_trainer, tmp_path), strict=True)
    check(straight, STEPS, *two_heads(weight_decay=0.0))
    check_resumed(straight, resumed)


# -------------------------------------------------------------------------------------------------------- plain torch


def trained_with_torch(file: Path) -> list[dict[str, Any]]:
    """With PCGrad; with GradVac; and with that from step 20 on, where another run saved."""
    dist.init_process_group("gloo")
    trained = []
    for steps, where, combiner in (
        (40, None, "pcgrad"),
        (40, None, "gradvac"),
        (20, file, "gradvac"),
        (40, file, "gradvac"),
    ):
        model, surgery = vision_torch.train(steps, where, combiner)
        trained.append(outcome(model, surgery) | {"buffers": dict(model.module.named_buffers())})
        dist.barrier()  # or the other rank would look for a file that is still being written
    return [trained[0], trained[1], trained[3]]


def pictures_of_step(model: nn.Module, steps: int) -> Losses:
    """Of every rank each micro-batch by itself: BatchNorm sees no more at a time."""
    loaders = {
        task: [vision_torch.loader(task, rank, WORLD) for rank in range(WORLD)] for task in vision_torch.PICTURES
    }
    streams = {task: [vision_torch.endless(loader) for loader in of_ranks] for task, of_ranks in loaders.items()}
    sizes = {task: of_ranks[0] for task, of_ranks in loaders.items()}
    names = list(Temperature(draws_per_step=3).order_over(sizes, steps=steps).names())

    def losses(step: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for task in names[step] * PARTS:
            for rank, stream in enumerate(streams[task]):
                # DDP keeps the running means of the first rank.
                buffers = {name: buffer.clone() if rank else buffer for name, buffer in model.named_buffers()}
                loss = functional_call(model, buffers, (task, *next(stream))) / (WORLD * PARTS)
                found[task] = found[task] + loss if task in found else loss
        return found

    return losses


def test_vision(tmp_path: Path) -> None:
    found = []
    for projects in (False, True):
        model = vision_torch.Lines()
        found.append(
            written_out(model, pictures_of_step(model, 40), "body", steps=40, clip_norm=1.5, projects=projects)
        )
    ranks = on_ranks(WORLD, trained_with_torch, tmp_path / "saved.pt")
    pcgrad, straight, resumed = zip(*ranks, strict=True)
    check(pcgrad, 40, *reversed(found))
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(pcgrad[0]["buffers"][name], buffer, rtol=1e-5, atol=1e-5)
    check_resumed(straight, resumed)
    assert len(straight[0]["state"]["combiner"]["shared"]) == 6  # GradVac remembers each pair both ways


# ----------------------------------------------------------------------------------------------- on the command line


@pytest.mark.parametrize("name", ["accelerate_two_heads", "trainer", "vision_torch"])
def test_the_command_for_cpus_runs(tmp_path: Path, name: str) -> None:
    said = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    (torchrun .*|accelerate launch .*cpu_2proc.*)$", said, re.MULTILINE)
    for folder in ("examples", "accelerate_configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    program, *arguments = command.split()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    program = Path(sys.executable).with_name(program)
    done = subprocess.run([program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cosine" in done.stdout.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------ torch.compile


def test_compiled() -> None:
    batch = default_collate(accelerate_two_heads.reviews()[:16])
    found = []
    for compiles in (False, True):
        model = accelerate_two_heads.TwoHeads()
        if compiles:
            model.bert.compile(backend="aot_eager")
        surgery = Surgery(model, "pcgrad", shared="bert")
        surgery.backward(model(**batch))
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert far_apart(*found) < 1e-6


def test_compiled_for_one_loss_and_used_for_two() -> None:
    batch = default_collate(accelerate_two_heads.reviews()[:16])
    for donates in (True, False):
        torch._dynamo.reset()
        with torch._functorch.config.patch(donated_buffer=donates):
            model = accelerate_two_heads.TwoHeads()
            model.bert.compile(backend="aot_eager")
            surgery = Surgery(model, "pcgrad", shared="bert")
            surgery.backward({"topic": model(**batch)["topic"]})
            model.zero_grad()
            if donates:
                with pytest.raises(RuntimeError, match=r"set torch._functorch.config.donated_buffer=False"):
                    surgery.backward(model(**batch))
            else:
                surgery.backward(model(**batch))
