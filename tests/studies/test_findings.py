"""What is made of a sweep's trials: the best one as an experiment, a table, pictures.

python -m pytest tests/studies/test_findings.py
"""

import csv
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from PIL import Image

from mtl_dist.config import load
from mtl_dist.experiment import Experiment
from mtl_dist.studies.findings import best_of, draw_history, draw_importance, importances, write_best, write_trials

SPACE = {"optim.lr": FloatDistribution(0, 1), "tasks.near.weight": FloatDistribution(0, 1)}


def ended(state: TrialState, score: float | None, lr: float = 0.5, weight: float = 0.5, *curve: float) -> FrozenTrial:
    return create_trial(
        state=state,
        value=score,
        params={"optim.lr": lr, "tasks.near.weight": weight},
        distributions=SPACE,
        intermediate_values=dict(enumerate(curve)),
    )


def study_of(*trials: FrozenTrial) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    return study


DONE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def test_the_best_came_to_its_end_and_is_the_first_of_equals() -> None:
    trials = study_of(
        ended(FAIL, None),
        ended(DONE, 0.5),
        ended(DONE, 0.7),
        ended(PRUNED, None, 0.5, 0.5, 0.9),
        ended(DONE, 0.7),
    ).trials
    assert (best := best_of(trials)) is not None and best.number == 2
    assert best_of(trials[:1]) is None


def test_the_table_has_every_trial_that_ended(tmp_path: Path) -> None:
    study = study_of(ended(DONE, 0.5, 0.1, 0.2, 0.4, 0.5), ended(PRUNED, None, 0.3, 0.4, 0.25, 0.2), ended(FAIL, None))
    study.ask()
    trials = study.trials
    for trial in trials:
        trial.datetime_start = datetime(2026, 1, 1)
        trial.datetime_complete = trial.datetime_start + timedelta(seconds=90)
    trials[2].set_user_attr("reason", "no, not so")
    write_trials(trials, list(SPACE), tmp_path / "trials.csv")
    rows = list(csv.reader((tmp_path / "trials.csv").open(newline="")))
    assert rows == [
        ["trial", "state", "score", "evaluations", "seconds", "optim.lr", "tasks.near.weight", "reason"],
        ["0", "done", "0.5", "2", "90.0", "0.1", "0.2", ""],
        ["1", "pruned", "0.25", "2", "90.0", "0.3", "0.4", ""],
        ["2", "failed", "", "0", "90.0", "0.5", "0.5", "no, not so"],
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "trials.csv"]


@pytest.mark.parametrize("base", ["alone", "laid over another"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.lr=3e-05"],
        ["mixer={kind: temperature, temperature: 3}", "tasks.mood.head=mlp"],
        ["steps=null", "epochs=2", "tasks.near=null", "gradients.clip_norm=null"],
        ["optim.rules=[{match: '.*', lr_scale: 0.5}]", "tasks.same.head={kind: cosine}", "optim.rules.0.lr_scale=0.1"],
        ["stages=[{name: '1e-3', tasks: [mood], lr: 0.01}, {name: b}]", "stages.1.trains=heads"],
        [],
    ],
)
def test_the_best_trial_is_an_experiment(tiny: Path, overrides: list[str], base: str) -> None:
    if base == "laid over another":
        above = tiny.with_name("above.yaml")
        above.write_text("extends: tiny.yaml\nseed: 3\n")
    config = tiny if base == "alone" else tiny.with_name("above.yaml")
    path = tiny.parent / "sweep" / "best.yaml"
    path.parent.mkdir()
    write_best(config, overrides, tiny.parent / "sweep/best", ["how", "it came"], path)
    wanted = load(Experiment, config, [*overrides, f"output_dir={tiny.parent}/sweep/best"])
    assert load(Experiment, path) == wanted
    text = path.read_text()
    assert text.startswith("# how\n# it came\n")
    if base == "alone":
        assert "extends: ../tiny.yaml\n" in text
        assert "vocab" not in text and "dev" not in text  # what is as in the config is not said again
    assert list(path.parent.iterdir()) == [path]


def test_whatever_overrides_and_folders_are_called_the_best_trial_can_be_read(tiny: Path) -> None:
    sweep = tiny.parent / "a # b: [c] *d"
    sweep.mkdir()
    header = ["how\nit came", "--out 'e\u2028f'"]
    write_best(tiny, ["log=\n  every_steps: 7\n"], sweep / "best", header, sweep / "best.yaml")
    best = load(Experiment, sweep / "best.yaml")
    assert best.log.every_steps == 7 and best.output_dir == sweep / "best"
    assert (sweep / "best.yaml").read_text().startswith("# how\n# it came\n# --out 'e\n# f'\nextends: ../tiny.yaml\n")


def test_a_value_as_by_default_is_there_when_the_config_has_another(tiny: Path) -> None:
    path = tiny.parent / "best.yaml"
    write_best(tiny, ["gradients.clip_norm=null"], tiny.parent / "best", [], path)
    assert load(Experiment, path).gradients.clip_norm is None


def test_importance_needs_trials_that_differ() -> None:
    few = study_of(*(ended(DONE, number / 9, number / 9) for number in range(9)), ended(PRUNED, None, 0.1))
    assert importances(few) == "needs 10 trials that came to their end"
    same = study_of(*(ended(DONE, number / 10) for number in range(10)))
    assert importances(same) == "needs a key with more than one value"
    # What decides the score alone is nearly all there is to it.
    many = study_of(*(ended(DONE, number / 40, number / 40, number * 7 % 40 / 40) for number in range(40)))
    assert not isinstance(found := importances(many), str)
    assert found["optim.lr"] > 0.8 and sum(found.values()) == pytest.approx(1)


def test_the_same_trials_give_the_same_pictures(tmp_path: Path) -> None:
    history, importance = tmp_path / "history.png", tmp_path / "importance.png"
    draw_history([], "overall_a", history)
    draw_history(study_of(ended(DONE, float("-inf")), ended(FAIL, None), ended(PRUNED, None)).trials, "mood", history)
    trials = study_of(*(ended(DONE, number / 20) for number in range(20)), ended(PRUNED, None, 0, 0, 0.3)).trials
    once = []
    for _ in range(2):
        draw_history(trials, "overall_a", history)
        draw_importance({"optim.lr": 0.8, "tasks.near.weight": 0.2}, importance)
        once.append((history.read_bytes(), importance.read_bytes()))
    assert once[0] == once[1]
    assert Image.open(history).size == (880, 440)
