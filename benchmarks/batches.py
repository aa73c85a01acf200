"""What does bringing rows of like length together save, and what does making batches cost?

    python benchmarks/batches.py configs/cs224n.yaml [KEY=VALUE ...] [--steps 60]

For several windows (`length_window`, in draws): the share of padding that dense attention computes on top of the real
tokens, into how many dense groups a batch falls, the time that making a step's batches takes (in training a thread does
it), and thousands of real tokens per second of forward and backward in bf16 on one process; the windows take turns.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console

from mtl_dist.config import load
from mtl_dist.data.batches import Batch
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import MultiTaskModel
from mtl_dist.training.setup import build_model, load_data, train_batches

WINDOWS = (1, 4, 16, 64)


def seconds(model: MultiTaskModel, batches: list[Batch], device: torch.device) -> float:
    """How long forward and backward of some batches take."""
    batches = [batch.to(device) for batch in batches]
    start = time.perf_counter()
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(batch.task, batch.packed).square().mean()
        loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Prints a line for each window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    config = load(Experiment, arguments.config, arguments.overrides)
    tokenizer = load_tokenizer(config.encoder.tokenizer_source)
    splits = load_data(config, tokenizer, Console(stderr=True))["train"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, tokenizer, device.type).to(device)
    stage = config.all_stages()[0]
    order = stage.order({name: len(split) for name, split in splits.items()}, config.seed)

    makers = {
        window: train_batches(config.model_copy(update={"length_window": window}), stage, order, splits, 0, 1)
        for window in WINDOWS
    }
    making: dict[int, float] = defaultdict(float)
    computing: dict[int, float] = defaultdict(float)
    batches: dict[int, list[Batch]] = defaultdict(list)
    for step in range(arguments.steps):
        for window, maker in makers.items():
            start = time.perf_counter()
            _, made = maker.of_step(step)
            making[window] += time.perf_counter() - start
            computing[window] += seconds(model, made, device)
            batches[window] += made

    print("window  padding  groups/batch  ms/step to make  thousand tokens/s")
    for window, made in batches.items():
        tokens = sum(batch.packed.num_tokens for batch in made)
        slots = sum(group.sentences * group.longest for batch in made for group in batch.packed.groups)
        groups = sum(len(batch.packed.groups) for batch in made) / len(made)
        print(
            f"{window:6}  {slots / tokens - 1:7.1%}  {groups:12.1f}  {1000 * making[window] / arguments.steps:15.2f}"
            f"  {tokens / computing[window] / 1000:17.2f}"
        )


if __name__ == "__main__":
    main()
