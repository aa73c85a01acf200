"""How far does a bag of words get on the demo corpus? What an encoder scores above it, it owes to the order of words.

    mtl-dist corpus data/demo
    python benchmarks/corpus_baseline.py data/demo

Trains on train and scores on dev: always the most frequent label, and logistic or ridge regression on word counts; of a
pair (a, b) on a + b, |a - b| and a * b.
"""
# mypy: disable-error-code="import-untyped"

import csv
import sys
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array, hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge


def read(path: Path) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """The columns of sentences and the labels of a file of the corpus."""
    with path.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file, delimiter="\t")
    _, *sentences, labels = zip(*rows, strict=True)
    return sentences, np.array(labels, dtype=float)


def features(columns: list[tuple[str, ...]], words: CountVectorizer) -> csr_array:
    """Word counts of a sentence, or of both sentences of a pair and of what they share or do not."""
    counts = [csr_array(words.transform(column)) for column in columns]
    if len(counts) == 1:
        return counts[0]
    a, b = counts
    return hstack([a + b, abs(a - b), a * b], format="csr")


def main(folder: Path) -> None:
    """Prints one line per task."""
    print("task        metric    constant  words")
    for task in ("sentiment", "paraphrase", "similarity"):
        columns, labels = read(folder / f"{task}-train.tsv")
        dev_columns, dev_labels = read(folder / f"{task}-dev.tsv")
        words = CountVectorizer().fit(sentence for column in columns for sentence in column)
        x, dev_x = features(columns, words), features(dev_columns, words)
        if task == "similarity":
            score = np.corrcoef(Ridge().fit(x, labels).predict(dev_x), dev_labels)[0, 1]
            print(f"{task:11} Pearson          - {score:6.3f}")
        else:
            values, counts = np.unique(labels, return_counts=True)
            constant = np.mean(dev_labels == values[counts.argmax()])
            score = LogisticRegression(max_iter=2000).fit(x, labels).score(dev_x, dev_labels)
            print(f"{task:11} accuracy     {constant:.3f} {score:6.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
