"""Signal and noise of gradients that are known: quadratic tasks, whose rows pull to points scattered around a centre.

pytest tests/surgery/test_noise.py
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist.cli import main
from mtl_dist.surgery.noise import Noise, Parts, sample
from mtl_dist.surgery.surgery import Surgery
from tests.distributed import on_ranks
from tests.surgery.test_training import LAST, PCGRAD
from tests.trained import go_on_until, run

WIDTH = 300
# The true gradients at zero, up to the sign: a and b conflict, c agrees with neither.
TRUE = {
    "a": torch.eye(WIDTH)[0],
    "b": -0.5 * torch.eye(WIDTH)[0] + 0.5 * torch.eye(WIDTH)[1],
    "c": 2.0 * torch.eye(WIDTH)[2],
}
SPREAD = {"a": 0.1, "b": 0.3, "c": 0.05}  # of the rows in each direction
ROWS = {"a": 12, "b": 24, "c": 8}
COSINES = {"a.b": -math.sqrt(0.5), "a.c": 0.0, "b.c": 0.0}


class Points(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.ParameterDict({"x": nn.Parameter(torch.zeros(WIDTH))})

    def forward(self, points_ND: torch.Tensor) -> torch.Tensor:
        return (self.shared["x"] - points_ND).square().sum(1) / 2


def measured(world: int, steps: int, shares: list[int], parts: int = 1, **settings: Any) -> Noise:
    """What is found over some steps, if the ranks (or the micro-batches) have these shares of each batch."""
    torch.manual_seed(0)
    model: Any = Points()
    if world > 1:
        torch.distributed.init_process_group("gloo")
        model = DistributedDataParallel(model)
    rank, found = torch.distributed.get_rank() if world > 1 else 0, Noise()
    surgery = Surgery(model, "pcgrad", shared="shared", **settings)
    for step in range(steps):
        with surgery.step(step, list(TRUE)):
            for task, centre in TRUE.items():
                points = centre + SPREAD[task] * torch.randn(ROWS[task], WIDTH)  # the same on all ranks
                sizes = [ROWS[task] * share // sum(shares) for share in shares]
                pieces = points.split(sizes)
                mine = [pieces[rank]] if world > 1 else pieces
                with surgery.task(task, last=True):
                    for i, piece in enumerate(mine):
                        with surgery.micro_batch(i == len(mine) - 1, len(piece)) as backward:
                            backward(model(piece).sum() * world / ROWS[task])
        assert surgery.noise is not None
        found.add(surgery.noise)
        model.zero_grad()
    return found


def check(found: Noise) -> None:
    for task, centre in TRUE.items():
        steps, rows, noise, signal, _ = found.tasks[task]
        assert rows / steps == ROWS[task]
        assert signal / steps == pytest.approx(centre.square().sum().item(), rel=0.1)
        # Of parts of unlike size, the true gradient's product with their noise does not cancel.
        assert noise / steps == pytest.approx(WIDTH * SPREAD[task] ** 2 / ROWS[task], rel=0.1, abs=0.02)
    scale = WIDTH * SPREAD["b"] ** 2 / TRUE["b"].square().sum().item()
    assert found.scale("b") == pytest.approx(scale, rel=0.1)
    for pair, cosine in COSINES.items():
        known = found.cosine(pair)
        assert known is not None
        assert abs(known[0] - cosine) < 4 * known[1] + 1e-3, pair
        assert known[1] < 0.1


@pytest.mark.parametrize("shares", [[1, 1], [3, 1]], ids=str)
def test_ranks_are_parts(shares: list[int]) -> None:
    for settings in ({}, {"reduce": "reduce_scatter"}):
        for found in on_ranks(2, _measured, 400, shares, settings):
            check(found)


def _measured(steps: int, shares: list[int], settings: dict[str, Any]) -> Noise:
    return measured(2, steps, shares, **settings)


@pytest.mark.parametrize("shares", [[1, 1], [3, 1], [1, 2, 1]], ids=str)
def test_the_first_micro_batch_of_one_process_is_a_part(shares: list[int]) -> None:
    check(measured(1, 400, shares))


def visited_twice(reduce: str) -> bool:
    torch.distributed.init_process_group("gloo")
    model = DistributedDataParallel(Points())
    surgery = Surgery(model, "pcgrad", shared="shared", reduce=reduce)
    with surgery.step(0, list(TRUE)):
        for task in (*TRUE, "b"):  # which was on its way
            with surgery.task(task, last=True), surgery.micro_batch(last=True) as backward:
                backward(model(TRUE[task] + torch.randn(4, WIDTH)).sum())
    assert surgery.noise is not None
    return "b" in surgery.noise.rows


@pytest.mark.parametrize("reduce", ["all_reduce", "reduce_scatter"])
def test_half_of_a_part_says_nothing(reduce: str) -> None:
    assert on_ranks(2, visited_twice, reduce) == [False, False]


def test_one_part_alone_says_nothing() -> None:
    torch.manual_seed(0)
    model = Points()
    surgery = Surgery(model, "pcgrad", shared="shared")
    surgery.backward({task: model(centre[None]).sum() for task, centre in TRUE.items()})
    assert surgery.noise is None and surgery.conflict is not None


def test_the_error_of_a_cosine_is_what_it_varies_by() -> None:
    """Of many runs of a few steps, the cosines spread as each of them says."""
    rng, cosines, errors = np.random.default_rng(0), [], []
    true_KD = np.zeros((2, 50))
    true_KD[0, 0], true_KD[1, 0], true_KD[1, 1] = 1.0, 0.3, 1.0
    for _ in range(300):
        noise = Noise()
        for _ in range(20):
            parts_2KD = true_KD + 0.3 * rng.standard_normal((2, 2, 50))
            whole_KD = parts_2KD.mean(0)
            squares_K = (parts_2KD**2 / 4).sum((0, 2))
            found = sample(
                ["a", "b"], whole_KD @ whole_KD.T, {t: Parts(8, squares_K[k], 1, 0.5) for k, t in enumerate("ab")}
            )
            assert found is not None
            noise.add(found)
        known = noise.cosine("a.b")
        assert known is not None
        cosines.append(known[0])
        errors.append(known[1])
    assert np.mean(cosines) == pytest.approx(0.3 / math.hypot(0.3, 1), abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(cosines), rel=0.15)


def known(cosine: float, signal: float, noise: float, steps: int = 100, spread: float = 0.01) -> Noise:
    """Two tasks whose samples vary a little around these."""
    rng, found = np.random.default_rng(0), Noise()
    for _ in range(steps):
        gram = np.array([[1.0 + noise, cosine], [cosine, signal + noise]]) + spread * rng.standard_normal((2, 2))
        parts = {
            "sst": Parts(32.0, (1 + 2 * noise) / 2, 1.0, 0.5),
            "sts": Parts(32.0, (signal + 2 * noise) / 2, 1.0, 0.5),
        }
        one = sample(["sst", "sts"], gram, parts)
        assert one is not None
        found.add(one)
    return found


def test_the_verdict() -> None:
    assert list(known(-0.3, 1, 0.1).verdict()) == ["sst-sts cosine -0.30 +- 0.00, a conflict"]
    assert list(known(0.3, 1, 0.1).verdict()) == ["sst-sts cosine 0.30 +- 0.00, no conflict"]
    assert list(known(0.0, 1, 0.1, spread=0.1).verdict()) == [
        "sst-sts cosine -0.00 +- 0.01, no conflict that could be told from noise"
    ]
    few = list(known(0.3, 1, 6).verdict())
    assert few[1:] == [
        f"batch of {task} is 6 times smaller than its noise scale: more rows a step help it more than surgery would"
        for task in ("sst", "sts")
    ]
    lost, small = known(0.0, 0.0, 0.1).verdict()
    assert lost == "sst-sts cosine unknown, one of them is lost in the noise of its batches"
    assert re.match(r"batch of sts is \d+ times( or more)? smaller than its noise scale: ", small)
    assert list(known(-0.3, 1, 6, steps=9).verdict()) == []  # who knows
    many = Noise()
    many.tasks, many.pairs = known(-0.3, 1, 0.1).tasks, {f"t{i}.t{j}": [] for i in range(4) for j in range(i)}
    many.pairs = dict.fromkeys([f"t{i}" for i in range(9)], known(-0.3, 1, 0.1).pairs["sst.sts"])
    (line,) = many.verdict()
    assert line.startswith("9 of 9 pairs of tasks conflict by more than 2 standard errors: t0 cosine -0.30 +- 0.00, ")


def test_runs_tell_of_it(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny, *LAST, PCGRAD, "gradients.accumulation=2", "log.every_steps=3", "steps=12")
    records = [json.loads(line) for line in (tiny.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "train":
            assert record["noise"]["scale"].keys() == {"mood", "same"}  # a batch of one row has no parts
    assert "gradients    mood-same cosine " in capsys.readouterr().out
    (last,) = [record for record in records if record["kind"] == "gradients"]
    assert last["scale"].keys() == {"mood", "same"} and last["verdict"][0].startswith("mood-same cosine ")


def test_a_plan_tells_of_it(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(tiny), *LAST, PCGRAD, "gradients.accumulation=2", "--measure"])
    assert "\nmood-same cosine " in capsys.readouterr().out


def test_a_resumed_run_tells_of_all_its_steps(tiny: Path) -> None:
    overrides = [*LAST, PCGRAD, "gradients.accumulation=2", "steps=12", "log.every_steps=3"]

    def told() -> Any:
        records = [json.loads(line) for line in (tiny.parent / "run" / "metrics.jsonl").read_text().splitlines()]
        return [(record["step"], record.get("noise", record.get("verdict"))) for record in records]

    run(tiny, *overrides)
    expected = told()
    shutil.rmtree(tiny.parent / "run")
    go_on_until(4, "ddp", tiny, *overrides)
    go_on_until(None, "ddp", tiny, *overrides)
    assert told() == expected
    go_on_until(None, "ddp", tiny, *overrides)  # nothing is left to train, or to tell
    assert told() == expected
