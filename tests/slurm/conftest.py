"""A real SLURM cluster of two nodes for the tests of this folder.

It comes up once and goes down with the last test, whatever became of it. Where there can be none (not root, not Debian,
no way to install SLURM, a container without privileges) the tests are skipped.
"""

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import MINISLURM, tool

IMPOSSIBLE = 3  # minislurm's exit code where there can be no cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("a SLURM cluster of this machine alone needs root")
    with (Path(tempfile.gettempdir()) / "mtl_dist-slurm-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test runs on this machine wait
        up = subprocess.run([*MINISLURM, "up"], capture_output=True, text=True)
        if up.returncode == IMPOSSIBLE:
            pytest.skip(up.stderr.strip())
        assert up.returncode == 0, up.stderr
        try:
            yield
        finally:
            subprocess.run([*MINISLURM, "down"], check=True)


@pytest.fixture(autouse=True)
def idle(cluster: None) -> Iterator[None]:
    """Leaves no job behind."""
    yield
    tool("scancel", "--user=root")
