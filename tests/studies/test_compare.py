"""Finished runs side by side: `mtl-dist compare`.

python -m pytest tests/studies/test_compare.py
"""

import json
import shutil
from pathlib import Path

import pytest

from mtl_dist.cli import main
from mtl_dist.config import load
from mtl_dist.experiment import Experiment
from mtl_dist.training.loop import train


def trained(tiny: Path, name: str, *overrides: str) -> Path:
    folder = tiny.parent / name
    train(load(Experiment, tiny, ["log.tensorboard=false", f"output_dir={folder}", *overrides]))
    return folder


def test_runs_side_by_side(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint = [trained(tiny, f"joint/{seed}", f"seed={seed}") for seed in (0, 1)]
    alone = trained(tiny, "alone", "tasks.same=null", "tasks.near=null", "evaluate.best_by=mood", "steps=3")
    unfinished = tiny.parent / "unfinished"
    shutil.copytree(joint[0], unfinished)
    metrics = unfinished / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    nothing = tiny.parent / "nothing"
    capsys.readouterr()

    assert main(["compare", *map(str, [*joint, nothing, alone, unfinished, tiny.parent])]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"{nothing}: no such folder",
        f"{unfinished}: the run has not ended, after step 6; go on with it, then compare",
        f"{tiny.parent}: no run is in this folder",
    ]
    table, changes = said.out.split("\n\n")
    header, *rows = table.splitlines()
    assert header.split()[:4] == ["system", "seeds", "mood", "same"]
    assert [row.split()[:2] for row in rows[:2]] == [["joint", "2"], ["alone", "1"]]
    assert "reference" in rows[0] and "baseline" in rows[1] and "3 of 3" in rows[1]
    assert [line.split() for line in changes.splitlines()[1:] if "evaluate" in line] == [
        ["evaluate.best_by", "overall_a", "joint"]
    ]
    assert "steps" in changes and "seed" not in changes.replace("seeds", "") and "output_dir" not in changes

    assert main(["compare", "--json", *map(str, [*joint, alone])]) == 0
    document = json.loads(capsys.readouterr().out)
    scores = [
        json.loads((folder / "best/scores.json").read_text())["tasks"]["mood"]["accuracy"] for folder in (*joint, alone)
    ]
    of_joint, of_alone = document["rows"]
    assert of_joint["ours"]["mood"]["mean"] == pytest.approx((scores[0] + scores[1]) / 2)
    assert scores[2] > 0  # or there is nothing to compare with
    expected = ((scores[0] + scores[1]) / 2 - scores[2]) / scores[2]
    assert of_joint["delta_m"] == {"value": pytest.approx(expected), "tasks": ["mood"]}
    assert of_alone["budget"] == pytest.approx(of_alone["tokens"]["mean"] / of_joint["tokens"]["mean"])
    assert [run["seed"] for run in of_joint["runs"]] == [0, 1]
    assert of_joint["runs"][0]["train_rows"] == {"mood": 40, "same": 70, "near": 7}


def test_the_same_run_twice_is_one(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tiny, "a", "steps=1")
    again = tiny.parent / "b"
    shutil.copytree(run, again)
    capsys.readouterr()
    assert main(["compare", str(run), str(run)]) == 0
    assert "against" not in capsys.readouterr().out
    assert main(["compare", str(run), str(again)]) == 2
    assert capsys.readouterr().err == f"{again}: the same config and seed as {run}; left out\n"
