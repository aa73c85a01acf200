"""The parts of a step are what is in the trace, and a run without --profile knows nothing of them.

python -m pytest tests/watch/test_profile.py
"""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from mtl_dist.cli import main
from mtl_dist.watch.profile import MARK, STEP, part, parts
from tests.distributed import on_ranks

TASKS = {f"forward and backward, {task}" for task in ("mood", "same", "near")}


def mark(name: str, ts: float, dur: float) -> dict[str, object]:
    return {"cat": "user_annotation", "name": name, "ts": ts, "dur": dur}


def kernel(correlation: int, started: float, dur: float) -> list[dict[str, object]]:
    """A kernel that runs long after the host has started it."""
    args = {"correlation": correlation}
    return [
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": started, "dur": 1, "args": args},
        {"cat": "kernel", "name": "gemm", "ts": started + 5000, "dur": dur, "args": args},
    ]


def test_a_part_is_without_the_parts_inside_it() -> None:
    events = [
        mark(f"{STEP}3", 0, 10_000),
        mark(f"{MARK}surgery", 1000, 6000),
        mark(f"{MARK}forward", 2000, 3000),
        mark(f"{MARK}optimizer", 8000, 1000),
        mark("somebody else's", 2500, 100),
        *kernel(1, 2500, 700),  # started in the forward pass
        *kernel(2, 5500, 200),  # in surgery, behind it
        *kernel(3, 9500, 50),  # in none
        mark(f"{STEP}4", 10_000, 2000),
    ]
    # In milliseconds, over two steps.
    assert parts(events) == {
        "surgery": (1.5, 0.1),
        "forward": (1.5, 0.35),
        "optimizer": (0.5, 0),
        "other": ((10 - 6 - 1 + 2) / 2, 0.025),
    }


def profiled(config: Path, *arguments: str) -> tuple[int, list[str]]:
    code = main(["train", str(config), "log.tensorboard=false", "gradients.combiner=pcgrad", *arguments])
    return code, sorted(path.name for path in (config.parent / "run" / "profile").glob("*"))


def test_a_run_with_a_profile(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profiled(tiny, "--profile", "2") == (0, ["trace-0.json"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*TASKS, "surgery", "optimizer", "data", "other"))
    events = json.loads((tiny.parent / "run" / "profile" / "trace-0.json").read_text())["traceEvents"]
    steps = [event for event in events if str(event.get("name")).startswith(STEP)]
    assert [step["name"] for step in steps] == [f"{STEP}3", f"{STEP}4"]
    found = parts(events)
    assert found.keys() == TASKS | {"surgery", "optimizer", "data", "other"}
    assert sum(host for host, _ in found.values()) == pytest.approx(sum(step["dur"] for step in steps) / 2000)
    assert all(host >= 0 for host, _ in found.values())


def test_each_rank_writes_its_trace(tiny: Path) -> None:
    assert on_ranks(2, profiled, tiny, "--profile", "1")[1] == (0, ["trace-0.json", "trace-1.json"])


def test_other_runs_do_not_pay_for_it(tiny: Path) -> None:
    with (
        patch("mtl_dist.watch.profile.record_function", side_effect=AssertionError),
        patch("torch.profiler.profile", side_effect=AssertionError),
    ):
        assert profiled(tiny, "steps=3") == (0, [])
        assert profiled(tiny, "steps=4", "--resume", "auto", "--allow-changes") == (0, [])
    assert not torch.autograd.profiler._is_profiler_enabled
    with part("surgery"):
        pass


def test_a_profile_in_a_run_that_goes_on(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profiled(tiny, "steps=4", "--profile", "2") == (0, [])
    assert "profile: the run ended before the 5 steps that it takes" in capsys.readouterr().out
    assert profiled(tiny, "steps=9", "--resume", "auto", "--allow-changes", "--profile", "2") == (0, ["trace-0.json"])
    assert profiled(tiny, "steps=1", "--overwrite") == (0, [])


def test_a_negative_number_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profiled(tiny, "--profile", "-1")[0] == 2
    assert "--profile is -1; give the number of steps to profile" in capsys.readouterr().err


def test_training_goes_on_where_the_trace_cannot_be_written(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with patch("torch.profiler.profile.export_chrome_trace", side_effect=OSError("No space left on device")):
        assert profiled(tiny, "--profile", "2") == (0, [])
    assert "the profile cannot be written (No space left on device); training goes on without it" in caplog.text
