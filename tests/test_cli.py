"""The command as a shell sees it: exit codes, and one line where the user got something wrong."""

import csv
import json
import os
import platform
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path
from statistics import median
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from mtl_dist.cli import main
from mtl_dist.config import UserError
from mtl_dist.data.packed import Packed
from mtl_dist.model.multitask import MultiTaskModel


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
    assert refused(capsys, "validate", tiny, "tasks.mood.train=none.tsv") == (
        "override 'tasks.mood.train=none.tsv': tasks.mood.train: "
        f"cannot read {folder}/none.tsv: No such file or directory\n"
    )
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
        "override",
        "tasks.same.max_length",
        f"{tiny.parent}/near-dev.tsv:2:",
    ]
    assert main(["validate", str(tiny), "tasks.near.bad_rows=skip", "tasks.near.dev=null"]) == 0
    capsys.readouterr()
    assert main(["validate", str(tiny), "tasks.near.dev=null", "tasks.mood.test=later.tsv"]) == 0
    assert "mood test: " in capsys.readouterr().err


def test_what_validate_remarks_does_not_hide_what_is_wrong(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dev = tiny.parent / "mood-dev.tsv"
    dev.write_text((tiny.parent / "mood-train.tsv").read_text())
    assert main(["validate", str(tiny)]) == 0
    assert "mood dev: 40 of 40 rows are also in train" in capsys.readouterr().err
    (tiny.parent / "near-train.tsv").unlink()
    assert len(refused(capsys, "validate", tiny, "tasks.mood.test=later.tsv").splitlines()) == 1


@pytest.mark.parametrize("command", ["validate", "prepare", "train", "plan"])
def test_a_data_file_that_is_missing_or_empty_is_named_with_its_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    line = 1 + tiny.read_text().splitlines().index("    dev: same-dev.tsv")
    path = tiny.parent / "same-dev.tsv"
    path.unlink()
    assert refused(capsys, command, tiny) == (
        f"{tiny}:{line}: tasks.same.dev: cannot read {path}: No such file or directory\n"
    )
    path.touch()
    assert refused(capsys, command, tiny) == f"{tiny}:{line}: tasks.same.dev: {path} is empty\n"
    path.write_text("id\tsentence\tlabel\n")
    assert refused(capsys, command, tiny).startswith(
        f"{tiny}:{line}: tasks.same.dev: {path} has no column 'sentence1'; did you mean 'sentence'?"
    )


def test_words_for_yes_and_no_are_named(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.parent / "same-train.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    words = ["label", *("yes" if label == "1" else "no" for *_, label in rows[1:])]
    path.write_text("".join("\t".join([*row[:-1], word]) + "\n" for row, word in zip(rows, words, strict=True)))
    lines = refused(capsys, "validate", tiny).splitlines()
    assert lines[0].startswith(
        f"{path}:2: label is '{words[1]}', not a number; for words say label: {{kind: binary, names: "
    )
    assert lines[-1] == "... and 65 more such rows; not one row can be used"
    override = "tasks.same.label={kind: binary, names: [no, yes]}"
    assert "same-dev.tsv:2: label is '" in refused(capsys, "validate", tiny, override)
    assert main(["validate", str(tiny), override, "tasks.same.dev=null"]) == 0


def test_train_rows_under_another_name_are_no_dev_set(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny.parent / "link.tsv").symlink_to("mood-train.tsv")
    for name in ("mood-train.tsv", "./mood-train.tsv", "link.tsv"):
        override = f"tasks.mood.dev={name}"
        assert refused(capsys, "validate", tiny, override).startswith(
            f"override '{override}': tasks.mood.dev is what the task trains on, "
        )
    assert main(["validate", str(tiny), "tasks.mood.dev=null"]) == 0


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
    assert header == "id,prediction"
    predictions = [json.loads(line) for line in outputs[2].splitlines()]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=2e-6) for row in predictions)
    assert lines == [f"{row['id']},{row['prediction']}" for row in predictions]
    assert [row["id"] for row in predictions] == [f"mood{i}" for i in range(5)]
    gold = [int(label) for _, _, label in rows[1:]]
    right = sum(row["prediction"] == label for row, label in zip(predictions, gold, strict=True))
    assert right / 5 == scores["tasks"]["mood"]["accuracy"]
    blank = tiny.parent / "blank.tsv"
    blank.write_text("id\tsentence\na\tbam\nb\t \n")
    to = ["--out", str(tiny.parent / "some.csv"), "--overwrite"]
    assert "blank.tsv:3: sentence is blank" in refused(capsys, "predict", run, "--task", "mood", blank, *to)
    assert main(["predict", str(run), "--task", "mood", str(blank), *to, "tasks.mood.bad_rows=skip"]) == 0
    assert "1 rows have no prediction, the first is" in capsys.readouterr().err
    assert "cannot write /proc/x/y.csv" in refused(
        capsys, "predict", run, "--task", "mood", labelled, "--out", "/proc/x/y.csv"
    )
    assert "the file to read; choose another" in refused(
        capsys, "predict", run, "--task", "mood", labelled, "--out", labelled
    )
    assert "has no task 'mod'; it has mood, same, near; did you mean 'mood'?" in refused(
        capsys, "predict", run, "--task", "mod", labelled, "--out", tiny.parent / "x.csv"
    )


def test_predictions(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", str(tiny), "steps=1"]) == 0
    capsys.readouterr()
    run, out, file = tiny.parent / "run", tiny.parent / "out.csv", tiny.parent / "mood-dev.tsv"
    command = ["predict", str(run), "--task", "mood", str(file), "--out", str(out)]
    assert main(command) == 0
    named = out.read_text()
    capsys.readouterr()
    # What is there is not replaced unless that is asked for.
    assert refused(capsys, *command) == (
        f"--out is {out}, which is there already; replace it with --overwrite, or choose another\n"
    )
    assert main([*command, "--overwrite", "--out-format", "cs224n"]) == 0
    assert out.read_text() == named.replace(",", ", ").replace("id, prediction", "id, Predicted_Label")
    assert main([*command[:-1], "/dev/null"]) == 0
    assert main([*command, "--overwrite", "--probabilities"]) == 0
    with out.open(newline="") as lines:
        read = list(csv.DictReader(lines))
    assert [row["id"] + "," + row["prediction"] for row in read] == named.splitlines()[1:]
    for row in read:
        of_classes = [float(row[f"p_{label}"]) for label in range(3)]
        assert sum(of_classes) == pytest.approx(1, abs=2e-6)
        assert of_classes[int(row["prediction"])] == max(of_classes)
    capsys.readouterr()
    assert refused(capsys, *command, "--overwrite", "--probabilities", "--out-format", "cs224n") == (
        "--probabilities: the format cs224n has no place for them; choose csv, tsv or jsonl\n"
    )
    assert refused(capsys, *command, "--overwrite", "--probabilities", "--task", "near") == (
        "--probabilities: task 'near' predicts a number, and has no classes to give them of\n"
    )
    assert refused(capsys, *command, "--overwrite", "--probabilities", "--task", "same", "tasks.same.loss=l1") == (
        "--probabilities: task 'same' was trained with the loss l1, whose outputs are none; "
        "those of cross_entropy and bce are\n"
    )

    # Without the id column the rows go by their lines.
    for suffix, nameless in (
        ("tsv", "".join(line.partition("\t")[2] + "\n" for line in file.read_text().splitlines())),
        (
            "jsonl",
            "".join(json.dumps({"sentence": row.split("\t")[1]}) + "\n" for row in file.read_text().splitlines()[1:]),
        ),
    ):
        other = tiny.parent / f"nameless.{suffix}"
        other.write_text(nameless)
        capsys.readouterr()
        assert main(["predict", str(run), "--task", "mood", str(other), "--out", str(out), "--overwrite"]) == 0
        assert capsys.readouterr().err == f"{other} has no column 'id': its rows go by their line numbers\n"
        first = 2 if suffix == "tsv" else 1
        expected = [f"{first + i},{line.partition(',')[2]}" for i, line in enumerate(named.splitlines()[1:])]
        assert out.read_text().splitlines()[1:] == expected
    (tiny.parent / "twice.tsv").write_text("id\tid\tsentence\na\tb\tbam\n")
    command[4] = str(tiny.parent / "twice.tsv")
    assert "has 2 columns named 'id'" in refused(capsys, *command, "--overwrite")

    # Rows for which the model gives no number are left empty and told; if there are no others, nothing is written.
    forward = MultiTaskModel.forward

    def poisoned(self: MultiTaskModel, task: str, packed: Packed, rows: slice) -> Tensor:
        raw_NO = forward(self, task, packed)
        raw_NO[rows] = torch.nan
        return raw_NO

    command[4] = str(file)
    monkeypatch.setattr(MultiTaskModel, "forward", partialmethod(poisoned, rows=slice(1)))
    assert main([*command, "--overwrite"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{out}: 4 predictions\n"
    assert output.err.startswith(f"task 'mood': the model gives no number for 1 of 5 rows, the first is {file}:")
    assert [line.partition(",")[2] for line in out.read_text().splitlines()].count("") == 1
    out.unlink()
    monkeypatch.setattr(MultiTaskModel, "forward", partialmethod(poisoned, rows=slice(None)))
    assert refused(capsys, *command).endswith(f"for 5 of 5 rows, the first is {file}:2; {out} is not written\n")
    assert not out.exists()


def test_exit_codes(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((UserError("mine"), 2), (KeyboardInterrupt(), 130), (BrokenPipeError(), 0)):
        monkeypatch.setattr("mtl_dist.cli._train", Mock(side_effect=error))
        assert main(["train", str(tiny)]) == code
        assert capsys.readouterr().err == ("mine\n" if code == 2 else "")


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
    assert wrong.returncode == 1  # whatever its processes ended with, which was 2
    said = "override 'epocs=1': the top level has no field 'epocs'; did you mean 'epochs'?"
    assert wrong.stderr.count(said) == 1
    assert wrong.stderr.index(said) < wrong.stderr.index("exitcode: 2") < wrong.stderr.index("Traceback")
