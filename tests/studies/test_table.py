"""The table of systems, from outcomes that are made up: what stands beside what, and what is not compared.

python -m pytest tests/studies/test_table.py
"""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from mtl_dist.config import UserError, load
from mtl_dist.experiment import Experiment
from mtl_dist.studies.document import Study, differences, sections_of, write
from mtl_dist.studies.published import Published, published_beside
from mtl_dist.studies.table import Cells, Outcome, Row, Section, cells_of, changes_of, differing, stages_of

ALONE = ("tasks.same=null", "tasks.near=null", "evaluate.best_by=mood")
PUBLISHED = """
encoder: bert-base-uncased
names: {mood: Mood}
reports:
  r1:
    title: what helps
    score: overall_b
    reference: base
    systems:
      alone: {where: Table 1, scores: {mood: 0.5}}
      base: {where: Table 2, overall_b: 0.4, scores: {mood: 0.4, near: -0.007}, printed: {near: -0.009 to -0.005}}
      stages:
        where: Table 3
        scores: {mood: 0.6, same: 0.7, near: 0.8}
        after_stage: {one: {mood: 0.6, same: 0.1, near: 0.1}, two: {mood: 0.2, same: 0.7, near: 0.8}}
      silent: {where: page 9, says: no numbers}
"""


def outcome(seed: int, tokens: int = 2_000_000, **scores: float | None) -> Outcome:
    """A run's outcome; overall scores are added where they are given."""
    rows = {name: 100 for name in scores if not name.startswith("overall")}
    return Outcome(Path(f"run{seed}"), seed, 40, 20, tokens, 3.0, scores, {}, {}, rows, {}, "")


def row(tiny: Path, key: str, *outcomes: Outcome, overrides: tuple[str, ...] = (), **fields: Any) -> Row:
    return Row(key, load(Experiment, tiny, overrides), [*outcomes], fields.pop("wanted", len(outcomes)), **fields)


def joint(seed: int, mood: float, near: float | None = 0.4, **fields: Any) -> Outcome:
    overall = (mood + 0.6 + (near or 0)) / 3
    return outcome(seed, mood=mood, same=0.6, near=near, overall_a=overall + 0.1, overall_b=overall, **fields)


def published(tiny: Path) -> Published:
    (tiny.parent / "published.yaml").write_text(PUBLISHED)
    return published_beside([tiny])


def test_published_stands_beside_ours(tiny: Path) -> None:
    numbers = published(tiny)
    systems = numbers.reports["r1"].systems
    rows = [
        row(tiny, "base", joint(0, 0.4), joint(1, 0.5), published=systems["base"]),
        row(tiny, "alone", outcome(0, 1_000_000, mood=0.5), overrides=ALONE, wanted=2, published=systems["alone"]),
        row(tiny, "silent", wanted=2, published=systems["silent"]),
        row(tiny, "mine", joint(0, 0.9)),
    ]
    of_report, mine = sections_of(rows, numbers)
    assert [row.key for row in mine.rows] == ["mine"]
    assert cells_of(of_report).as_markdown() == "\n".join(
        [
            "| system | where | seeds | Mood, published | Mood, ours | same, ours | near, published | near, ours "
            "| overall A, ours | overall B, published | overall B, ours | overall B against reference | p | Δm "
            "| M tokens | best step |",
            "| --- | --- |" + " ---: |" * 14,
            "| alone | Table 1 | 1 of 2 | 0.500 | 0.500 |  |  |  |  |  |  |  |  | baseline | 1 (0.5 ×) | 20 of 40 |",
            "| base | Table 2 | 2 | 0.400 | 0.450 ± 0.071 | 0.600 ± 0.000 | -0.009 to -0.005 | 0.400 ± 0.000 "
            "| 0.583 ± 0.024 | 0.400 | 0.483 ± 0.024 | reference |  | -10.0% (1 of 3) | 2 | 20 of 40 |",
            "| silent | page 9 | 0 of 2 |  | – | – |  | – | – |  | – | – |  | – | – | – |",
        ]
    )
    notes = cells_of(of_report).notes
    assert notes[0].endswith(": Mood 0.050 (100 rows), same 0.049 (100 rows), near 0.084 (100 rows).")
    assert notes[1].startswith("Rows with × ")
    assert notes[-1] == "silent: no numbers."


def test_differences_are_over_the_seeds_that_both_have(tiny: Path) -> None:
    base = row(tiny, "base", joint(0, 0.4), joint(1, 0.5), joint(2, 0.6))
    better = row(tiny, "better", joint(3, 0.1), joint(2, 0.7), joint(1, 0.9), overrides=("optim.lr=1",))
    once = row(tiny, "once", joint(1, 0.2), overrides=("optim.lr=2",))
    other = row(tiny, "other", joint(7, 0.2), overrides=("optim.lr=3",))
    section = Section([base, better, once, other])
    assert section.score == "overall_a"
    found = section.difference(better)
    assert found is not None and found.n == 2
    assert found.mean == pytest.approx((0.4 + 0.1) / 2 / 3)
    assert found.p == pytest.approx(0.34404, abs=1e-5)  # t = 0.25 / 0.15 with one degree of freedom
    assert cells_of(section).rows[2][-4:-2] == ["-0.100", "–"]
    assert cells_of(section).rows[3][-4:-2] == ["", ""]


def test_overall_scores_of_other_tasks_are_not_compared(tiny: Path) -> None:
    base, alone = row(tiny, "base", joint(0, 0.4)), row(tiny, "alone", outcome(0, mood=0.5), overrides=ALONE)
    two = row(tiny, "two", joint(0, 0.9), overrides=("tasks.near=null",))
    section = Section([base, alone, two])
    assert section.difference(alone) is None and section.difference(two) is None
    by_mood = Section([alone, base, two])
    found = by_mood.difference(base)
    assert by_mood.score == "mood" and found is not None and found.mean == pytest.approx(-0.1)


def test_delta_m_worked_by_hand(tiny: Path) -> None:
    same_alone = ("tasks.mood=null", "tasks.near=null", "evaluate.best_by=same")
    rows = [
        row(tiny, "joint", joint(0, 0.4), joint(1, 0.6)),
        row(tiny, "mood-weak", outcome(0, mood=0.1), overrides=ALONE),
        row(tiny, "mood", outcome(0, mood=0.4), outcome(1, mood=0.4), overrides=(*ALONE, "optim.lr=1")),
        row(tiny, "same", outcome(0, same=0.75), overrides=same_alone),
    ]
    section = Section(rows)
    assert {task: row.key for task, row in section.baselines.items()} == {"mood": "mood", "same": "same"}
    found = section.gain(rows[0])
    assert found is not None and found.tasks == ["mood", "same"]
    assert found.value == pytest.approx((0.25 - 0.2) / 2)  # (0.5 - 0.4) / 0.4, (0.6 - 0.75) / 0.75
    cells = cells_of(section)
    of_gain = cells.header.index("Δm")
    assert [line[of_gain] for line in cells.rows] == ["+2.5% (2 of 3)", "one task", "baseline", "baseline"]

    fewer = replace(rows[3].outcomes[0], dev_rows={"same": 99})
    elsewhere = Section([*rows[:3], replace(rows[3], outcomes=[fewer])])
    found = elsewhere.gain(rows[0])
    assert found is not None and found.tasks == ["mood"]


def test_an_undefined_correlation_counts_as_nothing_and_is_said(tiny: Path) -> None:
    section = Section([row(tiny, "base", joint(0, 0.4, None), joint(1, 0.4, 0.5))])
    assert section.rows[0].by_seed("near") == {0: 0.0, 1: 0.5}
    assert "base: a correlation is undefined in 1 of the runs, and counts as 0." in cells_of(section).notes


def test_scores_after_stages_are_those_of_a_tasks_own_stage(tiny: Path) -> None:
    numbers = published(tiny)
    after = {"one": {"mood": 0.9, "same": 0.0, "near": 0.0}, "two": {"mood": 0.1, "same": 0.8, "near": None}}
    own = {"mood": 0.9, "same": 0.8, "near": None}
    of_stages = replace(joint(0, 0.1), after_stage=after, own_stage=own)
    staged = row(tiny, "stages", of_stages, published=numbers.reports["r1"].systems["stages"])
    (section,) = sections_of([staged], numbers)
    assert section.rows[0].by_seed("mood") == {0: 0.9} and section.rows[0].by_seed("near") == {0: 0.0}
    cells = stages_of(section, section.rows[0])
    assert cells is not None
    assert cells.rows == [
        ["one", "0.600", "0.900", "0.100", "0.000", "0.100", "0.000"],
        ["two", "0.200", "0.100", "0.700", "0.800", "0.800", "0.000"],
    ]
    assert stages_of(section, row(tiny, "base", joint(0, 0.4))) is None


def test_keys_in_which_configs_differ() -> None:
    joint = {
        "tasks": {"a": {"lr": 1}, "b": {"lr": 2}},
        "mixer": {"kind": "joint"},
        "rules": [{"m": 1}, {"m": 2}],
        "n": 0,
    }
    turns = {
        "tasks": {"a": {"lr": 1}, "b": {"lr": 3}},
        "mixer": {"kind": "turns", "dry": "x"},
        "rules": [{"m": 1}, {"m": 3}],
    }
    alone = {"tasks": {"a": {"lr": 1}}, "mixer": {"kind": "joint"}, "rules": [], "n": 0}
    assert differing([joint, turns, alone]) == {
        "tasks.b": ["there", "there", None],
        "tasks.b.lr": [2, 3, None],
        "mixer.kind": ["joint", "turns", "joint"],
        "mixer.dry": [None, "x", None],
        "rules": [joint["rules"], turns["rules"], []],
        "n": [0, None, 0],
    }
    assert differing([joint, turns])["rules.1.m"] == [2, 3]
    assert differing([joint, joint]) == {}


def test_what_only_one_run_has_is_no_difference(tiny: Path) -> None:
    rows = [
        row(tiny, "a", overrides=("seed=1", "output_dir=x", "cache_dir=y", "log.every_steps=1")),
        row(tiny, "b", overrides=("optim.lr=1",)),
    ]
    changes = changes_of(rows)
    assert changes is not None
    assert changes.rows == [["optim.lr", "0.001", "a"], ["", "1.0", "b"]]
    assert changes_of(rows[:1]) is None


def study_of(tiny: Path, *outcomes: Outcome) -> Study:
    """A study of one published system at a tenth of its length."""
    numbers = published(tiny)
    rows = [
        row(tiny, "base", *outcomes, wanted=2, published=numbers.reports["r1"].systems["base"]),
        row(tiny, "mine", *outcomes, wanted=2, overrides=("optim.lr=1",)),
    ]
    return Study(["mtl-dist", "study"], 0.1, ["data_dir=x"], sections_of(rows, numbers), numbers)


def test_what_differs_from_the_reports_is_said(tiny: Path) -> None:
    numbered = replace(joint(0, 0.4), train_rows={"mood": 40})
    study = study_of(tiny, numbered)
    rows = {"train_rows": {"mood": 50, "same": 9}, "dev_rows": {"mood": 6}}
    study = replace(study, published=study.published.model_copy(update=rows))
    assert [*differences(study)] == [
        ("encoder", "bert-base-uncased", "new, of a shape of its own"),
        ("train rows", "Mood 50", "Mood 40"),
        ("dev rows", "Mood 6", "Mood 100, same 100, near 100"),
        ("budget: length of every stage", "full", "0.1 of it"),
        ("seeds", "not given", "2"),
        ("override", "", "`data_dir=x`"),
    ]


def test_the_documents_are_whole_however_much_is_done(tiny: Path) -> None:
    ours = []
    for outcomes in ((), (joint(0, 0.4),), (joint(0, 0.4), joint(1, 0.6))):
        write(study_of(tiny, *outcomes), tiny.parent)
        text = (tiny.parent / "study.md").read_text()
        assert f"| runs done | {2 * len(outcomes)} of 4 |" in text
        assert "## Report r1: what helps" in text and "## Without published numbers" in text
        assert (tiny.parent / "study.csv").read_text().count("\n") == 1 + 2 * len(outcomes)
        document = json.loads((tiny.parent / "study.json").read_text())
        assert [len(part["rows"]) for part in document["reports"]] == [1, 1]
        picture = Image.open(tiny.parent / "study.png").convert("RGB")
        pixels = {colour: number for number, colour in picture.getcolors(maxcolors=2**24) or []}
        assert pixels[0xD5, 0x5E, 0x00] > 0  # published
        ours.append(pixels[0x00, 0x72, 0xB2])  # in the legend; then eight dots, of each system three tasks and A or B
        assert not [*tiny.parent.glob("draft-*")]
    assert ours[0] * 4 < ours[1]


def test_a_mistake_in_published_numbers_is_one_line(tiny: Path) -> None:
    file = tiny.parent / "published.yaml"
    for wrong, line in (
        ("scores: {mood: 0.5}", "reports.r1.systems.alone has no field 'score'; did you mean 'scores'?"),
        ("reference: base", "reports.r1: the reference 'bse' is none of its systems"),
    ):
        file.write_text(PUBLISHED.replace(wrong, wrong.replace("scores:", "score:").replace("base", "bse"), 1))
        with pytest.raises(UserError) as error:
            published_beside([tiny])
        assert line in str(error.value)
        assert str(error.value).startswith(f"{file}:") and "\n" not in str(error.value)


def test_scores_of_another_metric_or_other_dev_rows_are_not_compared(tiny: Path) -> None:
    base = row(tiny, "base", joint(0, 0.4), joint(1, 0.5))
    metric = row(tiny, "metric", joint(0, 0.4), joint(1, 0.5), overrides=("tasks.near.metric=spearman",))
    undone = row(tiny, "no dev", joint(0, 0.4), joint(1, 0.5), overrides=("tasks.near.dev=null",))
    fewer = [replace(joint(seed, 0.4), dev_rows={"mood": 9, "same": 100, "near": 100}) for seed in (0, 1)]
    rows = row(tiny, "rows", *fewer)
    section = Section([base, metric, undone, rows])
    assert [section.difference(other) for other in (metric, undone, rows)] == [None, None, None]
    assert section.standard_errors()["mood"][1] == 100


def test_systems_of_one_task_are_compared_by_it(tiny: Path) -> None:
    own = ("tasks.same=null", "tasks.near=null")  # evaluate.best_by is overall_a, the mean of one
    one, other = (row(tiny, key, outcome(0, mood=score), overrides=own) for key, score in (("a", 0.4), ("b", 0.6)))
    section = Section([one, other])
    found = section.difference(other)
    assert section.score == "mood" and found is not None and found.mean == pytest.approx(0.2)


def test_a_task_that_was_never_scored_has_no_zero_after_a_stage(tiny: Path) -> None:
    scored: dict[str, dict[str, float | None]] = {"1": {"mood": 0.5, "near": None}, "2": {"mood": 0.4, "near": 0.3}}
    found = replace(joint(0, 0.4), after_stage=scored)
    stages = stages_of(Section([r := row(tiny, "x", found)]), r)
    assert stages is not None
    assert stages.rows == [["1", "0.500", "–", "0.000"], ["2", "0.400", "–", "0.300"]]


def test_cells_are_shown_as_they_are_and_long_values_by_both_ends(tiny: Path) -> None:
    rules = [f"[{{match: '^{n}', lr_scale: 2, weight_decay: 0, freeze: false}}, {{match: '[a-z]+'}}]" for n in "eh"]
    rows = [row(tiny, key, joint(0, 0.4), overrides=(f"optim.rules={rules[key > 'a']}",)) for key in "ab"]
    changes = changes_of(rows)
    assert changes is not None and len(changes.rows) == 2  # which begin alike, and are not the same
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(Cells(["key", "value"], [["rule", "[a-z]+"], ["[/]", "[red]"]], 2, []).as_table())
    assert "[a-z]+" in console.export_text(clear=False) and "[red]" in console.export_text()
