"""An experiment's YAML: names, choices that depend on each other, and the data that it leads to.

python -m pytest tests/test_experiment.py
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from mtl_dist.config import UserError, dump, load, schema
from mtl_dist.data.read import File
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment

CS224N = Path(__file__).parents[1] / "configs" / "cs224n.yaml"
BASE = """
output_dir: runs/x
encoder: {shape: {max_position_embeddings: 16}, tokenizer: words}
tasks:
  mine:
    train: x.tsv
    columns: {sentences: [text], label: y}
    label: {kind: binary}
    bad_rows: skip
"""

Read = Callable[..., Experiment]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(BASE)
    return lambda *overrides: load(Experiment, Path("x.yaml"), [f"cache_dir={tmp_path}/cache", *overrides])


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb")
    return load_tokenizer(str(tmp_path))


def complaint(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


# The config


def test_dump_then_load_is_the_same_experiment(read: Read) -> None:
    for config in (read("data_dir=~/data", "optim.lr=1e-3", "steps=3"), load(Experiment, CS224N)):
        Path("dumped.yaml").write_text(dump(config))
        assert load(Experiment, Path("dumped.yaml")) == config


def test_a_bare_kind_will_do_wherever_kinds_stand(read: Read) -> None:
    config = read(
        "mixer=uniform",
        "optim.schedule=linear",
        "gradients.combiner=dwa",
        "tasks.mine.head=mlp",
        "tasks.mine.loss=mse",
        "tasks.mine.label=regression",
        "stages=[{mixer: joint, schedule: cosine, gradients: {combiner: pcgrad}}, {trains: heads}]",
    )
    mine, (first, second) = config.tasks["mine"], config.all_stages()
    assert (mine.head.kind, mine.loss.kind, mine.label.kind) == ("mlp", "mse", "regression")
    assert (first.mixer.kind, first.optim.schedule.kind, first.gradients.combiner.kind) == ("joint", "cosine", "pcgrad")
    assert (second.mixer.kind, second.optim.schedule.kind) == ("uniform", "linear")
    assert second.gradients.combiner.kind == "dwa"
    assert complaint(lambda: read("mixer=jont")) == "override 'mixer=jont': mixer is 'jont'; did you mean 'joint'?"


def test_a_text_is_the_path_of_a_source_and_not_its_kind(read: Read) -> None:
    config = read("tasks.mine.train=hub", "tasks.mine.dev=file")
    assert (config.source("mine", "train"), config.source("mine", "dev")) == (File(path="hub"), File(path="file"))


def any_ofs(part: Any) -> Iterator[list[Any]]:
    if isinstance(part, dict) and "anyOf" in part:
        yield part["anyOf"]
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from any_ofs(inner)


def test_the_schema_takes_every_kind_that_needs_nothing_else() -> None:
    document = schema(Experiment)
    unions = [options for options in any_ofs(document) if "discriminator" in options[-1]]
    assert len(unions) == json.dumps(document).count('"discriminator"') == 9
    heads = next(bare["enum"] for bare, by_kind in unions if "sbert" in by_kind["discriminator"]["mapping"])
    assert sorted(heads) == ["concat", "cosine", "cross_encoder", "linear", "mlp", "sbert"]  # the other needs widths


def test_null_takes_a_task_away(read: Read) -> None:
    second = "tasks.two={preset: sst, dev: null}"
    assert list(read(second, "tasks.mine=null").tasks) == ["two"]
    assert read(second, "tasks.two.columns.id=null").tasks["two"].columns.id is None
    assert read(second, "tasks.two.test=null").source("two", "test") is None
    assert read("epochs=3", "epochs=null", "steps=5").steps == 5
    assert complaint(lambda: read("tasks.mime=null")) == (
        "override 'tasks.mime=null': tasks has no 'mime' to take away; did you mean 'mine'?"
    )
    assert complaint(lambda: read("tasks.mine=null")).startswith("override 'tasks.mine=null': tasks is {}; must have")


def test_a_misfit_of_an_override_points_at_it(read: Read) -> None:
    assert complaint(lambda: read("seed=1", "tasks.mine.head=sbert", "epochs=2")) == (
        "override 'tasks.mine.head=sbert': tasks.mine: head sbert reads 2 sentence(s), columns.sentences names 1"
    )
    Path("x.yaml").write_text(BASE + "epochs: 3\nstages: [{name: a, tasks: [mine]}]\n")
    assert complaint(lambda: read("steps=5")).startswith("override 'steps=5': epochs (3) and steps (5) are both given")
    assert complaint(lambda: read("tasks.two={preset: sst}", "tasks.mine=null")).startswith(
        "override 'tasks.mine=null': stages[0].tasks: there is no task 'mine'"
    )


@pytest.mark.parametrize("name", ["a", "SST-5", "my_task2"])
def test_a_name_for_a_task(read: Read, name: str) -> None:
    task = yaml.safe_load(BASE)["tasks"]["mine"]
    assert list(read(f"tasks={json.dumps({name: task})}").tasks) == [name]


@pytest.mark.parametrize("name", ["../x", "a.b", "1a", "", "a b", "ä", "a\n"])
def test_no_name_for_a_task(read: Read, name: str) -> None:
    message = complaint(lambda: read(f"tasks={json.dumps({name: {'preset': 'sst'}})}"))
    assert message.endswith(": a task's name is a letter followed by letters, digits, '_' or '-'")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", ["keys", "forward", "training", "T_destination"])
def test_a_name_that_modules_need_themselves(read: Read, name: str) -> None:
    message = complaint(lambda: read(f"tasks={{{name}: {{preset: sst}}}}"))
    assert message.endswith(f"tasks.{name}: '{name}' has a meaning of its own here; choose another name for the task")
    assert len(message.splitlines()) == 1


def test_the_best_model_needs_a_score(read: Read) -> None:
    assert read("evaluate.best_by=mine", "tasks.mine.dev=y.tsv").evaluate.best_by == "mine"
    assert read("evaluate.best_by=overall_b").evaluate.best_by == "overall_b"
    for choice in ("mine", "sst"):  # one has no dev set, one is not there
        assert complaint(lambda choice=choice: read(f"evaluate.best_by={choice}")) == (  # type: ignore[misc]
            f"override 'evaluate.best_by={choice}': evaluate.best_by is '{choice}', none of overall_a, overall_b"
        )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("tasks={}", "tasks is {}; must have at least 1 item, not 0"),
        ("epochs=-1", "epochs is -1; must be greater than or equal to 0"),
        ("epochs=.inf", "epochs is Infinity; must be a finite number"),
        ("gradients.accumulation=0", "gradients.accumulation is 0; must be greater than 0"),
        ("mixer.kind=join", "mixer.kind is 'join'; did you mean 'joint'?"),
        ("precision=bf-16", "precision is 'bf-16'; did you mean 'bf16'?"),
        ("output_dir=~no-such-user/x", "output_dir: ~no-such-user/x starts in the home of an unknown user"),
    ],
)
def test_a_wrong_value_is_one_line(read: Read, override: str, problem: str) -> None:
    assert complaint(lambda: read(override)) == f"override '{override}': {problem}"


def test_the_run_folder_may_be_at_home(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert read("output_dir=~/runs/x").output_dir == Path("/home/me/runs/x")


def test_the_schema_accepts_what_a_preset_leaves_out() -> None:
    document = json.loads(json.dumps(schema(Experiment)))
    config = yaml.safe_load(CS224N.read_text())
    required = document["anyOf"][1]["required"]
    assert set(required) <= set(config) <= set(document["properties"])
    task_schema = document["$defs"]["TaskConfig"]
    assert "required" not in task_schema
    for task in config["tasks"].values():
        assert set(task) <= set(task_schema["properties"])
        assert any(set(choice["required"]) <= set(task) for choice in task_schema["anyOf"])
    assert {"required": ["train", "columns", "label"]} in task_schema["anyOf"]


# The data


def write_rows(path: str, labels: list[Any]) -> None:
    Path(path).write_text("text\ty\n" + "".join(f"a b\t{label}\n" for label in labels))


@pytest.mark.parametrize("path", ["x.tsv", "sub/../x.tsv", "{here}/x.tsv", "~/x.tsv"])
def test_where_the_rows_are(read: Read, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    Path("data/sub").mkdir(parents=True)
    absolute = path != "x.tsv" and "sub" not in path
    write_rows("x.tsv" if absolute else "data/x.tsv", [0, 1, 1])
    monkeypatch.setenv("HOME", str(Path.cwd()))
    config = read("data_dir=~/data", f"tasks.mine.train={path.format(here=Path.cwd())}")
    split = config.open_split("mine", "train", tokenizer)
    assert split is not None
    assert [split.label(row) for row in range(len(split))] == [0.0, 1.0, 1.0]
    assert config.open_split("mine", "dev", tokenizer) is None


def test_inputs_are_as_long_as_the_encoder_allows(read: Read, tokenizer: Tokenizer) -> None:
    Path("x.tsv").write_text(f"text\ty\n{'a ' * 99}\t1\n")
    for overrides, length in (((), 16), (("tasks.mine.max_length=9",), 9)):
        split = read(*overrides).open_split("mine", "train", tokenizer)
        assert split is not None
        assert (split.lengths(np.array([0])), split.num_truncated) == (length, 1)
    config = read("tasks.mine.max_length=17")
    assert complaint(lambda: config.open_split("mine", "train", tokenizer)) == (
        "tasks.mine.max_length is 17, the encoder has only 16 positions"
    )


def test_bad_rows_are_refused_or_skipped(read: Read, tokenizer: Tokenizer) -> None:
    write_rows("x.tsv", [0, 2, 1, 3, 4, 5, 6, 7, 8])
    skipping = read().open_split("mine", "train", tokenizer)
    assert skipping is not None
    assert (len(skipping), skipping.num_rejected) == (2, 7)
    strict = read("tasks.mine.bad_rows=error")
    for _ in range(2):  # the second time from the cache
        assert complaint(lambda: strict.open_split("mine", "train", tokenizer)).splitlines() == [
            "x.tsv:3: y is 2, none of the classes 0 to 1 (task 'mine', train)",
            "x.tsv:5: y is 3, none of the classes 0 to 1 (task 'mine', train)",
            "x.tsv:6: y is 4, none of the classes 0 to 1 (task 'mine', train)",
            "x.tsv:7: y is 5, none of the classes 0 to 1 (task 'mine', train)",
            "x.tsv:8: y is 6, none of the classes 0 to 1 (task 'mine', train)",
            "... and 2 more such rows; bad_rows: skip trains without them",
        ]


@pytest.mark.parametrize(("labels", "hint"), [([], ""), ([2, 3], "; bad_rows: error tells why")])
def test_a_task_needs_a_row(read: Read, tokenizer: Tokenizer, labels: list[int], hint: str) -> None:
    write_rows("x.tsv", labels)
    assert complaint(lambda: read().open_split("mine", "train", tokenizer)) == (
        f"x.yaml:6: tasks.mine.train: x.tsv has no usable row{hint}"
    )


# What a stage says of gradients holds together with what the experiment says


def test_a_stage_may_drop_tasks_that_the_experiment_keeps_apart(read: Read) -> None:
    config = read("gradients.combiner={kind: pcgrad}", "stages=[{gradients: {nonfinite: drop_task}}]")
    (stage,) = config.all_stages()
    assert (stage.gradients.nonfinite, stage.gradients.combiner.kind) == ("drop_task", "pcgrad")


def test_a_stage_may_not_add_up_what_the_experiment_drops(read: Read) -> None:
    stages = "stages=[{name: warm, gradients: {combiner: {kind: sum}}}]"
    problem = complaint(lambda: read("gradients={combiner: {kind: pcgrad}, nonfinite: drop_task}", stages))
    assert problem == (
        f"override '{stages}': stage 'warm': gradients.nonfinite is drop_task, which needs the tasks' gradients apart "
        "in every step: set measure"
    )
