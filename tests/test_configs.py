"""Every file that the repository offers to be run is valid, and says in its header how to run it."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from mtl_dist.config import load
from mtl_dist.experiment import Experiment

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "configs").rglob("*.yaml"))
LAUNCHES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_load_and_say_how_to_run(path: Path) -> None:
    assert load(Experiment, path).tasks
    assert f"mtl_dist train {path.relative_to(ROOT)}" in path.read_text(encoding="utf-8").partition("\noutput_dir")[0]


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_launch_files_are_accelerates(path: Path) -> None:
    assert load_config_from_file(str(path)).num_processes >= 1
    assert f"--config_file {path.relative_to(ROOT)}" in path.read_text(encoding="utf-8")


def test_both_kinds_were_found() -> None:
    assert {path.stem for path in EXPERIMENTS} >= {"demo", "cs224n"}
    assert {path.stem for path in LAUNCHES} >= {"cpu_2proc"}
