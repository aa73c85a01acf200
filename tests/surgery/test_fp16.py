"""fp16 with loss scaling: an overflow of one task on one rank leaves the step out on all of them.

python -m pytest tests/surgery/test_fp16.py

Accelerate scales losses on GPUs only; here it is given a scaler for the CPU, and all else is as it is.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from mtl_dist.config import UserError
from mtl_dist.model.multitask import MultiTaskModel
from mtl_dist.model.objectives import Bce
from mtl_dist.surgery.rows import Rows
from tests.distributed import on_ranks
from tests.surgery.test_training import LAST, PCGRAD, last_records
from tests.trained import far_apart, run

FP16 = ["precision=fp16", "log.every_steps=1"]

SCALE = 2.0**10


def run_in_fp16(config: Path, overflows: Collection[int], *overrides: str) -> dict[str, Any]:
    """Trains; on the last rank, these of all backward passes overflow. Tells as well the loss scale at each of them."""
    scales: list[float] = []
    plain_backward = Rows.backward

    def scaling(**options: Any) -> Accelerator:
        accelerator = Accelerator(**options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        accelerator.native_amp = True
        return accelerator

    def backward(rows: Rows, loss: Tensor, retain_graph: bool = False) -> None:
        scales.append(rows.loss_scale.item())
        unlucky = len(scales) in overflows and os.environ.get("RANK", "0") == str(
            int(os.environ.get("WORLD_SIZE", "1")) - 1
        )
        if unlucky:  # where it is scaled: the loss itself is finite
            loss.register_hook(lambda gradient: gradient * float("inf"))
        plain_backward(rows, loss)

    with (
        patch("mtl_dist.distributed.Accelerator", scaling),
        patch("mtl_dist.distributed._check_precision"),
        patch.object(Rows, "backward", backward),
    ):
        return {**run(config, *overrides), "scales": scales}


@pytest.mark.parametrize("reduce", ["all_reduce", "reduce_scatter"])
def test_fp16_is_close_to_fp32(tiny: Path, reduce: str) -> None:
    overrides = [*LAST, PCGRAD, f"gradients.reduce={reduce}", "steps=20"]
    exact = run(tiny, *overrides, "log.every_steps=1")["parameters"]
    norms = last_records(tiny)[-1]["surgery"]["norm"]
    ranks = on_ranks(2, run_in_fp16, tiny, [], *overrides, *FP16)
    assert far_apart(ranks[0]["parameters"], ranks[1]["parameters"]) == 0
    assert 1e-7 < far_apart(ranks[0]["parameters"], exact) < 1e-3
    assert set(ranks[0]["scales"]) == {SCALE}
    assert last_records(tiny)[-1]["skipped_steps"] == 0
    assert last_records(tiny)[-1]["surgery"]["norm"] == pytest.approx(norms, rel=0.05)  # without the scale


@pytest.mark.parametrize(
    "gradients", [[], [PCGRAD], [PCGRAD, "gradients.reduce=reduce_scatter"]], ids=["plain", "pcgrad", "scattered"]
)
def test_an_overflow_of_one_task_on_one_rank_skips_the_step_on_all(tiny: Path, gradients: list[str]) -> None:
    overrides = [*LAST, *FP16, *gradients]
    before = on_ranks(2, run_in_fp16, tiny, [], *overrides, "steps=2")[0]["parameters"]
    # Three tasks a step: the eighth backward pass is that of the third step's second task.
    for rank in on_ranks(2, run_in_fp16, tiny, [8], *overrides, "steps=3"):
        assert far_apart(rank["parameters"], before) == 0
    assert [record["skipped_steps"] for record in last_records(tiny)] == [0, 0, 1]
    ranks = on_ranks(2, run_in_fp16, tiny, [8], *overrides, "steps=4")
    for rank in ranks:
        assert rank["scales"] == [SCALE] * 9 + [SCALE / 2] * 3
        assert far_apart(rank["parameters"], before) > 1e-5
        assert far_apart(rank["parameters"], ranks[0]["parameters"]) == 0
    # What was infinite does not spoil the means.
    assert all(loss < 10 for record in last_records(tiny) for loss in record["loss"].values())


DROP = [PCGRAD, "gradients.nonfinite=drop_task"]


@pytest.mark.parametrize("unlucky", [[8], [7, 8, 9]], ids=["one task", "all tasks"])
def test_an_overflow_is_no_reason_to_drop_a_task(tiny: Path, unlucky: list[int]) -> None:
    for rank in on_ranks(2, run_in_fp16, tiny, unlucky, *LAST, *FP16, *DROP, "steps=4"):
        assert rank["scales"] == [SCALE] * 9 + [SCALE / 2] * 3
    assert [record["skipped_steps"] for record in last_records(tiny)] == [0, 0, 1, 1]
    assert not faults(tiny)


def test_a_loss_that_is_no_number_drops_its_task_in_fp16(tiny: Path) -> None:
    loss_of = Bce.per_example

    def lost(loss: Bce, *arguments: Any) -> Tensor:
        return loss_of(loss, *arguments) * float("nan")

    with patch.object(Bce, "per_example", lost):
        found = run_in_fp16(tiny, [], *LAST, *FP16, *DROP, "steps=4")
    assert set(found["scales"]) == {SCALE}
    assert all(parameter.isfinite().all() for parameter in found["parameters"].values())
    assert [record["dropped"] for record in faults(tiny)] == [["same"]] * 4


def test_nothing_is_left_when_every_loss_is_no_number(tiny: Path) -> None:
    per_example = MultiTaskModel.forward

    def lost(model: MultiTaskModel, *arguments: Any) -> Tensor:
        return per_example(model, *arguments) * float("nan")

    with patch.object(MultiTaskModel, "forward", lost):
        found = run_in_fp16(tiny, [], *LAST, *FP16, *DROP, "steps=3")
    assert set(found["scales"]) == {SCALE}
    assert [record["skipped_steps"] for record in last_records(tiny)] == [1, 2, 3]


@pytest.mark.parametrize("policy", ["skip_step", "drop_task"])
def test_gradients_that_overflow_at_any_scale_end_the_run(tiny: Path, policy: str) -> None:
    overrides = [*LAST, *FP16, PCGRAD, f"gradients.nonfinite={policy}", "gradients.most_nonfinite=3", "steps=60"]
    with pytest.raises(UserError, match=r"step 12: the gradient is infinite or NaN, 3 steps in a row; lower optim.lr"):
        run_in_fp16(tiny, range(1000), *overrides)


def faults(config: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (config.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "fault"]
