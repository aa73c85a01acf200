"""What the config loader accepts, and the exact line a user sees for each mistake.

python -m pytest tests/test_config.py
"""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveFloat,
    computed_field,
    field_validator,
    model_validator,
)

from mtl_dist.config import Config, UserError, dump, load, schema


class Classification(Config):
    kind: Literal["classification"] = "classification"
    hidden: int | None = None
    classes: tuple[str, ...] = ()


class Regression(Config):
    kind: Literal["regression", "similarity"]
    regression: PositiveFloat = 1.0  # a field with the name of its kind: not to be taken for the tag
    span: tuple[float, float] = (0.0, 5.0)

    @field_validator("span")
    @classmethod
    def ordered(cls, span: tuple[float, float]) -> tuple[float, float]:
        if span[0] >= span[1]:
            raise ValueError(f"[{span[0]}, {span[1]}] is empty; give the smaller end first")
        return span


class Task(Config):
    model_config = ConfigDict(allow_inf_nan=True)

    files: Path
    weight: PositiveFloat = 1.0
    head: Annotated[Classification | Regression, Field(discriminator="kind")] | None = None


class Rule(Config):
    match: str
    lr: FiniteFloat = 1.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def frozen(self) -> bool:
        return self.lr == 0


class Optim(Config):
    rules: tuple[Rule, ...] = (Rule(match=".*"),)
    warmup: Literal["linear", "cosine"] = "linear"

    @model_validator(mode="before")
    @classmethod
    def preset(cls, raw: Any) -> Any:
        # pydantic is stricter behind such a validator: a list must still do for the tuple of rules.
        return {"rules": [{"match": 1}]} if raw == {"warmup": "broken preset"} else raw


class Experiment(Config):
    model_config = ConfigDict(allow_inf_nan=True)

    tasks: dict[Annotated[str, Field(pattern="^[a-z]+$")], Task] = Field(default_factory=dict)
    optim: Optim = Optim()
    mixed_precision: str = "no"
    seed: Annotated[int, Field(ge=0)] = 0
    sizes: int | list[int] = 1
    limit: float = math.inf
    resume: bool = False
    lambda_: float = Field(0.0, alias="lambda")
    model_name: str | None = "tiny"

    @model_validator(mode="after")
    def some_limit(self) -> "Experiment":
        if self.limit == 0:
            raise ValueError("a limit of 0 trains nothing")
        return self


Load = Callable[..., Experiment]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Reads a text as the file demo.yaml, so that messages begin with that name."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str) -> Experiment:
        Path("demo.yaml").write_text(text, encoding="utf-8")
        return load(Experiment, Path("demo.yaml"), overrides)

    return read


def complaint(read: Load, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        read(text, *overrides)
    return str(caught.value)


SST = """\
tasks:
  sst:
    files: data/sst.tsv
    head:
      kind: classification
      hidden: 8
"""
RULES = "optim:\n  rules:\n  - match: a\n  - {match: b, lr: 2}\n"


# What is read


def test_defaults_fill_in_what_an_empty_file_leaves_out(read: Load) -> None:
    assert read("") == read("\ufeff# nothing\r\n") == read("null\n") == Experiment()


def test_the_kind_decides_the_model(read: Load) -> None:
    sst = read(SST).tasks["sst"]
    assert sst.head == Classification(hidden=8)
    assert sst.files == Path("data/sst.tsv")


def test_only_true_and_false_are_booleans(read: Load) -> None:
    assert read("mixed_precision: no\nresume: true").mixed_precision == "no"
    assert complaint(read, "resume: yes") == "demo.yaml:1: resume is 'yes', not true or false"


@pytest.mark.parametrize("key", ["on", "2", "null", "1e3", "true"])
def test_a_key_is_the_text_that_was_written(read: Load, key: str) -> None:
    assert f"the top level has no field '{key}'" in complaint(read, f"{key}: 1")


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("1e-5", 1e-5),
        ("+.5", 0.5),
        ("5.", 5.0),
        ("5", 5.0),
        ("012", 12.0),
        ("-.inf", -math.inf),
        ("9" * 5000, math.inf),
    ],
)
def test_numbers_are_yaml_1_2(read: Load, text: str, limit: float) -> None:
    assert read(f"limit: {text}").limit == limit


@pytest.mark.parametrize("text", ["1:30", "0x1F", "1_000", "2024-01-31", "'null'", "!!str 12", "off", ".", "+", "1e"])
def test_all_else_is_text(read: Load, text: str) -> None:
    assert read(f"mixed_precision: {text}").mixed_precision == yaml.load(text, yaml.BaseLoader)


def test_an_alias_repeats_what_its_anchor_names(read: Load) -> None:
    tasks = read("tasks:\n  a: &a {files: x}\n  b: *a", "tasks.a.weight=3").tasks
    assert (tasks["a"].weight, tasks["b"].weight) == (3.0, 1.0)


# What a config cannot be


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Experiment().seed = 1  # type: ignore[misc]


def test_fields_named_after_models_raise_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class Named(Config):
            model_path: str = ""
            model_validate_every: int = 1

    assert Named().model_validate_every == 1


# What a user sees for a broken file


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- a\n", "demo.yaml:1: the top level is [\"a\"], not a mapping"),
        ("seed: 1\nseed: 2\n", "demo.yaml:2: seed is given twice; first at demo.yaml:1"),
        ("tasks:\n  sst:\n    files: a\n  sst: {}\n", "demo.yaml:4: tasks.sst is given twice; first at demo.yaml:2"),
        ("seed: 1\nlimit: [1,\n", "demo.yaml:3: not YAML: while parsing a flow node, expected the node content, "
         "but found '<stream end>'"),
        ("seed: 1\nlimit: \x07\n", r"demo.yaml:2: the character '\x07' is not allowed in YAML"),
        ("seed: 1\nlimit: *inf\n", "demo.yaml:2: not YAML: found undefined alias 'inf'"),
        ("seed: 1\nlimit: !!int 1.5\n", "demo.yaml:2: limit is no valid !!int"),
        ("seed: 1\nlimit: !!python/name:os.system x\n", "demo.yaml:2: limit is no valid !!python/name:os.system"),
        ("seed: 1\n[a]: 2\n", "demo.yaml:2: the top level has a list or a mapping as a key"),
        ("a: &a\n  b: *a\n", "demo.yaml:2: nested more than 99 levels deep"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_by_line(read: Load, text: str, line: str) -> None:
    assert complaint(read, text) == line


@pytest.mark.parametrize("text", ['"\\U00110000"', '"\\UFFFFFFFF"', "%YAML 1." + "9" * 5000 + "\n---\n", "[" * 2000])
def test_what_makes_pyyaml_stumble_is_still_one_line(read: Load, text: str) -> None:
    assert complaint(read, f"\n\n{text}").startswith("demo.yaml:3: not YAML: ")


@pytest.mark.parametrize(
    ("name", "problem"),
    [("none.yaml", ": No such file or directory"), ("", ": Is a directory"), ("latin1.yaml", ":2: not UTF-8 text")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "latin1.yaml").write_bytes(b"seed: 1\n# M\xfcde\n")
    with pytest.raises(UserError) as caught:
        load(Experiment, tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}{problem}"


# What a user sees for a wrong field


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("sede: 1", "1: the top level has no field 'sede'; did you mean 'seed'?"),
        ("lambda_: 1", "1: the top level has no field 'lambda_'; did you mean 'lambda'?"),
        (SST + "      width: 8", "7: tasks.sst.head has no field 'width'; it has kind, hidden, classes"),
        (SST + "      hiden: 8", "7: tasks.sst.head has no field 'hiden'; did you mean 'hidden'?"),
        ("tasks:\n  sst: {}", "2: tasks.sst.files is missing"),
        (SST + "    weight: two", "7: tasks.sst.weight is 'two', not a number"),
        (SST + "    weight: -1", "7: tasks.sst.weight is -1; must be greater than 0"),
        (SST + "      classes: [a,\n        2]", "8: tasks.sst.head.classes[1] is 2, not text"),
        (SST.replace("hidden: 8", "hidden: {a: 8}"), '6: tasks.sst.head.hidden is {"a": 8}, not a whole number'),
        (SST.replace("classification", "clasification"),
         "5: tasks.sst.head.kind is 'clasification'; did you mean 'classification'?"),
        (SST.replace("classification", "7"),
         "5: tasks.sst.head.kind is 7; must be one of 'classification', 'regression', 'similarity'"),
        (SST.replace("kind: ", "# "),
         "4: tasks.sst.head.kind is missing; must be one of 'classification', 'regression', 'similarity'"),
        ("tasks:\n  sts:\n    files: x\n    head:\n      kind: regression\n      regression: 0",
         "6: tasks.sts.head.regression is 0; must be greater than 0"),
        ("tasks:\n  sts:\n    files: x\n    head: {kind: similarity,\n      span: [5, 0]}",
         "5: tasks.sts.head.span: [5.0, 0.0] is empty; give the smaller end first"),
        ("tasks:\n  classification: {files: x, head: {kind: classification, hidden: x}}",
         "2: tasks.classification.head.hidden is 'x', not a whole number"),
        ("tasks:\n  SST: {files: x}", "2: tasks.SST is 'SST'; must match pattern '^[a-z]+$'"),
        (SST.replace("data/sst.tsv", "3"), "3: tasks.sst.files is 3, not text"),
        ("tasks:\n  sst: {files: x, head: regresion}", "2: tasks.sst.head is 'regresion'; did you mean 'regression'?"),
        ("tasks:\n  sst:\n    files: x\n    head: 9x",
         "4: tasks.sst.head is '9x'; must be one of 'classification', 'regression', 'similarity'"),
        ("tasks:\n  sst: {files: x, head: 3}", "2: tasks.sst.head is 3, not a mapping"),
        ("tasks: 3", "1: tasks is 3, not a mapping"),
        ("optim: [x]", '1: optim is ["x"], not a mapping'),
        ("optim:\n  warmup: linar", "2: optim.warmup is 'linar'; did you mean 'linear'?"),
        ("optim:\n  warmup: 3", "2: optim.warmup is 3; must be 'linear' or 'cosine'"),
        ("optim:\n  warmup: broken preset", "1: optim.rules[0].match is 1, not text"),
        (RULES.replace("b", "3"), "4: optim.rules[1].match is 3, not text"),
        (RULES.replace("2", "'2'"), "4: optim.rules[1].lr is '2', not a number"),
        (RULES.replace("2", ".inf"), "4: optim.rules[1].lr is Infinity; must be a finite number"),
        ("seed: '5'", "1: seed is '5', not a whole number"),
        ("seed: true", "1: seed is true, not a whole number"),
        ("seed: 3.0", "1: seed is 3.0, not a whole number"),
        ("seed: 1e3", "1: seed is 1000.0, not a whole number"),
        ("seed:", "1: seed is null, not a whole number"),
        ("resume: 1", "1: resume is 1, not true or false"),
        ("model_name: 12", "1: model_name is 12, not text"),
        ("seed: 1\nlimit: 0", "1: a limit of 0 trains nothing"),
        (f"seed: {'x' * 99}", f"1: seed is '{'x' * 56}..., not a whole number"),
        ('"a\\nb": 1', r"1: the top level has no field 'a\nb'; it has tasks, optim, mixed_precision, seed, sizes, "
         "limit, resume, lambda, model_name, extends"),
        ("extend: base.yaml", "1: the top level has no field 'extend'; did you mean 'extends'?"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_one_line_with_place_value_and_way_out(read: Load, text: str, line: str) -> None:
    assert complaint(read, text) == f"demo.yaml:{line}"


def test_a_plain_union_says_what_each_member_wanted(read: Load) -> None:
    assert complaint(read, "sizes: [1, x]").splitlines() == [
        'demo.yaml:1: sizes is [1, "x"], not a whole number',
        "demo.yaml:1: sizes[1] is 'x', not a whole number",
    ]


def test_all_mistakes_are_shown_in_file_order_then_overrides(read: Load) -> None:
    text = "resume: 1\nlimits: 2\n" + SST.replace("8", "x") + "seed: -1"
    assert complaint(read, text, "tasks.sts.weight=1", "resume=no").splitlines() == [
        "demo.yaml:2: the top level has no field 'limits'; did you mean 'limit'?",
        "demo.yaml:8: tasks.sst.head.hidden is 'x', not a whole number",
        "demo.yaml:9: seed is -1; must be greater than or equal to 0",
        "override 'tasks.sts.weight=1': tasks.sts.files is missing",
        "override 'resume=no': resume is 'no', not true or false",
    ]


# Overrides


def test_an_override_replaces_one_value_and_the_last_one_wins(read: Load) -> None:
    config = read(SST + RULES, "tasks.sst.weight=2", "tasks.sst.weight=3", "optim.rules.1.match=c=d", "seed=7")
    assert config.tasks["sst"].weight == 3.0
    assert config.tasks["sst"].head == Classification(hidden=8)
    assert config.optim.rules == (Rule(match="a"), Rule(match="c=d", lr=2.0))
    assert config.seed == 7


def test_an_override_creates_the_mappings_on_its_way(read: Load) -> None:
    config = read("optim:\n", "optim.warmup=cosine", "tasks.sst.files=x", "tasks.sst.head.kind=classification")
    assert config.optim.warmup == "cosine"
    assert config.tasks["sst"] == Task(files=Path("x"), head=Classification())


def test_an_override_reads_yaml(read: Load) -> None:
    config = read(SST, "tasks.sst.head={kind: similarity, span: [0, 1]}", "model_name=null", "sizes=[1, 2]")
    assert config.tasks["sst"].head == Regression(kind="similarity", span=(0.0, 1.0))
    assert config.model_name is None
    assert config.sizes == [1, 2]


def test_another_kind_keeps_the_other_fields_as_written(read: Load) -> None:
    override = "tasks.sst.head.kind=regression"
    assert complaint(read, SST, override) == (
        f"override '{override}': tasks.sst.head has no field 'hidden'; it has kind, regression, span"
    )


def test_null_takes_away_an_entry_of_a_mapping(read: Load) -> None:
    two = SST + "  sts: {files: x}\n"
    assert list(read(two, "tasks.sst=null").tasks) == ["sts"]
    assert read(two, "tasks.sst=null", "tasks.sst.files=y").tasks["sst"] == Task(files=Path("y"))
    assert complaint(read, two, "tasks.sstt=null") == (
        "override 'tasks.sstt=null': tasks has no 'sstt' to take away; did you mean 'sst'?"
    )


def test_null_is_a_value_where_it_may_stand_and_else_leaves_the_default(read: Load) -> None:
    assert read("model_name: mine", "model_name=null").model_name is None
    assert read(SST, "tasks.sst.head=null").tasks["sst"].head is None
    assert read("seed: 3\noptim: {warmup: cosine}", "seed=null", "optim=null") == Experiment()
    assert read("sede: 3", "sede=null") == Experiment()
    assert complaint(read, "", "seed=null") == "override 'seed=null': seed is null, not a whole number"
    assert complaint(read, SST, "tasks.sst.files=null") == (
        "override 'tasks.sst.files=null': tasks.sst.files is missing"
    )


def test_a_misfit_is_the_overrides_that_brought_it(read: Load) -> None:
    assert (
        complaint(read, "limit: 3", "seed=1", "limit=0", "seed=2") == "override 'limit=0': a limit of 0 trains nothing"
    )
    span = "tasks:\n  sts:\n    files: x\n    head: {kind: similarity}\n"
    assert complaint(read, span, "seed=1", "tasks.sts.head.span=[5, 0]").startswith(
        "override 'tasks.sts.head.span=[5, 0]':"
    )
    # Wrong before: the file's, whatever was overridden besides.
    assert complaint(read, "seed: 1\nlimit: 0", "seed=2") == "demo.yaml:1: a limit of 0 trains nothing"
    # What was not asked before an override mended the rest is not what the override brought.
    assert complaint(read, "seed: x\nlimit: 0", "seed=2") == "demo.yaml:1: a limit of 0 trains nothing"


# Kinds alone


def test_a_bare_kind_is_a_mapping_with_that_kind(read: Load) -> None:
    bare = "tasks:\n  sts: {files: x, head: similarity}\n"
    assert read(bare).tasks["sts"].head == Regression(kind="similarity")
    assert read(bare, "tasks.sts.head.regression=2").tasks["sts"].head == Regression(kind="similarity", regression=2)
    assert read(SST, "tasks.sst.head=regression").tasks["sst"].head == Regression(kind="regression")
    assert read(SST, "tasks={a: {files: x, head: classification}}").tasks["a"].head == Classification()


def test_a_wrong_kind_is_one_line_wherever_it_stands(read: Load) -> None:
    assert complaint(read, SST, "tasks.sst.head=regresion") == (
        "override 'tasks.sst.head=regresion': tasks.sst.head is 'regresion'; did you mean 'regression'?"
    )
    bare = "tasks:\n  sts:\n    files: x\n    head: similarity\n"
    assert complaint(read, bare, "tasks.sts.head.kind=silimarity") == (
        "override 'tasks.sts.head.kind=silimarity': tasks.sts.head.kind is 'silimarity'; did you mean 'similarity'?"
    )


def test_a_text_stays_a_text_where_one_may_stand(tmp_path: Path) -> None:
    def read_in(text: Any) -> Any:
        return {"kind": "similarity", "regression": 7} if text == "seven" else text

    class Other(Config):
        text_or_head: str | Classification | Regression
        short_or_head: Annotated[str, Field(max_length=30)] | Classification | None = None
        own: Annotated[Classification | Regression, Field(discriminator="kind"), BeforeValidator(read_in)] | None = None
        heads: list[Annotated[Classification | Regression, Field(discriminator="kind")]] = Field([])

    (tmp_path / "x.yaml").write_text(
        "text_or_head: classification\nshort_or_head: classification\nown: seven\n"
        "heads: [similarity, {kind: regression}]"
    )
    other = load(Other, tmp_path / "x.yaml")
    assert other.text_or_head == other.short_or_head == "classification"
    assert other.own == Regression(kind="similarity", regression=7)
    assert other.heads == [Regression(kind="similarity"), Regression(kind="regression")]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", "not of the form a.b=value"),
        ("=1", "not of the form a.b=value"),
        ("tasks..weight=1", "not of the form a.b=value"),
        ("seed.x=1", "seed is 3; there is no 'x' in it"),
        ("sizes.2=9", "sizes is [1, 2]; there is no '2' in it"),
        ("sizes.-1=9", "sizes is [1, 2]; there is no '-1' in it"),
        ("seed=[1", "not YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("tasks.sst.weigth=2", "tasks.sst has no field 'weigth'; did you mean 'weight'?"),
        ("tsks.sst.weight=2", "the top level has no field 'tsks'; did you mean 'tasks'?"),
        ("tasks.sst.head={kind: regression, hidden: 2}",
         "tasks.sst.head has no field 'hidden'; it has kind, regression, span"),
        ("optim.rules.1.lr=fast", "optim.rules[1].lr is 'fast', not a number"),
        ("a" + ".a" * 200 + "=1", "nested more than 99 levels deep"),
        ("extends=b.yaml", "a file extends another one, an override does not; write it into the file"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_quoted(read: Load, override: str, problem: str) -> None:
    assert complaint(read, "seed: 3\nsizes: [1, 2]\n" + SST + RULES, override) == f"override {override!r}: {problem}"


# Dump and schema


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["no", "1e-5", "1:30", "012", "null", "~", "", "é\x85"]
)


# A file laid over another

BASE = """
model_name: base
tasks:
  sst: {files: sst.csv, weight: 2, head: {kind: classification, hidden: 8}}
  sts: {files: sts.csv, head: {kind: similarity, regression: 3, span: [0, 5]}}
optim:
  rules: [{match: head}, {match: '.*'}]
"""


def over(read: Load, text: str, *overrides: str, base: str = BASE) -> Experiment:
    Path("base.yaml").write_text(base)
    return read("extends: base.yaml\n" + text, *overrides)


def test_a_file_shows_only_what_it_changes(read: Load) -> None:
    config = over(read, "tasks: {sst: {weight: 3, head: {hidden: 9}}}")
    assert config.model_name == "base"
    assert config.tasks["sst"] == Task(files=Path("sst.csv"), weight=3, head=Classification(hidden=9))
    assert config.tasks["sts"].head == Regression(kind="similarity", regression=3)


def test_another_kind_and_a_list_replace_what_is_below(read: Load) -> None:
    config = over(read, "tasks: {sts: {head: {kind: regression}}}\noptim: {rules: [{match: x}]}")
    assert config.tasks["sts"].head == Regression(kind="regression")
    assert config.optim.rules == (Rule(match="x"),)


def test_bare_kinds_are_laid_over_each_other_as_mappings(read: Load) -> None:
    assert over(read, "tasks: {sts: {head: similarity}}").tasks["sts"].head == Regression(
        kind="similarity", regression=3
    )
    assert over(read, "tasks: {sts: {head: classification}}").tasks["sts"].head == Classification()
    bare = "tasks: {sts: {files: x, head: similarity}}"
    changed = over(read, "tasks: {sts: {head: {regression: 4}}}", base=bare)
    assert changed.tasks["sts"].head == Regression(kind="similarity", regression=4)


def test_null_takes_away_what_is_below(read: Load) -> None:
    config = over(read, "model_name: null\ntasks: {sts: null, sst: {weight: null}}")
    assert config.model_name == Experiment().model_name
    assert list(config.tasks) == ["sst"]
    assert config.tasks["sst"].weight == 1


def test_overrides_come_last(read: Load) -> None:
    assert over(read, "model_name: mine", "tasks.sst.weight=5", "model_name=yours").model_name == "yours"


def test_a_mistake_is_placed_in_the_file_it_is_in(read: Load) -> None:
    assert complaint_over(read, "tasks: {sst: {weight: -3}}").startswith("demo.yaml:2: tasks.sst.weight is -3")
    assert complaint_over(read, "tasks: {stss: null}").startswith("demo.yaml:2: tasks.stss is null")
    assert complaint_over(read, "optim: {rules: [{}]}").startswith("demo.yaml:2: optim.rules[0].match is missing")
    below = "model_name: base\ntasks:\n  sst: {files: sst.csv, wieght: 2}\n"
    assert complaint_over(read, "model_name: mine", below) == (
        "base.yaml:3: tasks.sst has no field 'wieght'; did you mean 'weight'?"
    )


def complaint_over(read: Load, text: str, base: str = BASE) -> str:
    with pytest.raises(UserError) as caught:
        over(read, text, base=base)
    return str(caught.value)


def test_a_base_that_cannot_be(read: Load) -> None:
    assert (
        complaint(read, "model_name: x\nextends: gone.yaml")
        == "demo.yaml:2: extends 'gone.yaml': gone.yaml: No such file or directory"
    )
    assert complaint(read, "extends: null") == "demo.yaml:1: extends is null, not text"
    assert complaint(read, 'extends: "a\\0b"').endswith("a path cannot hold a NUL character")
    assert complaint(read, "extends: [base.yaml]") == 'demo.yaml:1: extends is ["base.yaml"], not text'
    Path("base.yaml").write_text("extends: other.yaml")
    assert complaint(read, "extends: base.yaml") == (
        "base.yaml:1: demo.yaml extends this file, which may not extend another one"
    )


def test_a_base_lies_beside_its_file(read: Load) -> None:
    Path("below").mkdir()
    Path("below/base.yaml").write_text("model_name: deep")
    Path("below/top.yaml").write_text("extends: base.yaml")
    assert load(Experiment, Path("below/top.yaml")).model_name == "deep"


@settings(max_examples=100, deadline=None)
@given(
    name=TEXT,
    limit=st.floats(allow_nan=False).filter(bool),
    weight=st.floats(min_value=0, exclude_min=True),
    key=st.from_regex("^[a-z]+$", fullmatch=True),
    seed=st.integers(0, 10**99),
    classes=st.lists(TEXT),
)
def test_load_reads_back_what_dump_wrote(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    limit: float,
    weight: float,
    key: str,
    seed: int,
    classes: list[str],
) -> None:
    task = Task(files=Path("a b"), weight=weight, head=Classification(classes=tuple(classes)))
    config = Experiment(tasks={key: task}, limit=limit, seed=seed, model_name=name, **{"lambda": limit})
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load(Experiment, path) == config


def test_dump_keeps_order_infinities_and_nulls_but_nothing_computed() -> None:
    config = Experiment(tasks={"sst": Task(files=Path("x"))}, model_name=None)
    assert dump(config).splitlines() == [
        "tasks:",
        "  sst:",
        "    files: x",
        "    weight: 1.0",
        "    head: null",
        "optim:",
        "  rules:",
        "  - match: .*",
        "    lr: 1.0",
        "  warmup: linear",
        "mixed_precision: 'no'",
        "seed: 0",
        "sizes: 1",
        "limit: .inf",
        "resume: false",
        "lambda: 0.0",
        "model_name: null",
    ]
    assert "limit: .nan" in dump(Experiment(limit=math.nan))


def test_schema_takes_bare_kinds() -> None:
    head, _ = schema(Experiment)["$defs"]["Task"]["properties"]["head"]["anyOf"]
    bare, by_kind = head["anyOf"]
    assert bare == {"enum": ["classification", "regression", "similarity"]}
    assert len(by_kind["oneOf"]) == 2


def test_schema_names_its_dialect_and_closes_every_model() -> None:
    document = schema(Experiment)
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert document["title"] == "Experiment"
    assert not any(model["additionalProperties"] for model in [document, *document["$defs"].values()])
    json.dumps(document)


# Whatever the file and the override hold, a config or a UserError comes out

TOKEN = st.sampled_from(
    [*"{}[]:,-&*!|>'\"%@`#?~\n\t\\<=.0aé\ud800", " ", "\n  ", ": ", "- ", "tasks", "seed", "\\ud800"]
)
TOKENS = st.lists(TOKEN).map("".join)


@st.composite
def mangled(draw: st.DrawFn) -> str:
    text = SST + RULES
    for at in draw(st.lists(st.integers(0, len(text)), max_size=5)):
        text = text[:at] + draw(TOKEN) + text[at:]
    return text


@settings(max_examples=400)
@given(
    data=st.binary() | (st.text() | TOKENS | mangled()).map(lambda text: text.encode(errors="surrogatepass")),
    override=st.text() | TOKENS | TOKENS.map("tasks.sst.head=".__add__) | st.just("seed=1"),
)
def test_any_bytes_are_a_config_or_one_line_errors(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, override: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    try:
        load(Experiment, path, [override])
    except UserError as error:
        assert all(line.startswith((f"{path}:", f"override {override!r}: ")) for line in str(error).split("\n"))
