"""Finds a checkpoint's folder and its fast tokenizer, and turns sentences into token numbers.

Imports no torch, so that the processes that tokenise a large file start quickly.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from mtl_dist.config import UserError

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


@dataclass(frozen=True)
class Encoded:
    """The token numbers of some examples, one entry per example in each list."""

    inputs: list[list[NDArray[np.int32]]]  # the encoder's inputs: one, or for a pair two
    second_from: list[int]  # where the second sentence of a joint input starts; its length where there is none
    truncated: int  # how many inputs were longer than allowed


def encode(tokenizer: Tokenizer, examples: Sequence[tuple[str, ...]], max_length: int, joint: bool) -> Encoded:
    """Tokenises each sentence for itself, or each pair as one joint input, cutting off what is too long."""
    shortest = 5 if joint else 3  # a word of each sentence, [CLS] and [SEP]
    if max_length < shortest:
        raise UserError(f"max_length is {max_length}, less than the {shortest} tokens of the shortest input")
    # Whole: what the tokenizers library truncates it also keeps, for a pair in every combination of its pieces.
    if joint:
        rows = [[encoding] for encoding in tokenizer.encode_batch(list(examples))]
    else:
        encodings = tokenizer.encode_batch([text for texts in examples for text in texts])
        sentences = len(examples[0])
        rows = [encodings[i : i + sentences] for i in range(0, len(encodings), sentences)]
    cut = [[_cut(encoding, max_length) for encoding in row] for row in rows]
    return Encoded(
        inputs=[[ids for ids, _ in row] for row in cut],
        second_from=[row[0][1] for row in cut],
        truncated=sum(len(encoding) > max_length for row in rows for encoding in row),
    )


def _cut(encoding: Encoding, max_length: int) -> tuple[NDArray[np.int32], int]:
    """An input's tokens and where its second sentence starts; the longer sentence is cut first, as in transformers."""
    ids = np.array(encoding.ids, dtype=np.int32)
    second_from = encoding.type_ids.index(1) if 1 in encoding.type_ids else len(ids)
    if len(ids) <= max_length:
        return ids, second_from
    first, second = ids[:second_from], ids[second_from:]
    words = len(first) - 2, max(len(second) - 1, 0)
    room = max_length - (len(ids) - sum(words))
    shorter = min(*words, room // 2)
    kept = (room - shorter, shorter) if words[0] > words[1] else (shorter, room - shorter)
    return np.concatenate([first[: 1 + kept[0]], first[-1:], second[: kept[1]], second[-1:]]), kept[0] + 2


_worker_tokenizer: Tokenizer


def start_worker(path: Path) -> None:
    """Sets up a process that will call `encode_in_worker` with the tokenizer in a file."""
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = Tokenizer.from_file(str(path))


def encode_in_worker(examples: Sequence[tuple[str, ...]], max_length: int, joint: bool) -> Encoded:
    """`encode` with the process's own tokenizer."""
    return encode(_worker_tokenizer, examples, max_length, joint)
