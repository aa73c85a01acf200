"""What a step with gradient surgery costs beside a plain one: ours, PCGrad written out, TorchJD if it is installed.

    python -m benchmarks.price [--shape base] [--tasks 16] [--bf16]
    torchrun --nproc_per_node 2 -m benchmarks.price

All train the same shape on the same sentences and take turns, step by step; a figure is the median over the rounds of
a step's time to that of the plain step of its round. On one process that is the time of its CPUs, which does not mind
what else the machine does; on several, and on a GPU, that of the clock.
"""

import argparse
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel

from benchmarks.encoder import SHAPES, VOCABULARY, lengths_of
from mtl_dist.data.packed import Packed, pack
from mtl_dist.model.encoder import Encoder, Shape
from mtl_dist.optim import AdamW
from mtl_dist.surgery.surgery import Surgery

CLASSES = 3
Step = Callable[[], object]


class Model(nn.Module):
    """The encoder, and a classifier for each task."""

    def __init__(self, shape: Shape, tasks: list[str]) -> None:
        super().__init__()
        self.encoder = Encoder(shape, VOCABULARY)
        self.encoder.pooler.requires_grad_(False)
        self.heads = nn.ModuleDict({task: nn.Linear(shape.hidden_size, CLASSES) for task in tasks})

    def forward(self, task: str, packed: Packed) -> Tensor:
        first_SD = self.encoder(packed).index_select(0, packed.offsets[:-1].long())
        return self.heads[task](first_SD)  # type: ignore[no-any-return]


class Padded(nn.Module):
    """Hugging Face's encoder in its place, on padded sentences."""

    def __init__(self, shape: Shape, tasks: list[str]) -> None:
        super().__init__()
        sizes = {name: getattr(shape, name) for name in SHAPES["base"]}
        self.encoder = BertModel(BertConfig(vocab_size=VOCABULARY, **sizes), add_pooling_layer=False)
        self.heads = nn.ModuleDict({task: nn.Linear(shape.hidden_size, CLASSES) for task in tasks})

    def forward(self, task: str, packed: Packed) -> Tensor:
        lengths = packed.offsets.diff()
        mask = torch.arange(packed.longest, device=lengths.device) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long, device=lengths.device).masked_scatter(mask, packed.tokens_T)
        hidden = self.encoder(ids, attention_mask=mask.long()).last_hidden_state
        return self.heads[task](hidden[:, 0])  # type: ignore[no-any-return]


class Contest:
    """The same batches and settings for every contender."""

    def __init__(self, shape: str, tasks: int, rows: int, device: torch.device, bf16: bool) -> None:
        self.shape = Shape(**SHAPES[shape])
        self.tasks = [f"task{task}" for task in range(tasks)]
        self.device = device
        self.bf16 = bf16
        rng = np.random.default_rng((1, dist.get_rank() if dist.is_initialized() else 0))
        self.batches = {}
        for task in self.tasks:
            sentences = [rng.integers(1000, VOCABULARY, length) for length in lengths_of("short", rows)]
            labels = torch.from_numpy(rng.integers(0, CLASSES, rows)).to(device)
            self.batches[task] = pack(sentences).to(device), labels

    def start(self, kind: type[nn.Module] = Model) -> tuple[Any, AdamW | torch.optim.AdamW]:
        torch.manual_seed(0)
        model = kind(self.shape, self.tasks).to(self.device).train()
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(model.parameters(), fused=True) if fused else AdamW(model.parameters())
        if dist.is_initialized():
            return DistributedDataParallel(model, find_unused_parameters=True), optimizer
        return model, optimizer

    def loss(self, model: nn.Module, task: str) -> Tensor:
        packed, labels = self.batches[task]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return F.cross_entropy(model(task, packed).float(), labels)

    def ours(self, combiner: str, kind: type[nn.Module] = Model, **settings: Any) -> Step:
        """Our loop's step; with the plain sum it is plain training."""
        model, optimizer = self.start(kind)
        surgery, number = Surgery(model, combiner, shared="encoder", **settings), 0

        def step() -> None:
            nonlocal number
            with surgery.step(number, self.tasks) as weight:
                for task in self.tasks:
                    with surgery.task(task, last=True), surgery.micro_batch(last=True) as backward:
                        backward(self.loss(model, task) * weight[task])
            optimizer.step()
            optimizer.zero_grad()
            number += 1

        return step

    def explicit(self) -> Step:
        """Algorithm 1 of Yu et al. (2020) on the gradients themselves."""
        model, optimizer = self.start()
        shared = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]

        def step() -> None:
            found = []
            for task in self.tasks:
                self.loss(model, task).backward()
                found.append(torch.cat([p.grad.reshape(-1) for p in shared if p.grad is not None]))
                for parameter in shared:
                    parameter.grad = None
            combined = torch.zeros_like(found[0])
            for i, gradient in enumerate(found):
                mine = gradient.clone()
                for j in torch.randperm(len(found)).tolist():
                    overlap = mine @ found[j]
                    if j != i and overlap < 0:
                        mine -= overlap / (found[j] @ found[j]) * found[j]
                combined += mine
            for parameter, part in zip(shared, combined.split([p.numel() for p in shared]), strict=True):
                parameter.grad = part.view_as(parameter)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def torchjd(self) -> Step:
        """TorchJD's PCGrad: it asks for every task's Jacobian with respect to what they share."""
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import backward, jac_to_grad

        model, optimizer = self.start()
        shared = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]

        def step() -> None:
            losses = [self.loss(model, task) for task in self.tasks]
            heads = list(model.heads.parameters())
            for parameter, gradient in zip(
                heads, torch.autograd.grad(sum(losses), heads, retain_graph=True), strict=True
            ):
                parameter.grad = gradient
            backward(losses, inputs=shared, parallel_chunk_size=1)
            jac_to_grad(shared, PCGrad())
            optimizer.step()
            optimizer.zero_grad()

        return step

    def contenders(self) -> dict[str, Callable[[], Step]]:
        """What there is to compare; the first one is what the others are compared with."""
        ours: dict[str, Callable[[], Step]] = {
            "plain": partial(self.ours, "sum"),
            "PCGrad": partial(self.ours, "pcgrad"),
            "measuring alone": partial(self.ours, "sum", measure=True),
            # Its one surgery is in the first round, in which everything warms up.
            "between surgeries, held": partial(self.ours, "pcgrad", every=10**9, between="held"),
        }
        if dist.is_initialized():
            return ours | {"PCGrad, reduce_scatter": partial(self.ours, "pcgrad", reduce="reduce_scatter")}
        others = {"PCGrad written out": self.explicit, "plain, padded BertModel": partial(self.ours, "sum", Padded)}
        try:
            import torchjd  # noqa: F401
        except ImportError:
            return ours | others
        return ours | others | {"TorchJD's PCGrad": self.torchjd}


def clock(device: torch.device) -> float:
    """Seconds; of the CPUs where one process computes on them alone."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if device.type == "cuda" or dist.is_initialized():
        return time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def prices(contest: Contest, rounds: int, only: list[str] | None = None) -> tuple[dict[str, float], float]:
    """Each contender's step to a plain one, the median over so many rounds, and the median seconds of the plain one."""
    names = [name for name in contest.contenders() if only is None or name in only]
    steps = {name: contest.contenders()[name]() for name in names}
    ratios: dict[str, list[float]] = defaultdict(list)
    plain = []
    for round_ in range(rounds + 1):
        seconds = {}
        for name, step in steps.items():
            before = clock(contest.device)
            step()
            seconds[name] = clock(contest.device) - before
        if round_:  # after the first
            plain.append(seconds["plain"])
            for name in names:
                ratios[name].append(seconds[name] / seconds["plain"])
    return {name: median(values) for name, values in ratios.items()}, median(plain)


def main() -> None:
    """Prints the table, in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32, help="of each task, on all processes together")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", help="contenders, beside the plain one")
    arguments = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    device = torch.device(
        arguments.device, int(os.environ.get("LOCAL_RANK", "0")) if arguments.device == "cuda" else None
    )
    contest = Contest(arguments.shape, arguments.tasks, arguments.rows // world, device, arguments.bf16)
    only = None if arguments.only is None else ["plain", *arguments.only]
    found, seconds = prices(contest, arguments.rounds, only)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{world} process(es), {arguments}, plain {seconds:.3f} s a step")
        print("|", " | ".join(found), "|")
        print("|---" * len(found) + "|")
        print("|", " | ".join(f"{price:.2f}" for price in found.values()), "|")


if __name__ == "__main__":
    main()
