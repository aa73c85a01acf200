"""Data files and their cache, damaged, changed or short: rows are right, or one line says why there are none.

python -m pytest tests/faults/test_data.py
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from mtl_dist.cli import main
from mtl_dist.config import UserError, load
from mtl_dist.data import prepare as module
from mtl_dist.data.prepare import Split, digest, prepare, train_rows_in_dev
from mtl_dist.data.read import File
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment
from mtl_dist.tasks import TaskConfig
from mtl_dist.training.loop import train
from tests.distributed import on_ranks

TASK = TaskConfig.model_validate(
    {"train": "x", "columns": {"sentences": ["u", "v"], "label": "y"}, "label": {"kind": "binary"}, "bad_rows": "skip"}
)
FILES = ["meta.json", "rejected.tsv", "rows.arrow", "sha256sums"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]))
    return load_tokenizer(str(folder))


def written(path: Path, *texts: str, label: object = 1) -> File:
    """A file of pairs whose second sentence is always "d"."""
    path.write_text("".join(json.dumps({"u": text, "v": "d", "y": label}) + "\n" for text in texts))
    return File(path=path)


def contents(split: Split) -> list[tuple[object, ...]]:
    rows = [(split.line(i), split.label(i), *(list(x) for x in split.inputs(i))) for i in range(len(split))]
    return [*rows, *((bad.line, bad.message) for bad in split.rejected()), split.num_tokens]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What standard error says of a command that ends with exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# The cache


def flipped(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_the_cache_is_noticed_and_mended(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    source = written(tmp_path / "x.jsonl", "a", "b c", " ", "d a")
    split = prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    expected, path = contents(split), split.folder / name
    for bit in range(0, 8 * path.stat().st_size, 101):  # of every byte some, of every other file all kinds of places
        flipped(path, bit)
        caplog.clear()
        assert contents(prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")) == expected
        assert caplog.messages == [f"cache_dir: {split.folder} is damaged; it is written anew"]
    caplog.clear()
    prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    assert not caplog.messages
    assert names_in(tmp_path / "cache") == [split.folder.name]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda entry: os.truncate(entry / "rows.arrow", 100),
    "empty": lambda entry: os.truncate(entry / "rows.arrow", 0),
    "a file is missing": lambda entry: (entry / "rows.arrow").unlink(),
    "not finished": lambda entry: (entry / "sha256sums").unlink(),
    "an empty folder": lambda entry: (shutil.rmtree(entry), entry.mkdir()),
    "a foreign folder": lambda entry: (shutil.rmtree(entry), entry.mkdir(), (entry / "notes.txt").write_text("mine")),
    "a file in its place": lambda entry: (shutil.rmtree(entry), entry.write_text("mine")),
    "a link to nowhere": lambda entry: (shutil.rmtree(entry), entry.symlink_to("nowhere")),
    "a link elsewhere": lambda entry: (shutil.rmtree(entry), entry.symlink_to("/")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_cache_entry_that_is_not_whole_is_written_anew(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    source = written(tmp_path / "x.jsonl", "a", "b c", " ")
    split = prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    expected = contents(split)
    damage(split.folder)
    assert contents(prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")) == expected
    assert "is damaged; it is written anew" in caplog.text
    assert names_in(split.folder) == FILES
    assert names_in(tmp_path / "cache") == [split.folder.name]
    assert Path("/bin").exists()  # what a link led to was left alone


def _killed_while_it_writes(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    prepare(
        TASK.reading(),
        File(path=folder / "x.jsonl"),
        tokenizer,
        64,
        folder / "cache",
        on_rows=lambda rows: os.kill(os.getpid(), 9),
    )


def test_what_a_killed_process_left_is_no_entry(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "cache").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = written(tmp_path / "x.jsonl", "a", "b")
    process = multiprocessing.get_context("spawn").Process(target=_killed_while_it_writes, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".") and (left / "new" / "rows.arrow").exists()
    assert len(prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")) == 2


def test_a_cache_that_is_deleted_does_not_disturb_who_reads_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = prepare(TASK.reading(), written(tmp_path / "x.jsonl", *["a b"] * 9000), tokenizer, 64, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert [list(x) for x in split.inputs(8999)] == [[2, 5, 6, 3], [2, 8, 3]]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets no file grow beyond so many bytes, as if the disk were full."""
    soft, hard = getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        setrlimit(RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1000, 20_000])
def test_a_full_disk_while_the_cache_is_written_is_one_line(tmp_path: Path, tokenizer: Tokenizer, size: int) -> None:
    source = written(tmp_path / "x.jsonl", *["a b c"] * 9000)
    with largest_file(size), pytest.raises(UserError) as caught:
        prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    assert str(caught.value).startswith(f"cache_dir: cannot write {tmp_path}/cache/.")
    assert str(caught.value).endswith("File too large") and "\n" not in str(caught.value)
    assert names_in(tmp_path / "cache") == []
    assert len(prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")) == 9000


# Files that change


def test_a_file_that_changed_between_runs_is_read_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = written(tmp_path / "x.jsonl", "a", "b")
    before = source.path.stat()
    first = prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    written(source.path, "a", "c")
    os.utime(source.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = source.path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)  # only its content tells
    second = prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    assert [list(split.inputs(1)[0]) for split in (first, second)] == [[2, 6, 3], [2, 7, 3]]


def hashed_now(monkeypatch: pytest.MonkeyPatch, later_s: float) -> list[str]:
    """The files that are hashed from now on, as if it were so much later."""
    hashed: list[str] = []
    fingerprint, now = module.fingerprint, time.time

    def heard(source: File) -> str:
        hashed.append(source.path.name)
        return fingerprint(source)

    monkeypatch.setattr(module, "fingerprint", heard)
    monkeypatch.setattr(module.time, "time", lambda: now() + later_s)
    return hashed


def test_a_file_that_nobody_touched_is_hashed_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "x.jsonl", "a", "b")
    prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    hashed = hashed_now(monkeypatch, later_s=3600)
    splits = [prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache") for _ in range(3)]
    assert hashed == ["x.jsonl"]
    assert len({split.folder for split in splits}) == 1


def test_a_file_that_changed_though_nothing_tells_but_its_status_is_hashed_again(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "x.jsonl", "a", "b")
    hashed = hashed_now(monkeypatch, later_s=3600)
    first = prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    before = source.path.stat()
    written(source.path, "a", "c")
    os.utime(source.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    hashed.clear()
    second = prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    assert hashed
    assert [list(split.inputs(1)[0]) for split in (first, second)] == [[2, 6, 3], [2, 7, 3]]


def test_a_file_that_was_just_written_is_hashed_each_time(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The clock of a file system stands still for some milliseconds: two contents may have the same time.
    source = written(tmp_path / "x.jsonl", "a", "b")
    hashed = hashed_now(monkeypatch, later_s=0)
    for _ in range(2):
        prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    assert hashed[-1:] == ["x.jsonl"] and len(hashed) == 3  # before, after writing, and the second time


def test_a_damaged_record_of_a_hash_is_none(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "x.jsonl", "a", "b")
    hashed = hashed_now(monkeypatch, later_s=3600)
    split = prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    (record,) = (tmp_path / "cache" / module.HASHES).iterdir()
    for damage in (b"", record.read_bytes()[:70], bytes([record.read_bytes()[0] ^ 1]) + record.read_bytes()[1:]):
        record.write_bytes(damage)
        hashed.clear()
        assert prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache").folder == split.folder
        assert hashed == ["x.jsonl"]


def test_only_the_first_process_of_a_machine_hashes_an_entry(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "x.jsonl", "a", "b")
    split = prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    looked: list[Path] = []
    monkeypatch.setattr(module, "faults", lambda folder, names: looked.append(folder) or [])  # type: ignore[func-returns-value]
    assert contents(prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache", checked=True)) == contents(split)
    assert looked == []
    prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")
    assert looked == [split.folder]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = written(tmp_path / "x.jsonl", "a", "b")
    with pytest.raises(UserError) as caught:
        prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache", on_rows=lambda _: written(source.path, "c"))
    assert str(caught.value) == f"{source.path} changed while it was read; start again when it is written"
    assert names_in(tmp_path / "cache") == []
    assert len(prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache")) == 1


# Processes that tokenise


def test_a_killed_tokenising_process_is_one_line(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 100)
    source = written(tmp_path / "x.jsonl", *["a b c"] * 5000)

    def kill(rows: int) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    with pytest.raises(
        UserError, match=r"x\.jsonl: a process that tokenised it was killed, .* memory ran out"
    ) as caught:
        prepare(TASK.reading(), source, tokenizer, 64, tmp_path / "cache", on_rows=kill)
    assert len(str(caught.value).splitlines()) == 1
    assert names_in(tmp_path / "cache") == []


# Its tokenizing processes run it again from the top, and die of that: not one of them comes to read what it is given.
NO_GUARD = """
import sys
from pathlib import Path
from mtl_dist.data.prepare import prepare
from mtl_dist.data.read import File
from mtl_dist.tasks import TaskConfig
from mtl_dist.data.tokenizer import load_tokenizer

task = TaskConfig(train="x", columns={"sentences": ["u"], "label": "y"}, label={"kind": "binary"})
prepare(task.reading(), File(path=Path("x.jsonl")), load_tokenizer("."), 64, Path("cache"))
"""


def test_tokenising_processes_that_cannot_start_are_no_hang(tmp_path: Path) -> None:
    # A vocabulary as large as those of real models: more than a pipe holds.
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(30_000))])
    )
    written(tmp_path / "x.jsonl", *["w1"] * 30_000)
    (tmp_path / "mine.py").write_text(NO_GUARD)
    paths = os.pathsep.join(map(str, sys.path))
    done = subprocess.run(
        [sys.executable, "mine.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
    )
    assert done.returncode == 1
    assert b"if __name__ == '__main__':" in done.stderr  # Python itself says what is wrong


# Few rows, or none

EMPTY: dict[str, tuple[str, str]] = {
    "empty.tsv": ("", "is empty"),
    "header.tsv": ("id\tsentence\tlabel\n", "has no usable row"),
    "header.csv": ("id,sentence,label\r\n", "has no usable row"),
    "blank.jsonl": ("\n\n", "has no usable row"),
    "bad.tsv": ("id\tsentence\tlabel\na\tbam\t9\n", "has no usable row; bad_rows: error tells why"),
}


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("name", EMPTY)
def test_no_rows_are_one_line(tiny: Path, capsys: pytest.CaptureFixture[str], name: str, split: str) -> None:
    content, message = EMPTY[name]
    path = tiny.parent / name
    path.write_text(content)
    for command in ("validate", "prepare", "train"):
        override = f"tasks.mood.{split}={name}"
        said = refused(capsys, command, tiny, override, "tasks.mood.bad_rows=skip")
        assert said == f"override '{override}': tasks.mood.{split}: {path} {message}\n"


def test_a_parquet_file_without_rows_is_one_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.parent / "none.parquet"
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in ("id", "sentence", "label")}), path)
    assert refused(capsys, "train", tiny, f"tasks.mood.train={path}") == (
        f"override 'tasks.mood.train={path}': tasks.mood.train: {path} has no usable row\n"
    )


def test_a_date_that_python_cannot_have_is_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"u": ["a"], "v": ["b"], "y": pa.array([10**8], pa.date32())}), path)  # in 273,790 years
    with pytest.raises(UserError) as caught:
        prepare(TASK.reading(), File(path=path), tokenizer, 64, tmp_path / "cache")
    assert str(caught.value) == f"cannot read {path}: date value out of range"


TASKS = ("mood", "same", "near")


def _scores_of_one_row(config: Path) -> dict[str, Any]:
    return train(load(Experiment, config, ["steps=2", *(f"tasks.{task}.dev=one-{task}.tsv" for task in TASKS)]))


def test_fewer_rows_than_ranks(tiny: Path) -> None:
    for task in TASKS:
        lines = (tiny.parent / f"{task}-train.tsv").read_text().splitlines()[:2]
        for name in (f"one-{task}.tsv", f"{task}-train.tsv"):
            (tiny.parent / name).write_text("\n".join(lines) + "\n")
    first, second = on_ranks(2, _scores_of_one_row, tiny)
    assert first == second
    assert [scores["rows"] for scores in first["tasks"].values()] == [1, 1, 1]


READS_ALL = ("data.prepare.fingerprint", "data.prepare.faults", "training.setup.train_rows_in_dev")


def _reads_all(config: Path) -> list[str]:
    """Which of the works that grow with the number of rows this rank did as a run started."""
    done: list[str] = []

    def heard(name: str) -> Any:
        module, _, function = name.rpartition(".")
        original = getattr(import_module(f"mtl_dist.{module}"), function)
        return patch(f"mtl_dist.{name}", lambda *arguments: (done.append(name), original(*arguments))[1])

    with ExitStack() as patches:
        for name in READS_ALL:
            patches.enter_context(heard(name))
        patches.enter_context(patch.object(module, "SETTLED_S", 0))
        train(load(Experiment, config, ["steps=1"]), overwrite=True)
    return sorted(set(done))


def test_one_process_of_a_machine_reads_all_rows_as_a_run_starts(tiny: Path) -> None:
    assert on_ranks(2, _reads_all, tiny) == [sorted(READS_ALL), []]


# Rows that are scored and trained on


def test_train_rows_in_dev_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def split(name: str, *texts: str) -> Split:
        return prepare(TASK.reading(), written(tmp_path / name, *texts), tokenizer, 64, tmp_path / "cache")

    train_split = split("train.jsonl", *["a"] * 9000, "b c", "c")  # of more than one chunk
    # Three of them, whatever case and spacing; d would be one only if sentences changed places.
    dev = split("dev.jsonl", "a b", "B   c ", "b c", "c", "cb", "d")
    assert train_rows_in_dev({"it": train_split}, {"it": dev}) == [
        "it dev: 3 of 6 rows are also in train; their scores say little"
    ]
    assert train_rows_in_dev({"it": train_split}, {"it": split("other.jsonl", "d", "a b")}) == []


def test_pairs_are_the_same_only_in_the_same_order_and_division() -> None:
    assert digest(["a b", "c"]) == digest(["A  b", "C"])
    assert len({digest(["a b", "c"]), digest(["c", "a b"]), digest(["a", "b c"]), digest(["a b c"])}) == 4


def test_a_user_is_told_of_train_rows_in_dev_and_test(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (tiny.parent / "mood-train.tsv").read_text().splitlines(keepends=True)
    dev = tiny.parent / "mood-dev.tsv"
    dev.write_text(dev.read_text() + rows[1] + rows[2].upper())
    assert main(["validate", str(tiny), "tasks.mood.test=mood-dev.tsv"]) == 0
    assert capsys.readouterr().err == (
        "mood dev: 2 of 7 rows are also in train; their scores say little\n"
        "mood test: 2 of 7 rows are also in train; their scores say little\n"
    )
    assert main(["prepare", str(tiny)]) == 0
    assert capsys.readouterr().err == "mood dev: 2 of 7 rows are also in train; their scores say little\n"
