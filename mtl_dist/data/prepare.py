"""Rows to tokens, once: a split is checked, tokenised and written to a memory-mapped Arrow file.

read_rows -> check -> encode -> <cache>/<key>/{rows.arrow, rejected.tsv, meta.json, sha256sums}

The key covers all that the tokens depend on, so a cache entry is never stale; an entry appears whole or not at all, and
one that was damaged later is written anew. Training then holds no text in memory: a `Split` is a view on the file.
"""

import gc
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mtl_dist.config import UserError
from mtl_dist.data.read import BadRow, Example, File, Row, Source, SourceError, fingerprint, name_of, place, read_rows
from mtl_dist.data.tokenizer import Encoded, Words, encode, encode_in_worker, start_worker
from mtl_dist.files import faults, write_sums

FORMAT = 2
ROWS, REJECTED, META = "rows.arrow", "rejected.tsv", "meta.json"
COVERED = (ROWS, REJECTED, META)  # by the list of hashes beside them
HASHES = "hashes"  # of source files, each under the state that it was in
# After which a file that changes has another time, whatever the resolution of clocks, and their agreement.
SETTLED_S = 60
CHUNK_ROWS = 8192
CHUNKS_WORTH_PROCESSES = 3  # below this, starting processes takes longer than the work

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How a task reads rows."""

    columns: list[str]  # that its files must have
    check: Callable[[Row], Example | BadRow]
    sentences: int  # of a row
    joint: bool  # a pair is one input
    skip_bad: bool  # rows that cannot be used are counted and listed; else they are an error
    depends_on: Mapping[str, Any]  # all that `check` makes of a row, as JSON can hold it


class Column:
    """The numbers of a column, whose chunks lie here and there in a mapped file."""

    def __init__(self, file: pa.Buffer, kind: type[np.generic], chunks: Sequence[pa.Buffer]) -> None:
        size = np.dtype(kind).itemsize
        self.numbers = np.frombuffer(file, kind, count=file.size // size)  # all that is in the file, read as such
        self.starts = np.array([(chunk.address - file.address) // size for chunk in chunks], dtype=np.int64)

    def at(self, chunk: Any, place: Any) -> Any:
        """What stands at some places of some chunks."""
        return self.numbers[self.starts[chunk] + place]


class Split:
    """The prepared rows of one split of a task."""

    def __init__(self, folder: Path, source: Source) -> None:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        self.folder = folder
        self.source = source
        self.num_rejected: int = meta["rejected"]
        self.num_truncated: int = meta["truncated"]
        self.num_tokens: int = meta["tokens"]
        with pa.memory_map(str(folder / ROWS)) as opened:
            file = opened.read_buffer()
        reader = pa.ipc.open_file(file)
        chunks = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._rows_of = [len(chunk) for chunk in chunks]
        self._num_rows = sum(self._rows_of)

        def column(name: str, kind: type[np.generic]) -> Column:
            return Column(file, kind, [chunk.column(name).buffers()[1] for chunk in chunks])

        self._lines, self._labels = column("line", np.int64), column("label", np.float64)
        self._digests, self._second_from = column("digest", np.uint64), column("second_from", np.int32)
        inputs = [name for name in reader.schema.names if name.startswith("input")]
        self._offsets = [column(name, np.int32) for name in inputs]
        self._tokens = [
            Column(file, np.int32, [chunk.column(name).values.buffers()[1] for chunk in chunks]) for name in inputs
        ]
        self._ids = [chunk.column("id") for chunk in chunks]

    def __len__(self) -> int:
        return self._num_rows

    def inputs(self, row: int) -> list[NDArray[np.int32]]:
        """The token numbers that the encoder reads for a row: one input, or one for each sentence of a pair."""
        chunk, i = divmod(row, CHUNK_ROWS)
        found = []
        for offsets, tokens in zip(self._offsets, self._tokens, strict=True):
            start = tokens.starts[chunk]
            found.append(tokens.numbers[start + offsets.at(chunk, i) : start + offsets.at(chunk, i + 1)])
        return found

    def second_from(self, row: int) -> int:
        """Where the second sentence starts in a joint input."""
        return int(self._second_from.at(*divmod(row, CHUNK_ROWS)))

    def label(self, row: int) -> float:
        """The label; not a number where there is none."""
        return float(self._labels.at(*divmod(row, CHUNK_ROWS)))

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The labels of some rows."""
        labels: NDArray[np.float64] = self._labels.at(*np.divmod(rows, CHUNK_ROWS))
        return labels

    def line(self, row: int) -> int:
        """The line of the file that the row was read from."""
        return int(self._lines.at(*divmod(row, CHUNK_ROWS)))

    def id(self, row: int) -> str:
        """The row's name in the file's id column, or its line."""
        chunk, i = divmod(row, CHUNK_ROWS)
        return str(self._ids[chunk][i].as_py())

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens the encoder reads for each of some rows."""
        chunk, i = np.divmod(rows, CHUNK_ROWS)
        lengths = np.zeros(len(rows), dtype=np.int64)
        for offsets in self._offsets:
            lengths += offsets.at(chunk, i + 1) - offsets.at(chunk, i)
        return lengths

    def rejected(self) -> list[BadRow]:
        """The rows of the file that the task cannot use."""
        lines = (self.folder / REJECTED).read_text(encoding="utf-8").splitlines()
        return [BadRow(int(line), message) for line, message in (text.split("\t", 1) for text in lines)]

    def digests(self) -> Iterator[NDArray[np.uint64]]:
        """The `digest` of every row, in some arrays."""
        for start, rows in zip(self._digests.starts.tolist(), self._rows_of, strict=True):
            yield self._digests.numbers[start : start + rows]


def prepare(
    reading: Reading,
    source: Source,
    tokenizer: Tokenizer,
    max_length: int,
    cache_dir: Path,
    on_rows: Callable[[int], object] = lambda rows: None,
    checked: bool = False,
) -> Split:
    """The prepared rows of `source`; from the cache if they are there, else written now (`on_rows` hears how many).

    `checked`: another process of this machine has just found them whole.
    """
    rows = _remembered(source, cache_dir)
    key = _key(reading, source, rows, tokenizer, max_length)
    folder = cache_dir / key
    if not (checked and folder.is_dir()) and faults(folder, COVERED):
        work = folder.with_name(f".{key}.{uuid4().hex[:8]}")
        unfinished = work / "new"
        try:
            unfinished.mkdir(parents=True)
            _write(unfinished, reading, source, tokenizer, max_length, on_rows)
            if fingerprint(source) != rows:  # or other rows would stand under this file's key
                raise UserError(f"{name_of(source)} changed while it was read; start again when it is written")
            if os.path.lexists(folder) and faults(folder, COVERED):  # not made by another process in the meantime
                log.warning("cache_dir: %s is damaged; it is written anew", folder)
                folder.rename(work / "damaged")
            unfinished.rename(folder)
        except OSError as error:
            # Another process may have been faster: its entry is as good as ours.
            if faults(folder, COVERED):
                raise UserError(f"cache_dir: cannot write {work}: {error.strerror or error}") from error
        except BrokenProcessPool as error:
            raise UserError(
                f"{name_of(source)}: a process that tokenised it was killed, most likely because memory ran out; "
                "run mtl-dist prepare where there is more, or free some"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Split(folder, source)


def _remembered(source: Source, cache_dir: Path) -> str:
    """The fingerprint of a source; of a file that nobody touched since then, the one that was written down."""
    record = _record_of(source, cache_dir) if isinstance(source, File) else None
    if record is None:
        return fingerprint(source)
    with suppress(OSError):
        one, _, other = record.read_text(encoding="utf-8", errors="replace").partition("\n")
        if one and one == other:  # written twice, so that a damaged record is none
            return one
    rows = fingerprint(source)
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{rows}\n{rows}", encoding="utf-8")
    return rows


def _record_of(source: File, cache_dir: Path) -> Path | None:
    """Where the fingerprint of a file in its present state is written down; nowhere if it may have just changed."""
    try:
        if not source.path.is_file():  # to open a pipe would wait for its writer
            return None
        with source.path.open("rb") as file:
            status = os.fstat(file.fileno())  # opened, because NFS then asks the server
    except OSError:
        return None
    if time.time() - status.st_ctime < SETTLED_S:
        return None
    # Nobody can set the time at which a file's status last changed.
    state = (os.path.realpath(source.path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return cache_dir / HASHES / hashlib.sha256(repr(state).encode()).hexdigest()[:32]


def _key(reading: Reading, source: Source, rows: str, tokenizer: Tokenizer, max_length: int) -> str:
    parts = {
        "format": (FORMAT, CHUNK_ROWS),
        "rows": rows,
        "read_as": source.model_dump(mode="json", exclude={"path"}),
        "suffix": source.path.suffix if isinstance(source, File) else None,
        "tokenizer": tokenizer.to_str(),
        "max_length": max_length,
        "joint": reading.joint,
        **reading.depends_on,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def checked_rows(reading: Reading, source: Source) -> Iterator[Example | BadRow]:
    """Every row of `source`, as an example or with what is wrong with it."""
    for row in read_rows(source, columns=reading.columns):
        yield row if isinstance(row, BadRow) else reading.check(row)


def digest(sentences: Sequence[str]) -> int:
    """64 bits that tell what a row says from what others say, whatever its case and spacing."""
    text = "\0".join(" ".join(sentence.split()).casefold() for sentence in sentences)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def train_rows_in_dev(train: Mapping[str, Split], dev: Mapping[str, Split]) -> list[str]:
    """A line for each task of whose dev rows some are among its train rows too."""
    shared = {
        name: rows_among(train[name].digests(), np.concatenate(list(split.digests()))) for name, split in dev.items()
    }
    return [also_in_train(f"{name} dev", rows, len(dev[name])) for name, rows in shared.items() if rows]


def rows_among(train: Iterable[NDArray[np.uint64]], dev: NDArray[np.uint64]) -> int:
    """How many of the dev rows are among those of train, by their digests."""
    digests, rows = np.unique(dev, return_counts=True)
    found = np.zeros(len(digests), dtype=bool)
    # Most train rows are no dev row by their last bits alone, and that is seen ten times as fast.
    last_bits = np.uint64((16 << len(digests).bit_length()) - 1)
    maybe = np.zeros(int(last_bits) + 1, dtype=bool)
    maybe[digests & last_bits] = True
    for of_chunk in train:
        likely = of_chunk[maybe[of_chunk & last_bits]]
        places = np.searchsorted(digests, likely).clip(max=len(digests) - 1)
        found[places[digests[places] == likely]] = True
    return int(rows[found].sum())


def also_in_train(whose: str, shared: int, rows: int) -> str:
    """What a user reads of rows that are scored and trained on."""
    return f"{whose}: {shared:,} of {rows:,} rows are also in train; their scores say little"


def count_rows(
    whose: str,
    reading: Reading,
    source: Source,
    on_digest: Callable[[int], object] = lambda digest: None,
) -> dict[str, int]:
    """How many rows are usable and how many not, as `refuse_unusable` allows; `on_digest` hears of each usable one."""
    usable, bad = 0, []
    for row in checked_rows(reading, source):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            usable += 1
            on_digest(digest(row.sentences))
    refuse_unusable(whose, reading, source, usable, bad)
    return {"usable": usable, "rejected": len(bad)}


def refuse_unusable(
    whose: str, reading: Reading, source: Source, usable: int, bad: Sequence[BadRow], shown: int = 5
) -> None:
    """Raises if there are bad rows that the task does not skip, or no others; `whose` names task and split."""
    if bad and not reading.skip_bad:
        lines = [f"{place(source, row.line)}: {row.message} ({whose})" for row in bad[:shown]]
        if len(bad) > shown:
            way_out = "; bad_rows: skip trains without them" if usable else "; not one row can be used"
            lines.append(f"... and {len(bad) - shown} more such rows{way_out}")
        raise UserError("\n".join(lines))
    if not usable:
        hint = "; bad_rows: error tells why" if bad else ""
        raise SourceError(f"{name_of(source)} has no usable row{hint}")


def _write(
    folder: Path,
    reading: Reading,
    source: Source,
    tokenizer: Tokenizer,
    max_length: int,
    on_rows: Callable[[int], object],
) -> None:
    num_inputs = 1 if reading.joint else reading.sentences
    schema = pa.schema(
        [
            ("line", pa.int64()),
            ("id", pa.string()),
            ("label", pa.float64()),
            ("digest", pa.uint64()),
            ("second_from", pa.int32()),
        ]
        + [(f"input{i}", pa.list_(pa.int32())) for i in range(num_inputs)]
    )
    meta = {"rejected": 0, "truncated": 0, "tokens": 0}
    with (
        (folder / REJECTED).open("w", encoding="utf-8", errors="backslashreplace") as rejected,
        pa.OSFile(str(folder / ROWS), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):

        def good_rows() -> Iterator[Example]:
            for row in checked_rows(reading, source):
                if isinstance(row, Example):
                    yield row
                else:
                    rejected.write(f"{row.line}\t{' '.join(row.message.split())}\n")
                    meta["rejected"] += 1

        chunks = _in_chunks(good_rows())
        # Rows make no cycles; to look for some among all that torch has made takes as long as the rest.
        looking = gc.isenabled()
        gc.disable()
        try:
            for examples, encoded in _encode_all(chunks, tokenizer, max_length, reading.joint, folder.parent):
                writer.write_batch(_record_batch(examples, encoded, schema))
                meta["truncated"] += encoded.truncated
                meta["tokens"] += sum(len(tokens) for tokens, _ in encoded.inputs)
                on_rows(len(examples))
        finally:
            if looking:
                gc.enable()
    (folder / META).write_text(json.dumps(meta) + "\n", encoding="utf-8")
    write_sums(folder, COVERED)


def _in_chunks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    while chunk := list(islice(examples, CHUNK_ROWS)):
        yield chunk


def _encode_all(
    chunks: Iterator[list[Example]], tokenizer: Tokenizer, max_length: int, joint: bool, scratch: Path
) -> Iterator[tuple[list[Example], Encoded]]:
    """Each chunk with its tokens, in order; a large split is spread over processes, which find files in `scratch`."""
    first = list(islice(chunks, CHUNKS_WORTH_PROCESSES))
    if len(first) < CHUNKS_WORTH_PROCESSES:
        words = Words(tokenizer)
        for chunk in first:
            yield chunk, encode(words, [example.sentences for example in chunk], max_length, joint)
        return
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[tuple[list[Example], Future[Encoded]]] = deque()
    # In a file: Python waits forever for a process that dies before it has read so large an argument.
    path = scratch / "tokenizer.json"
    tokenizer.save(str(path))
    # Spawned, because a fork would copy the threads' locks of whatever runs here.
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(path,)
    ) as pool:
        for chunk in chain(first, chunks):
            sentences = [example.sentences for example in chunk]
            waiting.append((chunk, pool.submit(encode_in_worker, sentences, max_length, joint)))
            if len(waiting) > 2 * workers:  # read ahead, but do not read the whole file into memory
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _record_batch(examples: Sequence[Example], encoded: Encoded, schema: pa.Schema) -> pa.RecordBatch:
    columns: list[pa.Array] = [
        pa.array([example.line for example in examples], pa.int64()),
        pa.array([example.id for example in examples], pa.string()),
        pa.array([example.label for example in examples], pa.float64()),
        pa.array([digest(example.sentences) for example in examples], pa.uint64()),
        pa.array(encoded.second_from, pa.int32()),
    ]
    for tokens, offsets in encoded.inputs:
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens)))
    return pa.record_batch(columns, schema=schema)
