"""What a task predicts and how wrong it is: labels as users write them, and the losses that fit each kind of label.

A head gives raw outputs; the loss alone knows what they mean, so it also turns them into predictions, and into
probabilities where they stand for some.
"""

# Shape suffixes: N = examples, V = those of all ranks, O = outputs of the head (the number of classes or bins, else 1),
# C = classes, D = width of a vector, W = ranks.

import reprlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from mtl_dist.config import Config
from mtl_dist.distributed import all_ranks_rows

# ---------------------------------------------------------------------------------------------------------- labels


class LabelConfig(Config):
    """The values that a label may take."""

    scale: ClassVar[float] = 1.0  # the label that a cosine of 1 stands for

    @abstractmethod
    def parse(self, value: object) -> float:
        """The number behind a value of the data file; a ValueError says what is allowed instead."""


class Classification(LabelConfig):
    """One of several classes: a number from 0 to num_classes - 1, or one of the names."""

    kind: Literal["classification"]
    num_classes: PositiveInt | None = None
    names: list[str] | None = None

    @model_validator(mode="after")
    def _count_or_names(self) -> "Classification":
        if (self.num_classes is None) == (self.names is None):
            raise ValueError("needs either num_classes or names")
        if self.classes < 2:
            raise ValueError(f"needs at least 2 classes, not {self.classes}")
        _refuse_twice(self.names)
        return self

    @property
    def classes(self) -> int:
        return self.num_classes or len(self.names or [])

    def parse(self, value: object) -> float:
        return _class_of(value, self.classes, self.names, "{kind: classification, names: [...]}")


class Binary(LabelConfig):
    """No or yes: written 0 or 1, or as one of the two names."""

    kind: Literal["binary"]
    names: list[str] | None = None  # of no, then of yes
    classes: ClassVar[int] = 2

    @model_validator(mode="after")
    def _two_names(self) -> "Binary":
        if self.names is not None and len(self.names) != 2:
            raise ValueError(f"needs two names, first that of no, not {len(self.names)}")
        _refuse_twice(self.names)
        return self

    def parse(self, value: object) -> float:
        number = int(value) if isinstance(value, bool) else value
        return _class_of(number, 2, self.names, "{kind: binary, names: [no, yes]}")


class Regression(LabelConfig):
    """A number within a range, such as a similarity from 0 to 5."""

    kind: Literal["regression"]
    min: float = 0.0
    max: float = 5.0

    @model_validator(mode="after")
    def _is_a_range(self) -> "Regression":
        if not self.min < self.max:
            raise ValueError(f"is an empty range: min {self.min:g}, max {self.max:g}")
        return self

    @property
    def scale(self) -> float:  # type: ignore[override]
        return max(abs(self.min), abs(self.max))

    def parse(self, value: object) -> float:
        number = _number(value)
        if not self.min <= number <= self.max:
            raise ValueError(f"is {str(value).strip()}, outside the range [{self.min:g}, {self.max:g}]")
        return number


Label = Annotated[Classification | Binary | Regression, Field(discriminator="kind")]


def _number(value: object) -> float:
    try:
        # To Python alone true is a 1, and 0_1 as well.
        if isinstance(value, bool) or "_" in str(value):
            raise ValueError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        shown = "blank" if value is None or str(value).strip() == "" else f"{reprlib.repr(value)}, not a number"
        raise ValueError(f"is {shown}") from None


def _refuse_twice(names: list[str] | None) -> None:
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"names a class twice: {', '.join(names)}")


def _class_of(value: object, classes: int, names: list[str] | None, label_with_names: str) -> float:
    # A hub's class labels come as numbers even where they have names.
    if names is not None and isinstance(value, str) and (name := value.strip()):
        if name not in names:
            raise ValueError(f"is {reprlib.repr(name)}, none of {', '.join(names)}")
        return float(names.index(name))
    try:
        number = _number(value)
    except ValueError as error:
        words = isinstance(value, str) and any(map(str.isalpha, value))
        raise ValueError(f"{error}; for words say label: {label_with_names}" if words else str(error)) from None
    # '1.0' is how pandas writes a whole number; 1.5 is no class.
    if not (number.is_integer() and 0 <= number < classes):
        raise ValueError(f"is {str(value).strip()}, none of the classes 0 to {classes - 1}")
    return number


# ---------------------------------------------------------------------------------------------------------- losses


# So much of a label is spread evenly over all classes, its own among them.
Smoothing = Annotated[float, Field(ge=0, lt=1)]


def jeffreys(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) of each example."""
    return ((log_p_NC.exp() - log_q_NC.exp()) * (log_p_NC - log_q_NC)).sum(dim=1)


class LossConfig(Config):
    """The loss of each example from the head's raw outputs, and the prediction they stand for."""

    labels: ClassVar[tuple[str, ...]]  # the kinds of label it fits
    cosine_only: ClassVar[bool] = False
    gives_probabilities: ClassVar[bool] = False  # of the classes; a number near 0 or 1 is none

    def outputs(self, label: Label) -> int:
        """How many outputs the head must have."""
        return 1

    @abstractmethod
    def per_example(self, raw_NO: Tensor, gold_N: Tensor, label: Label) -> Tensor:
        """The loss of each example."""

    def divergence(self, raw_NO: Tensor, other_NO: Tensor) -> Tensor:
        """How far two outputs for the same example are apart: the squared distance; of distributions, `jeffreys`."""
        return (raw_NO - other_NO).square().sum(dim=1)

    def predict(self, raw_NO: Tensor, label: Label) -> Tensor:
        """The predicted class, or the predicted number."""
        return (raw_NO[:, 0] > 0.5).long() if isinstance(label, Binary) else raw_NO[:, 0]

    def probabilities(self, raw_NO: Tensor) -> Tensor:
        """The probability of each class (N x classes), where the loss gives any."""
        raise NotImplementedError


class CrossEntropy(LossConfig):
    """Softmax over the classes."""

    kind: Literal["cross_entropy"]
    label_smoothing: Smoothing = 0.0
    labels: ClassVar = ("classification", "binary")
    gives_probabilities: ClassVar = True

    def outputs(self, label: Label) -> int:
        assert not isinstance(label, Regression)
        return label.classes

    def per_example(self, raw_NO: Tensor, gold_N: Tensor, label: Label) -> Tensor:
        return F.cross_entropy(raw_NO, gold_N.long(), reduction="none", label_smoothing=self.label_smoothing)

    def divergence(self, raw_NO: Tensor, other_NO: Tensor) -> Tensor:
        return jeffreys(raw_NO.log_softmax(dim=1), other_NO.log_softmax(dim=1))

    def predict(self, raw_NO: Tensor, label: Label) -> Tensor:
        return raw_NO.argmax(dim=1)

    def probabilities(self, raw_NO: Tensor) -> Tensor:
        return raw_NO.double().softmax(dim=1)


class Bce(LossConfig):
    """Binary cross-entropy; the output is a logit."""

    kind: Literal["bce"]
    label_smoothing: Smoothing = 0.0
    labels: ClassVar = ("binary",)
    gives_probabilities: ClassVar = True

    def per_example(self, raw_NO: Tensor, gold_N: Tensor, label: Label) -> Tensor:
        smoothed_N = gold_N * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(raw_NO[:, 0], smoothed_N, reduction="none")

    def divergence(self, raw_NO: Tensor, other_NO: Tensor) -> Tensor:
        both = (torch.cat([F.logsigmoid(-raw), F.logsigmoid(raw)], dim=1) for raw in (raw_NO, other_NO))
        return jeffreys(*both)

    def predict(self, raw_NO: Tensor, label: Label) -> Tensor:
        return (raw_NO[:, 0] > 0).long()

    def probabilities(self, raw_NO: Tensor) -> Tensor:
        logits_N = raw_NO[:, 0].double()
        return torch.stack([(-logits_N).sigmoid(), logits_N.sigmoid()], dim=1)  # of no, of yes


class Mse(LossConfig):
    """Squared error."""

    kind: Literal["mse"]
    labels: ClassVar = ("binary", "regression")

    def per_example(self, raw_NO: Tensor, gold_N: Tensor, label: Label) -> Tensor:
        return F.mse_loss(raw_NO[:, 0], gold_N, reduction="none")


class L1(LossConfig):
    """Absolute error."""

    kind: Literal["l1"]
    labels: ClassVar = ("binary", "regression")

    def per_example(self, raw_NO: Tensor, gold_N: Tensor, label: Label) -> Tensor:
        return F.l1_loss(raw_NO[:, 0], gold_N, reduction="none")


class CosineEmbedding(LossConfig):
    """Pulls pairs labelled `alike_from` or more together and pushes the others apart, up to `margin`."""

    kind: Literal["cosine_embedding"]
    alike_from: float | None = None  # by default the middle of the label's range
    margin: float = Field(0.0, ge=-1, lt=1)  # a pair that is not alike costs nothing below this cosine
    labels: ClassVar = ("binary", "regression")
    cosine_only: ClassVar = True

    def per_example(self, raw_NO: Tensor, gold_N: Tensor, label: Label) -> Tensor:
        assert not isinstance(label, Classification)
        low, high = (label.min, label.max) if isinstance(label, Regression) else (0.0, 1.0)
        alike_N = gold_N >= ((low + high) / 2 if self.alike_from is None else self.alike_from)
        cosine_N = raw_NO[:, 0] / label.scale
        return (1 - cosine_N).where(alike_N, (cosine_N - self.margin).relu())


class Bins(LossConfig):
    """Cross-entropy over a score cut into equal bins; predicts the expected score."""

    kind: Literal["bins"]
    bins: int = Field(25, ge=2)
    labels: ClassVar = ("regression",)

    def outputs(self, label: Label) -> int:
        return self.bins

    def per_example(self, raw_NO: Tensor, gold_N: Tensor, label: Label) -> Tensor:
        assert isinstance(label, Regression)
        share_N = (gold_N - label.min) / (label.max - label.min)
        # The small push keeps 0.6 out of the bin below it, where its fp32 neighbour would fall.
        bin_N = (share_N * self.bins + 1e-4).long().clamp(max=self.bins - 1)
        return F.cross_entropy(raw_NO, bin_N, reduction="none")

    def divergence(self, raw_NO: Tensor, other_NO: Tensor) -> Tensor:
        return jeffreys(raw_NO.log_softmax(dim=1), other_NO.log_softmax(dim=1))

    def predict(self, raw_NO: Tensor, label: Label) -> Tensor:
        assert isinstance(label, Regression)
        centre_O = (raw_NO.new_tensor(range(self.bins)) + 0.5) / self.bins
        return label.min + (label.max - label.min) * (raw_NO.softmax(dim=1) @ centre_O)


class Ranking(Config):
    """Multiple negatives ranking (Henderson et al. 2017): each sentence of a true pair finds its other among all.

    All are the draw's, of every rank: the second sentences for a first one, and the other way round.
    """

    weight: PositiveFloat = 1.0  # beside the task's own loss; both are means over all rows of a draw
    scale: PositiveFloat = 20.0  # what cosines are multiplied with before the softmax
    positives_from: float | None = None  # the label of a true pair; by default yes, or 4/5 of the label's range

    def positive_from(self, label: Label) -> float:
        """The smallest label of a true pair."""
        low, high = (label.min, label.max) if isinstance(label, Regression) else (0.0, 1.0)
        if isinstance(label, Classification):
            raise ValueError("ranking needs a binary or a regression label")
        share = 0.8 if isinstance(label, Regression) else 1.0
        start = low + share * (high - low) if self.positives_from is None else self.positives_from
        if not low < start <= high:
            raise ValueError(f"ranking.positives_from is {start:g}: no pair, or every one, would be a true one")
        return start

    def per_example(
        self, first_ND: Tensor, second_ND: Tensor, gold_N: Tensor, rows_W: Sequence[int], label: Label
    ) -> Tensor:
        """The loss of each pair of this rank, which has rows_W[rank] of the draw's."""
        sides_ND = [F.normalize(side_ND.float(), dim=1) for side_ND in (first_ND, second_ND)]
        all_VD = [all_ranks_rows(side_ND, rows_W) for side_ND in sides_ND]
        rank = dist.get_rank() if len(rows_W) > 1 else 0
        own_N = torch.arange(len(gold_N), device=gold_N.device)
        place_N = (own_N + sum(rows_W[:rank])).clamp(max=sum(rows_W) - 1)  # a filler has no place
        found_N = [
            F.cross_entropy(self.scale * own_ND @ others_VD.T, place_N, reduction="none")
            for own_ND, others_VD in zip(sides_ND, reversed(all_VD), strict=True)
        ]
        return torch.stack(found_N).mean(0).where(gold_N >= self.positive_from(label), 0.0)


# Cross-entropy for classes, its binary form for yes or no, squared error for numbers.
DEFAULT_LOSS = {"classification": "cross_entropy", "binary": "bce", "regression": "mse"}

Loss = Annotated[CrossEntropy | Bce | Mse | L1 | CosineEmbedding | Bins, Field(discriminator="kind")]
