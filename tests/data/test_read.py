"""Every row comes back as it was written, with its line; a bad one costs only itself.

python -m pytest tests/data/test_read.py
"""

import csv
import io
import json
import os
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from mtl_dist.config import UserError
from mtl_dist.data.read import MAX_RECORD_LINES, BadRow, File, Hub, Row, Source, fingerprint, place, read_rows
from tests.conftest import SHARED

CS224N_ROWS = {
    "ids-cfimdb-dev": 245,
    "ids-cfimdb-test-student": 488,
    "ids-cfimdb-train": 1707,
    "ids-sst-dev": 1101,
    "ids-sst-test-student": 2210,
    "ids-sst-train": 8544,
    "quora-dev": 2215,
    "quora-train": 15999,
    "sts-dev": 863,
    "sts-test-student": 1725,
    "sts-train": 6040,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("read")


def written(path: Path, content: str | bytes) -> File:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return File(path=path)


def read(source: File | Hub, *columns: str) -> list[Row | BadRow]:
    return list(read_rows(source, columns=columns))


def fields_of(rows: list[Row | BadRow]) -> list[dict[str, object]]:
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [row.fields for row in rows if isinstance(row, Row)]


def error_of(source: File | Hub, *columns: str) -> str:
    with pytest.raises(UserError) as caught:
        read(source, *columns)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# CSV and TSV


def test_lines_are_physical_lines(folder: Path) -> None:
    source = written(folder / "x.csv", 'text,label,extra\nplain,1,z\n\n"two\nlines, ""quoted""",2,z\r\nlast,,z')
    assert read(source, "label", "text") == [
        Row(2, {"label": "1", "text": "plain"}),
        Row(4, {"label": "2", "text": 'two\nlines, "quoted"'}),
        Row(6, {"label": "", "text": "last"}),
    ]


def test_values_stay_the_text_they_were(folder: Path) -> None:
    values = ["null", "N/A", "NaN", "", " padded ", "007", '5" pipe', "a\x0bb\x0cc\x1cd\u2028e\x85f", "a\rb", "x,y"]
    source = written(folder / "x.tsv", "\ufeffid\ttext\r\n" + "".join(f"1\t{value}\r\n" for value in values))
    assert fields_of(read(source, "id", "text")) == [{"id": "1", "text": value} for value in values]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'x,"never closed', "unclosed quote"),
        (b'"', "unclosed quote"),
        (b"caf\xe9,1", "not UTF-8 (byte 0xe9 at position 3); save the file as UTF-8"),
        (b'"caf\xe9","1"', "not UTF-8 (byte 0xe9 at position 4); save the file as UTF-8"),
        (b"a\0b,1", "has a NUL byte; save the file as UTF-8 text"),
        (b"a,b,1", "has 3 fields, the header has 2"),
        (b"a", "has 1 fields, the header has 2"),
        (b'"abc"def,1', "text after the closing quote of field 1; double a quote that is text"),
    ],
)
@pytest.mark.parametrize("position", [0, 1, 150, 300])
def test_a_bad_line_costs_only_itself(folder: Path, line: bytes, message: str, position: int) -> None:
    lines = [b"row %d,1" % number for number in range(300)]
    lines.insert(position, line)
    rows = read(written(folder / "x.csv", b"\n".join([b"text,label", *lines])), "text", "label")
    assert rows.pop(position) == BadRow(position + 2, message)
    assert fields_of(rows) == [{"text": f"row {number}", "label": "1"} for number in range(300)]
    assert [row.line for row in rows] == [line for line in range(2, 303) if line != position + 2]


def test_a_bad_byte_costs_the_whole_record_it_is_in(folder: Path) -> None:
    source = written(folder / "x.csv", b'text,label\n"one\ncaf\xe9",1\ntwo,2\n')
    bad, good = read(source, "text")
    assert isinstance(bad, BadRow) and bad.line == 2
    assert good == Row(4, {"text": "two"})


@pytest.mark.parametrize("num_lines", [MAX_RECORD_LINES, MAX_RECORD_LINES + 1])
def test_a_record_has_at_most_a_hundred_lines(folder: Path, num_lines: int) -> None:
    text = "\n".join(["line"] * num_lines)
    first, *_, last = read(written(folder / "x.csv", f'text,label\n"{text}",1\nnext,1\n'), "text")
    assert isinstance(first, Row) == (num_lines <= MAX_RECORD_LINES)
    assert last == Row(num_lines + 2, {"text": "next"})


@pytest.mark.parametrize(
    ("lines", "bad"),
    [
        (["1,2,3", '4,"5,6', '7,8",9,0', '1,"2",3'], {3: "unclosed quote", 4: "has 4 fields, the header has 3"}),
        (['1,"2,3', "4,5,6", '7,"8",9'], {2: "unclosed quote"}),
        (['1,"2', '3"', '"4","5",6'], {2: "unclosed quote", 3: "has 1 fields, the header has 3"}),
        (
            ['"1', '2",3', '4,"5"'],
            {2: "unclosed quote", 3: "has 2 fields, the header has 3", 4: "has 2 fields, the header has 3"},
        ),
    ],
)
def test_a_stray_quote_takes_in_no_other_record(folder: Path, lines: list[str], bad: dict[int, str]) -> None:
    rows = read(written(folder / "x.csv", "\n".join(["a,b,c", *lines])), "a")
    assert [row.line for row in rows] == list(range(2, len(lines) + 2))
    assert {row.line: row.message for row in rows if isinstance(row, BadRow)} == bad


def test_a_field_may_be_long(folder: Path) -> None:
    text = 'word "quoted", ' * 100_000
    quoted = text.replace('"', '""')
    assert read(written(folder / "x.csv", f'text,label\n"{quoted}",1\n'), "text") == [Row(2, {"text": text})]
    assert read(written(folder / "x.tsv", f"label\ttext\n1\t{text}\n"), "text") == [Row(2, {"text": text})]


def test_memory_does_not_grow_with_the_file(folder: Path) -> None:
    source = written(folder / "x.csv", "text,label\n" + 20_000 * f"{'a' * 100},1\n")
    tracemalloc.start()
    num_rows = sum(1 for _ in read_rows(source, columns=["text"]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_rows == 20_000
    assert peak < 200_000


@pytest.mark.parametrize("name", CS224N_ROWS)
def test_cs224n_files_read_as_by_the_csv_module(name: str) -> None:
    path = SHARED / "data" / f"{name}.csv"
    if not path.exists():
        pytest.skip(f"no {path}; set MTL_DIST_SHARED to the folder that has data/")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        expected = list(reader)
    rows = read(File(path=path, format="tsv"), *reader.fieldnames or [])
    assert len(rows) == CS224N_ROWS[name]
    assert fields_of(rows) == expected


CELLS = st.text(st.sampled_from('",\t\n\r\x0b\x0c\x1c\x85\u2028\ufeff a') | st.characters(codec="utf-8"), max_size=12)
TABLES = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(CELLS.map(lambda cell: cell.replace("\0", "")), min_size=width, max_size=width))
)


@given(table=TABLES, format=st.sampled_from(["csv", "tsv"]), quote_all=st.booleans())
def test_what_the_csv_module_writes_comes_back(
    folder: Path, table: list[list[str]], format: str, quote_all: bool
) -> None:
    names = [f"column{position}" for position in range(len(table[0]) if table else 1)]
    text = io.StringIO(newline="")
    delimiter = {"csv": ",", "tsv": "\t"}[format]
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
    writer.writerow(names)
    expected = []
    for cells in table:
        line = 1 + text.getvalue().count("\n")
        expected.append(Row(line, dict(zip(names, cells, strict=True))))
        writer.writerow(cells)
    assert read(written(folder / f"written.{format}", text.getvalue()), *names) == expected


CHUNKS = st.sampled_from([b'"', b'""', b",", b"\t", b"\n", b"\r\n", b"a", b"1", b"{", b"}", b":", b"\xe9", b"\0", b"["])


@settings(max_examples=300)
@given(
    start=st.sampled_from([b"", b"\xef\xbb\xbf", b"a,b\n", b"a\tb\n", b'{"a": 1}\n']),
    content=st.binary() | st.lists(CHUNKS).map(b"".join),
    format=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]),
)
def test_no_bytes_raise_anything_but_a_user_error(folder: Path, start: bytes, content: bytes, format: str) -> None:
    source = written(folder / f"random.{format}", start + content)
    try:
        rows = read(source, "a")
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        lines = [0, *(row.line for row in rows), (start + content).count(b"\n") + 2]
        assert all(before < after for before, after in pairwise(lines))


# What no row survives


def test_a_missing_column_is_named_with_its_likely_spelling(folder: Path) -> None:
    source = written(folder / "x.csv", "id,sentence,sentiment\n")
    has = f"{source.path} has no column"
    assert error_of(source, "sentimnt") == (
        f"{has} 'sentimnt'; did you mean 'sentiment'? It has: id, sentence, sentiment"
    )
    assert error_of(source, "xyz") == f"{has} 'xyz'. It has: id, sentence, sentiment"


def test_a_column_must_not_be_there_twice_if_needed(folder: Path) -> None:
    source = written(folder / "x.csv", "id,text,text\n1,a,b\n")
    assert error_of(source, "text") == f"{source.path} has 2 columns named 'text'; rename all but one"
    assert read(source, "id") == [Row(2, {"id": "1"})]


def test_tabs_in_a_csv_are_recognised(folder: Path) -> None:
    source = written(folder / "x.csv", "\tid\tsentence\n0\ta\tb\n")
    assert error_of(source, "id") == f"{source.path} looks like tsv, not csv; set format: tsv"
    assert read(written(folder / "x.tsv", "a,b\n1,2\n"), "a,b") == [Row(2, {"a,b": "1,2"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " is empty"),
        (b"\n\r\n", " is empty"),
        (b"\xff\xfea\0,\0b\0", ":1: cannot read the header: has a NUL byte; save the file as UTF-8 text"),
        (b"\ncaf\xe9,b\n", ":2: cannot read the header: not UTF-8 (byte 0xe9 at position 3); save the file as UTF-8"),
        (b'a,"b\n1,2\n', ":1: cannot read the header: unclosed quote"),
    ],
)
def test_a_csv_needs_a_header(folder: Path, content: bytes, message: str) -> None:
    source = written(folder / "x.csv", content)
    assert error_of(source, "a") == f"{source.path}{message}"


def test_what_is_no_readable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    monkeypatch.chdir(tmp_path)
    assert error_of(File(path=Path("x.csv")), "a") == f"cannot read {tmp_path}/x.csv: No such file or directory"
    for name in ["folder.csv", "pipe.csv"]:
        assert error_of(File(path=Path(name)), "a") == f"cannot read {name}: not a file"
    with pytest.raises(UserError, match="No such file"):
        fingerprint(File(path=Path("x.csv")))


def test_a_file_without_permission_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(folder / "x.csv", "a\n1\n")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")  # chmod would not stop root

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        message = error_of(source, "a")
    assert message == f"cannot read {source.path}: Permission denied"


# JSONL


def test_jsonl_keeps_the_values_as_they_are(folder: Path) -> None:
    values = ["a\u2028\n😀", 1, 2.5, None, True, [1], "null"]
    lines = [json.dumps({"text": value, "other": 0}, ensure_ascii=False) for value in values]
    source = written(folder / "x.ndjson", "\ufeff" + "\r\n".join([*lines[:3], " ", *lines[3:]]))
    rows = read(source, "text")
    assert fields_of(rows) == [{"text": value} for value in values]
    assert [row.line for row in rows] == [1, 2, 3, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not JSON (Expecting ',' delimiter at column 13)"),
        (b'["a"]', "not a JSON object; write one {...} per line"),
        (b'{"txt": "a"}', "has no column 'text'; did you mean 'txt'? It has: txt"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at position 13); save the file as UTF-8"),
        (b'{"text": "\\ud83d"}', "column 'text' has half a surrogate pair, which is no character"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_json_line_costs_only_itself(folder: Path, line: bytes, message: str) -> None:
    good = b'{"text": "a"}'
    rows = read(written(folder / "x.jsonl", b"\n".join([good, line, good])), "text")
    assert rows == [Row(1, {"text": "a"}), BadRow(2, message), Row(3, {"text": "a"})]


def test_an_empty_jsonl_file_is_refused(folder: Path) -> None:
    source = written(folder / "x.jsonl", "")
    assert error_of(source, "a") == f"{source.path} is empty"


# Parquet and hub


def test_parquet_rows_are_numbered_from_one(folder: Path) -> None:
    num_rows = 10_000
    labels = pa.array(["yes", "no"] * (num_rows // 2)).dictionary_encode()
    table = pa.table({"text": [f"row {row}" for row in range(1, num_rows + 1)], "label": labels, "other": labels})
    pq.write_table(table, folder / "x.parquet", row_group_size=3000)
    rows = read(File(path=folder / "x.parquet"), "label", "text")
    assert rows[0] == Row(1, {"label": "yes", "text": "row 1"})
    assert [row.line for row in rows] == list(range(1, num_rows + 1))
    assert [fields["text"] for fields in fields_of(rows)] == [f"row {row.line}" for row in rows]


def test_a_parquet_file_must_be_whole_and_have_the_columns(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 1000}), folder / "x.parquet")
    source = File(path=folder / "x.parquet")
    assert error_of(source, "txt") == f"{source.path} has no column 'txt'; did you mean 'text'? It has: text"
    whole = source.path.read_bytes()
    for content in [whole[:-10], whole[:4] + b"\xff" * 20 + whole[24:], b""]:
        assert error_of(written(source.path, content), "text").startswith(f"cannot read {source.path}: ")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("offline")
def test_a_local_folder_reads_as_a_hub_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1], "other": [0, 0]}), folder / "train.parquet")
    pq.write_table(pa.table({"text": ["c"], "label": [1], "other": [0]}), folder / "test.parquet")
    train, test = (Hub(kind="hub", name=str(folder), split=split) for split in ["train", "test"])
    assert read(train, "text", "label") == [Row(1, {"text": "a", "label": 0}), Row(2, {"text": "b", "label": 1})]
    assert fingerprint(train) == fingerprint(train)
    assert fingerprint(train) != fingerprint(test)
    message = error_of(train, "txt")
    assert message == f"hub:{folder}[train] has no column 'txt'; did you mean 'text'? It has: text, label, other"
    assert "Unknown split" in error_of(Hub(kind="hub", name=str(folder), split="dev"), "text")


@pytest.mark.usefixtures("offline")
def test_a_dataset_that_cannot_be_loaded_says_what_to_do() -> None:
    message = error_of(Hub(kind="hub", name="nobody/nothing", split="train"), "text")
    assert message.startswith("cannot load hub:nobody/nothing[train]: ")
    assert message.endswith("or load it once with HF_HUB_OFFLINE=0 so that it is in the cache")


# The source itself


def test_a_string_or_a_path_means_a_file() -> None:
    adapter = TypeAdapter[File | Hub](Source)
    file = File(path=Path("x.csv"))
    assert adapter.validate_python("x.csv") == adapter.validate_python({"path": "x.csv"}) == file
    assert adapter.validate_python({"path": "x.csv", "format": "tsv"}) == File(path=Path("x.csv"), format="tsv")
    hub = {"kind": "hub", "name": "glue", "split": "train"}
    assert adapter.validate_python(hub) == Hub(kind="hub", name="glue", split="train")
    for wrong in [{"path": "x.csv", "kind": "hub"}, {"name": "glue"}, {"path": "x.csv", "format": "xls"}, 7]:
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_format_is_told_by_the_suffix_or_set(folder: Path) -> None:
    assert read(written(folder / "x.CSV", "a,b\n1,2\n"), "b") == [Row(2, {"b": "2"})]
    text = written(folder / "x.txt", "a\tb\n1\t2\n")
    assert error_of(text, "a") == f"{text.path}: unknown suffix '.txt'; set format: csv, tsv, jsonl or parquet"
    assert read(File(path=text.path, format="tsv"), "b") == [Row(2, {"b": "2"})]


def test_place_is_what_an_editor_opens() -> None:
    assert place(File(path=Path("data/sts-train.csv")), 212) == "data/sts-train.csv:212"
    assert place(File(path=Path("x.parquet")), 3) == "x.parquet row 3"
    assert place(Hub(kind="hub", name="glue", subset="sst2", split="train"), 212) == "hub:glue/sst2[train] row 212"
    assert place(Hub(kind="hub", name="imdb", split="test"), 1) == "hub:imdb[test] row 1"


def test_fingerprint_is_of_the_bytes(folder: Path) -> None:
    # sha256 of "abc", as in FIPS 180-2
    assert fingerprint(written(folder / "x.csv", "abc")).startswith("ba7816bf8f01cfea414140de5dae2223")
    assert fingerprint(written(folder / "x.csv", "\ufeffabc")) != fingerprint(written(folder / "y.csv", "abc"))
