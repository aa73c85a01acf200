"""How fast is a training step of the packed encoder, against Hugging Face's BertModel on padded batches?

    python benchmarks/encoder.py [--device cuda] [--shape base|minilm]

Both run forward and backward in bf16 autocast, with dropout, on the same ragged batch: lengths like those of the CS224N
data, or longer ones. A run alternates between them; the figures are the median of the repetitions, in thousands of real
tokens per second, and the share that the linear layers' arithmetic for real tokens (6 for each weight and token) has of
what the machine does in a product of two large bf16 matrices, which takes its turn as well. Without attention dropout
the packed encoder uses the varlen kernel on a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import BertConfig, BertModel

from mtl_dist.data.packed import pack
from mtl_dist.model.encoder import Encoder, Shape

SHAPES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
VOCABULARY = 30522
SIDE = 2048  # of the product that stands for what the machine can do
PRODUCT = "the machine's own product"


def lengths_of(kind: str, sentences: int) -> list[int]:
    """Sentence lengths: `short` as in SST, Quora and STS (median 15, some of 60), `long` as in film reviews."""
    median, spread = {"short": (15, 0.5), "long": (150, 0.7)}[kind]
    draws = np.random.default_rng(0).lognormal(np.log(median), spread, sentences)
    return np.clip(draws.astype(int), 4, 512).tolist()


def contenders(shape: dict[str, int], lengths: list[int], device: torch.device) -> dict[str, Callable[[], object]]:
    """One training step of each encoder on the same sentences."""
    rows = [np.random.default_rng(1).integers(1000, VOCABULARY, length) for length in lengths]
    packed = pack(rows).to(device)
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row)
    mask = (ids > 0).long().to(device)
    ids = ids.to(device)

    def step_of(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                hidden = forward()
            hidden.float().square().mean().backward()

        return step

    def ours(attention_dropout: float) -> Callable[[], None]:
        config = Shape(**shape, attention_probs_dropout_prob=attention_dropout)
        model = Encoder(config, VOCABULARY).to(device).train()
        return step_of(lambda: model(packed))

    def theirs(attention_dropout: float) -> Callable[[], None]:
        config = BertConfig(vocab_size=VOCABULARY, **shape, attention_probs_dropout_prob=attention_dropout)
        model = BertModel(config, add_pooling_layer=False).to(device).train()
        return step_of(lambda: model(input_ids=ids, attention_mask=mask).last_hidden_state)

    return {
        "packed, attention dropout 0": ours(0.0),
        "packed, attention dropout 0.1": ours(0.1),
        "BertModel, attention dropout 0": theirs(0.0),
        "BertModel, attention dropout 0.1": theirs(0.1),
    }


def product(device: torch.device) -> Callable[[], object]:
    """A product of two large matrices in bf16."""
    left, right = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: left @ right


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """How long one step takes, waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Prints one line per contender and kind of lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--sentences", type=int, default=64)
    arguments = parser.parse_args()
    device, shape = torch.device(arguments.device), SHAPES[arguments.shape]
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    weights = shape["num_hidden_layers"] * (4 * width**2 + 2 * width * inner)
    for kind in ("short", "long"):
        lengths = lengths_of(kind, arguments.sentences)
        steps = {**contenders(shape, lengths, device), PRODUCT: product(device)}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repetition in range(arguments.repetitions + 2):
            for name, step in steps.items():
                elapsed = seconds(step, device)
                if repetition >= 2:  # the first two warm up
                    times[name].append(elapsed)
        full = f"{sum(lengths)} tokens, {sum(lengths) / len(lengths) / max(lengths):.0%} of the padded batch"
        print(f"{arguments.shape}, {kind} sentences: {full}")
        machine = 2 * SIDE**3 / statistics.median(times.pop(PRODUCT))
        for name, measured in times.items():
            speed = sum(lengths) / statistics.median(measured)
            print(f"  {name:34} {speed / 1e3:8.1f} k tokens/s {6 * weights * speed / machine:6.0%} of the machine's")
        print(f"  {PRODUCT:34} {machine / 1e9:8.0f} GFLOP/s")


if __name__ == "__main__":
    main()
