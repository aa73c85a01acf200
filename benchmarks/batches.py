"""What does sorting rows by length within a window save, and what does making batches cost?

    python benchmarks/batches.py configs/cs224n.yaml [KEY=VALUE ...] [--steps 60]

For several windows (`length_window`, in draws): the share of padding that dense attention computes on top of the real
tokens, how many dense groups a batch falls into, the time that making a step's batches takes in the background thread,
and thousands of real tokens per second of forward and backward in bf16 on one process.
"""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

from mtl_dist.config import load
from mtl_dist.experiment import Experiment
from mtl_dist.tokenizer import load_tokenizer
from mtl_dist.train import build_model, load_data, train_batches


def main() -> None:
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

    print("window  padding  groups/batch  ms/step to make  thousand tokens/s")
    for window in (1, 4, 16, 64):
        windowed = config.model_copy(update={"length_window": window})
        batches = train_batches(windowed, stage, order, splits, rank=0, world=1)
        start = time.perf_counter()
        made = [batch for step in range(arguments.steps) for batch in batches.of_step(step)[1]]
        making = (time.perf_counter() - start) / arguments.steps
        tokens = sum(batch.packed.num_tokens for batch in made)
        slots = sum(group.sentences * group.longest for batch in made for group in batch.packed.groups)
        groups = sum(len(batch.packed.groups) for batch in made) / len(made)
        made = [batch.to(device) for batch in made]
        start = time.perf_counter()
        for batch in made:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(batch.task, batch.packed).square().mean()
            loss.backward()
        loss.item()  # waits for a GPU
        speed = tokens / (time.perf_counter() - start) / 1000
        print(f"{window:6}  {slots / tokens - 1:7.1%}  {groups:12.1f}  {1000 * making:15.2f}  {speed:17.2f}")


if __name__ == "__main__":
    main()
