"""What a run folder tells of its run, finished or not: its config, metrics.jsonl, the scores of its best model."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mtl_dist.config import CONFIG_FILE, UserError, load
from mtl_dist.experiment import Experiment
from mtl_dist.training.scores import Scores, deciding_score
from mtl_dist.watch.recorder import METRICS

Record = dict[str, Any]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Story:
    """What a run's folder tells of it."""

    folder: Path
    config: Experiment
    records: list[Record]

    @property
    def ended(self) -> bool:
        """Whether the run came to its end; one that was stopped can go on."""
        return bool(self.records) and self.records[-1]["kind"] == "end"

    @property
    def tokens(self) -> int:
        """What it was trained on so far, every token as often as it was read."""
        return next((record["tokens"] for record in reversed(self.records) if "tokens" in record), 0)

    @cached_property
    def dev(self) -> list[Record]:
        """The scores on dev; without those of other tasks, which a run may have had before it was resumed."""
        found = self.of_kind("dev")
        return [record for record in found if record["tasks"].keys() == found[-1]["tasks"].keys()]

    @property
    def best(self) -> Scores:
        """The scores of the model that was kept, and the step it is from; nothing before the first evaluation."""
        return max(self.dev, key=lambda record: deciding_score(self.config, record), default={})

    def of_kind(self, kind: str) -> list[Record]:
        """The records of one kind, such as train or dev."""
        return [record for record in self.records if record["kind"] == kind]


def config_of(folder: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment that a run's folder is of; refuses a folder that is none."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: {'no run is in this folder' if folder.is_dir() else 'no such folder'}")
    return load(Experiment, folder / CONFIG_FILE, overrides)


def story_of(folder: Path) -> Story:
    """What a run's folder tells; refuses a folder that is none."""
    return Story(folder, config_of(folder), list(records_of(folder)))


def records_of(folder: Path) -> Iterator[Record]:
    """The lines of metrics.jsonl so far."""
    try:
        text = (folder / METRICS).read_bytes()
    except FileNotFoundError:
        return
    yield from parsed(text)


class Reader:
    """Reads the records of a run that is under way, as they come."""

    def __init__(self, folder: Path) -> None:
        self.file, self.inode, self.place = folder / METRICS, -1, 0

    def read(self) -> tuple[list[Record], bool]:
        """The records since the last time; and whether they begin anew, as those of a run do that goes on."""
        try:
            with self.file.open("rb") as file:
                status = os.fstat(file.fileno())
                anew = status.st_ino != self.inode or status.st_size < self.place
                if anew:
                    self.inode, self.place = status.st_ino, 0
                file.seek(self.place)
                text = file.read()
        except OSError:
            return [], False
        whole = text[: text.rfind(b"\n") + 1]
        self.place += len(whole)
        return list(parsed(whole)), anew


def parsed(lines: bytes) -> Iterator[Record]:
    """The records in some lines; without one that is still being written, or that a crash has damaged."""
    for line in lines.splitlines(keepends=True):
        with suppress(ValueError):
            record = json.loads(line) if line.endswith(b"\n") else None
            if isinstance(record, dict) and {"kind", "step"} <= record.keys():
                yield record
