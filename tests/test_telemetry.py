"""What a run tells: records that other programs can read, and a screen for any width."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_dist.telemetry import TENSORBOARD, Recorder, Screen, StepReport, counting, score_table

REPORT = StepReport(
    step=20,
    stage="1",
    loss={"sst": 1.25, "a-task-with-a-long-name": math.nan},
    examples={"sst": 640, "a-task-with-a-long-name": 1280},
    draws={"sst": 20, "a-task-with-a-long-name": 20},
    lr={"lr x 1": 1e-5},
    tokens_per_second=12345.6,
    seconds_per_step=0.5,
    data_wait=0.01,
    gradient_norm=None,
    skipped_steps=0,
)
MAIN = {"sst": ("accuracy", 0.5), "a-task-with-a-long-name": ("pearson", None)}
SCORES = {
    "tasks": {
        "sst": {"rows": 10, "accuracy": 0.5, "macro_f1": 0.4, "confusion": [[5, 0], [5, 0]]},
        "a-task-with-a-long-name": {"rows": 5, "pearson": None, "spearman": None, "mse": 1.5},
    },
    "overall_a": 0.5,
    "overall_b": 0.25,
}


def test_every_record_is_a_line_of_json_and_a_scalar(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, tensorboard=True)
    recorder.text("config", "seed: 0\ntasks: {}")
    recorder.record(20, "train", REPORT.as_record())
    recorder.record(20, "dev", SCORES)
    recorder.close()

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    train, dev = (json.loads(line, parse_constant=no_constant) for line in lines)
    assert (train["kind"], train["step"], train["loss"]) == (
        "train",
        20,
        {"sst": 1.25, "a-task-with-a-long-name": None},
    )
    assert "gradient_norm" not in train
    assert dev["tasks"] == SCORES["tasks"]

    events = EventAccumulator(str(tmp_path / TENSORBOARD))
    events.Reload()
    scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert scalars["train/loss/sst"] == 1.25
    assert scalars["train/lr/lr x 1"] == pytest.approx(1e-5)
    assert scalars["dev/sst/accuracy"] == 0.5
    assert "dev/sst/rows" not in scalars  # never changes
    assert scalars["dev/overall_b"] == 0.25
    assert events.Tags()["tensors"] == ["config/text_summary"]


def shown(width: int, terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=terminal, color_system=None)
    with Screen(list(MAIN), 100, console) as screen:
        screen.steps(REPORT)
        screen.scores(20, MAIN, SCORES)
        screen.line("[not markup] stays")
    console.print(score_table(SCORES, {task: metric for task, (metric, _) in MAIN.items()}))
    return output.getvalue()


def test_without_a_terminal_every_report_is_one_line() -> None:
    lines = shown(width=40, terminal=False).splitlines()
    assert lines[0] == "step 20/100  sst 1.2500  a-task-with-a-long-name nan  12,346 tokens/s  0:00:40 left"
    assert lines[1].startswith("step 20/100  dev: sst accuracy 0.5000  a-task-with-a-long-name pearson undefined")
    assert lines[2] == "[not markup] stays"


def test_on_a_terminal_the_tasks_are_a_table() -> None:
    text = shown(width=100, terminal=True)
    for part in ("sst", "1.2500", "50.0%", "1,280", "pearson undefined", "step 20/100", "0:00:40 left"):
        assert part in text


@pytest.mark.parametrize("terminal", [True, False])
def test_twenty_columns_are_enough_not_to_fail(terminal: bool) -> None:
    assert "sst" in shown(width=20, terminal=terminal)


def test_counting_is_silent_where_there_is_no_terminal() -> None:
    output = io.StringIO()
    with counting(Console(file=output), "preparing") as on_rows:
        on_rows(5)
    assert output.getvalue() == ""
