"""`mtl-dist errors`: the rows of a dev or test set from the most wrong on, as a page, as JSON lines and in pictures."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mtl_dist.config import UserError, refusing
from mtl_dist.data.prepare import Split, checked_rows, digest
from mtl_dist.data.read import Example, NoColumnError, Row, Source, name_of, read_rows
from mtl_dist.distributed import first_then_others, on_one
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import BEST, saved_scores
from mtl_dist.model.objectives import Regression
from mtl_dist.runs.analysis import Analysis, analyse
from mtl_dist.runs.error_page import About, draw_confusion, draw_predictions, draw_reliability, page_of
from mtl_dist.runs.predict import best_of, class_names, task_of
from mtl_dist.tasks import SplitName, TaskConfig
from mtl_dist.training.folder import CONFUSION, ERRORS, PAGE, PREDICTIONS, RELIABILITY, ROWS
from mtl_dist.training.scores import predict, without_number


@dataclass(frozen=True)
class Errors:
    """What was found, and the files that tell it."""

    about: About
    analysis: Analysis  # without its rows, which are in the first file
    files: list[Path]

    def as_json(self) -> dict[str, Any]:
        """One JSON document, in which the rows are not."""
        told = {name: value for name, value in asdict(self.analysis).items() if name != "rows"}
        return {**asdict(self.about), **told, "files": [str(path) for path in self.files]}


def errors_of_run(
    config: Experiment, folder: Path, name: str, split_name: SplitName = "dev", most: int = 50, out: Path | None = None
) -> Errors:
    """Writes where a run's best model is wrong on a task's dev or test set, `most` rows of it on the page."""
    if most < 0:
        raise UserError(f"--most is {most}; give the number of rows to show, 0 for none")
    task = task_of(config, folder, name)
    source = config.source(name, split_name)
    if source is None:
        raise UserError(f"{folder}: task '{name}' has no {split_name} set; give one by tasks.{name}.{split_name}=FILE")
    into = out or folder / ERRORS / f"{name}-{split_name}"

    def opened() -> Split:
        _refuse_unlabelled(config, name, split_name, source)
        split = config.open_split(name, split_name, tokenizer)
        assert split is not None
        return split

    with best_of(config, folder) as (accelerator, model, tokenizer):
        split = first_then_others(accelerator, opened)
        predicted = predict(accelerator, model, name, task, split, config.evaluate.max_tokens, probabilities=True)
        lost = without_number(name, split, predicted.values)
        if np.isnan(predicted.values).all():
            raise UserError(f"{lost}; {into} is not written")

        def write() -> Errors:
            about = About(
                run=str(folder),
                task=name,
                split=split_name,
                source=name_of(source),
                step=(saved_scores(folder / BEST) or {}).get("step"),
                rows=len(split),
                no_number=lost,
                skipped_rows=split.num_rejected,
            )
            return write_errors(into, task, about, analyse(task, split, examples_of(task, split), predicted), most)

        return on_one(accelerator, write)


def _refuse_unlabelled(config: Experiment, name: str, split_name: SplitName, source: Source) -> None:
    column, rows = config.tasks[name].columns.label, 0
    with config.naming(name, split_name):
        try:
            for row in read_rows(source, columns=[column]):
                if isinstance(row, Row):
                    rows += 1
                    if row.fields[column] is not None and str(row.fields[column]).strip():
                        return
        except NoColumnError:
            rows = 1
    if rows:  # a file without any has other faults, and whoever opens it tells them
        raise UserError(
            f"task '{name}': {name_of(source)} has no labels (column {column!r}), and nothing tells which predictions "
            "are wrong; mtl-dist predict labels it"
        )


def examples_of(task: TaskConfig, split: Split) -> list[Example]:
    """The rows of a split with their texts, which it does not keep."""
    examples = [row for row in checked_rows(task.reading(), split.source) if isinstance(row, Example)]
    read = np.array([digest(example.sentences) for example in examples], dtype=np.uint64)
    if not np.array_equal(read, np.concatenate(list(split.digests()))):
        raise UserError(f"{name_of(split.source)} changed while it was read; start again when it is written")
    return examples


def write_errors(folder: Path, task: TaskConfig, about: About, analysis: Analysis, most: int) -> Errors:
    """Writes the JSON lines, the page and the pictures."""
    with refusing(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ROWS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in _lines(analysis))
        (folder / PAGE).write_text("\n".join(page_of(task, about, analysis, most)), encoding="utf-8")
    files = [ROWS, PAGE]
    if isinstance(task.label, Regression):
        draw_predictions(folder / PREDICTIONS, task.label, about, analysis)
        files.append(PREDICTIONS)
    else:
        draw_confusion(folder / CONFUSION, class_names(task), about, analysis)
        files.append(CONFUSION)
    if analysis.calibration is not None:
        draw_reliability(folder / RELIABILITY, about, analysis.calibration)
        files.append(RELIABILITY)
    return Errors(about, replace(analysis, rows=[]), [folder / name for name in files])


def _lines(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for row in analysis.rows:
        line = asdict(row)
        if analysis.calibration is None:
            del line["probabilities"]
        yield line
