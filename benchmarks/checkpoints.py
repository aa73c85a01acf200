"""How long does training wait for a checkpoint, and how long does it take to write and to check one?

    python benchmarks/checkpoints.py [--layers 12 --width 768] [--folder runs] [--repetitions 5]

Saves BERT of the given shape with AdamW's moments, as a run on one process does, to a folder of the disk to measure;
`waits` is what a step with `checkpoint.async` waits for, `written` what it waits for without.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator

from mtl_dist.checkpoint import CheckpointConfig, all_in, faults
from mtl_dist.experiment import Experiment
from mtl_dist.model.encoder import Encoder, Shape
from mtl_dist.model.multitask import MultiTaskModel
from mtl_dist.optim import AdamW
from mtl_dist.training.engine import Engine, start_engine
from mtl_dist.training.resume import Saver


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def engine_of(layers: int, width: int) -> Engine[MultiTaskModel]:
    """BERT after a step on one process."""
    shape = Shape(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64
    )
    model = MultiTaskModel(Encoder(shape, 30522), {})
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    engine = start_engine(Accelerator(cpu=not torch.cuda.is_available()), model, AdamW(model.parameters()))
    engine.step(0)
    return engine


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    engine = engine_of(arguments.layers, arguments.width)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        config = Experiment.model_construct(output_dir=Path(folder), checkpoint=CheckpointConfig(keep=1))
        with Saver(engine.accelerator, config, {}, print) as saver:
            rows = []
            for done in range(arguments.repetitions):
                waits = seconds(lambda done=done: saver.save(done, engine, {}, {}))
                written = waits + seconds(saver.writer.finish)
                path = all_in(saver.writer.folder)[0]
                rows.append((waits, written, seconds(lambda path=path: faults(path))))
        size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{size / 1e9:.2f} GB", end="")
    for name, values in zip(("waits", "written", "checked"), zip(*rows, strict=True), strict=True):
        print(f"  {name} {median(values):.2f} s", end="")
    print()


if __name__ == "__main__":
    main()
