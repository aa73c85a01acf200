"""The plan's numbers, worked by hand on the tiny experiment: rows 40, 70, 7 in batches of 6, 9, 1."""

import io
import json
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from mtl_dist.cli import main
from mtl_dist.config import load
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment, GradientsConfig
from mtl_dist.studies.cost import Work, cost_of
from mtl_dist.studies.plan import Plan, plan, tables, timed_run
from mtl_dist.training.setup import load_data
from tests.distributed import on_ranks
from tests.trained import ENGINES

# 205 words, 64 positions, 2 segments and a norm of width 32; two layers of 4,224 + 4,192 + 128; a pooler of 32 x 33.
ENCODER = 271 * 32 + 64 + 2 * 8544 + 1056
HEADS = 3 * 33 + 33  # a cosine has none
ROWS = {"mood": 40, "same": 70, "near": 7}


def planned(path: Path, *overrides: str, ranks: int = 1) -> Plan:
    config = load(Experiment, path, overrides)
    tokenizer = load_tokenizer(config.encoder.tokenizer_source)
    return plan(config, tokenizer, load_data(config, tokenizer, Console(quiet=True)), ranks, "ddp", "fp32")


def shown(plan: Plan, **console: bool) -> str:
    file = io.StringIO()
    for part in tables(plan):
        Console(file=file, width=100, **console).print(part)
    return file.getvalue()


def mean_tokens(folder: Path) -> dict[str, float]:
    """Of a row: its words, and [CLS] or [SEP] around each sentence; the cross-encoder's pair shares a [SEP]."""
    means = {}
    for task, (sentences, marks) in {"mood": (1, 2), "same": (2, 3), "near": (2, 4)}.items():
        _, *lines = (folder / f"{task}-train.tsv").read_text().splitlines()
        words = sum(len(text.split()) for line in lines for text in line.split("\t")[1 : 1 + sentences])
        means[task] = words / len(lines) + marks
    return means


def test_a_joint_stage(tiny: Path) -> None:
    (stage,) = planned(tiny).stages
    assert stage.steps == 6
    assert {name: task.draws for name, task in stage.tasks.items()} == {"mood": 6, "same": 6, "near": 6}
    assert {name: task.rows_drawn for name, task in stage.tasks.items()} == {"mood": 36, "same": 54, "near": 6}
    assert {name: task.epochs for name, task in stage.tasks.items()} == {
        "mood": 36 / 40,
        "same": 54 / 70,
        "near": 6 / 7,
    }
    assert stage.tasks["mood"].probability == (1 / 3, 1 / 3)
    tokens = mean_tokens(tiny.parent)
    assert {name: task.tokens for name, task in stage.tasks.items()} == pytest.approx(
        {"mood": 36 * tokens["mood"], "same": 54 * tokens["same"], "near": 6 * tokens["near"]}
    )


def test_an_annealed_stage_goes_from_its_first_probabilities_to_its_last(tiny: Path) -> None:
    plan = planned(tiny, "mixer.kind=annealed", "steps=null", "epochs=2")
    (stage,) = plan.stages
    # An epoch has 40/6 + 70/9 + 7 = 21.4 draws, three a step: 15 steps, the first 8 of them with alpha 1.
    assert stage.steps == 15
    last = {name: rows**0.2 / sum(rows**0.2 for rows in ROWS.values()) for name, rows in ROWS.items()}
    for name, rows in ROWS.items():
        assert stage.tasks[name].probability == pytest.approx((rows / 117, last[name]))
        assert stage.tasks[name].draws == pytest.approx(24 * rows / 117 + 21 * last[name])
    assert f"34.2% -> {last['mood']:.1%}" in shown(plan)


def test_every_stage_and_their_sums(tiny: Path) -> None:
    stages = "stages=[{name: all, steps: 4}, {trains: heads, tasks: [same], epochs: 2}, {name: idle, epochs: 0}]"
    plan = planned(tiny, stages, "steps=null", ranks=4)
    assert [(stage.name, stage.steps) for stage in plan.stages] == [("all", 4), ("2", 16), ("idle", 0)]
    assert plan.steps == 20
    assert plan.stages[1].tokens == pytest.approx(16 * 9 * mean_tokens(tiny.parent)["same"])
    assert plan.tokens == plan.stages[0].tokens + plan.stages[1].tokens
    assert [stage.trained_parameters for stage in plan.stages] == [ENCODER + HEADS, HEADS, ENCODER + HEADS]
    work = Work(ENCODER + HEADS, 2 * 8544, HEADS, shared=0, row=0, tasks=1, micro_batches=1)
    assert plan.stages[1].cost == cost_of(work, GradientsConfig(), "ddp", "fp32", 4)
    assert list(plan.stages[1].tasks) == ["same"]
    assert plan.stages[2].tasks["mood"].probability == (0, 0)


def repeated(plan: Plan) -> list[list[str]]:
    return [[name for name, task in stage.tasks.items() if task.repeated] for stage in plan.stages]


def test_rows_read_more_than_four_times_are_marked(tiny: Path) -> None:
    assert repeated(planned(tiny, "steps=28")) == [["mood"]]  # read 4.2, 3.6 and 4 times
    assert repeated(planned(tiny, "steps=29")) == [["mood", "near"]]
    # 4 epochs of 40 rows are 23 batches of 7, and one row: 4.025 times is four.
    assert repeated(planned(tiny, "steps=23", "tasks.mood.batch_size=7")) == [[]]


def test_stages_add_up_to_a_repetition(tiny: Path) -> None:
    stages = "stages=[{steps: 14}, {steps: 14, tasks: [mood, same]}, {epochs: 0}]"
    plan = planned(tiny, stages, "steps=null")
    assert repeated(plan) == [[], ["mood"], []]  # where nothing is drawn nothing is repeated
    assert plan.stages[1].tasks["mood"].epochs == pytest.approx(2.1)
    assert plan.stages[1].tasks["mood"].times_read == pytest.approx(4.2)


def test_a_fresh_subsample_reads_all_rows_and_a_fixed_one_its_own(tiny: Path) -> None:
    for subset, times in (("fresh", 72 / 40), ("fixed", 72 / 10)):
        plan = planned(tiny, f"tasks.mood.subsample={{rows: 10, subset: {subset}}}", "steps=12")
        mood = plan.stages[0].tasks["mood"]
        assert (mood.rows, mood.epoch_rows, mood.epochs, mood.times_read) == (40, 10, 7.2, times)
        assert mood.tokens == pytest.approx(72 * mean_tokens(tiny.parent)["mood"])
        assert repeated(plan)[0] == (["mood"] if subset == "fixed" else [])
        assert "10 of 40" in shown(plan)


def test_the_mark_is_seen_in_a_pipe_and_red_on_a_terminal(tiny: Path) -> None:
    plan = planned(tiny, "steps=28", ranks=2)
    text = shown(plan)
    assert text.count("! 4.2 times") == 1
    assert "rows read more than 4 times teach little new" in text
    assert "\x1b[1;31m! 4.2 times" in shown(plan, force_terminal=True, legacy_windows=False)
    assert "times" not in shown(planned(tiny))


def test_tables_fit_100_columns(tiny: Path) -> None:
    stages = "stages=[{name: everything, steps: 999999, mixer: {kind: annealed}}, {steps: 9}]"
    plan = planned(tiny, stages, "steps=null", "tasks.mood.subsample.rows=10", ranks=8)
    lines = shown(plan).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith(("mood", "same", "near")) for line in lines) == 6  # no cell takes a second line
    assert any(line.split()[:2] == ["total", "1,000,008"] for line in lines)


def test_the_command_prints_the_plan(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny), "--json", "--ranks", "4", "steps=28"]) == 0
    expected = planned(tiny, "steps=28", ranks=4)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(expected)))
    assert main(["plan", str(tiny), "--ranks", "4"]) == 0
    text = capsys.readouterr().out
    assert "162.1 kB" in text  # 2 x 3/4 x 4 x 27,012
    assert "on each of 4 ranks with DDP in fp32" in text
    assert main(["plan", str(tiny), "--ranks", "4", "--engine", "zero2", "precision=bf16"]) == 0
    assert "ZeRO-2 in bf16" in capsys.readouterr().out
    assert "estimated time" not in text
    assert not (tiny.parent / "run").exists()


def test_launched_processes_are_planned_for_and_one_talks(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["plan", str(tiny), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 2
    monkeypatch.setenv("RANK", "1")
    assert main(["plan", str(tiny), "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_the_launcher_says_what_trains(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine, precision in (("fsdp2", "fp32"), ("zero3", "bf16")):  # of ds_configs/zero3.json
        with monkeypatch.context() as launcher:
            for variable, value in ENGINES[engine].items():
                launcher.setenv(variable, value)
            assert main(["plan", str(tiny), "--json"]) == 0
            found = json.loads(capsys.readouterr().out)
            assert (found["engine"], found["precision"]) == (engine, precision)


def test_mistakes_end_with_2(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--ranks", "0"], "--ranks is 0; give 1 or more"),
        (["--ranks", "2", "--measure"], "--ranks is 2, but --measure runs on the processes launched, which are 1"),
        (
            ["--engine", "zero2", "--measure"],
            "--engine is zero2, but --measure trains with what is launched, which is ddp",
        ),
        (["tasks.mood.subsample.rows=41"], "tasks.mood.subsample.rows is 41, but train has only 40 rows"),
        (["gradients.combiner.kind=pcgard"], "gradients.combiner.kind is 'pcgard'; did you mean 'pcgrad'?"),
        (["stages=[{trains: heads, tasks: [near]}]"], "stage '1': task 'near' has nothing to train"),
    ):
        assert main(["plan", str(tiny), *arguments]) == 2
        output = capsys.readouterr()
        assert message in output.err
        assert output.err.count("\n") == 1
        assert output.out == ""


# In its first steps a sequential stage draws one task only; 12 steps are more than unimax allows; one has no steps.
STAGES = """stages=[
    {name: in_turn, epochs: 3, mixer: {kind: sequential}},
    {name: short, steps: 2, mixer: {kind: unimax, max_epochs: 0.5}},
    {name: idle, epochs: 0},
]"""


def test_a_timed_run_draws_as_the_whole_stage_does(tiny: Path) -> None:
    overrides = [STAGES.replace("{name: idle", "{name: joint, steps: 50}, {name: idle"), "steps=null"]
    plan = planned(tiny, *overrides)
    run = timed_run(load(Experiment, tiny, overrides), plan, tiny.parent / "elsewhere")
    drawn = {}
    for stage in run.all_stages():
        order = stage.order(ROWS, seed=0)
        assert order.steps == 12
        drawn[stage.name] = [Counter(task for task, _ in order.draws(step)) for step in range(order.steps)]
    assert list(drawn) == ["in_turn", "short", "joint"]
    # Three epochs are 20, 24 and 21 draws; 12 of 65 are 3.7, 4.4 and 3.9.
    in_turn = sum(drawn["in_turn"], Counter())
    assert all(abs(in_turn[task] - 12 * n / 65) < 1 for task, n in {"mood": 20, "same": 24, "near": 21}.items())
    assert drawn["joint"] == [Counter(ROWS.keys())] * 12
    assert run.output_dir == tiny.parent / "elsewhere"
    assert not any(task.dev for task in run.tasks.values())  # nothing is scored


def test_measured_times(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny.parent / "run").mkdir()
    (tiny.parent / "run" / "mine.txt").write_text("untouched")
    assert main(["prepare", str(tiny)]) == 0
    capsys.readouterr()
    before = sorted(tiny.parent.rglob("*"))
    start = time.perf_counter()
    assert main(["plan", str(tiny), STAGES, "steps=null", "evaluate.best_by=mood", "--measure", "--json"]) == 0
    took = time.perf_counter() - start
    plan = json.loads(capsys.readouterr().out)
    assert sorted(tiny.parent.rglob("*")) == before

    in_turn, short, idle = plan["stages"]
    for stage in (in_turn, short):
        assert 0 < stage["seconds_per_step"] < took
        assert stage["seconds"] == pytest.approx(stage["steps"] * stage["seconds_per_step"])
        assert stage["tokens_per_second"] == pytest.approx(stage["tokens"] / stage["seconds"])
    assert (idle["seconds_per_step"], idle["seconds"]) == (None, 0)
    assert plan["seconds"] == in_turn["seconds"] + short["seconds"]

    assert main(["plan", str(tiny), "--measure"]) == 0
    assert "estimated time" in capsys.readouterr().out


def printed(*arguments: str) -> str:
    """What a command prints on this rank."""
    with redirect_stdout(io.StringIO()) as output:
        assert main(arguments) == 0
    return output.getvalue()


def test_two_processes_measure_and_one_talks(tiny: Path) -> None:
    first, second = on_ranks(2, printed, "plan", str(tiny), "--measure", "--json")
    assert second == ""
    plan = json.loads(first)
    assert plan["ranks"] == 2
    assert plan["seconds"] > 0
    assert plan["stages"][0]["cost"]["bytes_sent_per_step"] == 4 * (ENCODER + HEADS)
