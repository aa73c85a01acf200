"""A study as documents: study.md for people, study.csv with a line a run, study.json with everything, study.png."""

import csv
import io
import json
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from mtl_dist import __version__
from mtl_dist.doctor import facts
from mtl_dist.files import rewriting
from mtl_dist.metrics import OVERALL
from mtl_dist.studies.picture import draw
from mtl_dist.studies.published import Published
from mtl_dist.studies.statistics import spread
from mtl_dist.studies.table import Outcome, Row, Section, cells_of, changes_of, in_millions, stages_of, system_of

MARKDOWN, CSV, JSON, PICTURE = "study.md", "study.csv", "study.json", "study.png"


@dataclass(frozen=True)
class Study:
    """What a study came to so far."""

    command: list[str]
    scale: float
    overrides: list[str]
    sections: list[Section]
    published: Published
    undone: dict[str, str] = field(default_factory=dict)  # runs, and configs that do not load, and why
    lr_scale: float = 1.0

    @property
    def rows(self) -> list[Row]:
        """All systems."""
        return [row for section in self.sections for row in section.rows]

    @property
    def outcomes(self) -> list[Outcome]:
        """All runs that have ended."""
        return [outcome for row in self.rows for outcome in row.outcomes]


def write(study: Study, folder: Path, with_picture: bool = True) -> None:
    """Writes all documents, each whole or not at all; the picture takes seconds where there are many systems."""
    about = _about(study)
    texts = {
        MARKDOWN: "\n".join(_markdown(study, about)).rstrip() + "\n",
        CSV: _csv(study),
        JSON: json.dumps(_json(study, about), indent=1),
    }
    for name, text in texts.items():
        with rewriting(folder / name) as draft:
            draft.write_text(text, encoding="utf-8")
    if with_picture:
        with rewriting(folder / PICTURE) as draft:
            draw(study.sections, draft)


def _about(study: Study) -> dict[str, str]:
    made_with = sorted({outcome.made_with for outcome in study.outcomes} - {""})
    return {
        "command": shlex.join(study.command),
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "code": version(),
        "written on": machine(),
        "processes of a run": ", ".join(made_with) or "not known",
        "runs done": f"{len(study.outcomes)} of {sum(row.wanted for row in study.rows)}",
        "trained on": f"{in_millions(sum(each.tokens for each in study.outcomes))} million tokens, in "
        f"{sum(each.seconds for each in study.outcomes) / 3600:,.2f} hours without evaluations",
    }


@cache
def machine() -> str:
    """What this process runs on."""
    devices = facts().devices
    gpus = ", ".join(device.name for name, device in devices.items() if name != "cpu") or "no GPU"
    return f"{devices['cpu'].name}, {devices['cpu'].threads} threads; {gpus}"


@cache
def version() -> str:
    """The package's version, and the commit where it is a checkout of its own repository."""
    package = Path(__file__).parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:  # a package that is installed into somebody's checkout is not part of it
        commit = git("describe", "--always", "--dirty") if git("ls-files", "__init__.py") else ""
    except OSError:
        commit = ""
    return f"mtl_dist {__version__}" + (f", commit {commit}" if commit else "")


def _markdown(study: Study, about: Mapping[str, str]) -> Iterator[str]:
    yield "# Study\n"
    yield "```bash"
    yield about["command"]
    yield "```\n"
    yield "| | |"
    yield "|---|---|"
    for name, text in about.items():
        if name != "command":
            yield f"| {name} | {text} |"
    yield ""
    if study.published.reports:
        yield "## What differs from the reports\n"
        yield "| | the reports | here |"
        yield "|---|---|---|"
        for what, theirs, ours in differences(study):
            yield f"| {what} | {theirs} | {ours} |"
        yield ""
    yield from _reading(study)
    for section in study.sections:
        cells = cells_of(section)
        if section.report is not None:
            yield f"## Report {section.name}: {section.report.title}\n"
        elif study.published.reports:
            yield "## Without published numbers\n"
        else:
            yield "## Runs\n"
        yield cells.as_markdown()
        yield ""
        yield from (f"- {note}" for note in cells.notes)
        yield ""
        for row in section.rows:
            if (stages := stages_of(section, row)) is not None:
                yield f"`{row.key}`, scores after each stage:\n"
                yield stages.as_markdown()
                yield ""
        if section.report is None and (changes := changes_of(section.rows)) is not None:
            yield changes.as_markdown()
            yield ""
    yield f"![Scores of all systems: published hollow, ours filled]({PICTURE})\n"
    if study.undone:
        yield "## Not done\n"
        for name, why in study.undone.items():
            yield f"- `{name}`: {why}"
        yield ""


def _reading(study: Study) -> Iterator[str]:
    yield "How to read the tables:\n"
    yield "- Scores are of each run's best model on dev, the mean over seeds ± their standard deviation."
    yield "- **Overall A** is the mean of the tasks with a correlation r as (r+1)/2, **overall B** their plain mean."
    yield (
        "- *Against* is the difference to the reference with its 95 % interval, and p is of a paired t-test over the "
        "seeds that both have; of one seed there is none. The p are not corrected: of twenty systems that differ in "
        "nothing one is below 0.05."
    )
    yield "- *M tokens* is a run's whole budget: millions of tokens trained, each as often as it was read.\n"


def differences(study: Study) -> Iterator[tuple[str, str, str]]:
    """What is not as the reports had it: what, theirs, ours."""
    published = study.published
    encoders = dict.fromkeys(_encoder(row) for row in study.rows)
    yield "encoder", published.encoder or "", ", ".join(encoders)
    for split, theirs in (("train", published.train_rows), ("dev", published.dev_rows)):
        ours: dict[str, list[int]] = {}
        for outcome in study.outcomes:
            counted = outcome.train_rows if split == "train" else outcome.dev_rows
            for task, rows in counted.items():
                ours[task] = sorted({*ours.get(task, []), rows})
        names = {task: published.names.get(task, task) for task in theirs | ours}
        yield (
            f"{split} rows",
            ", ".join(f"{names[task]} {rows:,}" for task, rows in theirs.items() if task in ours or not ours),
            ", ".join(f"{names[task]} {' or '.join(f'{n:,}' for n in rows)}" for task, rows in ours.items()) or "–",
        )
    if study.lr_scale != 1:
        yield "learning rates of stages that train the encoder", "as published", f"{study.lr_scale:g} ×"
    yield "budget: length of every stage", "full", "full" if study.scale == 1 else f"{study.scale:g} of it"
    yield "seeds", "not given", str(max(row.wanted for row in study.rows)) if study.rows else "–"
    for override in study.overrides:
        yield "override", "", f"`{override.replace('|', chr(92) + '|')}`"


def _encoder(row: Row) -> str:
    return row.config.encoder.from_ or "new, of a shape of its own"


def _csv(study: Study) -> str:
    tasks = list(dict.fromkeys(task for row in study.rows for task in row.tasks))
    names = [*tasks, *OVERALL]
    counts = ["tokens", "steps", "best_step", "seconds"]
    header = ["report", "system", "seed", *counts, *names, *(f"published_{name}" for name in names), "folder"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for section in study.sections:
        for row in section.rows:
            published = [row.published.number(name) if row.published else None for name in names]
            for each in row.outcomes:
                ours = [row.by_seed(name).get(each.seed) for name in names]
                numbers = [getattr(each, count) for count in counts]
                writer.writerow([section.name, row.key, each.seed, *numbers, *ours, *published, each.folder])
    return text.getvalue()


def _json(study: Study, about: Mapping[str, str]) -> dict[str, Any]:
    return {
        "about": about,
        "scale": study.scale,
        "lr_scale": study.lr_scale,
        "overrides": study.overrides,
        "differs_from_reports": [list(each) for each in differences(study)] if study.published.reports else [],
        "reports": [as_json(section) for section in study.sections],
        "not_done": study.undone,
    }


def as_json(section: Section) -> dict[str, Any]:
    """A section with all that its table is made of."""
    return {
        "report": section.name,
        "title": section.report.title if section.report else "",
        "score": section.score,
        "reference": section.reference.key if section.reference else None,
        "standard_errors": {task: error for task, (error, _) in section.standard_errors().items()},
        "baselines": {task: row.key for task, row in section.baselines.items()},
        "rows": [_row_as_json(section, row) for row in section.rows],
    }


def _row_as_json(section: Section, row: Row) -> dict[str, Any]:
    def plain(found: Any) -> dict[str, Any] | None:
        return asdict(found) if found is not None else None

    names = [*row.tasks, *(OVERALL if len(row.tasks) > 1 else [])]
    return {
        "system": row.key,
        "wanted": row.wanted,
        "published": row.published.model_dump(exclude_defaults=True) if row.published else None,
        "ours": {name: plain(row.spread(name)) for name in names},
        "difference": plain(section.difference(row)),
        "delta_m": plain(section.gain(row)),
        "tokens": plain(spread([each.tokens for each in row.outcomes])),
        "budget": section.budget(row),
        "config": system_of(row.config),
        "runs": [asdict(each) | {"folder": os.fspath(each.folder)} for each in row.outcomes],
    }


def sections_of(rows: Sequence[Row], published: Published) -> list[Section]:
    """The rows by their reports, in the order of these; and those that nobody published."""
    by_key = {row.key: row for row in rows}
    sections = []
    for name, report in published.reports.items():
        of_report = [by_key.pop(key) for key in report.systems if key in by_key]
        if of_report:
            sections.append(Section(of_report, name, report, published.names))
    return [*sections, *([Section(list(by_key.values()), names=published.names)] if by_key else [])]
