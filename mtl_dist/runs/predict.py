"""A finished run's best model at work: scores of its dev or test sets, labels for the rows of a file."""

import csv
import difflib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mtl_dist.config import UserError, refusing
from mtl_dist.data.prepare import Split
from mtl_dist.data.read import DELIMITERS, File, Format, NoColumnError, Row, SourceError, place, read_rows
from mtl_dist.distributed import first_then_others, on_one, processes
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import BEST, MultiTaskModel, load_model
from mtl_dist.model.objectives import Regression
from mtl_dist.tasks import SplitName, TaskConfig
from mtl_dist.training.scores import Predicted, Scores, predict, score_all, without_number

Written = Literal["csv", "tsv", "jsonl", "cs224n"]  # how predictions are; the last is `id, Predicted_Label`


def shown(task: TaskConfig, value: float) -> str | int | float | None:
    """A prediction or label as the task's files write it; nothing where the model gave no number."""
    if math.isnan(value):
        return None
    if isinstance(task.label, Regression):
        return round(float(value), 6)
    if task.label.names is not None:
        return task.label.names[int(value)]
    return int(value)


def shown_probabilities(task: TaskConfig, probabilities_C: NDArray[np.float64]) -> dict[str, float] | None:
    """The probabilities of a row's classes by their names or numbers; nothing where the model gave no number."""
    if np.isnan(probabilities_C).any():
        return None
    return {name: round(float(p), 6) for name, p in zip(class_names(task), probabilities_C, strict=True)}


def class_names(task: TaskConfig) -> list[str]:
    """The classes of a task's label, by their names or numbers."""
    assert not isinstance(task.label, Regression)
    return task.label.names or [str(number) for number in range(task.label.classes)]


def task_of(config: Experiment, folder: Path, name: str) -> TaskConfig:
    """A task of a run; refuses a name that it has not."""
    if name not in config.tasks:
        close = difflib.get_close_matches(name, config.tasks, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"{folder} has no task '{name}'; it has {', '.join(config.tasks)}{hint}")
    return config.tasks[name]


def _opened_anew(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8", newline="")


def written_by_suffix(path: Path) -> Written:
    """How predictions are written to a file of this name."""
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return "jsonl"
        case ".tsv":
            return "tsv"
    return "csv"


def write_predictions(
    path: Path, task: TaskConfig, split: Split, predicted: Predicted, written: Written | None = None
) -> None:
    """A line for each row, under a header but in JSON; what is not there is empty, or null.

    The probabilities of the classes are written where there are any, and the format has a place for them.
    """
    written = written or written_by_suffix(path)
    # A line break in a name would make two lines.
    rows = [(" ".join(split.id(row).split()), shown(task, value)) for row, value in enumerate(predicted.values)]
    names: list[str] = []
    of_classes: list[dict[str, float] | None] = [None] * len(rows)
    if predicted.probabilities is not None:
        names = class_names(task)
        of_classes = [shown_probabilities(task, each_C) for each_C in predicted.probabilities]
    with refusing(f"cannot write {path}"), _opened_anew(path) as file:
        if written == "jsonl":
            for row, (name, label) in enumerate(rows):
                more = {"probabilities": of_classes[row]} if names else {}
                file.write(json.dumps({"id": name, "line": split.line(row), "prediction": label, **more}) + "\n")
        elif written == "cs224n":
            file.write("id, Predicted_Label\n")
            file.writelines(f"{name}, {'' if label is None else label}\n" for name, label in rows)
        else:
            writer = csv.writer(file, delimiter=DELIMITERS[written], lineterminator="\n")
            writer.writerow(["id", "prediction", *(f"p_{name}" for name in names)])
            nothing = dict.fromkeys(names)
            for (name, label), by_class in zip(rows, of_classes, strict=True):
                writer.writerow([name, label, *(by_class or nothing).values()])


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


def predict_file(
    config: Experiment,
    folder: Path,
    name: str,
    path: Path,
    out: Path,
    format: Format | None = None,
    written: Written | None = None,
    overwrite: bool = False,
    probabilities: bool = False,
) -> tuple[int, list[str]]:
    """Writes a task's predictions for the rows of a file, whose labels are not looked at.

    JSON lines have the probabilities of the classes wherever there are any, the others if they are asked for. Returns
    how many rows have a prediction, and what a user should know of the others.
    """
    if out.resolve() == path.resolve():
        raise UserError(f"--out is {out}, the file to read; choose another")
    if out.is_file() and not overwrite:
        raise UserError(f"--out is {out}, which is there already; replace it with --overwrite, or choose another")
    task = task_of(config, folder, name)
    written = written or written_by_suffix(out)
    if probabilities:
        _refuse_without_probabilities(name, task, written)
    # A file of an unknown suffix, or a .csv full of tabs, is read as the task's own files are.
    own = task.train.format if isinstance(task.train, File) and task.train.path.suffix == path.suffix else None
    source = File(path=path, format=format or own)
    remarks = []
    with best_of(config, folder) as (accelerator, model, tokenizer):
        if (id := task.columns.id) is not None and not _has_column(source, id):
            remarks.append(f"{path} has no column {id!r}: its rows go by their line numbers")
            columns = task.columns.model_copy(update={"id": None})
            tasks = config.tasks | {name: task.model_copy(update={"columns": columns})}
            config = config.model_copy(update={"tasks": tasks})
        split = first_then_others(accelerator, lambda: config.open_source(name, source, tokenizer, labelled=False))
        predicted = predict(
            accelerator,
            model,
            name,
            task,
            split,
            config.evaluate.max_tokens,
            probabilities=probabilities or written == "jsonl",
        )
        if lost := without_number(name, split, predicted.values):
            if np.isnan(predicted.values).all():
                raise UserError(f"{lost}; {out} is not written")
            remarks.append(f"{lost}; their labels are left empty")
        for bad in split.rejected()[:1]:
            first = f"{place(source, bad.line)}: {bad.message}"
            remarks.append(f"{split.num_rejected:,} rows have no prediction, the first is {first}")
        on_one(accelerator, lambda: write_predictions(out, task, split, predicted, written))
        return int(np.isfinite(predicted.values).sum()), remarks


def _refuse_without_probabilities(name: str, task: TaskConfig, written: Written) -> None:
    if isinstance(task.label, Regression):
        raise UserError(f"--probabilities: task '{name}' predicts a number, and has no classes to give them of")
    if not task.loss.gives_probabilities:
        raise UserError(
            f"--probabilities: task '{name}' was trained with the loss {task.loss.kind}, whose outputs are none; "
            "those of cross_entropy and bce are"
        )
    if written == "cs224n":
        raise UserError("--probabilities: the format cs224n has no place for them; choose csv, tsv or jsonl")


def _has_column(source: File, column: str) -> bool:
    """Whether any row has the column, or the file has other faults, which whoever reads it tells."""
    try:
        return any(isinstance(row, Row) for row in read_rows(source, columns=[column]))
    except NoColumnError:
        return False
    except SourceError:
        return True
