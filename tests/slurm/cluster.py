"""What the tests do with the SLURM cluster of two nodes: submit jobs and watch them, make nodes die."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.limits import limit

ROOT = Path(__file__).parents[2]
HOME = Path("/run/mtl_dist-tests")
MINISLURM = [sys.executable, str(Path(__file__).with_name("minislurm")), "--dir", str(HOME)]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@dataclass(frozen=True)
class Job:
    """A job that was submitted, or one task of an array."""

    number: str
    log_file: Path

    @property
    def facts(self) -> dict[str, str]:
        """What SLURM knows of it: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", tool("scontrol", "show", "job", "-o", self.number)))

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def wait_until(self, what: str, holds: Callable[[], bool], limit_s: float = 200) -> None:
        end = time.monotonic() + limit(limit_s)
        while not holds():
            assert time.monotonic() < end, f"not {what} after {limit(limit_s):.0f} s: {self.facts}\n{self.log[-4000:]}"
            time.sleep(0.1)

    def end(self) -> dict[str, str]:
        """Waits for the end; what SLURM then knows of it."""
        self.wait_until("at its end", lambda: self.facts["JobState"] in ENDED)
        return self.facts

    def must_complete(self, restarts: int = 0) -> None:
        facts = self.end()
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", str(restarts)), self.log[-4000:]


def submit(
    log: Path,
    *command: str,
    script: str = "train",
    nodes: int = 2,
    gpus: int = 0,
    last: Sequence[str] = (),
    **variables: str,
) -> Job:
    """Submits slurm/SCRIPT.sbatch as a user would, from the project's folder; options of sbatch begin with --.

    `last` is what may begin so all the same.
    """
    environment = of_a_user(**variables)
    options = [f"--nodes={nodes}", f"--gpus-per-node={gpus}", f"--output={log}"]
    options += [word for word in command if word.startswith("--")]
    rest = [word for word in command if not word.startswith("--")]
    number = tool("sbatch", "--parsable", *options, f"slurm/{script}.sbatch", *rest, *last, environment=environment)
    return Job(number.strip(), log)


def of_a_user(**variables: str) -> dict[str, str]:
    """The environment of a user who submits."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    return environment | {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}", **variables}


def preempt() -> None:
    """Submits a short job that must have both nodes at once."""
    tool("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def cut(node: str) -> None:
    """The node dies without a last word."""
    subprocess.run([*MINISLURM, "cut", node], check=True)


def mend(node: str) -> None:
    """The node comes back."""
    subprocess.run([*MINISLURM, "mend", node], check=True)


def tool(*command: str, environment: dict[str, str] | None = None) -> str:
    """What a command of SLURM prints; run from the project's folder."""
    environment = (environment or dict(os.environ)) | {"SLURM_CONF": str(HOME / "etc/slurm.conf")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def records(run: Path) -> list[dict[str, Any]]:
    """The reports of a run so far; the last line may be half written."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_done(run: Path) -> int:
    """The last step that a run has reported."""
    return max((record["step"] for record in records(run)), default=0)
