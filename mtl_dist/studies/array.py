"""A study as a job array of SLURM: the list that slurm/array_study.sbatch trains, and what is still in the queue."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Protocol

from mtl_dist.config import UserError, refusing
from mtl_dist.files import rewriting
from mtl_dist.studies.jobs import Job, last_line

SCRIPT = Path("slurm/array_study.sbatch")
SUBMITTED = "arrays.json"  # in DIR/slurm: each array's number, and the names of its runs in their order


class Run(Protocol):
    """What is submitted."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def job(self) -> Job:
        """How it is trained."""


def submit(runs: Sequence[Run], out: Path, at_once: int | None, tell: Callable[[str], object]) -> None:
    """Submits the runs that are not done and not in the queue, and says of those that ended undone how they did."""
    if not SCRIPT.is_file():
        raise UserError(f"--slurm: there is no {SCRIPT} in {Path.cwd()}; call it from the project's folder")
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: there is no sbatch on this machine; call it where jobs are submitted")
    folder = out / "slurm"
    with refusing(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / SUBMITTED
    arrays: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    queued, logs = _queued(), {}
    for number, names in arrays.items():
        for index, name in enumerate(names, start=1):
            logs[name] = folder / f"{number}_{index}.log"
    waiting = {name for number, names in arrays.items() for i, name in enumerate(names, 1) if f"{number}_{i}" in queued}
    left = [run for run in runs if run.name not in waiting]
    for run in left:
        if run.name in logs:
            tell(f"{run.name}: ended before it was done: {last_line(logs[run.name]) or 'no log'} ({logs[run.name]})")
    if waiting := waiting & {run.name for run in runs}:
        tell(f"{len(waiting)} in the queue; the same command gathers what they come to")
    if not left:
        return
    # Not over the list of an array that was submitted by a study which died before it could note that.
    listed = next(path for n in count(1) if not (path := folder / f"list-{n}.txt").exists())
    lines = [shlex.join([str(run.job.config), *run.job.overrides]) for run in left]
    with refusing(f"cannot write {listed}"):
        listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tasks = f"--array=1-{len(left)}" + (f"%{at_once}" if at_once else "")
    number = _tool("sbatch", "--parsable", tasks, f"--output={folder}/%A_%a.log", str(SCRIPT), str(listed)).partition(
        ";"
    )[0]
    arrays[number] = [run.name for run in left]
    with rewriting(file) as draft:
        draft.write_text(json.dumps(arrays, indent=1), encoding="utf-8")
    tell(f"submitted {len(left)} runs as job {number}; the same command gathers what they come to")


def _queued() -> set[str]:
    """The tasks of arrays that wait or run, as <array>_<index>."""
    return set(_tool("squeue", "--me", "--array", "--noheader", "--format=%F_%K").split())


def _tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--slurm: {' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()
