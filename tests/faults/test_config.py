"""Keys and names that are nearly right, or no names at all: each is refused in one line.

python -m pytest tests/faults/test_config.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from mtl_dist.cli import main
from mtl_dist.config import Config, UserError, load
from mtl_dist.experiment import Experiment


def models(model: type[BaseModel], found: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """A config's class and those of all its parts."""
    if model not in found:
        found.add(model)
        for field in model.model_fields.values():
            for inner in classes_in(field.annotation):
                models(inner, found)
    return found


def classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from classes_in(argument)


TASK = {"train": "x.tsv", "columns": {"sentences": ["a"], "label": "y"}, "label": {"kind": "binary"}}
CONFIG: dict[str, Any] = {"output_dir": "run", "encoder": {"tokenizer": "words", "shape": {}}, "tasks": {"it": TASK}}
PLACES = {
    "": (),
    "encoder": ("encoder",),
    "encoder.shape": ("encoder", "shape"),
    "tasks.it": ("tasks", "it"),
    "tasks.it.columns": ("tasks", "it", "columns"),
    "tasks.it.subsample": ("tasks", "it", "subsample"),
    "optim": ("optim",),
    "gradients": ("gradients",),
    "evaluate": ("evaluate",),
    "log": ("log",),
    "distributed": ("distributed",),
}


def model_at(keys: tuple[str, ...]) -> type[BaseModel]:
    model: type[BaseModel] = Experiment
    for key in keys:
        if key in model.model_fields:
            model = next(classes_in(model.model_fields[key].annotation))
    return model


@pytest.mark.parametrize("place", PLACES)
def test_a_key_with_a_letter_too_many_is_recognised(tmp_path: Path, place: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(CONFIG))
    for name, field in model_at(PLACES[place]).model_fields.items():
        key = field.alias or name
        wrong = f"{place}.{key}{key[-1]}".removeprefix(".")
        with pytest.raises(UserError) as caught:
            load(Experiment, path, [f"{wrong}=1"])
        expected = f"{place or 'the top level'} has no field '{key}{key[-1]}'; did you mean '{key}'?"
        assert f"override '{wrong}=1': {expected}" in str(caught.value).splitlines()


def test_no_part_of_a_config_takes_unknown_keys() -> None:
    for model in models(Experiment, set()):
        assert issubclass(model, Config) and model.model_config["extra"] == "forbid", model


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ('output_dir="\\uD800"', "output_dir"),
        ('tasks.it.train="a\\uDC80.tsv"', "tasks.it.train"),
        ('stages=[{name: "\\uDFFF"}]', "stages[0].name"),
        ('tasks={"\\uD800": 1}', "tasks.'\\ud800'"),
    ],
)
def test_half_a_character_is_no_text(tmp_path: Path, override: str, where: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(CONFIG))
    with pytest.raises(UserError) as caught:
        load(Experiment, path, [override])
    assert str(caught.value) == f"override {override!r}: {where} has half a surrogate pair, which is no character"


LONG = "x" * 300 + ".tsv"  # longer than a file's name may be


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            f"tasks.mood.train={LONG}",
            f"override 'tasks.mood.train={LONG}': tasks.mood.train: "
            f"cannot read {{folder}}/{LONG}: File name too long\n",
        ),
        (f"encoder.tokenizer={LONG}", f"{LONG}: no such folder here, and the hub did not give it"),
        (f"cache_dir={LONG}", f"cache_dir: cannot write {LONG}/"),
        (f"output_dir={LONG}", f"output_dir: cannot write {LONG}: File name too long\n"),
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    monkeypatch.chdir(tiny.parent)
    assert main(["train", str(tiny), override]) == 2
    said = capsys.readouterr().err
    assert said.startswith(message.format(folder=tiny.parent))
    assert len(said.splitlines()) == 1


def test_a_test_file_that_cannot_be_is_not_there(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(tiny), f"tasks.mood.test={LONG}"]) == 0
    assert capsys.readouterr().err == (f"mood test: {tiny.parent}/{LONG} is not there; training does without it\n")
