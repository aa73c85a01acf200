"""What a run folder tells, also where it is damaged.

python -m pytest tests/runs/test_story.py
"""

import json
from pathlib import Path

import pytest

from mtl_dist.runs.story import Reader, records_of, story_of
from tests.trained import run


def test_a_story_has_the_best_scores_and_what_was_trained(tiny: Path) -> None:
    scores = run(tiny, "evaluate.every_steps=2", "log.tensorboard=false")["scores"]
    story = story_of(tiny.parent / "run")
    assert story.ended
    assert {key: story.best[key] for key in scores} == scores
    assert story.tokens == story.of_kind("end")[0]["tokens"] == story.of_kind("train")[-1]["tokens"] > 0


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    assert list(records_of(tmp_path)) == []
    lines = [{"kind": "start", "step": 0, "steps": 9}, {"kind": "train", "step": 2}]
    written = [json.dumps(line) for line in lines]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join([written[0], "\0" * 9, "[1]", '{"step": 1}', written[1], '{"kind"'])
    )
    assert list(records_of(tmp_path)) == lines


@pytest.mark.parametrize("steps", [6, 9])
def test_the_number_of_steps_is_told_once_and_when_it_is_another(tiny: Path, steps: int) -> None:
    run(tiny, "log.tensorboard=false")
    run(tiny, "log.tensorboard=false", f"steps={steps}", resume="auto")
    told = [(record["step"], record["steps"]) for record in story_of(tiny.parent / "run").of_kind("start")]
    assert told == ([(0, 6)] if steps == 6 else [(0, 6), (6, 9)])


def test_records_are_read_as_they_come_and_anew_where_a_run_goes_on(tmp_path: Path) -> None:
    reader, file = Reader(tmp_path), tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in range(4)]
    assert reader.read() == ([], False)
    file.write_text(lines[0] + lines[1] + lines[2][:5])
    assert [record["step"] for record in reader.read()[0]] == [0, 1]
    with file.open("a") as more:
        more.write(lines[2][5:])
    assert reader.read() == ([{"kind": "train", "step": 2}], False)
    draft = tmp_path / "draft"
    draft.write_text(lines[0] + lines[3])
    draft.replace(file)
    records, anew = reader.read()
    assert anew and [record["step"] for record in records] == [0, 3]
