"""What surgery costs on many GPUs: rank 0's view of up to 512 ranks, and a model of the time of a step.

    python -m benchmarks.scale view       # bytes, memory and host time on torch's fake process group, against the plan
    python -m benchmarks.scale check      # the model against real gloo ranks, with their own bandwidth
    python -m benchmarks.scale model      # GPUs that nobody here has: a model, not a measurement

The view trains BERT-base for a few steps as rank 0 of so many, whose collectives return at once. The model is in
`benchmarks/step_model.py`; `docs/pictures/scale.py` draws it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_model import (
    NETWORKS,
    Link,
    Step,
    all_reduce,
    bert_base,
    fsdp2,
    held,
    link,
    plain,
    reduce_scatter,
    sketch,
    zero2,
)
from mtl_dist.config import load
from mtl_dist.data.packed import Packed, pack
from mtl_dist.experiment import Experiment
from mtl_dist.model.encoder import Encoder, Shape
from mtl_dist.studies.cost import Work, cost_of
from mtl_dist.surgery import Surgery
from mtl_dist.surgery.ddp import reduce_scatter as reduce_scatter_of
from mtl_dist.surgery.rows import row_length
from mtl_dist.training import loop
from tests.conftest import WORDS, write_experiment
from tests.distributed import on_ranks
from tests.pretend_cuda import pretended_ranks
from tests.studies.test_cost import Sent
from tests.studies.test_cost import held as held_bytes

MB = 1e6

# ------------------------------------------------------------------------------------------------ rank 0 of many ranks

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SMALL = {**BASE, "hidden_size": 48, "intermediate_size": 192}  # as many tensors, and nearly no arithmetic
VOCABULARY = 30522
STEPS = 4
TASKS = ("mood", "same", "near")
VARIANTS = {
    "all_reduce": [],
    "reduce_scatter": ["gradients.reduce=reduce_scatter"],
    "reduce_scatter, bf16": ["gradients.reduce=reduce_scatter", "gradients.buffer_dtype=bf16"],
}


class Operations(TorchDispatchMode):
    """Counts what a GPU would be given kernels for."""

    VIEWS = ("view", "as_strided", "slice", "select", "detach", "alias", "t", "transpose", "expand", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func._schema.name.split("::")[1] not in self.VIEWS
        return func(*args, **(kwargs or {}))


def see(world: int, shape: dict[str, int], overrides: list[str]) -> dict[str, Any]:
    """A few steps as rank 0 of `world`, one row of each task on each."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    step_s: list[float] = []
    found: dict[str, Any] = {}
    sent, operations = Sent(), Operations()
    train_step, combine = loop.train_step, Surgery._combine

    def timed_step(run: Any, trainer: Any, step: int, *rest: Any) -> None:
        found.setdefault("set_up_s", time.perf_counter() - start)
        last = step + 1 == STEPS  # counts, and is not timed
        begin = time.thread_time()
        with sent if last else nullcontext():
            train_step(run, trainer, step, *rest)
        if 0 < step < STEPS - 1:
            step_s.append(time.thread_time() - begin)

    def counted_combine(surgery: Surgery) -> None:
        last = surgery.number + 1 == STEPS
        with operations if last else nullcontext():
            combine(surgery)
        if last:
            found.update(held_bytes(trainers[0]))

    trainers: list[Any] = []
    start_stage = loop.start_stage

    def kept(*rest: Any) -> Any:
        trainers[:] = [start_stage(*rest)]
        return trainers[0]

    with tempfile.TemporaryDirectory() as name, ExitStack() as patches:
        folder = Path(name)
        # Of one length, so that ranks have as many tokens however many rows are dealt.
        with patch("tests.conftest.sentence", lambda rng: " ".join(rng.choices(WORDS, k=8))):
            config = write_experiment(folder)
        words = (folder / "vocab.txt").read_text().splitlines()
        unused = [f"[unused{i}]" for i in range(VOCABULARY - len(words))]
        (folder / "vocab.txt").write_text("\n".join(words + unused) + "\n")
        patches.enter_context(pretended_ranks(world))
        patches.enter_context(patch.object(loop, "train_step", timed_step))
        patches.enter_context(patch.object(loop, "start_stage", kept))
        patches.enter_context(patch.object(Surgery, "_combine", counted_combine))
        # These collectives add nothing up, so that the others seem to have other tasks.
        patches.enter_context(patch.object(Surgery, "_refuse_other_names", lambda *_: None))
        common = [f"steps={STEPS}", "log.tensorboard=false", "gradients.combiner=pcgrad"]
        common += [f"encoder.shape.{key}={value}" for key, value in shape.items()]
        for task in TASKS:
            common += [f"tasks.{task}.dev=null", f"tasks.{task}.batch_size={world}"]
        experiment = load(Experiment, config, [*common, "evaluate.best_by=overall_a", *overrides])
        start = time.perf_counter()
        loop.train(experiment)
        gradients = experiment.gradients
    sizes = {name: parameter.numel() for name, parameter in trainers[0].engine.module.named_parameters()}
    shared = [size for name, size in sizes.items() if name.startswith("encoder.")]
    everything = sum(sizes.values())
    work = Work(everything, 0, everything, sum(shared), row_length(shared), len(TASKS), len(TASKS))
    planned = cost_of(work, gradients, "ddp", "fp32", world)
    return {
        **found,
        "step_s": median(step_s),
        "operations": operations.number,
        "sent": sent.bytes,
        "planned": planned.__dict__,
    }


def views() -> None:
    """The table of rank 0's views; each has a process of its own."""
    print("| | ranks | MB sent, planned | rows, planned | gradients, planned | set-up | small step | operations |")
    print("|---|---|---|---|---|---|---|---|")
    for name, overrides in VARIANTS.items():
        for world in (8, 64, 512):
            base, small = (
                json.loads(
                    subprocess.run(
                        [sys.executable, "-m", "benchmarks.scale", "see", json.dumps([world, shape, overrides])],
                        stdout=subprocess.PIPE,
                        check=True,
                    ).stdout.splitlines()[-1]
                )
                for shape in (BASE, SMALL)
            )
            planned = base["planned"]
            pairs = (
                (base["sent"], planned["bytes_sent_per_step"]),
                (base["of tasks"], planned["task_gradient_bytes"]),
                (base["gradients"], planned["gradient_bytes"]),
            )
            cells = [f"{found / MB:,.1f}, {expected / MB:,.1f}" for found, expected in pairs]
            times = [f"{base['set_up_s']:.1f} s", f"{1000 * small['step_s']:.0f} ms"]
            print(f"| {name} | {world} |", " | ".join([*cells, *times, f"{base['operations']:,}"]), "|", flush=True)


# ---------------------------------------------------------------------------- the model's form, on ranks that there are

WIDTH, LAYERS, TOKENS = 256, 4, 96
ROUNDS = 15
CASES = {  # combiner and reduce
    "plain": ("sum", "all_reduce"),
    "all_reduce": ("pcgrad", "all_reduce"),
    "reduce_scatter": ("pcgrad", "reduce_scatter"),
}


class Model(nn.Module):
    """A small encoder."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
        self.encoder = Encoder(Shape(**shape, intermediate_size=4 * WIDTH), 8000)
        self.encoder.pooler = nn.Identity()

    def forward(self, packed: Packed) -> Tensor:
        """Each token's hidden state."""
        hidden_TD: Tensor = self.encoder(packed)
        return hidden_TD


def measured(world: int) -> dict[str, float]:
    """The parts of a step on this rank, and whole steps, in seconds; all in turn, for other work comes and goes."""
    torch.manual_seed(0)
    if world > 1:
        dist.init_process_group("gloo")
    packed = pack([np.random.default_rng(i).integers(1000, 8000, TOKENS // 4) for i in range(4)])

    def wrapped() -> Any:
        return DistributedDataParallel(Model(), gradient_as_bucket_view=True) if world > 1 else Model()

    def clear(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = None

    def compute(model: Any) -> None:
        clear(model)
        with model.no_sync() if world > 1 else nullcontext():
            model(packed).square().mean().backward()

    def step(model: Any, surgery: Surgery) -> None:
        clear(model)
        with surgery.step(0, TASKS):
            for task in TASKS:
                with surgery.task(task, last=True), surgery.micro_batch(True) as backward:
                    backward(model(packed).square().mean())

    works: dict[str, Callable[[], object]] = {"compute": partial(compute, wrapped())}
    for name, (combiner, reduce) in CASES.items():
        model = wrapped()
        surgery = Surgery(model, combiner, shared="encoder", reduce=reduce)
        surgery.rows.sums = True  # every task reaches all there is
        works[name] = partial(step, model, surgery)
        if name == "all_reduce":
            weights_GK = torch.ones(len(surgery.groups) + 1, len(TASKS))
            rows = surgery.rows
            works["square"] = lambda rows=rows: rows._square(rows.rows[0]) if world > 1 else None
            works["inner products"] = rows.grams
            works["combination"] = partial(rows.combined, weights_GK, surgery.group_of_S)
    part = torch.zeros(-(-sum(parameter.numel() for parameter in model.parameters()) // world))
    whole = torch.zeros(len(part) * world)
    if world > 1:
        works["reduce"] = partial(dist.all_reduce, whole)
        works["scatter"] = partial(reduce_scatter_of, part, whole)
        works["small"] = partial(dist.all_reduce, torch.zeros(16))
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS + 2):
        for name, work in works.items():
            if world > 1:
                dist.barrier()
            begin = time.perf_counter()
            work()
            found[name].append(time.perf_counter() - begin)
    # The first two warm up; the fastest quarter had least of the other work.
    return {name: sorted(seconds[2:])[ROUNDS // 4] for name, seconds in found.items()} | {"size": whole.nbytes}


def check() -> None:
    """The table of steps as they are, and as the model has them."""
    print("| ranks | all-reduce, reduce-scatter, small one | step | measured | collectives beside compute | after it |")
    print("|---|---|---|---|---|---|")
    for world in (1, 2, 4):
        ranks = on_ranks(world, measured, world)
        found = {key: median(rank[key] for rank in ranks) for key in ranks[0]}
        passed_on = (world - 1) / world * found["size"]
        reduce_s, scatter_s = found.get("reduce", 1.0), found.get("scatter", 1.0)
        small_s = found.get("small", 0.0)
        by_reducing = Link(world, 2 * passed_on / reduce_s or 1.0, hop_s=0.0, small_s=small_s)
        by_scattering = Link(world, passed_on / scatter_s or 1.0, hop_s=0.0, small_s=small_s)
        parts = Step(
            size=found["size"],
            tasks=len(TASKS),
            micro_batches=1,
            compute_s=found["compute"],
            optimizer_s=0.0,
            row_s=found["square"],
            products_s=world * found["inner products"],  # each rank forms its share
            combine_s=found["combination"],
            operations_s=0.0,
            pass_s=0.0,
        )
        rings = {"plain": by_reducing, "all_reduce": by_reducing, "reduce_scatter": by_scattering}
        for name in CASES if world > 1 else ("plain", "all_reduce"):
            model, ring = MODELS[name], rings[name]
            after = model(replace(parts, compute_s=0.0), ring) + len(TASKS) * found["compute"]
            took = ", ".join(f"{1000 * s:.0f}" for s in (reduce_s, scatter_s, small_s)) + " ms" if world > 1 else ""
            both = [f"{1000 * s:.0f} ms ({s / found[name] - 1:+.0%})" for s in (model(parts, ring), after)]
            print(f"| {world} | {took} | {name} | {1000 * found[name]:.0f} ms |", " | ".join(both), "|", flush=True)


# ----------------------------------------------------------------------------------------------- the model's prediction

MODELS: dict[str, Callable[[Step, Link], float]] = {
    "plain": plain,
    "all_reduce": all_reduce,
    "reduce_scatter": reduce_scatter,
    "reduce_scatter, bf16 rows": partial(reduce_scatter, row=0.5),
    "the same, every: 10": partial(held, every=10, combined=partial(reduce_scatter, row=0.5)),
    "a sketch (not built)": sketch,
    "ZeRO-2, plain": partial(zero2, surgery=False),
    "ZeRO-2": zero2,
    "FSDP2, plain": partial(fsdp2, surgery=False),
    "FSDP2": fsdp2,
}


def predict() -> None:
    """The tables of steps on GPUs: each a share of the speed that plain training has on one."""
    for tasks in (3, 8):
        print(f"\n{tasks} tasks of 4,096 tokens on each GPU, accumulation 1, 4, 16:\n")
        places = [(network, ranks) for network in NETWORKS for ranks in (8, 64, 512) if ranks > 8 or "NDR" in network]
        print("| |", " | ".join(f"{'NVLink' if w == 8 else n.split(',')[0]}, {w} GPUs" for n, w in places), "|")
        print("|---" * (len(places) + 1) + "|")
        for name, model in MODELS.items():
            cells = []
            for network, ranks in places:
                steps = [bert_base(4096, tasks, m) for m in (1, 4, 16)]
                cells.append(", ".join(f"{s.alone() / model(s, link(network, ranks)):.0%}" for s in steps))
            print(f"| {name} |", " | ".join(cells), "|")
    print("\nThe least accumulation of three tasks of 4,096 tokens with 90 % on 64 GPUs:\n")
    for network in NETWORKS:
        for name, model in list(MODELS.items())[:6]:
            steps = ((m, bert_base(4096, 3, m)) for m in range(1, 1000))
            least = next(m for m, s in steps if s.alone() / model(s, link(network, 64)) >= 0.9)
            print(f"| {network} | {name} | {least} |")


if __name__ == "__main__":
    if sys.argv[1] == "see":
        print(json.dumps(see(*json.loads(sys.argv[2]))))
    else:
        {"view": views, "check": check, "model": predict}[sys.argv[1]]()
