"""Where a model is wrong: on predictions given by hand, and after a training as users run it.

python -m pytest tests/runs/test_errors.py
"""

import json
import math
import re
from dataclasses import replace
from functools import partialmethod
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from rich.console import Console
from torch import Tensor, nan

from mtl_dist.cli import main
from mtl_dist.config import UserError, load
from mtl_dist.data.packed import Packed
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import MultiTaskModel
from mtl_dist.runs.analysis import Analysis, Measured, analyse
from mtl_dist.runs.error_page import About, markdown, page_of, tables
from mtl_dist.runs.errors import errors_of_run, examples_of, write_errors
from mtl_dist.tasks import TaskConfig
from mtl_dist.training.scores import Predicted
from tests.conftest import write_experiment
from tests.distributed import on_ranks
from tests.test_cli import refused

ABOUT = About("runs/x", "mood", "dev", "dev.tsv", 7, 5, None, 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, for tests that only read it."""
    config = write_experiment(tmp_path_factory.mktemp("trained"))
    assert main(["train", str(config), "steps=2", "log.tensorboard=false"]) == 0
    return config.parent / "run"


def analysed(
    config: Path, task: str, rows: list[str], predicted: Predicted, *overrides: str
) -> tuple[TaskConfig, Analysis]:
    """What is told of predictions for these rows, each its sentences and its label."""
    head = "id\tsentence\tlabel" if task == "mood" else "id\tsentence1\tsentence2\tlabel"
    lines = [head, *(f"{i}\t{row}" for i, row in enumerate(rows))]
    (config.parent / f"{task}-dev.tsv").write_text("\n".join(lines) + "\n")
    experiment = load(Experiment, config, overrides)
    split = experiment.open_split(task, "dev", load_tokenizer(experiment.encoder.tokenizer_source))
    assert split is not None
    of_task = experiment.tasks[task]
    return of_task, analyse(of_task, split, examples_of(of_task, split), predicted)


def of(probabilities: list[list[float]]) -> Predicted:
    array = np.array(probabilities)
    return Predicted(np.where(np.isnan(array[:, 0]), np.nan, array.argmax(axis=1)), array)


MOODS = ["bam\t0", "bam bat\t1", "bam bat but not bet\t2", "bam not bet bit\t1", "bam bat bet bit\t2"]
OF_MOODS = of([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.9, 0.05, 0.05], [nan] * 3, [0.2, 0.45, 0.35]])


def named(rows: list[str], names: list[str]) -> tuple[list[str], str]:
    """The same rows with words for labels, and the override that says so."""
    label = f"{{kind: classification, num_classes: null, names: {json.dumps(names)}}}"
    return [row[:-1] + names[int(row[-1])] for row in rows], f"tasks.mood.label={label}"


def test_classes_by_hand(tiny: Path) -> None:
    rows, label = named(MOODS, ["a", "b", "c"])
    _, found = analysed(tiny, "mood", rows, OF_MOODS, label)
    assert [row.id for row in found.rows] == ["3", "2", "4", "0", "1"]  # first the one without a number
    assert [row.how_wrong for row in found.rows] == [
        None,
        *(pytest.approx(-math.log(p), abs=1e-6) for p in (0.05, 0.35, 0.5, 0.8)),
    ]
    worst = found.rows[1]
    assert (worst.line, worst.sentences, worst.gold, worst.prediction) == (4, ("bam bat but not bet",), "c", "a")
    assert worst.probabilities == {"a": 0.9, "b": 0.05, "c": 0.05}
    assert worst.slices == ["length: 5 words", "negation: some", "contrast: some", "label: c"]
    assert (found.rows[0].prediction, found.rows[0].probabilities) == (None, None)
    assert found.num_wrong == 3
    assert found.score.value == 0.4
    slices = {f"{each.kind}: {each.name}": each for each in found.slices}
    label = slices["label: b"]
    assert (label.rows, label.share, label.score.value, label.rest) == (2, 0.4, 0.5, pytest.approx(1 / 3))
    assert slices["label: c"].score == Measured(0.0, 0.0, pytest.approx(0.6576198))  # 3.8415 / (2 + 3.8415)
    calibration = found.calibration
    assert calibration is not None
    assert sum(each.rows for each in calibration.bins) == 4
    assert (calibration.confidence, calibration.accuracy) == (pytest.approx((0.5 + 0.8 + 0.9 + 0.45) / 4), 0.5)
    # 0.5 and 0.45 are in bins of their own: right by 0.5, right by 0.2, wrong by 0.9, wrong by 0.45.
    assert calibration.ece == pytest.approx((0.5 + 0.2 + 0.9 + 0.45) / 4)
    assert found.threshold is None  # of three classes


def test_a_slice_far_below_the_others_is_worse(tiny: Path) -> None:
    right, wrong = [0.9, 0.05, 0.05], [0.05, 0.9, 0.05]
    rows = ["bam\t0"] * 30 + ["not bam\t0"] * 10 + ["bam bat bet\t0"] * 10
    _, found = analysed(tiny, "mood", rows, of([right] * 30 + [wrong] * 10 + [right] * 9 + [wrong]))
    # Of all 0.78; of the negated at most 0.28; of 9 out of 10 (0.60 to 0.98) nothing can be said.
    assert {each.name for each in found.slices if each.worse} == {"some", "2 words"}
    assert {each.rest for each in found.slices if each.name == "some"} == {39 / 40}


PAIRS = ["bam bat\tbam\t1", "bam\tbit\t0", "bam bat\tbat bam\t1", "not bam\tbam\t0"]


def test_yes_or_no_by_hand(tiny: Path) -> None:
    p_yes = [0.4, 0.1, 0.9, 0.3]
    predicted = Predicted(np.array([0.0, 0, 1, 0]), np.array([[1 - p, p] for p in p_yes]))
    task, found = analysed(tiny, "same", PAIRS, predicted)
    assert [row.id for row in found.rows] == ["0", "3", "1", "2"]
    assert found.threshold is not None
    assert (found.threshold.threshold, found.threshold.accuracy) == (pytest.approx(0.35), 1.0)
    page = "\n".join(page_of(task, ABOUT, found, 50))
    said = "threshold of 0.35 on p(1) gives accuracy 1.0000 (+0.2500) here; it is fitted on these rows"
    assert f"A {said}" in page
    assert f"a {said}" in on_screen(found)
    overlaps = {each.name: each.score.value for each in found.slices if each.kind == "overlap"}
    assert overlaps == {"0 to 0.25": 1.0, "0.5 to 0.75": 0.5, "0.75 to 1": 1.0}
    p_yes[0] = 0.6
    _, found = analysed(tiny, "same", PAIRS, of([[1 - p, p] for p in p_yes]))
    assert "no threshold on p(1) does better than 0.5 on these rows" in on_screen(found)


def test_without_probabilities_a_row_is_wrong_or_not(tiny: Path) -> None:
    task, found = analysed(tiny, "same", PAIRS, Predicted(np.array([0.0, 0, 1, 1])), "tasks.same.loss=mse")
    assert [(row.id, row.how_wrong) for row in found.rows] == [("0", 1), ("3", 1), ("1", 0), ("2", 0)]
    assert found.calibration is found.threshold is None
    written = write_errors(tiny.parent / "out", task, ABOUT, found, 50)
    assert [path.name for path in written.files] == ["errors.jsonl", "errors.md", "confusion.png"]
    assert "probabilities" not in (tiny.parent / "out" / "errors.jsonl").read_text()
    assert "p(gold)" not in (tiny.parent / "out" / "errors.md").read_text()


def test_numbers_by_hand(tiny: Path) -> None:
    rows = ["bam\tbat\t0", "bam\tbam\t5", "bam bat\tbam bit\t2.5", "bam\tbit\t1", "not bam\tbit\t4"]
    task, found = analysed(tiny, "near", rows, Predicted(np.array([1.0, 4.5, 2.5, 3.0, nan])))
    assert [(row.line, row.how_wrong) for row in found.rows] == [(6, None), (5, 2), (2, 1), (3, 0.5), (4, 0)]
    assert found.measure == "mean absolute error"
    # Errors 1, 0.5, 0, 2: mean 0.875, standard deviation 0.8539, divided by 2, times 1.96.
    assert found.score.value == 0.875
    assert (found.score.low, found.score.high) == (pytest.approx(0.0382, abs=1e-4), pytest.approx(1.7118, abs=1e-4))
    assert found.pearson == Measured(None)  # of rows without a number
    slices = {f"{each.kind}: {each.name}": each for each in found.slices}
    low = slices["label: 0 to 1.25"]
    assert (low.rows, low.score.value, low.rest) == (2, 1.5, 0.25)
    assert slices["negation: in one"].score == Measured(None)
    assert slices["negation: in neither"].rest is None
    negated = slices["negation: in neither"].pearson
    assert negated is not None and negated.value == pytest.approx(
        np.corrcoef([0, 5, 2.5, 1], [1, 4.5, 2.5, 3])[0, 1], abs=1e-9
    )
    written = write_errors(tiny.parent / "out", task, replace(ABOUT, task="near"), found, 2)
    assert [path.name for path in written.files] == ["errors.jsonl", "errors.md", "predictions.png"]
    page = (tiny.parent / "out" / "errors.md").read_text()
    assert "2 of the 4 that are wrong" in page
    assert "Confusion" not in page and "Calibration" not in page
    worst = on_screen(found).splitlines()[2:4]  # under the scores and the head
    assert [line[: len("overlap: 0 to 0.25")].strip() for line in worst] == ["overlap: 0 to 0.25", "label: 0 to 1.25"]


def test_an_error_far_above_the_others_is_worse(tiny: Path) -> None:
    rows = ["bam\tbat\t0"] * 20 + ["bam\tbat\t5"] * 20
    off = np.linspace(0.1, 0.2, 20)
    _, found = analysed(tiny, "near", rows, Predicted(np.concatenate([off, 5 - 10 * off])))
    assert [(each.name, each.worse) for each in found.slices] == [("0 to 1.25", False), ("3.75 to 5", True)]


def on_screen(found: Analysis) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        for part in tables(ABOUT, found, [Path("out/errors.jsonl")]):
            console.print(part)
    return captured.get()


# ---------------------------------------------------------------------------------------------------------- the page


def cells(page: str) -> list[str]:
    """The cells of a page's tables, as a reader of Markdown sees them."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(page)
    found = []
    for opened, inline in pairwise(tokens):
        if opened.type == "td_open":
            children = inline.children or []
            assert all(child.type in ("text", "text_special") for child in children), children
            found.append("".join(child.content for child in children))
    return found


@pytest.mark.parametrize(
    "text",
    [
        "a | b || c",
        r"a \| b \\",
        "*so* _so_ __init__ ~~not~~ `code` ```",
        "<b>bold</b> <script>alert(1)</script> <!-- gone -->",
        "[a](http://b) ![c](d) [^1]",
        "&amp; &lt; AT&T",
        "# no title, - no list, 1. none",
        "$x$ @somebody",
    ],
)
def test_a_cell_shows_a_text_letter_for_letter(text: str) -> None:
    assert cells(f"| head |\n|---|\n| {markdown(text)} |\n") == [text]


def test_a_text_stays_in_its_cell(tiny: Path) -> None:
    assert markdown("one\ntwo\r\n three\u2028four") == "one two three four"
    assert len(markdown("x" * 1000)) == 403
    task, found = analysed(tiny, "mood", ["bam | <b>*bat*</b>\t0"], of([[0.2, 0.7, 0.1]]))
    assert "bam | <b>*bat*</b>" in cells("\n".join(page_of(task, ABOUT, found, 50)))


def test_names_that_screens_and_pictures_would_take_for_their_own(tiny: Path) -> None:
    rows, label = named(MOODS, ["[red]", "$x$", "a|b"])
    task, found = analysed(tiny, "mood", rows, OF_MOODS, label)
    assert "label: [red]" in on_screen(found)
    write_errors(tiny.parent / "out", task, ABOUT, found, 50)
    assert {"[red]", "$x$", "a|b"} <= set(cells((tiny.parent / "out" / "errors.md").read_text()))


def test_of_many_classes_the_page_has_the_largest_confusions(tiny: Path) -> None:
    classes = 45
    probabilities = np.full((6, classes), 0.5 / (classes - 1))
    for row, predicted in enumerate([3, 3, 3, 7, 0, 1]):
        probabilities[row, predicted] = 0.5
    rows = [f"bam\t{gold}" for gold in (40, 40, 40, 40, 0, 1)]
    label = f"tasks.mood.label={{kind: classification, num_classes: {classes}}}"
    task, found = analysed(
        tiny, "mood", rows, Predicted(probabilities.argmax(axis=1).astype(float), probabilities), label
    )
    page = "\n".join(page_of(task, ABOUT, found, 0))
    assert re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE) == [("40", "3", "3"), ("40", "7", "1")]
    written = write_errors(tiny.parent / "out", task, ABOUT, found, 50)
    for path in written.files[2:]:
        with Image.open(path) as picture:
            assert min(picture.size) > 300


# --------------------------------------------------------------------------------------------------------- the command


def errors(run: Path, *arguments: str, task: str = "mood") -> list[str]:
    return ["errors", str(run), "--task", task, *arguments]


def test_errors_of_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", str(trained), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["tasks"]
    for task in ("mood", "same", "near"):
        assert main(errors(trained, "--json", task=task)) == 0
        found = json.loads(capsys.readouterr().out)
        folder = trained / "errors" / f"{task}-dev"
        assert found["scores"] == scores[task]
        assert (found["step"], found["rows"]) == (2, 5)
        assert sorted(found["files"]) == sorted(str(path) for path in folder.iterdir())
        rows = [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]
        assert [row["how_wrong"] for row in rows] == sorted((row["how_wrong"] for row in rows), reverse=True)
        lines = (trained.parent / f"{task}-dev.tsv").read_text().splitlines()
        for row in rows:
            name, *sentences, label = lines[row["line"] - 1].split("\t")
            assert row["sentences"] == sentences
            assert float(row["gold"]) == float(label)
            assert row["id"] == (str(row["line"]) if task == "near" else name)
            if task == "near":
                assert row["how_wrong"] == pytest.approx(abs(row["gold"] - row["prediction"]), abs=2e-6)
                assert "probabilities" not in row
            else:
                assert row["how_wrong"] == pytest.approx(-math.log(row["probabilities"][label]), abs=1e-4)
        page = (folder / "errors.md").read_text()
        assert all(f"({name})" in page for name in {Path(path).name for path in found["files"]} - {"errors.md"})
        assert main(errors(trained, task=task)) == 0  # again, in their place
        names = [Path(path).name for path in found["files"]]
        assert " ".join(capsys.readouterr().out.split()).endswith(f" {folder}: {', '.join(names)}")
    assert main(errors(trained, "--out", str(trained.parent / "new" / "er"), "--most", "0")) == 0
    assert (trained.parent / "new" / "er" / "errors.md").exists()


def test_a_run_with_errors_can_be_replaced(tiny: Path) -> None:
    assert main(["train", str(tiny), "steps=1"]) == 0
    assert main(errors(tiny.parent / "run")) == 0
    assert main(["train", str(tiny), "steps=1", "--overwrite"]) == 0
    assert not (tiny.parent / "run" / "errors").exists()


def test_mistakes_are_one_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained.parent
    capsys.readouterr()
    assert refused(capsys, *errors(folder)) == f"{folder}: no run is in this folder\n"
    assert refused(capsys, *errors(folder / "none")) == f"{folder}/none: no such folder\n"
    assert refused(capsys, *errors(trained, task="mod")) == (
        f"{trained} has no task 'mod'; it has mood, same, near; did you mean 'mood'?\n"
    )
    assert refused(capsys, *errors(trained, task="xyz")) == f"{trained} has no task 'xyz'; it has mood, same, near\n"
    assert refused(capsys, *errors(trained, "--most", "-1")) == (
        "--most is -1; give the number of rows to show, 0 for none\n"
    )
    assert refused(capsys, *errors(trained, "--split", "test")) == (
        f"{trained}: task 'mood' has no test set; give one by tasks.mood.test=FILE\n"
    )
    assert refused(capsys, *errors(trained, "--out", "/proc/x")).startswith("cannot write /proc/x: ")
    (folder / "a-file").touch()
    assert refused(capsys, *errors(trained, "--out", str(folder / "a-file"))).startswith("cannot write ")
    with pytest.raises(SystemExit):
        main(["errors", str(trained)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test.tsv", "id\tsentence\na\tbam\nb\tbat\n"),
        ("test.tsv", "id\tsentence\tlabel\na\tbam\t\nb\tbat\t \n"),
        ("test.jsonl", '{"id": "a", "sentence": "bam", "label": null}\n'),
    ],
)
def test_a_test_set_without_labels_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    capsys.readouterr()
    assert refused(capsys, *errors(trained, "--split", "test", f"tasks.mood.test={path}")) == (
        f"task 'mood': {path} has no labels (column 'label'), and nothing tells which predictions are wrong; "
        "mtl-dist predict labels it\n"
    )
    path.write_text(text.replace("null", "1").replace("\t\n", "\t1\n"))
    if "label" in text:  # one is enough, where the others may be skipped
        overrides = [f"tasks.mood.test={path}", "tasks.mood.bad_rows=skip", "--out", str(tmp_path / "out")]
        assert main(errors(trained, "--split", "test", *overrides)) == 0
        page = (tmp_path / "out" / "errors.md").read_text()
        assert page.startswith(f"# Where {markdown(trained)} is wrong: mood, test")
        assert ("1 more rows cannot be used" in page) == (name == "test.tsv")
    path.unlink()
    capsys.readouterr()
    override = f"tasks.mood.test={path}"
    assert refused(capsys, *errors(trained, "--split", "test", override)) == (
        f"override '{override}': tasks.mood.test: cannot read {path}: No such file or directory\n"
    )


def test_rows_without_a_number(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MultiTaskModel.forward

    def poisoned(self: MultiTaskModel, task: str, packed: Packed, rows: slice) -> Tensor:
        raw_NO = forward(self, task, packed)
        raw_NO[rows] = nan
        return raw_NO

    monkeypatch.setattr(MultiTaskModel, "forward", partialmethod(poisoned, rows=slice(1)))
    capsys.readouterr()
    for task in ("mood", "same", "near"):
        assert main(errors(trained, "--out", str(tmp_path / task), task=task)) == 0
        assert f"task '{task}': the model gives no number for 1 of 5 rows" in " ".join(capsys.readouterr().out.split())
        first = json.loads((tmp_path / task / "errors.jsonl").read_text().splitlines()[0])
        assert first["prediction"] is first["how_wrong"] is first.get("probabilities") is None
        assert "| no number |" in (tmp_path / task / "errors.md").read_text()
    monkeypatch.setattr(MultiTaskModel, "forward", partialmethod(poisoned, rows=slice(None)))
    assert refused(capsys, *errors(trained, "--out", str(tmp_path / "none"))).endswith(
        f"; {tmp_path / 'none'} is not written\n"
    )
    assert not (tmp_path / "none").exists()


def test_a_file_that_changes_meanwhile_is_refused(tiny: Path) -> None:
    experiment = load(Experiment, tiny)
    split = experiment.open_split("mood", "dev", load_tokenizer(experiment.encoder.tokenizer_source))
    assert split is not None
    path = tiny.parent / "mood-dev.tsv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    with pytest.raises(UserError, match=r"mood-dev\.tsv changed while it was read; start again when it is written"):
        examples_of(experiment.tasks["mood"], split)


def _errors(run: Path, out: Path) -> dict[str, Any]:
    config = load(Experiment, run / "config.yaml")
    return errors_of_run(config, run, "mood", out=out).as_json()


def test_two_ranks_find_what_one_finds(trained: Path, tmp_path: Path) -> None:
    one = _errors(trained, tmp_path / "one")
    for told in on_ranks(2, _errors, trained, tmp_path / "two"):
        assert told["scores"] == one["scores"]
        assert told["calibration"]["ece"] == pytest.approx(one["calibration"]["ece"], abs=1e-5)
    rows = [
        [json.loads(line) for line in (tmp_path / name / "errors.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for mine, theirs in zip(*rows, strict=True):
        assert mine["id"] == theirs["id"]
        assert mine["slices"] == theirs["slices"]
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
