"""Saves a run so that it can go on, and finds what it goes on with: changes since then are shown, or refused."""

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator
from rich.table import Table
from torch import Tensor, nn

import mtl_dist
from mtl_dist.checkpoint import CHECKPOINTS, COVERED, Checkpoint, Snapshot, Writer, all_in, last_whole, opened
from mtl_dist.config import UserError, differences
from mtl_dist.data.prepare import Split
from mtl_dist.distributed import engine_name, precision_of
from mtl_dist.experiment import Experiment
from mtl_dist.files import SUMS, put_back, replacing
from mtl_dist.model.multitask import BEST, MODEL_FILES, MultiTaskModel, saved_scores
from mtl_dist.training.engine import Engine
from mtl_dist.watch.screen import plain_table

# What may change without a word: between the ranks of a run, and between a run and what goes on with it.
OF_A_NODE = {"data_dir", "cache_dir", "output_dir"}
OF_A_START = {*OF_A_NODE, "checkpoint", "log", "distributed"}


def about(accelerator: Accelerator, config: Experiment, train: Mapping[str, Split]) -> dict[str, Any]:
    """What a run is, for its checkpoints, which say how many rows were counted as well."""
    return {
        "mtl_dist": mtl_dist.__version__,
        "ranks": accelerator.num_processes,
        "engine": engine_name(accelerator),
        "precision": precision_of(accelerator),
        "data": {name: split.folder.name for name, split in train.items()},
        "config": config.model_dump(mode="json", by_alias=True),
    }


def counted(train: Mapping[str, Split]) -> dict[str, dict[str, Any]]:
    """What tells the rows of each task from others; it reads all their digests."""
    found = {}
    for name, split in train.items():
        texts = hashlib.blake2b(digest_size=8)
        for digests in split.digests():
            texts.update(digests.tobytes())
        found[name] = {"rows": len(split), "tokens": split.num_tokens, "texts": texts.hexdigest()}
    return found


def compared(about: Mapping[str, Any], free: Set[str]) -> dict[str, Any]:
    """What a run is, but for what may differ in its config."""
    return {**about, "config": {key: value for key, value in about["config"].items() if key not in free}}


def checkpoint_to_resume(
    resume: str, now: Mapping[str, Any], folder: Path, allow_changes: bool, warn: Callable[[str], object]
) -> Checkpoint | None:
    """The checkpoint that `resume` names: never one, the last whole one of this run (auto), or that at a path."""
    if resume == "never":
        return None
    checkpoint = _last(folder, warn) if resume == "auto" else _at(Path(resume), warn)
    if checkpoint is None:
        warn(f"{folder}: no checkpoint yet, so the run begins at its first step")
    if checkpoint is not None and not allow_changes:
        _refuse_changes(checkpoint, now)
    return checkpoint


def _last(run: Path, warn: Callable[[str], object]) -> Checkpoint | None:
    folder = run / CHECKPOINTS
    for old in folder.glob("step-*.old"):
        put_back(old.with_suffix(""))
    checkpoint, problems = last_whole(folder)
    for problem in problems:
        warn(f"{run}: {problem}")
    if checkpoint is None and problems:
        raise UserError(f"{folder}: no checkpoint is whole; start anew with --overwrite")
    if (run / BEST).exists() and not folder.is_dir():  # as a run has it that died before its first checkpoint
        raise UserError(f"{folder} is gone, {run / BEST} is not; start anew with --overwrite")
    return checkpoint


def _at(path: Path, warn: Callable[[str], object]) -> Checkpoint:
    if any((path / name).exists() for name in COVERED):
        return opened(path)
    checkpoint = _last(path.parent if all_in(path) else path, warn)
    if checkpoint is None:
        raise UserError(f"--resume {path}: no checkpoint there; give a run folder, or one of its checkpoints/step-*")
    return checkpoint


def _refuse_changes(checkpoint: Checkpoint, now: Mapping[str, Any]) -> None:
    then, data = checkpoint.about["data"], now["data"]
    way_out = "; start anew, or go on all the same with --allow-changes"
    if missing := sorted(then.keys() ^ data.keys()):
        raise UserError(f"{checkpoint.path}: the run has other tasks now: {', '.join(missing)}{way_out}")
    for task, fingerprint in data.items():
        if then[task] != fingerprint:
            why = "; ".join([*_other_rows(checkpoint.about, now, task), *_other_reading(checkpoint.about, now, task)])
            why = why or "their file, columns, labels, tokenizer or longest length has changed"
            raise UserError(f"{checkpoint.path}: the train rows of task '{task}' are others now ({why}){way_out}")


def _other_rows(then: Mapping[str, Any], now: Mapping[str, Any], task: str) -> list[str]:
    """How the train rows of a task differ, where that is known."""
    before, today = (each.get("rows", {}).get(task) for each in (then, now))
    if before is None or today is None:
        return []
    if before["texts"] != today["texts"]:
        how = "with other texts"
    elif before["tokens"] != today["tokens"]:
        how = f"with the same texts in {today['tokens']:,} tokens instead of {before['tokens']:,}"
    else:
        how = "with the same texts, so their labels or ids"
    return [f"{before['rows']:,} then, {today['rows']:,} now, {how}"]


def _other_reading(then: Mapping[str, Any], now: Mapping[str, Any], task: str) -> list[str]:
    """What has changed in the config of that which rows depend on."""

    def read_by(about: Mapping[str, Any]) -> dict[str, Any]:
        of_task, encoder = about["config"]["tasks"][task], about["config"]["encoder"]
        keys = {f"tasks.{task}.{key}": of_task.get(key) for key in ("train", "columns", "label", "head", "max_length")}
        return {**keys, **{f"encoder.{key}": encoder.get(key) for key in ("from", "tokenizer")}}

    return [f"{key} was {old}, is {new}" for key, old, new in differences(read_by(then), read_by(now))]


def changes(checkpoint: Checkpoint, now: Mapping[str, Any]) -> Table | None:
    """What differs between the run that was saved and the one that goes on."""
    parts = ("ranks", "engine", "precision", "config")
    both = compared(checkpoint.about, OF_A_START), compared(now, OF_A_START)
    then, today = ({part: each[part] for part in parts} for each in both)
    found = differences(then, today)
    for task, fingerprint in now["data"].items():
        if checkpoint.about["data"].get(task, fingerprint) != fingerprint:
            how = _other_rows(checkpoint.about, now, task) or ["others"]
            found.append((f"train rows of {task}", "", how[0]))
    if not found:
        return None
    table = plain_table("changed since", "then", "now", texts=("changed since", "then", "now"))
    for key, before, after in found:
        table.add_row(key.removeprefix("config."), str(before), str(after))
    return table


def load_weights(checkpoint: Checkpoint, model: nn.Module, allow_changes: bool) -> None:
    """Fills the model; heads of tasks that came new keep what they begin with."""
    weights = checkpoint.tensors("weights")
    for name, parameter in model.named_parameters():
        if name not in weights and allow_changes and name.startswith(("heads.", "words.")):
            continue
        if name not in weights or weights[name].shape != parameter.shape:
            found = list(weights[name].shape) if name in weights else "not there"
            raise UserError(f"{checkpoint.path}: {name} is {found}, the config asks for {list(parameter.shape)}")
        parameter.data.copy_(weights[name])


def place_of(checkpoint: Checkpoint, steps: Sequence[int]) -> tuple[int, int]:
    """The stage and its step that a run goes on with, in stages of so many steps.

    The end of the last one, where the run had more stages than there are now.
    """
    stage, step = checkpoint.state["stage"], checkpoint.state["step"]
    return (stage, step) if stage < len(steps) else (len(steps) - 1, steps[-1])


def take_best_along(checkpoint: Checkpoint, folder: Path) -> None:
    """Copies the best model so far into the folder in which a run goes on; not another one that came later."""
    best = checkpoint.path.parent.parent / BEST
    if checkpoint.state["best"] and saved_scores(best) == checkpoint.state["best"]:
        with replacing(folder / BEST) as unfinished:
            for name in (*MODEL_FILES, SUMS):
                (unfinished / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(best / name, unfinished / name)


def carried_moments(checkpoint: Checkpoint, model: nn.Module) -> dict[Tensor, dict[str, Any]]:
    """The moments that a later stage goes on with, of the parameters that are still there."""
    carried = moments_of(checkpoint, "carried")
    return {parameter: carried[name] for name, parameter in model.named_parameters() if name in carried}


def moments_of(checkpoint: Checkpoint, kind: str) -> dict[str, dict[str, Tensor]]:
    """The moments of each parameter, by its name."""
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors(kind).items():
        parameter, _, key = name.rpartition("/")
        moments.setdefault(parameter, {})[key] = tensor
    return moments


class Saver:
    """Saves the run so that it can go on."""

    def __init__(
        self, accelerator: Accelerator, config: Experiment, now: dict[str, Any], tell: Callable[[str], object]
    ) -> None:
        self.accelerator = accelerator
        self.config = config.checkpoint
        self.now = now
        self.writer = Writer(config.output_dir / CHECKPOINTS, self.config.keep, self.config.async_, tell)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    def is_due(self, done: int, evaluated: bool) -> bool:
        """Whether to save after a step, of which we know whether the dev sets were scored after it."""
        return evaluated if self.config.every_steps is None else done % self.config.every_steps == 0

    def save(
        self,
        done: int,
        engine: Engine[MultiTaskModel],
        carried: Mapping[Tensor, dict[str, Tensor]],
        state: Mapping[str, Any],
    ) -> None:
        """Copies the run as it stands, and has it written; every rank must take part.

        `state` says where in the run that is, and what was counted and scored until then.
        """
        tensors: dict[str, Tensor] = {}
        with engine.whole() as whole:
            for name, parameter in whole.named_parameters():
                self._keep(tensors, f"weights/{name}", parameter)
                for key, value in carried.get(parameter, {}).items():
                    self._keep(tensors, f"carried/{name}/{key}", value)
        for name, moments in engine.moments():
            for key, value in moments.items():
                self._keep(tensors, f"moments/{name}/{key}", value)
        if self.accelerator.is_main_process:
            self.writer.write(Snapshot.of(done, self.now, {**state, "scaling": engine.scaling()}, tensors))

    def _keep(self, tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if self.accelerator.is_main_process:
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()

    def finish(self, stop: signal.Signals | None) -> None:
        """Waits until all is written; a job that was told to make room is then asked for again."""
        self.writer.finish()
        if stop and self.writer.failed:
            raise UserError(f"{stop.name}: the run is not saved as it stands; it can go on from its last checkpoint")
        if stop == signal.SIGUSR1 and (requeue := os.environ.get("MTL_DIST_REQUEUE_FILE")):
            Path(requeue).touch()
