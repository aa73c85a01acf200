"""A run that was stopped goes on as if nothing had happened: on other ranks and under another engine too.

python -m pytest tests/training/test_resume.py
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from accelerate import Accelerator

from mtl_dist.checkpoint import COVERED
from mtl_dist.cli import main
from mtl_dist.config import UserError, load
from mtl_dist.experiment import Experiment
from mtl_dist.files import write_sums
from mtl_dist.training.loop import train
from tests.distributed import on_ranks
from tests.trained import far_apart, go_on_until, run

PCGRAD = "gradients.combiner={kind: pcgrad}"
QUICK = ["log.tensorboard=false", "log.every_steps=3", "steps=12", "evaluate.every_steps=4"]


def on(world: int, stop_after: int | None, engine: str, config: Path, *overrides: str) -> list[dict[str, Any]]:
    if world == 1 and engine == "ddp":
        return [go_on_until(stop_after, engine, config, *overrides)]
    return on_ranks(world, go_on_until, stop_after, engine, config, *overrides)


def told(config: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs between any two runs."""
    text = (config.parent / "run" / "metrics.jsonl").read_text()
    timing = {"time", "tokens_per_second", "seconds_per_step", "data_wait"}
    return [{key: value for key, value in json.loads(line).items() if key not in timing} for line in text.splitlines()]


def afresh(config: Path) -> None:
    """Moves the run away, so that the next one begins anew."""
    (config.parent / "run").rename(config.parent / f"run{len(list(config.parent.iterdir()))}")


@pytest.mark.parametrize(
    ("world", "engine", "changes"),
    [
        (1, "ddp", []),
        (1, "ddp", [PCGRAD, "mixer={kind: temperature, draws_per_step: 2}", "gradients.every=2"]),
        (1, "ddp", ["optim.schedule={kind: linear, warmup_steps: 7}"]),  # stopped while it climbs
        (
            2,
            "ddp",
            ["gradients.combiner={kind: gradvac}", "gradients.reduce=reduce_scatter", "gradients.measure=layers"],
        ),
        (2, "ddp", ["gradients.combiner={kind: famo}", "mixer={kind: annealed}", "precision=bf16"]),
        # Saved right after a surgery, whose weights the next steps go on with.
        (2, "ddp", [PCGRAD, "gradients.every=5", "gradients.between=held", "mixer={kind: uniform}"]),
        (2, "fsdp2", [PCGRAD, "mixer={kind: uniform}"]),
        (1, "ddp", ["optim.average={decay: 0.7}", "tasks.mood.r_drop=1", "mixer={kind: uniform}"]),
        pytest.param(2, "zero2", ["optim.average={decay: 0.7}"], marks=pytest.mark.long),
        pytest.param(2, "zero1", [PCGRAD, "mixer={kind: uniform}", "precision=bf16"], marks=pytest.mark.long),
        pytest.param(2, "zero2", [PCGRAD, "mixer={kind: uniform}"], marks=pytest.mark.long),
        (2, "zero3", [PCGRAD, "mixer={kind: uniform}", "precision=bf16"]),
    ],
)
def test_stopped_and_resumed_is_undisturbed_bit_for_bit(
    tiny: Path, world: int, engine: str, changes: list[str]
) -> None:
    overrides = [*QUICK, *changes]  # with dropout
    whole = on(world, None, engine, tiny, *overrides)
    expected = told(tiny)
    afresh(tiny)
    on(world, 5, engine, tiny, *overrides)  # between two reports, and after an evaluation
    resumed = on(world, None, engine, tiny, *overrides)
    for before, after in zip(whole, resumed, strict=True):
        assert far_apart(after["parameters"], before["parameters"]) == 0
        assert far_apart(after["kept"], before["kept"]) == 0
        assert after["scores"] == before["scores"]
    assert told(tiny) == expected


@pytest.mark.parametrize(
    "legs",
    [
        [(2, "ddp"), (1, "ddp"), (4, "ddp")],
        [(1, "ddp"), (2, "zero3"), (2, "fsdp2")],
        [(4, "zero2"), (2, "ddp"), (2, "zero1")],
    ],
)
def test_a_run_goes_on_elsewhere(tiny: Path, legs: list[tuple[int, str]]) -> None:
    none = [f"tasks.{task}.dropout=0" for task in ("mood", "same", "near")]
    overrides = [*QUICK, *none, "encoder.dropout=0", "encoder.attention_dropout=0", PCGRAD, "mixer={kind: uniform}"]
    expected = run(tiny, *overrides)
    afresh(tiny)
    for stop_after, (world, engine) in zip((4, 5, None), legs, strict=True):
        ranks = on(world, stop_after, engine, tiny, *overrides)
    assert far_apart(ranks[0]["parameters"], expected["parameters"]) < 1e-6
    assert ranks[0]["scores"]["step"] == expected["scores"]["step"]


def test_every_step_of_several_stages(tiny: Path) -> None:
    stages = (
        "stages=[{name: a, steps: 2, schedule: {kind: linear, warmup_steps: 2}}, "
        "{name: b, tasks: [mood, near], steps: 2, gradients: {combiner: {kind: pcgrad}}}, "
        "{name: c, steps: 2, schedule: {kind: linear}, carry_moments: true}]"
    )
    overrides = ["log.tensorboard=false", "log.every_steps=1", "steps=null", stages]
    whole = run(tiny, *overrides)
    expected = told(tiny)
    afresh(tiny)
    checkpoints = tiny.parent / "run" / "checkpoints"
    for done in range(1, 6):  # one step at a time
        go_on_until(1, "ddp", tiny, *overrides)
        assert max(path.name for path in checkpoints.iterdir()) == f"step-{done:08d}"
    resumed = go_on_until(None, "ddp", tiny, *overrides)
    assert far_apart(resumed["parameters"], whole["parameters"]) == 0
    assert resumed["scores"] == whole["scores"]
    assert told(tiny) == expected
    # Nothing is left to do.
    again = go_on_until(None, "ddp", tiny, *overrides)
    assert again["scores"] == whole["scores"]
    assert told(tiny) == expected


def test_the_loss_scale_goes_on(tiny: Path) -> None:
    fp16 = [*QUICK, "precision=fp16", "evaluate.every_steps=12"]

    def scaling(**options: Any) -> Accelerator:  # which Accelerate does on GPUs only
        accelerator = Accelerator(**options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
        accelerator.native_amp = True
        return accelerator

    def last_state() -> Any:
        return json.loads((max((tiny.parent / "run" / "checkpoints").iterdir()) / "state.json").read_text())["scaling"]

    with patch("mtl_dist.distributed.Accelerator", scaling), patch("mtl_dist.distributed._check_precision"):
        whole = run(tiny, *fp16)["parameters"]
        expected = last_state()
        assert expected["scale"] == 2.0 ** (6 + 12 / 2)
        afresh(tiny)
        go_on_until(5, "ddp", tiny, *fp16)
        assert (last_state()["scale"], last_state()["_growth_tracker"]) == (2.0**8, 1)
        assert far_apart(run(tiny, *fp16, resume="auto")["parameters"], whole) == 0
    assert last_state() == expected


def test_checkpoints_without_a_stop(tiny: Path) -> None:
    folder = tiny.parent / "run" / "checkpoints"
    run(tiny, *QUICK)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000012"]
    run(tiny, *QUICK, "checkpoint.every_steps=5", "checkpoint.keep=3", "checkpoint.async=false")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000005", "step-00000010", "step-00000012"]


def test_a_path_to_go_on_from(tiny: Path) -> None:
    whole = run(tiny, *QUICK, "checkpoint.keep=9")
    first = tiny.parent / "run" / "checkpoints" / "step-00000004"
    elsewhere = [*QUICK, f"output_dir={tiny.parent / 'other'}"]
    there = run(tiny, *elsewhere, resume=str(first))
    assert far_apart(there["parameters"], whole["parameters"]) == 0
    with pytest.raises(UserError, match="no checkpoint there; give a run folder"):
        run(tiny, *QUICK, resume=str(tiny.parent))
    # The same folder goes back to that step.
    assert far_apart(run(tiny, *QUICK, resume=str(first))["parameters"], whole["parameters"]) == 0
    steps = [line["step"] for line in told(tiny) if line["kind"] == "dev"]
    assert steps == [4, 8, 12]


def without(config: Path, task: str) -> Path:
    """The experiment without one of its tasks."""
    content = yaml.safe_load(config.read_text())
    del content["tasks"][task]
    path = config.with_name("without.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def test_changes_are_shown_or_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny, *QUICK, "steps=4")
    run(tiny, *QUICK, "steps=4", "optim.lr=0.5", resume="auto")
    table = capsys.readouterr().out
    assert "optim.lr" in table and "0.001" in table and "0.5" in table
    two = without(tiny, "near")
    with pytest.raises(UserError, match="the run has other tasks now: near; start anew, or go on all the same with"):
        run(two, *QUICK, resume="auto")
    allowed = load(Experiment, two, [*QUICK, "steps=8"])
    assert train(allowed, resume="auto", allow_changes=True)["tasks"].keys() == {"mood", "same"}
    rows = tiny.parent / "mood-train.tsv"
    rows.write_text(rows.read_text() + "mood99\tbam\t1\n")
    others = r"the train rows of task 'mood' are others now \(40 then, 41 now, with other texts\)"
    with pytest.raises(UserError, match=others):
        run(two, *QUICK, "steps=12", resume="auto")
    capsys.readouterr()
    train(load(Experiment, two, [*QUICK, "steps=8"]), resume="auto", allow_changes=True)
    assert re.search("train rows of mood +40 then, 41 now, with other texts", capsys.readouterr().out)
    # A task that comes back begins with a new head.
    with pytest.raises(UserError, match="the run has other tasks now: near"):
        run(tiny, *QUICK, "steps=12", resume="auto")
    more = load(Experiment, tiny, [*QUICK, "steps=12"])
    assert train(more, resume="auto", allow_changes=True)["tasks"].keys() == {"mood", "same", "near"}


def test_other_labels_or_words_are_other_rows(tiny: Path) -> None:
    run(tiny, *QUICK, "steps=4")

    def refused(*overrides: str) -> str:
        with pytest.raises(UserError, match="rows of task 'mood' are others now") as error:
            run(tiny, *QUICK, *overrides, resume="auto")
        return str(error.value).partition(" now (")[2].partition("); start anew")[0]

    same = "40 then, 40 now, with the same texts"
    labels = refused("tasks.mood.label={kind: classification, num_classes: 4}")
    assert labels == f"{same}, so their labels or ids; tasks.mood.label.num_classes was 3, is 4"
    words = tiny.parent / "words"
    shutil.copytree(load(Experiment, tiny).encoder.tokenizer_source, words)
    with (words / "vocab.txt").open("a") as file:
        file.write("another\n")
    assert refused(f"encoder.tokenizer={words}").endswith(f"encoder.tokenizer was {tiny.parent}, is {words}")
    tokens = refused("tasks.mood.max_length=7")
    assert re.fullmatch(f"{same} in \\d+ tokens instead of \\d+; tasks.mood.max_length was None, is 7", tokens)
    rows = tiny.parent / "mood-train.tsv"
    before = rows.read_text()
    rows.write_text(before[:-2] + ("1" if before[-2] != "1" else "2") + "\n")
    assert refused() == f"{same}, so their labels or ids"
    # An early checkpoint knows less.
    (last,) = (tiny.parent / "run" / "checkpoints").iterdir()
    state = json.loads((last / "state.json").read_text())
    del state["about"]["rows"]
    (last / "state.json").write_text(json.dumps(state))
    write_sums(last, COVERED)
    assert refused() == "their file, columns, labels, tokenizer or longest length has changed"


CARRIES = ["log.tensorboard=false", "steps=null", "stages=[{name: a, steps: 2}, {steps: 2, carry_moments: true}]"]


def test_a_task_less_in_a_run_that_carries_moments(tiny: Path) -> None:
    go_on_until(3, "ddp", tiny, *CARRIES)
    less = load(Experiment, without(tiny, "mood"), CARRIES)
    assert train(less, resume="auto", allow_changes=True)["tasks"].keys() == {"same", "near"}


def test_a_stage_less_than_were_trained(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = [*CARRIES[:2], "stages=[{name: a, steps: 2}]"]
    best = run(tiny, *CARRIES)["scores"]
    there = f"output_dir={tiny.parent / 'there'}"
    assert run(tiny, *fewer, there, resume=str(tiny.parent / "run"))["scores"] == best
    assert "nothing is left to train" in capsys.readouterr().out
    assert run(tiny, *fewer, resume="auto")["scores"] == best
    # With other tasks it is scored as it stands.
    less = load(Experiment, without(tiny, "mood"), fewer)
    scores = train(less, resume="auto", allow_changes=True)
    assert (scores["step"], scores["tasks"].keys()) == (4, {"same", "near"})
    assert "has scores of other tasks" in capsys.readouterr().out


def test_the_best_model_comes_along(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tiny, *QUICK, "checkpoint.keep=9")
    best = whole["scores"]
    of_best = tiny.parent / "run" / "checkpoints" / f"step-{best['step']:08d}"
    no_better = [*QUICK, "steps=16", "optim.lr=1e-12", f"output_dir={tiny.parent / 'there'}"]
    again = run(tiny, *no_better, resume=str(of_best))
    assert again["scores"] == best
    assert far_apart(again["kept"], whole["kept"]) == 0
    assert main(["verify", str(tiny.parent / "there")]) == 0
    assert "the next one scored replaces it" not in capsys.readouterr().out
    # One that came later, or is damaged, is left behind.
    heads = tiny.parent / "run" / "best" / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-1])
    shutil.rmtree(tiny.parent / "there")
    run(tiny, *no_better, resume=str(of_best))
    assert f"the model of step {best['step']}: the next one scored replaces it" in capsys.readouterr().out
