"""A stage that hides words: which ones, what that costs, on one rank and on several, and what comes after it.

python -m pytest tests/training/test_hidden_words.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_dist.config import UserError, load
from mtl_dist.data.batches import Batch, Hiding, TrainBatches, make_batch
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment
from mtl_dist.training.setup import build_model, hiding, load_data, train_batches
from tests.distributed import on_ranks
from tests.trained import NO_DROPOUT, far_apart, run, run_parted

STAGES = "stages=[{name: words, objective: mlm, steps: 4}, {name: all, steps: 3}]"
WORDS = [*NO_DROPOUT, STAGES, "steps=null", "log.tensorboard=false"]


def batches_of(config: Path, *overrides: str, rank: int = 0, world: int = 1) -> tuple[Experiment, TrainBatches]:
    """A rank's batches of the first stage."""
    experiment = load(Experiment, config, overrides)
    tokenizer = load_tokenizer(experiment.encoder.tokenizer_source)
    splits = load_data(experiment, tokenizer, Console(quiet=True))["train"]
    stage = experiment.all_stages()[0]
    order = stage.order({name: len(split) for name, split in splits.items()}, experiment.seed)
    hidden = hiding(experiment, stage, tokenizer)
    return experiment, train_batches(experiment, stage, order, splits, rank, world, hidden)


def hidden_of(batch: Batch) -> dict[int, tuple[list[int], list[int]]]:
    """For each row, its tokens as they are shown, and those that were hidden."""
    assert batch.hidden is not None
    shown, found = batch.packed.tokens_T.tolist(), batch.hidden.tokens_M.split(batch.hidden.number_N.tolist())
    bounds, N = batch.packed.offsets.tolist(), len(batch.rows)
    return {
        int(row): (
            [token for s in range(n, len(bounds) - 1, N) for token in shown[bounds[s] : bounds[s + 1]]],
            found[n].tolist(),
        )
        for n, row in enumerate(batch.rows)
    }


def test_the_right_share_of_words_is_hidden_in_the_right_ways() -> None:
    class Rows:
        def inputs(self, row: int) -> list[list[int]]:
            return [[2, *range(10, 10 + 50), 3], [2, *range(200, 200 + 50), 3]]

        def second_from(self, row: int) -> int:
            return 0

        def labels(self, rows: Any) -> Any:
            return rows

    special = np.zeros(1000, dtype=np.bool_)
    special[:5] = True
    batch = make_batch("pairs", Rows(), np.arange(400))  # type: ignore[arg-type]
    hidden = Hiding(0.15, 4, special, "0/0").of(batch, 0)
    assert hidden.hidden is not None
    places, tokens = hidden.hidden.places_M, hidden.hidden.tokens_M
    assert set(hidden.hidden.number_N.tolist()) == {15}  # of 100 words, and no [CLS] or [SEP]
    assert (batch.packed.tokens_T[places] == tokens).all() and tokens.min() >= 10
    assert places.unique().numel() == 400 * 15
    shown = hidden.packed.tokens_T[places]
    # Of 6,000 words, give or take four standard errors; one random token in a thousand is the word itself.
    assert (shown == 4).float().mean().item() == pytest.approx(0.8, abs=0.021)
    assert (shown == tokens).float().mean().item() == pytest.approx(0.1, abs=0.016)
    untouched = torch.ones(len(batch.packed.tokens_T), dtype=torch.bool)
    untouched[places] = False
    assert (hidden.packed.tokens_T == batch.packed.tokens_T)[untouched].all()
    # Every row, every draw: other words. A sentence has 52 tokens; all first ones come before all second ones.
    within = places % 52 + 52 * (places >= 400 * 52)
    assert len({tuple(sorted(row.tolist())) for row in within.view(400, 15)}) == 400
    again = Hiding(0.15, 4, special, "0/0").of(batch, 1)
    assert again.hidden is not None and not (again.hidden.places_M == places).all()


def test_ranks_hide_the_same_words_of_a_row_as_one_process(tiny: Path) -> None:
    whole = {}
    for batch in batches_of(tiny, *WORDS)[1].of_step(2)[1]:
        whole |= {(batch.task, row): each for row, each in hidden_of(batch).items()}
    parts = {}
    for rank in range(4):
        for batch in batches_of(tiny, *WORDS, "gradients.accumulation=2", rank=rank, world=4)[1].of_step(2)[1]:
            parts |= {(batch.task, row): each for row, each in hidden_of(batch).items()}
    assert parts == whole


def first_stage_written_out(config: Path, *overrides: str) -> dict[str, Tensor]:
    """Four steps of torch's AdamW on the mean, over rows, of the mean cross-entropy of a row's hidden words."""
    experiment, batches = batches_of(config, *overrides)
    model = build_model(experiment, load_tokenizer(experiment.encoder.tokenizer_source), "cpu")
    assert model.words is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, weight_decay=0)
    for step in range(4):
        total = torch.zeros(())
        for batch in batches.of_step(step)[1]:
            assert batch.hidden is not None
            x_TD = model.encoder(batch.packed)
            rows = []
            ends = batch.hidden.number_N.cumsum(0).tolist()
            for start, end in zip([0, *ends], ends, strict=False):
                places, tokens = batch.hidden.places_M[start:end], batch.hidden.tokens_M[start:end]
                inner = model.words.norm(F.gelu(model.words.dense(x_TD[places])))
                scores = inner @ model.encoder.embeddings.word.weight.T + model.words.bias
                rows.append(-scores.log_softmax(1).gather(1, tokens[:, None]).mean())
            total = total + experiment.tasks[batch.task].weight * torch.stack(rows).mean()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


ALONE = [*NO_DROPOUT, "stages=[{objective: mlm, steps: 4}]", "steps=null", "log.tensorboard=false"]


@pytest.mark.parametrize("way", ["one process", "ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_the_stage_is_cross_entropy_of_hidden_words(tiny: Path, way: str) -> None:
    expected = first_stage_written_out(tiny, *ALONE)
    ranks = [run(tiny, *ALONE)] if way == "one process" else on_ranks(2, run_parted, way, tiny, *ALONE)
    for rank in ranks:
        assert far_apart(rank["parameters"], expected) < 1e-6


def test_the_tasks_come_after_it_on_any_number_of_ranks(tiny: Path) -> None:
    one = run(tiny, *WORDS, "gradients.combiner=pcgrad")
    for rank in on_ranks(2, run, tiny, *WORDS, "gradients.combiner=pcgrad"):
        assert far_apart(rank["parameters"], one["parameters"]) < 1e-6
    # The head of the words is not kept with the model, and the second stage leaves it alone.
    assert not any(name.startswith("words.") for name in one["kept"])
    first = run(tiny, *ALONE, "gradients.combiner=pcgrad")
    assert all((first["parameters"][n] == p).all() for n, p in one["parameters"].items() if n.startswith("words."))


def test_a_checkpoint_may_bring_the_head_of_the_words(tiny: Path) -> None:
    run(tiny, *NO_DROPOUT)
    folder = tiny.parent / "run" / "best" / "encoder"
    tensors = load_file(folder / "model.safetensors")
    head = {
        "cls.predictions.transform.dense.weight": torch.randn(32, 32),
        "cls.predictions.transform.dense.bias": torch.randn(32),
        "cls.predictions.transform.LayerNorm.gamma": torch.randn(32),  # as old files call it
        "cls.predictions.transform.LayerNorm.beta": torch.randn(32),
        "cls.predictions.bias": torch.randn(len(tensors["embeddings.word_embeddings.weight"])),
    }
    save_file({f"bert.{name}": tensor for name, tensor in tensors.items()} | head, folder / "model.safetensors")
    overrides = ["encoder.shape=null", "encoder.tokenizer=null", f"encoder.from={folder}", STAGES, "steps=null"]
    experiment = load(Experiment, tiny, overrides)
    words = build_model(experiment, load_tokenizer(str(folder)), "cpu").words
    assert words is not None
    ours = (words.dense.weight, words.dense.bias, words.norm.weight, words.norm.bias, words.bias)
    for parameter, tensor in zip(ours, head.values(), strict=True):
        assert (parameter == tensor).all()


def test_what_does_not_fit_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"stages\[0\]\.objective\.share is 1; must be less than 1"):
        load(Experiment, tiny, ["stages=[{objective: {kind: mlm, share: 1}}]"])
    with pytest.raises(UserError, match="did you mean 'mlm'"):
        load(Experiment, tiny, ["stages=[{objective: mlmm}]"])
    with pytest.raises(UserError, match="stage 'words': trains names nothing that mlm goes through"):
        run(tiny, "steps=null", "stages=[{name: words, objective: mlm, trains: heads, steps: 2}]")
    vocabulary = tiny.parent / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text().replace("[MASK]", "[HASK]"))
    with pytest.raises(UserError, match=r"stage 'words': objective: .* has no \[MASK\] to hide words with"):
        run(tiny, *WORDS)


def test_losses_of_hidden_words_are_no_jump_from_those_of_tasks(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = "{name: tasks, steps: 60, tasks: [mood], lr: 1.0e-4}"
    run(tiny, "steps=null", f"stages=[{first}, {{name: words, objective: mlm, steps: 3}}]", "log.tensorboard=false")
    assert "of late" not in capsys.readouterr().out
