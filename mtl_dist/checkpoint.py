"""Checkpoints that survive anything: a folder appears whole or not at all, and nothing in it is ever unpickled.

runs/mine/checkpoints/step-00000120/
    manifest.json        the format's version, SHA-256 and size of the other files, and what the run was
    state.json           how far the run is: stage, step, scores, what the combiner remembers
    tensors.safetensors  weights and moments, whole and in fp32: any engine goes on with them, on any number of ranks
"""

import fcntl
import json
import os
import platform
import re
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from pydantic import Field, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtl_dist.config import Config, UserError, refusing, sha256_of

FORMAT = 1
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
CHECKPOINTS, LOCK = "checkpoints", ".lock"  # in the run folder


class CheckpointConfig(Config):
    """When a run is saved so that it can go on, besides its end and whenever it is told to stop."""

    every_steps: PositiveInt | None = None  # by default after each evaluation
    keep: PositiveInt = 2  # the last ones
    async_: bool = Field(True, alias="async")  # training goes on while the files are written


@dataclass(frozen=True)
class Snapshot:
    """A run at the end of a step, copied out of it."""

    step: int
    state: dict[str, Any]  # what JSON can hold
    tensors: dict[str, Tensor]
    about: dict[str, Any]  # what the run is: config, data, ranks; for people, and to compare with


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Puts a checkpoint into the folder of all, or nothing."""
    path = folder / f"step-{snapshot.step:08d}"
    if path.exists():  # the same step of the same run
        return path
    unfinished = path.with_name(path.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        save_file(snapshot.tensors, unfinished / TENSORS)
        (unfinished / STATE).write_text(json.dumps(snapshot.state), encoding="utf-8")
        files = {name: {"sha256": sha256_of(unfinished / name), "bytes": _size(unfinished / name)} for name in COVERED}
        manifest = {"format": FORMAT, "step": snapshot.step, "files": files, **snapshot.about}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for name in (*COVERED, MANIFEST, "."):
            _sync(unfinished / name)
        unfinished.rename(path)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the checkpoint {path}: {reason}") from error
    return path


COVERED = (TENSORS, STATE)


def _size(path: Path) -> int:
    return path.stat().st_size


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def all_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the last one first; whole or not."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def faults(path: Path) -> list[str]:
    """What is wrong with a checkpoint; nothing, if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
        if version != FORMAT:
            return [f"is of format {version}, this is format {FORMAT}: use the mtl_dist that wrote it"]
        if sorted(files) != sorted(COVERED):
            return [f"{MANIFEST} names other files than {', '.join(COVERED)}"]
        found = []
        for name, promised in files.items():
            file = path / name
            if file.is_symlink() or not file.is_file():
                found.append(f"{name} is missing")
            elif (size := _size(file)) != promised["bytes"]:
                found.append(f"{name} has {size:,} bytes in the place of {promised['bytes']:,}")
            elif sha256_of(file) != promised["sha256"]:
                found.append(f"{name} is damaged: its SHA-256 is another")
        strangers = {file.name for file in path.iterdir()} - {MANIFEST, *COVERED}
        return found + [f"{name} is not in {MANIFEST}" for name in sorted(strangers)]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read: {type(error).__name__}"]


class Checkpoint:
    """A checkpoint in which no `faults` were found, opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        self.state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        self.step: int = self.about["step"]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """The tensors of a kind, such as `weights`, by their names without it."""
        with safe_open(self.path / TENSORS, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{kind}/")]  # noqa: SIM118 - it is no mapping
            return {name.removeprefix(f"{kind}/"): file.get_tensor(name) for name in names}


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

    def take(self, folder: Path, patience_s: float = 0) -> None:
        """Takes the run folder, or says who has it; over a network a dead machine's lock lasts a while."""
        with refusing(f"output_dir: cannot write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("a+", encoding="utf-8")
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(1)
                    continue
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise UserError(f"output_dir: {holder} is training in {folder}; choose another folder") from None
            except OSError:  # a file system that knows no locks
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        self.file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


class Writer:
    """Writes snapshots, in the background if it is told so: at most one at a time."""

    def __init__(self, folder: Path, keep: int, background: bool) -> None:
        self.folder = folder
        self.keep = keep
        self.background = background
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[list[str]] | None = None

    def write(self, snapshot: Snapshot) -> list[str]:
        """Takes a snapshot, after the one before is written; what went wrong since then."""
        problems = self.finish()
        self.pending = self.thread.submit(self._write, snapshot)
        return problems if self.background else problems + self.finish()

    def finish(self) -> list[str]:
        """Waits until all is written."""
        pending, self.pending = self.pending, None
        return [] if pending is None else pending.result()

    def _write(self, snapshot: Snapshot) -> list[str]:
        try:
            write(self.folder, snapshot)
        except UserError as error:
            return [str(error)]
        return self._rotate()

    def _rotate(self) -> list[str]:
        """Removes all but the last ones; a disk that refuses is no reason to stop."""
        problems = []
        for path in [*all_in(self.folder)[self.keep :], *self.folder.glob("*.tmp")]:
            try:
                shutil.rmtree(path)
            except OSError as error:
                problems.append(f"cannot remove {path}: {error.strerror or error}")
        return problems
