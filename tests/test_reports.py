"""The systems of the five reports: one file each, all of which train, with the published numbers in their headers.

python -m pytest tests/test_reports.py
"""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mtl_dist.config import load
from mtl_dist.data.corpus import write_corpus
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment
from mtl_dist.metrics import overall
from mtl_dist.studies.published import Published
from mtl_dist.studies.study import configs_of
from mtl_dist.training.loop import train
from mtl_dist.training.setup import build_model, stage_optimizer

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "configs" / "reports"
BASES = [f"base-{report}" for report in ("000", "001", "002", "003", "004")]
PUBLISHED = load(Published, REPORTS / "published.yaml")
SYSTEMS = {key: system for report in PUBLISHED.reports.values() for key, system in report.systems.items()}
ROWS = [*SYSTEMS]
WITH_PCGRAD = [
    "001-final", "002-pcgrad", "002-pcgrad-cosine-embedding", "002-pcgrad-cosine",
    "003-joint-pcgrad", "003-joint-pcgrad-large", "003-pairwise-pcgrad-large",
]  # fmt: skip
UNTRAINED = ["001-untrained", "004-baseline"]
TRAIN_ROWS = PUBLISHED.train_rows


def path_of(key: str) -> Path:
    return REPORTS / f"{key}.yaml"


def read(key: str, *overrides: str) -> Experiment:
    """The experiment."""
    return load(Experiment, path_of(key), overrides)


# What the files say


def test_every_row_of_the_reports_has_its_file() -> None:
    assert len(ROWS) == 48
    assert {path.stem for path in REPORTS.iterdir()} == {*ROWS, *BASES, "published"}
    assert {path.stem for path in configs_of([REPORTS])} == {*ROWS}
    for name, report in PUBLISHED.reports.items():
        assert all(key.startswith(name) for key in report.systems)
        assert yaml.safe_load(path_of(report.reference).read_text(encoding="utf-8")).keys() <= {
            "extends",
            "output_dir",
        }  # the base's own system


def header(key: str) -> str:
    """The comment above the first key."""
    text = path_of(key).read_text(encoding="utf-8")
    return text[: re.search(r"^(?!#)", text, re.MULTILINE).start()]  # type: ignore[union-attr]


@pytest.mark.parametrize("key", [*BASES, *ROWS])
def test_a_header_gives_the_command_and_the_folder_is_named_like_the_file(key: str) -> None:
    assert f"\n#   accelerate launch -m mtl_dist train configs/reports/{key}.yaml\n" in header(key)
    raw = yaml.safe_load(path_of(key).read_text(encoding="utf-8"))
    assert raw["output_dir"] == f"runs/reports/{key}"
    report = key.removeprefix("base-")[:3]
    assert raw.get("extends") == (None if key in BASES else f"base-{report}.yaml")
    assert f"Report {report}, " in header(key)


def test_no_two_rows_of_a_report_change_the_same() -> None:
    changes: dict[str, str] = {}
    for key in ROWS:
        raw = yaml.safe_load(path_of(key).read_text(encoding="utf-8"))
        del raw["output_dir"]
        changes[key] = json.dumps(raw, sort_keys=True)
    # Report 002 gives two scores for one system.
    assert changes["002-minbert-sst-finetune"] == changes.pop("002-single-sst")
    assert len(set(changes.values())) == len(changes)


@pytest.mark.parametrize("key", ROWS)
def test_a_header_gives_the_published_scores(key: str) -> None:
    (line,) = re.findall(r"^# published .*", header(key), re.MULTILINE)
    scores = PUBLISHED.headline(key)
    of_bert = " (BERT-base on the full CS224N data)" if SYSTEMS[key].scores else ""
    assert line.startswith(scores + of_bert)
    assert f"Report {key[:3]}, {SYSTEMS[key].where}" in header(key)
    assert sorted(SYSTEMS[key].scores.keys() - read(key).tasks.keys()) == []


def test_a_header_gives_the_published_scores_after_each_stage() -> None:
    after = SYSTEMS["003-continual"].after_stage
    shown = {stage: " ".join(f"{score:.3f}" for score in scores.values()) for stage, scores in after.items()}
    line = (
        f"# SST, Quora, STS after stage sst: {shown['sst']}; after quora: {shown['quora']}; after sts: {shown['sts']}."
    )
    assert line in header("003-continual").splitlines()
    assert SYSTEMS["003-continual"].scores == {task: after[task][task] for task in after}
    assert [stage.name for stage in read("003-continual").all_stages()] == [*after]


def test_the_published_numbers_are_the_reports() -> None:
    # Some of them once more, so that a slip in the file is no slip in all headers.
    for key, line in (
        ("000-heads-only-cls", "overall A 0.606, SST 0.400, Quora 0.721, STS 0.393"),
        ("000-sumloss-llrd", "overall A 0.759, SST 0.498, Quora 0.878, STS 0.803"),
        ("001-untrained", "overall B ~0.24, SST 0.317, Quora 0.376, STS 0.019"),
        ("001-roundrobin-sequential", "no numbers; the report calls the first task's score poor"),
        ("001-cosine-embedding-loss", "STS -0.009 to -0.005"),
        ("002-minbert-cfimdb-finetune", "CFIMDB 0.971"),
        ("002-pcgrad-cosine", "SST 0.515, Quora 0.723, STS 0.773"),
        ("003-pairwise-pcgrad-large", "SST 0.485, Quora 0.503, STS 0.635"),
        ("004-bs32-dp04-lr2e5", "overall B 0.516, SST 0.505, Quora 0.740, STS 0.309"),
    ):
        assert PUBLISHED.headline(key).startswith(f"# published (dev): {line}")


METRICS = {"sst": "accuracy", "quora": "accuracy", "sts": "pearson"}
MISCOUNTED = {"004-bs32-dp04-lr2e5": 0.518}  # the mean of its scores; the report's table says 0.516


@pytest.mark.parametrize("key", [key for key in ROWS if SYSTEMS[key].overall_a or SYSTEMS[key].overall_b])
def test_the_overall_score_is_the_one_that_the_header_names(key: str) -> None:
    system = SYSTEMS[key]
    name = "overall_a" if system.overall_a is not None else "overall_b"
    assert name == PUBLISHED.reports[key[:3]].score
    ours = overall({task: (metric, system.scores[task]) for task, metric in METRICS.items()})
    # One report rounds to two digits, the others to three.
    rounding = 0.005 if name in system.printed else 0.001
    assert ours[name] == pytest.approx(MISCOUNTED.get(key, system.number(name)), abs=rounding)


# What they train, by number


@pytest.mark.parametrize(
    ("key", "steps"),
    [
        # Twenty epochs are 5,340 batches of SST, 88,442 of Quora and 3,776 of STS: each task's last one is filled up.
        ("000-finetune-cls", [97_558]),
        ("000-mean-100ep", [487_786]),  # 26,700 + 442,207 + 18,879
        ("000-heads-only-mean", [97_558]),
        ("000-twostage-cls", [97_558, 97_558]),
        ("000-sumloss", [88_442]),  # Quora's alone
        ("001-untrained", [0]),
        ("001-parallel", [7552]),  # STS is the shortest: 10 x 6041 / 8
        ("001-roundrobin-sequential", [195_115]),  # 10,680 + 176,883 + 7,552
        ("002-baseline", [10_036]),  # Quora: 10 x 141,506 / 141 = 10,035.9
        ("002-pcgrad", [40_431]),  # Quora: 10 x 141,506 / 35
        ("002-single-quora", [10_036]),
        ("002-minbert-cfimdb-frozen", [2127]),  # 10 x 1701 / 8
        ("003-joint", [176_883]),  # Quora: 10 x 141,506 / 8
        ("003-continual", [10_680, 176_883, 7552]),
        ("003-pairwise-pcgrad-large", [176_883, 176_883, 10_680]),
        ("004-baseline", [0]),
        ("004-roundrobin", [32_040]),  # three tasks, each as often as SST takes
        ("004-roundrobin-sumloss", [10_680]),
        ("004-serial", [25_784]),  # 10,680 + 2 x 7,552: Quora is as long as STS
        ("004-use-all-data", [195_115]),
        ("004-bs32-dp03-lr1e5", [8010]),  # 3 x 10 x 8544 / 32
    ],
)
def test_the_schedules_take_so_many_steps_on_the_full_data(key: str, steps: list[int]) -> None:
    experiment = read(key)
    assert [stage.order(TRAIN_ROWS, experiment.seed).steps for stage in experiment.all_stages()] == steps


def test_an_epoch_of_report_000_goes_through_one_task_after_the_other() -> None:
    # An epoch has 267 batches of SST, 4,423 of Quora and 189 of STS.
    for key, expected in (
        (
            "000-finetune-cls",
            {0: "sst", 266: "sst", 267: "quora", 4689: "quora", 4690: "sts", 4878: "sts", 4879: "sst"},
        ),
        ("000-mean", {0: "quora", 4422: "quora", 4423: "sts", 4611: "sts", 4612: "sst", 4878: "sst", 4879: "quora"}),
    ):
        order = read(key).all_stages()[0].order(TRAIN_ROWS, 0)
        assert {step: order.draws(step)[0][0] for step in expected} == expected


@pytest.mark.parametrize("key", [key for key in ROWS if key.startswith("000")])
def test_the_names_of_report_000_say_how_it_pools(key: str) -> None:
    sst, pairs = ("cls", "cls") if "cls" in key else ("mean", "mean") if "mean" in key else ("cls", "mean")
    assert [task.pooling for task in read(key).tasks.values()] == [sst, pairs, pairs]


def test_report_001_leaves_dropout_out_of_the_cosine_alone() -> None:
    assert {name: task.dropout for name, task in read("001-final").tasks.items()} == {
        "sst": 0.3,
        "quora": 0.3,
        "sts": 0.0,
    }


@pytest.mark.parametrize(
    ("key", "sizes"),
    [
        ("002-baseline", {"sst": 8, "quora": 141, "sts": 6}),
        ("002-single-quora", {"quora": 141}),
        ("002-minbert-cfimdb-finetune", {"cfimdb": 8}),
        *((key, {"sst": 2, "quora": 35, "sts": 1}) for key in WITH_PCGRAD if key.startswith("002")),
    ],
)
def test_report_002_weighs_every_row_of_unequal_batches_alike(key: str, sizes: dict[str, int]) -> None:
    experiment = read(key)
    assert {name: task.batch_size for name, task in experiment.tasks.items()} == sizes
    assert experiment.gradients.reweight == "per_sample"


def heads(key: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The head of each task, with the widths that the file gives it."""
    written = {name: task.head.model_dump() for name, task in read(key).tasks.items()}
    return {name: (head["kind"], head.get("widths", head.get("hidden", ()))) for name, head in written.items()}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("000-mean", [("linear", ()), ("sbert", ()), ("sbert", ())]),
        ("001-final", [("linear", ()), ("concat", ()), ("projected_cosine", (768,))]),
        ("002-baseline", [("linear", ()), ("concat", ()), ("concat", ())]),
        ("002-pcgrad", [("linear", ()), ("concat", ()), ("concat", ())]),
        ("002-pcgrad-cosine-embedding", [("linear", ()), ("concat", ()), ("projected_cosine", (768,))]),
        ("002-pcgrad-cosine", [("linear", ()), ("concat", ()), ("projected_cosine", (100, 768))]),
        ("003-joint-pcgrad", [("linear", ()), ("cosine", ()), ("cosine", ())]),
        *(
            (key, [("mlp", (768,)), ("projected_cosine", (768, 768)), ("projected_cosine", (768, 768))])
            for key in ("003-joint-pcgrad-large", "003-pairwise-pcgrad-large")
        ),
        ("004-roundrobin", [("mlp", (768,)), ("projected_cosine", (768,)), ("projected_cosine", (768,))]),
        ("004-para2-sts1", [("mlp", (768,)), ("concat", ()), ("projected_cosine", (768,))]),
        ("004-para1-sts2", [("mlp", (768,)), ("projected_cosine", (768,)), ("concat", ())]),
        ("004-para2-sts2", [("mlp", (768,)), ("concat", ()), ("concat", ())]),
        ("004-sts-cross-encoder", [("mlp", (768,)), ("projected_cosine", (768,)), ("cross_encoder", ())]),
    ],
)
def test_the_heads_are_those_of_the_reports_tables(key: str, expected: list[tuple[str, tuple[int, ...]]]) -> None:
    assert heads(key) == dict(zip(("sst", "quora", "sts"), expected, strict=True))


@pytest.mark.parametrize("key", ROWS)
def test_the_best_model_has_the_best_score_of_its_report(key: str) -> None:
    experiment = read(key)
    names = [*experiment.tasks]
    overall_score = "overall_a" if key.startswith("000") else "overall_b"
    assert experiment.evaluate.best_by == (overall_score if len(names) > 1 else names[0])


@pytest.mark.parametrize("key", ["001-cosine-embedding-loss", "002-pcgrad-cosine-embedding"])
def test_scores_from_the_middle_up_are_alike_to_the_cosine_embedding_loss(key: str) -> None:
    assert read(key).tasks["sts"].loss.model_dump()["alike_from"] == 2.5


def test_report_003_trains_in_stages() -> None:
    stages = {
        key: [([*stage.tasks], stage.epochs, stage.mixer.kind, stage.carry_moments) for stage in read(key).all_stages()]
        for key in ("003-continual", "003-pairwise-pcgrad-large")
    }
    assert stages == {
        "003-continual": [([task], 10, "joint", False) for task in ("sst", "quora", "sts")],
        "003-pairwise-pcgrad-large": [
            (pair, 10, "joint", False) for pair in (["sst", "quora"], ["quora", "sts"], ["sts", "sst"])
        ],
    }


def test_report_004_scales_losses_and_cuts_quora() -> None:
    tasks = read("004-loss-scaling").tasks
    assert {name: task.weight for name, task in tasks.items()} == {"sst": 15.0, "quora": 1.0, "sts": 25.0}
    assert {name: task.subsample and task.subsample.rows for name, task in tasks.items()} == {
        "sst": None,
        "quora": 6041,
        "sts": None,
    }
    assert read("004-use-all-data").tasks["quora"].subsample is None


# What they do: the files as they are, on the demo corpus under the names of CS224N's files and with a tiny encoder

CS224N = {
    "ids-sst": ("sentiment", "sentiment", lambda label: label),
    "quora": ("paraphrase", "is_duplicate", lambda label: f"{label}.0"),
    "sts": ("similarity", "similarity", lambda label: label),
    "ids-cfimdb": ("sentiment", "sentiment", lambda label: str(int(int(label) > 2))),
}


def rename(corpus: Path, stem: str, split: str, task: str, column: str, label_of: Callable[[str], str]) -> None:
    """Writes a file of the demo corpus as one of CS224N's: tab-separated, an unnamed index first."""
    with (corpus / f"{task}-{split}.tsv").open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file, delimiter="\t")
    sentences = ["sentence"] if task == "sentiment" else ["sentence1", "sentence2"]
    lines = [["", "id", *sentences, column]]
    lines += [[str(index), *row[:-1], label_of(row[-1])] for index, row in enumerate(rows)]
    (corpus / f"{stem}-{split}.csv").write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    write_corpus(folder, rows=100, shares={"sentiment": 1, "paraphrase": 2, "similarity": 1}, dev_rows=12)
    for stem, (task, column, label_of) in CS224N.items():
        for split in ("train", "dev"):
            rename(folder, stem, split, task, column, label_of)
    return folder


def small(key: str, corpus: Path, *overrides: str, layers: int = 1) -> Experiment:
    """The experiment on the demo corpus, with a tiny encoder."""
    shape = (
        f"{{hidden_size: 32, num_hidden_layers: {layers}, num_attention_heads: 2, intermediate_size: 64, "
        "max_position_embeddings: 64}"
    )
    subsampled = [name for name, task in read(key).tasks.items() if task.subsample]
    return read(
        key,
        f"encoder={{shape: {shape}, tokenizer: {corpus}}}",
        f"data_dir={corpus}",
        f"cache_dir={corpus / 'cache'}",
        *(f"tasks.{name}.subsample.rows=20" for name in subsampled),
        *overrides,
    )


@pytest.mark.parametrize("key", [*BASES, *ROWS])
def test_every_report_trains_and_scores_its_tasks(key: str, corpus: Path, tmp_path: Path) -> None:
    steps = [] if key in UNTRAINED else ["epochs=null", "steps=2"]
    experiment = small(key, corpus, *steps, f"output_dir={tmp_path}", "log={every_steps: 1, tensorboard: false}")
    scores = train(experiment)
    names = [key.split("-")[2]] if key.startswith(("002-single", "002-minbert")) else ["sst", "quora", "sts"]
    assert [*scores["tasks"]] == names
    assert all(task["rows"] == 12 for task in scores["tasks"].values())

    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in trained] == [*range(1, 2 * len(experiment.all_stages()) + 1)] * bool(steps)
    # Every stage, also of a run without steps, ends with the scores of all tasks.
    assert len({record["stage"] for record in records if record["kind"] == "dev"}) == len(experiment.all_stages())


@pytest.mark.parametrize("key", [*BASES, *ROWS])
def test_surgery_is_where_the_reports_have_it(key: str) -> None:
    methods = {stage.gradients.combiner.kind for stage in read(key).all_stages()}
    assert methods == ({"pcgrad"} if key in WITH_PCGRAD else {"sum"})


def learning_rates(key: str, corpus: Path, layers: int) -> list[dict[str, float]]:
    """The learning rate of every parameter that a stage trains, stage by stage."""
    experiment = small(key, corpus, layers=layers)
    model = build_model(experiment, load_tokenizer(str(corpus)), "cpu")
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        {
            names[parameter]: group["lr"]
            for group in stage_optimizer(model, stage, "cpu").param_groups
            for parameter in group["params"]
        }
        for stage in experiment.all_stages()
    ]


@pytest.mark.parametrize(("key", "top"), [("000-mean-llrd", 1e-5), ("000-mixed-llrd-lr2e5", 2e-5)])
def test_layer_wise_decay_starts_below_the_top_layer(key: str, top: float, corpus: Path) -> None:
    (rates,) = learning_rates(key, corpus, layers=12)
    shares = {
        "heads.sst.layers.0.weight": 1.0,
        "encoder.layers.11.attention.qkv.weight": 1.0,
        "encoder.layers.10.attention.qkv.bias": 0.95,
        "encoder.layers.9.output_norm.weight": 0.9025,
        "encoder.layers.0.feed_forward.up.weight": 0.5688,  # 0.95 ** 11
        "encoder.embeddings.word.weight": 0.5404,  # 0.95 ** 12
    }
    assert {name: rates[name] / top for name in shares} == pytest.approx(shares, abs=5e-5)


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("000-mean", [("all", 1e-5)]),
        ("000-mean-lr2e5", [("all", 2e-5)]),
        ("000-heads-only-cls", [("heads", 1e-3)]),
        ("000-heads-only-mean", [("heads", 1e-3)]),
        ("000-twostage-cls", [("heads", 1e-3), ("all", 1e-5)]),
        ("002-minbert-sst-frozen", [("heads", 1e-3)]),
        ("002-minbert-sst-finetune", [("all", 1e-5)]),
        ("002-minbert-cfimdb-frozen", [("heads", 1e-3)]),
        ("002-minbert-cfimdb-finetune", [("all", 1e-5)]),
        ("004-bs32-dp04-lr2e5", [("all", 2e-5)]),
    ],
)
def test_frozen_encoders_go_with_a_larger_learning_rate(
    key: str, stages: list[tuple[str, float]], corpus: Path
) -> None:
    rates = learning_rates(key, corpus, layers=1)
    parts = [{name.split(".")[0] for name in by_name} for by_name in rates]
    assert parts == [{"heads"} if trained == "heads" else {"heads", "encoder"} for trained, _ in stages]
    assert [set(by_name.values()) for by_name in rates] == [{lr} for _, lr in stages]
