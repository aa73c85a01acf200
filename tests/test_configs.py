"""Every file that the repository offers to be run is valid, and says in its header how to run it."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from mtl_dist.cli import main
from mtl_dist.config import load
from mtl_dist.experiment import Experiment

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.name != "published.yaml")
LAUNCHES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_load_and_say_how_to_run(path: Path) -> None:
    assert load(Experiment, path).tasks
    assert f"mtl_dist train {path.relative_to(ROOT)}" in path.read_text(encoding="utf-8").partition("\noutput_dir")[0]


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_launch_files_are_accelerates(path: Path) -> None:
    assert load_config_from_file(str(path)).num_processes >= 1
    assert f"--config_file {path.relative_to(ROOT)}" in path.read_text(encoding="utf-8")


FIELDS = {
    "ids-sst": "id\tsentence\tsentiment\n1\ta b\t3\n",
    "quora": "id\tsentence1\tsentence2\tis_duplicate\n1\ta\tb\t1\n",
    "sts": "id\tsentence1\tsentence2\tsimilarity\n1\ta\tb\t2.5\n",
}


def test_the_stages_in_the_docs_fit_the_config_that_they_extend(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "mixers.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(extends: configs/.*?)```", text, re.DOTALL)
    (tmp_path / "x.yaml").write_text(example.replace("configs/", f"{ROOT}/configs/"), encoding="utf-8")
    for stem, rows in FIELDS.items():
        for split in ("train", "dev"):
            (tmp_path / f"{stem}-{split}.csv").write_text(rows)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb")
    small = f"encoder={{tokenizer: {tmp_path}, shape: {{hidden_size: 8, num_attention_heads: 2}}}}"
    folders = [f"{folder}={tmp_path}/{folder}" for folder in ("cache_dir", "output_dir")]
    assert main(["plan", str(tmp_path / "x.yaml"), small, f"data_dir={tmp_path}", *folders]) == 0


def test_both_kinds_were_found() -> None:
    assert {path.stem for path in EXPERIMENTS} >= {"demo", "cs224n"}
    assert {path.stem for path in LAUNCHES} >= {"cpu_2proc"}
