"""A finished run's best model at work: scores of its dev or test sets, labels for the rows of a file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mtl_dist.config import UserError, refusing
from mtl_dist.data.prepare import Split
from mtl_dist.data.read import File, Format
from mtl_dist.distributed import first_then_others, on_one, processes
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import BEST, MultiTaskModel, load_model
from mtl_dist.model.objectives import Regression
from mtl_dist.tasks import SplitName, TaskConfig
from mtl_dist.training.scores import Scores, predict, score_all


def shown(task: TaskConfig, value: float) -> str | int | float:
    """A prediction or label as the task's files write it."""
    if isinstance(task.label, Regression):
        return round(float(value), 6)
    if task.label.names is not None:
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
