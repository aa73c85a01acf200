"""Finds a checkpoint's folder and its fast tokenizer, and turns sentences into token numbers.

Imports no torch, so that the processes that tokenise a large file start quickly.
"""

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from mtl_dist.config import UserError

MOST_WORDS = 200_000  # that a process remembers, in about 50 MB
LONGEST_WORD = 40  # in letters; longer ones do not come again
CHECKPOINT_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json", "vocab.txt"]


@cache
def checkpoint_folder(source: str) -> Path:
    """The folder of a checkpoint; fetched from the hub, or found in its cache, when `source` is no folder here."""
    # os.path: a home of an unknown user is left as it is, and a name that no file can have is no folder.
    folder = Path(os.path.expanduser(source))  # noqa: PTH111
    if os.path.isdir(folder):  # noqa: PTH112
        return folder
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=CHECKPOINT_FILES))
        if not any(folder.glob("*.safetensors")):  # an old checkpoint; most have both, and one is enough to fetch
            folder = Path(snapshot_download(source, allow_patterns="pytorch_model.bin"))
        return folder
    except Exception as error:  # wrong names, no connection, no permission: each has its own class
        raise UserError(
            f"{source}: no such folder here, and the hub did not give it ({type(error).__name__}); "
            "check the name, the connection and HF_HUB_OFFLINE"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object")
    return value


def load_tokenizer(source: str) -> Tokenizer:
    """The fast tokenizer of a checkpoint, from its tokenizer.json or, failing that, its vocab.txt."""
    folder = checkpoint_folder(source)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.txt").is_file():
            path = folder / "tokenizer_config.json"
            config = read_json(path) if path.is_file() else {}
            tokenizer = BertWordPieceTokenizer(
                str(folder / "vocab.txt"),
                lowercase=config.get("do_lower_case", True),
                strip_accents=config.get("strip_accents"),
                handle_chinese_chars=config.get("tokenize_chinese_chars", True),
            )._tokenizer
        else:
            raise UserError(f"{folder}: no tokenizer.json and no vocab.txt; name a tokenizer with encoder.tokenizer")
        tokenizer.encode("\U0010fffd")  # fails where the vocabulary has no [UNK]
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise UserError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if [tokenizer.num_special_tokens_to_add(is_pair) for is_pair in (False, True)] != [2, 3]:
        raise UserError(f"{folder}: the tokenizer does not write [CLS] a [SEP] b [SEP]; is it a BERT tokenizer?")
    # Some files ask for padding to a fixed length, or for a truncation of their own.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class Words:
    """The token numbers of texts, put together from those of their words.

    BERT's tokenizers part a text at its spaces, and what comes of a word does not depend on others. Most words come
    again, and to look one up takes a tenth of the time.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.cls, self.sep = tokenizer.encode("").ids
        parts = json.loads(tokenizer.to_str())
        kinds = [(parts[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
        added = [token["content"] for token in parts["added_tokens"]]
        # Others may look beyond a space; then a text is one word.
        self.apart = kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not any(" " in a for a in added)
        self.known: dict[str, list[int]] = {}

    def of(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without [CLS] and [SEP]."""
        words = [text.split(" ") if self.apart else [text] for text in texts]
        if len(self.known) > MOST_WORDS:
            self.known.clear()
        new = list(set(chain.from_iterable(words)).difference(self.known))
        if 2 * len(new) > sum(map(len, words)):  # few come again, and each by itself takes longer than in its text
            return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        encodings = self.tokenizer.encode_batch(new, add_special_tokens=False)
        self.known.update((word, encoding.ids) for word, encoding in zip(new, encodings, strict=True))
        tokens = [list(chain.from_iterable(map(self.known.__getitem__, each))) for each in words]
        for word in new:
            if len(word) > LONGEST_WORD:
                del self.known[word]
        return tokens


@dataclass(frozen=True)
class Encoded:
    """The token numbers of some examples."""

    # The encoder's inputs, one, or for a pair two: the tokens of all examples, and where each one's begin and end.
    inputs: list[tuple[NDArray[np.int32], NDArray[np.int32]]]
    second_from: list[int]  # where the second sentence of a joint input starts; its length where there is none
    truncated: int  # how many inputs were longer than allowed


def encode(words: Words, examples: Sequence[tuple[str, ...]], max_length: int, joint: bool) -> Encoded:
    """Tokenises each sentence for itself, or each pair as one joint input, cutting off what is too long."""
    shortest = 5 if joint else 3  # a word of each sentence, [CLS] and [SEP]
    if max_length < shortest:
        raise UserError(f"max_length is {max_length}, less than the {shortest} tokens of the shortest input")
    sides = [words.of(texts) for texts in zip(*examples, strict=True)]
    cls, sep = words.cls, words.sep
    if joint:
        room = max_length - 3
        kept = [_cut(one, other, room) for one, other in zip(*sides, strict=True)]
        return Encoded(
            inputs=[_flat([[cls, *one, sep, *other, sep] for one, other in kept])],
            second_from=[len(one) + 2 for one, _ in kept],
            truncated=sum(len(one) + len(other) > room for one, other in zip(*sides, strict=True)),
        )
    room = max_length - 2
    return Encoded(
        inputs=[_flat([[cls, *tokens[:room], sep] for tokens in side]) for side in sides],
        second_from=[min(len(tokens), room) + 2 for tokens in sides[0]],
        truncated=sum(len(tokens) > room for side in sides for tokens in side),
    )


def _cut(one: list[int], other: list[int], room: int) -> tuple[list[int], list[int]]:
    """As much of a pair as there is room for; the longer sentence is cut first, as in transformers."""
    if len(one) + len(other) <= room:
        return one, other
    shorter = min(len(one), len(other), room // 2)
    if len(one) > len(other):
        return one[: room - shorter], other[:shorter]
    return one[:shorter], other[: room - shorter]


def _flat(rows: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.fromiter(chain.from_iterable(rows), np.int32, count=int(offsets[-1])), offsets


_worker_words: Words


def start_worker(path: Path) -> None:
    """Sets up a process that will call `encode_in_worker` with the tokenizer in a file."""
    global _worker_words
    gc.disable()  # words and rows make no cycles
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_words = Words(Tokenizer.from_file(str(path)))


def encode_in_worker(examples: Sequence[tuple[str, ...]], max_length: int, joint: bool) -> Encoded:
    """`encode` with the process's own tokenizer."""
    return encode(_worker_words, examples, max_length, joint)
