"""What several test files share: a tiny experiment whose three tasks a tiny encoder trains on in seconds."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings

from tests.limits import limit

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from threads that wait for each other
for launcher in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "RANK", "WORLD_SIZE"):
    os.environ.pop(launcher, None)

# No example is wrong for taking long.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Real data and a pre-trained encoder, where somebody has put them beside the project.
SHARED = Path(os.environ.get("MTL_DIST_SHARED", Path(__file__).parents[2] / "shared"))

WORDS = [f"{onset}{vowel}{coda}" for onset in "bdfgklmn" for vowel in "aeiou" for coda in "mnrst"]

EXPERIMENT = """
output_dir: {folder}/run
data_dir: {folder}
cache_dir: {folder}/cache
steps: 6
encoder:
  tokenizer: {folder}
  shape:
    hidden_size: 32
    num_hidden_layers: 2
    num_attention_heads: 4
    intermediate_size: 64
    max_position_embeddings: 64
tasks:
  mood:
    train: mood-train.tsv
    dev: mood-dev.tsv
    columns: {{id: id, sentences: [sentence], label: label}}
    label: {{kind: classification, num_classes: 3}}
    pooling: pooler
    batch_size: 6
  same:
    train: same-train.tsv
    dev: same-dev.tsv
    columns: {{id: id, sentences: [sentence1, sentence2], label: label}}
    label: {{kind: binary}}
    head: {{kind: cross_encoder}}
    batch_size: 9
  near:
    train: near-train.tsv
    dev: near-dev.tsv
    columns: {{sentences: [sentence1, sentence2], label: label}}
    label: {{kind: regression, min: 0, max: 5}}
    head: {{kind: cosine}}
    batch_size: 1
    weight: 0.5
optim: {{lr: 1.0e-3, eps: 1.0e-4}}
gradients: {{clip_norm: 0.5}}
log: {{every_steps: 2}}
"""


def sentence(rng: Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))


def write_rows(path: Path, task: str, rows: int) -> None:
    rng = Random(path.name)
    header = {"mood": "id\tsentence\tlabel"}.get(task, "id\tsentence1\tsentence2\tlabel")
    lines = [header]
    for row in range(rows):
        texts = [sentence(rng)] if task == "mood" else [sentence(rng), sentence(rng)]
        label = {"mood": rng.randrange(3), "same": rng.randrange(2), "near": round(5 * rng.random(), 1)}[task]
        lines.append("\t".join([f"{task}{row}", *texts, str(label)]))
    path.write_text("\n".join(lines) + "\n")


def write_experiment(folder: Path) -> Path:
    for task, rows in (("mood", 40), ("same", 70), ("near", 7)):
        write_rows(folder / f"{task}-train.tsv", task, rows)
        write_rows(folder / f"{task}-dev.tsv", task, 5)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    config = folder / "tiny.yaml"
    config.write_text(EXPERIMENT.format(folder=folder))
    return config


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Gives every test its limit, which grows with how slow the machine is."""
    if config.getoption("timeout") is not None:  # said on the command line
        return
    for item in items:
        mark = item.get_closest_marker("timeout")
        seconds = mark.args[0] if mark else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(limit(seconds)), append=False)


@pytest.fixture(autouse=True)
def brief_collections() -> Iterator[None]:
    """Spares the garbage collections that end a run all that was there before it: they would take most of its time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The path of the experiment's YAML file; everything it names lies beside it."""
    return write_experiment(tmp_path)
