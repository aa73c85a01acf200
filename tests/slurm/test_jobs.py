"""What becomes of jobs: every event of the table in docs/slurm.md, on a real SLURM cluster of two nodes.

python -m pytest tests/slurm
"""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_experiment
from tests.slurm.cluster import Job, cut, mend, of_a_user, preempt, records, steps_done, submit, tool

STEPS = 240
PCGRAD = "gradients.combiner={kind: pcgrad}"
# Steps are reported one by one, so that a test knows where a run is. A checkpoint can only come from a stop.
TRAINING = ["precision=fp32", "log={every_steps: 1, tensorboard: false}", "checkpoint.every_steps=1000"]

pytestmark = pytest.mark.long


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that is not there yet; the log of its job stands beside it."""
    return tmp_path / "run"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def undisturbed(cluster: None, experiment: Path) -> Path:
    """The folder of a run on two nodes that nothing happened to."""
    run = experiment.parent / "undisturbed"
    train(experiment, run).must_complete()
    return run


def train(experiment: Path, run: Path, *overrides: str, **options: Any) -> Job:
    command = [str(experiment), f"output_dir={run}", f"steps={STEPS}", PCGRAD, *TRAINING, *overrides]
    return submit(run.with_suffix(".log"), *command, **options)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*") if not path.name.endswith(".tmp"))


def assert_same(run: Path, other: Path) -> None:
    """Both ended with the same bits: weights and moments, the best model, and every loss and score on the way."""
    assert checkpoints(run)[-1] == checkpoints(other)[-1] == f"step-{STEPS:08d}"
    for file in (f"checkpoints/step-{STEPS:08d}/tensors.safetensors", "best/heads.safetensors"):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file
    assert [timeless(record) for record in records(run)] == [timeless(record) for record in records(other)]


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    clocked = {"time", "tokens_per_second", "seconds_per_step", "data_wait"}
    return {key: value for key, value in record.items() if key not in clocked}


def reach(job: Job, run: Path, step: int) -> None:
    job.wait_until(f"at step {step}", lambda: steps_done(run) >= step or job.facts["JobState"] == "FAILED")
    assert step <= steps_done(run) < STEPS - 50, f"too late to disturb it: {job.log[-4000:]}"


def test_two_nodes_train_as_one(undisturbed: Path) -> None:
    log = undisturbed.with_suffix(".log").read_text()
    assert "2 process(es) on node[1-2]" in log
    assert "2 processes on CPU, 1 thread(s) each, DDP, fp32" in log
    trained = [record for record in records(undisturbed) if record["kind"] == "train"]
    assert [record["step"] for record in trained] == list(range(1, STEPS + 1))
    assert all("surgery" in record for record in trained)


def test_a_finished_run_shows_its_results_again(experiment: Path, undisturbed: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    job = train(experiment, undisturbed)
    job.must_complete()
    again = job.log.rpartition("start 1")[2]
    assert f"going on after step {STEPS} of " in again
    assert f"best of {STEPS} steps was " in again
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_stopped_by_the_time_limit_and_preempted_it_ends_as_if_nothing_had_been(
    experiment: Path, undisturbed: Path, run: Path
) -> None:
    job = train(experiment, run)
    reach(job, run, 10)
    # As SLURM does it a while before the time limit, because of --signal=B:USR1@300.
    tool("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_until("requeued", lambda: job.facts["Restarts"] == "1")
    (saved,) = checkpoints(run)
    assert 10 <= int(saved.removeprefix("step-")) < STEPS

    reach(job, run, int(saved.removeprefix("step-")) + 10)
    preempt()
    job.must_complete(restarts=2)
    assert job.log.count("saved; goes on when it is its turn again") == 2
    assert_same(run, undisturbed)


def test_requeued_by_hand_it_goes_on_and_cancelled_it_stays_away(experiment: Path, run: Path) -> None:
    job = train(experiment, run)
    reach(job, run, 10)
    tool("scontrol", "requeue", job.number)
    job.wait_until("started again", lambda: "going on after step" in job.log)
    (saved,) = checkpoints(run)

    reach(job, run, int(saved.removeprefix("step-")) + 10)
    tool("scancel", job.number)
    job.wait_until("cleared away", lambda: job.facts["JobState"] == "CANCELLED")  # CANCELLED only after COMPLETING
    assert checkpoints(run)[0] == saved and len(checkpoints(run)) == 2
    assert job.facts["Restarts"] == "1"
    assert "goes on when it is its turn" not in job.log


def test_a_killed_process_ends_the_job_at_once(experiment: Path, run: Path) -> None:
    job = train(experiment, run)
    reach(job, run, 10)
    (process,) = processes(job, rank=1)
    os.kill(process, signal.SIGKILL)
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    assert checkpoints(run) == []


def processes(job: Job, rank: int) -> list[int]:
    """The pid of one of a job's processes, once it is there; all nodes are on this machine."""
    wanted = {f"SLURM_JOB_ID={job.number}", f"RANK={rank}"}
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if wanted <= environment_of(path)]


def environment_of(process: Path) -> set[str]:
    try:
        return set((process / "environ").read_text(errors="replace").split("\0"))
    except OSError:  # it has ended, or is not ours
        return set()


def test_when_a_node_dies_the_job_waits_for_it_and_goes_on(experiment: Path, undisturbed: Path, run: Path) -> None:
    job = train(experiment, run, "checkpoint.every_steps=10")
    reach(job, run, 35)
    cut("node2")
    try:
        job.wait_until("requeued", lambda: job.facts["Restarts"] == "1")
    finally:
        mend("node2")
    job.must_complete(restarts=1)
    assert re.search(r"going on after step [1-9]\d*0 ", job.log)
    assert_same(run, undisturbed)


def test_tasks_of_an_array_train_the_lines_of_a_list(experiment: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.txt"
    lines = ["# what is compared", f"{experiment} output_dir={tmp_path}/plain steps=2", ""]
    lines += [f'{experiment} output_dir={tmp_path}/pcgrad steps={STEPS} "{PCGRAD}"']
    study.write_text("\n".join(lines) + "\n")
    options = ["--array=0-2", str(study), *TRAINING]
    array = submit(tmp_path / "%a.log", *options, script="array_study", nodes=1)
    beyond, plain, pcgrad = (Job(f"{array.number}_{i}", tmp_path / f"{i}.log") for i in range(3))
    # The number of an array's last task is that of the array; to requeue it by that would run all tasks again.
    reach(pcgrad, tmp_path / "pcgrad", 10)
    tool("scancel", "--batch", "--signal=USR1", pcgrad.number)
    pcgrad.must_complete(restarts=1)
    assert "surgery" in records(tmp_path / "pcgrad")[1]  # behind the start
    plain.must_complete()
    assert "surgery" not in records(tmp_path / "plain")[1]
    assert "1 process(es) on node" in plain.log and plain.log.count("start 1") == 1
    assert beyond.end()["ExitCode"] == "2:0"
    assert "has no line 0" in beyond.log


def test_workers_of_an_array_share_a_sweep(experiment: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space, out = tmp_path / "space.yaml", tmp_path / "sweep"
    space.write_text("seed: {low: 0, high: 99}\n")
    what = ["--space", str(space), "--trials", "3", "--out", str(out), f"steps={STEPS}", *TRAINING]
    array = submit(tmp_path / "%a.log", "--array=0-1", str(experiment), script="sweep", nodes=1, last=what)
    workers = [Job(f"{array.number}_{i}", tmp_path / f"{i}.log") for i in range(2)]
    reach(workers[1], out / "trials/1", 10)
    (holder,) = (each for each in workers if "trial 1  begins" in each.log)
    tool("scancel", "--batch", "--signal=USR1", holder.number)
    holder.must_complete(restarts=1)
    (other,) = (each for each in workers if each is not holder)
    other.must_complete()
    assert "saved; goes on when it is its turn again" in holder.log
    assert sum(worker.log.count("trial 1  goes on") for worker in workers) == 1
    rows = (out / "trials.csv").read_text().splitlines()[1:]
    assert [row.split(",")[:2] for row in rows] == [[str(number), "done"] for number in range(3)]
    logs = [(out / f"trials/{number}.log").read_text() for number in range(3)]
    assert sum(log.count("SIGTERM: saved after step") for log in logs) == 1
    assert sum(log.count("going on after step") for log in logs) == 1


def test_a_study_enters_the_queue_once_and_is_gathered(experiment: Path, tmp_path: Path) -> None:
    for key, steps in (("brief", 2), ("long", 2000)):
        text = experiment.read_text(encoding="utf-8").replace("steps: 6", f"steps: {steps}")
        (tmp_path / f"{key}.yaml").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mtl_dist", "study", str(tmp_path), "--out", str(out), "--slurm", *TRAINING]

    def study() -> str:
        return tool(*command, environment=of_a_user(SBATCH_GPUS_PER_NODE="0", SBATCH_NODES="1"))

    said = study()
    (number,) = re.findall(r"submitted 2 runs as job (\d+);", said)
    brief, long = (Job(f"{number}_{i}", out / f"slurm/{number}_{i}.log") for i in (1, 2))
    reach(long, out / "runs/long/seed-0", 10)
    brief.must_complete()
    said = study()
    assert "1 in the queue" in said and "1 of 2 runs done" in said and "submitted" not in said
    # What was cancelled is submitted once more, and goes on.
    tool("scancel", long.number)
    long.wait_until("cleared away", lambda: long.facts["JobState"] == "CANCELLED")
    said = study()
    assert "long seed-0: ended before it was done: " in said
    (again,) = re.findall(r"submitted 1 runs as job (\d+);", said)
    Job(f"{again}_1", out / f"slurm/{again}_1.log").must_complete()
    assert "going on after step" in (out / f"slurm/{again}_1.log").read_text()
    said = study()
    assert "2 of 2 runs done" in said and "submitted" not in said
    assert "| long | " in (out / "study.md").read_text()


def test_zero2_on_two_nodes_is_stopped_and_goes_on(experiment: Path, run: Path) -> None:
    pytest.importorskip("deepspeed")
    job = train(experiment, run, CONFIG="accelerate_configs/deepspeed_zero2.yaml")
    job.wait_until("starting", lambda: bool(processes(job, rank=0)))
    tool("scancel", "--batch", "--signal=USR1", job.number)  # while Python still imports
    job.must_complete(restarts=1)
    assert job.log.count("2 processes on CPU, 1 thread(s) each, ZeRO-2, fp32") == 2
    assert [r["step"] for r in records(run) if r["kind"] == "train"] == list(range(1, STEPS + 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where GPUs cannot be used")
def test_gpus_that_cannot_be_used_are_an_error(experiment: Path, run: Path) -> None:
    job = train(experiment, run, nodes=1, gpus=2)
    facts = job.end()
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    assert "2 process(es) on node" in job.log
    assert "distributed.device is 'cuda', but torch finds no CUDA device here" in job.log


def test_a_mistake_ends_the_job_before_anything_starts(tmp_path: Path) -> None:
    for command, answer in (([], "which experiment?"), (["configs/nothing.yaml"], "there is no configs/nothing.yaml")):
        job = submit(tmp_path / "log", *command)
        assert job.end()["ExitCode"] == "2:0"
        assert answer in job.log
        assert "start 1" not in job.log
