"""What a person sees while a run trains: on a terminal a table of the tasks over a bar, elsewhere a line a report.

Only one rank shows anything, and nobody's training ends because its screen is gone.
"""

import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, Any, Self, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mtl_dist.metrics import OVERALL
from mtl_dist.watch.recorder import StepReport

log = logging.getLogger(__name__)


class Lasting:
    """A stream that goes on as if nothing had happened when it can no longer be written: a full disk, a reader gone."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._going_on():
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._going_on():
            self.stream.flush()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is still in the stream's buffer must go somewhere, or Python fails at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            log.warning("the screen cannot be written (%s); training goes on without it", error.strerror)


def make_console(enabled: bool, stderr: bool = False, lasting: bool = True) -> Console:
    """A rank's console; all but one are silent. Where no terminal sets a width it is wide enough for our tables.

    Unless it is `lasting`, an error of writing to it is the caller's.
    """
    stream = sys.stderr if stderr else sys.stdout
    file = cast(IO[str], Lasting(stream)) if lasting and stream is not None else stream
    console = Console(file=file, quiet=not enabled)
    return console if console.is_terminal else Console(file=file, quiet=not enabled, width=140)


class Drawn(ABC):
    """What is drawn anew in its place while it is entered: on a terminal, and nowhere else."""

    def __init__(self, console: Console, transient: bool = False) -> None:
        self.console = console
        self.live = None
        if console.is_terminal:
            self.live = Live(self, console=console, auto_refresh=False, transient=transient)

    @abstractmethod
    def __rich__(self) -> Group:
        """How it looks now."""

    def __enter__(self) -> Self:
        if self.live:
            self.live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()


class Screen(Drawn):
    """Shows reports on a console."""

    def __init__(self, tasks: list[str], total_steps: int, console: Console) -> None:
        super().__init__(console)
        self.total_steps = total_steps
        self.report: StepReport | None = None
        self.dev = dict.fromkeys(tasks, "")
        self.bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[speed]}"),
            console=console,
        )
        self.bar_id = self.bar.add_task("", total=total_steps, speed="starting")

    def __rich__(self) -> Group:
        table = plain_table("task", "loss", "draws", "examples", "dev", texts=["task"])
        for task in self.dev:
            table.add_row(task, *self._cells(task), self.dev[task])
        return Group(table, self.bar)

    def _cells(self, task: str) -> list[str]:
        if self.report is None:
            return ["", "", ""]
        loss, all_draws = self.report.loss.get(task), sum(self.report.draws.values())
        return [
            "" if loss is None else f"{loss:.4f}",
            f"{self.report.draws[task] / all_draws:.1%}" if all_draws else "",  # every step so far was left out
            f"{self.report.examples[task]:,}",
        ]

    def steps(self, report: StepReport) -> None:
        """Shows how far training is."""
        self.report = report
        remaining = timedelta(seconds=round(report.seconds_per_step * (self.total_steps - report.step)))
        speed = f"{report.tokens_per_second:,.0f} tokens/s  {remaining} left"
        if self.live:
            self.bar.update(self.bar_id, completed=report.step, speed=speed)
            self.live.refresh()
        else:
            losses = "  ".join(f"{task} {loss:.4f}" for task, loss in report.loss.items())
            self.line(f"step {report.step}/{self.total_steps}  {losses}  {speed}")

    def scores(self, step: int, main: Mapping[str, tuple[str, float | None]], scores: Mapping[str, Any]) -> None:
        """Shows each task's main metric on its dev set, and the overall scores."""
        for task, (metric, value) in main.items():
            self.dev[task] = f"{metric} {shown_score(value)}"
        if self.live:
            self.live.refresh()
        else:
            parts = [f"{task} {text}" for task, text in self.dev.items() if text]
            parts += [f"{name} {scores[name]:.4f}" for name in OVERALL if name in scores]
            self.line(f"step {step}/{self.total_steps}  dev: {'  '.join(parts)}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def shown_score(value: float | None) -> str:
    """A score, or a number of rows, as people read it; a correlation with constant predictions has none."""
    if isinstance(value, int):
        return f"{value:,}"
    return "undefined" if value is None else f"{value:.4f}"


def plain_table(*columns: str, texts: Collection[str]) -> Table:
    """A table without lines, whose columns are numbers but for `texts`."""
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in texts else "right", min_width=4 if column == "task" else 0)
    return table


def score_table(scores: Mapping[str, Any], main: Mapping[str, str]) -> Table:
    """The scores of every task, its main metric first."""
    table = plain_table("task", "rows", "metric", "score", "others", texts=("task", "metric", "others"))
    for task, values in scores["tasks"].items():
        numbers = {name: value for name, value in values.items() if name not in ("rows", "confusion")}
        best = numbers.pop(main[task])
        others = ", ".join(f"{name} {shown_score(value)}" for name, value in numbers.items())
        table.add_row(task, f"{values['rows']:,}", main[task], shown_score(best), others)
    for name, mean in OVERALL.items():
        if name in scores:
            table.add_row(name, "", mean, f"{scores[name]:.4f}", "")
    return table


def stage_table(after_stage: Mapping[str, Mapping[str, Any]], main: Mapping[str, str]) -> Table:
    """Every task's main metric after each stage: what a stage taught, and what it made the model forget."""
    tasks = list(next(iter(after_stage.values()))["tasks"])
    table = plain_table("after stage", *(f"{task} {main[task]}" for task in tasks), *OVERALL, texts=["after stage"])
    for stage, scores in after_stage.items():
        values = [scores["tasks"][task][main[task]] for task in tasks] + [scores.get(name) for name in OVERALL]
        table.add_row(stage, *map(shown_score, values))
    return table


@contextmanager
def counting(console: Console, label: str) -> Iterator[Any]:
    """A spinner that counts rows while they are prepared; yields what to call with how many more there are."""
    columns: tuple[ProgressColumn, ...] = (
        SpinnerColumn(),
        TextColumn(label + "  {task.completed:,.0f} rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)
        yield lambda rows: progress.advance(bar, rows)
