"""What a step with surgery costs beside a plain one, and what it cost in another checkout of the project.

    python benchmarks/surgery.py configs/cs224n.yaml data_dir=... encoder.from=... precision=bf16
    python benchmarks/surgery.py CONFIG KEY=VALUE ... --against ../before --repetitions 3

Trains the config for some steps on one process and on two CPU processes over gloo, all cases in turn, and prints the
median seconds per step. The first report of each run is left out: there everything warms up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import median

STEPS, REPORTS = 4, 5  # of a report, and how many of them
CASES = {
    "plain": ["gradients.combiner.kind=sum"],
    "pcgrad": ["gradients.combiner.kind=pcgrad"],
    "pcgrad, reduce_scatter": ["gradients.combiner.kind=pcgrad", "gradients.reduce=reduce_scatter"],
}


def seconds_per_step(tree: Path, world: int, config: Path, overrides: list[str]) -> list[float]:
    """What each report of a run says, but for the first one's."""
    with tempfile.TemporaryDirectory() as folder:
        length = [f"steps={STEPS * REPORTS}", "epochs=null", f"log.every_steps={STEPS}", "log.tensorboard=false"]
        run = ["train", str(config), *overrides, *length, f"output_dir={folder}/run", "checkpoint.every_steps=100000"]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run(
            [sys.executable, *launcher, "-m", "mtl_dist", *run],
            env=environment,
            cwd=tree,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return [record["seconds_per_step"] for record in records[1:]]


def main() -> None:
    """Prints the table, in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--against", type=Path, help="another checkout of the project")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_intermixed_args()
    trees = {"here": Path(__file__).resolve().parents[1]}
    if arguments.against:
        trees["there"] = arguments.against.resolve()
    # Without dev sets: only steps are timed.
    overrides = [*arguments.overrides, *(f"tasks.{task}.dev=null" for task in ("sst", "quora", "sts"))]
    found: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for _, (world, case, tree) in product(range(arguments.repetitions), product((1, 2), CASES, trees)):
        config = arguments.config.resolve()
        found[world, case, tree] += seconds_per_step(trees[tree], world, config, [*overrides, *CASES[case]])

    print("| processes |", " | ".join(f"{case}, {tree}" for case, tree in product(CASES, trees)), "|")
    print("|---" * (len(CASES) * len(trees) + 1) + "|")
    for world in (1, 2):
        cells = [f"{median(found[world, case, tree]):.3f}" for case, tree in product(CASES, trees)]
        print(f"| {world} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
