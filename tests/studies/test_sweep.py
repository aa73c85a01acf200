"""Sweeps, with real runs: what each trial trains, what becomes of it, and that no trial is lost or trained twice.

python -m pytest tests/studies/test_sweep.py
"""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from rich.console import Console

from mtl_dist.checkpoint import RunLock
from mtl_dist.cli import main
from mtl_dist.config import UserError, load
from mtl_dist.experiment import Experiment
from mtl_dist.runs.story import story_of
from mtl_dist.studies.sweep import Sweep, _Screen
from tests.limits import limit

SPACE = "optim.lr: {low: 1e-4, high: 1e-2, log: true}\n"
SLOW = ("steps=100000", "evaluate.every_steps=5", "log={every_steps: 1, tensorboard: false}")


def write_space(tiny: Path, text: str = SPACE) -> Path:
    path = tiny.parent / "space.yaml"
    path.write_text(text)
    return path


def command(tiny: Path, trials: int, *rest: str) -> list[str]:
    return ["sweep", str(tiny), "--space", str(tiny.parent / "space.yaml"), "--trials", str(trials), *rest]


def started(tiny: Path, trials: int, *rest: str) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-m", "mtl_dist", *command(tiny, trials, *rest)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + limit(120)
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def table(sweep: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((sweep / "trials.csv").open(newline="")))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return output.err


def sweep_of(tiny: Path, most: int = 9) -> Sweep:
    """A sweep whose study is in memory, and which trains nothing."""
    sweep = Sweep(tiny, [], tiny.parent / "space.yaml", tiny.parent / "run-sweep", 0, Console(file=io.StringIO()))
    (sweep.out / "trials").mkdir(parents=True, exist_ok=True)
    sweep.study = optuna.create_study(direction="maximize")
    sweep.most = most
    return sweep


def said(sweep: Sweep) -> str:
    assert isinstance(sweep.console.file, io.StringIO)
    return sweep.console.file.getvalue()


def test_a_sweep_from_its_first_trial_to_its_best(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tiny.parent / "run-sweep"
    # Whether a data file is there is seen when a run reads it: such a trial fails, and the others go on.
    write_space(tiny, SPACE + "tasks.mood.train: {choices: [mood-train.tsv, none.tsv]}\nseed: {low: 0, high: 9}\n")
    assert main(command(tiny, 4, "steps=3", "--jobs", "2", "--seed", "1")) == 0
    shown = capsys.readouterr().out
    assert "the first trial has the config's own values\n" in shown

    rows = table(sweep)
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3"]
    assert (rows[0]["optim.lr"], rows[0]["tasks.mood.train"], rows[0]["seed"]) == ("0.001", "mood-train.tsv", "0")
    done = [row for row in rows if row["tasks.mood.train"] == "mood-train.tsv"]
    failed = [row for row in rows if row not in done]
    assert len(done) >= 2 and len(failed) >= 1  # as seed 1 draws them
    for row in done:
        story = story_of(sweep / "trials" / row["trial"])
        assert row["state"] == "done" and story.ended
        config = story.config
        assert [str(config.optim.lr), str(config.seed), str(config.steps)] == [row["optim.lr"], row["seed"], "3"]
        assert config.output_dir == story.folder
        (scores,) = story.of_kind("dev")
        assert float(row["score"]) == scores["overall_a"]
        assert not (story.folder / "checkpoints").exists()
    for row in failed:
        reason = f"override 'tasks.mood.train=none.tsv': tasks.mood.train: cannot read {tiny.parent}/none.tsv"
        assert row["state"] == "failed" and row["reason"] == f"{reason}: No such file or directory"
        assert f"trial {row['trial']}  failed: {reason}" in shown
    best = max(done, key=lambda row: float(row["score"]))
    kept = [path.parent.name for path in (sweep / "trials").glob("*/best")]
    assert kept == [best["trial"]]
    assert f"the best is trial {best['trial']}: overall_a {float(best['score']):.4f}" in shown

    mine = load(Experiment, sweep / "best.yaml")
    trial = story_of(sweep / "trials" / best["trial"]).config
    assert mine == trial.model_copy(update={"output_dir": sweep / "best"})
    assert "extends: ../tiny.yaml\n" in (sweep / "best.yaml").read_text()
    assert (sweep / "history.png").exists() and not (sweep / "importance.png").exists()
    assert "no importance.png: it needs 10 trials that came to their end" in shown

    # The same command has nothing left to do.
    before = (sweep / "trials.csv").read_bytes()
    assert main(command(tiny, 4, "steps=3", "--jobs", "2", "--seed", "1")) == 0
    assert "going on after 4 trials\n" in capsys.readouterr().out
    assert (sweep / "trials.csv").read_bytes() == before
    assert len(list((sweep / "trials").glob("*.log"))) == 4

    # What was found out is there again when it is gone.
    (sweep / "best.yaml").unlink()
    assert main(command(tiny, 4, "steps=3")) == 0
    assert load(Experiment, sweep / "best.yaml") == mine

    # Nothing else goes on in its folder.
    other = tiny.with_name("other.yaml")
    other.write_text(tiny.read_text())
    assert main(command(other, 4, "steps=3")) == 0  # the same under another name
    assert refused(capsys, *command(tiny, 4, "steps=4")) == (
        f"{sweep}: was begun with config.steps = 3, and this is 4; "
        "give what it was begun with, or choose another --out\n"
    )
    write_space(tiny, (tiny.parent / "space.yaml").read_text().replace("high: 9", "high: 8"))
    assert refused(capsys, *command(tiny, 4, "steps=3")) == (
        f"{sweep}: was begun with space.seed.high = 9, and this is 8; "
        "give what it was begun with, or choose another --out\n"
    )
    assert refused(capsys, *command(tiny, 4, "steps=3", "--storage", "journal")) == (
        f"--storage is journal, but {sweep} was begun with sqlite; choose another --out\n"
    )


def test_when_the_first_trials_fail_the_sweep_ends(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Each fits the config, but no two of them fit together.
    write_space(tiny, "gradients.combiner: {choices: [pcgrad]}\nmixer: {choices: [round_robin, sequential]}\n")
    line = refused(capsys, *command(tiny, 9, "--jobs", "2"))
    why = r"mixer (round_robin|sequential) draws one task a step, but gradients.combiner pcgrad needs several"
    assert re.fullmatch(rf"the first 3 trials failed, the last with: override '.*': {why}.*\n", line), line
    assert [row["state"] for row in table(tiny.parent / "run-sweep")].count("failed") == 3


def test_a_trial_worse_than_the_others_is_stopped_early(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_space(tiny)
    sweep = tiny.parent / "run-sweep"
    study = optuna.create_study(storage=f"sqlite:///{tiny.parent}/others.db", study_name="tiny", direction="maximize")
    distributions = {"optim.lr": FloatDistribution(1e-4, 1e-2, log=True)}
    for _ in range(5):  # all tasks at full score
        study.add_trial(
            create_trial(
                value=1.0, params={"optim.lr": 2e-3}, distributions=distributions, intermediate_values={0: 1.0, 1: 1.0}
            )
        )
    sweep.mkdir()
    (tiny.parent / "others.db").rename(sweep / "sweep.db")
    # The first trial is what the config has; it is the sixth of them all.
    assert main(command(tiny, 6, *SLOW)) == 0
    shown = capsys.readouterr().out
    assert re.search(r"trial 5  pruned after evaluation \d+: overall_a 0\.\d{4}  optim.lr=0.001\n", shown), shown
    study = optuna.load_study(storage=f"sqlite:///{sweep}/sweep.db", study_name="tiny")
    pruned = study.trials[5]
    assert pruned.state == TrialState.PRUNED
    story = story_of(sweep / "trials/5")
    scores = [record["overall_a"] for record in story.of_kind("dev")]
    assert not story.ended and story.records[-1]["step"] < 100_000
    assert list(pruned.intermediate_values.items()) == list(enumerate(scores))
    assert "SIGTERM: saved after step" in (sweep / "trials/5.log").read_text()
    assert sorted(path.name for path in story.folder.iterdir() if path.is_dir()) == []  # no checkpoints, no weights


def test_one_process_at_a_time_sweeps_with_sqlite(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_space(tiny)
    sweep = tiny.parent / "run-sweep"
    with started(tiny, 1, *SLOW) as first:
        until((sweep / "trials/0.log").exists)
        assert refused(capsys, *command(tiny, 1, *SLOW)) == (
            f"--out: another process sweeps in {sweep}; wait for its end, or begin a sweep that several share: "
            "--storage journal\n"
        )
        first.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_stopped_or_killed_it_goes_on_and_no_trial_is_lost(tiny: Path) -> None:
    write_space(tiny)
    sweep = tiny.parent / "run-sweep"
    log = sweep / "trials/0.log"
    run = [*SLOW[1:], "steps=400"]
    with started(tiny, 2, *run) as first:
        until(lambda: log.exists() and "step 10/" in log.read_text())
        first.send_signal(signal.SIGTERM)
        shown, _ = first.communicate()
        assert shown.endswith("SIGTERM: stopped; the same command goes on\n") and first.returncode == 130
    (saved,) = re.findall(r"SIGTERM: saved after step (\d+) of 400", log.read_text())

    with started(tiny, 2, *run) as third:
        until(lambda: f"step {int(saved) + 10}/" in log.read_text())
        os.kill(third.pid, signal.SIGKILL)
    with started(tiny, 2, *run) as fourth:
        shown, _ = fourth.communicate()
        assert fourth.returncode == 0 and "going on after 0 trials\n" in shown
        assert "trial 0  goes on" in shown and "trial 1  begins" in shown
    assert log.read_text().count("going on after step") == 2
    assert f"going on after step {saved} of" in log.read_text()
    assert [(row["trial"], row["state"], row["evaluations"]) for row in table(sweep)] == [
        ("0", "done", "80"),
        ("1", "done", "80"),
    ]
    assert sorted(path.name for path in (sweep / "trials").glob("*.log")) == ["0.log", "1.log"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_becomes_of_runs_that_somebody_else_ends(tiny: Path) -> None:
    write_space(tiny)
    logs = [tiny.parent / f"run-sweep/trials/{number}.log" for number in range(2)]
    with started(tiny, 2, *SLOW, "--jobs", "2") as sweep:
        until(lambda: all(log.exists() and "step 4/" in log.read_text() for log in logs))
        children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()
        for child, number in zip(children, (signal.SIGTERM, signal.SIGKILL), strict=True):
            os.kill(int(child), number)
        shown, _ = sweep.communicate()
    assert "trial 0  was stopped by somebody else, and is left to go on" in shown
    assert f"trial 1  failed: killed by SIGKILL ({logs[1]})" in shown
    assert shown.endswith("trials: 0 done, 1 failed, 1 under way\n") and sweep.returncode == 0


def test_processes_share_a_journal(tiny: Path) -> None:
    write_space(tiny)
    several = [started(tiny, 3, "steps=3", "--storage", "journal") for _ in range(2)]
    shown = [process.communicate()[0] for process in several]
    assert [process.returncode for process in several] == [0, 0], shown
    ended = [re.findall(r"^trial (\d)  overall_a", text, re.MULTILINE) for text in shown]
    assert sorted(ended[0] + ended[1]) == ["0", "1", "2"] and all(ended)
    sweep = tiny.parent / "run-sweep"
    assert [row["state"] for row in table(sweep)] == ["done"] * 3
    assert len({row["optim.lr"] for row in table(sweep)}) == 3  # none drew what another had drawn
    one_begins = [("the first trial has the config's own values" in text, "going on after" in text) for text in shown]
    assert sorted(one_begins) == [(False, True), (True, False)]


def test_mistakes_are_one_line(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    space, folder = write_space(tiny, "optim.lrr: {low: 1e-5, high: 1e-4}\n"), tiny.parent
    assert refused(capsys, *command(tiny, 2)) == f"{space}:1: optim has no field 'lrr'; did you mean 'lr'?\n"
    write_space(tiny)
    assert refused(capsys, *command(tiny, 0)) == "--trials is 0; give 1 or more\n"
    assert refused(capsys, *command(tiny, 1, "--jobs", "0")) == "--jobs is 0; give 1 or more\n"
    assert refused(capsys, *command(tiny, 1, "sede=1")).startswith("override 'sede=1': the top level has no field")
    assert refused(capsys, *command(folder / "no.yaml", 1)) == f"{folder}/no.yaml: No such file or directory\n"
    assert refused(capsys, *command(tiny, 1, "--out", str(folder))).startswith(f"--out: {folder} holds ")
    assert refused(capsys, *command(tiny, 1, "--out", "/proc/x")).startswith("--out: cannot write /proc/x: ")
    assert refused(capsys, *command(tiny, 1, "output_dir=.")) == (
        "output_dir is ., and the sweep's folder would be beside it; name one by --out\n"
    )
    without = [f"tasks.{task}.dev=null" for task in ("mood", "same", "near")]
    assert refused(capsys, *command(tiny, 1, *without)) == (
        f"{tiny}: no task has a dev set, so no trial is better than another; give one to a task\n"
    )
    assert not (folder / "run-sweep").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert refused(capsys, *command(tiny, 1)) == (
        "a sweep starts its processes itself: leave `accelerate launch -m` away, and say --jobs\n"
    )


def test_a_file_that_is_no_study_is_named(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_space(tiny)
    for storage in ("db", "journal"):
        sweep = tiny.parent / storage
        sweep.mkdir()
        (sweep / f"sweep.{storage}").write_text("nothing of the kind\n")
        line = refused(capsys, *command(tiny, 1, "--out", str(sweep)))
        assert line.startswith(f"{sweep}/sweep.{storage}: not a study that can be opened (")
        assert line.endswith("); choose another --out\n") and line.count("\n") == 1


def test_a_folder_of_any_name_holds_all_of_a_sweep(tiny: Path) -> None:
    write_space(tiny)
    sweep = tiny.parent / "a # b: [c] *d what?x 100%20x {y}"
    for storage in ("sqlite", "journal"):
        out = sweep / storage
        assert (
            main(command(tiny, 1, "log=\n  every_steps: 1\n", "steps=1", "--out", str(out), "--storage", storage)) == 0
        )
        assert {path.name for path in out.iterdir()} >= {"trials", "trials.csv", "best.yaml", "history.png"}
        assert (out / {"sqlite": "sweep.db", "journal": "sweep.journal"}[storage]).stat().st_size > 0
        assert story_of(out / "trials/0").ended
        assert load(Experiment, out / "best.yaml").output_dir == out / "best"
    assert {path.name for path in sweep.iterdir()} == {"sqlite", "journal"}


def test_runs_that_are_no_sweeps_are_left_alone(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_space(tiny)
    mine = tiny.parent / "run-sweep/trials/0"
    (mine / "best").mkdir(parents=True)
    assert refused(capsys, *command(tiny, 1)) == (
        f"--out: {tiny.parent}/run-sweep holds trials/0, not a sweep; choose another folder\n"
    )
    assert (mine / "best").is_dir() and not (mine.parent / "0.lock").exists()


def test_a_trial_whose_run_still_saves_is_taken_over_when_it_has_ended(tiny: Path) -> None:
    write_space(tiny)
    study = optuna.create_study(storage=f"sqlite:///{tiny.parent}/others.db", study_name="tiny", direction="maximize")
    study.ask()  # by a worker that was killed
    run = tiny.parent / "run-sweep/trials/0"
    run.parent.mkdir(parents=True)
    (tiny.parent / "others.db").rename(tiny.parent / "run-sweep/sweep.db")
    with RunLock() as lock:
        lock.take(run, 0, print)
        sweep = started(tiny, 1, "steps=1")
        assert sweep.stdout is not None
        shown = iter(sweep.stdout.readline, "")
        waits = "trial 0  was left by its worker, and its run still saves; waiting for its end\n"
        assert waits in shown  # and read no further
        assert not run.with_suffix(".log").exists()
    rest, _ = sweep.communicate()
    assert sweep.returncode == 0 and "trial 0  goes on" in rest and waits not in rest
    assert [(row["trial"], row["state"]) for row in table(tiny.parent / "run-sweep")] == [("0", "done")]


def test_nothing_is_removed_from_under_a_run_that_still_saves(tiny: Path) -> None:
    write_space(tiny)
    sweep = sweep_of(tiny)
    sweep.study.add_trial(create_trial(state=TrialState.FAIL))
    checkpoints = sweep.folder_of(0) / "checkpoints"
    (checkpoints / "step-00000003").mkdir(parents=True)
    with RunLock() as lock:
        lock.take(sweep.folder_of(0), 0, print)
        sweep._tidy()
        assert (checkpoints / "step-00000003").is_dir()
    sweep._tidy()
    assert not checkpoints.exists()


def test_where_all_trials_failed_the_same_command_begins_anew(tiny: Path) -> None:
    write_space(tiny)
    about = {"space": {"optim.lr": 1}, "config": {"steps": 6}}
    sweep = sweep_of(tiny, most=3)
    sweep._begin(about)
    first = [sweep._next() for _ in range(4)]
    assert [each and each.trial.number for each in first] == [0, 1, 2, None]
    for each in first[:3]:
        assert each is not None
        sweep.study.tell(each.trial, state=TrialState.FAIL)

    # The same, or one that was mended; numbers go on, and the config's own values come first again.
    mended = about | {"config": {"steps": 7}}
    sweep._begin(mended)
    assert f"{sweep.out}: all of its 3 trials failed; beginning anew\n" in said(sweep)
    second = [sweep._next() for _ in range(4)]
    assert [each and each.trial.number for each in second] == [3, 4, 5, None]
    own = second[0]
    assert own is not None and own.trial.params == {"optim.lr": 1e-3} and own.trial.user_attrs["own"]
    sweep.study.tell(own.trial, 0.5)
    for each in second[1:3]:
        assert each is not None
        sweep.study.tell(each.trial, state=TrialState.FAIL)

    # Where one came to its end, those that failed are not tried again, and the config stays.
    sweep._begin(mended)
    assert "going on after 6 trials" in said(sweep) and sweep._next() is None
    with pytest.raises(UserError, match=r"was begun with config\.steps = 7, and this is 6; give what it was begun"):
        sweep._begin(about)


def test_what_a_run_tells_is_read_on(tiny: Path) -> None:
    write_space(tiny)
    sweep = sweep_of(tiny)
    each = sweep._next()
    assert each is not None and not each.read()

    def lines(*records: dict[str, object]) -> bytes:
        return b"".join(json.dumps(record).encode() + b"\n" for record in records)

    def dev(step: int, score: float) -> dict[str, object]:
        return {"kind": "dev", "step": step, "tasks": {"mood": {}}, "overall_a": score}

    each.folder.mkdir()
    file, draft = each.folder / "metrics.jsonl", each.folder / "draft"
    begun = lines({"kind": "start", "step": 0, "steps": 9}, dev(3, 0.25))
    cut = lines(dev(6, 0.5))
    file.write_bytes(begun + cut[:9])
    assert each.read() and not each.read()
    assert (each.told.steps, each.told.step, each.told.scores) == (9, 3, [0.25])
    with file.open("r+b") as written:  # what was read is not read again
        written.write(b"x" * len(begun))
        written.seek(0, os.SEEK_END)
        written.write(cut[9:])
    assert each.read()
    assert (each.told.steps, each.told.step, each.told.scores) == (9, 6, [0.25, 0.5])
    # A run that goes on replaces it.
    draft.write_bytes(begun + lines({"kind": "end", "step": 3}))
    draft.replace(file)
    assert each.read()
    assert (each.told.step, each.told.scores, each.told.ended) == (3, [0.25], True)


def test_eight_trials_under_way_fit_a_terminal(tiny: Path) -> None:
    keys = {
        "optim.lr": "{low: 1e-5, high: 2e-4, log: true}",
        "tasks.mood.dropout": "{low: 0.0, high: 0.3, step: 0.1}",
        "tasks.mood.batch_size": "{low: 16, high: 64, log: true}",
        "tasks.same.head": "{choices: [sbert, cross_encoder]}",
        "mixer": "{choices: [joint, round_robin]}",
    }
    write_space(tiny, "\n".join(f"{key}: {drawn}" for key, drawn in keys.items()))
    sweep = sweep_of(tiny)
    sweep.running = [each for each in (sweep._next() for _ in range(9)) if each]
    sweep.study.tell(sweep.running.pop(0).trial, 0.75)
    for each in sweep.running:
        each.told.steps, each.told.step, each.told.scores = 10_000, 8_000, [0.5]
    console = Console(file=io.StringIO(), width=80)
    console.print(_Screen(sweep))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue().splitlines()
    assert len(shown) <= 24 and max(map(len, shown)) <= 80
    rows = [line.split() for line in shown]
    assert ["best:", "0", "0.7500"] in [row[:3] for row in rows]
    for each in sweep.running:
        (place,) = (place for place, row in enumerate(rows) if row[0] == each.job.name)
        params = {key.rpartition(".")[2]: value for key, value in each.trial.params.items()}
        values = [f"lr={params['lr']:.4g}", f"dropout={params['dropout']:.4g}", f"batch_size={params['batch_size']}"]
        values += [f"head={params['head']}", f"mixer={params['mixer']}"]
        assert (rows[place] + rows[place + 1])[1:] == ["8,000/10,000", "0.5000", *values]
