"""What a task predicts and how wrong it is: labels as users write them, and the losses that fit each kind of label.

A head gives raw outputs; the loss alone knows what they mean, so it also turns them into predictions, and into
probabilities where they stand for some.
"""

# Shape suffixes: N = examples, O = outputs of the head (the number of classes or bins, else 1).

import reprlib
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from mtl_dist.config import Config

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

    def predict(self, raw_NO: Tensor, label: Label) -> Tensor:
        """The predicted class, or the predicted number."""
        return (raw_NO[:, 0] > 0.5).long() if isinstance(label, Binary) else raw_NO[:, 0]

    def probabilities(self, raw_NO: Tensor) -> Tensor:
        """The probability of each class (N x classes), where the loss gives any."""
        raise NotImplementedError


class CrossEntropy(LossConfig):
    """Softmax over the classes."""

    kind: Literal["cross_entropy"]
    labels: ClassVar = ("classification", "binary")
    gives_probabilities: ClassVar = True

    def outputs(self, label: Label) -> int:
        assert not isinstance(label, Regression)
        return label.classes

    def per_example(self, raw_NO: Tensor, gold_N: Tensor, label: Label) -> Tensor:
        return F.cross_entropy(raw_NO, gold_N.long(), reduction="none")

    def predict(self, raw_NO: Tensor, label: Label) -> Tensor:
        return raw_NO.argmax(dim=1)

    def probabilities(self, raw_NO: Tensor) -> Tensor:
        return raw_NO.double().softmax(dim=1)


class Bce(LossConfig):
    """Binary cross-entropy; the output is a logit."""

    kind: Literal["bce"]
    labels: ClassVar = ("binary",)
    gives_probabilities: ClassVar = True

    def per_example(self, raw_NO: Tensor, gold_N: Tensor, label: Label) -> Tensor:
        return F.binary_cross_entropy_with_logits(raw_NO[:, 0], gold_N, reduction="none")

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

    def predict(self, raw_NO: Tensor, label: Label) -> Tensor:
        assert isinstance(label, Regression)
        centre_O = (raw_NO.new_tensor(range(self.bins)) + 0.5) / self.bins
        return label.min + (label.max - label.min) * (raw_NO.softmax(dim=1) @ centre_O)


# Cross-entropy for classes, its binary form for yes or no, squared error for numbers.
DEFAULT_LOSS = {"classification": "cross_entropy", "binary": "bce", "regression": "mse"}

Loss = Annotated[CrossEntropy | Bce | Mse | L1 | CosineEmbedding | Bins, Field(discriminator="kind")]
