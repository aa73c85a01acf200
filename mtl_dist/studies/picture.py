"""A study as one picture: a row of panels for each report, a panel for each task and for the score it compares by.

Hollow is what was published, filled is ours with a bar from the lowest seed to the highest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_dist.metrics import OVERALL
from mtl_dist.studies.table import Section
from mtl_dist.watch.charts import COLOURS, INK, new_chart, save_chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TASKS = 6  # with a panel of their own; of more there is the overall score alone
OURS, PUBLISHED = COLOURS[0], COLOURS[3]


def draw(sections: Sequence[Section], path: Path) -> None:
    """Writes the picture."""
    drawn = [_panels(section) for section in sections]
    columns = max(map(len, drawn))
    heights = [0.24 * len(section.rows) + 0.9 for section in sections]
    longest = max(len(row.key) for section in sections for row in section.rows)
    figure, axes = new_chart(
        2.6 * columns + 0.085 * longest,
        sum(heights) + 0.4,
        rows=len(sections),
        columns=columns,
        gridspec_kw={"height_ratios": heights},
    )
    limits = {name: _limits(sections, name) for names in drawn for name in names}
    for place, (section, names) in enumerate(zip(sections, drawn, strict=True)):
        of_section = axes[place * columns : (place + 1) * columns]
        for name, ax in zip(names, of_section, strict=False):
            _panel(ax, section, name, labelled=name == names[0])
            ax.set_xlim(*limits[name])  # the same in all reports, so that they can be compared by eye
        for ax in of_section[len(names) :]:
            ax.set_visible(False)
    if any(row.published for section in sections for row in section.rows):
        hollow, filled = (
            axes[0].plot([], [], "o", color=colour, markerfacecolor=face, markersize=5)[0]
            for colour, face in ((PUBLISHED, "none"), (OURS, OURS))
        )
        figure.legend(
            [hollow, filled],
            ["published", "ours, lowest to highest seed"],
            loc="outside upper right",
            ncols=2,
            frameon=False,
            fontsize=9,
        )
    save_chart(figure, path)


def _panels(section: Section) -> list[str]:
    tasks = section.tasks if len(section.tasks) <= MOST_TASKS else []
    several = any(len(row.tasks) > 1 for row in section.rows)
    overall = section.score if section.score in OVERALL else "overall_a"
    return [*tasks, *([overall] if several or not tasks else [])]


def _limits(sections: Sequence[Section], name: str) -> tuple[float, float]:
    rows = [row for section in sections if name in _panels(section) for row in section.rows]
    ours = [score for row in rows for score in row.by_seed(name).values()]
    theirs = [number for row in rows if row.published and (number := row.published.number(name)) is not None]
    low, high = min([*ours, *theirs], default=0.0), max([*ours, *theirs], default=1.0)
    margin = max(0.05 * (high - low), 0.01)
    return low - margin, high + margin


def _panel(ax: "Axes", section: Section, name: str, labelled: bool) -> None:
    for y, row in enumerate(section.rows):
        published = row.published.number(name) if row.published else None
        if published is not None:
            ax.plot(published, y, "o", color=PUBLISHED, markerfacecolor="none", markersize=6)
        if values := list(row.by_seed(name).values()):
            ax.plot([min(values), max(values)], [y, y], color=OURS, linewidth=2.5, alpha=0.5)
            ax.plot(sum(values) / len(values), y, "o", color=OURS, markersize=4)
    ax.set_ylim(len(section.rows) - 0.4, -0.6)
    ax.set_yticks(range(len(section.rows)), [row.key for row in section.rows] if labelled else [])
    ax.tick_params(axis="y", length=0)
    metric = next((row.config.tasks[name].metric for row in section.rows if name in row.tasks), "")
    ax.set_xlabel(f"{section.shown(name)} {metric}".strip(), fontsize=9, color=INK)
    if labelled and section.name:
        ax.set_title(f"Report {section.name}", fontsize=10, color=INK, loc="left")
