"""The loop as users run it, on one process and on several real ones.

python -m pytest tests/test_train.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from mtl_dist.config import UserError, load
from mtl_dist.data.batches import RowOrder
from mtl_dist.data.mixer import Size
from mtl_dist.evaluate import evaluate_run
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import load_model
from mtl_dist.telemetry import TENSORBOARD
from mtl_dist.train import evaluation_steps, train
from tests.distributed import on_ranks

NO_DROPOUT = [
    "encoder.dropout=0",
    "encoder.attention_dropout=0",
    *(f"tasks.{task}.dropout=0" for task in ("mood", "same", "near")),
]


def run(config: Path, *overrides: str) -> dict[str, Any]:
    """Trains; returns the scores, and every parameter of the model that was kept."""
    experiment = load(Experiment, config, overrides)
    scores = train(experiment, overwrite=True)
    model, _ = load_model(experiment.output_dir / "best", experiment.tasks)
    return {"scores": scores, "parameters": {name: p.detach() for name, p in model.named_parameters()}}


def far_apart(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference between two parameters, where the largest parameters are about 1."""
    assert actual.keys() == expected.keys()
    return max((actual[name] - value).abs().max().item() for name, value in expected.items())


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


def explicit_steps(config: Path, overrides: list[str]) -> dict[str, Tensor]:
    """The same training written out: torch's AdamW, one loss over the global batches, no Accelerate."""
    experiment = load(Experiment, config, overrides)
    from rich.console import Console

    from mtl_dist.data.batches import make_batch
    from mtl_dist.model.multitask import MultiTaskModel
    from mtl_dist.model.weights import build_encoder
    from mtl_dist.tokenizer import load_tokenizer
    from mtl_dist.train import load_data

    tokenizer = load_tokenizer(experiment.encoder.tokenizer_source)
    splits = load_data(experiment, tokenizer, Console(quiet=True))["train"]
    torch.manual_seed(experiment.seed)
    model = MultiTaskModel(build_encoder(experiment.encoder, tokenizer), experiment.tasks)
    # No decay, so the parameter rules change nothing.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, weight_decay=0)
    for step in range(20):
        total = torch.zeros(())
        for name, task in experiment.tasks.items():
            rows = RowOrder(len(splits[name]), experiment.seed, 0, name).rows(
                step * task.batch_size, (step + 1) * task.batch_size
            )
            batch = make_batch(name, splits[name], rows)
            losses = task.loss.per_example(model(name, batch.packed), batch.gold_N, task.label)
            total = total + task.weight * losses.mean()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_the_loop_is_the_sum_of_weighted_mean_losses_and_adamw(twenty_steps: tuple[Path, list[str]]) -> None:
    config, overrides = twenty_steps
    constant = [*overrides, "optim.schedule.kind=constant"]
    assert far_apart(run(config, *constant)["parameters"], explicit_steps(config, constant)) < 1e-6


def test_the_run_folder_holds_what_the_docs_say(tiny: Path) -> None:
    scores = run(tiny, "evaluate.every_steps=3")["scores"]
    folder = tiny.parent / "run"
    assert load(Experiment, folder / "config.yaml") == load(Experiment, tiny, ["evaluate.every_steps=3"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 2),
        ("dev", 3),
        ("train", 4),
        ("train", 6),
        ("dev", 6),
    ]
    assert records[3]["draws"] == {"mood": 6, "same": 6, "near": 6}
    assert records[3]["examples"] == {"mood": 36, "same": 54, "near": 6}
    assert records[3]["gradient_norm"] > 0
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
    only_near = ["steps=200", "optim.lr=3e-3", "tasks.near.batch_size=7", "tasks.near.dev=near-train.tsv"]
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
    with pytest.raises(UserError, match="holds a run; choose another folder, or replace it with --overwrite"):
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


def test_a_loss_that_is_no_number_ends_the_run(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"step \d: the loss of task '(mood|same|near)' is nan"):
        run(tiny, "optim.lr=1e30", "gradients.clip_norm=null", "steps=20")


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
    result = run(tiny, *none)
    assert result["scores"] == {"step": 6, "tasks": {}}
    assert np.isfinite(result["parameters"]["heads.mood.layers.0.weight"]).all()
