"""Predictions and dev scores, computed by all ranks together: every row once, whatever the number of ranks."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray

from mtl_dist import metrics
from mtl_dist.data.batches import eval_batches
from mtl_dist.data.prepare import Split
from mtl_dist.distributed import autocast
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import MultiTaskModel
from mtl_dist.model.objectives import Regression
from mtl_dist.tasks import Metric, TaskConfig

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
