"""What DDP does, DeepSpeed's ZeRO and FSDP2 do as well: the same surgery, the same untouched heads, the same stages.

python -m pytest tests/surgery/test_engines.py
"""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from mtl_dist.config import UserError
from mtl_dist.surgery.rows import Rows
from tests.distributed import on_ranks
from tests.surgery.test_training import LAST, PCGRAD, last_records, written_out
from tests.trained import ENGINES, far_apart, run, run_under

SPLIT = [engine for engine in ENGINES if engine != "ddp"]
UNIFORM = ["gradients.accumulation=3", "mixer={kind: uniform}"]
# Weight decay on every parameter would move whatever has a gradient, were it zero.
ALL_DECAY = ["optim.weight_decay=0.5", "optim.rules=[{match: '.*'}]"]


@pytest.mark.parametrize(
    ("engine", "world", "changes"),
    [
        pytest.param(engine, world, changes, id=f"{name}-{engine}", marks=[] if engine in short else pytest.mark.long)
        for name, world, changes, short in (
            ("joint", 2, ["gradients.clip_norm=null"], ("fsdp2", "zero3")),
            ("uniform, accumulated, clipped", 4, UNIFORM, ("zero1", "zero2")),
        )
        for engine in SPLIT
    ],
)
def test_pcgrad_is_algorithm_1(tiny: Path, engine: str, world: int, changes: list[str]) -> None:
    overrides = [*LAST, "steps=20", PCGRAD, *changes]
    expected = written_out(tiny, *overrides)
    ranks = on_ranks(world, run_under, engine, tiny, *overrides)
    for rank in ranks:
        assert far_apart(rank["parameters"], expected) < 1e-6
        assert far_apart(rank["parameters"], ranks[0]["parameters"]) == 0
        assert far_apart(rank["kept"], ranks[0]["parameters"]) == 0


@pytest.mark.parametrize("engine", SPLIT)
def test_plain_training_is_that_of_one_process(tiny: Path, engine: str) -> None:
    # One task a step: the two others stay as they are, which their moments and the decay would change.
    overrides = [*LAST, *ALL_DECAY, "mixer={kind: round_robin}", "steps=9"]
    expected = run(tiny, *overrides)["parameters"]
    for rank in on_ranks(2, run_under, engine, tiny, *overrides):
        assert far_apart(rank["parameters"], expected) < 1e-6


def run_and_never_forget(config: Path, *overrides: str) -> dict[str, Any]:
    with patch("mtl_dist.surgery.zero.forget"):
        return run_under("zero3", config, *overrides)


@pytest.mark.parametrize("surgery", [[], [PCGRAD]], ids=["plain", "pcgrad"])
def test_zero3_would_apply_the_gradients_of_earlier_steps(tiny: Path, surgery: list[str]) -> None:
    # The trap that the engine keeps clear of: a head that goes unused keeps its last gradient.
    overrides = [*LAST, *surgery, "mixer={kind: uniform, draws_per_step: 2}", "steps=6", "gradients.clip_norm=null"]
    expected = run(tiny, *overrides)["parameters"]
    assert far_apart(on_ranks(2, run_under, "zero3", tiny, *overrides)[0]["parameters"], expected) < 1e-6
    assert far_apart(on_ranks(2, run_and_never_forget, tiny, *overrides)[0]["parameters"], expected) > 1e-4


@pytest.mark.parametrize(
    "engine",
    [
        "zero1",  # which by itself would average what the last task reaches, and leave the others' heads alone
        pytest.param("zero2", marks=pytest.mark.long),
        pytest.param("zero3", marks=pytest.mark.long),
        pytest.param("fsdp2", marks=pytest.mark.long),
    ],
)
def test_plain_training_averages_every_head(tiny: Path, engine: str) -> None:
    overrides = [*LAST, "steps=6", "gradients.accumulation=2"]
    expected = run(tiny, *overrides)["parameters"]
    assert far_apart(on_ranks(2, run_under, engine, tiny, *overrides)[0]["parameters"], expected) < 1e-6


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_scopes_and_steps_between(tiny: Path, engine: str) -> None:
    overrides = [*LAST, PCGRAD, "gradients.every=2", "gradients.scope=layers", "gradients.match=layers", "steps=6"]
    expected = run(tiny, *overrides, "log.every_steps=1")["parameters"]
    reported = last_records(tiny)
    for rank in on_ranks(2, run_under, engine, tiny, *overrides, "log.every_steps=1"):
        assert far_apart(rank["parameters"], expected) < 1e-6
    for there, here in zip(last_records(tiny), reported, strict=True):
        assert ("surgery" in there) == ("surgery" in here) == (here["step"] % 2 == 1)
        if "surgery" in here:
            assert there["surgery"]["norm"] == pytest.approx(here["surgery"]["norm"], rel=1e-4)
            assert there["surgery"]["conflicting_parameters"] == here["surgery"]["conflicting_parameters"]
        assert there["gradient_norm"] == pytest.approx(here["gradient_norm"], rel=1e-4)


STAGES = (
    "stages=["
    "{name: heads, tasks: [mood, same], trains: ['^heads'], steps: 3, lr: 0.01}, "
    "{name: all, steps: 3, gradients: {combiner: {kind: pcgrad}}}, "
    "{name: two, tasks: [mood, near], steps: 3}]"
)


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_stages_and_scores(tiny: Path, engine: str) -> None:
    overrides = ["log.tensorboard=false", "steps=null", "encoder.dropout=0", "encoder.attention_dropout=0"]
    overrides += [*(f"tasks.{task}.dropout=0" for task in ("mood", "same", "near")), STAGES]
    expected = run(tiny, *overrides)
    for rank in on_ranks(2, run_under, engine, tiny, *overrides):
        assert far_apart(rank["parameters"], expected["parameters"]) < 1e-6
        assert rank["scores"]["step"] == expected["scores"]["step"]
        near, same = (scores["scores"]["tasks"]["near"]["pearson"] for scores in (rank, expected))
        assert near == pytest.approx(same, abs=1e-5)


@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        "fsdp2",
        "zero2",
        pytest.param("zero1", marks=pytest.mark.long),
        pytest.param("zero3", marks=pytest.mark.long),
    ],
)
def test_bf16_on_ranks_is_as_near_to_one_as_bf16_is_to_fp32(tiny: Path, engine: str) -> None:
    # Of all methods this one goes farthest from the sum: farther than bf16 rounds.
    overrides = [*LAST, "gradients.combiner={kind: mgda}", "steps=20"]
    exact = run(tiny, *overrides)["parameters"]
    (alone,) = on_ranks(1, run_under, engine, tiny, *overrides, "precision=bf16")
    rounding = far_apart(alone["parameters"], exact)
    for rank in on_ranks(2, run_under, engine, tiny, *overrides, "precision=bf16"):
        assert 1e-5 < far_apart(rank["parameters"], alone["parameters"]) < 1.5 * rounding < 0.01
    assert far_apart(run(tiny, *LAST, "steps=20")["parameters"], exact) > 0.015


def many_tasks(config: Path, number: int) -> Path:
    """The experiment with so many tasks in the place of its three, on the same rows but of different batch sizes."""
    content = yaml.safe_load(config.read_text())
    task = content["tasks"]["mood"] | {"dev": None, "dropout": 0}
    content["tasks"] = {f"task{i}": task | {"batch_size": 1 + i % 3, "weight": 1 + i % 4} for i in range(number)}
    content["encoder"] |= {"dropout": 0, "attention_dropout": 0}
    many = config.with_name("many.yaml")
    many.write_text(yaml.safe_dump(content))
    return many


def rows_of_a_run(engine: str, config: Path, *overrides: str) -> dict[str, Any]:
    """What the rows take on this rank, beside what came of the training."""
    made: list[Rows] = []
    start = Rows.start

    def noted(rows: Rows) -> None:
        made[:] = [rows]
        start(rows)

    with (
        patch.object(Rows, "start", noted),
        # So small a model would be mostly what its tensors are filled up with.
        patch("mtl_dist.surgery.rows.CHUNK", 8),
        patch("mtl_dist.surgery.ddp.CHUNK", 8),
    ):
        result = run_under(engine, config, *overrides)
    (rows,) = made
    tensors = [*rows.rows, *getattr(rows, "buffers", [])]
    own = [getattr(gradient, "_local_tensor", gradient) for each in rows.own for gradient in each.values()]
    kept = {gradient.untyped_storage().data_ptr(): gradient.untyped_storage().nbytes() for gradient in own}
    return result | {
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "own": sum(gradient.nbytes for gradient in own),
        "kept for own": sum(kept.values()),
    }


@pytest.mark.parametrize(
    ("engine", "reduce"),
    [
        ("ddp", "reduce_scatter"),
        ("zero2", ""),
        pytest.param("ddp", "all_reduce", marks=pytest.mark.long),
        pytest.param("zero3", "", marks=pytest.mark.long),
        pytest.param("fsdp2", "", marks=pytest.mark.long),
    ],
)
def test_sixty_four_tasks_in_a_step(tiny: Path, engine: str, reduce: str) -> None:
    config = many_tasks(tiny, 64)
    overrides = ["log.tensorboard=false", PCGRAD, "steps=3", f"gradients.reduce={reduce or 'all_reduce'}"]
    expected = written_out(config, *overrides)
    shared = 4 * sum(p.numel() for name, p in expected.items() if name.startswith("encoder."))
    planned = 64 * shared
    if reduce != "all_reduce":
        planned = 64 * shared // 2 + (2 * shared if reduce else 0)
    ranks = on_ranks(2, rows_of_a_run, engine, config, *overrides)
    for rank in ranks:
        assert far_apart(rank["parameters"], expected) < 1e-6
    assert all(rank["kept for own"] == rank["own"] for rank in ranks)  # and nothing else of what came with them
    # How much of it lies on which rank is the engine's choice.
    assert sum(rank["bytes"] for rank in ranks) == pytest.approx(2 * planned, rel=0.05)


def refused(config: Path, engine: str, environment: dict[str, str], *overrides: str) -> str:
    os.environ |= environment
    with pytest.raises(UserError) as error:
        run_under(engine, config, *overrides)
    return str(error.value)


def test_moments_are_carried_under_ddp_only(tiny: Path) -> None:
    stages = "stages=[{steps: 1}, {steps: 1, carry_moments: true}]"
    for message in on_ranks(2, refused, tiny, "zero2", {}, *LAST, "steps=null", stages):
        assert message == (
            "stage '2': carry_moments needs DDP or one process: ZeRO-2 spreads the moments over the ranks; leave it out"
        )
