"""A model comes back from its folder bit for bit, and a task never touches another's head.

python -m pytest tests/model/test_multitask.py
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mtl_dist.config import UserError
from mtl_dist.data.packed import pack
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.files import faults
from mtl_dist.model.encoder import Encoder, Shape
from mtl_dist.model.multitask import MODEL_FILES, MultiTaskModel, load_model, save_model
from mtl_dist.model.weights import EncoderConfig, build_encoder
from mtl_dist.tasks import TaskConfig

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat"]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CLASSES, BINARY, SCORE = {"kind": "classification", "num_classes": 5}, {"kind": "binary"}, {"kind": "regression"}


def task(label: dict[str, Any], head: dict[str, Any], **fields: Any) -> TaskConfig:
    texts = ["text"] if head["kind"] in ("linear", "mlp") else ["one", "other"]
    columns = {"sentences": texts, "label": "label"}
    return TaskConfig.model_validate({"train": "x.tsv", "columns": columns, "label": label, "head": head, **fields})


TASKS = {  # every head, label and pooling, and losses with one output and with many
    "linear": task(CLASSES, {"kind": "linear"}, pooling="cls"),
    "mlp": task(BINARY, {"kind": "mlp", "hidden": [7]}, pooling="pooler", loss={"kind": "cross_entropy"}),
    "cross-encoder": task(SCORE, {"kind": "cross_encoder", "hidden": [7]}, loss={"kind": "bins"}),
    "concat": task(BINARY, {"kind": "concat", "hidden": [7]}, pooling="max"),
    "sbert": task(SCORE, {"kind": "sbert"}),
    "cosine": task(BINARY, {"kind": "cosine"}, loss={"kind": "mse"}),
    "shared": task(SCORE, {"kind": "projected_cosine", "widths": [4, 16], "activation": "gelu"}),
    "sides": task(
        SCORE, {"kind": "projected_cosine", "widths": [16], "shared": False}, loss={"kind": "cosine_embedding"}
    ),
}
OUTPUTS = dict.fromkeys(TASKS, 1) | {"linear": 5, "mlp": 2, "cross-encoder": 25}
PAIRS = pack([np.array([2, 5, 6, 3]), np.array([2, 5, 6, 7, 8, 9, 3]), np.array([2, 9, 3]), np.array([2, 6, 7, 3])])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return load_tokenizer(str(folder))


def new_model(tokenizer: Tokenizer, tasks: Mapping[str, TaskConfig] = TASKS, seed: int = 0) -> MultiTaskModel:
    torch.manual_seed(seed)
    encoder = EncoderConfig.model_validate({"shape": SHAPE, "tokenizer": "the test's", "dropout": 0.2})
    model = MultiTaskModel(build_encoder(encoder, tokenizer), tasks)
    for parameter in model.parameters():  # away from zero biases, so that none can hide
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def outputs(model: MultiTaskModel) -> dict[str, Tensor]:
    model.eval()
    return {name: model(name, PAIRS) for name in model.heads}


def test_each_task_has_its_outputs_in_fp32(tokenizer: Tokenizer) -> None:
    model = new_model(tokenizer).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        raw = {name: model(name, PAIRS) for name in TASKS}
    inputs = {name: 4 if config.head.joint or config.head.sentences == 1 else 2 for name, config in TASKS.items()}
    assert {name: tuple(each.shape) for name, each in raw.items()} == {
        name: (inputs[name], OUTPUTS[name]) for name in TASKS
    }
    assert {each.dtype for each in raw.values()} == {torch.float32}


@pytest.mark.parametrize(("name", "label"), [("cosine", 1.0), ("shared", 5.0)])
def test_twice_the_same_sentence_has_the_largest_label(tokenizer: Tokenizer, name: str, label: float) -> None:
    same = pack([np.array([2, 5, 6, 3])] * 2)
    assert new_model(tokenizer).eval()(name, same).item() == pytest.approx(label)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_leaves_other_heads_without_gradient(tokenizer: Tokenizer, name: str) -> None:
    model = new_model(tokenizer)
    model(name, PAIRS).square().sum().backward()
    moved = {parameter for parameter, tensor in model.named_parameters() if tensor.grad is not None}
    own = {f"heads.{name}.{parameter}" for parameter, _ in model.heads[name].named_parameters()}
    encoder = {f"encoder.{parameter}" for parameter, _ in model.encoder.named_parameters()}
    pooler = {"encoder.pooler.weight", "encoder.pooler.bias"}
    assert moved == own | (encoder if name == "mlp" else encoder - pooler)


def test_other_tasks_cost_a_task_nothing(tokenizer: Tokenizer) -> None:
    def seconds(tasks: int) -> float:
        model = new_model(tokenizer, {f"t{k}": TASKS["linear"] for k in range(tasks)})
        taken = []
        for _ in range(7):
            start = time.process_time()
            reached = list(model.reached_by("t1"))
            taken.append(time.process_time() - start)
        assert {name.split(".")[1] for name, _ in reached if name.startswith("heads.")} == {"t1"}
        return min(taken)

    assert seconds(400) < 3 * seconds(4)  # about 1; where all heads were walked through, 30


def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = new_model(tokenizer)
    save_model(model, tokenizer, tmp_path / "run" / "best", {"step": 3, "overall_a": 0.5})
    loaded, words = load_model(tmp_path / "run" / "best", TASKS)
    assert words.to_str() == tokenizer.to_str()
    assert loaded.encoder.shape == model.encoder.shape  # the dropout that was trained with included
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    assert all(map(torch.equal, outputs(loaded).values(), outputs(model).values()))
    assert json.loads((tmp_path / "run" / "best" / "scores.json").read_text()) == {"step": 3, "overall_a": 0.5}


def test_a_model_whose_heads_have_no_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tasks = {"cosine": TASKS["cosine"]}
    model = new_model(tokenizer, tasks)
    save_model(model, tokenizer, tmp_path / "best", {})
    assert torch.equal(outputs(load_model(tmp_path / "best", tasks)[0])["cosine"], outputs(model)["cosine"])


def test_a_later_save_replaces_the_earlier_one_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "best"
    save_model(new_model(tokenizer), tokenizer, folder, {"step": 1})
    (folder / "encoder" / "of the first.txt").touch()
    # What a killed process may have left.
    for left in ("best.tmp", "best.old"):
        (tmp_path / left / "encoder").mkdir(parents=True)
        (tmp_path / left / "rubbish").touch()

    second = new_model(tokenizer, seed=1)
    save_model(second, tokenizer, folder, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert {path.name for path in folder.iterdir()} == {"encoder", "heads.safetensors", "scores.json", "sha256sums"}
    assert not (folder / "encoder" / "of the first.txt").exists()
    assert json.loads((folder / "scores.json").read_text()) == {"step": 2}
    assert all(map(torch.equal, outputs(load_model(folder, TASKS)[0]).values(), outputs(second).values()))


def test_a_save_that_fails_leaves_the_earlier_one(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = new_model(tokenizer)
    save_model(first, tokenizer, tmp_path / "best", {"step": 1})
    with pytest.raises(TypeError):
        save_model(new_model(tokenizer, seed=1), tokenizer, tmp_path / "best", {"step": object()})
    assert all(map(torch.equal, outputs(load_model(tmp_path / "best", TASKS)[0]).values(), outputs(first).values()))


OTHERS = {
    "another task": ("more", TASKS | {"more": TASKS["sbert"]}),
    "two tasks less": ("linear, mlp", {name: TASKS[name] for name in TASKS if name not in ("mlp", "linear")}),
    "another head": ("concat", TASKS | {"concat": TASKS["sbert"]}),
    "fewer classes": ("linear", TASKS | {"linear": task(CLASSES | {"num_classes": 3}, {"kind": "linear"})}),
}


@pytest.mark.parametrize(("misfits", "tasks"), OTHERS.values(), ids=OTHERS)
def test_other_tasks_than_the_saved_ones_are_a_users_error(
    tmp_path: Path, tokenizer: Tokenizer, misfits: str, tasks: dict[str, TaskConfig]
) -> None:
    save_model(new_model(tokenizer), tokenizer, tmp_path / "best", {})
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "best", tasks)
    assert str(caught.value) == (
        f"{tmp_path}/best/heads.safetensors: the heads of {misfits} are not those of the config; "
        "give the tasks it was trained with"
    )


LOST = {
    "heads.safetensors": "{}: no saved model here",
    "encoder/config.json": "{}/encoder/config.json: cannot be read as JSON",
    "encoder/model.safetensors": "{}/encoder: no model.safetensors and no pytorch_model.bin",
    "encoder/tokenizer.json": "{}/encoder: no tokenizer.json and no vocab.txt",
}


@pytest.mark.parametrize("lost", LOST)
def test_a_file_lost_is_a_users_error(tmp_path: Path, tokenizer: Tokenizer, lost: str) -> None:
    save_model(new_model(tokenizer), tokenizer, tmp_path / "best", {})
    (tmp_path / "best" / lost).unlink()
    assert faults(tmp_path / "best", MODEL_FILES) == [f"{lost} is missing"]
    with pytest.raises(UserError):
        load_model(tmp_path / "best", TASKS)
    (tmp_path / "best" / "sha256sums").unlink()
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "best", TASKS)
    assert str(caught.value).startswith(LOST[lost].format(tmp_path / "best"))


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_flipped_bit_is_noticed(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    folder = tmp_path / "best"
    save_model(new_model(tokenizer), tokenizer, folder, {})
    assert faults(folder, MODEL_FILES) == []
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_model(folder, TASKS)
    assert str(caught.value) == (
        f"{folder}/{name} is damaged: its SHA-256 is another; if you changed it yourself, remove {folder}/sha256sums"
    )


def test_half_a_file_is_a_users_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(new_model(tokenizer), tokenizer, tmp_path / "best", {})
    path = tmp_path / "best" / "heads.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "best" / "sha256sums").unlink()
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "best", TASKS)
    assert str(caught.value).startswith(f"{path}: cannot be read: ") and "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = new_model(tokenizer)
    model.encoder.embeddings.word.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"encoder\.embeddings\.word\.weight is infinite or NaN"):
        save_model(model, tokenizer, tmp_path / "best", {})
    assert not list(tmp_path.iterdir())


def test_joint_inputs_need_two_segments() -> None:
    one_segment = Encoder(Shape(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, type_vocab_size=1), 99)
    with pytest.raises(UserError, match="a cross_encoder needs an encoder with two segments"):
        MultiTaskModel(one_segment, {"pair": task({"kind": "binary"}, {"kind": "cross_encoder"})})
