"""Reads the rows of a CSV, TSV, JSONL or Parquet file, or of a hub dataset, one at a time and each with its line.

A row that cannot be read is yielded as a `BadRow`, so that one run reports them all; what no row survives (a missing
file or column) is a `SourceError`. What the values mean is not known here.
"""

import codecs
import hashlib
import json
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mtl_dist.config import LONE_SURROGATE, Config, UserError, UserPath

Format = Literal["csv", "tsv", "jsonl", "parquet"]
DELIMITERS: dict[Format, str] = {"csv": ",", "tsv": "\t"}
MAX_RECORD_LINES = 100  # of one CSV record; a quote still open after them was a stray one
PARQUET_BATCH_ROWS = 4096

QUOTED_FIELD = re.compile(r'"([^"]*+(?:""[^"]*+)*+)"')


class File(Config):
    """Rows of one file; a plain string in a config means this."""

    kind: Literal["file"] = "file"
    path: UserPath
    format: Format | None = None  # told by the suffix if not given


class Hub(Config):
    """Rows of a dataset of the Hugging Face hub, or of a local folder in its layout."""

    kind: Literal["hub"]
    name: str
    subset: str | None = None
    split: str
    revision: str | None = None  # a commit or tag; pins what the hub may change


def _with_kind(value: object) -> object:
    if isinstance(value, str | Path):
        return {"kind": "file", "path": value}
    if isinstance(value, dict) and "path" in value:
        return {"kind": "file", **value}
    return value


Source = Annotated[
    File | Hub, Field(discriminator="kind"), BeforeValidator(_with_kind, json_schema_input_type=str | File | Hub)
]


class SourceError(UserError):
    """What no row of a source survives; says which file, but not for which task it was read."""


class NoColumnError(SourceError):
    """A source without a column that was asked for."""


@dataclass(slots=True, frozen=True)
class Row:
    """The wanted columns of one row; `line` counts physical lines from 1 (Parquet and hub: rows from 1)."""

    line: int
    fields: dict[str, object]


@dataclass(slots=True, frozen=True)
class BadRow:
    """A row that could not be read, and why."""

    line: int
    message: str


@dataclass(frozen=True, slots=True)
class Example:
    """A row whose sentences and label are what the task expects."""

    line: int
    id: str
    sentences: tuple[str, ...]
    label: float


def read_rows(source: Source, *, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    """Yields the rows of `source`, cut to `columns`; a column that is not there raises before the first row."""
    columns = list(columns)
    if isinstance(source, Hub):
        yield from _hub_rows(source, columns)
    elif (format := _format(source)) == "parquet":
        yield from _parquet_rows(source.path, columns)
    else:
        with _opened(source.path) as file:
            start = file.read(len(codecs.BOM_UTF8))
            if not start:
                raise SourceError(f"{source.path} is empty")
            if start != codecs.BOM_UTF8:
                file.seek(0)
            if format == "jsonl":
                yield from _jsonl_rows(file, columns)
            else:
                yield from _csv_rows(file, source.path, format, columns)


def place(source: Source, line: int) -> str:
    """Names a row to the user: `data/sts-train.csv:212`, `hub:glue/sst2[train] row 212`."""
    has_lines = isinstance(source, File) and _format(source) != "parquet"
    return f"{name_of(source)}:{line}" if has_lines else f"{name_of(source)} row {line}"


def fingerprint(source: Source) -> str:
    """A sha256 that changes whenever the rows may have changed."""
    if isinstance(source, Hub):
        return hashlib.sha256(_load_hub(source)._fingerprint.encode()).hexdigest()
    with _opened(source.path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_of(source: Source) -> str:
    """Names a source to the user."""
    if isinstance(source, File):
        return str(source.path)
    subset = f"/{source.subset}" if source.subset else ""
    return f"hub:{source.name}{subset}[{source.split}]"


def is_same(one: Source, other: Source) -> bool:
    """Whether two sources are the same rows, under whatever path."""
    if isinstance(one, File) and isinstance(other, File):
        return os.path.realpath(one.path) == os.path.realpath(other.path)
    return one == other


def _format(source: File) -> Format:
    match source.format or source.path.suffix.lower().removeprefix("."):
        case "csv" | "tsv" | "jsonl" | "parquet" as format:
            return format
        case "ndjson":
            return "jsonl"
    raise SourceError(f"{source.path}: unknown suffix {source.path.suffix!r}; set format: csv, tsv, jsonl or parquet")


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
            raise SourceError(f"cannot read {path}: not a file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise SourceError(f"cannot read {path.absolute()}: {error.strerror}") from error


def _check_columns(where: str, names: list[str], columns: list[str]) -> None:
    for column in columns:
        if column not in names:
            raise NoColumnError(f"{where} {_no_column(column, names)}")
        if names.count(column) > 1:
            raise SourceError(f"{where} has {names.count(column)} columns named {column!r}; rename all but one")


def _no_column(column: str, names: list[str]) -> str:
    close = get_close_matches(column, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"has no column {column!r}{hint} It has: {_one_line(', '.join(name or repr(name) for name in names))}"


def _one_line(text: object) -> str:
    return textwrap.shorten(str(text), 400)


def _decode(raw: bytes) -> str:
    if b"\0" in raw:
        raise ValueError("has a NUL byte; save the file as UTF-8 text")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        byte = f"0x{raw[error.start]:02x} at position {error.start}"
        raise ValueError(f"not UTF-8 (byte {byte}); save the file as UTF-8") from error


# CSV and TSV, as in RFC 4180. Not by the csv module: to it a stray quote is a field that takes in all further lines,
# and its limit on a field's length belongs to the whole process.


def _csv_rows(file: BufferedReader, path: Path, format: Format, columns: list[str]) -> Iterator[Row | BadRow]:
    records = _csv_records(file, DELIMITERS[format])
    header = next(records, None)
    if header is None:
        raise SourceError(f"{path} is empty")
    if isinstance(header, BadRow):
        raise SourceError(f"{path}:{header.line}: cannot read the header: {header.message}")
    _, names = header
    other: Format = "tsv" if format == "csv" else "csv"
    if len(names) == 1 and names != columns and DELIMITERS[other] in names[0]:
        raise SourceError(f"{path} looks like {other}, not {format}; set format: {other}")
    _check_columns(str(path), names, columns)
    positions = [(column, names.index(column)) for column in columns]
    for record in records:
        if isinstance(record, BadRow):
            yield record
        else:
            line, values = record
            yield Row(line, {column: values[position] for column, position in positions})


def _csv_records(file: BufferedReader, delimiter: str) -> Iterator[tuple[int, list[str]] | BadRow]:
    """Yields each record's first line and its fields, beginning with the header's, which set the number of fields."""
    num_fields = None
    next_line = 1
    for raw in file:  # bytes end a line at \n only; text would also do so at \r, \x0b, \u2028...
        line, next_line = next_line, next_line + 1
        if raw in (b"\n", b"\r\n"):
            continue
        try:
            fields = _split(raw, delimiter)
            if fields is None:
                raw, fields = _join(raw, file, delimiter, num_fields)
                next_line = line + raw.count(b"\n")
            _decode(raw)  # checked last, so that a bad byte does not part a record from its further lines
            num_fields = num_fields or len(fields)
            if len(fields) != num_fields:
                raise ValueError(f"has {len(fields)} fields, the header has {num_fields}")
        except ValueError as error:
            yield BadRow(line, str(error))
        else:
            yield line, fields


def _split(raw: bytes, delimiter: str) -> list[str] | None:
    """The fields of a record; None if it ends inside quotes."""
    text = raw.decode(errors="replace").removesuffix("\n").removesuffix("\r")
    if '"' not in text:
        return text.split(delimiter)
    fields: list[str] = []
    start = 0
    while True:
        if text.startswith('"', start):
            quoted = QUOTED_FIELD.match(text, start)
            if quoted is None:
                return None
            end = quoted.end()
            if end < len(text) and text[end] != delimiter:
                raise ValueError(
                    f"text after the closing quote of field {len(fields) + 1}; double a quote that is text"
                )
            fields.append(quoted[1].replace('""', '"'))
        else:
            end = text.find(delimiter, start)
            end = len(text) if end == -1 else end
            fields.append(text[start:end])
        if end == len(text):
            return fields
        start = end + 1


def _join(raw: bytes, file: BufferedReader, delimiter: str, num_fields: int | None) -> tuple[bytes, list[str]]:
    """The whole record that begins with the line `raw`; if there is none, `file` stays after that line."""
    after_line = file.tell()
    with suppress(ValueError):  # text follows a quote: it closed nothing
        for more in islice(file, MAX_RECORD_LINES - 1):
            raw += more
            if b'"' in more and (fields := _split(raw, delimiter)) is not None:
                if num_fields in (None, len(fields)):
                    return raw, fields
                break
    file.seek(after_line)
    raise ValueError("unclosed quote")


def _jsonl_rows(file: BufferedReader, columns: list[str]) -> Iterator[Row | BadRow]:
    for line, raw in enumerate(file, start=1):
        if not raw.strip():
            continue
        try:
            fields = _json_fields(_decode(raw), columns)
        except ValueError as error:
            yield BadRow(line, str(error))
        else:
            yield Row(line, fields)


def _json_fields(text: str, columns: list[str]) -> dict[str, object]:
    try:
        record = json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object; write one {...} per line")
    for column in columns:
        if column not in record:
            raise ValueError(_no_column(column, list(record)))
        if isinstance(record[column], str) and LONE_SURROGATE.search(record[column]):
            raise ValueError(f"column {column!r} has half a surrogate pair, which is no character")
    return {column: record[column] for column in columns}


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _opened(path) as file:
        try:
            table = pq.ParquetFile(file)
            _check_columns(str(path), table.schema_arrow.names, columns)
            batches = table.iter_batches(PARQUET_BATCH_ROWS, columns=columns)
            for line, fields in enumerate((fields for batch in batches for fields in batch.to_pylist()), start=1):
                yield Row(line, fields)
        # Arrow reports a broken file as any of these, and Python a date that it cannot have.
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise SourceError(f"cannot read {path}: {_one_line(error)}") from error


def _hub_rows(source: Hub, columns: list[str]) -> Iterator[Row]:
    dataset = _load_hub(source)
    _check_columns(name_of(source), dataset.column_names, columns)
    for line, fields in enumerate(dataset.select_columns(columns), start=1):
        yield Row(line, fields)


def _load_hub(source: Hub) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(source.name, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # no network, no such name, no such split: each comes as a type of its own
        raise SourceError(
            f"cannot load {name_of(source)}: {_one_line(error).rstrip('.')}. Check name, subset and split; without a "
            "network use a file, or load it once with HF_HUB_OFFLINE=0 so that it is in the cache"
        ) from error
