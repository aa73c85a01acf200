"""What a run tells: records that other programs can read, and a screen for any width."""

import io
import json
import math
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_dist.surgery.conflict import conflict, mean_of
from mtl_dist.watch.pictures import LARGEST, NOTHING, surgery_images
from mtl_dist.watch.recorder import METRICS, TENSORBOARD, Recorder, StepReport
from mtl_dist.watch.screen import Screen, counting, score_table

REPORT = StepReport(
    step=20,
    stage="1",
    loss={"sst": 1.25, "a-task-with-a-long-name": math.nan},
    examples={"sst": 640, "a-task-with-a-long-name": 1280},
    draws={"sst": 20, "a-task-with-a-long-name": 20},
    tokens=30_000,
    lr={"lr x 1": 1e-5},
    tokens_per_second=12345.6,
    seconds_per_step=0.5,
    data_wait=0.01,
    gradient_norm=1.5,
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


def tensorboard(folder: Path) -> tuple[dict[str, float], dict[str, Image.Image], EventAccumulator]:
    """What TensorBoard shows: first values of the scalars, and the first images."""
    events = EventAccumulator(str(folder / TENSORBOARD))
    events.Reload()
    tags = events.Tags()
    scalars = {tag: events.Scalars(tag)[0].value for tag in tags["scalars"]}
    pngs = {tag: events.Images(tag)[0].encoded_image_string for tag in tags["images"]}
    return scalars, {tag: Image.open(io.BytesIO(png)) for tag, png in pngs.items()}, events


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
    assert train["gradient_norm"] == 1.5
    assert dev["tasks"] == SCORES["tasks"]

    scalars, images, events = tensorboard(tmp_path)
    assert not images
    assert scalars["train/loss/sst"] == 1.25
    assert scalars["train/lr/lr x 1"] == pytest.approx(1e-5)
    assert scalars["dev/sst/accuracy"] == 0.5
    assert "dev/sst/rows" not in scalars  # never changes
    assert scalars["dev/overall_b"] == 0.25
    assert events.Tags()["tensors"] == ["config/text_summary"]


def agreeing(tasks: list[str], cosine: dict[str, float]) -> dict[str, Any]:
    """A surgery record, as far as images look at it."""
    return {"norm": dict.fromkeys(tasks, 1.0), "cosine": cosine}


def of_random_gradients(tasks: int, layers: int) -> tuple[list[str], dict[str, Any]]:
    """A surgery record of many tasks."""
    names = [f"{i}_" + "of_thirty_characters_in_all__"[: 30 - len(f"{i}_")] for i in range(tasks)]
    x_SKE = torch.randn(layers, tasks, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights_SK = torch.ones(layers, tasks, dtype=torch.float64)
    record = mean_of([conflict(names, x_SKE @ x_SKE.mT, weights_SK, {f"layers.{i}": [i] for i in range(layers)})])
    assert record is not None
    return names, record


def recorded(
    folder: Path, tasks: list[str], surgery: dict[str, Any]
) -> tuple[dict[str, float], dict[str, Image.Image]]:
    """The scalars and images of one train record."""
    recorder = Recorder(folder, tensorboard=True)
    report = replace(REPORT, draws=dict.fromkeys(tasks, 1), surgery=surgery)
    recorder.record(20, "train", report.as_record())
    recorder.close()
    assert json.loads((folder / METRICS).read_text())["surgery"] == surgery
    scalars, images, _ = tensorboard(folder)
    return scalars, images


def cells(image: Image.Image, rows: int) -> list[list[np.ndarray]]:
    """The cells of a matrix, found by its grey diagonal."""
    pixels = np.asarray(image.convert("RGB"))
    grey = (pixels == NOTHING).all(-1)
    ys, xs = (np.flatnonzero(grey.sum(axis) >= 10) for axis in (1, 0))
    matrix = pixels[ys[0] : ys[-1] + 2, xs[0] : xs[-1] + 2]  # with the line that ends the last cell
    return [np.split(row, rows, axis=1) for row in np.split(matrix, rows)]


def colour(cell: np.ndarray) -> list[int]:
    return [int(channel) for channel in cell[2, 2]]  # beside the number


def test_a_conflict_is_red_and_agreement_blue_on_the_scale_of_the_largest(tmp_path: Path) -> None:
    tasks = ["sst", "quora", "sts"]
    surgery = agreeing(tasks, {"quora.sst": -0.04, "sst.sts": 0.04, "quora.sts": 0.01})
    scalars, images = recorded(tmp_path, tasks, surgery)
    assert list(images) == ["train/surgery/cosine"]
    assert scalars["train/surgery/cosine/quora.sst"] == pytest.approx(-0.04)

    image = images["train/surgery/cosine"]
    found = cells(image, 3)
    red, blue, pale_blue = colour(found[0][1]), colour(found[0][2]), colour(found[1][2])
    assert red == colour(found[1][0]) and red[0] > 150 and max(red[1:]) < 60
    assert blue == colour(found[2][0]) and blue[2] > 150 and max(blue[0], blue[1]) < 110
    assert pale_blue == colour(found[2][1]) and 150 < pale_blue[0] < pale_blue[2]
    assert all(colour(found[k][k]) == list(NOTHING) for k in range(3))
    assert [len(np.unique(found[0][k][2:-2, 2:-2].reshape(-1, 3), axis=0)) > 1 for k in range(3)] == [False, True, True]

    half = surgery_images(tasks, agreeing(tasks, {pair: value / 2 for pair, value in surgery["cosine"].items()}))[
        "cosine"
    ]
    assert colour(cells(half, 3)[0][1]) == red
    bar = found[0][0].shape[0] * 2  # the scale stands above the table, and says what the colours are worth
    assert np.any(np.asarray(half.convert("RGB"))[:bar] != np.asarray(image.convert("RGB"))[:bar])


def test_pairs_that_no_step_had_are_grey_and_no_pair_at_all_is_no_image() -> None:
    found = cells(surgery_images(["a", "b", "c"], agreeing(["a", "b", "c"], {"a.b": -0.1, "b.c": 0.0}))["cosine"], 3)
    assert colour(found[0][2]) == list(NOTHING)
    assert colour(found[1][2]) == [255, 255, 255]
    assert surgery_images(["a", "b"], agreeing(["a"], {})) == surgery_images(["a"], agreeing(["a"], {})) == {}


def test_layers_are_an_image_and_their_numbers_scalars(tmp_path: Path) -> None:
    tasks, surgery = of_random_gradients(3, layers=12)
    scalars, images = recorded(tmp_path, tasks, surgery)
    assert list(images) == ["train/surgery/cosine", "train/surgery/layers"]
    names = [name for name in scalars if name.startswith("train/surgery/layers/layers.7/")]
    assert [name.rpartition("/")[2] for name in names] == [
        "conflicting_pairs", "conflicting_parameters", "norm_ratio", "similarity_to_sum",
    ]  # fmt: skip
    assert scalars[names[2]] == pytest.approx(surgery["layers"]["layers.7"]["norm_ratio"])

    # Twelve rows of three cells end the image; their colours have the signs of the cosines.
    pixels = np.asarray(images["train/surgery/layers"].convert("RGB")).astype(int)
    rows = np.split(pixels[-10 - 12 * 30 : -10], 12)
    left = np.flatnonzero((rows[0][29] == 230).all(-1))[0]
    for row, layer in zip(rows, surgery["layers"].values(), strict=True):
        for c, (a, b) in enumerate(combinations(tasks, 2)):
            red, _, blue = row[2, left + 60 * c + 2]
            assert np.sign(blue - red) == np.sign(layer["cosine"][".".join(sorted((a, b)))])


@pytest.mark.parametrize(("tasks", "pairs"), [(24, True), (25, False)])
def test_above_24_tasks_pairs_are_no_scalars(tmp_path: Path, tasks: int, pairs: bool) -> None:
    scalars, images = recorded(tmp_path, *of_random_gradients(tasks, layers=2))
    assert sum(name.startswith("train/surgery/cosine/") for name in scalars) == (
        tasks * (tasks - 1) // 2 if pairs else 0
    )
    assert sum(name.startswith("train/surgery/norm/") for name in scalars) == tasks
    assert len(images) == 2


@pytest.mark.parametrize("tasks", [2, 12, 13, 64, 200])
def test_images_of_any_number_of_tasks_fit_a_screen(tasks: int) -> None:
    for image in surgery_images(*of_random_gradients(tasks, layers=13)).values():
        assert max(image.size) <= LARGEST


def test_64_tasks_are_drawn_about_as_fast_as_16() -> None:
    seconds: dict[int, list[float]] = {64: [], 16: []}
    for _ in range(5):  # in turns, as other work may slow some
        for tasks, times in seconds.items():
            record = of_random_gradients(tasks, layers=13)
            start = time.process_time()
            surgery_images(*record)
            times.append(time.process_time() - start)
    assert min(seconds[64]) < 3 * min(seconds[16])  # with numbers in all of their cells six times as long


def test_many_tasks_show_the_share_of_their_pairs_that_conflict() -> None:
    # 14 tasks have 91 pairs. Task a conflicts with all others, and these agree with each other.
    tasks = [chr(ord("a") + k) for k in range(14)]
    cosine = {f"{a}.{b}": -0.1 if a == "a" else 0.1 for a, b in combinations(tasks, 2)}
    record = agreeing(tasks, cosine) | {"layers": {"layers.0": {"cosine": cosine}}}
    pixels = np.asarray(surgery_images(tasks, record)["layers"].convert("RGB")).astype(int)
    row = pixels[-10 - 30 + 2]
    left = np.flatnonzero((pixels[-10 - 1] == 230).all(-1))[0]
    red, *others = (row[left + 60 * k + 2] for k in range(14))
    assert red[0] - red[2] > 100
    assert all(blue[2] - blue[0] > 100 for blue in others)  # one of thirteen pairs


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
