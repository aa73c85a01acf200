"""Draws mixers.png: what the mixers make of the three tasks of CS224N.

python docs/pictures/mixers.py
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from mtl_dist.data.mixer import (
    Annealed,
    Joint,
    Mixer,
    RoundRobin,
    SampledOrder,
    Sequential,
    Size,
    Sizes,
    Temperature,
    UniMax,
)

ROWS = {"quora": 141_506, "sst": 8_544, "sts": 6_041}
COLOURS = {"quora": "#0072b2", "sst": "#e69f00", "sts": "#009e73"}  # Okabe and Ito's: told apart by every eye
SEED = (0, 0)
STRIPS: dict[str, Mixer] = {
    "joint": Joint(),
    "round_robin": RoundRobin(),
    "round_robin, drop_out": RoundRobin(when_dry="drop_out"),
    "sequential": Sequential(),
    "temperature": Temperature(),
    "temperature, balanced": Temperature(draw="balanced"),
}
STRIP_DRAWS = 60
STRIP_BATCH = 2_600  # rows, so that an epoch is little longer than a strip


def sizes(batch_size: int) -> Sizes:
    """The tasks in batches of so many rows."""
    return {task: Size(rows, batch_size) for task, rows in ROWS.items()}


def label(axes: Axes, **places: tuple[float, float]) -> None:
    """Writes the tasks' names beside their lines."""
    for task, place in places.items():
        axes.annotate(task, place, color=COLOURS[task], weight="bold")


def draw_temperature(axes: Axes) -> None:
    """The tasks' probabilities at each temperature."""
    temperatures = np.linspace(1, 10, 200)
    of_all = [Temperature(temperature=t).order(sizes(32), SEED, epochs=1).expected() for t in temperatures]
    for task, colour in COLOURS.items():
        axes.plot(temperatures, [draws[task] / sum(draws.values()) for draws in of_all], color=colour)
    label(axes, quora=(2.6, 0.64), sst=(3.6, 0.28), sts=(3.6, 0.155))
    axes.set(xlabel="temperature (1: by size, 2: square roots)", xlim=(1, 10), xticks=range(1, 11))
    axes.set(ylabel="probability", ylim=(0, 1))


def draw_annealed(axes: Axes) -> None:
    """The tasks' probabilities in each epoch."""
    order = Annealed().order(sizes(32), SEED, epochs=10)
    assert isinstance(order, SampledOrder)
    for task, p_E in zip(order.tasks, order.p_EK.T, strict=True):
        axes.stairs(p_E, range(11), baseline=None, color=COLOURS[task], linewidth=2)
    label(axes, quora=(5.2, 0.78), sst=(6.2, 0.24), sts=(6.2, 0.07))
    axes.set(xlabel="annealed: epoch of ten", xlim=(0, 10), xticks=range(0, 11, 2), ylim=(0, 1))


def draw_unimax(axes: Axes) -> None:
    """How often stages of each length go over each task."""
    mixer = UniMax()
    lasting = np.geomspace(0.05, mixer.max_epochs, 400)
    of_all = [mixer.order(sizes(32), SEED, epochs).expected() for epochs in lasting]
    for task, size in sizes(32).items():
        axes.plot(lasting, [draws[task] / float(size.batches) for draws in of_all], color=COLOURS[task])
    axes.annotate("max_epochs", (0.055, mixer.max_epochs), va="center")
    label(axes, quora=(0.55, 1.4), sst=(0.42, 2.0), sts=(0.15, 2.2))
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 4]
    axes.set(xlabel="unimax: epochs that the stage lasts", xscale="log", xlim=(0.05, 4))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(ylabel="epochs over each task", ylim=(0, 4.4), yticks=range(5))


def draw_strips(axes: Axes) -> None:
    """The first draws of each mixer: a box is a step, and its parts are the step's draws."""
    for place, mixer in enumerate(STRIPS.values()):
        order = mixer.order(sizes(STRIP_BATCH), SEED, epochs=1)
        drawn = step = 0
        while drawn < STRIP_DRAWS:
            draws = order.draws(step)
            width = 1 - 0.25 / len(draws)
            left = drawn + 0.125 + width * np.arange(len(draws))
            colours = [COLOURS[task] for task, _ in draws]
            axes.barh(place, width, 0.72, left, color=colours, edgecolor="white", linewidth=0.4)
            drawn, step = drawn + len(draws), step + 1
    axes.set_yticks(range(len(STRIPS)), list(STRIPS))
    axes.invert_yaxis()
    axes.set(xlabel=f"draws, of {STRIP_BATCH:,} rows; a box is a step", xlim=(0, STRIP_DRAWS))
    axes.tick_params(left=False)
    axes.spines[["left", "bottom"]].set_visible(False)


def main() -> None:
    """Draws the picture beside this file."""
    mpl.use("Agg")
    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2}
    figure = plt.figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    left, middle, right = above.subplots(1, 3)
    draw_temperature(left)
    draw_annealed(middle)
    draw_unimax(right)
    draw_strips(below.subplots())
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=200)


if __name__ == "__main__":
    main()
