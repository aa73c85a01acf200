"""Stages and mixers in the loop: against the same training written out, on one rank and on several.

python -m pytest tests/training/test_stages.py
"""

import json
import time
import weakref
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from mtl_dist.config import UserError, load
from mtl_dist.data.batches import TrainBatches, make_batch
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment
from mtl_dist.surgery.surgery import Surgery
from mtl_dist.training.setup import load_data
from tests.distributed import on_ranks
from tests.trained import NO_DROPOUT, far_apart, run, written_out

QUIET = [*NO_DROPOUT, "evaluate.every_steps=100", "log.tensorboard=false"]
# Without dev sets it is the last model that is kept.
LAST = [*QUIET, *(f"tasks.{task}.dev=null" for task in ("mood", "same", "near"))]
STAGES = """stages=[
    {name: heads, tasks: [mood, same], trains: heads, steps: 3, lr: 1.0e-2},
    {name: first, tasks: [mood, same], steps: 7, lr: 2.0e-3, schedule: {kind: linear, warmup_steps: 3},
     mixer: {kind: temperature, draws_per_step: 3}, gradients: {reweight: per_sample}},
    {name: second, tasks: [near, mood], epochs: 1, mixer: {kind: sequential}},
]"""
CARRIED = "stages.2.carry_moments=true"


@pytest.mark.parametrize("changes", [[], [CARRIED], ["tasks.mood.subsample={rows: 20, subset: fixed}"]], ids=str)
def test_stages_are_one_training_after_the_other(tiny: Path, changes: list[str]) -> None:
    overrides = [*LAST, STAGES, *changes]
    assert far_apart(run(tiny, *overrides)["parameters"], written_out(tiny, *overrides)) < 1e-6


def test_stages_do_not_depend_on_the_number_of_processes(tiny: Path) -> None:
    overrides = [*LAST, STAGES, CARRIED]
    expected = written_out(tiny, *overrides)
    for world in (2, 4):
        for other in on_ranks(world, run, tiny, *overrides):
            assert far_apart(other["parameters"], expected) < 1e-6
    # The checks can fail: moments that are not carried over, or rows that do not count alike, move the parameters more.
    for change in ("stages.2.carry_moments=false", "stages.1.gradients.reweight=per_task", "stages.0.trains=all"):
        assert far_apart(written_out(tiny, *overrides, change), expected) > 1e-4


@pytest.mark.parametrize(
    "mixer",
    ["{kind: temperature, draws_per_step: 4, draw: balanced}", "{kind: round_robin, when_dry: drop_out}"],
    ids=lambda mixer: mixer.split()[1],
)
def test_mixers_do_not_depend_on_the_number_of_processes(tiny: Path, mixer: str) -> None:
    overrides = [*LAST, "steps=20", f"mixer={mixer}"]
    expected = written_out(tiny, *overrides)
    for other in on_ranks(2, run, tiny, *overrides):
        assert far_apart(other["parameters"], expected) < 1e-6


def test_bf16_goes_through_stages(tiny: Path) -> None:
    exact, rounded = (run(tiny, *LAST, STAGES, f"precision={p}")["parameters"] for p in ("fp32", "bf16"))
    assert 1e-6 < far_apart(rounded, exact) < 5e-2


DECAY = ["optim.weight_decay=0.5", "optim.rules=[{match: '.*'}]", "optim.lr=0.1"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_task_absent_from_a_step_leaves_its_head_untouched(tiny: Path, world: int) -> None:
    before = run(tiny, *QUIET, "epochs=0", "steps=null")["parameters"]
    # Step 0 is mood's turn, and weight decay would move whatever has a gradient, were it zero.
    overrides = [*QUIET, *DECAY, "steps=1", "mixer={kind: round_robin}"]
    after = run(tiny, *overrides) if world == 1 else on_ranks(world, run, tiny, *overrides)[0]
    moved = {name for name, p in after["parameters"].items() if not p.equal(before[name])}
    assert "heads.mood.layers.0.weight" in moved
    assert not any(name.startswith("heads.same") for name in moved)


def test_all_tasks_are_scored_after_every_stage(tiny: Path) -> None:
    overrides = [*NO_DROPOUT, STAGES, "log.every_steps=100"]
    scores = run(tiny, *overrides)["scores"]
    records = [json.loads(line) for line in (tiny.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    last = {record["stage"]: record for record in records if record["kind"] == "dev"}
    # 3 steps, 7 steps, then an epoch of near (7 rows by 1) and mood (40 rows by 6).
    assert [(stage, record["step"]) for stage, record in last.items()] == [("heads", 3), ("first", 10), ("second", 24)]
    assert all(record["tasks"].keys() == {"mood", "same", "near"} for record in last.values())
    assert scores["step"] in {record["step"] for record in records}
    trained = {record["stage"]: record for record in records if record["kind"] == "train"}
    assert trained["first"]["draws"]["near"] == 0
    assert sum(trained["first"]["draws"].values()) == 2 * 3 + 3 * 7
    assert trained["second"]["draws"]["near"] == 7


def test_waiting_for_batches_is_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reported(what: str) -> list[float]:
        records = [json.loads(line) for line in (tiny.parent / "run" / "metrics.jsonl").read_text().splitlines()]
        return [record[what] for record in records if record["kind"] == "train"]

    quick = [*QUIET, "steps=6", "log.every_steps=2"]
    run(tiny, *quick)
    assert min(reported("data_wait")) < 0.3
    pause = 20 * median(reported("seconds_per_step"))
    of_step = TrainBatches.of_step

    def slow(self: TrainBatches, step: int) -> Any:
        time.sleep(pause)
        return of_step(self, step)

    monkeypatch.setattr(TrainBatches, "of_step", slow)
    run(tiny, *quick)
    assert all(wait > 0.7 for wait in reported("data_wait"))


def test_no_two_steps_have_the_same_dropout(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[int, ...]] = []
    monkeypatch.setattr("mtl_dist.training.loop.seed_step", lambda *seed: seeds.append(seed))
    run(tiny, *QUIET, STAGES)
    assert len(seeds) == len(set(seeds)) == 24


def test_the_stage_matrix_is_shown(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny, *QUIET, STAGES)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(i for i, line in enumerate(lines) if line[:2] == ["after", "stage"])
    assert lines[header][2:] == ["mood", "accuracy", "same", "accuracy", "near", "pearson", "overall_a", "overall_b"]
    assert [line[0] for line in lines[header + 1 : header + 4]] == ["heads", "first", "second"]
    assert ["stage", "first:", "mood,", "same,", "7", "steps"] in lines


def test_no_epochs_score_the_untrained_model(tiny: Path) -> None:
    scores = run(tiny, "steps=null", "epochs=0")["scores"]
    assert scores["step"] == 0
    assert scores["tasks"]["mood"]["rows"] == 5


def test_heads_leave_the_encoder_as_it_was_and_all_moves_it(tiny: Path) -> None:
    heads = "tasks.near.head={kind: sbert}"
    before = run(tiny, *LAST, heads, "epochs=0", "steps=null")["parameters"]
    for trains, moves in (("heads", False), ("all", True), ("['layers.1', heads]", True)):
        after = run(tiny, *LAST, heads, f"stages=[{{trains: {trains}}}]")["parameters"]
        moved = {name for name, p in after.items() if not p.equal(before[name])}
        assert {f"heads.{task}.layers.0.weight" for task in ("mood", "same", "near")} <= moved
        assert any(name.startswith("encoder") for name in moved) == moves
        assert ("encoder.layers.0.feed_forward.up.weight" in moved) == (trains == "all")


def saved_bytes_and_seconds(config: Path, trains: str) -> tuple[int, float]:
    """What one forward pass keeps for the backward pass, and how long both take, where the stage trains `trains`."""
    from mtl_dist.training.setup import build_model, stage_optimizer

    experiment = load(Experiment, config, [f"stages=[{{trains: {trains}, tasks: [mood]}}]", "tasks.mood.pooling=mean"])
    shape = experiment.encoder.shape.model_copy(update={"hidden_size": 256, "intermediate_size": 1024})  # type: ignore[union-attr]
    experiment = experiment.model_copy(update={"encoder": experiment.encoder.model_copy(update={"shape": shape})})
    tokenizer = load_tokenizer(experiment.encoder.tokenizer_source)
    split = load_data(experiment, tokenizer, Console(quiet=True))["train"]["mood"]
    model = build_model(experiment, tokenizer, "cpu")
    stage_optimizer(model, experiment.all_stages()[0], "cpu")
    batch = make_batch("mood", split, torch.arange(40).numpy())
    saved: dict[int, int] = {}  # by address: one tensor may be kept several times

    def count(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model("mood", batch.packed).sum().backward()
    seconds = []
    for _ in range(7):
        start = time.process_time()
        model("mood", batch.packed).sum().backward()
        seconds.append(time.process_time() - start)
    assert all((p.grad is None) == (trains == "heads") for p in model.encoder.layers.parameters())
    return sum(saved.values()), min(seconds)  # as other work may slow some


def test_a_frozen_encoder_computes_no_gradients(tiny: Path) -> None:
    (heads_bytes, heads_seconds), (all_bytes, all_seconds) = (
        saved_bytes_and_seconds(tiny, t) for t in ("heads", "all")
    )
    assert heads_bytes < all_bytes / 20
    assert heads_seconds < 0.7 * all_seconds  # a forward pass is about a third of both


def complaint(config: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        run(config, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{tasks: [moood]}]", "stages[0].tasks: there is no task 'moood', only mood, same, near"),
        ("[{tasks: [mood, mood]}]", "stages[0].tasks names a task twice: mood, mood"),
        ("[{epochs: 1, steps: 2}]", "stages[0] has both epochs and steps; give one of them"),
        ("[{name: a}, {name: a}]", "stages: two have the same name: a, a"),
        ("[{trains: []}]", "stages[0].trains is []; must have at least 1 item, not 0"),
        ("[{trains: head}]", "stages[0].trains: 'head' is neither all nor heads; patterns come in a list: ['head']"),
        ("[{trains: ['(']}]", "'(' is not a regular expression"),
        ("[{trains: [encodr]}]", "stage '1': trains matches no parameter: 'encodr'; did you mean 'encoder'?"),
        ("[{mixer: {kind: explicit, p: {mood: 1}}}]", "stage '1': mixer.p names mood; the tasks are mood, same, near"),
        ("[{carry_moments: true}]", "stages[0].carry_moments: no stage comes before this one"),
        ("[{name: ''}]", "stages[0].name is ''; must have at least 1 character"),
        ("[{}, {mixer: {kind: unimax, max_epochs: 0.1}}]", "stage '2': mixer: 6 steps draw 18 batches"),
        (
            "[{}, {trains: heads}]",
            "stage '2': task 'near' has nothing to train: trains and optim.rules freeze the encoder and all of its",
        ),
        (
            "[{mixer: {kind: round_robin}, gradients: {combiner: {kind: pcgrad}}}]",
            "stage '1': mixer round_robin draws one task a step, but gradients.combiner pcgrad needs several",
        ),
    ],
)
def test_stages_that_cannot_be(tiny: Path, stages: str, message: str) -> None:
    text = complaint(tiny, f"stages={stages}")
    assert message in text
    assert len(text.splitlines()) == 1
    assert not (tiny.parent / "run").exists()  # found before anything was done


def test_a_misfit_is_placed_where_it_was_written(tiny: Path) -> None:
    below = tiny.with_name("below.yaml")
    below.write_text(tiny.read_text())
    text = "extends: below.yaml\nstages:\n- {}\n- {tasks: [moood]}\n"
    tiny.write_text(text)
    assert complaint(tiny).startswith(f"{tiny}:4: stages[1].tasks: there is no task 'moood'")
    assert complaint(tiny, "stages.1.tasks=[same]", "evaluate.best_by=x").startswith("override 'evaluate.best_by=x': ")
    # A mistake in what stages inherit is not repeated for each of them.
    tiny.write_text("extends: below.yaml\ngradients: {clip_norm: -1}\nstages:\n- {gradients: {accumulation: 2}}\n")
    assert complaint(tiny) == f"{tiny}:2: gradients.clip_norm is -1; must be greater than 0"


def test_a_mixer_of_other_tasks_is_refused(tiny: Path) -> None:
    for stages in ("stages=[]", "stages=[{}]"):
        text = complaint(tiny, "mixer={kind: sequential, order: [same, mood]}", stages)
        assert text.endswith("mixer.order names same, mood; the tasks are mood, same, near; name each of them once")


def test_a_run_has_one_length(tiny: Path) -> None:
    message = "epochs (2) and steps (6) are both given; set one of them to null"
    assert complaint(tiny, "epochs=2") == f"override 'epochs=2': {message}"
    assert load(Experiment, tiny, ["epochs=2", "steps=null"]).all_stages()[0].epochs == 2


def test_a_subsample_larger_than_the_split_is_refused(tiny: Path) -> None:
    text = complaint(tiny, "tasks.near.subsample={rows: 8}")
    assert text == "tasks.near.subsample.rows is 8, but train has only 7 rows"


def test_what_a_stage_leaves_out_is_the_experiments(tiny: Path) -> None:
    overrides = ["gradients.accumulation=2", "stages=[{gradients: {clip_norm: 9}}, {lr: 0.5}]"]
    first, second = load(Experiment, tiny, overrides).all_stages()
    assert (first.gradients.accumulation, first.gradients.clip_norm) == (2, 9)
    assert (second.gradients.accumulation, second.gradients.clip_norm) == (2, 0.5)
    assert (first.optim.lr, second.optim.lr) == (1e-3, 0.5)
    assert [stage.name for stage in (first, second)] == ["1", "2"]
    assert (first.steps, first.tasks.keys()) == (6, {"mood", "same", "near"})


def test_dumped_stages_are_the_same(tiny: Path, tmp_path: Path) -> None:
    from mtl_dist.config import dump

    overrides = [STAGES, "gradients.accumulation=3", "stages.1.gradients.clip_norm=null"]
    experiment = load(Experiment, tiny, [*overrides, "mixer={kind: temperature, temperature: inf}"])
    (tmp_path / "dumped.yaml").write_text(dump(experiment))
    again = load(Experiment, tmp_path / "dumped.yaml")
    assert again == experiment
    assert again.all_stages() == experiment.all_stages()
    gradients = again.all_stages()[1].gradients
    assert (gradients.accumulation, gradients.clip_norm, gradients.reweight) == (3, None, "per_sample")


def stage_lr(config: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (config.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record["lr"] for record in records if record["kind"] == "train"]


def test_every_stage_has_its_own_learning_rate(tiny: Path) -> None:
    run(tiny, *QUIET, "log.every_steps=1", STAGES, "stages.2.epochs=null", "stages.2.steps=2")
    rates = [next(iter(lr.values())) for lr in stage_lr(tiny)]
    # Three steps up to 2e-3, four down to 0; then the experiment's own.
    assert rates == pytest.approx([1e-2] * 3 + [2e-3 / 3, 4e-3 / 3, 2e-3, 2e-3, 1.5e-3, 1e-3, 0.5e-3] + [1e-3] * 2)


def test_the_rows_of_a_stage_are_gone_when_the_next_one_begins(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    reserve = Surgery.__init__

    def noted(surgery: Surgery, *arguments: Any, **settings: Any) -> None:
        alive.append(sum(rows() is not None for rows in made))
        reserve(surgery, *arguments, **settings)
        made.append(weakref.ref(surgery.rows))

    monkeypatch.setattr(Surgery, "__init__", noted)
    stages = "stages=[{steps: 1}, {steps: 1, tasks: [mood, near]}, {steps: 1}]"
    run(tiny, "steps=null", "gradients.combiner={kind: pcgrad}", stages)
    assert alive == [0, 0, 0]
