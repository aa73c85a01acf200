"""The demo corpus says what its labels claim, keeps its splits apart, and is the same wherever it is written.

python -m pytest tests/data/test_corpus.py
"""

import hashlib
import math
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mtl_dist.config import UserError
from mtl_dist.data import corpus
from mtl_dist.data.corpus import draw_row, write_corpus

TASKS = ("sentiment", "paraphrase", "similarity")
SPLITS = ("train", "dev", "test")
THING = {
    word: words for words in (*corpus.PEOPLE, *corpus.TRAITS, *corpus.VERBS, *corpus.TIMES) for word in words.split("/")
}
POINTS = {"who": 1, "who is": 0.5, "did": 1, "whom": 1, "whom is": 0.5, "where": 0.5, "when": 0.5}


def rows(task: str, size: int, split: str = "train", seed: int = 0) -> list[corpus.Row]:
    return [draw_row(task, split, number, seed) for number in range(size)]


def understood(sentence: str) -> dict[str, str]:
    """The scene of a sentence, read without the templates."""
    match = re.fullmatch(r"(.*?) ?\b(the .* the \w+ \w+) ?(.*)", sentence.removesuffix(" as usual"))
    assert match
    front, event, back = match.groups()
    _, who_is, who, did, _, whom_is, whom = [THING.get(word, word) for word in event.split()]
    phrases = re.findall(r"\w+ \w+", f"{front} {back}")
    return {
        "who": who,
        "who is": who_is,
        "did": did,
        "whom": whom,
        "whom is": whom_is,
        "where": "".join(phrase for phrase in phrases if phrase in corpus.PLACES),
        "when": "".join(THING[phrase] for phrase in phrases if phrase not in corpus.PLACES),
    }


def points(one: dict[str, str], two: dict[str, str]) -> float:
    return sum(worth for slot, worth in POINTS.items() if one[slot] == two[slot])


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 7), ("again", 7), ("other", 8)):
        write_corpus(tmp_path / name, rows=200, dev_rows=20, seed=seed)
    one, again, other = (digests(tmp_path / name) for name in ("one", "again", "other"))
    tables = {f"{task}-{split}.tsv" for task in TASKS for split in SPLITS}
    assert set(one) == tables | {"tokenizer.json", "vocab.txt"}
    assert one == again
    assert {name for name in one if one[name] != other[name]} == tables


def test_a_file_is_a_table_with_a_header(tmp_path: Path) -> None:
    write_corpus(tmp_path, rows=100, dev_rows=3, seed=0)
    header, *lines = (tmp_path / "similarity-dev.tsv").read_text(encoding="utf-8").splitlines()
    assert header.split("\t") == ["id", "sentence1", "sentence2", "label"]
    drawn = rows("similarity", 3, "dev")
    assert [line.split("\t") for line in lines] == [
        [f"dev-{n}", *row.sentences, row.label] for n, row in enumerate(drawn)
    ]
    assert (tmp_path / "sentiment-test.tsv").read_text(encoding="utf-8").startswith("id\tsentence\tlabel\ntest-0\t")


def test_a_larger_corpus_begins_with_the_smaller(tmp_path: Path) -> None:
    for size in (100, 150):
        write_corpus(tmp_path / str(size), rows=size, dev_rows=1)
    small, large = ((tmp_path / size / "paraphrase-train.tsv").read_text(encoding="utf-8") for size in ("100", "150"))
    assert large.startswith(small)
    assert large.count("\n") == 1 + 120


def test_a_paraphrase_is_the_same_scene_in_other_words() -> None:
    for row in rows("paraphrase", 1000):
        one, two = row.sentences
        assert one != two
        assert row.label == str(int(understood(one) == understood(two)))


def test_most_near_misses_only_swap_who_is_who() -> None:
    scenes = [[understood(s) for s in row.sentences] for row in rows("paraphrase", 1000) if row.label == "0"]
    same_words = [sorted(one.values()) == sorted(two.values()) for one, two in scenes]
    assert 0.55 < sum(same_words) / len(scenes) < 0.75  # (80 - 45) / 55 = 0.64


def test_similarity_counts_what_two_scenes_agree_on() -> None:
    drawn = rows("similarity", 1000)
    for row in drawn:
        assert float(row.label) == points(*map(understood, row.sentences))
    assert {row.label for row in drawn} == {f"{half / 2:.1f}" for half in range(11)}


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        ("the music of the film was truly dreadful", "0"),  # -4
        ("the view of the hotel was not solid", "1"),  # -2
        ("the ending of the film was hardly weak", "3"),  # 2
        ("the view of the hotel was truly superb", "4"),  # 4
        ("the cast was not very good and the plot was ordinary", "2"),  # (-1 + 0) / 2
        ("the breakfast was simply brilliant and the room was really weak", "2"),  # (4 - 3) / 2
        ("the service was not bad and the food was truly horrible", "1"),  # (2 - 4) / 2
        ("the room was really poor and the breakfast was not nice", "0"),  # (-3 - 2) / 2
        ("the cast was very solid but the music was very weak", "1"),  # (3 + 3 * -3) / 4
        ("the food was very dull but the wine was simply awful", "0"),  # (-3 + 3 * -4) / 4
        ("although the menu was perfect, the wine was rather good", "3"),  # (4 + 3 * 1) / 4
        ("although the plot was brilliant, the cast was very pleasant", "4"),  # (4 + 3 * 3) / 4
    ],
)
def test_sentiment_worked_by_hand(sentence: str, label: str) -> None:
    labels = {row.sentences[0]: row.label for row in rows("sentiment", 60)}
    assert labels[sentence] == label


def test_labels_are_spread() -> None:
    sentiment = [row.label for row in rows("sentiment", 1000)]
    assert all(sentiment.count(label) > 100 for label in "01234")
    positive = [row.label for row in rows("paraphrase", 1000)].count("1")
    assert 400 < positive < 500


def test_sentences_are_short() -> None:
    lengths = {len(s.split()) for task in TASKS for row in rows(task, 500) for s in row.sentences}
    assert min(lengths) >= 5 and max(lengths) <= 14


def test_splits_share_nothing_even_where_little_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {slot: (options[:3], points) for slot, (options, points) in corpus.SLOTS.items()}
    monkeypatch.setattr(corpus, "SLOTS", few)
    for task in TASKS:
        # A pair stays the same pair with its sentences exchanged.
        train, dev, test = ({frozenset(row.sentences) for row in rows(task, 1000, split)} for split in SPLITS)
        assert not train & dev and not train & test and not dev & test
    train, dev = (
        {frozenset(str(understood(sentence)) for sentence in row.sentences) for row in rows("paraphrase", 1000, split)}
        for split in ("train", "dev")
    )
    assert not train & dev


def test_every_word_of_the_grammar_is_one_token(tmp_path: Path) -> None:
    write_corpus(tmp_path, rows=100, dev_rows=1)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for task in TASKS:
        for row in rows(task, 500):
            for sentence in row.sentences:
                words = sentence.replace(",", " ,").split()
                assert tokenizer.encode(sentence).tokens == ["[CLS]", *words, "[SEP]"]
    pieces = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert [tokenizer.token_to_id(piece) for piece in pieces] == list(range(tokenizer.get_vocab_size()))
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_the_tokenizer_marks_pairs_and_spells_what_it_does_not_know(tmp_path: Path) -> None:
    write_corpus(tmp_path, rows=100, dev_rows=1)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pair = tokenizer.encode("The Baker", "café 42!")
    assert pair.tokens == ["[CLS]", "the", "baker", "[SEP]", "c", "##a", "##f", "##e", "4", "##2", "!", "[SEP]"]
    assert pair.type_ids == [0] * 4 + [1] * 8


@pytest.mark.parametrize(
    ("size", "shares", "sizes"),
    [
        (20_000, corpus.SHARES, {"sentiment": 2000, "paraphrase": 16_000, "similarity": 2000}),
        (101, corpus.SHARES, {"sentiment": 10, "paraphrase": 81, "similarity": 10}),
        (
            100,
            {"similarity": 1, "sentiment": 1, "paraphrase": 1},
            {"similarity": 33, "sentiment": 34, "paraphrase": 33},
        ),
        (100, {"paraphrase": 0.3}, {"paraphrase": 100}),
    ],
)
def test_shares_deal_out_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, shares: dict[str, float], sizes: dict[str, int]
) -> None:
    monkeypatch.setattr(corpus, "draw_row", lambda *_: corpus.Row("", ("a",), "0"))
    assert write_corpus(tmp_path, rows=size, shares=shares, dev_rows=1) == sizes
    for task, rows_of_task in sizes.items():
        assert (tmp_path / f"{task}-train.tsv").read_text(encoding="utf-8").count("\n") == 1 + rows_of_task
    assert {path.name.split("-")[0] for path in tmp_path.glob("*.tsv")} == set(sizes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": 99}, "rows is 99, outside the range [100, 1000000]"),
        ({"rows": 1_000_001}, "rows is 1000001, outside the range [100, 1000000]"),
        ({"dev_rows": 0}, "dev_rows is 0, outside the range [1, 10000]"),
        ({"shares": {}}, "shares is empty; name at least one of sentiment, paraphrase, similarity"),
        ({"shares": {"sts": 1.0}}, "shares has no task 'sts'; the tasks are sentiment, paraphrase, similarity"),
        (
            {"shares": {"sentiment": -1.0}},
            "shares.sentiment is -1.0, not a positive number; to do without the task, leave it out",
        ),
        (
            {"shares": {"sentiment": math.nan}},
            "shares.sentiment is nan, not a positive number; to do without the task, leave it out",
        ),
        (
            {"shares": {"sentiment": math.inf}},
            "shares.sentiment is inf, not a positive number; to do without the task, leave it out",
        ),
        (
            {"rows": 100, "shares": {"sentiment": 1.0, "paraphrase": 1000.0}},
            "shares.sentiment is 1.0, which is none of 100 rows; raise it, or leave the task out",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        write_corpus(tmp_path / "corpus", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "corpus").exists()


def test_an_interrupted_write_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, rows=100, dev_rows=1)
    before = digests(tmp_path)

    def fails(task: str, split: str, number: int, seed: int) -> corpus.Row:
        if number == 5:
            raise KeyboardInterrupt
        return draw_row(task, split, number, seed)

    monkeypatch.setattr(corpus, "draw_row", fails)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path, rows=100, dev_rows=1, seed=1)
    assert before.items() <= digests(tmp_path).items()
