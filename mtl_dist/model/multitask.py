"""One encoder, and for each task its pooling and head."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from mtl_dist.checkpoint import refuse_infinite
from mtl_dist.config import UserError
from mtl_dist.data.packed import Packed
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.files import SUMS, faults, replacing, write_sums
from mtl_dist.model.encoder import Encoder
from mtl_dist.model.heads import HeadConfig, HiddenWords, Pooling, pool
from mtl_dist.model.objectives import Label, LossConfig
from mtl_dist.model.weights import ENCODER_FILES, EncoderConfig, build_encoder, save_checkpoint

BEST = "best"  # where a run folder keeps its best model
HEADS, SCORES = "heads.safetensors", "scores.json"
MODEL_FILES = (*(f"encoder/{name}" for name in ENCODER_FILES), HEADS, SCORES)  # by the list of hashes beside them


class TaskModel(Protocol):
    """What the model needs to know of a task."""

    @property
    def pooling(self) -> Pooling: ...
    @property
    def head(self) -> HeadConfig: ...
    @property
    def label(self) -> Label: ...
    @property
    def loss(self) -> LossConfig: ...
    @property
    def dropout(self) -> float: ...


class MultiTaskModel(nn.Module):
    """Packed sentences of one task in, that task's raw outputs in fp32 out; or hidden words, where it learns them."""

    def __init__(self, encoder: Encoder, tasks: Mapping[str, TaskModel], finds_words: bool = False) -> None:
        super().__init__()
        for name, task in tasks.items():
            if task.head.joint and encoder.shape.type_vocab_size < 2:
                raise UserError(f"tasks.{name}: a cross_encoder needs an encoder with two segments (type_vocab_size)")
        self.encoder = encoder
        self.pooling = {name: task.pooling for name, task in tasks.items()}
        self.heads = nn.ModuleDict(
            {
                name: task.head.build(
                    width=encoder.shape.hidden_size,
                    outputs=task.loss.outputs(task.label),
                    dropout=task.dropout,
                    scale=task.label.scale,
                )
                for name, task in tasks.items()
            }
        )

        self.words = HiddenWords(encoder.shape, encoder.embeddings.word.num_embeddings) if finds_words else None

    def forward(self, task: str, packed: Packed, with_vectors: bool = False, hidden_M: Tensor | None = None) -> Any:
        """The raw outputs; if asked for, the sentences' pooled vectors as well.

        Of tokens that were hidden, in their place a score for each token of the vocabulary.
        """
        x_TD = self.encoder(packed)
        if hidden_M is not None:
            assert self.words is not None
            return self.words(x_TD.index_select(0, hidden_M), self.encoder.embeddings.word.weight).float()
        pooled_SD = pool(x_TD, packed, self.pooling[task], self.encoder)
        raw_NO: Tensor = self.heads[task](pooled_SD).float()
        return (raw_NO, pooled_SD) if with_vectors else raw_NO

    def apart(self) -> list[str]:
        """The submodules that only some tasks go through."""
        return ["encoder.pooler", *(f"heads.{task}" for task in self.heads), *([] if self.words is None else ["words"])]

    def reached_by(self, task: str, finds_words: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that a task's forward pass goes through, with their names."""
        pools = self.pooling[task] == "pooler" and not finds_words
        for name, parameter in self.encoder.named_parameters(prefix="encoder"):
            if pools or not name.startswith("encoder.pooler."):
                yield name, parameter
        own, name = (self.words, "words") if finds_words else (self.heads[task], f"heads.{task}")
        assert own is not None
        yield from own.named_parameters(prefix=name)


def save_model(model: MultiTaskModel, tokenizer: Tokenizer, folder: Path, scores: Mapping[str, Any]) -> None:
    """Puts encoder (which transformers opens), heads.safetensors and scores.json in place of what `folder` held."""
    refuse_infinite(f"cannot write {folder}", model.named_parameters())
    with replacing(folder) as unfinished:
        save_checkpoint(model.encoder, tokenizer, unfinished / "encoder")
        heads = {name: tensor.detach().cpu().contiguous() for name, tensor in model.heads.state_dict().items()}
        save_file(heads, unfinished / HEADS)
        (unfinished / SCORES).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        write_sums(unfinished, MODEL_FILES)


def saved_scores(folder: Path) -> Any:
    """The scores of the model in a folder, if there is a whole one."""
    if faults(folder, MODEL_FILES):
        return None
    try:
        return json.loads((folder / SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def load_model(folder: Path, tasks: Mapping[str, TaskModel]) -> tuple[MultiTaskModel, Tokenizer]:
    """The model and tokenizer that `save_model` wrote."""
    path = folder / HEADS
    if not path.is_file():
        raise UserError(f"{folder}: no saved model here")
    if (folder / SUMS).exists() and (wrong := faults(folder, MODEL_FILES)):
        raise UserError(f"{folder}/{wrong[0]}; if you changed it yourself, remove {folder / SUMS}")
    encoder = EncoderConfig.model_validate({"from": str(folder / "encoder")})
    tokenizer = load_tokenizer(encoder.tokenizer_source)
    model = MultiTaskModel(build_encoder(encoder, tokenizer), tasks)
    try:
        heads = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    saved, expected = (
        {(name, tensor.shape) for name, tensor in each.items()} for each in (heads, model.heads.state_dict())
    )
    if misfits := sorted({name.split(".")[0] for name, _ in saved ^ expected}):
        raise UserError(
            f"{path}: the heads of {', '.join(misfits)} are not those of the config; give the tasks it was trained with"
        )
    model.heads.load_state_dict(heads)
    return model, tokenizer
