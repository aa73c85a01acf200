"""What a run writes down while it trains: metrics.jsonl and TensorBoard, fed with the same records.

Nobody's training ends because TensorBoard's folder is full: metrics.jsonl alone must be written.
"""

import io
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mtl_dist.config import refusing
from mtl_dist.watch.pictures import surgery_images

log = logging.getLogger(__name__)

METRICS, DRAFT, TENSORBOARD = "metrics.jsonl", "metrics.jsonl.tmp", "tensorboard"  # in the run folder
MOST_TASKS = 24  # whose pairs become scalars: 276 of them, and TensorBoard has a chart for each


@dataclass(frozen=True)
class StepReport:
    """The steps since the last report."""

    step: int  # how many are done
    stage: str
    loss: dict[str, float]  # mean over the examples since the last report
    examples: dict[str, int]  # since the start
    tokens: int  # since the start
    draws: dict[str, int]  # since the start
    lr: dict[str, float]  # of each parameter group
    tokens_per_second: float
    seconds_per_step: float
    data_wait: float  # share of the time in which the model waited for its next batches
    gradient_norm: float  # of the last step, before clipping
    skipped_steps: int  # left out since the start: an overflow in fp16, or a gradient that was no number
    surgery: dict[str, Any] | None = None  # how far the tasks' gradients agreed, on average over the steps
    noise: dict[str, Any] | None = None  # the same of the true gradients, as far as the steps tell

    def as_record(self) -> dict[str, Any]:
        """The report as a record: without the step, and without what is not there."""
        return {name: value for name, value in asdict(self).items() if name != "step" and value is not None}


class Recorder:
    """Writes records to metrics.jsonl and to TensorBoard."""

    def __init__(self, folder: Path, tensorboard: bool, after: int = 0) -> None:
        """`after` is the step that the run goes on from; what was told of later ones is forgotten."""
        self.told = _keep_until(after, folder / METRICS)  # the last record of each kind
        self.file = (folder / METRICS).open("a", encoding="utf-8")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with self._going_on():
                self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=after + 1 if after else None)

    def start(self, step: int, steps: int) -> None:
        """Tells how many steps there will be, unless that was told before."""
        if steps != self.told.get("start", {}).get("steps") and (steps > step or not step):
            self.note(step, "start", {"steps": steps})

    def end(self, step: int, tokens: int) -> None:
        """Tells that the run came to its end, unless that was told before."""
        if step != self.told.get("end", {}).get("step"):
            self.note(step, "end", {"tokens": tokens})

    def note(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One line of JSON."""
        with refusing(f"cannot write {self.file.name}"):
            self.file.write(json.dumps(_finite({"kind": kind, "step": step, "time": time.time(), **values})) + "\n")
            self.file.flush()

    def record(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """The same, and what changes in it becomes a scalar as well, named by its path, conflicts an image."""
        self.note(step, kind, values)
        if self.writer is None:
            return
        images: dict[str, Image.Image] = {}
        if surgery := values.get("surgery"):
            images = surgery_images(list(values["draws"]), surgery)
            values = {**values, "surgery": _plotted(surgery, pairs=len(values["draws"]) <= MOST_TASKS)}
        if (noise := values.get("noise")) and len(values["draws"]) > MOST_TASKS:
            values = {**values, "noise": {"scale": noise["scale"]}}
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


def _keep_until(step: int, metrics: Path) -> dict[str, Any]:
    """Drops the records of later steps, and a last line that was cut off; the last record of each kind that is left."""
    if not metrics.exists():
        return {}
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept: list[str] = []
    told: dict[str, Any] = {}
    for line in lines:
        record = _record_in(line) if line.endswith("\n") else None
        if record is not None and record["step"] <= step:
            kept.append(line)
            told[record["kind"]] = record
    draft = metrics.with_name(DRAFT)
    draft.unlink(missing_ok=True)
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(metrics)
    return told


def _record_in(line: str) -> dict[str, Any] | None:
    """The record in a line, if it is one."""
    try:
        record = json.loads(line)
        return {**record, "kind": str(record["kind"]), "step": float(record["step"])}
    except (ValueError, TypeError, KeyError):
        log.warning("metrics.jsonl: a line that cannot be read is left out: %.40s", line.strip())
        return None


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
