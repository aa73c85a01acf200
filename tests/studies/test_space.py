"""The space of a sweep: what it draws, and the one line that every mistake in it is.

python -m pytest tests/studies/test_space.py
"""

from pathlib import Path

import optuna
import pytest

from mtl_dist.config import UserError, load
from mtl_dist.experiment import Experiment
from mtl_dist.studies.space import overrides_of, own_values, read_space


def space_of(tiny: Path, text: str) -> Path:
    path = tiny.parent / "space.yaml"
    path.write_text(text)
    return path


GOOD = """
optim.lr: {low: 1e-5, high: 2e-3, log: true}
tasks.mood.batch_size: {low: 2, high: 64, log: true}
tasks.near.weight: {low: 0.5, high: 1.5, step: 0.25}
tasks.same.batch_size: {low: 2, high: 8, step: 3}
mixer: {choices: [joint, {kind: temperature, temperature: 3}]}
tasks.mood.max_length: {choices: [null, 7]}
"""


def test_what_is_drawn_lies_in_the_space_and_is_what_the_experiment_gets(tiny: Path) -> None:
    space = read_space(space_of(tiny, GOOD))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for _ in range(40):
        trial = study.ask()
        values = {key: parameter.suggest(key, trial) for key, parameter in space.parameters.items()}
        drawn.append((values, load(Experiment, tiny, overrides_of(values))))
    for values, experiment in drawn:
        assert 1e-5 <= experiment.optim.lr <= 2e-3 and experiment.optim.lr == values["optim.lr"]
        assert isinstance(values["tasks.mood.batch_size"], int)
        assert experiment.tasks["mood"].batch_size == values["tasks.mood.batch_size"]
    assert {experiment.tasks["near"].weight for _, experiment in drawn} == {0.5, 0.75, 1.0, 1.25, 1.5}
    assert {experiment.tasks["same"].batch_size for _, experiment in drawn} == {2, 5, 8}
    assert {experiment.tasks["mood"].max_length for _, experiment in drawn} == {None, 7}
    assert {experiment.mixer.kind for _, experiment in drawn} == {"joint", "temperature"}
    # On a log scale as many lie below the middle, 1.4e-4, as above; without it 93 % would lie above.
    assert 10 <= sum(experiment.optim.lr < 1.4e-4 for _, experiment in drawn) <= 30
    assert {values["mixer"] for values, _ in drawn} == {"joint", "{kind: temperature, temperature: 3}"}


def test_the_config_has_values_of_its_own_where_they_lie_in_the_space(tiny: Path) -> None:
    space = read_space(space_of(tiny, GOOD))
    own = {"optim.lr": 1e-3, "tasks.mood.batch_size": 6, "mixer": "joint", "tasks.mood.max_length": "null"}
    assert own_values(space, tiny, []) == own | {"tasks.near.weight": 0.5}  # and 9 is none of 2, 5, 8
    assert "tasks.near.weight" not in own_values(space, tiny, ["tasks.near.weight=1e30"])
    there = ["tasks.same.batch_size=8", "tasks.near.weight=0.6", "optim.lr=1", "mixer=uniform"]
    assert own_values(space, tiny, there) == {
        "tasks.mood.batch_size": 6,
        "tasks.same.batch_size": 8,
        "tasks.mood.max_length": "null",
    }


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim.lrr: {low: 1e-5, high: 1e-4}", "1: optim has no field 'lrr'; did you mean 'lr'?"),
        ("\n\noptim.lr: {low: 1e-3, high: 1e-4}", "3: optim.lr: low is 0.001, not below high, which is 0.0001"),
        ("optim.lr: {low: 1, high: 1}", "1: optim.lr: low is 1, not below high, which is 1"),
        ("optim.lr: {low: 0, high: 1, log: true}", "1: optim.lr: low is 0; on a log scale it must be above 0"),
        ("optim.lr: {low: small, high: 1}", "1: optim.lr.low is 'small', not a number"),
        ("optim.lr: {low: .nan, high: 1}", "1: optim.lr.low is NaN; must be a finite number"),
        ("optim.lr:\n  low: 1\n  hihg: 2", "3: optim.lr has no field 'hihg'; did you mean 'high'?"),
        ("optim.lr: {low: 1}", "1: optim.lr: give low and high, or choices"),
        ("optim.lr: 3", "1: optim.lr is 3, not a mapping"),
        ("optim.lr: {low: 0, high: 1, log: yes}", "1: optim.lr.log is 'yes', not true or false"),
        (
            "optim.lr: {low: 1, high: 2, log: true, step: 1}",
            "1: optim.lr: log and step are both given; leave one of them out",
        ),
        ("optim.lr: {low: 0, high: 1, step: 0}", "1: optim.lr.step is 0; must be greater than 0"),
        (
            "optim.lr: {low: 0, high: 1, step: 0.3}",
            "1: optim.lr: high is 1, which no step of 0.3 meets; the last one is at 0.9",
        ),
        ("mixer: {choices: []}", "1: mixer.choices is []; must have at least 1 item, not 0"),
        ("mixer: {choices: [joint, joint]}", "1: mixer: choices has joint twice"),
        ("mixer: {choices: [joint], low: 3}", "1: mixer: choices stand alone, without low"),
        ("mixer: {choices: [joint, temprature]}", "1: mixer is 'temprature'; did you mean 'temperature'?"),
        ("tasks.mood.batch_size: {low: 1.0, high: 3}", "1: tasks.mood.batch_size is 1.0, not a whole number"),
        ("tasks.mood.batch_size: {low: 0, high: 3}", "1: tasks.mood.batch_size is 0; must be greater than 0"),
        (
            "mixer: {choices: [joint]}\nmixer.kind: {choices: [joint]}",
            "2: mixer.kind is a part of mixer, which is drawn as well; write it into its choices",
        ),
        (
            "output_dir: {choices: [a]}",
            "1: output_dir cannot be drawn: every trial has a folder of its own below --out",
        ),
        (
            "evaluate.best_by: {choices: [mood]}",
            "1: evaluate.best_by cannot be drawn: it decides which trial is the best; "
            "set it for all of them, in the config",
        ),
        (
            "evaluate: {choices: [{best_by: overall_a}, {best_by: overall_b}]}",
            "1: evaluate changes evaluate.best_by, which cannot be drawn: it decides which trial is the best; "
            "set it for all of them, in the config",
        ),
        (
            "tasks.near.metric: {choices: [pearson, spearman]}",
            "1: tasks.near.metric cannot be drawn: it decides which trial is the best; "
            "set it for all of them, in the config",
        ),
        (
            "tasks.near.dev: {choices: [near-dev.tsv, other.tsv]}",
            "1: tasks.near.dev cannot be drawn: it decides which trial is the best; "
            "set it for all of them, in the config",
        ),
        (
            "data_dir: {choices: [/elsewhere]}",
            "1: data_dir changes tasks.mood.dev, which cannot be drawn: it decides which trial is the best; "
            "set it for all of them, in the config",
        ),
        (
            "tasks.near: {choices: [null]}",
            "1: tasks.near changes tasks, which cannot be drawn: it decides which trial is the best; "
            "set it for all of them, in the config",
        ),
        (
            "optim.lr: {low: 0, high: 1e30, step: 1e-3}",
            "1: optim.lr: step is 0.001, too fine for 0 to 1e+30; leave it out",
        ),
        ("- optim.lr", '1: the top level is ["optim.lr"], not a mapping'),
    ],
)
def test_a_mistake_is_one_line(tiny: Path, text: str, line: str) -> None:
    path = space_of(tiny, text)
    with pytest.raises(UserError) as refused:
        own_values(read_space(path), tiny, [])
    assert str(refused.value) == f"{path}:{line}"


def test_every_mistake_has_its_line(tiny: Path) -> None:
    path = space_of(tiny, "optim.lrr: {low: 1, high: 2}\nseed: {low: 1, high: 2}\ntasks.mood.hed: {choices: [mlp]}\n")
    with pytest.raises(UserError) as refused:
        own_values(read_space(path), tiny, [])
    assert str(refused.value).split("\n") == [
        f"{path}:1: optim has no field 'lrr'; did you mean 'lr'?",
        f"{path}:3: tasks.mood has no field 'hed'; did you mean 'head'?",
    ]


def test_a_space_of_nothing_is_none(tiny: Path) -> None:
    path = space_of(tiny, "# later\n")
    with pytest.raises(UserError, match=r"space\.yaml: no key is drawn; name one, such as optim\.lr: {low: "):
        read_space(path)
