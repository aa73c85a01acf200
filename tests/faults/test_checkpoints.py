"""Whatever happens to a checkpoint, or while one is written, a run goes on from the last whole one, or says why not.

python -m pytest tests/faults/test_checkpoints.py
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_dist import checkpoint
from mtl_dist.checkpoint import CHECKPOINTS, Snapshot, Writer, all_in, faults, last_whole, write
from mtl_dist.cli import main
from mtl_dist.config import UserError, load
from mtl_dist.experiment import Experiment
from mtl_dist.train import train
from tests.training import far_apart, run

QUICK = ["log.tensorboard=false", "steps=8", "evaluate.every_steps=2", "checkpoint.keep=3"]


@pytest.fixture
def saved(tiny: Path) -> Path:
    """The checkpoints of a finished run: after steps 4, 6 and 8."""
    run(tiny, *QUICK)
    return tiny.parent / "run" / CHECKPOINTS


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"stage": 0}, {"weights/a": torch.arange(1000.0)}, {"data": {}, "config": {}})


def die_after(moment: int, folder: Path) -> None:
    """Writes a checkpoint, and is killed after so many of the calls that it takes."""
    calls = 0

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            result = call(*arguments, **options)
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return called

    checkpoint._sync, checkpoint.sha256_of, checkpoint.save_file = map(
        dying, (checkpoint._sync, checkpoint.sha256_of, checkpoint.save_file)
    )
    Path.mkdir, Path.rename, Path.write_text = map(dying, (Path.mkdir, Path.rename, Path.write_text))  # type: ignore[method-assign]
    write(folder, snapshot(2))


def test_killed_at_every_moment_of_a_save(tmp_path: Path) -> None:
    died = 0
    for moment in range(1, 20):
        folder = tmp_path / str(moment)
        write(folder, snapshot(1))
        child = os.fork()
        if child == 0:
            die_after(moment, folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        last, problems = last_whole(folder)
        assert last is not None
        assert not problems
        assert last.step in (1, 2)
        if status == 0:
            assert last.step == 2
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        died += 1
        # The next save takes no notice of what was left behind, and clears it away.
        writer = Writer(folder, keep=2, background=False)
        assert writer.write(snapshot(3)) == []
        assert not list(folder.glob("*.tmp"))
    assert died >= 10


def test_a_full_disk_leaves_the_last_checkpoint_and_the_training_alone(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tiny, *QUICK)
    save_file = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert far_apart(run(tiny, *QUICK)["parameters"], whole["parameters"]) == 0
    assert "step-00000004: No space left on device" in capsys.readouterr().out
    assert [path.name[-1] for path in all_in(tiny.parent / "run" / CHECKPOINTS)] == ["8", "6", "2"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        write(disk / CHECKPOINTS, snapshot(1))
        large = Snapshot(2, {}, {"weights/a": torch.zeros(100_000)}, {})
        with pytest.raises(UserError, match=r"step-00000002: .*(No space left|storage full)"):
            write(disk / CHECKPOINTS, large)
        last, problems = last_whole(disk / CHECKPOINTS)
        assert last is not None and last.step == 1 and not problems
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def damage_truncate(path: Path) -> None:
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_flip(path: Path) -> None:
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def damage_state(path: Path) -> None:
    file = path / "state.json"
    file.write_text(file.read_text().replace("0", "1", 1))


def damage_remove(path: Path) -> None:
    (path / "tensors.safetensors").unlink()


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": 1')


def damage_no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def damage_newer(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))


def damage_link(path: Path) -> None:
    (path / "tensors.safetensors").rename(path.parent / "elsewhere")
    (path / "tensors.safetensors").symlink_to(path.parent / "elsewhere")


def damage_climb(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../config.yaml"] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


def damage_types(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": 1, "files": {"state.json": 3, "tensors.safetensors": null}}')


DAMAGES = {
    damage_truncate: "bytes in the place of",
    damage_flip: "tensors.safetensors is damaged",
    damage_state: "state.json is damaged",
    damage_remove: "tensors.safetensors is missing",
    damage_manifest: "manifest.json cannot be read",
    damage_no_manifest: "manifest.json is missing",
    damage_newer: "is of format 2",
    damage_link: "tensors.safetensors is missing",
    damage_climb: "manifest.json names other files",
    damage_types: "manifest.json cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_passed_over(
    tiny: Path, saved: Path, damage: object, capsys: pytest.CaptureFixture[str]
) -> None:
    last, before, _ = all_in(saved)
    damage(last)  # type: ignore[operator]
    assert DAMAGES[damage] in faults(last)[0]  # type: ignore[index]
    with pytest.raises(UserError, match="step-00000008"):
        train(load(Experiment, tiny, QUICK), resume=str(last))
    capsys.readouterr()
    assert main(["verify", str(saved.parent)]) == 2
    output = capsys.readouterr().out
    assert f"{before}: whole" in output and DAMAGES[damage] in output  # type: ignore[index]
    run(tiny, *QUICK, resume="auto")
    output = capsys.readouterr().out
    assert "step-00000008: " in output and "going on after step 6" in output
    assert faults(all_in(saved)[0]) == []  # step 8 was written anew


def test_with_no_whole_checkpoint_nothing_is_trained(tiny: Path, saved: Path) -> None:
    for path in all_in(saved):
        damage_flip(path)
    with pytest.raises(UserError, match="no checkpoint is whole; start anew with --overwrite"):
        run(tiny, *QUICK, resume="auto")


class Canary:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch canary",)


def test_a_planted_pickle_does_not_run(tiny: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    for name in ("tensors.safetensors", "state.json", "optimizer.bin"):
        path = all_in(saved)[0]
        shutil.copytree(path, tiny.parent / "copy")
        (path / name).write_bytes(pickle.dumps(Canary()))
        run(tiny, *QUICK, resume="auto")
        shutil.rmtree(path, ignore_errors=True)
        shutil.move(tiny.parent / "copy", path)
    assert not (tiny.parent / "canary").exists()


def test_folders_that_are_no_runs(tiny: Path) -> None:
    folder = tiny.parent / "run"
    folder.mkdir()
    run(tiny, *QUICK, resume="auto")  # an empty one is as good as none
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis.tex, not a run"):
        run(tiny, *QUICK, resume="auto")
    assert (folder / "thesis.tex").read_text() == "mine"


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tiny: Path) -> None:
    whole = run(tiny, *QUICK)
    shutil.rmtree(tiny.parent / "run" / CHECKPOINTS)
    assert far_apart(run(tiny, *QUICK, resume="auto")["parameters"], whole["parameters"]) == 0


HOLDER = """
import sys, time
from pathlib import Path
from mtl_dist.checkpoint import RunLock
lock = RunLock()
lock.take(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


def test_two_jobs_on_one_run_folder(tiny: Path) -> None:
    folder = tiny.parent / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"taken\n"
        with pytest.raises(UserError, match=rf"output_dir: process {holder.pid} on .* is training in .*run; choose"):
            run(tiny, *QUICK)
    finally:
        holder.kill()
        holder.wait()
    run(tiny, *QUICK)  # the dead one's lock is no lock


def test_a_rotation_that_fails(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rmtree = shutil.rmtree

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if Path(path).name.startswith("step-") and not options:
            raise OSError(30, "Read-only file system")
        rmtree(path, *arguments, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    run(tiny, *QUICK, "checkpoint.keep=1")
    assert "cannot remove" in capsys.readouterr().out
    assert len(all_in(tiny.parent / "run" / CHECKPOINTS)) == 4


def test_a_clock_that_was_set_back(tiny: Path, saved: Path) -> None:
    for age, path in enumerate(all_in(saved)):  # the last step seems to be the oldest
        os.utime(path, (age * 1e6, age * 1e6))
    last, _ = last_whole(saved)
    assert last is not None and last.step == 8


def test_another_shape_of_model(tiny: Path, saved: Path) -> None:
    with pytest.raises(
        UserError, match=r"encoder\.embeddings\.word\.weight is \[\d+, 32\], the config asks for \[\d+, 64\]"
    ):
        run(tiny, *QUICK, "encoder.shape.hidden_size=64", resume="auto")


def test_metrics_that_were_cut_off(tiny: Path, saved: Path) -> None:
    metrics = saved.parent / "metrics.jsonl"
    lines = metrics.read_text()
    shutil.rmtree(all_in(saved)[0])
    metrics.write_text(lines[:-30])
    run(tiny, *QUICK, resume="auto")
    steps = [(line["kind"], line["step"]) for line in map(json.loads, metrics.read_text().splitlines())]
    assert steps == [(line["kind"], line["step"]) for line in map(json.loads, lines.splitlines())]
