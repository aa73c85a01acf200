"""What a task's YAML means: what is filled in, what does not fit together, and which rows can be used.

python -m pytest tests/test_tasks.py
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from mtl_dist.config import Config, UserError, dump, load
from mtl_dist.data.prepare import checked_rows
from mtl_dist.data.read import BadRow, Example, File, Hub, Row
from mtl_dist.model.objectives import Binary
from mtl_dist.tasks import PRESETS, Columns, SplitName, TaskConfig
from tests.conftest import SHARED

CS224N = SHARED / "data"


class Tasks(Config):
    tasks: dict[str, TaskConfig]


Read = Callable[[str], TaskConfig]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    files = (tmp_path / f"{i}.yaml" for i in count())

    def read(task: str) -> TaskConfig:
        path = next(files)
        path.write_text(f"tasks:\n  it: {{{task}}}\n", encoding="utf-8")
        return load(Tasks, path).tasks["it"]

    return read


def complaint(read: Read, task: str) -> str:
    with pytest.raises(UserError) as caught:
        read(task)
    return str(caught.value).partition("0.yaml:")[2]


# Presets and defaults

FIVE = "label: {kind: classification, num_classes: 5}"
TEXT = "train: a.csv, columns: {sentences: [text], label: y}"
PAIR = "train: a.csv, columns: {sentences: [a, b], label: y}"


@pytest.mark.parametrize(
    ("preset", "sentences", "label", "filled_in"),
    [
        ("sst", ["sentence"], "sentiment: classification", ("linear", "cross_entropy", "accuracy")),
        ("quora", ["sentence1", "sentence2"], "is_duplicate: binary", ("sbert", "bce", "accuracy")),
        ("sts", ["sentence1", "sentence2"], "similarity: regression", ("sbert", "mse", "pearson")),
        ("cfimdb", ["sentence"], "sentiment: binary", ("linear", "bce", "accuracy")),
    ],
)
def test_a_preset_is_a_whole_task(
    read: Read, preset: str, sentences: list[str], label: str, filled_in: tuple[str, str, str]
) -> None:
    task = read(f"preset: {preset}")
    assert task.reading(labelled=False).columns == ["id", *sentences]
    assert f"{task.columns.label}: {task.label.kind}" == label
    assert (task.head.kind, task.loss.kind, task.metric) == filled_in
    assert task.bad_rows == "skip"


@pytest.mark.parametrize(
    ("task", "filled_in"),
    [
        (f"{TEXT}, label: {{kind: regression}}", ("linear", "mse", "pearson")),
        (f"{PAIR}, label: {{kind: binary}}", ("sbert", "bce", "accuracy")),
        (f"{PAIR}, {FIVE}, head: null, loss: null, metric: null", ("sbert", "cross_entropy", "accuracy")),
        (f"{TEXT}, {FIVE}, head: {{kind: mlp}}, metric: macro_f1", ("mlp", "cross_entropy", "macro_f1")),
    ],
)
def test_a_task_of_ones_own_is_yaml_alone(read: Read, task: str, filled_in: tuple[str, str, str]) -> None:
    own = read(task)
    assert (own.head.kind, own.loss.kind, own.metric) == filled_in
    assert own.train == File(path=Path("a.csv"))
    assert own.bad_rows == "error"


def test_a_task_can_be_built_in_python() -> None:
    columns, label = Columns(sentences=("a", "b"), label="y"), Binary(kind="binary")
    task = TaskConfig(train=File(path=Path("a.csv")), columns=columns, label=label)
    assert (task.head.kind, task.loss.kind, task.metric) == ("sbert", "bce", "accuracy")


def test_what_is_written_wins_over_the_preset(read: Read) -> None:
    task = read("preset: sts, train: {path: mine.csv}, columns: {id: null}, label: {max: 4}, dev: null, weight: 2")
    assert task.train == File(path=Path("mine.csv"))
    assert task.columns == Columns(sentences=("sentence1", "sentence2"), label="similarity")
    assert (task.label.kind, task.label.model_dump()["max"]) == ("regression", 4.0)
    assert (task.dev, task.weight) == (None, 2.0)
    assert read("preset: sts") == TaskConfig.model_validate(PRESETS["sts"] | {"preset": "sts"})  # still as it was


def test_another_kind_replaces_a_mapping_whole(read: Read) -> None:
    task = read("preset: sst, label: {kind: binary}, train: {kind: hub, name: glue, split: train}, test: mine.tsv")
    assert task.label == Binary(kind="binary")
    assert task.train == Hub(kind="hub", name="glue", split="train")
    assert task.test == File(path=Path("mine.tsv"))
    assert task.loss.kind == "bce"  # follows the new label


@pytest.mark.parametrize(
    "task",
    [
        *(f"preset: {preset}" for preset in PRESETS),
        "preset: sst, dev: null, test: null, label: {num_classes: null, names: ['no', '1e-5']}, head: {kind: mlp}",
        "preset: sts, head: {kind: projected_cosine, widths: [4, 8]}, loss: {kind: cosine_embedding, alike_from: 3}",
        "train: {kind: hub, name: glue, split: train}, columns: {sentences: [a], label: y}, label: {kind: binary}",
    ],
)
def test_dump_then_load_is_the_same_task(read: Read, tmp_path: Path, task: str) -> None:
    config = Tasks(tasks={"it": read(task)})
    (tmp_path / "dumped.yaml").write_text(dump(config), encoding="utf-8")
    assert load(Tasks, tmp_path / "dumped.yaml") == config


# What does not fit together


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        (
            "preset: sts, head: {kind: cosine}, loss: {kind: cosine_embedding, alike_from: 6}",
            "loss.alike_from is 6: no label, or every one, is as large as that",
        ),
        ("preset: sst, head: {kind: sbert}", "head sbert reads 2 sentence(s), columns.sentences names 1"),
        ("preset: sts, head: {kind: mlp}", "head mlp reads 1 sentence(s), columns.sentences names 2"),
        ("preset: sst, loss: {kind: bce}", "loss bce does not fit a classification label; it fits binary"),
        ("preset: sst, loss: {kind: l1}", "loss l1 does not fit a classification label; it fits binary and regression"),
        ("preset: quora, loss: {kind: bins}", "loss bins does not fit a binary label; it fits regression"),
        ("preset: sts, loss: {kind: bins}, head: {kind: cosine}", "loss bins needs 25 outputs, head cosine has one"),
        (f"{PAIR}, {FIVE}, head: {{kind: cosine}}", "loss cross_entropy needs 5 outputs, head cosine has one"),
        ("preset: sts, loss: {kind: cosine_embedding}",
         "loss cosine_embedding needs the head cosine or projected_cosine, without a scale of its own"),
        ("preset: sts, loss: {kind: cosine_embedding}, head: {kind: cosine, scale: 2}",
         "loss cosine_embedding needs the head cosine or projected_cosine, without a scale of its own"),
        ("preset: sst, metric: pearson", "metric pearson does not fit a classification label"),
        ("preset: sts, metric: accuracy", "metric accuracy does not fit a regression label"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(read: Read, task: str, problem: str) -> None:
    assert complaint(read, task) == f"2: tasks.it: {problem}"


@pytest.mark.parametrize(
    "task",
    [
        "preset: quora, head: {kind: cosine}, loss: {kind: mse}",
        "preset: quora, loss: {kind: cross_entropy}",
        "preset: quora, head: {kind: projected_cosine, widths: [4]}, loss: {kind: cosine_embedding}",
        "preset: sts, head: {kind: cross_encoder}, loss: {kind: bins}, metric: spearman",
    ],
)
def test_what_fits_together_is_accepted(read: Read, task: str) -> None:
    read(task)


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ("preset: stss", "tasks.it.preset is 'stss'; did you mean 'sts'?"),
        ("preset: [sst]", """tasks.it.preset is ["sst"]; did you mean 'sst'?"""),
        ("preset: sst, batchsize: 4", "tasks.it has no field 'batchsize'; did you mean 'batch_size'?"),
        ("preset: sst, weight: .inf", "tasks.it.weight is Infinity; must be a finite number"),
        ("preset: sst, head: {kind: mpl}", "tasks.it.head.kind is 'mpl'; did you mean 'mlp'?"),
        ("preset: sst, columns: {sentences: text}", "tasks.it.columns.sentences is 'text', not a list"),
        ("preset: sts, label: {min: 5}", "tasks.it.label: is an empty range: min 5, max 5"),
        (f"{FIVE}, train: a.csv", "tasks.it.columns is missing"),
        (TEXT, "tasks.it.label is missing"),
        (f"{TEXT}, label: {{}}",
         "tasks.it.label.kind is missing; must be one of 'classification', 'binary', 'regression'"),
        # [CLS] a [SEP] b [SEP]: the tokenizer does not cut below its own marks
        ("preset: sts, max_length: 4", "tasks.it.max_length is 4; must be greater than or equal to 5"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(read: Read, task: str, problem: str) -> None:
    assert complaint(read, task) == f"2: {problem}"


def test_a_mistake_is_found_on_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("tasks:\n  a:\n    preset: sst\n    label:\n      num_classes: 1\n")
    with pytest.raises(UserError, match=r"x\.yaml:4: tasks\.a\.label: needs at least 2 classes, not 1$"):
        load(Tasks, tmp_path / "x.yaml")


# Rows


@pytest.mark.parametrize(
    ("path", "expected"), [("x.csv", "data/x.csv"), ("../x.csv", "data/../x.csv"), ("/x.csv", "/x.csv")]
)
def test_relative_paths_start_at_data_dir(read: Read, path: str, expected: str) -> None:
    source = read(f"preset: sst, dev: null, train: {path}").source("train", Path("data"))
    assert source == File(path=Path(expected))
    assert read("preset: sst, dev: null").source("dev", Path("data")) is None


def test_a_row_becomes_an_example(read: Read) -> None:
    fields: dict[str, object] = {"id": 7, "sentence1": " a ", "sentence2": "null", "similarity": "2.50"}
    assert read("preset: sts").check(Row(3, fields), labelled=True) == Example(3, "7", (" a ", "null"), 2.5)
    nameless = read("preset: sts, columns: {id: null}").check(Row(3, fields), labelled=False)
    assert isinstance(nameless, Example)
    assert nameless.id == "3"
    assert nameless.label != nameless.label  # not a number


@pytest.mark.parametrize(
    ("preset", "fields", "problem"),
    [
        ("sst", {"sentence": " \t"}, "sentence is blank"),
        ("sst", {"sentence": None}, "sentence is None, not a text"),
        ("sst", {"sentence": 3}, "sentence is 3, not a text"),
        ("sst", {"sentiment": "5"}, "sentiment is 5, none of the classes 0 to 4"),
        ("sst", {"sentiment": "1.5"}, "sentiment is 1.5, none of the classes 0 to 4"),
        ("quora", {"sentence2": ""}, "sentence2 is blank"),
        ("quora", {"is_duplicate": None}, "is_duplicate is blank"),
        ("sts", {"similarity": "7.0"}, "similarity is 7.0, outside the range [0, 5]"),
        ("sts", {"similarity": "nan"}, "similarity is nan, outside the range [0, 5]"),
        ("sts", {"similarity": "high"}, "similarity is 'high', not a number"),
    ],
)
def test_an_unusable_row_says_why(read: Read, preset: str, fields: dict[str, object], problem: str) -> None:
    task = read(f"preset: {preset}")
    row = Row(9, dict.fromkeys(task.reading(labelled=True).columns, "1") | fields)
    assert task.check(row, labelled=True) == BadRow(9, problem)


@pytest.mark.skipif(not CS224N.is_dir(), reason=f"no CS224N data in {CS224N}")
@pytest.mark.parametrize(
    ("preset", "split", "rows", "rejected"),
    [
        ("sst", "train", 8544, []),
        ("sst", "dev", 1101, []),
        ("sst", "test", 2210, []),
        ("quora", "train", 15997, [11409, 15213]),
        ("quora", "dev", 2215, []),
        ("sts", "train", 6040, []),
        ("sts", "dev", 863, []),
        ("sts", "test", 1725, []),
        ("cfimdb", "train", 1707, []),
        ("cfimdb", "dev", 245, []),
        ("cfimdb", "test", 488, []),
    ],
)
def test_the_real_files(read: Read, preset: str, split: SplitName, rows: int, rejected: list[int]) -> None:
    task = read(f"preset: {preset}")
    source = task.source(split, CS224N)
    assert source is not None
    checked = list(checked_rows(task.reading(split != "test"), source))
    assert [row.line for row in checked if isinstance(row, BadRow)] == rejected
    examples = [row for row in checked if isinstance(row, Example)]
    assert len(examples) == rows
    assert len({example.id for example in examples}) > 0.99 * rows
