"""Runs as processes of their own: so many at a time, stopped with what they have, and gone when their parent is.

python -m pytest tests/studies/test_run_processes.py
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtl_dist.runs.story import story_of
from mtl_dist.studies.jobs import Job, Jobs, last_line, why_it_ended
from tests.limits import limit

LONG = ("steps=100000", "evaluate.every_steps=100000", "checkpoint.every_steps=100000")


def job(tiny: Path, name: str, *overrides: str) -> Job:
    folder = tiny.parent / name
    return Job(name, tiny, (f"output_dir={folder}", *overrides), tiny.parent / f"{name}.log")


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + limit(120)
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_runs_end_by_themselves_each_in_its_folder(tiny: Path) -> None:
    first, second, wrong = job(tiny, "a", "seed=1"), job(tiny, "b", "seed=2"), job(tiny, "c", "sede=3")
    codes = {}
    with Jobs(2) as jobs:
        jobs.start(first)
        jobs.start(second)
        assert not jobs.has_room
        until(lambda: bool(codes.update({job.name: code for job, code in jobs.ended()})) or len(codes) == 2)
        jobs.start(wrong)
        until(lambda: bool(codes.update({job.name: code for job, code in jobs.ended()})) or len(codes) == 3)
        assert not jobs.under_way
    assert codes == {"a": 0, "b": 0, "c": 2}
    assert last_line(wrong.log) == "override 'sede=3': the top level has no field 'sede'; did you mean 'seed'?"
    stories = [story_of(tiny.parent / name) for name in "ab"]
    assert [story.config.seed for story in stories] == [1, 2]
    assert all(story.ended and story.tokens > 0 and story.best["tasks"] for story in stories)


@pytest.mark.parametrize("way", ["told", "left"])
def test_a_run_that_is_stopped_saves_and_goes_on(tiny: Path, way: str) -> None:
    long = job(tiny, "a", *LONG)
    with Jobs(1) as jobs:
        jobs.start(long)
        until(lambda: "step 4/" in long.log.read_text())
        if way == "told":
            jobs.stop(long)
            until(lambda: [code for _, code in jobs.ended()] == [0])
    story = story_of(tiny.parent / "a")
    assert "SIGTERM: saved after step" in last_line(long.log)
    assert not story.ended
    assert story.of_kind("start")[0]["steps"] == 100_000
    steps = story.records[-1]["step"] + 2
    with Jobs(1) as jobs:
        jobs.start(job(tiny, "a", f"steps={steps}"))
        until(lambda: [code for _, code in jobs.ended()] == [0])
    assert story_of(tiny.parent / "a").ended


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_run_does_not_outlive_who_started_it(tiny: Path) -> None:
    parent = f"""
import time
from pathlib import Path
from mtl_dist.studies.jobs import Job, Jobs
with Jobs(1) as jobs:
    jobs.start(Job("a", Path({str(tiny)!r}), {job(tiny, "a", *LONG).overrides!r}, Path({str(tiny.parent / "a.log")!r})))
    print(jobs.started[0].process.pid, flush=True)
    time.sleep(1000)
"""
    log = tiny.parent / "a.log"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        until(lambda: "step 4/" in log.read_text())
        os.kill(process.pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{child}").exists())
    assert "SIGTERM: saved after step" in last_line(log)


def test_why_a_run_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert why_it_ended(1, log) == "exit code 1"
    log.write_text("x.yaml: wrong\n2026-01-02T03:04:05 job 7_1: ended with exit code 2\n\n")
    assert why_it_ended(2, log) == "x.yaml: wrong"
    assert why_it_ended(-9, log) == "killed by SIGKILL: out of memory?"
    assert why_it_ended(-15, log) == "killed by SIGTERM"
