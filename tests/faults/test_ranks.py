"""What becomes of a run when a task's loss is no number, a rank dies, hangs or differs, or a signal comes.

python -m pytest tests/faults/test_ranks.py
"""

import ctypes
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from mtl_dist.checkpoint import all_in
from mtl_dist.config import UserError, load
from mtl_dist.data.batches import eval_batches
from mtl_dist.distributed import Stops
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import MultiTaskModel
from mtl_dist.surgery.combiners import PCGrad
from mtl_dist.surgery.rows import Rows
from mtl_dist.training.engine import Engine, Stepped
from tests.distributed import on_ranks
from tests.limits import limit
from tests.surgery.test_training import LAST, PCGRAD
from tests.trained import ROOT, far_apart, go_on_until, run, run_under


def poisoned(
    task: str, calls: list[int], engine: str, config: Path, *overrides: str, factor: float = math.nan, **options: Any
) -> dict[str, Any]:
    """Trains; on the last rank, these forward passes of a task come out as NaN, or multiplied with another factor."""
    made = 0
    forward = MultiTaskModel.forward

    def poisoning(model: MultiTaskModel, name: str, *inputs: Any) -> Tensor:
        nonlocal made
        raw = forward(model, name, *inputs)
        made += name == task and model.training
        last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        return raw * factor if last and name == task and model.training and made in calls else raw

    with patch.object(MultiTaskModel, "forward", poisoning):
        return run_under(engine, config, *overrides, **options)


def records(config: Path, kind: str) -> list[dict[str, Any]]:
    lines = (config.parent / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ("ddp", []),
        ("ddp", [PCGRAD]),
        # Whether it steps is decided where the gradients are, without asking this process.
        ("ddp", [PCGRAD, "optim.implementation=fused"]),
        ("fsdp2", ["optim.implementation=fused"]),
        ("zero2", [PCGRAD]),
        ("zero3", []),
        ("fsdp2", [PCGRAD]),
    ],
)
def test_a_step_with_a_nan_is_left_out_on_all_ranks(tiny: Path, engine: str, changes: list[str]) -> None:
    overrides = [*LAST, *changes, "log.every_steps=1", "steps=3"]
    before = on_ranks(2, run_under, engine, tiny, *overrides, "steps=2")[0]["parameters"]
    for rank in on_ranks(2, poisoned, "same", [3], engine, tiny, *overrides):
        assert far_apart(rank["parameters"], before) == 0
    (fault,) = records(tiny, "fault")
    assert fault["step"] == 3
    assert fault["rows"].keys() == {"same"}
    assert all(place.startswith(f"{tiny.parent}/same-train.tsv:") for place in fault["rows"]["same"])
    assert [record["skipped_steps"] for record in records(tiny, "train")] == [0, 0, 1]
    assert records(tiny, "train")[-1]["loss"] == {}


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_the_step_after_a_nan_is_a_step(tiny: Path, implementation: str) -> None:
    overrides = [*LAST, f"optim.implementation={implementation}", "steps=4"]
    after = poisoned("same", [3], "ddp", tiny, *overrides)["parameters"]
    before = poisoned("same", [3, 4], "ddp", tiny, *overrides)["parameters"]
    assert 1e-5 < far_apart(after, before) < 0.1


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_a_task_with_a_nan_is_dropped_from_its_step(tiny: Path, engine: str) -> None:
    drop = [*LAST, "gradients.nonfinite=drop_task", "gradients.measure=true", "log.every_steps=1"]
    before = on_ranks(2, run_under, engine, tiny, *drop, "steps=2")[0]["parameters"]
    for rank in on_ranks(2, poisoned, "same", [3], engine, tiny, *drop, "steps=3"):
        moved = {name for name, p in rank["parameters"].items() if not p.equal(before[name])}
        assert any(name.startswith("heads.mood") for name in moved)
        assert any(name.startswith("encoder.layers") for name in moved)
        assert not any(name.startswith("heads.same") for name in moved)
        assert all(p.isfinite().all() for p in rank["parameters"].values())
    assert records(tiny, "fault")[0]["dropped"] == ["same"]
    assert records(tiny, "train")[-1]["loss"].keys() == {"mood", "near"}
    assert records(tiny, "train")[-1]["skipped_steps"] == 0


def test_tasks_that_are_not_apart_cannot_be_dropped(tiny: Path) -> None:
    with pytest.raises(UserError, match="nonfinite is drop_task, which needs the tasks' gradients apart in every step"):
        load(Experiment, tiny, ["gradients.nonfinite=drop_task"])


def refused(function: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    return str(error.value)


def test_the_run_ends_where_it_was_told_to_or_after_too_many(tiny: Path) -> None:
    stop = [*LAST, "gradients.nonfinite=stop"]
    for message in on_ranks(2, refused, poisoned, "same", [2], "ddp", tiny, *stop):
        assert message.startswith(f"step 2: the loss of task 'same' is no number at {tiny.parent}/same-train.tsv:")
    assert [fault["step"] for fault in records(tiny, "fault")] == [2]
    always = list(range(4, 100))
    last = refused(poisoned, "mood", always, "ddp", tiny, *LAST, "steps=20", "gradients.most_nonfinite=5")
    assert last.startswith("step 8: the loss of task 'mood' is no number at ")
    assert "5 steps in a row; lower optim.lr" in last
    # Now and then is not in a row; and nothing that was saved is poisoned.
    kept = poisoned("mood", [4, 6, 8, 10, 12], "ddp", tiny, *LAST, "steps=14", "gradients.most_nonfinite=2")["kept"]
    assert all(p.isfinite().all() for p in kept.values())


def test_a_loss_far_from_usual_is_told_with_its_rows(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steady = [*LAST, "steps=80", "tasks.near.batch_size=6", "log.every_steps=40"]
    run(tiny, *steady)
    assert records(tiny, "spike") == []
    on_ranks(2, poisoned_highly, tiny, *steady)
    (spike,) = records(tiny, "spike")
    assert spike["step"] == 71
    assert spike["loss"]["near"] > 2 * spike["highest_before"]["near"] > 0
    # Three rows of this rank's share of the step.
    assert len(set(spike["rows"]["near"])) == 3
    # The same after a resume in between, told on the screen as well.
    (tiny.parent / "run").rename(tiny.parent / "on two")
    go_on_until(60, "ddp", tiny, *steady)
    poisoned("near", [11], "ddp", tiny, *steady, factor=20.0, resume="auto")
    (again,) = records(tiny, "spike")
    assert again["step"] == 71
    assert again["highest_before"]["near"] == pytest.approx(spike["highest_before"]["near"], rel=1e-4)
    assert f"of late; highest at {tiny.parent}/near-train.tsv:" in capsys.readouterr().out


def poisoned_highly(config: Path, *overrides: str) -> None:
    poisoned("near", [71], "ddp", config, *overrides, factor=20.0)


def combined_to_infinity(calls: list[int], engine: str, config: Path, *overrides: str) -> dict[str, Any]:
    """Trains; in these steps PCGrad's weights come out as infinite, on the rank that decides on them."""
    made = 0
    combine = PCGrad.combine

    def infinite(combiner: PCGrad, *arguments: Any) -> Tensor:
        nonlocal made
        made += 1
        return combine(combiner, *arguments) * (math.inf if made in calls else 1)

    with patch.object(PCGrad, "combine", infinite):
        return run_under(engine, config, *overrides)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_a_gradient_that_surgery_made_infinite_is_left_out(tiny: Path, engine: str) -> None:
    overrides = [*LAST, PCGRAD, "log.every_steps=1"]
    before = on_ranks(2, run_under, engine, tiny, *overrides, "steps=2")[0]["parameters"]
    for rank in on_ranks(2, combined_to_infinity, [3], engine, tiny, *overrides, "steps=3"):
        assert far_apart(rank["parameters"], before) == 0
    (fault,) = records(tiny, "fault")
    assert fault["step"] == 3 and fault["rows"] == {}


def poisoned_in_the_head(config: Path, *overrides: str) -> dict[str, Any]:
    """Trains; in the third step one gradient of a head comes out as NaN on the last rank, where its loss is finite."""
    backward, made = Rows.backward, 0

    def poisoning(rows: Rows, loss: Tensor, retain_graph: bool = False) -> None:
        nonlocal made
        made += 1
        hook = None
        if made == 8 and os.environ["RANK"] == "1":  # of three tasks, the second
            hook = next(rows.model.module.heads["same"].parameters()).register_hook(lambda grad: grad * math.nan)
        backward(rows, loss)
        if hook is not None:
            hook.remove()

    with patch.object(Rows, "backward", poisoning):
        return run(config, *overrides)


@pytest.mark.parametrize("policy", ["skip_step", "drop_task"])
def test_a_nan_in_a_head_alone_leaves_the_step_out(tiny: Path, policy: str) -> None:
    overrides = [*LAST, PCGRAD, "log.every_steps=1", f"gradients.nonfinite={policy}"]
    before = on_ranks(2, run, tiny, *overrides, "steps=2")[0]["parameters"]
    for rank in on_ranks(2, poisoned_in_the_head, tiny, *overrides, "steps=3"):
        assert far_apart(rank["parameters"], before) == 0
    assert records(tiny, "fault")[0]["step"] == 3


def test_poisoned_weights_are_not_saved(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = Engine.step

    def poisoning(engine: Engine[Any], number: int) -> Stepped:
        stepped = step(engine, number)
        if engine.optimizer.state and next(iter(engine.optimizer.state.values()))["step"] == 3:
            next(engine.module.parameters()).data.fill_(float("nan"))
        return stepped

    with patch.object(Engine, "step", poisoning):
        refused(run, tiny, *LAST, "steps=20", "checkpoint.every_steps=2", "checkpoint.keep=9")
    assert [path.name for path in all_in(tiny.parent / "run" / "checkpoints")] == ["step-00000002"]
    assert "step 4: not saved: weights/encoder." in capsys.readouterr().out


def run_its_own(key: str, config: Path, *overrides: str) -> str:
    return refused(run, config, *overrides, f"{key}{1 + int(os.environ['RANK'])}")


@pytest.mark.parametrize(
    ("key", "difference"),
    [
        ("optim.lr=0.00", "optim.lr is 0.001 on rank 0, and 0.002 on rank 1"),
        ("log.every_steps=", "log.every_steps is 1 on rank 0, and 2 on rank 1"),
        ("checkpoint.every_steps=", "checkpoint.every_steps is 1 on rank 0, and 2 on rank 1"),
    ],
)
def test_ranks_that_differ_stop_before_the_first_step(tiny: Path, key: str, difference: str) -> None:
    for message in on_ranks(2, run_its_own, key, tiny, *LAST):
        assert message == f"the ranks differ: config.{difference}"
    assert not (tiny.parent / "run").exists()


def dropout_seeds(config: Path, *overrides: str) -> list[int]:
    """Trains; what each step's dropout was drawn from."""
    seeds: list[int] = []
    forward = MultiTaskModel.forward

    def noting(model: MultiTaskModel, *inputs: Any) -> Tensor:
        if model.training:
            seeds.append(torch.initial_seed())
        return forward(model, *inputs)

    with patch.object(MultiTaskModel, "forward", noting):
        run(config, *overrides)
    return list(dict.fromkeys(seeds))


def test_every_rank_and_step_has_its_own_dropout(tiny: Path) -> None:
    first, second = on_ranks(2, dropout_seeds, tiny, "log.tensorboard=false")
    assert len(first) == len(second) == 6
    assert not set(first) & set(second)


def hang_in(where: str, hanging_rank: int, config: Path, *overrides: str) -> None:
    """Trains; one rank hangs in the second call of a function."""
    module, _, name = where.rpartition(".")
    original, calls = getattr(__import__(module, fromlist=[name]), name), 0

    def hanging(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and os.environ["RANK"] == str(hanging_rank):
            time.sleep(3600)
        return original(*arguments, **options)

    with patch(where, hanging):
        run(config, *overrides)


def run_until(step: int, what: str, config: Path, *overrides: str) -> None:
    """Trains; in a step, the last rank is killed, or hangs."""
    made = 0
    forward = MultiTaskModel.forward

    def failing(model: MultiTaskModel, *inputs: Any) -> Tensor:
        nonlocal made
        made += 1
        if made == 3 * step and os.environ["RANK"] == "1":
            if what == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "hangs with Python's lock":
                ctypes.PyDLL(None).sleep(3600)
            time.sleep(3600)
        return forward(model, *inputs)

    with patch.object(MultiTaskModel, "forward", failing):
        run(config, *overrides)


def test_a_rank_that_dies_ends_the_others(tiny: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 0: another rank is gone \(Connection \w+ by peer\)") as error:
        on_ranks(2, run_until, 2, "dies", tiny, *LAST, patience_s=30)
    assert "rank 0 ended with exit code 1" in str(error.value)


def fails_beside_one_that_hangs(config: Path, *overrides: str) -> None:
    """Trains; in the first step rank 1 hangs, and rank 0 fails when the first task's gradient is on its way."""
    made = 0
    forward = MultiTaskModel.forward

    def failing(model: MultiTaskModel, *inputs: Any) -> Tensor:
        nonlocal made
        made += 1
        if os.environ["RANK"] == "1":
            time.sleep(3600)
        if made == 3:
            raise ValueError("this rank is unlucky")
        return forward(model, *inputs)

    with patch.object(MultiTaskModel, "forward", failing):
        run(config, *overrides)


def test_a_rank_that_fails_beside_one_that_hangs_ends_at_once(tiny: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 0 ended with exit code 1.*is unlucky.*rank 1 hangs"):
        on_ranks(2, fails_beside_one_that_hangs, tiny, *LAST, PCGRAD)


def test_a_rank_that_hangs_is_ended_and_shows_where(tiny: Path) -> None:
    hang_s = ceil(limit(6))
    with pytest.raises(AssertionError) as error:
        on_ranks(2, run_until, 2, "hangs", tiny, *LAST, f"distributed.timeout_s={hang_s}", patience_s=30)
    text = str(error.value)
    assert "rank 1 ended with exit code 1" in text
    assert f"rank 1: no step for {hang_s} s (distributed.timeout_s); where its threads stand:" in text
    assert "in failing" in text  # the line where it slept


def test_a_rank_that_hangs_with_pythons_lock_shows_where(tiny: Path) -> None:
    what, timeout = "hangs with Python's lock", f"distributed.timeout_s={ceil(limit(6))}"
    with pytest.raises(AssertionError) as error:
        on_ranks(2, run_until, 2, what, tiny, *LAST, timeout, patience_s=5)
    text = str(error.value)
    assert "rank 0 ended with exit code 1" in text
    assert "in failing" in text  # before the others end it


def suspended(seconds: int, config: Path, *overrides: str) -> dict[str, Any]:
    """Trains; in the second step, this rank is suspended for so long."""
    made = 0
    forward = MultiTaskModel.forward

    def stopping(model: MultiTaskModel, *inputs: Any) -> Tensor:
        nonlocal made
        made += 1
        if made == 3 + 1:
            with subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"]):
                os.kill(os.getpid(), signal.SIGSTOP)
        return forward(model, *inputs)

    with patch.object(MultiTaskModel, "forward", stopping):
        return run(config, *overrides)


def test_a_suspended_run_goes_on(tiny: Path) -> None:
    hang_s = ceil(limit(6))
    overrides = [*LAST, f"distributed.timeout_s={hang_s}"]
    whole = on_ranks(2, run, tiny, *overrides)
    for rank, before in zip(on_ranks(2, suspended, hang_s + 2, tiny, *overrides), whole, strict=True):
        assert far_apart(rank["parameters"], before["parameters"]) == 0


@pytest.mark.parametrize(
    ("where", "rank"),
    [
        pytest.param("mtl_dist.training.scores.eval_batches", 1, marks=pytest.mark.long),
        pytest.param("mtl_dist.data.batches.make_batch", 1, marks=pytest.mark.long),
        ("mtl_dist.training.books.save_model", 0),
    ],
)
def test_a_rank_that_hangs_elsewhere_does_so_too(tiny: Path, where: str, rank: int) -> None:
    often = [f"distributed.timeout_s={ceil(limit(6))}", "evaluate.every_steps=1", "steps=20"]
    if where == "mtl_dist.training.books.save_model":
        often += LAST  # without dev sets every model is the best one
    with pytest.raises(AssertionError) as error:
        on_ranks(2, hang_in, where, rank, tiny, *often, patience_s=30)
    assert f"rank {rank} ended with exit code 1" in str(error.value)
    assert "in hanging" in str(error.value)


def run_slowly(batch_s: float, config: Path, *overrides: str) -> float:
    """Trains; scoring a batch takes so long. How long scoring all took at least."""
    took = 0.0

    def slowly(*arguments: Any) -> Iterator[Any]:
        nonlocal took
        for batch in eval_batches(*arguments):
            time.sleep(batch_s)
            took += batch_s
            yield batch

    with patch("mtl_dist.training.scores.eval_batches", slowly):
        run(config, *overrides)
    return took


def test_a_long_evaluation_is_no_hang(tiny: Path) -> None:
    hang_s = ceil(limit(6))
    patient = [f"distributed.timeout_s={hang_s}", "steps=1", "evaluate.max_tokens=25"]
    assert max(on_ranks(2, run_slowly, hang_s / 3, tiny, *patient)) > 2 * hang_s


def test_steps_without_a_number_are_counted_over_a_stop(tiny: Path) -> None:
    three = [*LAST, "steps=20", "gradients.most_nonfinite=3", "checkpoint.every_steps=3", "checkpoint.keep=9"]
    for first, resume in ((3, None), (1, "auto")):  # from step 3 on; it goes on after that one
        with pytest.raises(UserError, match=r"step 5: the loss of task 'mood' is no number at .*, 3 steps in a row"):
            poisoned("mood", list(range(first, 100)), "ddp", tiny, *three, resume=resume)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_says_where_and_what_to_lower(tiny: Path, error: RuntimeError) -> None:
    forward = MultiTaskModel.forward

    def too_large(model: MultiTaskModel, name: str, *inputs: Any) -> Tensor:
        if name == "same":
            raise error
        return forward(model, name, *inputs)

    with patch.object(MultiTaskModel, "forward", too_large), pytest.raises(SystemExit) as end:
        run(tiny, *LAST)
    assert str(end.value).startswith(
        "rank 0: out of memory in step 1, in a micro-batch of task 'same' with 9 rows and "
    )
    assert "gradients.max_tokens" in str(end.value)


@pytest.mark.parametrize(
    ("where", "doing"),
    [
        ("mtl_dist.training.loop.start_stage", "the set-up of stage 1"),
        ("mtl_dist.optim.AdamW.step", "step 1"),
        ("mtl_dist.surgery.rows.Rows.reserve", "step 1"),
        ("mtl_dist.data.batches.Batch.to", "the batches of step 1 or a later one"),
    ],
)
def test_out_of_memory_elsewhere_is_one_line_too(tiny: Path, where: str, doing: str) -> None:
    def too_much(*_: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA")

    with patch(where, too_much), pytest.raises(SystemExit) as end:
        run(tiny, *LAST, PCGRAD)
    assert str(end.value).startswith(f"rank 0: out of memory in {doing}; ")


def test_a_signal_that_is_said_again(tiny: Path) -> None:
    with Stops(Accelerator(cpu=True)) as stops:
        signal.raise_signal(signal.SIGTERM)
        assert stops.agreed(stops.votes()) == signal.SIGTERM
    signal.raise_signal(signal.SIGTERM)  # while Python ends
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C, and pytest may be that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
def test_ctrl_c_is_heard_once(capfd: pytest.CaptureFixture[str]) -> None:
    with Stops(Accelerator(cpu=True)) as stops:
        with pytest.raises(KeyboardInterrupt):  # no step is done yet
            signal.raise_signal(signal.SIGINT)
        assert stops.agreed(stops.votes()) is None
        signal.raise_signal(signal.SIGINT)
        assert "SIGINT: the run is saved after this step, and ends" in capfd.readouterr().err
        assert stops.agreed(stops.votes()) == signal.SIGINT
        for again in (signal.SIGINT, signal.SIGTERM):  # as a launcher passes it on
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(again)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stops(Accelerator(cpu=True)) as stops:
            signal.raise_signal(signal.SIGHUP)
            assert stops.agreed(stops.votes()) is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def interrupted(config: Path, times: int, *overrides: str) -> None:
    """Trains; in the third step there comes a Ctrl-C, so many times."""
    forward, made = MultiTaskModel.forward, 0

    def interrupting(model: MultiTaskModel, *inputs: Any) -> Tensor:
        nonlocal made
        made += model.training
        for _ in range(times if made == 3 * 2 + 1 else 0):
            signal.raise_signal(signal.SIGINT)
        return forward(model, *inputs)

    with patch.object(MultiTaskModel, "forward", interrupting):
        run(config, *overrides, resume="auto")


@pytest.mark.usefixtures("in_the_foreground")
def test_ctrl_c_saves_and_a_second_one_ends_at_once(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["log.tensorboard=false", "evaluate.every_steps=2"]
    whole = run(tiny, *overrides)["parameters"]
    shutil.rmtree(tiny.parent / "run")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tiny, 2, *overrides)
    assert [path.name for path in all_in(tiny.parent / "run" / "checkpoints")] == ["step-00000002"]
    interrupted(tiny, 1, *overrides)  # of what is left, in the third step again
    assert "SIGINT: saved after step 5 of 6; go on with --resume auto" in capsys.readouterr().out
    assert far_apart(run(tiny, *overrides, resume="auto")["parameters"], whole) == 0


def test_ctrl_c_under_the_launcher(tiny: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_2proc.yaml")]
    command += ["-m", "mtl_dist", "train", str(tiny), *LAST, "steps=100000", "log.every_steps=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        assert launcher.stdout is not None
        try:
            assert any(line.startswith("step 3/") for line in launcher.stdout)
            launcher.send_signal(signal.SIGINT)  # which the launcher passes on
            assert re.search(r"SIGINT: saved after step \d+ of 100,000", launcher.stdout.read())
        finally:
            launcher.terminate()
    assert len(all_in(tiny.parent / "run" / "checkpoints")) == 1


MOMENTS = {
    "in the data's preparation": "mtl_dist.training.setup.load_data",
    "in an evaluation": "mtl_dist.training.scores.predict",
    "in a save": "mtl_dist.checkpoint.save_file",
    "while the best model is saved": "mtl_dist.training.books.save_model",
    "in a step": "mtl_dist.training.loop.rows_of_mean",
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [*product(MOMENTS, [signal.SIGTERM, signal.SIGUSR1]), ("in an evaluation", signal.SIGHUP)],
)
def test_a_signal_at_any_moment(tiny: Path, moment: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["log.tensorboard=false", "steps=8", "evaluate.every_steps=2"]
    whole = run(tiny, *overrides)["parameters"]
    place = MOMENTS[moment]
    module, _, name = place.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)
    calls = 0

    def disturbed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a second one does no harm
        return original(*arguments, **options)

    requeue = tiny.parent / "requeue"
    with patch(place, disturbed), patch.dict(os.environ, MTL_DIST_REQUEUE_FILE=str(requeue)):
        run(tiny, *overrides)
    assert f"{signal.Signals(number).name}: saved after step " in capsys.readouterr().out
    assert requeue.exists() == (number == signal.SIGUSR1)
    assert far_apart(run(tiny, *overrides, resume="auto")["parameters"], whole) == 0
