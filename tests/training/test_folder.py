"""What a run folder may lose when another run takes its place: what a run wrote, and nothing else.

python -m pytest tests/training/test_folder.py
"""

from pathlib import Path

import pytest

from mtl_dist.checkpoint import CHECKPOINTS, all_in, last_whole
from mtl_dist.config import UserError, load
from mtl_dist.experiment import Experiment
from mtl_dist.training.folder import clear, start_run_folder
from tests.trained import run


@pytest.fixture
def folder(tiny: Path) -> Path:
    """Of a finished run, with checkpoints after steps 2 and 4."""
    run(tiny, "steps=4", "evaluate.every_steps=2")
    return tiny.parent / "run"


def all_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_all_that_a_run_writes_makes_room(folder: Path) -> None:
    assert {"best/encoder", "checkpoints/step-00000004/state.json", "tensorboard"} <= set(all_below(folder))
    best, last = folder / "best", all_in(folder / CHECKPOINTS)[0]
    # As a process leaves them that was killed while it replaced them.
    best.rename(folder / "best.old")
    (folder / "best.tmp" / "encoder").mkdir(parents=True)
    (folder / "best.tmp" / "encoder" / ".tmptEgVmR").touch()
    last.rename(last.with_name(f"{last.name}.tmp"))
    (folder / "errors" / "mood-dev").mkdir(parents=True)
    (folder / "errors" / "mood-dev" / "errors.md").touch()
    (folder / "tensorboard" / ".nfs0012").touch()  # what a network's file system keeps of a removed one that is open
    with pytest.raises(UserError, match="holds a run; go on with it by --resume auto, replace it with --overwrite"):
        clear(folder, overwrite=False)
    clear(folder, overwrite=True)
    assert all_below(folder) in ([], [".mtl_dist.lock"])


@pytest.mark.parametrize(
    "foreign",
    [
        "best/notes.md",
        "best/encoder/model.onnx",
        "best/mine/weights.bin",
        "best.old/notes.md",
        "checkpoints/notes.md",
        "checkpoints/step-00000002/notes.md",
        "checkpoints/step-00000002.old/notes.md",
        "checkpoints/step-final/state.json",
        "checkpoints/mine",
        "errors/notes.md",
        "errors/mood-dev/notes.md",
        "errors/mine",
        "tensorboard/notes.md",
        "tensorboard/other/events.out.tfevents.1",
        "metrics.jsonl.tmp/notes.md",
    ],
)
def test_what_somebody_put_into_a_run_folder_is_not_removed_with_it(folder: Path, foreign: str) -> None:
    path = folder / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix or path.name.startswith("events"):
        path.write_text("mine")
    else:
        path.mkdir()
    before = all_below(folder)
    with pytest.raises(UserError) as caught:
        clear(folder, overwrite=True)
    shown = path if path.parent.name in ("encoder", "best", "checkpoints", "errors", "tensorboard") else None
    assert str(caught.value).startswith(f"output_dir: {shown or folder}")
    assert str(caught.value).endswith(" move it away, or choose another folder")
    assert all_below(folder) == before


def test_a_link_goes_without_what_it_leads_to(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    (folder / "best").rename(elsewhere)
    (folder / "best").symlink_to(elsewhere)
    (elsewhere / "notes.md").write_text("mine")
    kept = all_below(elsewhere)
    clear(folder, overwrite=True)
    assert all_below(elsewhere) == kept


def test_a_run_that_goes_back_removes_no_foreign_file_of_its_later_steps(tiny: Path, folder: Path) -> None:
    last, before = all_in(folder / CHECKPOINTS)
    (last / "notes.md").write_text("mine")
    (last / "state.json").write_text("damaged")
    resumed, _ = last_whole(folder / CHECKPOINTS)
    assert resumed is not None and resumed.path == before
    with pytest.raises(UserError, match=r"step-00000004/notes\.md is nothing that a run writes"):
        start_run_folder(load(Experiment, tiny), {}, False, resumed)
    (last / "notes.md").unlink()
    assert start_run_folder(load(Experiment, tiny), {}, False, resumed)
    assert all_in(folder / CHECKPOINTS) == [before]
