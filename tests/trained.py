"""Trains as users do, and as it would be written out by hand: what several test files compare."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from mtl_dist.config import load
from mtl_dist.data.batches import RowStream, TrainRows, make_batch
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.distributed import Stops
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import MultiTaskModel, load_model
from mtl_dist.model.weights import build_encoder
from mtl_dist.tasks import TaskConfig
from mtl_dist.training.loop import train
from mtl_dist.training.scores import Scores, score_all
from mtl_dist.training.setup import load_data

ROOT = Path(__file__).parents[1]
NO_DROPOUT = [
    "encoder.dropout=0",
    "encoder.attention_dropout=0",
    *(f"tasks.{task}.dropout=0" for task in ("mood", "same", "near")),
]


def run(config: Path, *overrides: str, resume: str | None = None) -> dict[str, Any]:
    """Trains; returns the scores, every parameter as this rank last had it, and those of the model that was kept."""
    experiment = load(Experiment, config, overrides)
    here: dict[str, Tensor] = {}

    def scored(accelerator: Accelerator, model: MultiTaskModel, *args: Any) -> Scores:
        here.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return score_all(accelerator, model, *args)

    with patch("mtl_dist.training.books.score_all", scored):
        scores = train(experiment, overwrite=resume is None, resume=resume or "never")
    if not (experiment.output_dir / "best").exists():
        return {"scores": scores, "parameters": here, "kept": {}}
    kept, _ = load_model(experiment.output_dir / "best", experiment.tasks)
    return {"scores": scores, "parameters": here, "kept": {name: p.detach() for name, p in kept.named_parameters()}}


ENGINES = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Layer",
    },
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "ds_configs" / f"zero{stage}.json"),
        }
        for stage in (1, 2, 3)
    },
}  # and what the launcher says to have them


def run_under(engine: str, config: Path, *overrides: str, resume: str | None = None) -> dict[str, Any]:
    """Trains on this rank as `accelerate launch` would have it, but in fp32 where nothing else is asked for."""
    os.environ |= ENGINES[engine]
    if not any(override.startswith("precision=") for override in overrides):
        overrides += ("precision=fp32",)
    return run(config, *overrides, resume=resume)


def run_parted(engine: str, config: Path, *overrides: str) -> dict[str, Any]:
    """The same, with every parameter parted under ZeRO-3: a tiny model's would all be kept whole."""
    if engine == "zero3":
        content = json.loads(Path(ENGINES[engine]["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text())
        content["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        (config.parent / "ds.json").write_text(json.dumps(content))
        ENGINES[engine]["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(config.parent / "ds.json")
    return run_under(engine, config, *overrides)


def go_on_until(stop_after: int | None, engine: str, config: Path, *overrides: str) -> dict[str, Any]:
    """Trains, from the last checkpoint if there is one, until rank 0 hears a USR1 after so many steps."""
    steps = 0
    votes = Stops.votes

    def heard(stops: Stops) -> list[float]:
        nonlocal steps
        steps += 1
        if steps == stop_after and os.environ.get("RANK", "0") == "0":
            signal.raise_signal(signal.SIGUSR1)
        return votes(stops)

    with patch.object(Stops, "votes", heard):
        return run_under(engine, config, *overrides, resume="auto")


def far_apart(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference between two parameters, where the largest parameters are about 1."""
    assert actual.keys() == expected.keys()
    differences = [(actual[name] - value).abs().max() for name, value in expected.items()]
    return torch.stack(differences).max().item()  # NaN where any of them is


def ranked(vectors_SD: Tensor, gold_N: Tensor, task: TaskConfig) -> Tensor:
    """Multiple negatives ranking, pair by pair."""
    assert task.ranking is not None
    first, second = vectors_SD.chunk(2)
    costs = []
    for i, gold in enumerate(gold_N.tolist()):
        if gold < task.ranking.positive_from(task.label):
            costs.append(torch.zeros(()))
            continue
        there = torch.stack([torch.cosine_similarity(first[i], other, dim=0) for other in second])
        back = torch.stack([torch.cosine_similarity(second[i], other, dim=0) for other in first])
        found = [-(task.ranking.scale * each).log_softmax(0)[i] for each in (there, back)]
        costs.append(sum(found) / 2)
    return torch.stack(costs)


def written_out(config: Path, *overrides: str) -> dict[str, Tensor]:
    """All stages with torch's AdamW and one loss over the global batches; no Accelerate, no packing ahead.

    Every step is asked for by itself, of orders and rows that were just made: as after a resume at that very step.
    """
    experiment = load(Experiment, config, overrides)
    tokenizer = load_tokenizer(experiment.encoder.tokenizer_source)
    splits = load_data(experiment, tokenizer, Console(quiet=True))["train"]
    counts = {name: len(split) for name, split in splits.items()}
    torch.manual_seed(experiment.seed)
    model = MultiTaskModel(build_encoder(experiment.encoder, tokenizer), experiment.tasks)
    optimizer = None
    for stage in experiment.all_stages():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(re.search(pattern, name) for pattern in stage.trains))
        if optimizer is None or not stage.carry_moments:
            # No decay, so the parameter rules change nothing.
            optimizer = torch.optim.AdamW(model.parameters(), eps=1e-4, weight_decay=0)
        steps = stage.order(counts, experiment.seed).steps
        for step in range(steps):
            draws = stage.order(counts, experiment.seed).draws(step)
            sizes = [experiment.tasks[task].batch_size for task, _ in draws]
            total = torch.zeros(())
            for (name, draw), size in zip(draws, sizes, strict=True):
                task = experiment.tasks[name]
                order = RowStream(counts[name], experiment.seed, stage.number, name, task.subsample)
                rows = TrainRows(splits[name], order, size, experiment.length_window).of_draw(draw)
                batch = make_batch(name, splits[name], rows)
                raw_NO, vectors_SD = model(name, batch.packed, True)
                losses = task.loss.per_example(raw_NO, batch.gold_N, task.label)
                if task.ranking is not None:
                    losses = losses + task.ranking.weight * ranked(vectors_SD, batch.gold_N, task)
                per_sample = stage.gradients.reweight == "per_sample"
                total = total + task.weight * losses.sum() / (sum(sizes) / len(sizes) if per_sample else size)
            for group in optimizer.param_groups:
                group["lr"] = stage.optim.lr * stage.optim.schedule.factor(step, steps)
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}
