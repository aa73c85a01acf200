"""Which rows are alike in what is known to make a row hard: its length, a negation, a turn, shared words, its label.

Words are told by spaces and punctuation, and the lists are English: for other languages length and label say something,
the others may not.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mtl_dist.data.read import Example
from mtl_dist.model.objectives import Label, Regression

# Besides all that ends in n't. What is also another word (cant, wont) is hardly ever that one.
NEGATIONS = frozenset(
    [
        *("no", "not", "none", "nothing", "nobody", "nowhere", "never", "neither", "nor", "without"),
        *("hardly", "barely", "scarcely", "cannot", "aint", "arent", "cant", "couldnt", "didnt", "doesnt", "dont"),
        *("hadnt", "hasnt", "havent", "isnt", "shouldnt", "wasnt", "werent", "wont", "wouldnt"),
    ]
)
CONTRASTS = frozenset(["but", "although", "though", "however", "yet", "despite"])  # after which a text may turn

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


@dataclass(frozen=True)
class Slice:
    """Some rows of a split."""

    kind: str  # length, negation, contrast, overlap or label
    name: str
    rows: NDArray[np.bool_]


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case; `n't` is one where it stands alone."""
    return _WORD.findall(text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def is_negated(words: Sequence[str]) -> bool:
    """Whether any of the words negates."""
    return any(word in NEGATIONS or word.endswith("n't") for word in words)


def overlap(words: Sequence[str], others: Sequence[str]) -> float:
    """The share of the words of two texts that both have (Jaccard), however often they come."""
    one, other = set(words), set(others)
    return len(one & other) / max(len(one | other), 1)


def slices_of(
    label: Label, class_names: Sequence[str], examples: Sequence[Example], gold: NDArray[np.float64]
) -> list[Slice]:
    """The slices of a split; those with no row or with all of them are left out."""
    words = [[words_of(sentence) for sentence in example.sentences] for example in examples]
    found = [*_by_length(words), *_by_negation(words)]
    found += _by_overlap(words) if len(words[0]) == 2 else _by_contrast(words)
    found += _by_range(label, gold) if isinstance(label, Regression) else _by_class(class_names, gold)
    return [each for each in found if each.rows.any() and not each.rows.all()]


Words = list[list[list[str]]]  # rows, their sentences, the words of each


def _by_length(words: Words) -> Iterator[Slice]:
    """Quarters of the rows, as far as rows of one length leave such."""
    lengths = np.array([sum(map(len, sentences)) for sentences in words])
    ends = np.quantile(lengths, [0.25, 0.5, 0.75], method="inverted_cdf")
    for quarter in range(4):
        rows = np.searchsorted(ends, lengths) == quarter
        if rows.any():
            low, high = int(lengths[rows].min()), int(lengths[rows].max())
            name = f"{low} to {high} words" if low < high else "1 word" if high == 1 else f"{high} words"
            yield Slice("length", name, rows)


def _by_negation(words: Words) -> Iterator[Slice]:
    negated = np.array([sum(map(is_negated, sentences)) for sentences in words])
    names = ["none", "some"] if len(words[0]) == 1 else ["in neither", "in one", "in both"]
    for count, name in enumerate(names):
        yield Slice("negation", name, negated == count)


def _by_contrast(words: Words) -> Iterator[Slice]:
    there = np.array([not CONTRASTS.isdisjoint(sentence) for (sentence,) in words])
    yield Slice("contrast", "none", ~there)
    yield Slice("contrast", "some", there)


def _by_overlap(words: Words) -> Iterator[Slice]:
    shares = np.array([overlap(*sentences) for sentences in words])
    for low in (0, 0.25, 0.5, 0.75):
        high = low + 0.25
        yield Slice("overlap", f"{low:g} to {high:g}", (shares >= low) & ((shares < high) | (high == 1)))


def _by_class(class_names: Sequence[str], gold: NDArray[np.float64]) -> Iterator[Slice]:
    for number, name in enumerate(class_names):
        yield Slice("label", name, gold == number)


def _by_range(label: Regression, gold: NDArray[np.float64]) -> Iterator[Slice]:
    edges = np.linspace(label.min, label.max, 5)
    quarter_of = np.searchsorted(edges, gold, side="right").clip(max=4) - 1
    for quarter, (low, high) in enumerate(pairwise(edges)):
        yield Slice("label", f"{low:g} to {high:g}", quarter_of == quarter)
