"""The loop as users run it, on one process and on several real ones.

python -m pytest tests/training/test_loop.py
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_dist.config import UserError, load
from mtl_dist.data.mixer import Size
from mtl_dist.experiment import Experiment
from mtl_dist.runs.predict import evaluate_run
from mtl_dist.training.loop import train
from mtl_dist.training.setup import evaluation_steps
from mtl_dist.watch.recorder import TENSORBOARD
from tests.distributed import on_ranks
from tests.trained import NO_DROPOUT, far_apart, run, written_out


@pytest.fixture
def twenty_steps(tiny: Path) -> tuple[Path, list[str]]:
    # The last model is the best one when only the last is scored.
    return tiny, [*NO_DROPOUT, "steps=20", "length_window=1", "evaluate.every_steps=100", "log.tensorboard=false"]


def test_training_does_not_depend_on_the_number_of_processes(twenty_steps: tuple[Path, list[str]]) -> None:
    config, overrides = twenty_steps
    expected = run(config, *overrides)
    # Batches of 6, 9 and 1 rows: unequal shares, and for `near` processes with no row at all.
    for world, changes in ((2, ["gradients.accumulation=3"]), (4, ["gradients.max_tokens=40"])):
        ranks = on_ranks(world, run, config, *overrides, *changes)
        for other in ranks:
            assert far_apart(other["parameters"], expected["parameters"]) < 1e-6
            assert other["scores"]["tasks"].keys() == expected["scores"]["tasks"].keys()
    # The check can fail: another seed's rows move the parameters by far more.
    assert far_apart(run(config, *overrides, "seed=1")["parameters"], expected["parameters"]) > 1e-2


def test_accumulation_changes_nothing_but_memory(twenty_steps: tuple[Path, list[str]]) -> None:
    config, overrides = twenty_steps
    whole = run(config, *overrides)["parameters"]
    for split in ("accumulation=4", "max_tokens=20"):
        assert far_apart(run(config, *overrides, f"gradients.{split}")["parameters"], whole) < 1e-6


def test_the_loop_is_the_sum_of_weighted_mean_losses_and_adamw(twenty_steps: tuple[Path, list[str]]) -> None:
    config, overrides = twenty_steps
    assert far_apart(run(config, *overrides)["parameters"], written_out(config, *overrides)) < 1e-6


def test_the_run_folder_holds_what_the_docs_say(tiny: Path) -> None:
    scores = run(tiny, "evaluate.every_steps=3")["scores"]
    folder = tiny.parent / "run"
    assert load(Experiment, folder / "config.yaml") == load(Experiment, tiny, ["evaluate.every_steps=3"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [
        ("start", 0),
        ("train", 2),
        ("dev", 3),
        ("train", 4),
        ("train", 6),
        ("dev", 6),
        ("end", 6),
    ]
    assert records[0]["steps"] == 6
    assert records[4]["draws"] == {"mood": 6, "same": 6, "near": 6}
    assert records[4]["examples"] == {"mood": 36, "same": 54, "near": 6}
    assert records[4]["gradient_norm"] > 0
    # What the rows of the steps had: near has one a step, and seven rows.
    assert 2 * records[2 - 1]["tokens"] < records[4]["tokens"] == records[-1]["tokens"]
    assert json.loads((folder / "best" / "scores.json").read_text()) == scores
    assert scores["step"] in (3, 6)
    events = EventAccumulator(str(folder / TENSORBOARD)).Reload()
    assert "config/text_summary" in events.Tags()["tensors"]
    assert "dev/overall_a" in events.Tags()["scalars"]


def test_eval_gives_the_scores_of_the_best_model(tiny: Path) -> None:
    scores = run(tiny)["scores"]
    experiment = load(Experiment, tiny)
    again = evaluate_run(experiment, experiment.output_dir, "dev")
    assert {**again, "step": 6} == scores


def score_on_rank(config: Path) -> dict[str, Any]:
    experiment = load(Experiment, config)
    return evaluate_run(experiment, experiment.output_dir, "dev")


def test_five_rows_on_two_ranks_give_the_metric_of_one(tiny: Path) -> None:
    run(tiny)
    experiment = load(Experiment, tiny)
    expected = evaluate_run(experiment, experiment.output_dir, "dev")
    assert expected["tasks"]["mood"]["rows"] == 5
    assert sum(map(sum, expected["tasks"]["mood"]["confusion"])) == 5
    for scores in on_ranks(2, score_on_rank, tiny):
        assert scores["tasks"]["mood"] == expected["tasks"]["mood"]
        assert scores["tasks"]["near"]["pearson"] == pytest.approx(expected["tasks"]["near"]["pearson"], abs=1e-6)


def test_training_learns(tiny: Path) -> None:
    # Seven rows, read a hundred times.
    shutil.copy(tiny.parent / "near-train.tsv", tiny.parent / "near-again.tsv")
    only_near = ["steps=200", "optim.lr=3e-3", "tasks.near.batch_size=7", "tasks.near.dev=near-again.tsv"]
    scores = run(tiny, *only_near, *NO_DROPOUT, "evaluate.best_by=near")["scores"]
    assert scores["tasks"]["near"]["pearson"] > 0.9


def test_bf16_trains_close_to_fp32(twenty_steps: tuple[Path, list[str]]) -> None:
    config, overrides = twenty_steps
    exact, rounded = (run(config, *overrides, f"precision={p}")["parameters"] for p in ("fp32", "bf16"))
    assert 1e-6 < far_apart(rounded, exact) < 5e-2
    assert all(parameter.dtype == torch.float32 for parameter in rounded.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 and CUDA kernels need a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_trains_close_to_the_cpu(twenty_steps: tuple[Path, list[str]], precision: str) -> None:
    config, overrides = twenty_steps
    cpu = run(config, *overrides, "distributed.device=cpu")["parameters"]
    cuda = run(config, *overrides, "distributed.device=cuda", f"precision={precision}")["parameters"]
    assert far_apart({name: p.cpu() for name, p in cuda.items()}, cpu) < (1e-3 if precision == "fp32" else 5e-2)


def test_a_frozen_encoder_stays_as_it_was(tiny: Path) -> None:
    only_pooler = "optim.rules=[{match: 'pooler|heads.(mood|same)', freeze: false}, {match: '.*', freeze: true}]"
    with pytest.raises(UserError, match="task 'near' has nothing to train"):
        run(tiny, only_pooler)
    frozen = 'optim.rules=[{match: "^encoder", freeze: true}, {match: ".*"}]'
    with pytest.raises(UserError, match="task 'near' has nothing to train"):
        run(tiny, frozen)
    head = "tasks.near.head={kind: sbert}"
    start, end = (run(tiny, frozen, head, f"steps={steps}")["parameters"] for steps in (1, 6))
    moved = {name for name in start if not start[name].equal(end[name])}
    assert moved
    assert all(name.startswith("heads.") for name in moved)


def test_a_run_folder_is_not_overwritten_by_accident(tiny: Path) -> None:
    experiment = load(Experiment, tiny, ["steps=1"])
    train(experiment)
    with pytest.raises(UserError, match="holds a run; go on with it by --resume auto, replace"):
        train(experiment)
    train(experiment, overwrite=True)
    with pytest.raises(UserError, match="matches no parameter"):  # found before the old run is gone
        train(load(Experiment, tiny, ["optim.rules=[{match: encodr}, {match: '.*'}]"]), overwrite=True)
    assert (experiment.output_dir / "best").exists()


def test_a_folder_that_is_no_run_is_never_emptied(tiny: Path) -> None:
    experiment = load(Experiment, tiny, ["steps=1"])
    folder = experiment.output_dir
    folder.mkdir()
    (folder / "config.yaml").write_text("mine\n")
    with pytest.raises(UserError, match=r"run holds config\.yaml, not a run; choose another folder"):
        train(experiment, overwrite=True)
    (folder / "config.yaml").unlink()
    train(experiment)
    (folder / "notes.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"run holds notes\.txt, not a run; choose another folder"):
        train(experiment, overwrite=True)
    assert (folder / "best").exists()


def test_losses_that_stay_no_numbers_end_the_run(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"step 11: the loss of task '\w+' is no number at .*, 10 steps in a row"):
        run(tiny, "optim.lr=1e15", "gradients.clip_norm=null", "steps=20")


def test_rejected_rows_are_listed_in_the_run_folder(tiny: Path) -> None:
    rows = tiny.parent / "mood-train.tsv"
    rows.write_text(rows.read_text() + "m99\tbam\t7\n")
    with pytest.raises(UserError, match=r"mood-train.tsv:42: label is 7, none of the classes 0 to 2"):
        run(tiny)
    run(tiny, "tasks.mood.bad_rows=skip", "steps=1")
    assert (tiny.parent / "run" / "rejected.tsv").read_text() == (
        f"mood\t{rows}:42\tlabel is 7, none of the classes 0 to 2\n"
    )


def test_evaluation_comes_after_each_epoch_and_at_the_end(tiny: Path) -> None:
    sizes = {"a": Size(100, 8), "b": Size(10, 8)}

    def due(steps: int, *overrides: str) -> list[int]:
        config = load(Experiment, tiny, overrides)
        return sorted(evaluation_steps(config, config.mixer.order(sizes, (0, 0), epochs=1, steps=steps)))

    assert due(30) == [13, 25]  # 100 rows in batches of 8: 12.5 steps; the last step is always followed by one
    assert due(25) == [13]
    assert due(10) == []
    assert due(12, "evaluate.every_steps=4") == [4, 8]


def test_no_dev_set_keeps_the_last_model(tiny: Path) -> None:
    none = [f"tasks.{task}.dev=null" for task in ("mood", "same", "near")]
    for length, step in (([], 6), (["evaluate.every_steps=2"], 6), (["stages=[{steps: 2}, {steps: 3}]"], 5)):
        result = run(tiny, *none, *length)
        assert result["scores"] == {"step": step, "tasks": {}}
    assert np.isfinite(result["parameters"]["heads.mood.layers.0.weight"]).all()
