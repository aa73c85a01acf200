"""What a run tells while it trains: the screen, metrics.jsonl and TensorBoard, all fed with the same records.

On a terminal the screen is a table of the tasks over a bar; elsewhere every report is a line. Only one rank reports.
Nobody's training ends because its screen is gone or TensorBoard's folder full: metrics.jsonl alone must be written.
"""

import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mtl_dist.config import refusing
from mtl_dist.metrics import OVERALL

log = logging.getLogger(__name__)

METRICS, DRAFT, TENSORBOARD = "metrics.jsonl", "metrics.jsonl.tmp", "tensorboard"  # in the run folder
MOST_TASKS = 24  # whose pairs become scalars: 276 of them, and TensorBoard has a chart for each

# Of heatmaps, in pixels but for the number of cells. Shape suffixes: R = rows, C = columns.
LARGEST = 1600  # an image
LINE, MARGIN = 15, 10
BAR = 200  # the scale's length
MOST_PAIRS = 80  # columns
WRITTEN = 512  # up to so many cells show their numbers
COLOURS = [(178, 24, 43), (239, 138, 98), (255, 255, 255), (103, 169, 207), (33, 102, 172)]  # from -1 to 1
BLACK, NOTHING, LINES, WHITE = (0, 0, 0), (200, 200, 200), (230, 230, 230), (255, 255, 255)


@dataclass(frozen=True)
class StepReport:
    """The steps since the last report."""

    step: int  # how many are done
    stage: str
    loss: dict[str, float]  # mean over the examples since the last report
    examples: dict[str, int]  # since the start
    draws: dict[str, int]  # since the start
    lr: dict[str, float]  # of each parameter group
    tokens_per_second: float
    seconds_per_step: float
    data_wait: float  # share of the time in which the model waited for its next batches
    gradient_norm: float  # of the last step, before clipping
    skipped_steps: int  # left out since the start: an overflow in fp16, or a gradient that was no number
    surgery: dict[str, Any] | None = None  # how far the tasks' gradients agreed, on average over the steps

    def as_record(self) -> dict[str, Any]:
        """The report as a record: without the step, and without what is not there."""
        return {name: value for name, value in asdict(self).items() if name != "step" and value is not None}


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


class Recorder:
    """Writes records to metrics.jsonl and to TensorBoard."""

    def __init__(self, folder: Path, tensorboard: bool, after: int = 0) -> None:
        """`after` is the step that the run goes on from; what was told of later ones is forgotten."""
        _keep_until(after, folder / METRICS)
        self.file = (folder / METRICS).open("a", encoding="utf-8")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with self._going_on():
                self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=after + 1 if after else None)

    def record(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One line of JSON; what changes in it also becomes a scalar, named by its path, conflicts an image."""
        with refusing(f"cannot write {self.file.name}"):
            self.file.write(json.dumps(_finite({"kind": kind, "step": step, "time": time.time(), **values})) + "\n")
            self.file.flush()
        if self.writer is None:
            return
        images: dict[str, Image.Image] = {}
        if surgery := values.get("surgery"):
            images = surgery_images(list(values["draws"]), surgery)
            values = {**values, "surgery": _plotted(surgery, pairs=len(values["draws"]) <= MOST_TASKS)}
        with self._going_on():
            for name, image in images.items():
                self._image(f"{kind}/surgery/{name}", image, step)
            for name, value in _scalars(kind, values):
                self.writer.add_scalar(name, value, step)

    def _image(self, tag: str, image: Image.Image, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        # Not add_image, which makes three channels of the palette's one: four times the bytes and the time.
        png = io.BytesIO()
        image.save(png, "PNG")
        encoded = Summary.Image(height=image.height, width=image.width, encoded_image_string=png.getvalue())
        assert self.writer is not None and self.writer.file_writer is not None
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=encoded)]), step)

    def text(self, tag: str, text: str) -> None:
        """A text for TensorBoard's text page."""
        if self.writer is not None:
            with self._going_on():
                self.writer.add_text(tag, "    " + text.replace("\n", "\n    "))  # indented: a code block in Markdown

    def close(self) -> None:
        """Writes out what is still in memory."""
        self.file.close()
        if self.writer is not None:
            with self._going_on():
                self.writer.close()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Does without TensorBoard from the first time that it fails."""
        try:
            yield
        except Exception as error:  # its file systems have errors of their own
            self.writer = None
            log.warning("TensorBoard's files cannot be written (%s); training goes on without them", error)


def _keep_until(step: int, metrics: Path) -> None:
    """Drops the records of later steps, and a last line that was cut off."""
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    draft = metrics.with_name(DRAFT)
    draft.unlink(missing_ok=True)
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(metrics)


def _step_of(line: str) -> float:
    """The step that a record tells of; a line that is none belongs to no step of a run."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        log.warning("metrics.jsonl: a line that cannot be read is left out: %.40s", line.strip())
        return math.inf


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON has no words for."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(prefix if name == "tasks" else f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and name != "rows":
            yield f"{prefix}/{name}", value


def _plotted(surgery: Mapping[str, Any], pairs: bool) -> dict[str, Any]:
    """What of it becomes scalars: of a layer what is one number, and of `pairs` the cosines."""
    plotted = {name: value for name, value in surgery.items() if pairs or name != "cosine"}
    if "layers" in surgery:
        plotted["layers"] = {
            layer: {name: value for name, value in found.items() if not isinstance(value, Mapping)}
            for layer, found in surgery["layers"].items()
        }
    return plotted


class Screen:
    """Shows reports on a console."""

    def __init__(self, tasks: list[str], total_steps: int, console: Console) -> None:
        self.console = console
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
        self.live = Live(self, console=console, auto_refresh=False) if console.is_terminal else None

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
            f"{self.report.draws[task] / all_draws:.1%}",
            f"{self.report.examples[task]:,}",
        ]

    def __enter__(self) -> "Screen":
        if self.live:
            self.live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

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
    """A score as people read it; a correlation with constant predictions has none."""
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


def surgery_images(tasks: list[str], surgery: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Which tasks conflict, and in which layers, where these were told apart; nothing where no step had two tasks."""
    if not surgery["cosine"]:
        return {}
    tasks = [task for task in tasks if task in surgery["norm"]]
    pairs = [".".join(sorted(pair)) for pair in combinations(tasks, 2)]

    def matrix(cosine: Mapping[str, float]) -> NDArray[np.float64]:
        cosine_KK = np.full((len(tasks), len(tasks)), np.nan)
        above = np.triu_indices(len(tasks), 1)
        cosine_KK[above] = cosine_KK.T[above] = [cosine.get(pair, np.nan) for pair in pairs]
        return cosine_KK

    what = "cosine of the tasks' gradients"
    images = {"cosine": heatmap(what, tasks, tasks, matrix(surgery["cosine"]), _cosine)}
    if layers := surgery.get("layers"):
        pairs_found = [pair for pair in pairs if pair in surgery["cosine"]]
        if len(pairs_found) <= MOST_PAIRS:
            cosine_RC = np.array([[layer["cosine"][pair] for pair in pairs_found] for layer in layers.values()])
            images["layers"] = heatmap(f"{what}, by layer", list(layers), pairs_found, cosine_RC, _cosine)
        else:
            cosine_RCK = np.stack([matrix(layer["cosine"]) for layer in layers.values()])
            known_RC = np.isfinite(cosine_RCK).sum(-1)
            share_RC = np.where(known_RC, (cosine_RCK < 0).sum(-1) / known_RC.clip(1), np.nan)
            title = "share of a task's pairs that conflict, by layer"
            images["layers"] = heatmap(title, list(layers), tasks, 0.5 - share_RC, _share_of_conflicts)
    return images


def _cosine(value: float, scale: float) -> str:
    return f"{value:.{min(max(1 - math.floor(math.log10(scale)), 2), 9)}f}"


def _share_of_conflicts(agreement: float, _: float) -> str:
    return f"{0.5 - agreement:.0%}"


def heatmap(
    title: str,
    rows: list[str],
    columns: list[str],
    agreement_RC: NDArray[np.float64],
    shown: Callable[[float, float], str],
) -> Image.Image:
    """A table of colours: red below zero, blue above, as strong as a number is against the largest; grey for NaN.

    `shown` writes a number, given the largest. Numbers stand in the cells where these are few.
    """
    font = _font()
    scale = float(np.nanmax(np.abs(agreement_RC))) or 1.0
    low, high = f"conflict  {shown(-scale, scale)}", f"{shown(scale, scale)}  agreement"
    row_names, column_names = ([_shortened(name) for name in names] for names in (rows, columns))

    def widest(*texts: str) -> int:
        return math.ceil(max(map(font.getlength, texts)))

    left = widest(*row_names) + 2 * MARGIN
    number_width = max(4 * LINE, widest(shown(-scale, scale)) + MARGIN)
    written = agreement_RC.size <= WRITTEN and left + len(columns) * number_width <= LARGEST
    upright = not written or widest(*column_names) > number_width - MARGIN  # the columns' names
    above = widest(*column_names) + MARGIN if upright else 2 * LINE
    top = 5 * LINE + above
    width, height = (number_width, 2 * LINE) if written else (LINE, LINE)
    width = max(1, min(width, (LARGEST - left - MARGIN) // len(columns)))
    height = max(1, min(height, (LARGEST - top - MARGIN) // len(rows)))
    bar = 2 * MARGIN + widest(low)
    right = max(left + width * len(columns), bar + BAR + MARGIN + widest(high), MARGIN + widest(title))

    image = Image.new("RGB", (right + MARGIN, top + height * len(rows) + MARGIN), WHITE)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, LINE), title, BLACK, font, "lm")
    draw.text((MARGIN, 3 * LINE), low, BLACK, font, "lm")
    image.paste(Image.fromarray(_colours(np.linspace(-1, 1, BAR))[None].repeat(LINE, 0)), (bar, 3 * LINE - LINE // 2))
    draw.text((bar + BAR + MARGIN, 3 * LINE), high, BLACK, font, "lm")

    cells = _colours(agreement_RC / scale).repeat(height, 0).repeat(width, 1)
    if min(width, height) >= LINE // 2:
        cells[height - 1 :: height] = cells[:, width - 1 :: width] = LINES
    image.paste(Image.fromarray(cells), (left, top))
    middle_R, middle_C = (np.arange(len(rows)) + 0.5) * height, (np.arange(len(columns)) + 0.5) * width
    for r in range(0, len(rows), math.ceil(LINE / height)):  # as many names as have room
        draw.text((left - MARGIN // 2, top + middle_R[r]), row_names[r], BLACK, font, "rm")
    if upright:
        names = Image.new("RGB", (above, width * len(columns)), WHITE)
        draw_names = ImageDraw.Draw(names)
        for c in range(0, len(columns), math.ceil(LINE / width)):
            draw_names.text((MARGIN // 2, middle_C[c]), column_names[c], BLACK, font, "lm")
        image.paste(names.rotate(90, expand=True), (left, top - above))
    else:
        for x, name in zip(middle_C, column_names, strict=True):
            draw.text((left + x, top - LINE), name, BLACK, font, "mm")
    if written:
        for r, c in np.argwhere(np.isfinite(agreement_RC)):
            value = agreement_RC[r, c]
            ink = WHITE if abs(value) > 0.6 * scale else BLACK
            draw.text((left + middle_C[c], top + middle_R[r]), shown(value, scale), ink, font, "mm")
    return image.quantize(palette=_palette(), dither=Image.Dither.NONE)


@cache
def _palette() -> Image.Image:
    """The colours of a heatmap, with those between them and black that letters have at their edges."""
    shades = _colours(np.linspace(-1, 1, 75))
    greys = np.arange(0, 250, 9)[:, None].repeat(3, 1)
    colours = np.concatenate([shades, shades // 3 * 2, shades // 3, greys, [NOTHING, LINES]])
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours.astype(np.uint8).tobytes())
    return palette


@cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(12)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _shortened(name: str) -> str:
    parts = name.split(".")
    return ".".join(part if len(part) <= 30 else f"{part[:27]}..." for part in parts)


def _colours(shade: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The colours of numbers from -1 to 1."""
    stops = np.linspace(-1, 1, len(COLOURS))
    channels = [np.interp(shade, stops, channel) for channel in zip(*COLOURS, strict=True)]
    colours = np.stack(channels, -1)
    colours[np.isnan(shade)] = NOTHING
    return colours.round().astype(np.uint8)
