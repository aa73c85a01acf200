"""Draws surgery.png: what PCGrad makes of two gradients in conflict, and how gradients are combined across processes.

python docs/pictures/surgery.py
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from mtl_dist.surgery.combiners import PCGrad

BLUE, ORANGE, GREEN = "#0072b2", "#e69f00", "#009e73"  # Okabe and Ito's: told apart by every eye
SUM, COMBINED, SENT = "#888888", "#000000", "#c43c00"
GRADIENTS = {"a": (3.6, -0.5), "b": (-1.5, 1.5)}
TASKS = {"a": BLUE, "b": ORANGE, "c": GREEN}
GRAM = [[1.0, -0.3, 0.1], [-0.3, 1.0, 0.2], [0.1, 0.2, 1.0]]  # of rows that are one long
RANK_X, WIDTH, TEXT_X = (0.2, 3.35), 2.6, 6.4  # where the two processes and the text stand, and how long a row is


def pcgrad(gram: list[list[float]] | np.ndarray) -> np.ndarray:
    """The tasks' weights."""
    tasks = [str(k) for k in range(len(gram))]
    return PCGrad().weights(torch.tensor(gram), tasks, {}, torch.Generator().manual_seed(0)).numpy()


def draw_vectors(axes: Axes) -> None:
    """Two gradients, their sum, their projections and the sum of these."""
    a, b = (np.array(gradient) for gradient in GRADIENTS.values())
    both = np.stack([a, b])
    weight_a, weight_b = pcgrad(both @ both.T)
    # The weights are 1 and what the other task's projection brings.
    a_left, b_left = a + (weight_b - 1) * b, b + (weight_a - 1) * a
    combined = weight_a * a + weight_b * b

    def arrow(end: np.ndarray, colour: str, **style: object) -> None:
        head = {"arrowstyle": "-|>,head_width=0.25,head_length=0.5", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, (0, 0), arrowprops={"color": colour, "linewidth": 2, **head, **style})

    for start, end in ((a, a_left), (b, b_left)):
        axes.plot(*zip(start, end, strict=True), color="#bbbbbb", linewidth=1.2, linestyle=":")
    for start, end in ((a, a + b), (b, a + b), (a_left, combined), (b_left, combined)):
        axes.plot(*zip(start, end, strict=True), color="#dddddd", linewidth=0.8)
    arrow(a, BLUE)
    arrow(b, ORANGE)
    arrow(a + b, SUM)
    arrow(a_left, BLUE, linewidth=1.5, linestyle="--")
    arrow(b_left, ORANGE, linewidth=1.5, linestyle="--")
    arrow(combined, COMBINED)

    def name(text: str, place: tuple[float, float], colour: str, **style: object) -> None:
        axes.text(*place, text, {"color": colour, "ha": "center", "va": "center", **style})

    name("gradient of a", (2.75, -0.75), BLUE, weight="bold")
    name("gradient\nof b", (-1.85, 0.7), ORANGE, weight="bold")
    name("plain sum", (1.85, 0.32), SUM, weight="bold")
    name("PCGrad", (combined[0], combined[1] + 0.2), COMBINED, weight="bold")
    name("a without its\npart against b", (a_left[0] + 1.2, a_left[1] + 0.2), BLUE)
    name("b without its\npart against a", (b_left[0] - 1.0, b_left[1] + 0.8), ORANGE)
    rows = [("inner product with", "a", "b"), ("plain sum", *both @ (a + b)), ("PCGrad", *both @ combined)]
    for y, (what, *numbers), colour in zip((-1.45, -1.85, -2.25), rows, ("#444444", SUM, COMBINED), strict=True):
        name(what, (0.5, y), colour, ha="right", weight="bold" if colour != "#444444" else "normal")
        for x, number, of_task in zip((1.5, 2.6), numbers, (BLUE, ORANGE), strict=True):
            name(number if isinstance(number, str) else f"{number:.1f}", (x, y), of_task, weight="bold")
    name("Below zero: the step makes that task worse.", (0.55, -2.75), "#444444", size=9)
    axes.set(xlim=(-2.5, 3.8), ylim=(-2.95, combined[1] + 0.45), aspect="equal")
    axes.axis("off")


def draw_ranks(axes: Axes) -> None:
    """From each process's gradients to one that all step with."""
    weights = pcgrad(GRAM)
    red_to_blue = LinearSegmentedColormap.from_list("", ["#d6604d", "#ffffff", "#4393c3"])
    middles = [x + WIDTH / 2 for x in RANK_X]

    def strip(x: float, y: float, width: float, colour: str, alpha: float = 1.0) -> None:
        axes.add_patch(plt.Rectangle((x, y - 0.13), width, 0.26, color=colour, alpha=alpha, linewidth=0))

    def stage(y: float, text: str) -> None:
        axes.text(TEXT_X, y, text, {"va": "center", "weight": "bold"})

    def between(y: float, what: str, *sent: str, style: str = "<|-|>") -> None:
        """From one stage to the next, and what the ranks send each other there."""
        for x in middles:
            axes.annotate(
                "", (x, y - 0.3), (x, y + 0.3), arrowprops={"arrowstyle": "-|>", "color": "#444444", "linewidth": 1.2}
            )
        ends = (middles[1] - 0.2, y), (middles[0] + 0.2, y)
        axes.annotate("", *ends, arrowprops={"arrowstyle": style, "color": SENT, "linewidth": 1.2})
        for line, text in enumerate((what, *sent)):
            style_of_line = {"color": SENT, "size": 9} if line else {"color": "#444444"}
            axes.text(TEXT_X, y + 0.19 * len(sent) - 0.38 * line, text, {"va": "center", **style_of_line})

    for rank, (x, middle) in enumerate(zip(RANK_X, middles, strict=True)):
        axes.text(middle, 10.35, f"rank {rank}", {"ha": "center", "va": "center", "weight": "bold"})
        for k, (task, colour) in enumerate(TASKS.items()):
            if rank == 0:
                axes.text(x - 0.1, 9.7 - 0.36 * k, task, {"ha": "right", "va": "center", "color": colour, "size": 9})
            strip(x, 9.7 - 0.36 * k, WIDTH, colour)
            for half in range(2):
                strip(x + half * WIDTH / 2, 7.45 - 0.36 * k, WIDTH / 2, colour, 1.0 if half == rank else 0.35)
            number = {"ha": "center", "va": "center", "color": colour, "weight": "bold"}
            axes.text(middle + 0.8 * (k - 1), 2.75, f"{weights[k]:.1f}", number)
        for row, column in np.ndindex(3, 3):
            place = middle + 0.36 * (column - 1.5), 4.7 + 0.36 * (0.5 - row)
            face = red_to_blue(0.5 + GRAM[row][column])
            axes.add_patch(plt.Rectangle(place, 0.36, 0.36, facecolor=face, edgecolor="#999999", linewidth=0.6))
        strip(x, 0.95, WIDTH, COMBINED)
    stage(9.34, "each task's gradient")
    between(8.2, "average", "all_reduce: 2 K P (W − 1) / W", "reduce_scatter: K P (W − 1) / W")
    stage(7.09, "averaged rows")
    between(5.95, "inner products of the rows", "all_reduce: nothing", "reduce_scatter: 2 S K K (W − 1) / W")
    stage(4.7, "K × K Gram matrix")
    between(3.6, "rank 0 asks the combiner", "S K weights", style="-|>")
    stage(2.75, "a weight per task")
    between(1.85, "weighted sum of the rows", "all_reduce: nothing", "reduce_scatter: P (W − 1) / W")
    stage(0.95, "one gradient to step with")
    axes.text(
        RANK_X[0], 0.1, "In red, how many numbers each of W processes sends in a step.", {"size": 9, "color": SENT}
    )
    legend = "K tasks, P shared parameters in S tensors. Pale: not kept with reduce_scatter."
    axes.text(RANK_X[0], -0.3, legend, {"size": 9, "color": "#444444"})
    axes.set(xlim=(-0.2, 10.1), ylim=(-0.4, 10.6))
    axes.axis("off")


def main() -> None:
    """Draws the picture beside this file."""
    mpl.use("Agg")
    plt.rcParams |= {"font.size": 10}
    figure = plt.figure(figsize=(9, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.3])
    left.suptitle("Two gradients in conflict", weight="bold")
    draw_vectors(left.subplots())
    right.suptitle("Across processes: average, then combine", weight="bold")
    draw_ranks(right.subplots())
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=200)


if __name__ == "__main__":
    main()
