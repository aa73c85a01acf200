"""The encoder against Hugging Face's BertModel: outputs and every gradient, on ragged sentences.

python -m pytest tests/model/test_encoder.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from mtl_dist.data.packed import Packed, pack
from mtl_dist.model import encoder as encoder_module
from mtl_dist.model.encoder import Encoder, Shape
from mtl_dist.model.heads import pool
from mtl_dist.model.weights import _foreign_names, load_weights, read_shape
from tests.conftest import SHARED

MINILM = SHARED / "models" / "minilm-l6"

SHAPES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "wide": {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 48},
    "tanh-gelu": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 12,
        "intermediate_size": 192,
        "hidden_act": "gelu_new",
        "type_vocab_size": 3,
        "layer_norm_eps": 1e-6,
    },
}
LENGTHS = [7, 1, 512, 30, 30, 2, 19, 64]


def sentences(lengths: list[int], vocab_size: int = 99) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, vocab_size, length) for length in lengths]


def reference_pair(tmp_path: Path, **shape: object) -> tuple[BertModel, Encoder]:
    torch.manual_seed(0)
    theirs = BertModel(BertConfig(vocab_size=99, **shape)).eval()
    for parameter in theirs.parameters():  # away from zeros and ones, so that a swapped bias cannot hide
        torch.nn.init.normal_(parameter, mean=0.02, std=0.1)
    theirs.save_pretrained(tmp_path)
    return theirs, from_folder(tmp_path)


def from_folder(folder: Path) -> Encoder:
    ours = Encoder(*read_shape(folder)).eval()
    load_weights(ours, folder)
    return ours


def padded(rows: list[np.ndarray], segments: Tensor) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    types = torch.zeros_like(ids)
    for i, (row, types_of_row) in enumerate(zip(rows, segments.split([len(r) for r in rows]), strict=True)):
        ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
        types[i, : len(row)] = types_of_row
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def both_outputs(theirs: BertModel, ours: Encoder, rows: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden and pooled vectors of both, theirs without the padding."""
    packed = pack(rows, second_from=[max(1, len(row) // 2) for row in rows])
    inputs = padded(rows, packed.segments_T)
    reference = theirs(**inputs)
    hidden = ours(packed)
    real = inputs["attention_mask"].bool()
    return reference.last_hidden_state[real], reference.pooler_output, hidden, pool(hidden, packed, "pooler", ours)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_equal_hugging_faces(tmp_path: Path, shape: dict[str, object]) -> None:
    assert_equal(*reference_pair(tmp_path, **shape), sentences(LENGTHS))


@pytest.mark.skipif(not MINILM.is_dir(), reason=f"no pre-trained encoder in {MINILM}")
def test_a_real_checkpoint_equals_hugging_faces() -> None:
    theirs = BertModel.from_pretrained(MINILM, dtype=torch.float32).eval()
    assert_equal(theirs, from_folder(MINILM), sentences([9, 1, 120, 33, 512], vocab_size=30522))


def assert_equal(theirs: BertModel, ours: Encoder, rows: list[np.ndarray]) -> None:
    hidden_reference, pooled_reference, hidden, pooled = both_outputs(theirs, ours, rows)
    assert relative(hidden, hidden_reference) < 1e-5
    assert relative(pooled, pooled_reference) < 1e-5

    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    ((hidden * direction).sum() + pooled.sum()).backward()
    ((hidden_reference * direction).sum() + pooled_reference.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = torch.cat([gradients.pop(foreign) for foreign in _foreign_names(name)])
        assert relative(parameter.grad, expected) < 1e-5, name
    assert not gradients  # each of their parameters has its place in ours


def test_bf16_is_within_its_own_rounding(tmp_path: Path) -> None:
    theirs, ours = reference_pair(tmp_path, **SHAPES["tiny"])
    with torch.no_grad():
        exact, *_ = both_outputs(theirs, ours, sentences(LENGTHS))
        with torch.autocast("cpu", torch.bfloat16):
            theirs_bf16, _, ours_bf16, _ = both_outputs(theirs, ours, sentences(LENGTHS))
    assert relative(ours_bf16.float(), exact) < 1.5 * relative(theirs_bf16.float(), exact)


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], LENGTHS, [1, 1, 1], [40, 39, 38, 2], list(range(1, 60))])
def test_dense_kernels_agree_whatever_the_lengths(lengths: list[int]) -> None:
    torch.manual_seed(0)
    packed = pack(sentences(lengths))
    results = []
    for kernel in (encoder_module._plain_attention, encoder_module._sdpa):
        qkv = torch.randn(packed.num_tokens, 3, 2, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoder_module, "_plain_attention", kernel)
            out = encoder_module._grouped_attention(qkv, packed, dropout=0.0)
        out.square().sum().backward()
        results.append((out, qkv.grad))
    torch.testing.assert_close(results[0], results[1])
    # And both equal attention computed sentence by sentence.
    for start, stop in zip(packed.offsets[:-1].tolist(), packed.offsets[1:].tolist(), strict=True):
        q, k, v = qkv[start:stop].permute(1, 2, 0, 3)
        expected = ((q @ k.transpose(1, 2)) / 8**0.5).softmax(-1) @ v
        torch.testing.assert_close(out[start:stop], expected.transpose(0, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the varlen kernel runs on CUDA only")
@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], LENGTHS, [1, 1, 1], list(range(1, 60))])
def test_varlen_kernel_agrees_with_the_dense_one(lengths: list[int]) -> None:
    packed = pack(sentences(lengths)).to(torch.device("cuda"))
    exact = torch.randn(packed.num_tokens, 3, 4, 32, generator=torch.Generator().manual_seed(1)).cuda()
    results = {}
    for name, dtype in (("_varlen_attention", torch.bfloat16), ("_dense", torch.bfloat16), ("exact", torch.float32)):
        qkv = exact.to(torch.bfloat16).to(dtype).requires_grad_()
        if name == "_varlen_attention":
            assert encoder_module.attention(qkv, packed, 0.0).equal(encoder_module._varlen_attention(qkv, packed))
            out = encoder_module._varlen_attention(qkv, packed)
        else:
            out = encoder_module._grouped_attention(qkv, packed, 0.0)
        out.float().square().sum().backward()
        results[name] = torch.cat([out.detach().float().flatten(), qkv.grad.float().flatten()])
    rounding = relative(results["_dense"], results["exact"])
    assert relative(results["_varlen_attention"], results["exact"]) < max(1.5 * rounding, 1e-2)


def test_groups_waste_little() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3, 0.5, 256).astype(int), 1, 512).tolist()
    packed = pack(sentences(lengths))
    slots = sum(group.sentences * group.longest for group in packed.groups)
    assert slots < 1.3 * sum(lengths)
    assert len(packed.groups) <= 8


def test_activation_checkpointing_changes_no_gradient() -> None:
    packed = pack(sentences(LENGTHS))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Encoder(Shape(**SHAPES["tiny"]), 99, activation_checkpointing=checkpointing).train()
        torch.manual_seed(1)  # the same dropout
        model(packed).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_sentences_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = Encoder(Shape(**SHAPES["tiny"]), 99).eval()
    rows = sentences(LENGTHS)
    together = model(pack(rows))
    alone = torch.cat([model(pack([row])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_pooling_is_per_sentence(pooling: str) -> None:
    packed = pack(sentences([3, 1, 2]))
    x = torch.tensor([[1.0], [2.0], [6.0], [5.0], [-1.0], [-3.0]])
    expected = {"cls": [1.0, 5.0, -1.0], "mean": [3.0, 5.0, -2.0], "max": [6.0, 5.0, -1.0]}[pooling]
    assert pool(x, packed, pooling, None).squeeze(1).tolist() == expected


def test_packed_moves_as_a_whole() -> None:
    packed = pack(sentences(LENGTHS)).to(torch.device("meta"))
    assert isinstance(packed, Packed)
    tensors = [value for value in vars(packed).values() if isinstance(value, Tensor)]
    tensors += [group.real_NL for group in packed.groups if group.real_NL is not None]
    assert len(tensors) >= 7
    assert all(tensor.is_meta for tensor in tensors)


def test_padding_repeats_the_last_token_of_its_sentence() -> None:
    packed = pack(sentences([9, 12, 3]))
    (group,) = packed.groups if len(packed.groups) == 1 else packed.groups[:1]
    assert packed.to_padded_P is not None and group.real_NL is not None
    slots = packed.to_padded_P[: group.sentences * group.longest].view(group.sentences, group.longest)
    for real_L, tokens_L in zip(group.real_NL, slots, strict=True):
        last = int(real_L.sum()) - 1
        assert tokens_L[last:].unique().tolist() == [int(tokens_L[0]) + last]
