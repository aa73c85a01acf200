"""Which rows are in which slice, on sentences of our own.

python -m pytest tests/runs/test_slices.py
"""

import numpy as np
import pytest

from mtl_dist.data.read import Example
from mtl_dist.model.objectives import Binary, Classification, Label, Regression
from mtl_dist.runs.slices import is_negated, overlap, slices_of, words_of

YES_OR_NO = Binary(kind="binary")


def slices(label: Label, texts: list[tuple[str, ...]], gold: list[float], *names: str) -> dict[str, list[int]]:
    """The rows of each slice."""
    examples = [Example(line, str(line), sentences, 0.0) for line, sentences in enumerate(texts)]
    found = slices_of(label, names or ("0", "1"), examples, np.array(gold))
    return {f"{each.kind}: {each.name}": np.flatnonzero(each.rows).tolist() for each in found}


@pytest.mark.parametrize(
    ("text", "negated"),
    [
        ("It does n't work", True),  # as the Stanford treebank parts it
        ("it DOESN'T work", True),
        ("I can\N{RIGHT SINGLE QUOTATION MARK}t wait", True),
        ("I dont know", True),
        ("Nobody came , nor did he", True),
        ("a brilliant movement of want", False),  # which end in nt
        ("know , knot , another , nose", False),
        ("", False),
    ],
)
def test_what_negates(text: str, negated: bool) -> None:
    assert is_negated(words_of(text)) == negated


def test_words_and_what_two_texts_share() -> None:
    assert words_of("It's 3.5 km -- _Ça_ va?") == ["it's", "3", "5", "km", "ça", "va"]
    # {a, b, c} and {b, c, d}: two of four, however often they come.
    assert overlap(["a", "b", "c", "b"], ["d", "c", "b"]) == 0.5
    assert overlap([], []) == 0


def test_slices_of_single_sentences() -> None:
    texts = [("good",), ("not so good",), ("good but long , alas",), ("never good , yet never dull",)]
    classes = Classification(kind="classification", names=["bad", "so so", "good"])
    assert slices(classes, texts, [2, 0, 2, 2], "bad", "so so", "good") == {
        "length: 1 word": [0],
        "length: 3 words": [1],
        "length: 4 words": [2],
        "length: 5 words": [3],
        "negation: none": [0, 2],
        "negation: some": [1, 3],
        "contrast: none": [0, 1],
        "contrast: some": [2, 3],
        "label: bad": [1],
        "label: good": [0, 2, 3],  # so so has no row
    }


def test_slices_of_pairs() -> None:
    texts = [
        ("a b c", "c b a"),  # 1
        ("a b c", "a b c d"),  # 3/4
        ("not a b", "a b c d"),  # 2/5
        ("no a", "not b"),  # 0
    ]
    found = slices(YES_OR_NO, texts, [1, 1, 1, 1])
    assert found == {
        "length: 4 words": [3],
        "length: 6 words": [0],
        "length: 7 words": [1, 2],
        "negation: in neither": [0, 1],
        "negation: in one": [2],
        "negation: in both": [3],
        "overlap: 0 to 0.25": [3],
        "overlap: 0.25 to 0.5": [2],
        "overlap: 0.75 to 1": [0, 1],
    }  # and none by label: all rows have the same


def test_quarters_of_the_range_and_of_the_lengths() -> None:
    lengths = [1, 1, 1, 1, 1, 2, 3, 9]
    found = slices(
        Regression(kind="regression", min=-1, max=1),
        [("w " * length,) for length in lengths],
        [-1, -0.6, -0.5, -0.1, 0, 0.4, 0.5, 1],
    )
    assert found == {
        "length: 1 word": [0, 1, 2, 3, 4],  # two quarters, and more, are of one length
        "length: 2 words": [5],
        "length: 3 to 9 words": [6, 7],
        "label: -1 to -0.5": [0, 1],
        "label: -0.5 to 0": [2, 3],
        "label: 0 to 0.5": [4, 5],
        "label: 0.5 to 1": [6, 7],
    }
