"""Draws scale.png: what surgery costs on more and more GPUs, and where it stops to matter, by benchmarks/step_model.py.

python -m docs.pictures.scale
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.step_model import (
    NETWORKS,
    NODE,
    Link,
    Step,
    all_reduce,
    bert_base,
    held,
    link,
    plain,
    reduce_scatter,
    sketch,
)

TOKENS = 4096  # of a task, on each GPU
COLOURS = ("#000000", "#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito's


scattered_bf16 = partial(reduce_scatter, row=0.5)
STEPS: dict[str, Callable[[Step, Link], float]] = {
    "plain": plain,
    "all_reduce": all_reduce,
    "reduce_scatter": reduce_scatter,
    "reduce_scatter, bf16 rows": scattered_bf16,
    "the same, every: 10": partial(held, every=10, combined=scattered_bf16),
    "a sketch (not built)": sketch,
}


def draw_price(axes: Axes, network: str, ranks: list[int]) -> None:
    """How much longer a step takes than a plain one on as many GPUs."""
    step = bert_base(TOKENS)
    for (name, model), colour in list(zip(STEPS.items(), COLOURS, strict=True))[1:]:
        price = [100 * (model(step, link(network, w)) / plain(step, link(network, w)) - 1) for w in ranks]
        axes.plot(ranks, price, color=colour, label=name, marker="o", markersize=3)
    axes.set(xscale="log", xlabel="GPUs", ylim=(0, 200))
    axes.set_xticks(ranks, [str(w) for w in ranks])
    axes.minorticks_off()


def draw_efficiency(axes: Axes, network: str, ranks: int) -> None:
    """The share of their time that so many GPUs spend as one would in plain training."""
    micro_batches = np.unique(np.geomspace(1, 64, 40).astype(int))
    for (name, model), colour in zip(STEPS.items(), COLOURS, strict=True):
        steps = [bert_base(TOKENS, micro_batches=int(m)) for m in micro_batches]
        axes.plot(
            micro_batches * TOKENS,
            [100 * step.alone() / model(step, link(network, ranks)) for step in steps],
            color=colour,
            label=name,
            linestyle="--" if name == "plain" else "-",
        )
    axes.axhline(90, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel=f"tokens of a task in a step, per GPU ({ranks} GPUs)", ylim=(0, 102))
    ticks = [4096 * 2**i for i in range(0, 7, 2)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def main() -> None:
    """Draws the picture beside this file."""
    mpl.use("Agg")
    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2}
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.8), layout="constrained")
    infiniband, ethernet = NETWORKS
    columns = (
        ("NVLink, one node of eight", infiniband, [2, 4, NODE], NODE),
        (infiniband, infiniband, [8, 16, 64, 512], 64),
        (ethernet, ethernet, [8, 16, 64, 512], 64),
    )
    for column, (title, network, ranks, at) in enumerate(columns):
        draw_price(axes[0, column], network, ranks)
        draw_efficiency(axes[1, column], network, at)
        axes[0, column].set_title(title)
    axes[0, 0].set_ylabel("% longer than a plain step")
    axes[1, 0].set_ylabel("% of the speed of one GPU,\nplain training")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle("A model, not a measurement: BERT-base, three tasks, H100s")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
