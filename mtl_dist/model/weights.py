"""Encoders from and to Hugging Face's BERT checkpoints: a folder or hub id in, a folder that transformers opens out."""

import json
import logging
import pickle
import re
from pathlib import Path

import torch
from pydantic import Field, PositiveInt, ValidationError, model_validator
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from mtl_dist.config import Config, UserError
from mtl_dist.data.tokenizer import checkpoint_folder, read_json
from mtl_dist.model.encoder import Encoder, Shape
from mtl_dist.model.heads import HiddenWords

log = logging.getLogger(__name__)

# Ours -> theirs, each with .weight (and .bias); several of theirs are stacked. {i} is the layer.
NAMES: dict[str, tuple[str, ...]] = {
    "embeddings.word": ("embeddings.word_embeddings",),
    "embeddings.position": ("embeddings.position_embeddings",),
    "embeddings.segment": ("embeddings.token_type_embeddings",),
    "embeddings.norm": ("embeddings.LayerNorm",),
    "layers.{i}.attention.qkv": (
        "encoder.layer.{i}.attention.self.query",
        "encoder.layer.{i}.attention.self.key",
        "encoder.layer.{i}.attention.self.value",
    ),
    "layers.{i}.attention.out": ("encoder.layer.{i}.attention.output.dense",),
    "layers.{i}.attention_norm": ("encoder.layer.{i}.attention.output.LayerNorm",),
    "layers.{i}.feed_forward.up": ("encoder.layer.{i}.intermediate.dense",),
    "layers.{i}.feed_forward.down": ("encoder.layer.{i}.output.dense",),
    "layers.{i}.output_norm": ("encoder.layer.{i}.output.LayerNorm",),
    "pooler": ("pooler.dense",),
}


class EncoderConfig(Config):
    """Which encoder: a pre-trained checkpoint (`from`), or a new one of some `shape` with the words of `tokenizer`."""

    from_: str | None = Field(None, alias="from")  # a folder or a hub id with a BERT in Hugging Face's format
    shape: Shape | None = None  # of a new encoder, instead of `from`
    tokenizer: str | None = None  # a folder or hub id; by default the one of `from`
    dropout: float | None = Field(None, ge=0, lt=1)  # by default the checkpoint's, usually 0.1
    attention_dropout: float | None = Field(None, ge=0, lt=1)  # likewise; 0 lets a GPU use its fastest attention
    activation_checkpointing: bool = False  # computes each layer twice to keep less in memory

    @model_validator(mode="after")
    def _one_origin(self) -> "EncoderConfig":
        if (self.from_ is None) == (self.shape is None):
            raise ValueError("needs either `from` (a pre-trained checkpoint) or `shape` (a new encoder)")
        if self.from_ is None and self.tokenizer is None:
            raise ValueError("needs `tokenizer`, because a new encoder has no vocabulary of its own")
        return self

    @property
    def tokenizer_source(self) -> str:
        return self.tokenizer or self.from_ or ""


def build_encoder(config: EncoderConfig, tokenizer: Tokenizer) -> Encoder:
    """The encoder that the config names, with pre-trained weights where it names some."""
    # Not its vocabulary's size: a vocab.txt that repeats a word has more numbers than words.
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if config.from_ is None:
        folder, shape, vocab_size = None, config.shape or Shape(), num_tokens
    else:
        folder = checkpoint_folder(config.from_)
        shape, vocab_size = read_shape(folder)
    rates = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.attention_dropout}
    shape = shape.model_copy(update={name: rate for name, rate in rates.items() if rate is not None})
    if num_tokens > vocab_size:
        raise UserError(
            f"encoder: the tokenizer of {config.tokenizer_source} has {num_tokens} tokens, "
            f"the encoder of {config.from_} only {vocab_size}"
        )
    encoder = Encoder(shape, vocab_size, config.activation_checkpointing)
    if folder is not None:
        load_weights(encoder, folder)
    return encoder


def max_positions(config: EncoderConfig) -> int:
    """How many tokens the encoder can read at once."""
    shape = config.shape or read_shape(checkpoint_folder(config.from_ or ""))[0]
    return shape.max_position_embeddings


class _BertConfig(Shape):
    """What matters to us in a config.json."""

    vocab_size: PositiveInt = 30522


def read_shape(folder: Path) -> tuple[Shape, int]:
    """The shape and the vocabulary size that a checkpoint's config.json tells."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type", "bert") != "bert" or config.get("position_embedding_type", "absolute") != "absolute":
        kind = f"{config.get('model_type', 'bert')} with {config.get('position_embedding_type', 'absolute')} positions"
        raise UserError(f"{path}: is a {kind}; only BERT with absolute positions is supported")
    try:
        known = _BertConfig.model_validate({name: config[name] for name in _BertConfig.model_fields if name in config})
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part} is {first['input']!r}: " for part in first["loc"])
        raise UserError(f"{path}: {field}{first['msg'].removeprefix('Value error, ')}") from error
    return Shape(**known.model_dump(exclude={"vocab_size"})), known.vocab_size


def _foreign_names(ours: str) -> tuple[str, ...]:
    """The names that make up our parameter in a Hugging Face checkpoint."""
    layer = "".join(re.findall(r"layers\.(\d+)\.", ours))
    module, leaf = re.sub(r"layers\.\d+\.", "layers.{i}.", ours).rsplit(".", 1)
    return tuple(f"{name.format(i=layer)}.{leaf}" for name in NAMES[module])


def load_weights(encoder: Encoder, folder: Path) -> None:
    """Fills the encoder from a checkpoint; every weight must be there in the right shape, but for the pooler's."""
    theirs = _read_tensors(folder)
    no_pooler = not any(name.startswith("pooler.") for name in theirs)
    if no_pooler:
        log.warning("%s has no pooler: it starts from random weights", folder)
    for name, parameter in encoder.named_parameters():
        if no_pooler and name.startswith("pooler."):
            continue
        wanted = _foreign_names(name)
        shape = [len(parameter) // len(wanted), *parameter.shape[1:]]
        for foreign in wanted:
            if foreign not in theirs:
                raise UserError(f"{folder}: the weight {foreign} is missing; is this a BERT checkpoint?")
            if list(theirs[foreign].shape) != shape:
                found = list(theirs[foreign].shape)
                raise UserError(f"{folder}: {foreign} has shape {found}, config.json asks for {shape}")
        with torch.no_grad():
            parameter.copy_(torch.cat([theirs.pop(foreign) for foreign in wanted]))
    # What remains belongs to pre-training heads and the like; an unknown part of the encoder itself would be a loss.
    unknown = sorted(
        name for name in theirs if name.startswith("encoder.layer.") and name.endswith((".weight", ".bias"))
    )
    if unknown:
        raise UserError(f"{folder}: the weight {unknown[0]} has no place in the encoder that config.json describes")


WORDS = {  # ours -> theirs, of the head that BERT was pre-trained with
    "dense.weight": "cls.predictions.transform.dense.weight",
    "dense.bias": "cls.predictions.transform.dense.bias",
    "norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "bias": "cls.predictions.bias",
}


def load_words(words: HiddenWords, folder: Path) -> None:
    """Fills the head that finds hidden words from a checkpoint that has one."""
    theirs = _read_tensors(folder)
    ours = words.state_dict()
    if all(foreign in theirs and theirs[foreign].shape == ours[name].shape for name, foreign in WORDS.items()):
        words.load_state_dict({name: theirs[foreign] for name, foreign in WORDS.items()})
    else:
        log.warning("%s has no head that finds hidden words: it starts from random weights", folder)


def _clean(name: str) -> str:
    """The name as BertModel has it: no prefix, and no TensorFlow-time words for a norm's weight and bias."""
    return re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name.removeprefix("bert.")))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files and not (folder / "pytorch_model.bin").is_file():
        raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin")
    try:
        if files:
            parts = [load_file(file) for file in files]
        else:
            # Weights only: a checkpoint from a stranger must not run code.
            parts = [torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)]
        return {_clean(name): tensor for part in parts for name, tensor in part.items()}
    except pickle.UnpicklingError as error:  # its text advises to load the file in spite of that
        raise UserError(
            f"{folder}: pytorch_model.bin holds more than weights, or is damaged; it is not loaded, because it could "
            "run code of its own"
        ) from error
    except Exception as error:  # a damaged file can make PyTorch raise anything
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the weights cannot be read: {first_line}") from error


ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")  # that are saved


def save_checkpoint(encoder: Encoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes encoder and tokenizer so that `AutoModel.from_pretrained(folder)` opens them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, parameter in encoder.named_parameters():
        foreign = _foreign_names(name)
        parts = parameter.detach().float().cpu().chunk(len(foreign))
        tensors |= {key: part.contiguous() for key, part in zip(foreign, parts, strict=True)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": encoder.embeddings.word.num_embeddings,
        "pad_token_id": tokenizer.token_to_id("[PAD]") or 0,
        **encoder.shape.model_dump(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "SEP", "PAD", "CLS", "MASK")}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": encoder.shape.max_position_embeddings,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **{name: word for name, word in words.items() if tokenizer.token_to_id(word) is not None},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
