"""What a run folder tells of its run, finished or not: its config, metrics.jsonl, the scores of its best model."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_dist.config import CONFIG_FILE, UserError, load
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import BEST, saved_scores
from mtl_dist.training.scores import Scores
from mtl_dist.watch.recorder import METRICS

Record = dict[str, Any]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Story:
    """What a run's folder tells of it."""

    folder: Path
    config: Experiment
    records: list[Record]
    best: Scores  # of the model that is kept, and the step it is from; nothing before the first evaluation

    @property
    def ended(self) -> bool:
        """Whether the run came to its end; one that was stopped can go on."""
        return bool(self.records) and self.records[-1]["kind"] == "end"

    @property
    def tokens(self) -> int:
        """What it was trained on so far, every token as often as it was read."""
        return next((record["tokens"] for record in reversed(self.records) if "tokens" in record), 0)

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
    return Story(folder, config_of(folder), list(records_of(folder)), saved_scores(folder / BEST) or {})


def records_of(folder: Path) -> Iterator[Record]:
    """The lines of metrics.jsonl so far; a last one that is still being written is left out."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return
    for line in lines:
        if line.endswith("\n"):
            yield json.loads(line)
