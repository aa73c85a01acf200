"""The table of systems that were trained: what studies and comparisons share.

stories of runs -> outcomes -> rows (a system with all its seeds) -> sections (compared with each other) -> cells

A section never mixes overall A with overall B, compares overall scores of the same tasks only, and says where rows were
trained on unequal numbers of tokens.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mtl_dist.checkpoint import CHECKPOINTS, STATE, all_in
from mtl_dist.experiment import Experiment
from mtl_dist.metrics import OVERALL
from mtl_dist.runs.story import Story
from mtl_dist.studies.published import Report, System
from mtl_dist.studies.statistics import Difference, Spread, paired, spread, standard_error
from mtl_dist.watch.screen import plain_table

NOTHING_YET = "–"
EQUAL_BUDGETS = 1.1  # up to which ratio of their tokens two budgets pass for the same
NO_PART_OF_A_SYSTEM = ("output_dir", "cache_dir", "seed", "checkpoint", "log", "distributed")


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to, on dev."""

    folder: Path
    seed: int
    steps: int
    best_step: int
    tokens: int  # trained on, each as often as it was read
    seconds: float  # of training; evaluations are left out
    scores: dict[str, float | None]  # each task's main metric, and both overall scores, of the best model
    own_stage: dict[str, float | None]  # each task's main metric after the last stage that trained it
    after_stage: dict[str, dict[str, float | None]]
    dev_rows: dict[str, int]
    train_rows: dict[str, int]  # nothing where the checkpoints, which tell them, are gone
    made_with: str  # engine, precision, processes; likewise


def outcome_of(story: Story) -> Outcome:
    """What a run that has ended came to."""
    config, best = story.config, story.best
    dev = {record["stage"]: record for record in story.dev}
    after_stage = {stage: _main(config, record) for stage, record in dev.items()}
    own: dict[str, float | None] = {}
    for stage in config.all_stages():
        of_stage = after_stage.get(stage.name, {})
        own |= {task: of_stage[task] for task in stage.tasks if task in of_stage}
    trained = story.of_kind("train")
    steps = [0, *(record["step"] for record in trained)]
    seconds = sum(
        record["seconds_per_step"] * (step - before)
        for record, (before, step) in zip(trained, pairwise(steps), strict=True)
    )
    overall = {name: best[name] for name in OVERALL if name in best}
    about = _about(story.folder)
    return Outcome(
        folder=story.folder,
        seed=config.seed,
        steps=story.records[-1]["step"],
        best_step=best.get("step", 0),
        tokens=story.tokens,
        seconds=seconds,
        scores=_main(config, best) | overall,
        own_stage=own,
        after_stage=after_stage,
        dev_rows={task: values["rows"] for task, values in best.get("tasks", {}).items()},
        train_rows={task: counted["rows"] for task, counted in about.get("rows", {}).items()},
        made_with=_made_with(about) if about else "",
    )


def _main(config: Experiment, scores: Mapping[str, Any]) -> dict[str, float | None]:
    found = scores.get("tasks", {}).items()
    return {task: values[config.tasks[task].metric] for task, values in found if task in config.tasks}


def _made_with(about: Mapping[str, Any]) -> str:
    ranks = f" of {about['ranks']}" if about["ranks"] > 1 else ""
    return f"{about['engine']}{ranks} in {about['precision']}"


def _about(folder: Path) -> dict[str, Any]:
    """What the last checkpoint says of its run."""
    for path in all_in(folder / CHECKPOINTS):
        with suppress(OSError, ValueError, KeyError):
            about: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))["about"]
            return about
    return {}


@dataclass(frozen=True)
class Row:
    """A system: a config with any seed, and the runs of it that have ended."""

    key: str
    config: Experiment
    outcomes: list[Outcome]
    wanted: int  # runs
    published: System | None = None

    @property
    def tasks(self) -> list[str]:
        """What it is scored on."""
        return [name for name, task in self.config.tasks.items() if task.dev is not None]

    def is_comparable(self, other: "Row", name: str) -> bool:
        """Whether a score means the same for both: the same metric of as many rows; in the mean, of the same tasks."""
        if name in OVERALL:
            return sorted(self.tasks) == sorted(other.tasks) and all(
                self.is_comparable(other, task) for task in self.tasks
            )
        metrics = {row.config.tasks[name].metric if name in row.tasks else None for row in (self, other)}
        return len(metrics) == 1 and self.dev_rows.get(name) == other.dev_rows.get(name)

    def by_seed(self, name: str) -> dict[int, float]:
        """A task's main metric, or an overall score, of each run; a correlation that is undefined counts as 0."""
        if name in OVERALL and len(self.tasks) == 1:  # that would be the task's own once more, or half of it
            return {}
        if self.published is not None and self.published.after_stage and name in self.tasks:
            found = {each.seed: each.own_stage.get(name) for each in self.outcomes}
        else:
            found = {each.seed: each.scores[name] for each in self.outcomes if name in each.scores}
        return {seed: score or 0.0 for seed, score in found.items()}

    def spread(self, name: str) -> Spread | None:
        """The same, over the seeds."""
        return spread(list(self.by_seed(name).values()))

    @property
    def tokens(self) -> float | None:
        """What a run of it was trained on."""
        found = spread([each.tokens for each in self.outcomes])
        return found.mean if found else None

    @property
    def dev_rows(self) -> dict[str, int]:
        """What it was scored on."""
        return self.outcomes[0].dev_rows if self.outcomes else {}


@dataclass(frozen=True)
class Gain:
    """Delta m of a system (Maninis et al. 2019): the mean relative gain of its tasks over each of them alone."""

    value: float
    tasks: list[str]  # that have a baseline to be compared to


@dataclass(frozen=True)
class Section:
    """Systems that are compared with each other."""

    rows: list[Row]
    name: str = ""
    report: Report | None = None
    names: Mapping[str, str] = field(default_factory=dict)  # of tasks, for people

    @cached_property
    def tasks(self) -> list[str]:
        """Of all rows."""
        return list(dict.fromkeys(task for row in self.rows for task in row.tasks))

    @cached_property
    def score(self) -> str:
        """What the systems are compared by: a task, or one of the overall scores, which are means of several."""
        if self.report:
            return self.report.score
        row = self.rows[0]
        best_by = row.config.evaluate.best_by
        return row.tasks[0] if best_by in OVERALL and len(row.tasks) == 1 else best_by

    @cached_property
    def reference(self) -> Row | None:
        """What the others are compared to: the one that the report names, else the first one."""
        if self.report is None:
            return self.rows[0]
        return next((row for row in self.rows if row.key == self.report.reference), None)

    def shown(self, name: str) -> str:
        """A task's name, or an overall score's, for people."""
        return self.names.get(name, {"overall_a": "overall A", "overall_b": "overall B"}.get(name, name))

    def difference(self, row: Row) -> Difference | None:
        """How much better than the reference, where the two can be compared, over the seeds that both have."""
        reference = self.reference
        if reference is None or row is reference:
            return None
        if not row.is_comparable(reference, self.score):
            return None
        ours, theirs = row.by_seed(self.score), reference.by_seed(self.score)
        both = sorted(ours.keys() & theirs.keys())
        return paired([ours[seed] for seed in both], [theirs[seed] for seed in both])

    @cached_property
    def baselines(self) -> dict[str, Row]:
        """Of each task the system that trains it alone; of several the best."""
        found: dict[str, tuple[float, Row]] = {}
        for row in self.rows:
            task = next(iter(row.config.tasks))
            alone = row.spread(task)
            if len(row.config.tasks) == 1 and alone is not None and (task not in found or alone.mean > found[task][0]):
                found[task] = (alone.mean, row)
        return {task: row for task, (_, row) in found.items()}

    def gain(self, row: Row) -> Gain | None:
        """Delta m of a system with several tasks, over those that have a baseline scored on as many rows."""
        gains = {}
        for task in row.tasks if len(row.config.tasks) > 1 else []:
            baseline, ours = self.baselines.get(task), row.spread(task)
            if baseline is None or ours is None or not row.is_comparable(baseline, task):
                continue
            alone = baseline.spread(task)
            if alone is not None and alone.mean > 0:  # there is no share of nothing
                gains[task] = (ours.mean - alone.mean) / alone.mean
        return Gain(sum(gains.values()) / len(gains), list(gains)) if gains else None

    def budget(self, row: Row) -> float | None:
        """How many times the reference's tokens a system was trained on."""
        theirs = self.reference.tokens if self.reference else None
        return row.tokens / theirs if row.tokens is not None and theirs else None

    def standard_errors(self) -> dict[str, tuple[float, int]]:
        """Of each task the standard error of one score, from the size of its dev set, and that size."""
        found = {}
        for task in self.tasks:
            scored = [row for row in self.rows if task in row.dev_rows]
            rows = [row for row in scored if row.is_comparable(scored[0], task)]
            if rows:
                metric, size = rows[0].config.tasks[task].metric, rows[0].dev_rows[task]
                mean = spread([score for row in rows for score in row.by_seed(task).values()])
                error = standard_error(metric, mean.mean, size) if mean else None
                if error is not None:
                    found[task] = (error, size)
        return found


@dataclass(frozen=True)
class Cells:
    """A section as people read it."""

    header: list[str]
    rows: list[list[str]]
    texts: int  # so many columns on the left hold text, the others numbers
    notes: list[str]

    def as_table(self) -> Table:
        """For a terminal."""
        table = plain_table(*self.header, texts=self.header[: self.texts])
        for column in table.columns:
            column.overflow = "fold"  # half a number is another one
        table.columns[0].no_wrap = True
        for row in self.rows:
            table.add_row(*map(Text, row))  # as they are: brackets are no markup
        return table

    def as_markdown(self) -> str:
        """For a document."""
        rule = ["---"] * self.texts + ["---:"] * (len(self.header) - self.texts)
        lines = [self.header, rule, *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def cells_of(section: Section) -> Cells:
    """A section, column by column: published beside ours wherever something was published."""
    rows, of_report = section.rows, section.report is not None
    several = any(len(row.tasks) > 1 for row in rows)
    gains = bool(section.baselines) and several
    columns: list[tuple[str, Callable[[Row], str]]] = [("system", lambda row: row.key)]
    if of_report:
        columns += [("where", lambda row: row.published.where if row.published else "")]
    texts = len(columns)
    if any(row.wanted > 1 for row in rows):
        columns += [("seeds", _seeds)]
    for name in [*section.tasks, *(OVERALL if several else [])]:
        shown = section.shown(name)
        if any(row.published and row.published.shown(name) for row in rows):
            columns += [(f"{shown}, published", partial(_published, name))]
        columns += [(f"{shown}, ours" if of_report else shown, partial(_ours, name))]
    if section.reference is not None and len(rows) > 1:
        columns += [(f"{section.shown(section.score)} against reference", partial(_against, section))]
        columns += [("p", partial(_p, section))]
    if gains:
        columns += [("Δm", partial(_gain, section))]
    columns += [("M tokens", partial(_tokens, section)), ("best step", _best_step)]
    lines = [[cell(row) for _, cell in columns] for row in rows]
    return Cells([header for header, _ in columns], lines, texts, list(_notes(section, gains)))


def _seeds(row: Row) -> str:
    done = len(row.outcomes)
    return f"{done} of {row.wanted}" if done < row.wanted else f"{done}"


def _published(name: str, row: Row) -> str:
    return row.published.shown(name) if row.published else ""


def _ours(name: str, row: Row) -> str:
    has_it = name in row.tasks or (name in OVERALL and len(row.tasks) > 1)
    return shown_spread(row.spread(name)) if has_it else ""


def shown_spread(found: Spread | None) -> str:
    """Mean ± standard deviation."""
    if found is None:
        return NOTHING_YET
    return f"{found.mean:.3f}" + (f" ± {found.sd:.3f}" if found.sd is not None else "")


def _against(section: Section, row: Row) -> str:
    if row is section.reference:
        return "reference"
    found = section.difference(row)
    if found is None:
        return "" if row.outcomes else NOTHING_YET
    interval = f" [{found.interval[0]:+z.3f}, {found.interval[1]:+z.3f}]" if found.interval else ""
    return f"{found.mean:+z.3f}{interval}"


def _p(section: Section, row: Row) -> str:
    found = section.difference(row)
    if found is None or found.p is None:
        return "" if found is None else NOTHING_YET
    return "< 0.001" if found.p < 0.001 else f"{found.p:.3f}"


def _gain(section: Section, row: Row) -> str:
    if len(row.config.tasks) == 1:
        return "baseline" if row in section.baselines.values() else "one task"
    found = section.gain(row)
    if found is None:
        return NOTHING_YET
    of = f" ({len(found.tasks)} of {len(row.tasks)})" if len(found.tasks) < len(row.tasks) else ""
    return f"{found.value:+z.1%}{of}"


def _tokens(section: Section, row: Row) -> str:
    if row.tokens is None:
        return NOTHING_YET
    ratio = section.budget(row)
    unequal = ratio is not None and not 1 / EQUAL_BUDGETS <= ratio <= EQUAL_BUDGETS
    return in_millions(row.tokens) + (f" ({ratio:.2g} ×)" if unequal else "")


def in_millions(tokens: float) -> str:
    """A budget as people read it, however small."""
    return f"{tokens / 1e6:,.1f}" if tokens >= 1e7 else f"{tokens / 1e6:.3g}"


def _best_step(row: Row) -> str:
    if not row.outcomes:
        return NOTHING_YET
    best = sorted({each.best_step for each in row.outcomes})
    return f"{best[0]:,}" + (f" to {best[-1]:,}" if len(best) > 1 else "") + f" of {row.outcomes[0].steps:,}"


def _notes(section: Section, gains: bool) -> Iterator[str]:
    if errors := section.standard_errors():
        shown = ", ".join(
            f"{section.shown(task)} {error:.3f} ({rows:,} rows)" for task, (error, rows) in errors.items()
        )
        yield f"Standard error of one score, from the size of the dev set alone: {shown}."
    ratios = [section.budget(row) for row in section.rows]
    if any(ratio is not None and not 1 / EQUAL_BUDGETS <= ratio <= EQUAL_BUDGETS for ratio in ratios):
        yield "Rows with × were trained on so many times the reference's tokens: they differ in their budgets as well."
    if outcomes := [each for row in section.rows for each in row.outcomes]:
        total = in_millions(sum(each.tokens for each in outcomes))
        yield f"Budget of all {len(outcomes)} runs together: {total} million tokens."
    if gains:
        named = ", ".join(f"{row.key} ({section.shown(task)})" for task, row in section.baselines.items())
        yield f"Δm is the mean relative gain of the tasks (of so many of them) over each trained alone: {named}."
    for row in section.rows:
        if row.published and row.published.after_stage:
            yield f"{row.key}: each task's score is that after its own stage, the overall scores are of the best model."
        if row.published and row.published.says:
            yield f"{row.key}: {row.published.says}."
        undefined = [each.folder for each in row.outcomes if None in each.scores.values()]
        if undefined:
            yield f"{row.key}: a correlation is undefined in {len(undefined)} of the runs, and counts as 0."


def stages_of(section: Section, row: Row) -> Cells | None:
    """Every task's score after every stage of a system that trains in stages, published beside ours."""
    stages = list(row.outcomes[0].after_stage) if row.outcomes else []
    published = row.published.after_stage if row.published else {}
    if len(stages) < 2 and not published:
        return None
    header, lines = ["after stage"], []
    for task in row.tasks:
        shown = section.shown(task)
        header += [f"{shown}, published", f"{shown}, ours"] if published else [shown]
    for stage in stages or published:
        line = [stage]
        for task in row.tasks:
            if published:
                number = published.get(stage, {}).get(task)
                line.append("" if number is None else f"{number:.3f}")
            scored = [each.after_stage[stage] for each in row.outcomes if task in each.after_stage.get(stage, {})]
            line.append(shown_spread(spread([scores[task] or 0.0 for scores in scored])))
        lines.append(line)
    return Cells(header, lines, 1, [])


def system_of(config: Experiment) -> dict[str, Any]:
    """What a system is: its config without what only one run has."""
    fields = config.model_dump(mode="json", by_alias=True)
    return {key: value for key, value in fields.items() if key not in NO_PART_OF_A_SYSTEM}


def differing(values: Sequence[Any], prefix: str = "") -> dict[str, list[Any]]:
    """The keys in which configs differ, each with the value that every one of them has; None where it has none."""
    if all(value == values[0] for value in values):
        return {}
    mappings = [value for value in values if isinstance(value, Mapping)]
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) == len(values) and len({len(value) for value in lists}) == 1:
        return _inside([dict(enumerate(value)) for value in lists], prefix)
    if not prefix or len(mappings) == len(values):
        return _inside(mappings, prefix)
    if len(mappings) + sum(value is None for value in values) == len(values) and len(mappings) > 1:
        there = {prefix.removesuffix("."): ["there" if isinstance(value, Mapping) else None for value in values]}
        return there | {
            key: [found.pop(0) if isinstance(value, Mapping) else None for value in values]
            for key, found in _inside(mappings, prefix).items()
        }
    return {prefix.removesuffix("."): list(values)}


def _inside(mappings: Sequence[Mapping[Any, Any]], prefix: str) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    found: dict[str, list[Any]] = {}
    for key in keys:
        found |= differing([mapping.get(key) for mapping in mappings], f"{prefix}{key}.")
    return found


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-27:]}"


def changes_of(rows: Sequence[Row]) -> Cells | None:
    """In which keys the configs of rows differ, and which rows have which value."""
    found = differing([system_of(row.config) for row in rows])
    if not found:
        return None
    lines = []
    for key, values in found.items():
        by_value: dict[str, list[str]] = {}
        for row, value in zip(rows, values, strict=True):
            text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
            by_value.setdefault(text, []).append(row.key)
        for value, keys in by_value.items():
            lines.append([key, _cut(value) or NOTHING_YET, ", ".join(keys)])
            key = ""  # said once
    return Cells(["key in which they differ", "value", "systems"], lines, 3, [])
