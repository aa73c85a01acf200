"""What a sweep found out: a table of its trials, the best one as an experiment, and two pictures."""

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from mtl_dist.config import UserError, block, load, overlay
from mtl_dist.experiment import Experiment
from mtl_dist.files import rewriting
from mtl_dist.studies.space import into
from mtl_dist.watch.charts import COLOURS, INK, new_chart, save_chart

ENOUGH = 10  # trials that came to their end, for an importance
REASON, OWN = "reason", "own"  # why a trial failed; whether its values are the config's own: what a trial is noted with
STATES = {TrialState.COMPLETE: "done", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def score_of(trial: FrozenTrial) -> float | None:
    """A trial's score; of one that was stopped early the best until then, and None where there is none."""
    if trial.state == TrialState.COMPLETE:
        return trial.value
    return max(trial.intermediate_values.values(), default=None)


def best_of(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The best of the trials that came to their end, of equals the first."""
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return max(done, key=lambda trial: trial.values[0], default=None)


def write_trials(trials: Sequence[FrozenTrial], keys: Sequence[str], path: Path) -> None:
    """Every trial that has ended, with its values, as CSV."""
    with rewriting(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", "state", "score", "evaluations", "seconds", *keys, "reason"])
        for trial in trials:
            if trial.state in STATES:
                score, seconds = score_of(trial), trial.duration.total_seconds() if trial.duration else None
                found = [STATES[trial.state], score, len(trial.intermediate_values), seconds]
                values = [trial.params.get(key) for key in keys]
                rows.writerow([trial.number, *found, *values, trial.user_attrs.get(REASON)])


def write_best(config: Path, overrides: Sequence[str], output_dir: Path, header: Sequence[str], path: Path) -> None:
    """The experiment of the best trial as a file that extends the config; where that cannot be, as a whole file."""
    best = load(Experiment, config, [*overrides, into(output_dir)])
    fields = _written(best)
    # What is quoted in it may hold line breaks.
    comment = "".join(f"# {line}\n" for text in header for line in text.splitlines())
    with rewriting(path) as draft:
        try:
            below = _written(load(Experiment, config))
            extends = {"extends": os.path.relpath(config, path.parent)}
            draft.write_text(comment + block(extends | _laid_over(below, fields)), encoding="utf-8")
            extended = load(Experiment, draft) == best
        except UserError:  # such as a config that is itself laid over another one
            extended = False
        if not extended:
            draft.write_text(comment + block(fields), encoding="utf-8")
            assert load(Experiment, draft) == best


def _written(config: Experiment) -> dict[str, Any]:
    """A config without what is as by default."""
    return config.model_dump(mode="json", by_alias=True, round_trip=True, exclude_unset=True)


def _laid_over(below: Any, wanted: Any) -> Any:
    """What has to be laid over a value to get another one."""
    mappings = isinstance(below, dict) and isinstance(wanted, dict)
    if not mappings or overlay(below, wanted) is wanted:  # then it replaces what is below it whole
        return wanted
    changed = {key: _laid_over(below.get(key), part) for key, part in wanted.items() if below.get(key) != part}
    return changed | {key: None for key in below if key not in wanted}


def draw_history(trials: Sequence[FrozenTrial], metric: str, path: Path) -> None:
    """The scores of the trials in their order, and the best one until then."""
    figure, (ax,) = new_chart(8, 4)
    done, pruned = _points(trials, TrialState.COMPLETE), _points(trials, TrialState.PRUNED)
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL]
    if done:
        so_far = np.maximum.accumulate(list(done.values()))
        last = max(trial.number for trial in trials)
        ax.step([*done, last], [*so_far, so_far[-1]], where="post", color=COLOURS[0], label="best so far")
        ax.scatter(list(done), list(done.values()), color=COLOURS[0], s=24, zorder=3, label="done")
    if pruned:
        values = list(pruned.values())
        ax.scatter(list(pruned), values, marker="x", color=COLOURS[1], s=24, zorder=3, label="pruned: best until then")
    if failed:  # which have no score: a mark on the edge
        edge = ax.get_xaxis_transform()
        ax.scatter(failed, [0.02] * len(failed), marker="|", color=COLOURS[3], s=60, transform=edge, label="failed")
    for own in (done[trial.number] for trial in trials if trial.user_attrs.get(OWN) and trial.number in done):
        ax.axhline(own, color=INK, linewidth=0.8, linestyle=":", label="the config as it stands")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("trial", color=INK)
    ax.set_ylabel(metric, color=INK)
    if ax.get_legend_handles_labels()[0]:
        figure.legend(fontsize=9, loc="outside upper center", ncols=5, frameon=False)
    save_chart(figure, path)


def _points(trials: Sequence[FrozenTrial], state: TrialState) -> dict[int, float]:
    """The scores of the trials in a state, by their numbers; one that is undefined has no place in a picture."""
    scores = {trial.number: score_of(trial) for trial in trials if trial.state == state}
    return {number: score for number, score in scores.items() if score is not None and math.isfinite(score)}


def importances(study: optuna.Study) -> dict[str, float] | str:
    """How much each key tells good trials from the others, summing to 1; or why nobody can say."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    if len(trials) < ENOUGH:
        return f"needs {ENOUGH} trials that came to their end"
    varied = [key for key in trials[0].params if len({trial.params[key] for trial in trials}) > 1]
    if not varied:
        return "needs a key with more than one value"
    # The one of Optuna's measures that needs no forest, and so no scikit-learn.
    measure = optuna.importance.PedAnovaImportanceEvaluator()
    return optuna.importance.get_param_importances(study, evaluator=measure, params=varied)


def draw_importance(found: dict[str, float], path: Path) -> None:
    """The importances as bars, the largest on top."""
    keys = sorted(found, key=lambda key: found[key])
    figure, (ax,) = new_chart(8, 1.2 + 0.35 * len(keys))
    ax.barh(keys, [found[key] for key in keys], color=COLOURS[0], height=0.6)
    for row, key in enumerate(keys):
        ax.text(found[key] + 0.01, row, f"{found[key]:.2f}", va="center", fontsize=9, color=INK)
    ax.set_xlim(0, max(found.values()) * 1.1 + 0.01)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("importance for being among the best tenth of the trials (PED-ANOVA)", color=INK)
    save_chart(figure, path)
