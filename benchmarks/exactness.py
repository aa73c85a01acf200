"""How far PCGrad on many ranks is from PCGrad on one, for every engine: the table in docs/distributed.md.

    python -m benchmarks.exactness            # CPU processes over gloo
    python -m benchmarks.exactness --cuda     # as many GPUs as there are, over NCCL

Twenty steps of a tiny experiment, with batches that do not divide by the ranks. In fp32, the largest difference of any
parameter from Algorithm 1 written out on one process (AdamW with eps 1e-4, parameters up to about 1). In bf16, and on
GPUs in fp16, with MGDA, which goes farther from the plain sum than these round, from the same engine on one rank; and
what that rank differs from fp32, the rounding. How far away the plain sum is shows that a difference would be seen.
Exits with 1 where one is out of bounds.
"""

import argparse
import io
import os
import platform
import sys
import tempfile
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path

from tests.conftest import write_experiment  # first: it sets the number of threads

# isort: split
import torch
from torch import Tensor

from tests.distributed import on_ranks
from tests.surgery.test_training import LAST, PCGRAD, written_out
from tests.trained import ENGINES, far_apart, run, run_under

STEPS = 20
BOUND = 1e-6  # in fp32
MGDA = "gradients.combiner={kind: mgda}"
CLIPPING, NONE = "gradients.clip_norm=0.5", "gradients.clip_norm=null"
ROWS = {
    "DDP, all_reduce": ("ddp", "all_reduce"),
    "DDP, reduce_scatter": ("ddp", "reduce_scatter"),
    **{
        name: (engine, "all_reduce")
        for engine, name in zip(list(ENGINES)[1:], ["FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"], strict=True)
    },
}


def trained(engine: str, cuda: bool, config: Path, *overrides: str) -> dict[str, Tensor]:
    """On this rank."""
    if cuda:
        os.environ.pop("ACCELERATE_USE_CPU")
    parameters: dict[str, Tensor] = run_under(engine, config, *overrides)["parameters"]
    return {name: parameter.cpu() for name, parameter in parameters.items()}


def alone_in_fp32(config: Path, *overrides: str) -> dict[str, Tensor]:
    """On one process, without a word."""
    with redirect_stdout(io.StringIO()):
        parameters: dict[str, Tensor] = run(config, *overrides)["parameters"]
    return parameters


def main() -> None:
    """Prints the tables, in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cuda", action="store_true", help="on GPUs")
    parser.add_argument(
        "--worlds", type=int, nargs="+", help="numbers of ranks; by default as many as there is room for"
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="engines whose names begin so")
    arguments = parser.parse_args()
    cuda: bool = arguments.cuda
    worlds = [w for w in (1, 2, 4, 8) if w <= torch.cuda.device_count()] if cuda else [2, 4]
    worlds = arguments.worlds or worlds
    names = [name for name in ROWS if name.startswith(tuple(arguments.only))]
    failed = False

    def cell(value: float, bound: float) -> str:
        nonlocal failed
        failed |= not value <= bound
        return f"{value:.1e}{'' if value <= bound else ' !'}"

    with tempfile.TemporaryDirectory() as folder:
        config = write_experiment(Path(folder))

        def furthest(world: int, name: str, expected: dict[str, Tensor], *changes: str) -> float:
            engine, reduce = ROWS[name]
            overrides = [*common, f"gradients.reduce={reduce}", *changes]
            ranks = on_ranks(world, trained, engine, cuda, config, *overrides, timeout_s=300)
            assert all(far_apart(rank, ranks[0]) == 0 for rank in ranks), f"{name}: the ranks differ"
            return far_apart(ranks[0], expected)

        device = torch.cuda.get_device_name() if cuda else platform.machine()
        print(f"torch {torch.__version__}, {device}, {'NCCL' if cuda else 'gloo'}\n")
        cases = list(product(worlds, (1, 3), (CLIPPING, NONE)))
        print(
            "| fp32 |", " | ".join(f"W={w}, accumulation {a}{', clipped' * (c == CLIPPING)}" for w, a, c in cases), "|"
        )
        print("|---" * (len(cases) + 1) + "|")
        common = [*LAST, f"steps={STEPS}"]
        exact = {c: written_out(config, *common, PCGRAD, c) for c in (CLIPPING, NONE)}
        away = {c: far_apart(alone_in_fp32(config, *common, c), exact[c]) for c in (CLIPPING, NONE)}
        print("| the plain sum |", " | ".join(f"{away[c]:.1e}" for _, _, c in cases), "|")
        for name in names:
            cells = [furthest(w, name, exact[c], PCGRAD, c, f"gradients.accumulation={a}") for w, a, c in cases]
            print(f"| {name} |", " | ".join(cell(value, BOUND) for value in cells), "|", flush=True)

        exact_mgda = alone_in_fp32(config, *common, MGDA, CLIPPING)
        plain = far_apart(alone_in_fp32(config, *common, CLIPPING), exact_mgda)
        print(f"\nWith MGDA the plain sum is {plain:.1e} away.")
        for precision in ("bf16", "fp16") if cuda else ("bf16",):
            print(f"\n| {precision} | rounding |", " | ".join(f"W={world}" for world in worlds if world > 1), "|")
            print("|---" * (len(worlds) + 2) + "|")
            for name in names:
                if precision == "fp16" and name == "FSDP2":
                    continue  # is refused
                engine, _ = ROWS[name]
                rounded = [MGDA, CLIPPING, f"precision={precision}"]
                (alone,) = on_ranks(1, trained, engine, cuda, config, *common, *rounded, timeout_s=300)
                rounding = far_apart(alone, exact_mgda)
                cells = [furthest(w, name, alone, *rounded) for w in worlds if w > 1]
                print(
                    f"| {name} | {rounding:.1e} |",
                    " | ".join(cell(value, rounding) for value in cells),
                    "|",
                    flush=True,
                )
    sys.exit(failed)


if __name__ == "__main__":
    main()
