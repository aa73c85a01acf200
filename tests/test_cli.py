"""The command as a shell sees it: exit codes, and one line where the user got something wrong."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

from mtl_dist.cli import main


def seconds_of_python(*arguments: str) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def test_help_answers_at_once() -> None:
    torch, _ = seconds_of_python("-c", "import torch")
    times, texts = zip(*(seconds_of_python("-m", "mtl_dist", "--help") for _ in range(3)), strict=True)
    assert "train an experiment" in texts[0]
    assert median(times) < torch / 3  # about a tenth


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What standard error says of a command that ends with exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return output.err


def test_mistakes_are_one_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.parent
    assert refused(capsys, "validate", folder / "none.yaml") == f"{folder}/none.yaml: No such file or directory\n"
    assert refused(capsys, "train", tiny, "tasks.mood.hed=1").startswith(
        "override 'tasks.mood.hed=1': tasks.mood has no field 'hed'; did you mean 'head'?"
    )
    assert refused(capsys, "train", tiny, "encoder.tokenizer=no/such-model").startswith("no/such-model: no such folder")
    assert refused(capsys, "validate", tiny, "tasks.mood.train=none.tsv").startswith("cannot read ")
    assert refused(capsys, "eval", folder).startswith(f"{folder}/config.yaml: No such file")
    assert refused(capsys, "train", tiny, "precision=fp16", "distributed.device=cpu").startswith("precision fp16 needs")
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2


def test_overrides_may_stand_behind_options(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(tiny), "seed=1", "--json", "seed=2"]) == 0
    capsys.readouterr()
    assert "cannot read" in refused(capsys, "validate", tiny, "--json", "tasks.mood.train=none.tsv")
    for wrong in (["schema", "x=1"], ["validate", str(tiny), "--jsn"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "output_dir" in schema["properties"]
    # A file that extends another one need not be whole.
    assert schema["anyOf"] == [{"required": ["extends"]}, {"required": ["output_dir", "encoder", "tasks"]}]


def test_doctor_says_the_same_twice(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["python"] == platform.python_version()
    assert all(f"{engine} {answer}" in shown for engine, answer in found["engines"].items())
    monkeypatch.setenv("RANK", "1")
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == ""  # only one process talks


def test_validate_counts_rows(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(tiny)]) == 0
    assert "mood train: 40 rows, 0 skipped\n" in capsys.readouterr().out
    assert main(["validate", str(tiny), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["near dev"] == {"usable": 5, "rejected": 0}


def test_validate_reports_every_problem_at_once(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny.parent / "near-dev.tsv").write_text("sentence1\tsentence2\tlabel\nbam\tbat\t9\n")
    wrong = ["encoder.tokenizer=/nope", "tasks.same.max_length=65", "tasks.mood.train=none.tsv"]
    lines = refused(capsys, "validate", tiny, *wrong).splitlines()
    assert [line.partition(" ")[0] for line in lines] == [
        "/nope:",
        "cannot",
        "tasks.same.max_length",
        f"{tiny.parent}/near-dev.tsv:2:",
    ]
    assert main(["validate", str(tiny), "tasks.near.bad_rows=skip", "tasks.near.dev=null"]) == 0
    capsys.readouterr()
    assert main(["validate", str(tiny), "tasks.near.dev=null", "tasks.mood.test=later.tsv"]) == 0
    assert "mood test: " in capsys.readouterr().err


def test_from_training_to_predictions(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.parent / "run"
    assert main(["prepare", str(tiny)]) == 0
    assert main(["train", str(tiny), "steps=2", "distributed.processes=1"]) == 0
    assert "TensorBoard  tensorboard --logdir" in capsys.readouterr().out

    assert main(["eval", str(run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["tasks"]["mood"]["rows"] == 5
    assert main(["eval", str(run)]) == 0
    assert "overall_b" in capsys.readouterr().out
    assert "no task of this run has a test set" in refused(capsys, "eval", run, "--split", "test")

    labelled = tiny.parent / "mood-dev.tsv"
    unlabelled = tiny.parent / "unlabelled.csv"
    rows = [line.split("\t") for line in labelled.read_text().splitlines()]
    unlabelled.write_text("\n".join(f"{name},{text}" for name, text, _ in rows) + "\n")
    outputs = []
    for file, out in ((labelled, "a.csv"), (unlabelled, "b.csv"), (labelled, "c.jsonl")):
        assert main(["predict", str(run), "--task", "mood", str(file), "--out", str(tiny.parent / "out" / out)]) == 0
        assert capsys.readouterr().out == f"{tiny.parent / 'out' / out}: 5 predictions\n"
        outputs.append((tiny.parent / "out" / out).read_text())
    assert outputs[0] == outputs[1]
    header, *lines = outputs[0].splitlines()
    assert header == "id, Predicted_Label"
    predictions = [json.loads(line) for line in outputs[2].splitlines()]
    assert lines == [f"{row['id']}, {row['prediction']}" for row in predictions]
    assert [row["id"] for row in predictions] == [f"mood{i}" for i in range(5)]
    gold = [int(label) for _, _, label in rows[1:]]
    right = sum(row["prediction"] == label for row, label in zip(predictions, gold, strict=True))
    assert right / 5 == scores["tasks"]["mood"]["accuracy"]
    blank = tiny.parent / "blank.tsv"
    blank.write_text("id\tsentence\na\tbam\nb\t \n")
    to = ["--out", str(tiny.parent / "some.csv")]
    assert "blank.tsv:3: sentence is blank" in refused(capsys, "predict", run, "--task", "mood", blank, *to)
    assert main(["predict", str(run), "--task", "mood", str(blank), *to, "tasks.mood.bad_rows=skip"]) == 0
    assert "1 rows have no prediction, the first is" in capsys.readouterr().err
    assert "cannot write /proc/x/y.csv" in refused(
        capsys, "predict", run, "--task", "mood", labelled, "--out", "/proc/x/y.csv"
    )
    assert "the file to read; choose another" in refused(
        capsys, "predict", run, "--task", "mood", labelled, "--out", labelled
    )
    assert "has no task 'mod'; it has mood, same, near" in refused(
        capsys, "predict", run, "--task", "mod", labelled, "--out", tiny.parent / "x.csv"
    )


def test_two_processes_through_accelerate(tiny: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--config_file", str(Path(__file__).parents[1] / "accelerate_configs" / "cpu_2proc.yaml")]
    command = [*launch, "-m", "mtl_dist", "train", str(tiny), "steps=2", "distributed.processes=2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "2 processes on CPU" in done.stdout
    assert done.stdout.count("best model") == 1  # only one of them talks

    wrong = subprocess.run([*command, "epocs=1"], capture_output=True, text=True, env=environment)
    assert wrong.returncode != 0
    assert wrong.stderr.count("override 'epocs=1': the top level has no field 'epocs'; did you mean 'epochs'?") == 1
