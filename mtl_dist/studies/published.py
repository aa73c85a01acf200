"""What others published of the systems that configs stand for: `published.yaml` beside them, for studies to show."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, model_validator

from mtl_dist.config import Config, UserError, load

PUBLISHED = "published.yaml"

Overall = Literal["overall_a", "overall_b"]


class System(Config):
    """One row of a report, by the name of its config without `.yaml`."""

    where: str  # in the report
    scores: dict[str, FiniteFloat] = Field({})  # of each task, on dev
    overall_a: FiniteFloat | None = None
    overall_b: FiniteFloat | None = None
    printed: dict[str, str] = Field({})  # how the report has it where that is no plain number: a range, about so much
    # Of a training in stages: every task's score after each. `scores` are then those after a task's own stage.
    after_stage: dict[str, dict[str, FiniteFloat]] = Field({})
    says: str | None = None  # what else it has to say of the numbers

    def number(self, name: str) -> float | None:
        """The score of a task, or overall_a or overall_b."""
        overall = {"overall_a": self.overall_a, "overall_b": self.overall_b}
        return overall[name] if name in overall else self.scores.get(name)

    def shown(self, name: str) -> str:
        """The same as people read it; nothing where nothing was published."""
        number = self.number(name)
        return self.printed.get(name, "" if number is None else f"{number:.3f}")


class Report(Config):
    """Systems that were compared with each other."""

    title: str
    score: Overall  # which they are compared by
    reference: str  # the system that the others are compared to
    systems: dict[str, System] = Field(min_length=1)

    @model_validator(mode="after")
    def _reference_is_there(self) -> "Report":
        if self.reference not in self.systems:
            raise ValueError(f"the reference '{self.reference}' is none of its systems")
        return self


class Published(Config):
    """All reports of a folder of configs, and what their numbers come from."""

    encoder: str | None = None
    train_rows: dict[str, NonNegativeInt] = Field({})
    dev_rows: dict[str, NonNegativeInt] = Field({})
    names: dict[str, str] = Field({})  # of tasks, for people
    reports: dict[str, Report] = Field({})

    def headline(self, key: str) -> str:
        """The line on a system's scores for the header of its config."""
        system = next(report.systems[key] for report in self.reports.values() if key in report.systems)
        parts = {"overall A": "overall_a", "overall B": "overall_b"}
        parts |= {self.names.get(task, task): task for task in system.scores}
        shown = [f"{name} {system.shown(part)}" for name, part in parts.items() if system.shown(part)]
        return f"# published (dev): {', '.join(shown) or system.says}"


def published_beside(configs: Iterable[Path]) -> Published:
    """What was published of these configs; nothing where nobody says so."""
    folders = dict.fromkeys(path.parent for path in configs)
    found = [load(Published, folder / PUBLISHED) for folder in folders if (folder / PUBLISHED).is_file()]
    if len(found) > 1:
        raise UserError(f"two folders have a {PUBLISHED}: {', '.join(map(str, folders))}; study one at a time")
    return found[0] if found else Published()
