"""Predictions and dev scores, computed by all ranks together: every row once, whatever the number of ranks."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray

from mtl_dist import metrics
from mtl_dist.data.batches import eval_batches
from mtl_dist.data.prepare import Split
from mtl_dist.data.read import place
from mtl_dist.distributed import autocast
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import MultiTaskModel
from mtl_dist.model.objectives import Regression
from mtl_dist.tasks import Metric, TaskConfig

Scores = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predicted:
    """What a model says of the rows of a split, in their order; NaN where an output is no number."""

    values: NDArray[np.float64]  # the class or the number
    probabilities: NDArray[np.float64] | None = None  # rows x classes, where they were asked for and the loss gives any


@torch.no_grad()
def predict(
    accelerator: Accelerator,
    model: MultiTaskModel,
    name: str,
    task: TaskConfig,
    split: Split,
    max_tokens: int,
    on_batch: Callable[[], object] = lambda: None,
    probabilities: bool = False,
) -> Predicted:
    """The prediction for each row of a split, on every rank."""
    rank, world = accelerator.process_index, accelerator.num_processes
    was_training = model.training
    model.eval()
    with_probabilities = probabilities and task.loss.gives_probabilities
    rows, predicted = [], []
    for batch in eval_batches(name, split, np.arange(rank, len(split), world), max_tokens):
        on_batch()
        with autocast(accelerator):
            raw_NO = model(name, batch.packed.to(accelerator.device))
        # The largest of outputs that are NaN is no class, though argmax names one.
        numbers_N = raw_NO.isfinite().all(dim=1)
        rows.append(batch.rows)
        columns = [task.loss.predict(raw_NO, task.label).double()[:, None]]
        if with_probabilities:
            columns.append(task.loss.probabilities(raw_NO))
        predicted.append(torch.cat(columns, dim=1).where(numbers_N[:, None], torch.nan))
    classes = 0 if isinstance(task.label, Regression) else task.label.classes
    found = np.full((len(split), 1 + classes * with_probabilities), np.nan)
    if rows:  # all at once: after each batch a GPU would be waited for
        found[np.concatenate(rows)] = torch.cat(predicted).cpu().numpy()
    model.train(was_training)
    # Each rank fills in its own rows: none is counted twice, and a rank may have none at all.
    for other, theirs in enumerate(gather_object([found[rank::world]])):
        found[other::world] = theirs
    return Predicted(found[:, 0], found[:, 1:] if with_probabilities else None)


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
        predictions = predict(accelerator, model, name, tasks[name], split, max_tokens, on_batch).values
        scores["tasks"][name] = score(tasks[name], split, predictions)
        if accelerator.is_main_process and (lost := without_number(name, split, predictions)):
            regression = isinstance(tasks[name].label, Regression)
            log.warning("%s; %s", lost, "no correlation is defined" if regression else "they count as wrong")
    return scores | (metrics.overall(main_scores(tasks, scores)) if splits else {})


def without_number(name: str, split: Split, predictions: NDArray[np.float64]) -> str | None:
    """What a user reads of rows for which the model gave no number, if there are any."""
    rows = np.flatnonzero(np.isnan(predictions))
    if not len(rows):
        return None
    first = place(split.source, split.line(int(rows[0])))
    return f"task '{name}': the model gives no number for {len(rows):,} of {len(split):,} rows, the first is {first}"


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
    lost = int(np.isnan(predictions).sum())
    rows = {"rows": len(gold), **({"no_number": lost} if lost else {})}
    if isinstance(task.label, Regression):
        return {**rows, **metrics.evaluate("regression", predictions, gold)}
    classes = task.label.classes
    return {
        **rows,
        **metrics.evaluate(task.label.kind, predictions, gold, classes),
        "confusion": metrics.confusion_matrix(predictions, gold, classes).tolist(),
    }
