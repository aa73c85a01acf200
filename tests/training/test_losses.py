"""What a task may learn from beside its own loss: R-Drop and multiple negatives ranking, on one rank and on several.

python -m pytest tests/training/test_losses.py
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_dist.config import UserError, load
from mtl_dist.data.batches import Batch, make_batch
from mtl_dist.experiment import Experiment
from tests.distributed import on_ranks
from tests.trained import ENGINES, NO_DROPOUT, far_apart, run, run_parted, written_out

# Seven pairs of `near`, of which few are alike; on four ranks some have no row of a draw of three.
RANKING = [
    *NO_DROPOUT,
    "steps=6",
    "tasks.same.head=sbert",
    "tasks.same.ranking={weight: 0.5}",
    "tasks.near.ranking={scale: 5, positives_from: 2}",
    "tasks.near.batch_size=3",
]


def loss_of_rows(path: Path, raw: list[list[float]], *overrides: str) -> list[float]:
    """What rows of the task `mood`, of the class 0, cost where the model gives these outputs."""

    class Rows:
        def inputs(self, row: int) -> list[list[int]]:
            return [[2, 3]]

        def second_from(self, row: int) -> int:
            return 2

        def labels(self, rows: Any) -> Any:
            return 0 * rows

    task = load(Experiment, path, overrides).tasks["mood"]
    rows = torch.arange(len(raw) // task.copies).numpy()
    batch = make_batch("mood", Rows(), rows, copies=task.copies)  # type: ignore[arg-type]
    assert len(batch.packed.offsets) - 1 == len(raw)
    found: list[float] = task.losses(lambda name, packed: torch.tensor(raw), batch).tolist()
    return found


def test_r_drop_by_hand(tiny: Path) -> None:
    even, sure = [0.0, 0.0, -1e9], [1.0986123, 0.0, -1e9]  # 1/2 and 1/2; 3/4 and 1/4
    assert loss_of_rows(tiny, [even, sure]) == pytest.approx([0.693147, 0.287682])
    # The rows first, then all of them again: the mean of both, and from 1/2 to 3/4 and back it is log(3) / 4.
    raw = [even, sure, sure, sure]
    mean, apart = (0.693147 + 0.287682) / 2, 1.0986123 / 4
    assert loss_of_rows(tiny, raw, "tasks.mood.r_drop=2") == pytest.approx([mean + 2 / 4 * apart, 0.287682], abs=1e-5)


def test_without_dropout_r_drop_changes_nothing(tiny: Path) -> None:
    plain = run(tiny, *NO_DROPOUT)["parameters"]
    twice = [f"tasks.{task}.r_drop=4" for task in ("mood", "same", "near")]
    assert far_apart(run(tiny, *NO_DROPOUT, *twice)["parameters"], plain) < 1e-6
    assert far_apart(run(tiny, *NO_DROPOUT, *twice, "gradients.max_tokens=40")["parameters"], plain) < 1e-6


def test_with_dropout_it_counts(tiny: Path) -> None:
    weak, strong = (run(tiny, f"tasks.mood.r_drop={weight}")["parameters"] for weight in ("1e-9", "5"))
    assert far_apart(weak, strong) > 1e-4


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranking_compares_all_pairs_of_the_global_batch(tiny: Path, world: int) -> None:
    expected = written_out(tiny, *RANKING)
    assert far_apart(expected, written_out(tiny, *(word for word in RANKING if "ranking" not in word))) > 1e-4
    ranks = [run(tiny, *RANKING)] if world == 1 else on_ranks(world, run, tiny, *RANKING)
    for rank in ranks:
        assert far_apart(rank["parameters"], expected) < 1e-6


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_ranking_under_other_engines(tiny: Path, engine: str) -> None:
    expected = written_out(tiny, *RANKING)
    assert set(ENGINES) > {engine}
    for rank in on_ranks(2, run_parted, engine, tiny, *RANKING):
        assert far_apart(rank["kept"], expected) < 1e-6


def test_ranking_goes_with_surgery(tiny: Path) -> None:
    overrides = [*RANKING, "gradients.combiner=pcgrad"]
    one = run(tiny, *overrides)["parameters"]
    for rank in on_ranks(2, run, tiny, *overrides):
        assert far_apart(rank["parameters"], one) < 1e-6


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["tasks.same.ranking={}"],
            "tasks.same: ranking needs a vector for each sentence of a pair; head cross_encoder",
        ),
        (["tasks.mood.ranking={}"], "tasks.mood: ranking needs a vector for each sentence of a pair; head linear"),
        (["tasks.near.ranking={positives_from: 6}"], "tasks.near: ranking.positives_from is 6: no pair, or every one"),
        (
            ["tasks.near.ranking={}", "gradients.accumulation=2"],
            "compares all pairs of a draw, which micro-batches keep",
        ),
        (
            ["tasks.near.ranking={}", "gradients.max_tokens=99"],
            "compares all pairs of a draw, which micro-batches keep",
        ),
        (["tasks.near.r_drop=-1"], "tasks.near.r_drop is -1; must be greater than or equal to 0"),
    ],
)
def test_what_does_not_fit_is_refused(tiny: Path, overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        load(Experiment, tiny, overrides)
    assert line in str(refused.value)


def noise_of(config: Path, *overrides: str) -> list[dict[str, Any]]:
    run(config, *overrides)
    lines = (config.parent / "run" / "metrics.jsonl").read_text().splitlines()
    return [record.get("noise") or {} for record in map(json.loads, lines) if record["kind"] == "train"]


def test_a_ranked_task_tells_nothing_of_its_noise_on_several_ranks(tiny: Path) -> None:
    measured = [*RANKING, "gradients.measure=true", "tasks.near.ranking=null"]
    found = [noise["scale"] for noise in on_ranks(2, noise_of, tiny, *measured)[0] if noise]
    assert found and all(set(scale) == {"mood", "near"} for scale in found)


def test_the_row_that_is_no_number_is_named_and_not_those_it_was_compared_with(tiny: Path) -> None:
    task = load(Experiment, tiny, RANKING).tasks["same"]
    raw, vectors, gold = torch.zeros(6, 1), torch.randn(12, 4), torch.ones(6)
    raw[4] = vectors[4] = vectors[10] = math.nan
    batch = Batch("same", np.arange(6), None, gold, torch.ones(6), False, (6,))  # type: ignore[arg-type]
    found = task.losses(lambda name, packed, with_vectors: (raw, vectors), batch)
    assert found.isnan().nonzero()[:, 0].tolist() == [4]
