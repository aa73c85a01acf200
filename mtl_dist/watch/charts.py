"""Charts in one style, as PNG files. matplotlib is imported when one is drawn, and nothing global of it is touched."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_dist.config import refusing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by people who see no red or no green (Okabe & Ito 2008).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
FAINT, INK = "#d9d9d9", "#222222"
DOTS_PER_INCH = 110


def new_chart(
    width: float, height: float, rows: int = 1, columns: int = 1, **layout: Any
) -> "tuple[Figure, list[Axes]]":
    """An empty chart of so many inches, and its axes, row by row; only their lower and left lines are drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(rows, columns, **layout)).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(INK)
        ax.tick_params(colors=INK, labelsize=9)
        ax.grid(color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def save_chart(figure: "Figure", path: Path) -> None:
    """Writes a chart; the same one gives the same bytes."""
    with refusing(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
