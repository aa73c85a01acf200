"""What a task is: its files and columns, its label, and the pooling, head and loss that turn sentences into a score.

A task is YAML alone. `preset: sst` (quora, sts, cfimdb) fills in a task of the CS224N default project; whatever is
written beside it wins.
"""

import math
import reprlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from mtl_dist.config import Config, overlay
from mtl_dist.data.batches import Batch, Subsample
from mtl_dist.data.prepare import Reading
from mtl_dist.data.read import BadRow, Example, File, Row, Source
from mtl_dist.model.heads import Cosine, Head, Pooling, ProjectedCosine
from mtl_dist.model.objectives import DEFAULT_LOSS, CosineEmbedding, Label, Loss, Ranking, Regression

SplitName = Literal["train", "dev", "test"]
Metric = Literal["accuracy", "macro_f1", "pearson", "spearman"]
FILLED_IN: Any = None  # by TaskConfig itself, as label and columns are
UNLABELLED = math.nan  # the label of a row that has none


def _cs224n(stem: str, sentences: list[str], label_column: str, label: dict[str, Any]) -> dict[str, Any]:
    # Tab-separated in spite of their suffix. Rows that lack a label are known and skipped.
    files = {"train": "train", "dev": "dev", "test": "test-student"}
    return {
        **{split: {"path": f"{stem}-{suffix}.csv", "format": "tsv"} for split, suffix in files.items()},
        "columns": {"id": "id", "sentences": sentences, "label": label_column},
        "label": label,
        "bad_rows": "skip",
    }


PAIR = ["sentence1", "sentence2"]
PRESETS: dict[str, dict[str, Any]] = {
    "sst": _cs224n("ids-sst", ["sentence"], "sentiment", {"kind": "classification", "num_classes": 5}),
    "quora": _cs224n("quora", PAIR, "is_duplicate", {"kind": "binary"}),
    "sts": _cs224n("sts", PAIR, "similarity", {"kind": "regression", "min": 0, "max": 5}),
    "cfimdb": _cs224n("ids-cfimdb", ["sentence"], "sentiment", {"kind": "binary"}),
}


class OwnLosses(Config):
    """Each task learns what its labels say."""

    kind: Literal["tasks"] = "tasks"

    def losses(self, task: "TaskConfig", forward: Callable[..., Any], batch: Batch) -> Tensor:
        """What each row of a batch costs."""
        return task.losses(forward, batch)


class HiddenWordsLoss(Config):
    """Every task's texts, without their labels: words are hidden, and the encoder finds them again from the others.

    A row costs the mean of its hidden words' cross-entropies.
    """

    kind: Literal["mlm"] = "mlm"
    share: float = Field(0.15, gt=0, lt=1)  # of a row's words; at least one

    def losses(self, task: "TaskConfig", forward: Callable[..., Any], batch: Batch) -> Tensor:
        """What each row of a batch costs."""
        assert batch.hidden is not None
        scores_MV = forward(batch.task, batch.packed, False, batch.hidden.places_M)
        loss_M = F.cross_entropy(scores_MV, batch.hidden.tokens_M, reduction="none")
        number_N = batch.hidden.number_N
        sum_N = torch.segment_reduce(loss_M, "sum", lengths=number_N, unsafe=True)
        return sum_N / number_N.clamp(min=1) * batch.weight_N


Objective = Annotated[OwnLosses | HiddenWordsLoss, Field(discriminator="kind")]


class Columns(Config):
    """The columns that a task reads."""

    sentences: tuple[str, ...] = Field(min_length=1, max_length=2)  # one text, or a pair
    label: str
    id: str | None = None  # by default a row's line number is its name


def _or_a_preset(schema: dict[str, Any]) -> None:
    # To editors: what a preset fills in need not be written beside it.
    schema["anyOf"] = [{"required": ["preset"]}, {"required": schema.pop("required")}]


class TaskConfig(Config):
    """One task."""

    model_config = ConfigDict(json_schema_extra=_or_a_preset)

    preset: Literal["sst", "quora", "sts", "cfimdb"] | None = None
    train: Source
    dev: Source | None = None  # a task without it is trained, but not scored
    test: Source | None = None
    columns: Columns
    label: Label
    bad_rows: Literal["error", "skip"] = "error"  # skip: rows that cannot be used are counted and listed
    # Tokens of an input; the rest is cut off. At least [CLS] a [SEP] b [SEP]; by default all that the encoder can take.
    max_length: int | None = Field(None, ge=5)
    pooling: Pooling = "mean"
    head: Head = FILLED_IN  # by default linear, for pairs sbert
    loss: Loss = FILLED_IN  # by default cross_entropy, bce or mse, as the label is
    dropout: float = Field(0.1, ge=0, lt=1)  # on the pooled vectors
    # R-Drop (Liang et al. 2021): every row is read twice, and so much of what dropout makes of it is a loss of its own.
    r_drop: NonNegativeFloat = 0.0
    ranking: Ranking | None = None  # a loss beside the task's own, for pairs: who belongs to whom?
    weight: PositiveFloat = 1.0  # of the task's mean loss in the sum
    batch_size: PositiveInt = 32  # rows of a draw, over all processes
    subsample: Subsample | None = None  # by default an epoch has all rows
    metric: Metric = FILLED_IN  # what the overall scores count; by default accuracy or pearson

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        """Lays what is written over its preset, over the defaults that depend on label and columns."""
        if not isinstance(raw, dict):
            return raw
        # Parts that code wrote are mappings like those of a file.
        raw = {key: part.model_dump() if isinstance(part, Config) else part for key, part in raw.items()}
        preset = raw.get("preset")
        # An unknown preset is refused as such; any will do that spares the user a list of what it leaves missing.
        task = overlay({} if preset is None else PRESETS.get(str(preset), PRESETS["sst"]), raw)
        match task:
            case {"columns": {"sentences": [*sentences]}, "label": {"kind": str(kind)}} if kind in DEFAULT_LOSS:
                defaults = {
                    "head": {"kind": "linear" if len(sentences) == 1 else "sbert"},
                    "loss": {"kind": DEFAULT_LOSS[kind]},
                    "metric": "pearson" if kind == "regression" else "accuracy",
                }
                return task | {key: value for key, value in defaults.items() if task.get(key) is None}
        return task

    @model_validator(mode="after")
    def _fits_together(self) -> "TaskConfig":
        label, head, loss = self.label.kind, self.head.kind, self.loss.kind
        texts = len(self.columns.sentences)
        if self.head.sentences != texts:
            raise ValueError(f"head {head} reads {self.head.sentences} sentence(s), columns.sentences names {texts}")
        if label not in self.loss.labels:
            raise ValueError(f"loss {loss} does not fit a {label} label; it fits {' and '.join(self.loss.labels)}")
        if isinstance(self.head, Cosine | ProjectedCosine) and self.loss.outputs(self.label) > 1:
            raise ValueError(f"loss {loss} needs {self.loss.outputs(self.label)} outputs, head {head} has one")
        if self.loss.cosine_only and not (isinstance(self.head, Cosine | ProjectedCosine) and self.head.scale is None):
            raise ValueError(f"loss {loss} needs the head cosine or projected_cosine, without a scale of its own")
        if isinstance(self.loss, CosineEmbedding) and isinstance(self.label, Regression):
            start = self.loss.alike_from
            if start is not None and not self.label.min < start <= self.label.max:
                raise ValueError(f"loss.alike_from is {start:g}: no label, or every one, is as large as that")
        if self.ranking is not None:
            if texts == 1 or self.head.joint:
                raise ValueError(f"ranking needs a vector for each sentence of a pair; head {head} has one for both")
            self.ranking.positive_from(self.label)
        if (self.metric in ("pearson", "spearman")) != isinstance(self.label, Regression):
            raise ValueError(f"metric {self.metric} does not fit a {label} label")
        return self

    @property
    def copies(self) -> int:
        """How often a batch has each row; dropout makes something else of each copy."""
        return 2 if self.r_drop else 1

    def losses(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """What each row of a batch costs, from a forward pass; one that fills in for others costs nothing."""
        if self.ranking is None:
            raw_NO, vectors_SD = forward(batch.task, batch.packed), None
        else:
            raw_NO, vectors_SD = forward(batch.task, batch.packed, True)
        copies = raw_NO.chunk(self.copies)
        loss_N = torch.stack([self.loss.per_example(copy_NO, batch.gold_N, self.label) for copy_NO in copies]).mean(0)
        if self.r_drop:
            loss_N = loss_N + self.r_drop / 4 * self.loss.divergence(*copies)
        if self.ranking is not None and vectors_SD is not None:
            first_ND, second_ND = (side[: len(batch.rows)] for side in vectors_SD.chunk(2))
            ranking_N = self.ranking.per_example(first_ND, second_ND, batch.gold_N, batch.rows_W, self.label)
            # One vector that is no number makes none of all: the row that it is of is the one whose own loss is lost.
            loss_N = loss_N + self.ranking.weight * ranking_N.where(ranking_N.isfinite(), 0.0)
        return loss_N * batch.weight_N

    def source(self, split: SplitName, data_dir: Path) -> Source | None:
        """Where a split's rows are; relative paths start at `data_dir`."""
        source: Source | None = getattr(self, split)
        if isinstance(source, File):
            return source.model_copy(update={"path": data_dir / source.path})
        return source

    def reading(self, labelled: bool = True) -> Reading:
        """How its rows are read; without their labels where they may have none."""
        names = [self.columns.id, *self.columns.sentences, self.columns.label if labelled else None]
        return Reading(
            columns=[name for name in names if name is not None],
            check=partial(self.check, labelled=labelled),
            sentences=len(self.columns.sentences),
            joint=self.head.joint,
            skip_bad=self.bad_rows == "skip",
            depends_on={
                "columns": self.columns.model_dump(mode="json"),
                "label": self.label.model_dump(mode="json") if labelled else None,
            },
        )

    def check(self, row: Row, labelled: bool) -> Example | BadRow:
        """The example in a row, or what is wrong with it."""
        texts: list[str] = []
        for column in self.columns.sentences:
            text = row.fields[column]
            if not isinstance(text, str):
                return BadRow(row.line, f"{column} is {reprlib.repr(text)}, not a text")
            if not text.strip():
                return BadRow(row.line, f"{column} is blank")
            texts.append(text)
        label = UNLABELLED
        if labelled:
            try:
                label = self.label.parse(row.fields[self.columns.label])
            except ValueError as error:
                return BadRow(row.line, f"{self.columns.label} {error}")
        name = str(row.line if self.columns.id is None else row.fields[self.columns.id])
        return Example(row.line, name, tuple(texts), label)
