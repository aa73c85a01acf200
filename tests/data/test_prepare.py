"""A prepared split holds exactly the tokenizer's tokens, is written once, whole, and found again by its content.

python -m pytest tests/data/test_prepare.py
"""

import gc
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mtl_dist.config import UserError
from mtl_dist.data import prepare as module
from mtl_dist.data.prepare import Split, count_rows, prepare, rows_among
from mtl_dist.data.read import File
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.tasks import TaskConfig
from tests.limits import limit

LETTERS = "abcdefghij"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
FIELDS = ("id", "u", "v", "y")
Rows = Sequence[dict[str, object]]


def tokenizer_in(folder: Path, words: Sequence[str] = WORDS) -> Tokenizer:
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def task(sentences: str = "uv", /, **fields: Any) -> TaskConfig:
    label = {"kind": "regression", "min": 0, "max": 5}
    columns = {"id": "id", "sentences": list(sentences), "label": "y"}
    return TaskConfig.model_validate({"train": "x", "columns": columns, "label": label} | fields)


JOINT = {"head": {"kind": "cross_encoder"}}


def written(path: Path, rows: Rows) -> File:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return File(path=path)


def some_rows(number: int, longest: int = 12) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(rng.choice(list(LETTERS), rng.integers(1, longest + 1)))

    return [{"id": f"n{i}", "u": text(), "v": text(), "y": i % 11 / 2} for i in range(number)]


def contents(split: Split) -> list[tuple[object, ...]]:
    return [
        (split.line(i), split.id(i), split.label(i), split.second_from(i), [list(x) for x in split.inputs(i)])
        for i in range(len(split))
    ]


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# What it holds


@pytest.mark.parametrize("max_length", [64, 8])
@pytest.mark.parametrize("chunk_rows", [8192, 7])
@pytest.mark.parametrize("kind", ["single", "pair", "joint"])
def test_tokens_are_the_tokenizers_own(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str, chunk_rows: int, max_length: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(module, "CHUNKS_WORTH_PROCESSES", 99)
    rows = some_rows(30)
    config = {"single": task("v"), "pair": task(), "joint": task(**JOINT)}[kind]
    split = prepare(config.reading(), written(tmp_path / "x.jsonl", rows), tokenizer, max_length, tmp_path / "cache")

    cut = Tokenizer.from_str(tokenizer.to_str())
    cut.enable_truncation(max_length)
    truncated = 0
    assert len(split) == 30
    for i, row in enumerate(rows):
        texts = (
            [(str(row["u"]), str(row["v"]))] if kind == "joint" else [(str(row[c]),) for c in config.columns.sentences]
        )
        expected = [cut.encode(*text) for text in texts]
        truncated += sum(len(tokenizer.encode(*text).ids) > max_length for text in texts)
        assert [list(tokens) for tokens in split.inputs(i)] == [encoding.ids for encoding in expected]
        assert split.lengths(np.array([i])) == sum(len(encoding.ids) for encoding in expected)
        assert split.second_from(i) == expected[0].type_ids.count(0)
        assert (split.line(i), split.id(i), split.label(i)) == (i + 1, row["id"], row["y"])
    assert split.num_tokens == split.lengths(np.arange(30)).sum()
    assert split.num_truncated == truncated
    assert (truncated > 0) == (max_length == 8)


@settings(max_examples=30)
@given(texts=st.lists(st.tuples(st.text(), st.text(LETTERS + " ")), max_size=12))
def test_any_text_is_tokenised_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, texts: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = written(folder / "x.jsonl", [{"id": "x", "u": u, "v": v, "y": 1} for u, v in texts] or [{}])
    split = prepare(task().reading(), source, tokenizer, 64, folder)
    blank = [line for line, (u, v) in enumerate(texts, start=1) if not u.strip() or not v.strip()]
    assert [bad.line for bad in split.rejected()] == (blank if texts else [1])
    assert len(split) + len(blank) == len(texts)
    for i in range(len(split)):
        assert [len(tokens) for tokens in split.inputs(i)] == [
            min(64, len(tokenizer.encode(text).ids)) for text in texts[split.line(i) - 1]
        ]


def test_unlabelled_rows_have_no_label(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = written(tmp_path / "x.jsonl", [{"id": 3, "u": "a", "v": "b"}])
    split = prepare(task().reading(labelled=False), source, tokenizer, 64, tmp_path)
    assert np.isnan(split.label(0))
    assert split.id(0) == "3"
    assert prepare(task().reading(), source, tokenizer, 64, tmp_path).num_rejected == 1  # an entry of its own


def test_the_tokens_stay_in_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = written(tmp_path / "x.jsonl", some_rows(2000))
    prepare(task().reading(), source, tokenizer, 64, tmp_path)
    before = pa.total_allocated_bytes()
    split = prepare(task().reading(), source, tokenizer, 64, tmp_path)
    assert pa.total_allocated_bytes() == before
    for tokens in split.inputs(1999):
        assert not tokens.flags.owndata


# Rows that cannot be used

UNUSABLE: Rows = [
    {"id": 1, "u": "a", "v": " ", "y": 1},
    {"id": 2, "u": "a", "v": "b", "y": 1},
    {"id": 3, "u": None, "v": "b", "y": 1},
    {"\ud800": 4},  # half a character, which no file can hold
    {"id": 5, "u": "a", "v": "b", "y": "a\tb\r"},
]


def test_rejected_rows_are_listed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = prepare(task().reading(), written(tmp_path / "x.jsonl", UNUSABLE), tokenizer, 64, tmp_path)
    rejected = {bad.line: bad.message for bad in split.rejected()}
    assert rejected == {
        1: "v is blank",
        3: "u is None, not a text",
        4: "has no column 'id'. It has: \\ud800",
        5: r"y is 'a\tb\r', not a number",
    }
    assert split.num_rejected == 4
    assert contents(split) == [(2, "2", 1.0, 3, [[2, 5, 3], [2, 6, 3]])]


def test_a_message_is_one_line_whatever_it_names(tmp_path: Path, tokenizer: Tokenizer) -> None:
    column = "a\tb\x85c\u2028d\r\n\x1ce"  # ends of lines to str.splitlines, but one
    config = task("u", columns={"sentences": [column], "label": "y"})
    source = written(tmp_path / "x.jsonl", [{column: None, "y": 1}] * 2)
    rejected = prepare(config.reading(), source, tokenizer, 64, tmp_path).rejected()
    assert [(bad.line, bad.message) for bad in rejected] == [(line, "a b c d e is None, not a text") for line in (1, 2)]


def test_counting_refuses_what_training_refuses(tmp_path: Path) -> None:
    good, bad = some_rows(2), [{"id": i, "u": "a", "v": "b", "y": i} for i in range(90, 97)]
    source = written(tmp_path / "x.jsonl", [*good, *bad])
    assert count_rows("task 'sts', dev", task(bad_rows="skip").reading(), source) == {"usable": 2, "rejected": 7}
    with pytest.raises(UserError) as caught:
        count_rows("task 'sts', dev", task().reading(), source)
    assert str(caught.value).splitlines() == [
        *(f"{source.path}:{i + 3}: y is {90 + i}, outside the range [0, 5] (task 'sts', dev)" for i in range(5)),
        "... and 2 more such rows; bad_rows: skip trains without them",
    ]
    for rows, hint in ((bad, "; bad_rows: error tells why"), ([], "")):
        source = written(tmp_path / "x.tsv", [])
        source.path.write_text("\t".join(FIELDS) + "\n" + "".join(f"{row['id']}\ta\tb\t9\n" for row in rows))
        with pytest.raises(UserError) as caught:
            count_rows("task 'sts', train", task(bad_rows="skip").reading(), source)
        assert str(caught.value) == f"{source.path} has no usable row{hint}"
    with pytest.raises(UserError) as caught:
        count_rows("task 'sts', dev", task().reading(), written(tmp_path / "x.jsonl", bad))
    assert str(caught.value).endswith("\n... and 2 more such rows; not one row can be used")


@given(
    train=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9).map(lambda i: i << 40 | i), max_size=40),
    dev=st.lists(st.integers(0, 9).map(lambda i: i << 40 | i % 3), max_size=40),
    shared=st.integers(0, 40),
)
def test_rows_of_dev_are_found_among_those_of_train(train: list[int], dev: list[int], shared: int) -> None:
    dev = [*dev, *train[:shared]]
    chunks = [np.array(train[:3], np.uint64), np.array(train[3:], np.uint64)]
    assert rows_among(chunks, np.array(dev, np.uint64)) == sum(digest in set(train) for digest in dev)


# The cache


def test_the_second_time_nothing_is_written(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    source = written(tmp_path / "x.jsonl", some_rows(9))
    first = prepare(task().reading(), source, tokenizer, 64, tmp_path / "cache", on_rows=heard.append)
    assert heard == [9]
    monkeypatch.delattr(module, "_write")
    moved = written(tmp_path / "elsewhere" / "y.jsonl", some_rows(9))
    again = prepare(
        task(dropout=0.5, weight=3).reading(), moved, tokenizer, 64, tmp_path / "cache", on_rows=heard.append
    )
    assert heard == [9]
    assert again.folder == first.folder
    assert again.source == moved
    assert contents(again) == contents(first)


def test_whatever_the_tokens_depend_on_is_in_the_key(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "x.jsonl", some_rows(9))
    other_rows = written(tmp_path / "y.jsonl", some_rows(10))
    other_words = tokenizer_in(tmp_path, [*WORDS, "zz"])
    swapped = {"columns": {"id": "id", "sentences": ["v", "u"], "label": "y"}}
    wider = {"label": {"kind": "regression", "min": 0, "max": 6}}
    cache = tmp_path / "cache"
    entries = [
        prepare(task().reading(), source, tokenizer, 64, cache),
        prepare(task().reading(), other_rows, tokenizer, 64, cache),
        prepare(task().reading(), source, other_words, 64, cache),
        prepare(task().reading(), source, tokenizer, 63, cache),
        prepare(task().reading(labelled=False), source, tokenizer, 64, cache),
        prepare(task(**swapped).reading(), source, tokenizer, 64, cache),
        prepare(task(**wider).reading(), source, tokenizer, 64, cache),
        prepare(task(**JOINT).reading(), source, tokenizer, 64, cache),
    ]
    monkeypatch.setattr(module, "CHUNK_ROWS", 5)  # rows are found by it
    entries.append(prepare(task().reading(), source, tokenizer, 64, cache))
    assert entries[-1].line(8) == 9
    assert len({entry.folder for entry in entries}) == len(entries) == len(files_in(cache))


def test_a_suffix_tells_how_rows_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "x.csv").write_text("u\na\nb, c\n")
    config = task("u", columns={"sentences": ["u"], "label": "y"})
    as_csv = prepare(config.reading(labelled=False), File(path=tmp_path / "x.csv"), tokenizer, 64, tmp_path)
    assert [bad.line for bad in as_csv.rejected()] == [3]
    (tmp_path / "x.csv").rename(tmp_path / "x.tsv")  # where a comma is text
    as_tsv = prepare(config.reading(labelled=False), File(path=tmp_path / "x.tsv"), tokenizer, 64, tmp_path)
    assert as_tsv.rejected() == []


def test_processes_write_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    rows = some_rows(42)
    rows[17]["y"] = "bad"
    source = written(tmp_path / "x.jsonl", rows)
    entries = []
    for worth in (1, 99):
        monkeypatch.setattr(module, "CHUNKS_WORTH_PROCESSES", worth)
        entries.append(prepare(task(**JOINT).reading(), source, tokenizer, 12, tmp_path / str(worth)).folder)
    parallel, inline = ({path.name: path.read_bytes() for path in entry.iterdir()} for entry in entries)
    assert parallel == inline
    assert files_in(entries[0]) == ["meta.json", "rejected.tsv", "rows.arrow", "sha256sums"]


@pytest.mark.parametrize("looking", [True, False])
def test_the_garbage_collector_is_left_as_it_was(tmp_path: Path, tokenizer: Tokenizer, looking: bool) -> None:
    during: list[bool] = []

    def crash(rows: int) -> None:
        during.append(gc.isenabled())
        raise KeyboardInterrupt

    (gc.enable if looking else gc.disable)()
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare(task().reading(), written(tmp_path / "x.jsonl", some_rows(9)), tokenizer, 64, tmp_path, crash)
        assert (during, gc.isenabled()) == ([False], looking)
    finally:
        gc.enable()


def test_a_crash_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(rows: int) -> None:
        raise KeyboardInterrupt

    source = written(tmp_path / "x.jsonl", some_rows(9))
    with pytest.raises(KeyboardInterrupt):
        prepare(task().reading(), source, tokenizer, 64, tmp_path / "cache", on_rows=crash)
    assert files_in(tmp_path / "cache") == []
    assert len(prepare(task().reading(), source, tokenizer, 64, tmp_path / "cache")) == 9


def test_the_slower_of_two_takes_the_others_entry(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source, cache = written(tmp_path / "x.jsonl", some_rows(9)), tmp_path / "cache"
    faster: list[Split] = []

    def overtake(rows: int) -> None:
        faster.append(prepare(task().reading(), source, tokenizer, 64, cache))

    slower = prepare(task().reading(), source, tokenizer, 64, cache, on_rows=overtake)
    assert contents(slower) == contents(faster[0])
    assert files_in(cache) == [slower.folder.name]


def _prepare_at_once(folder: Path, together: Any, results: Any) -> None:
    tokenizer = load_tokenizer(str(folder))
    together.wait()
    results.put(contents(prepare(task().reading(), File(path=folder / "x.jsonl"), tokenizer, 64, folder / "cache")))


def test_two_processes_at_once_both_get_a_whole_entry(tmp_path: Path) -> None:
    tokenizer_in(tmp_path)
    written(tmp_path / "x.jsonl", some_rows(3000))
    spawn = multiprocessing.get_context("spawn")
    arguments = (tmp_path, spawn.Barrier(2), spawn.Queue())
    other = spawn.Process(target=_prepare_at_once, args=arguments)
    other.start()
    _prepare_at_once(*arguments)
    first, second = (arguments[-1].get(timeout=limit(60)) for _ in range(2))
    other.join()
    assert len(first) == 3000
    assert first == second
    assert len(files_in(tmp_path / "cache")) == 1


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = written(tmp_path / "x.jsonl", some_rows(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^cache_dir: cannot write {tmp_path}/file/\S+: Not a directory$"):
        prepare(task().reading(), source, tokenizer, 64, tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_a_cache_of_somebody_else_is_one_line(tmp_path: Path, tokenizer: Tokenizer, mode: int) -> None:
    source = written(tmp_path / "x.jsonl", some_rows(1))
    (tmp_path / "theirs").mkdir(mode)
    with pytest.raises(UserError, match=r"^cache_dir: cannot write \S+: Permission denied$"):
        prepare(task().reading(), source, tokenizer, 64, tmp_path / "theirs")
