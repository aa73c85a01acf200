"""Checkpoints that survive anything: a folder appears whole or not at all, and nothing in it is ever unpickled.

runs/mine/checkpoints/step-00000120/
    state.json           what the run is, and how far: stage, step, scores, what the combiner remembers
    tensors.safetensors  weights and moments, whole and in fp32: any engine goes on with them, on any number of ranks
    sha256sums           of both, which `sha256sum -c` reads as well
"""

import fcntl
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from pydantic import Field, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtl_dist import files
from mtl_dist.config import Config, UserError, refusing
from mtl_dist.files import SUMS, drafts, replacing, write_sums

FORMAT = 1
STATE, TENSORS = "state.json", "tensors.safetensors"
COVERED = (STATE, TENSORS)  # by the list of hashes beside them
CHECKPOINTS, LOCK = "checkpoints", ".mtl_dist.lock"  # in the run folder


class CheckpointConfig(Config):
    """When a run is saved so that it can go on, besides its end and whenever it is told to stop."""

    every_steps: PositiveInt | None = None  # by default after each evaluation
    keep: PositiveInt = 2  # the last ones
    async_: bool = Field(True, alias="async")  # training goes on while the files are written


@dataclass(frozen=True)
class Snapshot:
    """A run at the end of a step, copied out of it."""

    done: int  # steps
    state: str  # JSON, because training goes on to change what it was made of
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, done: int, about: Mapping[str, Any], state: Mapping[str, Any], tensors: dict[str, Tensor]) -> Self:
        """A snapshot of what JSON can hold, with what the run is: config, data, ranks."""
        return cls(done, json.dumps({"format": FORMAT, "done": done, "about": about, **state}), tensors)


def write(folder: Path, snapshot: Snapshot) -> None:
    """Puts a checkpoint into the folder of all, or nothing."""
    path = folder / f"step-{snapshot.done:08d}"
    refuse_infinite(f"step {snapshot.done}: not saved", snapshot.tensors.items())
    with replacing(path) as unfinished:
        save_file(snapshot.tensors, unfinished / TENSORS)
        (unfinished / STATE).write_text(snapshot.state, encoding="utf-8")
        write_sums(unfinished, COVERED)


def refuse_infinite(what: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Keeps weights from being saved that training has lost."""
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise UserError(f"{what}: {name} is infinite or NaN; lower optim.lr")


def all_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the last one first; whole or not."""
    if not folder.is_dir():
        return []
    with refusing(f"cannot read {folder}"):
        found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """After how many steps a checkpoint was saved."""
    return int(path.name.removeprefix("step-"))


def faults(path: Path) -> list[str]:
    """What is wrong with a checkpoint; nothing, if it is whole."""
    if wrong := files.faults(path, COVERED):
        return wrong
    try:
        version = json.loads((path / STATE).read_bytes())["format"]
    except (ValueError, KeyError, TypeError):
        return [f"{STATE} is not one of mtl_dist"]
    if version != FORMAT:
        return [f"is of format {version}, this is format {FORMAT}: use the mtl_dist that wrote it"]
    return []


class Checkpoint:
    """A checkpoint in which no `faults` were found, opened."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.sums = (path / SUMS).read_bytes()
        self.state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        self.about: dict[str, Any] = self.state["about"]
        self.step: int = self.state["done"]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """The tensors of a kind, such as `weights`, by their names without it."""
        try:
            if (self.path / SUMS).read_bytes() != self.sums:
                raise UserError(f"{self.path} holds something else here than on rank 0; all nodes must see one folder")
            with safe_open(self.path / TENSORS, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(f"{kind}/")]  # noqa: SIM118 - it is no mapping
                return {name.removeprefix(f"{kind}/"): file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path}: cannot be read: {error}") from error


def opened(path: Path) -> Checkpoint:
    """The checkpoint at a path, if it is whole."""
    if wrong := faults(path):
        raise UserError(f"{path}: {wrong[0]}")
    return Checkpoint(path)


def last_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The last checkpoint that is whole, and what is wrong with those after it."""
    warnings: list[str] = []
    for path in all_in(folder):
        if not (wrong := faults(path)):
            return Checkpoint(path), warnings
        warnings.append(f"{path.name}: {wrong[0]}")
    return None, warnings


class RunLock:
    """Keeps a second job out of a run folder; the system lets go of it when a process ends, however that comes."""

    def __init__(self) -> None:
        self.file: TextIO | None = None

    def take(self, folder: Path, patience_s: float, tell: Callable[[str], object], said_by: str = "output_dir") -> None:
        """Takes the run folder, or says who has it; over a network a dead machine's lock lasts a while."""
        path = folder / LOCK
        with refusing(f"{said_by}: cannot write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")
        deadline, waited = time.monotonic() + patience_s, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                if time.monotonic() < deadline:
                    if not waited:
                        tell(f"{holder} is training in {folder}; waiting for it for {patience_s:.0f} s")
                    waited = True
                    time.sleep(1)
                    continue
                file.close()
                raise UserError(f"{said_by}: {holder} is training in {folder}; choose another folder") from None
            except OSError as error:  # a file system that knows no locks
                tell(f"{path}: {error.strerror}; nothing keeps a second job out of this folder")
                break
        self.file = file
        with refusing(f"{said_by}: cannot write {path}"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def is_in_use(folder: Path) -> bool:
    """Whether a job has a run folder."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no job has been there, or the file system knows no locks
        return False
    return False


class Writer:
    """Writes snapshots, in the background if it is told so: at most one at a time."""

    def __init__(self, folder: Path, keep: int, background: bool, tell: Callable[[str], object]) -> None:
        self.folder = folder
        self.keep = keep
        self.background = background
        self.tell = tell
        self.failed: str | None = None  # why the last one could not be written
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[list[str]] | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Takes a snapshot, after the one before is written."""
        self.finish()
        self.pending = self.thread.submit(self._write, snapshot)
        if not self.background:
            self.finish()

    def finish(self) -> None:
        """Waits until all is written, and tells what went wrong."""
        pending, self.pending = self.pending, None
        if pending is not None:
            try:
                self.failed = None
                problems = pending.result()
            except UserError as error:
                self.failed = str(error)
                problems = [self.failed]
            for problem in problems:
                self.tell(problem)

    def _write(self, snapshot: Snapshot) -> list[str]:
        write(self.folder, snapshot)
        return self._rotate()

    def _rotate(self) -> list[str]:
        """Removes all but the last ones; a disk that refuses is no reason to stop."""
        problems = []
        left = [path for draft in drafts("step-*") for path in self.folder.glob(draft)]
        for path in [*all_in(self.folder)[self.keep :], *left]:
            try:
                shutil.rmtree(path)
            except OSError as error:
                problems.append(f"cannot remove {path}: {error.strerror or error}")
        return problems

    def close(self) -> None:
        """Waits for the thread, whatever has happened: the folder must not change when another job has it."""
        self.thread.shutdown()
