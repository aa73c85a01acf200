"""Finished runs side by side: the table of a study, and the keys in which their configs differ."""

import os
from collections.abc import Sequence
from pathlib import Path

from mtl_dist.config import CONFIG_FILE, UserError
from mtl_dist.runs.story import story_of
from mtl_dist.studies.table import Outcome, Row, Section, outcome_of, system_of


def compared(paths: Sequence[Path]) -> tuple[Section | None, list[str]]:
    """The runs in these folders, those that differ in their seeds alone as one row; and what is wrong with others."""
    rows: list[tuple[object, Row]] = []
    problems = []
    for path in dict.fromkeys(run for folder in paths for run in _runs_in(folder)):
        try:
            story = story_of(path)
            if not story.ended:
                last = story.records[-1]["step"] if story.records else 0
                raise UserError(f"{path}: the run has not ended, after step {last:,}; go on with it, then compare")
        except UserError as error:
            problems.append(str(error))
            continue
        system, outcome = system_of(story.config), outcome_of(story)
        same = next((row for other, row in rows if other == system), None)
        if same is None:
            rows.append((system, Row(str(path), story.config, [outcome], 1)))
        elif outcome.seed in {each.seed for each in same.outcomes}:
            problems.append(f"{path}: the same config and seed as {_folder(same, outcome)}; left out")
        else:
            same.outcomes.append(outcome)
    names = _names([row for _, row in rows])
    named = [Row(name, row.config, row.outcomes, len(row.outcomes)) for name, (_, row) in zip(names, rows, strict=True)]
    return (Section(named) if named else None), problems


def _runs_in(path: Path) -> list[Path]:
    """The run folder itself, or those of a study."""
    if (path / CONFIG_FILE).is_file():
        return [path]
    return sorted(found.parent for found in path.glob(f"runs/*/*/{CONFIG_FILE}")) or [path]


def _folder(row: Row, outcome: Outcome) -> Path:
    return next(each.folder for each in row.outcomes if each.seed == outcome.seed)


def _names(rows: Sequence[Row]) -> list[str]:
    """Each row's folder, without what all of them begin with; of several runs the folder that they are in."""
    paths = [Path(os.path.commonpath([each.folder.absolute() for each in row.outcomes])) for row in rows]
    if len(set(paths)) < len(paths):  # runs of several systems side by side
        paths = [row.outcomes[0].folder.absolute() for row in rows]
    return [os.path.relpath(path, os.path.commonpath([path.parent for path in paths])) for path in paths]
