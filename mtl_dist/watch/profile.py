"""Where the time of a step goes: a few steps under torch's profiler, as a table and as a trace that Perfetto opens.

with Profile(5, folder, rank, console) as profile: ... with part("optimizer"): ... profile.step() after each step ...
"""

import json
import logging
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, record_function, schedule

from mtl_dist.watch.screen import plain_table

log = logging.getLogger(__name__)

T = TypeVar("T")

TRACES = "profile"  # their folder, in the run folder
WARM_UP = 3  # steps before those that are profiled
MARK = "mtl_dist: "  # before the names of our parts in a trace
STEP = "ProfilerStep#"  # before torch's own names of steps
OTHER = "other"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def part(name: str) -> AbstractContextManager[Any]:
    """Marks what happens inside as a part of the step, where the step is profiled."""
    return record_function(MARK + name) if profiler._is_profiler_enabled else nullcontext()


def drawn(items: Iterable[T]) -> Iterator[T]:
    """The same items; the time until each is there is a part of the step."""
    iterator = iter(items)
    end = object()
    while True:
        with part("data"):
            item: Any = next(iterator, end)
        if item is end:
            return
        yield item


class Profile:
    """Profiles so many steps, after some that warm up; with 0 nothing at all."""

    def __init__(self, steps: int, folder: Path, rank: int, console: Console) -> None:
        self.path = folder / TRACES / f"trace-{rank}.json"
        self.console = console
        self.steps, self.done = steps, 0
        self.profiler: torch.profiler.profile | None = None
        if steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            phases = schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
            self.profiler = torch.profiler.profile(activities=activities, schedule=phases, on_trace_ready=self._write)

    def __enter__(self) -> Self:
        if self.profiler is not None:
            self.profiler.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.profiler is not None:
            if self.done < WARM_UP + self.steps:
                self.profiler.on_trace_ready = None  # its last step is none
                self.console.print(f"profile: the run ended before the {WARM_UP + self.steps} steps that it takes")
            self.profiler.__exit__(*exception)  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Says that a step is done."""
        self.done += 1
        if self.profiler is not None:
            self.profiler.step()

    def _write(self, profiler: torch.profiler.profile) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:
            log.warning("the profile cannot be written (%s); training goes on without it", error)
            return
        if not self.console.quiet:
            self.console.print(table(json.loads(self.path.read_text(encoding="utf-8"))["traceEvents"]))
            self.console.print(f"trace: {self.path}, for ui.perfetto.dev; profiled steps take longer than others")


def parts(events: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Milliseconds of a step, on the host and on the device, in each part but for the parts inside it.

    What runs on the device belongs to the part in which the host started it, on whatever thread.
    """
    marks = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith((MARK, STEP))]
    # Outer ones first, so that a time's innermost part is the last one that covers it.
    marks.sort(key=lambda e: (e["ts"], -e["dur"]))
    starts = [e["ts"] for e in marks]

    def name(mark: dict[str, Any]) -> str:
        return OTHER if mark["name"].startswith(STEP) else mark["name"].removeprefix(MARK)

    def innermost(time: float, before: int) -> str | None:
        covering = (e for e in reversed(marks[:before]) if time < e["ts"] + e["dur"])
        return next((name(e) for e in covering), None)

    host: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    for place, mark in enumerate(marks):
        host[name(mark)] += mark["dur"]
        if (around := innermost(mark["ts"], place)) is not None:
            host[around] -= mark["dur"]
    started = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")}
    for event in events:
        if event.get("cat") in ON_DEVICE and (time := started.get(event["args"]["correlation"])) is not None:
            device[innermost(time, bisect_right(starts, time)) or OTHER] += event["dur"]
    steps = 1000 * sum(mark["name"].startswith(STEP) for mark in marks)
    return {name: (host[name] / steps, device[name] / steps) for name in host}


def table(events: list[dict[str, Any]]) -> Table:
    """What a step consists of, the longest part first."""
    found = parts(events)
    total = sum(host for host, _ in found.values())
    rows = plain_table("part of a step", "host ms", "share", "device ms", texts=["part of a step"])
    for name, (host, device) in sorted(found.items(), key=lambda item: -item[1][0]):
        rows.add_row(name, f"{host:.2f}", f"{host / total:.1%}", f"{device:.2f}" if device else "")
    rows.add_row("step", f"{total:.2f}", "", f"{sum(device for _, device in found.values()):.2f}")
    return rows
