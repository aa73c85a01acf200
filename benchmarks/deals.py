"""What does it cost a rank to find its rows of a large step, and how evenly do the ranks share its tokens?

    python benchmarks/deals.py configs/cs224n.yaml [KEY=VALUE ...] [--task quora] [--worlds 8 64 512] [--rows 64]

For every number of ranks: milliseconds that one rank takes for the batches of a draw of `--rows` rows for each rank (in
training a thread does it), and how many more tokens the fullest rank gets than the average, for a `length_window` of 1
and of the config.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from mtl_dist.config import load
from mtl_dist.data.batches import RowStream, TrainBatches, TrainRows
from mtl_dist.data.mixer import Joint, Size
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment
from mtl_dist.training.setup import load_data

COMPARED = 3  # steps of which all ranks' batches are made


def main() -> None:
    """Prints a line for each number of ranks and each window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--task", default="quora")
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64)
    arguments = parser.parse_args()
    config = load(Experiment, arguments.config, arguments.overrides)
    task = arguments.task
    splits = load_data(config, load_tokenizer(config.encoder.tokenizer_source), Console(stderr=True))
    split = splits["train"][task]

    print("ranks  window  ms/draw  fullest rank")
    for world in arguments.worlds:
        for window in (1, config.length_window):
            size = arguments.rows * world
            order = Joint().order({task: Size(len(split), size)}, (config.seed, 0), 1, steps=arguments.steps)
            rows = {task: TrainRows(split, RowStream(len(split), config.seed, 0, task), size, window)}
            ranks = [TrainBatches(rows, order, rank, world) for rank in range(world)]
            start = time.perf_counter()
            for step in range(arguments.steps):
                ranks[0].of_step(step)
            ms = 1000 * (time.perf_counter() - start) / arguments.steps
            fullest = []
            for step in range(COMPARED):
                tokens = [sum(batch.packed.num_tokens for batch in rank.of_step(step)[1]) for rank in ranks]
                fullest.append(max(tokens) / np.mean(tokens) - 1)
            print(f"{world:5}  {window:6}  {ms:7.2f}  {np.mean(fullest):12.2%}")


if __name__ == "__main__":
    main()
