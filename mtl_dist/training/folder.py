"""The run folder: what a run leaves in it, and how room is made for another one."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from mtl_dist.checkpoint import CHECKPOINTS, COVERED, LOCK, Checkpoint, all_in, step_of
from mtl_dist.config import CONFIG_FILE, UserError, dump, refusing
from mtl_dist.data.prepare import Split
from mtl_dist.data.read import place
from mtl_dist.experiment import Experiment
from mtl_dist.files import SUMS, drafts, put_back
from mtl_dist.model.multitask import BEST, MODEL_FILES
from mtl_dist.watch.profile import TRACES
from mtl_dist.watch.recorder import DRAFT, METRICS, TENSORBOARD

REJECTED = "rejected.tsv"
ERRORS = "errors"  # a folder for each task and split, with some of these files
ROWS, PAGE, CONFUSION = "errors.jsonl", "errors.md", "confusion.png"
RELIABILITY, PREDICTIONS = "reliability.png", "predictions.png"
ERROR_FILES = (ROWS, PAGE, CONFUSION, RELIABILITY, PREDICTIONS)
# All that a run leaves in its folder.
RUN_FILES = {CONFIG_FILE, REJECTED, METRICS, DRAFT, TENSORBOARD, TRACES, CHECKPOINTS, LOCK, BEST, *drafts(BEST), ERRORS}

# Whole, or on its way from or to one that is.
_CHECKPOINT = re.compile(rf"step-\d+({'|'.join(map(re.escape, drafts('')))})?")
# What safetensors calls a file while it writes it; what NFS calls one that is removed, and still open somewhere.
_LEFT_BEHIND = re.compile(r"\.tmp\w{6}|\.nfs\w+")

Splits = dict[str, dict[str, Split]]  # by the name of the split, then by task


def start_run_folder(config: Experiment, splits: Splits, overwrite: bool, resumed: Checkpoint | None) -> bool:
    """Writes what is known before the first step, and says whether it is the folder of the run that goes on.

    Another run that is in it is replaced, if that was asked for.
    """
    folder = config.output_dir
    with refusing(f"output_dir: cannot write {folder}"):
        goes_on_here = resumed is not None and resumed.path.parent == (folder / CHECKPOINTS).resolve()
        if resumed is not None and goes_on_here:
            again = [path for path in all_in(folder / CHECKPOINTS) if step_of(path) > resumed.step]
            refuse_foreign(folder, again)
            for path in again:  # which will come again
                shutil.rmtree(path)
            put_back(folder / BEST)
        else:
            clear(folder, overwrite)
        for name in (REJECTED, CONFIG_FILE):
            (folder / name).unlink(missing_ok=True)  # it may be a link
        with (folder / REJECTED).open("w", encoding="utf-8") as file:
            for by_task in splits.values():
                for task, split in by_task.items():
                    file.writelines(f"{task}\t{place(split.source, b.line)}\t{b.message}\n" for b in split.rejected())
        (folder / CONFIG_FILE).write_text(dump(config), encoding="utf-8")
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
    return goes_on_here


def clear(folder: Path, overwrite: bool) -> None:
    """Makes room for a run where there is none, or one that may be replaced."""
    found = {path.name for path in folder.iterdir()} - {LOCK}
    foreign = sorted(found - RUN_FILES)
    if foreign or (found and REJECTED not in found):
        raise UserError(f"output_dir: {folder} holds {(foreign or sorted(found))[0]}, not a run; choose another folder")
    if found and not overwrite:
        raise UserError(
            f"output_dir: {folder} holds a run; go on with it by --resume auto, replace it with --overwrite, "
            "or choose another folder"
        )
    refuse_foreign(folder, [folder / name for name in found])
    for name in sorted(found, key=lambda name: name == REJECTED):  # last what shows that it is a run
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def refuse_foreign(folder: Path, parts: list[Path]) -> None:
    """Keeps what somebody put into parts of a run folder from being removed with them."""
    foreign = [path for part in parts for path in _below(part) if not _is_a_runs(path.relative_to(folder))]
    if foreign:
        raise UserError(
            f"output_dir: {min(foreign)} is nothing that a run writes, and would be removed with what is around it; "
            "move it away, or choose another folder"
        )


def _below(part: Path) -> Iterator[Path]:
    """All that would go with a part; a link goes alone."""
    if part.is_dir() and not part.is_symlink():
        for inside in part.iterdir():
            yield inside
            yield from _below(inside)


def _is_a_runs(path: Path) -> bool:
    """Whether a run may have written what is at a path inside its folder."""
    match path.parts:
        case (*_, name) if _LEFT_BEHIND.fullmatch(name):
            return True
        case (part, name) if part == TENSORBOARD:
            return name.startswith("events.out.tfevents.")
        case (part, name) if part == TRACES:
            return re.fullmatch(r"trace-\d+\.json", name) is not None
        case (part, of, *inside) if part == ERRORS:
            return re.fullmatch(r".+-(dev|test)", of) is not None and "/".join(inside) in ("", *ERROR_FILES)
        case (part, step, *inside) if part == CHECKPOINTS:
            return _CHECKPOINT.fullmatch(step) is not None and "/".join(inside) in ("", *COVERED, SUMS)
        case (part, *inside) if part in (BEST, *drafts(BEST)):
            return "/".join(inside) in (*MODEL_FILES, SUMS, *(str(Path(name).parent) for name in MODEL_FILES))
    return False
