"""Whatever a user's files hold, the outcome is success or a few lines that say where and what; never another exception.

python -m pytest tests/faults/test_properties.py

`MTL_DIST_EXAMPLES=20000` looks for more, and elsewhere each time.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mtl_dist.config import UserError, dump, load
from mtl_dist.data.prepare import checked_rows, prepare
from mtl_dist.data.read import BadRow, File, place
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment
from mtl_dist.model.weights import read_shape
from mtl_dist.tasks import TaskConfig

MORE = int(os.environ.get("MTL_DIST_EXAMPLES", "0"))


def examples(number: int) -> settings:
    return settings(
        max_examples=MORE or number, deadline=None, derandomize=not MORE, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a tokenizer, and room for files."""
    folder = tmp_path_factory.mktemp("properties")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "null"]))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder))


def assert_lines(error: UserError, *starts: str) -> None:
    """Every line stands for itself, and says at its start where the mistake is."""
    lines = str(error).split("\n")
    assert len(lines) <= 100
    for line in lines:
        assert line.startswith(starts), line
        assert len(line.splitlines()) == 1
        assert "Traceback" not in line


# Data files

LABELS = [
    {"kind": "binary"},
    {"kind": "classification", "num_classes": 3},
    {"kind": "classification", "names": ["no", "null", "1"]},
    {"kind": "regression", "min": -1, "max": 5},
]
HEADS = [{"kind": "sbert"}, {"kind": "cross_encoder"}]
TASKS = st.builds(
    lambda label, head, pair, named: TaskConfig.model_validate(
        {
            "train": "x",
            "columns": {"sentences": ["u", "v"] if pair else ["u"], "label": "y", "id": "id" if named else None},
            "label": label,
            "head": head if pair else {"kind": "linear"},
            "bad_rows": "skip",
        }
    ),
    st.sampled_from(LABELS),
    st.sampled_from(HEADS),
    st.booleans(),
    st.booleans(),
)
NAMES = ["id", "u", "v", "y", "w"]

ODD_TEXTS = st.sampled_from(
    ["null", "N/A", "", " ", "\t", "\u200b", "\x01", "\x00", "\ufeff", '"', '""', "a" * 600, "a " * 300, "1", "1.0",
     "nan", "inf", "1e400", "-0", "0_1", "٣", "True", "[CLS]", "a\u2028a", "a\x85a", "\U0010ffff", "é", "\r", "\n"]
)  # fmt: skip
TEXTS = ODD_TEXTS | st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


def rarely(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 3).flatmap(lambda n: strategy if n == 2 else st.none())  # 0 is drawn too often


RIGHT = {"id": ["7", "n"], "u": ["a", "a a", "null"], "v": ["a", "aa"], "y": ["1"], "w": [""]}


def rows_of(odd: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Rows of which most cells are as they should be."""
    cells = {
        name: st.integers(0, 9).flatmap(lambda n, v=right: odd if n == 5 else st.sampled_from(v))
        for name, right in RIGHT.items()
    }
    return st.lists(st.fixed_dictionaries(cells), max_size=6)


def read_through(task: TaskConfig, source: File, tokenizer: Tokenizer, folder: Path) -> None:
    """All that happens to a file before training; its rows are all there, or listed with what is wrong."""
    try:
        split = prepare(task.reading(), source, tokenizer, 16, folder / "cache")
    except UserError as error:
        assert_lines(error, f"{source.path}", f"cannot read {source.path}")
        return
    checked = list(checked_rows(task.reading(), source))
    bad = [row for row in checked if isinstance(row, BadRow)]
    assert [(row.line, " ".join(row.message.split())) for row in bad] == [
        (row.line, row.message) for row in split.rejected()
    ]
    assert len(split) == len(checked) - len(bad) == len(checked) - split.num_rejected
    for i in range(len(split)):
        assert all(2 <= len(tokens) <= 16 for tokens in split.inputs(i))
        assert isinstance(split.id(i), str) and split.label(i) == split.label(i)
        assert place(source, split.line(i)).startswith(str(source.path))


@examples(100)
@given(
    task=TASKS,
    rows=rows_of(TEXTS),
    quoted=st.booleans(),
    format=st.sampled_from(["csv", "tsv"]),
    end=st.sampled_from(["\n", "\n", "\r\n", "\r"]),
    splice=rarely(st.tuples(st.integers(0, 300), st.integers(0, 3), st.binary(max_size=3))),
)
def test_rows_of_a_csv(
    folder: Path,
    tokenizer: Tokenizer,
    task: TaskConfig,
    rows: list[dict[str, str]],
    quoted: bool,
    format: str,
    end: str,
    splice: tuple[int, int, bytes] | None,
) -> None:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if quoted else text

    delimiter = {"csv": ",", "tsv": "\t"}[format]
    lines = [NAMES, *([row[name] for name in NAMES] for row in rows)]
    content = end.join(delimiter.join(map(cell, cells)) for cells in lines).encode(errors="replace")
    if splice is not None:
        start, length, put = splice
        content = content[:start] + put + content[start + length :]
    path = folder / f"rows.{format}"
    path.write_bytes(content)
    read_through(task, File(path=path), tokenizer, folder)


@examples(100)
@given(task=TASKS, rows=rows_of(JSON), missing=rarely(st.sampled_from(NAMES)))
def test_rows_of_a_jsonl(
    folder: Path, tokenizer: Tokenizer, task: TaskConfig, rows: list[dict[str, Any]], missing: str | None
) -> None:
    path = folder / "rows.jsonl"
    if missing and rows:
        del rows[-1][missing]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_through(task, File(path=path), tokenizer, folder)


ARROW_TYPES = st.sampled_from(
    [pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.uint64(), pa.float32(), pa.float64(), pa.bool_(),
     pa.null(), pa.date32(), pa.date64(), pa.time64("ns"), pa.timestamp("s"), pa.timestamp("ns", "UTC"),
     pa.duration("ns"), pa.decimal128(30, 3), pa.list_(pa.string()), pa.struct([("a", pa.int64())]),
     pa.map_(pa.string(), pa.int64()), pa.dictionary(pa.int32(), pa.string())]
)  # fmt: skip


@st.composite
def columns(draw: st.DrawFn, rows: int) -> pa.Array:
    """A column of any type, with any bytes of its width in it: dates of the year 300,000 as well."""
    kind = draw(ARROW_TYPES)
    if pa.types.is_primitive(kind) and kind.bit_width % 8 == 0:
        width = rows * kind.bit_width // 8
        return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(draw(st.binary(min_size=width, max_size=width)))])
    if kind in (pa.string(), pa.dictionary(pa.int32(), pa.string())):
        texts = pa.array(draw(st.lists(TEXTS | st.none(), min_size=rows, max_size=rows)), pa.string())
        return texts if kind == pa.string() else texts.dictionary_encode()
    return pa.nulls(rows, kind)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """A table of right rows, of which some columns are replaced, doubled or left out."""
    rows = draw(rows_of(TEXTS | st.none()))
    arrays = [pa.array([row[name] for row in rows], pa.string()) for name in NAMES]
    names = list(NAMES)
    for change in draw(st.lists(st.sampled_from(["replace", "replace", "double", "drop"]), max_size=2)):
        place = draw(st.integers(0, len(names) - 1))
        if change == "replace":
            arrays[place] = draw(columns(len(rows)))
        elif change == "double":
            names[place] = draw(st.sampled_from(NAMES))
        else:
            del names[place], arrays[place]
    return pa.table(arrays, names=names)


@examples(100)
@given(task=TASKS, table=tables(), flip=rarely(st.integers(0, 10**6)), cut=rarely(st.integers(0, 10**6)))
def test_rows_of_a_parquet_file(
    folder: Path, tokenizer: Tokenizer, task: TaskConfig, table: pa.Table, flip: int | None, cut: int | None
) -> None:
    path = folder / "rows.parquet"
    try:
        pq.write_table(table, path)
    except pa.ArrowException:  # what cannot be written
        return
    content = bytearray(path.read_bytes())
    if flip is not None:
        content[flip // 8 % len(content)] ^= 1 << flip % 8
    path.write_bytes(content[: None if cut is None else cut % len(content)])
    read_through(task, File(path=path), tokenizer, folder)


# Checkpoints' small files


@examples(150)
@given(
    name=st.sampled_from(["tokenizer.json", "vocab.txt", "tokenizer_config.json", "config.json"]),
    content=st.binary(max_size=50) | JSON.map(lambda value: json.dumps(value).encode()),
    splice=st.none() | st.tuples(st.integers(0, 10**6), st.integers(0, 20), st.binary(max_size=20)),
)
def test_the_small_files_of_a_checkpoint(
    folder: Path, tokenizer: Tokenizer, name: str, content: bytes, splice: tuple[int, int, bytes] | None
) -> None:
    path = folder / "checkpoint"
    path.mkdir(exist_ok=True)
    whole = {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "vocab.txt": (folder / "vocab.txt").read_text(),
        "tokenizer_config.json": json.dumps({"do_lower_case": True, "strip_accents": None}),
        "config.json": json.dumps({"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}),
    }
    if name in ("vocab.txt", "tokenizer_config.json"):
        del whole["tokenizer.json"]
    for other in path.iterdir():
        other.unlink()
    for each, text in whole.items():
        (path / each).write_text(text)
    if splice is not None:
        start, length, put = splice
        old = (path / name).read_bytes()
        content = old[: start % len(old)] + put + old[start % len(old) + length :]
    (path / name).write_bytes(content)
    for read in (lambda: load_tokenizer(str(path)), lambda: read_shape(path)):
        try:
            read()
        except UserError as error:
            assert_lines(error, str(path))


# Configs

WHOLE = """
output_dir: run
encoder: {tokenizer: words, shape: {hidden_size: 32, num_attention_heads: 4}}
epochs: 2
tasks:
  mood:
    train: mood.tsv
    dev: {path: dev.csv, format: tsv}
    columns: {id: id, sentences: [text], label: label}
    label: {kind: classification, num_classes: 3}
    subsample: {rows: 9, subset: fixed}
  near:
    train: {kind: hub, name: x/y, split: train}
    columns: {sentences: [a, b], label: y}
    label: {kind: regression, min: 0, max: 5}
    head: {kind: projected_cosine, widths: [8]}
    loss: {kind: mse}
    bad_rows: skip
mixer: {kind: temperature, temperature: 2}
gradients: {clip_norm: 1, accumulation: 2}
optim: {lr: 1.0e-5, rules: [{match: bias, weight_decay: 0}, {match: '.*'}], schedule: {kind: linear, warmup_share: 0.1}}
stages:
  - {name: heads, trains: heads, mixer: {kind: joint}, epochs: 1}
  - {tasks: [near], steps: 5, lr: 1.0e-3, carry_moments: true}
evaluate: {every_steps: 5, best_by: mood}
log: {every_steps: 2, tensorboard: false}
distributed: {device: cpu, processes: 2, timeout_s: 60}
"""
Keys = tuple[str | int, ...]


def parts(value: Any, keys: Keys = ()) -> list[Keys]:
    """Where the parts of a config are, in mappings and lists."""
    inner: Sequence[Any] = list(value.items()) if isinstance(value, dict) else []
    inner = list(enumerate(value)) if isinstance(value, list) else inner
    return [keys, *(found for key, part in inner for found in parts(part, (*keys, key)))]


def fields(value: Any) -> list[tuple[Any, ...]]:
    return [keys for keys in parts(value) if keys and isinstance(keys[-1], str)]


PLACES = parts(yaml.safe_load(WHOLE))[1:]
SCALARS = st.sampled_from(
    [None, True, 0, -1, 1, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "mood", "joint", "null", "\x00",
     "\ud800", "~nobody/x", "(", "x" * 300, "a\nb", "1", "true", "é"]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["kind", "path", "name", "lr", "match", "mood", "", "a.b"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
KINDS = st.sampled_from(
    ["classification", "binary", "regression", "file", "hub", "joint", "sequential", "round_robin", "explicit",
     "unimax", "annealed", "temperature", "linear", "cosine", "bins", "pcgrad", "sbert", "cross_encoder", "mlp"]
)  # fmt: skip


def changed(config: Any, keys: Keys, value: Any) -> None:
    *path, last = keys
    for key in path:
        if not isinstance(config, dict | list):
            return
        config = config[key] if isinstance(config, dict) and key in config else None
    if isinstance(config, dict):
        config[last] = value


CHANGES = st.lists(
    st.tuples(st.sampled_from(PLACES), VALUES | KINDS.map(lambda kind: {"kind": kind}) | KINDS), min_size=1, max_size=3
)


def test_before_it_is_changed_the_config_is_right(folder: Path) -> None:
    path = folder / "whole.yaml"
    path.write_text(WHOLE)
    assert load(Experiment, path).evaluate.best_by == "mood"


@examples(150)
@given(changes=CHANGES)
def test_a_config_with_anything_in_it(folder: Path, changes: list[tuple[Keys, Any]]) -> None:
    config = yaml.safe_load(WHOLE)
    for keys, value in changes:
        changed(config, keys, value)
    path = folder / "changed.yaml"
    path.write_text(json.dumps(config).replace("Infinity", ".inf").replace("NaN", ".nan"), encoding="utf-8")
    try:
        read = load(Experiment, path)
    except UserError as error:
        assert_lines(error, f"{path}:")
        return
    assert len(read.all_stages()) >= 1
    # What a run folder's config.yaml is good for: it is read back as the same experiment.
    (folder / "dumped.yaml").write_text(dump(read), encoding="utf-8")
    assert load(Experiment, folder / "dumped.yaml") == read


OVERRIDES = st.tuples(
    st.sampled_from(PLACES).map(lambda keys: ".".join(map(str, keys))) | st.text(max_size=12),
    st.sampled_from(["", ".", ".x", ".0", ".-1", ".9", ".kind"]),
    VALUES.map(json.dumps) | st.text(max_size=12) | KINDS,
).map(lambda parts: f"{parts[0]}{parts[1]}={parts[2]}")


@examples(150)
@given(overrides=st.lists(OVERRIDES, min_size=1, max_size=3))
def test_any_overrides(folder: Path, overrides: list[str]) -> None:
    path = folder / "whole.yaml"
    path.write_text(WHOLE)
    try:
        load(Experiment, path, overrides)
    except UserError as error:
        assert_lines(error, f"{path}:", *(f"override {override!r}: " for override in overrides))
