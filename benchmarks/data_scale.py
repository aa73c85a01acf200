"""How long do many rows take: to be prepared, to be opened again, and to be drawn from, and how much memory is that?

    python benchmarks/data_scale.py TOKENIZER FOLDER [--rows 10_000_000] [--ranks 8]

FOLDER takes the generated rows (4 to 12 words of the tokenizer's vocabulary, as often as words of a natural text, and
a label of two) and their cache, about 140 bytes a row; it is made, and removed at the end. Each part runs in a process
of its own, whose largest resident memory is told; files that are mapped into it count. Start-up is what a run does with
its data before the first step, on the first process of a machine and on the others.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

# The processes that tokenise read this file as well, so that it imports nothing heavy at its top.
if TYPE_CHECKING:
    from mtl_dist.training.folder import Splits

DEV_ROWS = 10_000
STEPS, ROWS_OF_A_RANK = 2000, 64


def main() -> None:
    """Prints a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    try:
        for split, rows, seed in (("train", arguments.rows, 0), ("dev", DEV_ROWS, 1)):
            write(arguments.folder / f"{split}.tsv", arguments.tokenizer, rows, seed)
        print(f"{'':34}  seconds  CPU s  rows/s of a core  MiB of memory")
        for what, part in PARTS.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seconds, cpu_s, mib = pool.submit(measured, part, arguments).result()
            per_core = f"{arguments.rows / cpu_s:16,.0f}" if part is open_data else ""
            print(f"{what:34}  {seconds:7.1f}  {cpu_s:5.1f}  {per_core:16}  {mib:13,.0f}")
    finally:
        shutil.rmtree(arguments.folder)


def write(path: Path, tokenizer: Path, rows: int, seed: int) -> None:
    """A file of generated rows."""
    words = [word for word in (tokenizer / "vocab.txt").read_text(encoding="utf-8").split() if word.isalpha()]
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, len(words) + 1)  # Zipf's law
    cumulative = np.cumsum(share / share.sum())
    with path.open("w", encoding="utf-8") as file:
        file.write("id\tsentence\tlabel\n")
        for start in range(0, rows, 100_000):
            ends = np.cumsum(rng.integers(4, 13, min(100_000, rows - start))).tolist()
            drawn = [words[i] for i in np.searchsorted(cumulative, rng.random(ends[-1])).clip(max=len(words) - 1)]
            labels = rng.integers(0, 2, len(ends)).tolist()
            file.writelines(
                f"{start + i}\t{' '.join(drawn[a:b])}\t{label}\n"
                for i, (a, b, label) in enumerate(zip([0, *ends], ends, labels, strict=False))
            )


def measured(part: Callable[[argparse.Namespace], object], arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds, seconds of all cores, and MiB of memory of a part; imports are not counted."""
    import mtl_dist.training.setup  # noqa: F401

    before, start = os.times(), time.perf_counter()
    part(arguments)
    seconds, after = time.perf_counter() - start, os.times()
    return seconds, sum(after[:4]) - sum(before[:4]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def open_data(arguments: argparse.Namespace, checked: bool = False) -> "Splits":
    """The splits, prepared if they are not yet."""
    from rich.console import Console

    from mtl_dist.data.tokenizer import load_tokenizer
    from mtl_dist.experiment import Experiment
    from mtl_dist.training.setup import load_data

    folder = str(arguments.folder.absolute())
    columns = {"id": "id", "sentences": ["sentence"], "label": "label"}
    task = {"train": "train.tsv", "dev": "dev.tsv", "columns": columns, "label": {"kind": "binary"}}
    encoder = {"from": str(arguments.tokenizer.absolute())}
    config = Experiment.model_validate(
        {
            "output_dir": f"{folder}/run",
            "data_dir": folder,
            "cache_dir": f"{folder}/cache",
            "encoder": encoder,
            "tasks": {"it": task},
        }
    )
    tokenizer = load_tokenizer(config.encoder.tokenizer_source)
    return load_data(config, tokenizer, Console(quiet=True), checked)


def start_first(arguments: argparse.Namespace) -> None:
    """What the first rank of all does."""
    from mtl_dist.data.prepare import train_rows_in_dev
    from mtl_dist.training.resume import counted

    splits = open_data(arguments)
    counted(splits["train"])
    train_rows_in_dev(splits["train"], splits["dev"])


def start_other(arguments: argparse.Namespace) -> None:
    """What another rank of its machine does."""
    open_data(arguments, checked=True)


def draw(arguments: argparse.Namespace) -> None:
    """The batches of a rank."""
    from mtl_dist.data.batches import RowStream, TrainBatches, TrainRows
    from mtl_dist.data.mixer import Joint, Size

    split = open_data(arguments, checked=True)["train"]["it"]
    size = ROWS_OF_A_RANK * arguments.ranks
    rows = {"it": TrainRows(split, RowStream(len(split), 0, 0, "it"), size, window=16)}
    batches = TrainBatches(rows, Joint().order({"it": Size(len(split), size)}, (0, 0), 1), 0, arguments.ranks)
    for step in range(STEPS):
        batches.of_step(step)


PARTS: dict[str, Callable[[argparse.Namespace], object]] = {
    "prepared": open_data,
    "start again, the first rank": start_first,
    "start again, another rank": start_other,
    f"{STEPS:,} steps of {ROWS_OF_A_RANK} rows a rank": draw,
}


if __name__ == "__main__":
    main()
