"""Predictions and dev scores, computed by all ranks together: every row once, whatever the number of ranks."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mtl_dist import metrics
from mtl_dist.config import UserError, refusing
from mtl_dist.data.batches import eval_batches
from mtl_dist.data.prepare import Split
from mtl_dist.data.read import File, Format
from mtl_dist.distributed import autocast, first_then_others, on_one, processes
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import BEST, MultiTaskModel, load_model
from mtl_dist.objectives import Classification, Regression
from mtl_dist.tasks import Metric, SplitName, TaskConfig

Scores = dict[str, Any]


@torch.no_grad()
def predict(
    accelerator: Accelerator,
    model: MultiTaskModel,
    name: str,
    task: TaskConfig,
    split: Split,
    max_tokens: int,
    on_batch: Callable[[], object] = lambda: None,
) -> NDArray[np.float64]:
    """The prediction for each row of a split, in their order, on every rank."""
    rank, world = accelerator.process_index, accelerator.num_processes
    was_training = model.training
    model.eval()
    predictions = np.full(len(split), np.nan)
    for batch in eval_batches(name, split, np.arange(rank, len(split), world), max_tokens):
        on_batch()
        with autocast(accelerator):
            raw_NO = model(name, batch.packed.to(accelerator.device))
        predictions[batch.rows] = task.loss.predict(raw_NO, task.label).double().cpu().numpy()
    model.train(was_training)
    # Each rank fills in its own rows: none is counted twice, and a rank may have none at all.
    for other, theirs in enumerate(gather_object([predictions[rank::world]])):
        predictions[other::world] = theirs
    return predictions


def score_all(
    accelerator: Accelerator,
    model: MultiTaskModel,
    tasks: Mapping[str, TaskConfig],
    splits: Mapping[str, Split],
    max_tokens: int,
    on_batch: Callable[[], object] = lambda: None,
) -> Scores:
    """Every metric of every task that has a split, and both overall scores."""
    scores: Scores = {"tasks": {}}
    for name, split in splits.items():
        predictions = predict(accelerator, model, name, tasks[name], split, max_tokens, on_batch)
        scores["tasks"][name] = score(tasks[name], split, predictions)
    return scores | (metrics.overall(main_scores(tasks, scores)) if splits else {})


def main_scores(tasks: Mapping[str, TaskConfig], scores: Scores) -> dict[str, tuple[Metric, float | None]]:
    """The metric that counts for each task, and its value."""
    return {name: (tasks[name].metric, values[tasks[name].metric]) for name, values in scores["tasks"].items()}


def deciding_score(config: Experiment, scores: Scores) -> float:
    """The score that tells the best model; an undefined one is the worst."""
    if not scores["tasks"]:
        return -math.inf
    if config.evaluate.best_by in scores["tasks"]:
        _, value = main_scores(config.tasks, scores)[config.evaluate.best_by]
        return -math.inf if value is None else value
    return float(scores[config.evaluate.best_by])


def score(task: TaskConfig, split: Split, predictions: NDArray[np.float64]) -> Scores:
    """Every metric that fits the task's label, over the rows that have one."""
    gold = np.array([split.label(row) for row in range(len(split))])
    if isinstance(task.label, Regression):
        return {"rows": len(gold), **metrics.evaluate("regression", predictions, gold)}
    classes = task.label.classes
    return {
        "rows": len(gold),
        **metrics.evaluate(task.label.kind, predictions, gold, classes),
        "confusion": metrics.confusion_matrix(predictions, gold, classes).tolist(),
    }


def shown(task: TaskConfig, value: float) -> str | int | float:
    """A prediction or label as the task's files write it."""
    if isinstance(task.label, Regression):
        return round(float(value), 6)
    if isinstance(task.label, Classification) and task.label.names is not None:
        return task.label.names[int(value)]
    return int(value)


def _opened_anew(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")


def write_predictions(path: Path, task: TaskConfig, split: Split, predictions: NDArray[np.float64]) -> None:
    """One line per row: JSON where the file's name ends in .jsonl, else the CS224N form `id, Predicted_Label`."""
    with refusing(f"cannot write {path}"), _opened_anew(path) as file:
        if path.suffix != ".jsonl":
            file.write("id, Predicted_Label\n")
        for row, value in enumerate(predictions):
            name, label = " ".join(split.id(row).split()), shown(task, value)  # a line break would make two lines
            if path.suffix == ".jsonl":
                file.write(json.dumps({"id": name, "line": split.line(row), "prediction": label}) + "\n")
            else:
                file.write(f"{name}, {label}\n")


@contextmanager
def best_of(config: Experiment, folder: Path) -> Iterator[tuple[Accelerator, MultiTaskModel, Tokenizer]]:
    """A run's best model, ready to predict on all processes."""
    # How many processes there must be, and on what, was said of the training.
    wanted = config.distributed.model_copy(update={"processes": None, "device": "auto"})
    with processes(wanted, config.precision) as accelerator:
        model, tokenizer = first_then_others(accelerator, lambda: load_model(folder / BEST, config.tasks))
        yield accelerator, model.to(accelerator.device), tokenizer


def evaluate_run(config: Experiment, folder: Path, split_name: SplitName) -> Scores:
    """Every metric of a run's best model on the dev or test sets of its tasks."""
    with best_of(config, folder) as (accelerator, model, tokenizer):
        opened = first_then_others(
            accelerator, lambda: {name: config.open_split(name, split_name, tokenizer) for name in config.tasks}
        )
        splits = {name: split for name, split in opened.items() if split is not None}
        if not splits:
            raise UserError(f"{folder}: no task of this run has a {split_name} set")
        return score_all(accelerator, model, config.tasks, splits, config.evaluate.max_tokens)


def predict_file(config: Experiment, folder: Path, name: str, path: Path, format: Format | None, out: Path) -> Split:
    """Writes a task's predictions for the rows of a file, whose labels are not looked at; returns what was read."""
    if out.resolve() == path.resolve():
        raise UserError(f"--out is {out}, the file to read; choose another")
    if name not in config.tasks:
        raise UserError(f"{folder} has no task '{name}'; it has {', '.join(config.tasks)}")
    task = config.tasks[name]
    # A file of an unknown suffix, or a .csv full of tabs, is read as the task's own files are.
    own = task.train.format if isinstance(task.train, File) and task.train.path.suffix == path.suffix else None
    source = File(path=path, format=format or own)
    with best_of(config, folder) as (accelerator, model, tokenizer):
        split = first_then_others(accelerator, lambda: config.open_source(name, source, tokenizer, labelled=False))
        predictions = predict(accelerator, model, name, task, split, config.evaluate.max_tokens)
        on_one(accelerator, lambda: write_predictions(out, task, split, predictions))
        return split
