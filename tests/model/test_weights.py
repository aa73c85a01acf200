"""Every BERT checkpoint that transformers writes loads to the same outputs, and transformers opens ours.

python -m pytest tests/model/test_weights.py
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
)

from mtl_dist.config import UserError
from mtl_dist.data.packed import pack
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.model.encoder import Encoder, Shape
from mtl_dist.model.heads import pool
from mtl_dist.model.weights import EncoderConfig, build_encoder, max_positions, read_shape, save_checkpoint

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "##s", "!"]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SHAPE |= {"max_position_embeddings": 40, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
ROWS = [np.array([2, 5, 6, 7, 3, 8, 9, 3]), np.array([2, 3]), np.arange(12), np.array([2, 5, 3])]
SECOND_FROM = [5, 2, 7, 3]


def reference(kind: type[Any] = BertModel, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = kind(BertConfig(**(SHAPE | {"vocab_size": len(WORDS)} | fields))).eval()
    for parameter in model.parameters():  # away from zeros and ones, so that a swapped bias cannot hide
        torch.nn.init.normal_(parameter, mean=0.02, std=0.1)
    return model


def to_bin(model: Any, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict() if tensors is None else tensors, folder / "pytorch_model.bin")


def to_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def legacy(model: Any) -> dict[str, Tensor]:
    """Weights as the first BERTs named them."""

    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    tensors = {old(name): tensor for name, tensor in model.state_dict().items()}
    return tensors | {"bert.embeddings.position_ids": torch.arange(40)[None]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return load_tokenizer(str(folder))


def loaded(folder: Path, tokenizer: Tokenizer, **fields: Any) -> Encoder:
    """The encoder of a folder, which need not have a tokenizer of its own."""
    return build_encoder(EncoderConfig(**{"from": str(folder), "tokenizer": "the test's", **fields}), tokenizer).eval()


@torch.no_grad()
def outputs(ours: Encoder) -> tuple[Tensor, Tensor]:
    packed = pack(ROWS, SECOND_FROM)
    hidden_TD = ours(packed)
    return hidden_TD, pool(hidden_TD, packed, "pooler", ours)


@torch.no_grad()
def their_outputs(theirs: BertModel) -> tuple[Tensor, ...]:
    """The same, sentence by sentence, so that there is nothing to pad; without a pooler only the first."""
    outs = []
    for row, second_from in zip(ROWS, SECOND_FROM, strict=True):
        types = (torch.arange(len(row)) >= second_from).long()
        outs.append(theirs(input_ids=torch.from_numpy(row)[None], token_type_ids=types[None]))
    hidden_TD = torch.cat([out.last_hidden_state[0] for out in outs])
    return (hidden_TD, torch.cat([out.pooler_output for out in outs])) if theirs.pooler else (hidden_TD,)


# --------------------------------------------------------------------------------------------------------- loading

CHECKPOINTS: dict[str, tuple[type[Any], Callable[[Any, Path], object]]] = {
    "safetensors": (BertModel, lambda model, folder: model.save_pretrained(folder)),
    "sharded": (BertModel, to_shards),
    "pytorch_model.bin": (BertModel, to_bin),
    "with the heads of pre-training": (BertForPreTraining, lambda model, folder: model.save_pretrained(folder)),
    "the same as .bin": (BertForPreTraining, to_bin),
    "gamma and beta": (BertForPreTraining, lambda model, folder: to_bin(model, folder, legacy(model))),
}


@pytest.mark.parametrize(("kind", "save"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_loads_to_equal_outputs(
    tmp_path: Path, tokenizer: Tokenizer, kind: type[Any], save: Callable[[Any, Path], object]
) -> None:
    theirs = reference(kind)
    save(theirs, tmp_path)
    torch.testing.assert_close(outputs(loaded(tmp_path, tokenizer)), their_outputs(getattr(theirs, "bert", theirs)))


def test_half_precision_weights_load_as_fp32(tmp_path: Path, tokenizer: Tokenizer) -> None:
    reference().half().save_pretrained(tmp_path)
    ours = loaded(tmp_path, tokenizer)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs(ours), their_outputs(BertModel.from_pretrained(tmp_path, dtype=torch.float32)))


def test_a_missing_pooler_is_told_and_starts_anew(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = reference(BertForMaskedLM)
    theirs.save_pretrained(tmp_path)
    ours = loaded(tmp_path, tokenizer)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} has no pooler: it starts from random weights"
    ]
    torch.testing.assert_close(outputs(ours)[:1], their_outputs(theirs.bert))


def change(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def cut_off(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def in_pytorch_format(content: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin")

    return damage


QUERY = "encoder.layer.0.attention.self.query.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight is missing": (
        weights(lambda tensors: tensors.pop(QUERY)),
        f"{{}}: the weight {QUERY} is missing; is this a BERT checkpoint?",
    ),
    "half a pooler": (
        weights(lambda tensors: tensors.pop("pooler.dense.bias")),
        "{}: the weight pooler.dense.bias is missing; is this a BERT checkpoint?",
    ),
    "too few rows": (
        weights(lambda tensors: tensors.update({QUERY: torch.zeros(16, 32)})),
        f"{{}}: {QUERY} has shape [16, 32], config.json asks for [32, 32]",
    ),
    "too few columns": (
        weights(lambda tensors: tensors.update({QUERY: torch.zeros(32, 16)})),
        f"{{}}: {QUERY} has shape [32, 16], config.json asks for [32, 32]",
    ),
    "a number for a matrix": (
        weights(lambda tensors: tensors.update({QUERY: torch.tensor(1.0)})),
        f"{{}}: {QUERY} has shape [], config.json asks for [32, 32]",
    ),
    "another vocabulary": (
        change(vocab_size=99),
        "{}: embeddings.word_embeddings.weight has shape [12, 32], config.json asks for [99, 32]",
    ),
    "more layers than told": (
        change(num_hidden_layers=1),
        "{}: the weight encoder.layer.1.attention.output.LayerNorm.bias has no place in the encoder that config.json "
        "describes",
    ),
    "fewer layers than told": (change(num_hidden_layers=3), "{}: the weight encoder.layer.2.attention.self.query."),
    "another model": (
        change(model_type="distilbert"),
        "{}/config.json: is a distilbert with absolute positions; only BERT with absolute positions is supported",
    ),
    "other positions": (
        change(position_embedding_type="relative_key"),
        "{}/config.json: is a bert with relative_key positions; only BERT with absolute positions is supported",
    ),
    "another activation": (change(hidden_act="tanh"), "{}/config.json: hidden_act is 'tanh': Input should be 'gelu', "),
    "no vocabulary": (change(vocab_size=None), "{}/config.json: vocab_size is None: Input should be a valid integer"),
    "heads": (
        change(num_attention_heads=5),
        "{}/config.json: hidden_size 32 is not a multiple of num_attention_heads 5",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "{}/config.json: cannot be read as JSON"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "{}: no model.safetensors and no pytorch_model.bin",
    ),
    "half a file": (cut_off, "{}: the weights cannot be read: "),
    "a pointer of git-lfs": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "{}: the weights cannot be read: ",
    ),
    "half a .bin": (in_pytorch_format(b"PK\x03\x04" + bytes(99)), "{}: the weights cannot be read: "),
    "an empty .bin": (in_pytorch_format(b""), "{}: the weights cannot be read"),
    "a broken pickle": (in_pytorch_format(b"\x80\x02(e."), "{}: "),
    "a .bin of something else": (in_pytorch_format([1, 2]), "{}: the weights cannot be read: "),
    "a .bin without names": (in_pytorch_format({0: torch.ones(1)}), "{}: the weights cannot be read: "),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_a_users_error(
    tmp_path: Path, tokenizer: Tokenizer, damage: Callable[[Path], object], message: str
) -> None:
    reference().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, tokenizer)
    assert str(caught.value).startswith(message.format(tmp_path))
    assert "\n" not in str(caught.value)


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def test_a_strangers_file_runs_no_code(tmp_path: Path, tokenizer: Tokenizer) -> None:
    canary = tmp_path / "canary"
    model = reference()
    to_bin(model, tmp_path, model.state_dict() | {"trap": Trap(canary)})
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, tokenizer)
    assert str(caught.value) == (
        f"{tmp_path}: pytorch_model.bin holds more than weights, or is damaged; it is not loaded, because it could run "
        "code of its own"
    )
    assert not canary.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert canary.exists()  # the trap was a real one


def test_a_checkpoint_that_is_nowhere(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"^nobody/has-this: no such folder here, and the hub did not give it \(\w+\); .*$"
    ):
        build_encoder(EncoderConfig(**{"from": "nobody/has-this"}), tokenizer)


# ---------------------------------------------------------------------------------------------------------- saving


def test_transformers_opens_what_we_save(tmp_path: Path, tokenizer: Tokenizer) -> None:
    reference(layer_norm_eps=1e-6, hidden_act="gelu_new").save_pretrained(tmp_path / "theirs")
    ours = loaded(tmp_path / "theirs", tokenizer)
    save_checkpoint(ours, tokenizer, tmp_path / "ours")

    # Weights to the last bit, and so with the same code the outputs.
    theirs, again = AutoModel.from_pretrained(tmp_path / "theirs"), AutoModel.from_pretrained(tmp_path / "ours")
    assert type(again) is BertModel
    assert all(map(torch.equal, their_outputs(again.eval()), their_outputs(theirs.eval())))
    assert theirs.state_dict().keys() == again.state_dict().keys()
    back = loaded(tmp_path / "ours", tokenizer)
    assert back.shape == ours.shape
    assert all(map(torch.equal, outputs(back), outputs(ours)))
    assert all(map(torch.equal, back.state_dict().values(), ours.state_dict().values()))

    tokens = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokens.model_max_length == 40
    for pair in [("the cat sat",), ("Cats ! [MASK] dog", "on the mats")]:
        assert tokens(*pair)["input_ids"] == tokenizer.encode(*pair).ids
        assert tokens(*pair)["token_type_ids"] == tokenizer.encode(*pair).type_ids
    assert tokens(["the", "the cat"], padding=True)["input_ids"][0] == [2, 5, 3, 0]


def test_words_that_the_tokenizer_lacks_are_not_made_up(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(word for word in WORDS if word != "[MASK]") + "\n")
    tokenizer = load_tokenizer(str(tmp_path))
    save_checkpoint(new_encoder(tokenizer), tokenizer, tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").get_vocab() == tokenizer.get_vocab()


# --------------------------------------------------------------------------------------------------------- configs


def new_encoder(tokenizer: Tokenizer, **fields: Any) -> Encoder:
    return build_encoder(EncoderConfig(**{"shape": SHAPE, "tokenizer": "the test's", **fields}), tokenizer)


def test_a_new_encoder_has_the_shape_and_the_tokenizers_words(tokenizer: Tokenizer) -> None:
    encoder = new_encoder(tokenizer)
    assert encoder.embeddings.word.weight.shape == (len(WORDS), 32)
    assert encoder.shape == Shape(**SHAPE)
    assert max_positions(EncoderConfig(shape=SHAPE, tokenizer="any")) == 40


def test_a_word_listed_twice_leaves_room_for_the_last(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "the", "last"]) + "\n")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("last").ids[1] == 13
    assert new_encoder(tokenizer).embeddings.word.num_embeddings == 14


def test_a_tokenizer_with_more_words_than_the_encoder_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    reference(vocab_size=11).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, tokenizer)
    assert str(caught.value) == (
        f"encoder: the tokenizer of the test's has 12 tokens, the encoder of {tmp_path} only 11"
    )


def test_dropout_is_the_checkpoints_unless_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    reference().save_pretrained(tmp_path)

    def rates(**fields: Any) -> tuple[float, float]:
        encoder = loaded(tmp_path, tokenizer, **fields)
        layer = encoder.layers[0]
        assert layer.dropout.p == encoder.embeddings.dropout.p == encoder.shape.hidden_dropout_prob
        assert layer.attention.attention_dropout == encoder.shape.attention_probs_dropout_prob
        return layer.dropout.p, layer.attention.attention_dropout

    assert rates() == (0.3, 0.2)
    assert rates(dropout=0.0) == (0.0, 0.2)
    assert rates(dropout=0.5, attention_dropout=0.0) == (0.5, 0.0)
    assert read_shape(tmp_path)[0].hidden_dropout_prob == 0.3


ONE_ORIGIN = "needs either `from` (a pre-trained checkpoint) or `shape` (a new encoder)"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ONE_ORIGIN),
        ({"from": "x", "shape": SHAPE}, ONE_ORIGIN),
        ({"tokenizer": "x"}, ONE_ORIGIN),
        ({"shape": SHAPE}, "needs `tokenizer`, because a new encoder has no vocabulary of its own"),
        ({"from": "x", "dropout": 1}, "Input should be less than 1"),
        ({"from_": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_configs_that_cannot_be_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        EncoderConfig.model_validate(fields)
    assert reason in caught.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"from": "a"}, "a"),
        ({"from": "a", "tokenizer": "b"}, "b"),
        ({"shape": SHAPE, "tokenizer": "b"}, "b"),
    ],
)
def test_the_tokenizer_is_the_checkpoints_unless_told(fields: dict[str, Any], source: str) -> None:
    assert EncoderConfig.model_validate(fields).tokenizer_source == source
