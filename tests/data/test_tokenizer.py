"""The same tokens as transformers, whatever the checkpoint's tokenizer file asks for, and cut off as it would.

python -m pytest tests/data/test_tokenizer.py
"""

import gc
import json
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import BertTokenizerFast

from mtl_dist.config import UserError
from mtl_dist.data import tokenizer as module
from mtl_dist.data.tokenizer import (
    Encoded,
    Words,
    checkpoint_folder,
    encode,
    encode_in_worker,
    load_tokenizer,
    read_json,
    start_worker,
)
from tests.conftest import SHARED

MINILM = SHARED / "models" / "minilm-l6"

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "##s",
    "##ting",
    ",",
    "!",
    "a",
    "b",
]
WORDS += ["cafe", "café", "Café", "猫"]
TEXTS = [
    "The cat, the CAFÉ!",
    "Café cafés",
    "the 猫猫 sat",
    "unknown sitting cats",
    "",
    " \x00\ufffd ",
    "a [SEP] b [MASK]",
]


def vocab_folder(folder: Path, **config: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def reference(**config: Any) -> BertTokenizerFast:
    return BertTokenizerFast({word: number for number, word in enumerate(WORDS)}, **config)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(vocab_folder(tmp_path_factory.mktemp("words")))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
)
def test_a_vocabulary_file_gives_transformers_tokens(tmp_path: Path, config: dict[str, Any]) -> None:
    theirs = reference(**config)
    theirs.save_pretrained(tmp_path / "json")
    from_vocab = load_tokenizer(vocab_folder(tmp_path / "txt", **config))
    from_json = load_tokenizer(str(tmp_path / "json"))
    for text in TEXTS:
        assert from_vocab.encode(text).ids == from_json.encode(text).ids == theirs(text)["input_ids"]
    assert from_vocab.get_vocab() == from_json.get_vocab() == theirs.get_vocab()


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_padding(length=16)
    other.enable_truncation(4)
    other.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).to_str() == tokenizer.to_str()


@pytest.mark.skipif(not MINILM.is_dir(), reason=f"no pre-trained encoder in {MINILM}")
def test_a_real_checkpoints_tokens_are_transformers(tmp_path: Path) -> None:
    ours, theirs = load_tokenizer(str(MINILM)), BertTokenizerFast.from_pretrained(MINILM)
    (tmp_path / "vocab.txt").write_bytes((MINILM / "vocab.txt").read_bytes())
    text = (
        "Naïve cafés don't unbelievably cost $5,000 in 東京!  " * 20
    )  # more than the 128 tokens that the file pads to
    for each in ("short", text):
        expected = theirs(each, padding=False, truncation=False)["input_ids"]
        assert ours.encode(each).ids == load_tokenizer(str(tmp_path)).encode(each).ids == expected


def rows_of(encoded: Encoded) -> list[list[list[int]]]:
    """The tokens of each example's inputs."""
    split = [np.split(tokens, offsets[1:-1]) for tokens, offsets in encoded.inputs]
    return [[tokens.tolist() for tokens in row] for row in zip(*split, strict=True)]


# Spaces and what looks like them, accents apart from their letters, capitals, special tokens, letters that vanish.
PIECES = [
    *"abtheçÅıİßΣς\u0301\u0327 \t\n\r\x00\x1f\u00a0\u2028\u200b\ufeff\ufffd,!-猫한",
    " ",
    " ",
    "the",
    "cats",
    "café",
    "[SEP]",
    "[MASK]",
    "##s",
]


@pytest.mark.parametrize(
    "config", [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
)
@given(texts=st.lists(st.text() | st.lists(st.sampled_from(PIECES)).map("".join), min_size=1, max_size=5))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_words_have_the_same_tokens_wherever_they_stand(
    tmp_path: Path, config: dict[str, Any], texts: list[str]
) -> None:
    tokenizer = load_tokenizer(vocab_folder(tmp_path, **config))
    words = Words(tokenizer)
    assert words.apart
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert words.of(texts) == expected
    assert words.of(texts * 3) == expected * 3  # so often that they are looked up
    assert words.known.keys() >= {word for text in texts for word in text.split(" ") if len(word) < 40}
    assert words.of(texts) == expected


@pytest.mark.skipif(not MINILM.is_dir(), reason=f"no pre-trained encoder in {MINILM}")
@given(texts=st.lists(st.text() | st.lists(st.sampled_from(PIECES)).map("".join), min_size=1, max_size=5))
@settings(max_examples=300)
def test_words_of_a_real_checkpoint(texts: list[str]) -> None:
    words = real_words()
    assert words.apart
    expected = [words.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert words.of(texts * 3) == expected * 3


@cache
def real_words() -> Words:
    return Words(load_tokenizer(str(MINILM)))


def test_few_words_are_remembered_and_no_long_ones(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words(tokenizer)
    monkeypatch.setattr(module, "MOST_WORDS", 3)
    for text in ("the cat", "sat on", "mat " + "a" * 1000, "a b the cat"):
        assert words.of([text] * 3) == [tokenizer.encode(text, add_special_tokens=False).ids] * 3
        assert 1 <= len(words.known) <= 6
        assert max(map(len, words.known)) < 41


@pytest.mark.parametrize("change", ["an added token with a space", "another normalizer", "another pre-tokenizer"])
def test_a_tokenizer_that_may_look_beyond_a_space_gets_whole_texts(tokenizer: Tokenizer, change: str) -> None:
    parts = json.loads(tokenizer.to_str())
    if change == "an added token with a space":
        parts["added_tokens"].append({**parts["added_tokens"][-1], "id": len(WORDS), "content": "the cat"})
    elif change == "another normalizer":
        parts["normalizer"] = {"type": "Replace", "pattern": {"String": "a t"}, "content": "at"}
    else:
        parts["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "t s"}, "behavior": "Removed", "invert": False}
    other = Tokenizer.from_str(json.dumps(parts))
    words = Words(other)
    assert not words.apart
    for text in ("the cat sat", "a the cat", "ca t"):
        assert words.of([text] * 3) == [other.encode(text, add_special_tokens=False).ids] * 3
        assert rows_of(encode(words, [(text,)], 16, joint=False)) == [[other.encode(text).ids]]


sentences = st.lists(st.sampled_from(["a", "b", "cats", "unknown"]), max_size=12).map(" ".join)


@given(pairs=st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4), max_length=st.integers(5, 16))
@settings(max_examples=60)
def test_inputs_are_cut_as_transformers_cuts_them(
    tokenizer: Tokenizer, pairs: list[tuple[str, str]], max_length: int
) -> None:
    theirs, before = reference(), tokenizer.to_str()
    joint = encode(Words(tokenizer), pairs, max_length, joint=True)
    apart = encode(Words(tokenizer), pairs, max_length, joint=False)
    assert tokenizer.to_str() == before  # as it was found

    for i, pair in enumerate(pairs):
        expected = theirs([pair], truncation=True, max_length=max_length)
        assert rows_of(joint)[i] == expected["input_ids"]
        assert joint.second_from[i] == expected["token_type_ids"][0].index(1)
        alone = [theirs(text, truncation=True, max_length=max_length)["input_ids"] for text in pair]
        assert rows_of(apart)[i] == alone

    def too_long(texts: list[Any]) -> int:
        return sum(len(ids) > max_length for ids in theirs(texts)["input_ids"])

    assert joint.truncated == too_long(pairs)
    assert apart.truncated == too_long([text for pair in pairs for text in pair])


def test_single_sentences(tokenizer: Tokenizer) -> None:
    encoded = encode(Words(tokenizer), [("the cat sat",), ("the",)], max_length=4, joint=False)
    # [CLS] the cat [SEP]; the special tokens count.
    assert rows_of(encoded) == [[[2, 5, 6, 3]], [[2, 5, 3]]]
    assert (encoded.second_from, encoded.truncated) == ([4, 3], 1)
    assert {array.dtype.name for array in encoded.inputs[0]} == {"int32"}


def test_a_pair_of_books_is_cut_in_moments(tokenizer: Tokenizer) -> None:
    book = "the cat sat on the mat " * 3000
    encoded = encode(Words(tokenizer), [(book, book)], max_length=16, joint=True)
    assert (len(encoded.inputs[0][0]), encoded.second_from, encoded.truncated) == (16, [8], 1)


@pytest.mark.parametrize(("joint", "least"), [(False, 3), (True, 5)])
def test_a_max_length_without_room_for_words_is_refused(tokenizer: Tokenizer, joint: bool, least: int) -> None:
    example = ("the cat",) * (1 + joint)
    assert len(encode(Words(tokenizer), [example], least, joint).inputs[0][0]) == least
    with pytest.raises(UserError) as caught:
        encode(Words(tokenizer), [example], least - 1, joint)
    assert str(caught.value) == f"max_length is {least - 1}, less than the {least} tokens of the shortest input"


def test_a_failed_call_leaves_the_tokenizer_as_it_was(tokenizer: Tokenizer) -> None:
    before = tokenizer.to_str()
    with pytest.raises(AttributeError):
        encode(Words(tokenizer), [("the", None)], 8, joint=True)  # type: ignore[list-item]
    assert tokenizer.to_str() == before


def test_a_worker_encodes_the_same(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr(gc, "disable", lambda: None)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    start_worker(tmp_path / "tokenizer.json")
    examples = [("the cat", "sat on the mat !"), ("a", "b")]
    here, there = encode(Words(tokenizer), examples, 8, True), encode_in_worker(examples, 8, True)
    assert rows_of(here) == rows_of(there)
    assert (here.second_from, here.truncated) == (there.second_from, there.truncated)


BROKEN = {
    "nothing": ({}, "no tokenizer.json and no vocab.txt; name a tokenizer with encoder.tokenizer"),
    "not a tokenizer": ({"tokenizer.json": "{}"}, "the tokenizer cannot be read"),
    "not JSON": ({"tokenizer.json": "{"}, "the tokenizer cannot be read"),
    "no [SEP]": ({"vocab.txt": "[CLS]\nthe\n"}, "the tokenizer cannot be read"),
    "config not JSON": ({"vocab.txt": "[SEP]\n", "tokenizer_config.json": "{"}, "cannot be read as JSON"),
    "config no object": ({"vocab.txt": "[SEP]\n", "tokenizer_config.json": "[]"}, "holds no JSON object"),
    "nested too deeply": ({"vocab.txt": "[SEP]\n", "tokenizer_config.json": "[" * 100_000}, "cannot be read as JSON"),
    "not UTF-8": ({"vocab.txt": "[SEP]\n", "tokenizer_config.json": "\udcff"}, "cannot be read as JSON"),
}


@pytest.mark.parametrize(("files", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_tokenizer_is_a_users_error(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path)) and reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("processor", ["none", "roberta"])
def test_other_models_tokenizers_are_refused(tmp_path: Path, tokenizer: Tokenizer, processor: str) -> None:
    fields = json.loads(tokenizer.to_str())
    roberta = {"type": "RobertaProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    fields["post_processor"] = {"none": None, "roberta": roberta | {"trim_offsets": True, "add_prefix_space": False}}[
        processor
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="is it a BERT tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("source", ["nobody/has-this-model", "no/such/folder/here", "~/no such folder"])
def test_a_checkpoint_that_is_nowhere(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        checkpoint_folder(source)
    assert str(caught.value).startswith(f"{source}: no such folder here, and the hub did not give it (")
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bert").mkdir()
    assert checkpoint_folder("~/bert") == tmp_path / "bert"
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_json(tmp_path / "bert" / "config.json")


@pytest.mark.parametrize(("has", "asked"), [("model.safetensors", 1), ("pytorch_model.bin", 2)])
def test_the_hub_is_asked_for_one_kind_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: str, asked: int
) -> None:
    calls: list[list[str] | str] = []

    def snapshot_download(source: str, allow_patterns: list[str] | str) -> str:
        calls.append(allow_patterns)
        if any(fnmatch(has, pattern) for pattern in np.atleast_1d(allow_patterns)):
            (tmp_path / has).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint_folder.cache_clear()
    assert checkpoint_folder("somebody/bert") == tmp_path
    assert (tmp_path / has).exists()
    assert len(calls) == asked
