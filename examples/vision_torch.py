"""A convolutional model with BatchNorm in a loop of plain torch and DDP; each step draws among three tasks.

    torchrun --standalone --nproc_per_node 2 examples/vision_torch.py

Every task has a loader of its own; a mixer's order says what a step trains on, on all processes alike. With a FILE
behind it, the command saves there every ten steps, and goes on with what it finds.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mtl_dist import Surgery
from mtl_dist.data.mixer import Temperature

PICTURES = {"direction": 960, "side": 480, "light": 240}  # of each task
PARTS = 2  # micro-batches of a step


class Lines(nn.Module):
    """Of a picture with a line: does it go along or across, is it in the first half or the second, how bright is it?"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        self.body = nn.Sequential(*first, nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.heads = nn.ModuleDict({task: nn.Linear(72, 1) for task in PICTURES})

    def forward(self, task: str, pixels_NCHW: Tensor, label_N: Tensor) -> Tensor:
        """The task's loss."""
        output_N = self.heads[task](self.body(pixels_NCHW))[:, 0]
        return (F.mse_loss if task == "light" else F.binary_cross_entropy_with_logits)(output_N, label_N)


def loader(task: str, rank: int, world: int) -> DataLoader:
    """This process's share of a task's pictures: noise, and a line."""
    random = torch.Generator().manual_seed(len(task))
    N = PICTURES[task]
    along_N, place_N, light_N = torch.rand(3, N, generator=random)
    line_NL = (12 * place_N).long()[:, None] == torch.arange(12)
    line_NHW = torch.where(along_N[:, None, None] < 0.5, line_NL[:, :, None], line_NL[:, None, :])
    pixels_NHW = 0.3 * torch.randn(N, 12, 12, generator=random) + (0.5 + light_N)[:, None, None] * line_NHW
    label_N = {"direction": (along_N < 0.5).float(), "side": (place_N < 0.5).float(), "light": light_N}[task]
    pictures = TensorDataset(pixels_NHW[:, None], label_N)
    return DataLoader(pictures, batch_size=8, sampler=DistributedSampler(pictures, world, rank), drop_last=True)


def endless(loader: DataLoader) -> Iterator[list[Tensor]]:
    """Epoch after epoch, each in another order."""
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def train(steps: int, file: Path | None = None, combiner: str = "pcgrad") -> tuple[nn.Module, Surgery]:
    """So many steps, of which the file may hold the first; the model as DDP has wrapped it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    model = DistributedDataParallel(Lines().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-4)
    surgery = Surgery(model, combiner, shared="body")
    kept = {"model": model, "optimizer": optimizer, "surgery": surgery}
    if file is not None and file.exists():
        for name, state in torch.load(file, map_location=device).items():
            kept[name].load_state_dict(state)

    loaders = {task: loader(task, rank, world) for task in PICTURES}
    order = Temperature(draws_per_step=3).order_over(loaders, steps=steps)
    drawn = Counter(chain(*islice(order.names(), surgery.number)))  # before the file was saved
    batches = {task: islice(endless(loaders[task]), PARTS * drawn[task], None) for task in loaders}
    latest = {}

    def losses(tasks: list[str]) -> Iterator[tuple[str, Tensor]]:
        for task in tasks:  # one forward pass each; asked for when the backward pass of the one before is done
            loss = model(task, *(tensor.to(device) for tensor in next(batches[task])))
            latest[task] = loss.item()
            yield task, loss / PARTS

    for tasks in order.names(start=surgery.number):
        for part in range(PARTS):
            surgery.backward(losses(tasks), last=part == PARTS - 1)
        nn.utils.clip_grad_norm_(model.parameters(), 1.5)
        optimizer.step()
        optimizer.zero_grad()
        if surgery.number % 10 == 0 and rank == 0:
            said = {name: f"{value:.2f}" for name, value in latest.items()}
            cosines = {name: f"{value:.2f}" for name, value in surgery.conflict.cosine.items()}
            print(f"step {surgery.number}: losses {said}, cosines {cosines}")
            if file is not None:
                torch.save({name: what.state_dict() for name, what in kept.items()}, file)
    return model, surgery


if __name__ == "__main__":
    dist.init_process_group()
    train(60, Path(sys.argv[1]) if sys.argv[1:] else None)
    dist.destroy_process_group()
