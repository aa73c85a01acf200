"""Whatever happens to a checkpoint, or while one is written, a run goes on from the last whole one, or says why not.

python -m pytest tests/faults/test_checkpoints.py
"""

import errno
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import SafetensorError

from mtl_dist import checkpoint, files
from mtl_dist.checkpoint import (
    CHECKPOINTS,
    COVERED,
    LOCK,
    RunLock,
    Snapshot,
    Writer,
    all_in,
    faults,
    last_whole,
    write,
)
from mtl_dist.cli import main
from mtl_dist.config import UserError, load
from mtl_dist.experiment import Experiment
from mtl_dist.files import write_sums
from mtl_dist.model import multitask
from mtl_dist.training.engine import Engine, Stepped
from mtl_dist.training.loop import train
from mtl_dist.training.resume import checkpoint_to_resume
from tests.distributed import on_ranks
from tests.trained import far_apart, run

QUICK = ["log.tensorboard=false", "steps=8", "evaluate.every_steps=2", "checkpoint.keep=3"]


@pytest.fixture
def saved(tiny: Path) -> Path:
    """The checkpoints of a finished run: after steps 4, 6 and 8."""
    run(tiny, *QUICK)
    return tiny.parent / "run" / CHECKPOINTS


def snapshot(step: int) -> Snapshot:
    return Snapshot.of(step, {"data": {}, "config": {}}, {"stage": 0}, {"weights/a": torch.arange(1000.0)})


def sign(path: Path) -> None:
    """Makes a checkpoint that was tampered with look whole."""
    write_sums(path, COVERED)


def full_disk(save_file: Callable[..., None], calls: Container[int]) -> Callable[..., None]:
    """`save_file` on a disk that is full in these of its calls, the first of which is 1."""
    made = 0

    def saving(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal made
        made += 1
        if made in calls:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    return saving


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

    files.sync, files.sha256_of, checkpoint.save_file = map(dying, (files.sync, files.sha256_of, checkpoint.save_file))
    Path.mkdir, Path.rename, Path.write_text = map(dying, (Path.mkdir, Path.rename, Path.write_text))  # type: ignore[method-assign]
    write(folder, snapshot(2))


@pytest.mark.parametrize("before", [1, 2])  # another step; the same one, as a stage without steps has it
def test_killed_at_every_moment_of_a_save(tmp_path: Path, before: int) -> None:
    died = 0
    for moment in range(1, 20):
        folder = tmp_path / str(moment) / CHECKPOINTS
        write(folder, snapshot(before))
        child = os.fork()
        if child == 0:
            die_after(moment, folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        last = checkpoint_to_resume("auto", {}, folder.parent, True, pytest.fail)
        assert last is not None
        assert last.step in (before, 2)
        if status == 0:
            assert last.step == 2
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        died += 1
        # The next save takes no notice of what was left behind, and clears it away.
        writer = Writer(folder, 2, False, pytest.fail)
        writer.write(snapshot(3))
        writer.close()
        assert not list(folder.glob("*.*"))
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


def test_the_last_one_stays_until_the_next_is_whole(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file = full_disk(checkpoint.save_file, {3})
    whole: list[list[int]] = []

    def noting(tensors: dict[str, torch.Tensor], path: Path) -> None:
        whole.append([int(path.name[-1]) for path in all_in(tiny.parent / "run" / CHECKPOINTS) if not faults(path)])
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", noting)
    run(tiny, *QUICK, "checkpoint.keep=1")
    assert whole == [[], [2], [4], [4]]  # step 6 has no room


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        write(disk / CHECKPOINTS, snapshot(1))
        large = Snapshot.of(2, {}, {}, {"weights/a": torch.zeros(100_000)})
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


def damage_sums(path: Path) -> None:
    sums = path / "sha256sums"
    sums.write_text(sums.read_text()[:-10])


def damage_no_sums(path: Path) -> None:
    (path / "sha256sums").unlink()


def damage_newer(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 2}))
    sign(path)


def damage_link(path: Path) -> None:
    (path / "tensors.safetensors").unlink()
    (path / "tensors.safetensors").symlink_to("/etc/hostname")


def damage_climb(path: Path) -> None:
    sums = (path / "sha256sums").read_text()
    (path / "sha256sums").write_text(sums.replace("state.json", "../../config.yaml"))


def damage_foreign(path: Path) -> None:
    (path / "state.json").write_text('["something else"]')
    sign(path)


def damage_all(path: Path) -> None:
    for file in path.iterdir():
        file.write_bytes(os.urandom(1000))


DAMAGES = {
    damage_truncate: "tensors.safetensors is damaged",
    damage_flip: "tensors.safetensors is damaged",
    damage_state: "state.json is damaged",
    damage_remove: "tensors.safetensors is missing",
    damage_sums: "tensors.safetensors is damaged",
    damage_no_sums: "sha256sums is missing",
    damage_newer: "is of format 2",
    damage_link: "tensors.safetensors is damaged",
    damage_climb: "state.json is damaged",
    damage_foreign: "state.json is not one of mtl_dist",
    damage_all: "state.json is damaged",
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


def said_of(path: Path, code: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `verify` says of the parts at a path."""
    assert main(["verify", str(path)]) == code
    return capsys.readouterr().out.splitlines()


def test_any_part_of_a_run_can_be_verified(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder, best, parts = saved.parent, saved.parent / "best", all_in(saved)
    capsys.readouterr()
    whole = [f"{path}: whole" for path in (*parts, best)]
    assert said_of(run_folder, 0, capsys) == whole
    assert said_of(saved, 0, capsys) == whole[:3]
    assert said_of(parts[1], 0, capsys) == whole[1:2]
    assert said_of(best, 0, capsys) == whole[3:]
    monkeypatch.chdir(parts[1])
    assert said_of(Path(), 0, capsys) == [".: whole"]
    damage_flip(parts[1])
    assert "is damaged" in said_of(parts[1], 2, capsys)[0]
    assert said_of(best, 0, capsys) == whole[3:]
    shutil.copytree(best, run_folder.parent / "copy")
    assert said_of(run_folder.parent / "copy", 0, capsys) == [f"{run_folder.parent / 'copy'}: whole"]
    for nothing, why in (("best/encoder", "no checkpoints and no best model here"), ("non", "no such folder")):
        assert main(["verify", str(run_folder / nothing)]) == 2
        assert capsys.readouterr().err == f"{run_folder / nothing}: {why}\n"


def test_hashes_that_were_taken_away_are_told(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best, last = saved.parent / "best", all_in(saved)[0]
    (best / "sha256sums").unlink()
    for path in (best, saved.parent):
        assert said_of(path, 0, capsys)[-1] == (
            f"{best}: not checked, because sha256sums was taken away; its files are all there"
        )
    (best / "encoder" / "config.json").unlink()
    assert said_of(best, 2, capsys) == [f"{best}: encoder/config.json is missing"]
    (last / "sha256sums").unlink()  # nobody but a disk takes that one away: nothing goes on from it
    assert said_of(last, 2, capsys) == [f"{last}: sha256sums is missing"]


def test_with_no_whole_checkpoint_nothing_is_trained(tiny: Path, saved: Path) -> None:
    for path in all_in(saved):
        damage_flip(path)
    with pytest.raises(UserError, match="no checkpoint is whole; start anew with --overwrite"):
        run(tiny, *QUICK, resume="auto")


class Canary:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch canary",)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "optimizer.bin"])
def test_a_planted_pickle_does_not_run(
    tiny: Path, saved: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny.parent)
    last = all_in(saved)[0]
    (last / name).write_bytes(pickle.dumps(Canary()))
    sign(last)  # whoever can write a file can write its hash
    if name == "tensors.safetensors":
        with pytest.raises(UserError, match="step-00000008: cannot be read: "):
            run(tiny, *QUICK, resume="auto")
    else:
        run(tiny, *QUICK, resume="auto")
        assert ("state.json is not one of mtl_dist" in capsys.readouterr().out) == (name == "state.json")
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
    for path in all_in(tiny.parent / "run" / CHECKPOINTS):
        shutil.rmtree(path)
    assert far_apart(run(tiny, *QUICK, resume="auto")["parameters"], whole["parameters"]) == 0


def test_a_run_whose_checkpoints_are_not_there_is_left_alone(tiny: Path, saved: Path) -> None:
    shutil.rmtree(saved)
    saved.symlink_to(tiny.parent / "a disk that is not mounted")
    with pytest.raises(UserError, match=r"run/checkpoints is gone, .*run/best is not; start anew with --overwrite"):
        run(tiny, *QUICK, resume="auto")
    assert (saved.parent / "best").exists()


HOLDER = """
import sys
from pathlib import Path
from mtl_dist.checkpoint import RunLock
lock = RunLock()
lock.take(Path(sys.argv[1]), 0, print)
print("taken", flush=True)
sys.stdin.read()
"""


def test_two_jobs_on_one_run_folder(tiny: Path) -> None:
    folder = tiny.parent / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
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


def test_a_file_that_is_another_one_on_this_node(saved: Path) -> None:
    last, _ = last_whole(saved)
    assert last is not None
    (last.path / "sha256sums").write_text("of another run")
    with pytest.raises(UserError, match="holds something else here than on rank 0; all nodes must see one folder"):
        last.tensors("weights")


def test_a_slow_disk_writes_the_run_as_it_stood(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady = [*QUICK, "gradients.combiner={kind: gradvac}", "checkpoint.every_steps=4", "log.every_steps=3"]
    whole = run(tiny, *steady)
    save_file = checkpoint.save_file

    def slow(tensors: dict[str, torch.Tensor], path: Path) -> None:
        time.sleep(1)  # in which training goes on to the end
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    run(tiny, *steady)
    middle = tiny.parent / "run" / CHECKPOINTS / "step-00000004"
    there = run(tiny, *steady, f"output_dir={tiny.parent / 'there'}", resume=str(middle))
    assert far_apart(there["parameters"], whole["parameters"]) == 0
    draws = [
        json.loads((tiny.parent / name / "metrics.jsonl").read_text().splitlines()[-3])["draws"]
        for name in ("run", "there")
    ]
    assert draws[0] == draws[1]


def test_a_path_through_a_link(tiny: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latest = saved.parent / "latest"
    latest.symlink_to(saved / "step-00000006")
    run(tiny, *QUICK, resume=str(latest))
    assert [path.name for path in all_in(saved)] == ["step-00000008", "step-00000006", "step-00000004"]
    monkeypatch.chdir(saved / "step-00000004")
    run(tiny, *QUICK, resume=".")
    assert all_in(saved)[-1].name == "step-00000004"


def test_what_is_saved_while_a_job_waits_for_the_folder_counts(
    tiny: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = all_in(saved)[0]
    last.rename(tiny.parent / last.name)
    take = RunLock.take

    def waiting(*arguments: Any) -> None:
        (tiny.parent / last.name).rename(last)
        take(*arguments)

    monkeypatch.setattr(RunLock, "take", waiting)
    run(tiny, *QUICK, resume="auto")
    assert "going on after step 8" in capsys.readouterr().out


def stopped(config: Path, *overrides: str) -> tuple[int, bool]:
    """The exit code of a run that hears a USR1 in its third step, and whether it asks for a requeue."""
    step, steps, requeue = Engine.step, 0, config.parent / "requeue"

    def heard(engine: Engine[Any], number: int) -> Stepped:
        nonlocal steps
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGUSR1)
        return step(engine, number)

    with patch.object(Engine, "step", heard), patch.dict(os.environ, MTL_DIST_REQUEUE_FILE=str(requeue)):
        code = main(["train", str(config), *overrides, "--overwrite"])
    assert steps == 3
    return code, requeue.exists()


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_stop_that_cannot_be_saved_asks_for_no_requeue(
    tiny: Path, background: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", full_disk(checkpoint.save_file, range(1, 99)))
    assert stopped(tiny, *QUICK, f"checkpoint.async={background}") == (2, False)
    assert "SIGUSR1: the run is not saved as it stands" in capsys.readouterr().err


def test_an_end_that_cannot_be_saved_is_no_success(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", full_disk(checkpoint.save_file, range(1, 99)))
    assert main(["train", str(tiny), *QUICK]) == 2
    output = capsys.readouterr()
    assert "best of 8 steps was" in output.out
    assert "step-00000008: No space left on device" in output.err


def test_a_stop_of_poisoned_weights_asks_for_no_requeue(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = Engine.step

    def poisoning(engine: Engine[Any], number: int) -> Stepped:
        stepped = step(engine, number)
        next(engine.module.parameters()).data.fill_(float("nan"))
        return stepped

    with patch.object(Engine, "step", poisoning):
        assert stopped(tiny, *QUICK, "evaluate.every_steps=8") == (2, False)
    assert "step 3: not saved: weights/encoder." in capsys.readouterr().out


def test_a_stop_that_only_cannot_clear_up_is_a_stop(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "_rotate", lambda writer: ["cannot remove step-00000002: Device or resource busy"])
    assert stopped(tiny, *QUICK) == (0, True)


def test_a_stop_in_the_last_step_is_the_end(tiny: Path) -> None:
    assert stopped(tiny, *QUICK, "steps=3") == (0, False)
    dev = [line for line in (tiny.parent / "run" / "metrics.jsonl").read_text().splitlines() if '"dev"' in line]
    assert [json.loads(line)["step"] for line in dev] == [2, 3]
    before = {path: path.stat().st_mtime_ns for path in (tiny.parent / "run" / CHECKPOINTS).rglob("*")}
    run(tiny, *QUICK, "steps=3", resume="auto")  # shows its results again, and changes nothing
    assert {path: path.stat().st_mtime_ns for path in (tiny.parent / "run" / CHECKPOINTS).rglob("*")} == before
    assert [line for line in (tiny.parent / "run" / "metrics.jsonl").read_text().splitlines() if '"dev"' in line] == dev


# The best model


def test_a_best_model_that_cannot_be_saved_is_tried_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tiny, *QUICK, "tasks.mood.dev=null", "tasks.same.dev=null", "tasks.near.dev=null")
    tried: list[int] = []
    saved = multitask.save_file

    def full_until(step: int) -> Any:
        def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
            tried.append(1)
            saved(tensors, path)
            if len(tried) <= step:
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        return save_file

    # Without dev sets the last model is the best one, and is saved four times.
    monkeypatch.setattr(multitask, "save_file", full_until(2))
    again = run(tiny, *QUICK, "tasks.mood.dev=null", "tasks.same.dev=null", "tasks.near.dev=null")
    assert again["scores"] == whole["scores"]
    assert far_apart(again["kept"], whole["kept"]) == 0
    output = capsys.readouterr().out
    assert "step 2: the best model is not saved: cannot write" in output and "No space left" in output
    tried.clear()
    monkeypatch.setattr(multitask, "save_file", full_until(9))
    with pytest.raises(UserError, match=r"cannot write .*run/best: .*No space left"):
        run(tiny, *QUICK)
    assert faults(all_in(tiny.parent / "run" / CHECKPOINTS)[0]) == []
    # When there is room, it is made up for.
    monkeypatch.setattr(multitask, "save_file", saved)
    assert far_apart(run(tiny, *QUICK, resume="auto")["kept"], whole["parameters"]) == 0


def test_a_last_model_that_could_not_be_saved_is_made_up_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = [*QUICK, "tasks.mood.dev=null", "tasks.same.dev=null", "tasks.near.dev=null"]
    monkeypatch.setattr(multitask, "save_file", full_disk(multitask.save_file, {4}))
    with pytest.raises(
        UserError, match=r"step 8: the best model is not saved: cannot write .*: No space left on device"
    ):
        run(tiny, *none)
    assert json.loads((tiny.parent / "run" / "best" / "scores.json").read_text())["step"] == 6
    assert run(tiny, *none, resume="auto")["scores"]["step"] == 8


def run_without_room(config: Path, *overrides: str) -> dict[str, Any]:
    """Trains; the first process cannot save the best model of step 2."""
    with patch.object(multitask, "save_file", full_disk(multitask.save_file, {1})):
        return run(config, *overrides)


def test_a_best_model_that_one_rank_cannot_save_is_none_on_all(tiny: Path) -> None:
    first, second = on_ranks(2, run_without_room, tiny, *QUICK)
    assert first["scores"] == second["scores"]
    assert first["scores"]["step"] > 2  # with a score that any later one is better than, or equal to


def test_a_kill_between_two_best_models_leaves_one(tiny: Path, saved: Path) -> None:
    best = saved.parent / "best"
    scores = json.loads((best / "scores.json").read_text())
    best.rename(best.with_name("best.old"))
    assert run(tiny, *QUICK, resume="auto")["scores"] == scores
    assert json.loads((best / "scores.json").read_text()) == scores


def test_a_best_model_of_steps_that_never_came(tiny: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved.parent / "best" / "scores.json").write_text('{"step": 99}')
    again = run(tiny, *QUICK, resume=str(saved / "step-00000004"))
    assert "best is not, or no longer, the model of step" in capsys.readouterr().out
    assert json.loads((saved.parent / "best" / "scores.json").read_text()) == again["scores"]


def test_a_damaged_best_model_is_replaced(tiny: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = saved.parent / "best" / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-1])
    run(tiny, *QUICK, resume="auto")
    assert "best is not, or no longer, the model of step" in capsys.readouterr().out
    assert main(["verify", str(saved.parent)]) == 0


def test_metrics_with_rubbish_in_them(tiny: Path, saved: Path) -> None:
    metrics = saved.parent / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    rubbish = [b"\xff\n", b"\n", b"[1]\n", b'{"stop": 3}\n', b"null\n"]
    metrics.write_bytes(b"".join([lines[0], *rubbish, *lines[1:]]))
    run(tiny, *QUICK, resume="auto")
    assert metrics.read_bytes() == b"".join(lines)


def test_no_room_for_the_lock(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mtl_dist.checkpoint.platform.node", full)
    with pytest.raises(UserError, match=r"output_dir: cannot write .*lock: No space left on device"):
        run(tiny, *QUICK)


def test_fewer_steps_than_were_trained(tiny: Path, saved: Path) -> None:
    before = (saved.parent / "metrics.jsonl").read_text()
    run(tiny, *QUICK, "steps=6", resume="auto")
    assert (saved.parent / "metrics.jsonl").read_text() == before


def test_a_finished_run_taken_elsewhere_has_its_best_model_there(tiny: Path, saved: Path) -> None:
    best = json.loads((saved.parent / "best" / "scores.json").read_text())
    there = run(tiny, *QUICK, f"output_dir={tiny.parent / 'there'}", resume=str(saved))
    assert there["scores"] == best
    assert (tiny.parent / "there" / "best" / "scores.json").exists()
    # Where it is lost, the last one is scored.
    shutil.rmtree(saved.parent / "best")
    again = run(tiny, *QUICK, f"output_dir={tiny.parent / 'elsewhere'}", resume=str(saved))
    assert again["scores"]["step"] == 8
    assert (tiny.parent / "elsewhere" / "best" / "scores.json").exists()


def test_a_dev_set_that_came_later(tiny: Path) -> None:
    run(tiny, *QUICK, "tasks.same.dev=null", "steps=4")
    again = run(tiny, *QUICK, "steps=8", "evaluate.best_by=same", resume="auto")
    assert again["scores"]["tasks"]["same"]


# What else may be in a run folder


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_who_may_read_the_files_is_the_users_to_say(tiny: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        run(tiny, *QUICK)
    finally:
        os.umask(before)
    for path in (tiny.parent / "run").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_what_a_killed_process_left_is_no_hindrance(tiny: Path, saved: Path) -> None:
    folder = saved.parent
    (folder / "metrics.jsonl.tmp").write_text("half a line")
    (folder / "best.tmp").mkdir()
    run(tiny, *QUICK, resume="auto")
    (folder / "metrics.jsonl.tmp").write_text("half a line")
    (folder / "config.yaml").unlink()  # died while it was written
    run(tiny, *QUICK, resume="auto")
    (folder / "config.yaml").unlink()
    (folder / "best.old").mkdir()
    run(tiny, *QUICK)
    (folder / "notes.md").write_text("mine")
    run(tiny, *QUICK, resume="auto")
    assert (folder / "notes.md").read_text() == "mine"
    with pytest.raises(UserError, match=r"holds notes.md, not a run"):
        run(tiny, *QUICK)


def test_links_in_a_run_folder_lead_nowhere(tiny: Path, saved: Path) -> None:
    precious = tiny.parent / "precious"
    precious.write_text("mine")
    (saved.parent / "config.yaml").unlink()
    (saved.parent / "config.yaml").symlink_to(precious)
    (saved.parent / "rejected.tsv").unlink()
    (saved.parent / "rejected.tsv").symlink_to(precious)
    (saved.parent / "metrics.jsonl.tmp").symlink_to(precious)
    run(tiny, *QUICK, resume="auto")
    assert not (saved.parent / "metrics.jsonl").is_symlink()
    (saved.parent / LOCK).unlink()
    (saved.parent / LOCK).symlink_to(precious)
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        run(tiny, *QUICK, resume="auto")
    assert precious.read_text() == "mine"


def test_a_file_system_that_does_not_sync_folders(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refusing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    run(tiny, *QUICK)
    assert faults(all_in(tiny.parent / "run" / CHECKPOINTS)[0]) == []


def test_a_file_that_cannot_be_read_back_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, snapshot(1))

    def failing(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "sha256_of", failing)
    with pytest.raises(UserError, match="step-00000002: Input/output error"):
        write(tmp_path, snapshot(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_file_system_without_locks_is_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    run(tiny, *QUICK)
    assert "No locks available; nothing keeps a second job out" in capsys.readouterr().out
