"""Runs of training as processes of their own, some at a time, each with a log beside its run folder.

Whoever ends the process that started them, even by kill -9, ends them too: they save, and can go on.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from mtl_dist.config import refusing

GRACE_S = 120.0  # that a run may take to save and end when it is told to

# Asks the kernel to be told to stop when its parent is gone (PR_SET_PDEATHSIG, which Linux alone has), then becomes the
# run. In the place of a function between fork and exec, which may not be called where there are threads.
_TIED = """
import ctypes, os, signal, sys
tie = getattr(ctypes.CDLL(None), "prctl", None)
if tie:
    tie(1, int(signal.SIGTERM))
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass(frozen=True)
class Job:
    """One run."""

    name: str
    config: Path
    overrides: tuple[str, ...]  # among them its output_dir
    log: Path


@dataclass(frozen=True)
class _Started:
    job: Job
    slot: int
    process: "subprocess.Popen[bytes]"


class Jobs:
    """Starts runs, at most so many at a time; those under way are told to stop when it is left."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.started: list[_Started] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self.started:
            each.process.send_signal(signal.SIGTERM)
        for each in self.started:
            try:
                each.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()

    @property
    def under_way(self) -> list[Job]:
        """The runs that have not ended yet."""
        return [each.job for each in self.started]

    @property
    def has_room(self) -> bool:
        """Whether another run may be started."""
        return len(self.started) < self.at_once

    def start(self, job: Job) -> None:
        """Trains a run from where it stands."""
        assert self.has_room
        slot = min(set(range(self.at_once)) - {each.slot for each in self.started})
        command = ["-m", "mtl_dist", "train", str(job.config), *job.overrides, "--resume", "auto"]
        with refusing(f"cannot write {job.log}"):
            job.log.parent.mkdir(parents=True, exist_ok=True)
            opened = job.log.open("ab")
        with opened as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _TIED, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(slot),
                start_new_session=True,  # Ctrl-C is for the one who started it
            )
        self.started.append(_Started(job, slot, process))

    def _environment(self, slot: int) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {"OMP_NUM_THREADS": str(max(1, cores // self.at_once)), **os.environ}
        if gpus := torch.cuda.device_count():
            names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = names[slot % gpus]
        return environment

    def ended(self) -> Iterator[tuple[Job, int]]:
        """The runs that ended since the last time, and their exit codes."""
        for each in list(self.started):
            if (code := each.process.poll()) is not None:
                self.started.remove(each)
                yield each.job, code

    def stop(self, job: Job) -> None:
        """Tells a run to save and end."""
        for each in self.started:
            if each.job == job:
                each.process.send_signal(signal.SIGTERM)


def last_line(log: Path) -> str:
    """What a run said last: of one that failed, why. What slurm/train.sbatch says behind it is left out."""
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = (line.strip() for line in reversed(lines) if not re.match(r"\S+T\S+ job \S+: ", line))
        return next(filter(None, said), "")
    return ""


def why_it_ended(code: int, log: Path) -> str:
    """Why a run ended undone."""
    if code < 0:
        hint = ": out of memory?" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    return last_line(log) or f"exit code {code}"
