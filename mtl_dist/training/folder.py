"""The run folder: what a run leaves in it, and how room is made for another one."""

import shutil
from pathlib import Path

from mtl_dist.checkpoint import CHECKPOINTS, LOCK, Checkpoint, all_in, step_of
from mtl_dist.config import CONFIG_FILE, UserError, dump, refusing
from mtl_dist.data.prepare import Split
from mtl_dist.data.read import place
from mtl_dist.experiment import Experiment
from mtl_dist.files import drafts, put_back
from mtl_dist.model.multitask import BEST
from mtl_dist.watch.recorder import DRAFT, METRICS, TENSORBOARD

REJECTED = "rejected.tsv"
# All that a run leaves in its folder.
RUN_FILES = {CONFIG_FILE, REJECTED, METRICS, DRAFT, TENSORBOARD, CHECKPOINTS, LOCK, BEST, *drafts(BEST)}

Splits = dict[str, dict[str, Split]]  # by the name of the split, then by task


def start_run_folder(config: Experiment, splits: Splits, overwrite: bool, resumed: Checkpoint | None) -> bool:
    """Writes what is known before the first step, and says whether it is the folder of the run that goes on.

    Another run that is in it is replaced, if that was asked for.
    """
    folder = config.output_dir
    with refusing(f"output_dir: cannot write {folder}"):
        goes_on_here = resumed is not None and resumed.path.parent == (folder / CHECKPOINTS).resolve()
        if resumed is not None and goes_on_here:
            for path in all_in(folder / CHECKPOINTS):
                if step_of(path) > resumed.step:  # it will come again
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
    for name in sorted(found, key=lambda name: name == REJECTED):  # last what shows that it is a run
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
