"""Studies of tiny configs, as a user starts them: what runs, what goes on, what is refused, what is written.

python -m pytest tests/studies/test_study.py
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mtl_dist.checkpoint import RunLock
from mtl_dist.cli import main
from mtl_dist.config import UserError, load
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment
from mtl_dist.runs.story import story_of
from mtl_dist.studies.plan import plan
from mtl_dist.studies.study import Gathering, Wanted, configs_of, scaled, tokens_of
from mtl_dist.training.setup import load_data
from tests.limits import limit

QUICK = ("steps=2", "log.tensorboard=false")


@pytest.fixture
def configs(tiny: Path) -> Path:
    """A folder of configs: two systems over a base, one that does not load and one that loads and crashes."""
    folder = tiny.parent / "configs"
    folder.mkdir()
    tiny.rename(folder / "base.yaml")
    written = {
        "joint": "",
        "alone": "tasks: {same: null, near: null}\nevaluate: {best_by: mood}\n",
        "crashes": "distributed: {processes: 2}\n",
        "wrong": "sede: 3\n",
    }
    for key, text in written.items():
        (folder / f"{key}.yaml").write_text(f"extends: base.yaml\n{text}")
    return folder


def study(configs: Path, *words: str) -> int:
    return main(["study", str(configs), "--out", str(configs.parent / "out"), *QUICK, *words])


def ended(out: Path) -> dict[str, float]:
    """When each run that is done came to its end, by its folder."""
    found = {}
    for folder in sorted(out.glob("runs/*/seed-*/")):
        story = story_of(folder)
        if story.ended:
            found[str(folder.relative_to(out / "runs"))] = story.records[-1]["time"]
    return found


@pytest.mark.timeout(400)
def test_a_study_from_its_first_run_to_its_last(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = configs.parent / "out"
    assert study(configs, "--jobs", "2") == 2
    said = capsys.readouterr()
    lines = [
        f"{configs}/wrong.yaml:2: the top level has no field 'sede'; did you mean 'seed'?",
        "crashes seed-0: distributed.processes is 2, but 1 started",
    ]
    assert len(said.err.splitlines()) == 2
    for line, expected in zip(said.err.splitlines(), lines, strict=True):
        assert line.startswith(expected)
    assert said.err.splitlines()[1].endswith(f"({out}/runs/crashes/seed-0.log)")
    assert f"2 of 3 runs done: {out}/study.md" in said.out
    first = ended(out)
    assert [*first] == ["alone/seed-0", "joint/seed-0"]
    text = (out / "study.md").read_text()
    assert "| crashes | 0 of 1 |" not in text and "| crashes | – |" in text
    assert "- `crashes seed-0`: distributed.processes is 2" in text
    assert text.startswith(f"# Study\n\n```bash\nmtl-dist study {configs} --out {out} steps=2 ")
    assert "What differs from the reports" not in text and "| key in which they differ |" in text

    # More seeds are more runs; what failed is tried again; what is not asked for stays in the table.
    (configs / "crashes.yaml").write_text("extends: base.yaml\noptim: {lr: 2.0e-3}\n")
    assert study(configs, "--jobs", "2", "--only", "crashes", "--only", "jo*", "--seeds", "2") == 0
    second = ended(out)
    assert [*second] == ["alone/seed-0", "crashes/seed-0", "crashes/seed-1", "joint/seed-0", "joint/seed-1"]
    assert {name: second[name] for name in first} == first
    assert story_of(out / "runs/joint/seed-1").config.seed == 1
    rows = [*csv.DictReader((out / "study.csv").open())]
    assert [(row["system"], row["seed"]) for row in rows] == [
        ("alone", "0"), ("crashes", "0"), ("crashes", "1"), ("joint", "0"), ("joint", "1"),
    ]  # fmt: skip
    best = story_of(out / "runs/joint/seed-1").best
    assert float(rows[4]["overall_b"]) == best["overall_b"] and rows[0]["overall_b"] == ""
    assert int(rows[4]["tokens"]) == story_of(out / "runs/joint/seed-1").tokens > 0

    document = json.loads((out / "study.json").read_text())
    (section,) = document["reports"]
    assert section["reference"] == "alone" and section["baselines"] == {"mood": "alone"}
    joint = section["rows"][2]
    assert joint["ours"]["overall_a"]["n"] == 2
    assert joint["difference"]["n"] == 1 and joint["difference"]["p"] is None  # by mood, of which alone has one seed
    assert Image.open(out / "study.png").width > 600

    # Nothing is left to do, so nothing is done; other settings are not mixed in.
    assert study(configs, "--only", "joint") == 0
    assert ended(out) == second
    capsys.readouterr()
    for words, key in (
        (("--scale", "2", "--only", "joint"), "steps was 2, and would be 4 now"),
        (("optim.lr=1", "--only", "joint"), "optim.lr was 0.001, and would be 1.0 now"),
    ):
        assert study(configs, *words) == 2
        error = capsys.readouterr().err
        assert key in error and error.rstrip().endswith("choose another --out") and error.count("\n") == 1
    assert ended(out) == second


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
@pytest.mark.timeout(400)
def test_a_killed_study_goes_on(configs: Path) -> None:
    for key in ("crashes", "wrong", "alone"):
        (configs / f"{key}.yaml").unlink()
    (configs / "brief.yaml").write_text("extends: base.yaml\nsteps: 2\n")
    (configs / "joint.yaml").write_text("extends: base.yaml\nsteps: 100000\nevaluate: {every_steps: 100000}\n")
    out = configs.parent / "out"
    command = [
        sys.executable,
        "-m",
        "mtl_dist",
        "study",
        str(configs),
        "--out",
        str(out),
        "checkpoint.every_steps=100000",
    ]
    log = out / "runs/joint/seed-0.log"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so do its own
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: log.exists() and "step 4/" in log.read_text())
        os.kill(process.pid, signal.SIGKILL)
    before = ended(out)
    assert [*before] == ["brief/seed-0"]
    # At once, while the run still saves: it is waited for.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: "going on after step" in log.read_text())
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait() == 130
    assert "stopping: 1 runs save what they have" in said
    assert "brief seed-0" not in said and "joint seed-0: started" in said
    assert f"1 of 2 runs done: {out}/study.md" in said
    assert "SIGTERM: saved after step" in log.read_text().splitlines()[-1]
    assert ended(out) == before
    # A run that is there and not asked for stays as it is.
    said = log.read_text()
    assert main([*command[3:], "--only", "brief"]) == 0
    assert log.read_text() == said and ended(out) == before
    assert "| joint |" in (out / "study.md").read_text()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + limit(150)
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_configs_of_a_folder_are_those_that_no_other_one_extends(configs: Path, tmp_path: Path) -> None:
    (configs / "published.yaml").write_text("reports: {}\n")
    (configs / "notes.txt").write_text("")
    (configs / "broken.yaml").write_text("a: [\n")
    assert [path.stem for path in configs_of([configs])] == ["alone", "broken", "crashes", "joint", "wrong"]
    assert configs_of([configs / "base.yaml", configs / "joint.yaml"]) == [
        configs / "base.yaml",
        configs / "joint.yaml",
    ]
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match=f"{other}: no \\*.yaml in this folder"):
        configs_of([other])
    (other / "joint.yaml").write_text("")
    with pytest.raises(UserError, match="have the same name, by which a study knows them; rename one of them"):
        configs_of([configs, other])
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        configs_of([tmp_path / "nowhere"])


STAGES = "stages=[{epochs: 3}, {steps: 40, schedule: {kind: linear, warmup_steps: 9}}, {mixer: unimax}, {steps: 1}]"


@pytest.mark.parametrize(
    ("overrides", "scale", "expected"),
    [
        ([], 1, []),
        ([], 0.5, ["steps=3"]),
        ([], 0.01, ["steps=1"]),
        (["steps=null", "epochs=20"], 0.1, ["epochs=2"]),
        (["steps=null", "epochs=3"], 0.1, ["epochs=0.3"]),
        (["steps=null"], 0.25, ["epochs=0.25"]),  # one epoch, where nothing is said
        (["steps=null", "epochs=0"], 0.1, ["epochs=0"]),
        (["optim.schedule={kind: constant, warmup_steps: 10}"], 0.5, ["steps=3", "optim.schedule.warmup_steps=5"]),
        (["mixer={kind: unimax, max_epochs: 4}"], 0.1, ["steps=1", "mixer.max_epochs=0.4"]),
        (
            ["steps=null", "epochs=10", STAGES],
            0.1,
            [
                "epochs=1", "stages.0.epochs=0.3", "stages.1.steps=4", "stages.1.schedule.warmup_steps=1",
                "stages.2.mixer.max_epochs=0.4", "stages.3.steps=1",
            ],
        ),
    ],
)  # fmt: skip
def test_a_scale_multiplies_every_length(tiny: Path, overrides: list[str], scale: float, expected: list[str]) -> None:
    found = scaled(load(Experiment, tiny, overrides), scale)
    assert found == expected
    load(Experiment, tiny, [*overrides, *found])


def test_learning_rates_are_scaled_alike(tiny: Path) -> None:
    assert scaled(load(Experiment, tiny, ["optim.lr=2e-5"]), 1, 5) == ["optim.lr=0.0001"]
    overrides = ["optim.lr=2e-5", "stages=[{lr: 1.0e-3}, {steps: 2}, {trains: heads}]"]
    found = scaled(load(Experiment, tiny, overrides), 1, 5)
    assert found == ["stages.0.lr=0.005", "stages.1.lr=0.0001"]
    stages = load(Experiment, tiny, [*overrides, *found]).all_stages()
    assert [stage.optim.lr for stage in stages] == [5e-3, 1e-4, 2e-5]  # heads know nothing of another encoder


def test_a_folder_with_any_name_is_one_folder(configs: Path) -> None:
    out = configs.parent / "a #1: [x]"
    paths = configs_of([configs / "joint.yaml"])
    with RunLock() as lock:
        runs = Gathering(Wanted(paths, [*QUICK], out, seeds=2), Console(quiet=True), lock).runs
    assert [run.folder for run in runs] == [out / "runs/joint/seed-0", out / "runs/joint/seed-1"]


def test_two_studies_do_not_share_a_folder(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock() as lock:
        lock.take(configs.parent / "out", 0, print)
        assert study(configs) == 2
    assert capsys.readouterr().err.startswith(f"--out: process {os.getpid()} on ")


def test_the_tokens_to_come_are_those_of_plan(tiny: Path) -> None:
    words = "stages=[{objective: mlm, steps: 2}, {steps: 3}]"
    config = load(Experiment, tiny, ["steps=null", words, "tasks.mood.r_drop=1"])
    tokenizer = load_tokenizer(config.encoder.tokenizer_source)
    console = Console(quiet=True)
    planned = plan(config, tokenizer, load_data(config, tokenizer, console), 1, "ddp", "fp32")
    assert tokens_of(config, console) == pytest.approx(planned.tokens)


def test_mistakes_are_one_line(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (configs / "file").write_text("")
    for words, expected in (
        (["--seeds", "0"], "--seeds is 0; give a number above 0"),
        (["--jobs", "-1"], "--jobs is -1; give a number above 0"),
        (["--scale", "nan"], "--scale is nan; give a number above 0"),
        (["--lr-scale", "0"], "--lr-scale is 0; give a number above 0"),
        (["--only", "x*"], "--only x* fits no config; there are alone, crashes, joint, wrong"),
        (["--only", "joint", "--only", "y"], "--only y fits no config; there are alone, crashes, joint, wrong"),
        (["stages=[" + ", ".join(["{steps: 1}"] * 40) + "]", "sede=1", "--only", "joint"], "joint: override 'sede=1'"),
        (["seed=3"], "override 'seed=3': a study sets this for every run; see --out and --seeds"),
        (["--out", str(configs / "file")], f"--out {configs}/file is a file; give a folder"),
        (["sede=3", "--only", "joint"], "joint: override 'sede=3': the top level has no field 'sede'"),
        (
            ["data_dir=/nowhere"],
            f"alone, crashes, joint: {configs}/base.yaml:16: tasks.mood.train: cannot read /nowhere/",
        ),
    ):
        assert study(configs, *words) == 2
        assert expected in capsys.readouterr().err
    assert main(["study", "--out", "x", "epochs=1"]) == 2
    assert capsys.readouterr().err == "which configs? give files, or folders of them\n"
    assert not (configs.parent / "out").exists()


def test_slurm_says_what_is_missing(
    configs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(configs)
    assert study(configs, "--slurm", "--only", "joint") == 2
    assert "--slurm: there is no slurm/array_study.sbatch in" in capsys.readouterr().err
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("PATH", "/nowhere")
    assert study(configs, "--slurm", "--only", "joint") == 2
    assert "--slurm: there is no sbatch on this machine" in capsys.readouterr().err
