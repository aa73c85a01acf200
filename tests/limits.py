"""Limits end what hangs, and nothing else: they grow with how slow the machine is.

    subprocess.run(command, timeout=limit(60))

A limit is told in seconds of a machine with two idle cores, and generous there.
"""

import subprocess
import sys
import time
from functools import cache

IDLE_S = 0.2  # what the measure takes there


@cache
def slowness() -> float:
    """How many times as long as there two processes take here, as this session began; at least 1."""
    start = time.perf_counter()
    counting = [sys.executable, "-I", "-S", "-c", "for _ in range(5_000_000): pass"]
    processes = [subprocess.Popen(counting) for _ in range(2)]
    assert not any(process.wait() for process in processes)
    return max(1.0, (time.perf_counter() - start) / IDLE_S)


def limit(seconds: float) -> float:
    return seconds * slowness()
