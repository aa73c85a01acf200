"""Scores and prediction files, on predictions given by hand."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from mtl_dist.config import load
from mtl_dist.data.batches import make_batch
from mtl_dist.data.packed import Packed
from mtl_dist.data.prepare import Split
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.distributed import processes
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import MultiTaskModel
from mtl_dist.model.objectives import Binary, Classification
from mtl_dist.model.weights import build_encoder
from mtl_dist.runs.predict import shown, write_predictions
from mtl_dist.tasks import TaskConfig
from mtl_dist.training.scores import Predicted, deciding_score, main_scores, predict, score, score_all
from mtl_dist.watch.screen import score_table
from tests.distributed import on_ranks


def opened(config: Path, task: str, *overrides: str) -> tuple[TaskConfig, Split]:
    experiment = load(Experiment, config, overrides)
    split = experiment.open_split(task, "dev", load_tokenizer(experiment.encoder.tokenizer_source))
    assert split is not None
    return experiment.tasks[task], split


def test_scores_by_hand(tiny: Path) -> None:
    rows = ["id\tsentence\tlabel", *(f"{i}\tbam bat\t{label}" for i, label in enumerate([0, 0, 1, 1, 2]))]
    (tiny.parent / "mood-dev.tsv").write_text("\n".join(rows) + "\n")
    task, split = opened(tiny, "mood")
    scores = score(task, split, np.array([0.0, 1.0, 1.0, 1.0, 1.0]))
    # F1 of the classes: 2/3, 2 * 2 / (2 * 2 + 2), 0.
    assert scores == {
        "rows": 5,
        "accuracy": pytest.approx(0.6),
        "macro_f1": pytest.approx((2 / 3 + 4 / 6 + 0) / 3),
        "confusion": [[1, 1, 0], [0, 2, 0], [0, 1, 0]],
    }


def test_constant_predictions_are_undefined_and_never_the_best(tiny: Path) -> None:
    task, split = opened(tiny, "near")
    collapsed = {"tasks": {"near": score(task, split, np.full(5, 2.5))}, "overall_a": 0.5, "overall_b": 0.0}
    assert collapsed["tasks"]["near"]["pearson"] is None
    assert collapsed["tasks"]["near"]["mse"] > 0
    experiment = load(Experiment, tiny, ["evaluate.best_by=near"])
    assert main_scores(experiment.tasks, collapsed) == {"near": ("pearson", None)}
    assert deciding_score(experiment, collapsed) == -np.inf
    assert deciding_score(load(Experiment, tiny), collapsed) == 0.5


def test_what_a_csv_reader_reads_back(tiny: Path, tmp_path: Path) -> None:
    rows = ["id,sentence,label", '"a, ""b""",bam,0', "c,bat,1"]
    (tiny.parent / "mood-dev.csv").write_text("\n".join(rows) + "\n")
    task, split = opened(tiny, "mood", "tasks.mood.dev=mood-dev.csv")
    named = task.model_copy(update={"label": Classification(kind="classification", names=["so, so", "x"])})
    for name in ("x.csv", "x.tsv"):
        write_predictions(tmp_path / name, named, split, Predicted(np.array([0.0, np.nan])))
        with (tmp_path / name).open(newline="") as file:
            read = list(csv.DictReader(file, delimiter="," if name == "x.csv" else "\t"))
        assert read == [{"id": 'a, "b"', "prediction": "so, so"}, {"id": "c", "prediction": ""}]


def test_outputs_that_are_no_numbers_are_counted_and_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = load(Experiment, tiny)
    tokenizer = load_tokenizer(experiment.encoder.tokenizer_source)
    splits = {name: experiment.open_split(name, "dev", tokenizer) for name in experiment.tasks}
    model = MultiTaskModel(build_encoder(experiment.encoder, tokenizer), experiment.tasks)
    forward = MultiTaskModel.forward

    def poisoned(self: MultiTaskModel, task: str, packed: Packed) -> Tensor:
        raw_NO = forward(self, task, packed)
        raw_NO[0, -1] = {"mood": torch.nan, "same": -torch.inf, "near": torch.nan}[task]
        return raw_NO

    monkeypatch.setattr(MultiTaskModel, "forward", poisoned)
    with processes(experiment.distributed, "fp32") as accelerator:
        scores = score_all(accelerator, model, experiment.tasks, splits, max_tokens=8192)
    for name, values in scores["tasks"].items():
        assert (values["rows"], values["no_number"]) == (5, 1)
        if name != "near":
            assert sum(map(sum, values["confusion"])) == 4
    assert scores["tasks"]["near"]["pearson"] is None
    told = [message.partition(" rows, the first is ") for message in caplog.messages]
    assert [before for before, *_ in told] == [
        f"task '{name}': the model gives no number for 1 of 5" for name in ("mood", "same", "near")
    ]
    assert [after.partition("; ")[2] for *_, after in told] == [
        "they count as wrong",
        "they count as wrong",
        "no correlation is defined",
    ]
    console = Console(width=140, file=io.StringIO())
    console.print(score_table(scores, {name: task.metric for name, task in experiment.tasks.items()}))
    assert "no_number 1, macro_f1" in console.file.getvalue()  # type: ignore[attr-defined]


def test_predictions_are_written_in_the_words_of_the_files(tiny: Path, tmp_path: Path) -> None:
    task, split = opened(tiny, "mood")
    named = task.model_copy(
        update={"label": task.label.model_copy(update={"num_classes": None, "names": ["a", "b", "c"]})}
    )
    predictions = Predicted(np.array([2.0, 0.0, 1.0, 1.0, 2.0]))
    labels = [2, 0, 1, 1, 2]
    for written, header, between in ((None, "id,prediction", ","), ("tsv", "id\tprediction", "\t"),
                                     ("cs224n", "id, Predicted_Label", ", ")):  # fmt: skip
        path = tmp_path / "new" / f"{written}.csv"
        write_predictions(path, task, split, predictions, written)
        lines = [f"mood{row}{between}{label}" for row, label in enumerate(labels)]
        assert path.read_bytes().decode() == "\n".join([header, *lines, ""])
    write_predictions(tmp_path / "named.jsonl", named, split, predictions)
    first = json.loads((tmp_path / "named.jsonl").read_text().splitlines()[0])
    assert first == {"id": "mood0", "line": 2, "prediction": "c"}
    assert shown(task.model_copy(update={"label": Binary(kind="binary", names=["no", "yes"])}), 1.0) == "yes"
    assert shown(opened(tiny, "near")[0], 3.14159265) == 3.141593
    assert shown(opened(tiny, "same")[0], 1.0) == 1


def test_probabilities_are_written_beside_the_predictions(tiny: Path, tmp_path: Path) -> None:
    task, split = opened(tiny, "mood")
    named = task.model_copy(update={"label": Classification(kind="classification", names=["so, so", "b", "c"])})
    rows_C = np.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [np.nan] * 3, [0, 1, 0], [1e-9, 0, 1]])
    predicted = Predicted(np.array([0.0, 0.0, np.nan, 1.0, 2.0]), rows_C)
    write_predictions(tmp_path / "a.csv", named, split, predicted)
    with (tmp_path / "a.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read[0] == {"id": "mood0", "prediction": "so, so", "p_so, so": "0.5", "p_b": "0.25", "p_c": "0.25"}
    assert read[1]["p_c"] == "0.333333"
    assert set(read[2].values()) == {"mood2", ""}
    write_predictions(tmp_path / "a.jsonl", task, split, predicted)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines[3] == {"id": "mood3", "line": 5, "prediction": 1, "probabilities": {"0": 0.0, "1": 1.0, "2": 0.0}}
    assert lines[2] == {"id": "mood2", "line": 4, "prediction": None, "probabilities": None}


def _probabilities(config: Path) -> dict[str, list[Any]]:
    """Of every task: what `predict` gives, and what the raw outputs of one row after the other give."""
    experiment = load(Experiment, config)
    tokenizer = load_tokenizer(experiment.encoder.tokenizer_source)
    torch.manual_seed(0)
    model = MultiTaskModel(build_encoder(experiment.encoder, tokenizer), experiment.tasks).eval()
    found: dict[str, list[Any]] = {}
    with processes(experiment.distributed, "fp32") as accelerator:
        for name, task in experiment.tasks.items():
            split = experiment.open_split(name, "dev", tokenizer)
            assert split is not None
            with torch.no_grad():
                raw_NO = torch.cat([model(name, make_batch(name, split, np.array([i])).packed) for i in range(5)])
            predicted = predict(accelerator, model, name, task, split, 8192, probabilities=True)
            assert predict(accelerator, model, name, task, split, 8192).probabilities is None
            found[name] = [predicted.values, predicted.probabilities, raw_NO.double().numpy()]
    return found


def test_probabilities_are_those_of_the_raw_outputs_on_any_number_of_ranks(tiny: Path) -> None:
    one = _probabilities(tiny)
    values, probabilities_NC, raw_NO = one["mood"]
    exp_NO = np.exp(raw_NO)
    np.testing.assert_allclose(probabilities_NC, exp_NO / exp_NO.sum(axis=1, keepdims=True), atol=1e-6)
    assert (values == raw_NO.argmax(axis=1)).all()
    values, probabilities_NC, raw_NO = one["same"]
    np.testing.assert_allclose(probabilities_NC[:, 1], 1 / (1 + np.exp(-raw_NO[:, 0])), atol=1e-6)
    np.testing.assert_allclose(probabilities_NC.sum(axis=1), 1, atol=1e-12)
    assert (values == (probabilities_NC[:, 1] > 0.5)).all()
    assert one["near"][1] is None
    for rank in on_ranks(2, _probabilities, tiny):
        for name, (values, probabilities_NC, _) in rank.items():
            np.testing.assert_allclose(values, one[name][0], atol=1e-5)
            assert (probabilities_NC is None) == (name == "near")
            if probabilities_NC is not None:
                np.testing.assert_allclose(probabilities_NC, one[name][1], atol=1e-6)
