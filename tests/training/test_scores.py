"""Scores and prediction files, on predictions given by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from mtl_dist.config import load
from mtl_dist.data.prepare import Split
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment
from mtl_dist.runs.predict import shown, write_predictions
from mtl_dist.tasks import TaskConfig
from mtl_dist.training.scores import deciding_score, main_scores, score


def opened(config: Path, task: str) -> tuple[TaskConfig, Split]:
    experiment = load(Experiment, config)
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


def test_predictions_are_written_in_the_words_of_the_files(tiny: Path, tmp_path: Path) -> None:
    task, split = opened(tiny, "mood")
    named = task.model_copy(
        update={"label": task.label.model_copy(update={"num_classes": None, "names": ["a", "b", "c"]})}
    )
    predictions = np.array([2.0, 0.0, 1.0, 1.0, 2.0])
    write_predictions(tmp_path / "new" / "plain.csv", task, split, predictions)
    assert (tmp_path / "new" / "plain.csv").read_text() == (
        "id, Predicted_Label\nmood0, 2\nmood1, 0\nmood2, 1\nmood3, 1\nmood4, 2\n"
    )
    write_predictions(tmp_path / "named.jsonl", named, split, predictions)
    first = json.loads((tmp_path / "named.jsonl").read_text().splitlines()[0])
    assert first == {"id": "mood0", "line": 2, "prediction": "c"}
    assert shown(opened(tiny, "near")[0], 3.14159265) == 3.141593
    assert shown(opened(tiny, "same")[0], 1.0) == 1
