"""Surgery in the loop, on real ranks, against the algorithm written out on one.

python -m pytest tests/surgery/test_training.py
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from mtl_dist.config import UserError, load
from mtl_dist.data.batches import RowStream, TrainRows, make_batch
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import MultiTaskModel
from mtl_dist.model.weights import build_encoder
from mtl_dist.surgery import ddp
from mtl_dist.surgery.rows import Rows, row_length
from mtl_dist.training.engine import Engine, Stepped
from mtl_dist.training.setup import build_model, load_data
from tests.distributed import on_ranks
from tests.trained import NO_DROPOUT, far_apart, run

TASKS = ("mood", "same", "near")
LAST = [*NO_DROPOUT, "log.tensorboard=false", *(f"tasks.{task}.dev=null" for task in TASKS)]
PCGRAD = "gradients.combiner={kind: pcgrad}"


def projected(grads: list[Tensor], generator: torch.Generator) -> tuple[Tensor, list[float]]:
    """Yu et al. 2020, Algorithm 1, on the gradients themselves; and how often each of them is in what comes of it."""
    total, weights = torch.zeros_like(grads[0]), [1.0] * len(grads)
    for i, grad in enumerate(grads):
        own = grad.clone()
        for j in torch.randperm(len(grads), generator=generator).tolist():
            overlap = own @ grads[j]
            if j != i and overlap < 0:
                part = (overlap / (grads[j] @ grads[j])).item()
                own -= part * grads[j]
                weights[j] -= part
        total += own
    return total, weights


def written_out(config: Path, *overrides: str) -> dict[str, Tensor]:
    """PCGrad on one process: every task's gradient by autograd over the global batch, torch's AdamW."""
    experiment = load(Experiment, config, overrides)
    tokenizer = load_tokenizer(experiment.encoder.tokenizer_source)
    splits = load_data(experiment, tokenizer, Console(quiet=True))["train"]
    (stage,) = experiment.all_stages()
    torch.manual_seed(experiment.seed)
    model = MultiTaskModel(build_encoder(experiment.encoder, tokenizer), experiment.tasks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.optim.lr, eps=1e-4, weight_decay=0)
    order = stage.order({name: len(split) for name, split in splits.items()}, experiment.seed)
    encoder = list(model.encoder.parameters())
    held: dict[str, float] = {}
    for step in range(order.steps):
        flat: dict[str, Tensor] = {}
        heads: dict[str, list[Tensor]] = {}
        touched: set[int] = set()
        for name, draw in order.draws(step):
            task = experiment.tasks[name]
            stream = RowStream(len(splits[name]), experiment.seed, 0, name)
            rows = TrainRows(splits[name], stream, task.batch_size, experiment.length_window).of_draw(draw)
            batch = make_batch(name, splits[name], rows)
            loss = task.weight * task.loss.per_example(model(name, batch.packed), batch.gold_N, task.label).mean()
            head = list(model.heads[name].parameters())
            grads = torch.autograd.grad(loss, [*encoder, *head], allow_unused=True)
            touched |= {i for i, grad in enumerate(grads[: len(encoder)]) if grad is not None}
            shared = torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(encoder, grads, strict=False)]
            )
            flat[name] = flat.get(name, torch.zeros_like(shared)) + shared
            before = heads.get(name, [torch.zeros_like(p) for p in head])
            heads[name] = [a + b for a, b in zip(before, grads[len(encoder) :], strict=True)]
        if step % stage.gradients.every == 0:
            seed = np.random.SeedSequence((experiment.seed, 0, step)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0]) % 2**63)
            combined, weights = projected(list(flat.values()), generator)
            held |= dict(zip(flat, weights, strict=True))
        else:  # the weights of the last surgery that had the task, for its head as well
            combined = torch.stack([held.get(name, 1.0) * gradient for name, gradient in flat.items()]).sum(0)
            heads = {name: [held.get(name, 1.0) * gradient for gradient in each] for name, each in heads.items()}
        optimizer.zero_grad()
        for i, (parameter, grad) in enumerate(zip(encoder, combined.split([p.numel() for p in encoder]), strict=True)):
            parameter.grad = grad.view_as(parameter) if i in touched else None
        for name, grads in heads.items():
            for parameter, grad in zip(model.heads[name].parameters(), grads, strict=True):
                parameter.grad = grad
        if stage.gradients.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), stage.gradients.clip_norm)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        [],
        # Three draws of three tasks: most steps have a task twice and lack another.
        ["gradients.clip_norm=null", "gradients.accumulation=3", "mixer={kind: uniform}"],
    ],
    ids=["joint, clipped", "uniform, accumulated"],
)
def test_pcgrad_is_algorithm_1(tiny: Path, changes: list[str]) -> None:
    overrides = [*LAST, "steps=20", PCGRAD, *changes]
    expected = written_out(tiny, *overrides)
    assert far_apart(run(tiny, *overrides)["parameters"], expected) < 1e-6
    for world in (2, 4):
        for reduce in ("all_reduce", "reduce_scatter"):
            ranks = [r["parameters"] for r in on_ranks(world, run, tiny, *overrides, f"gradients.reduce={reduce}")]
            assert far_apart(ranks[0], expected) < 1e-6
            assert all(far_apart(other, ranks[0]) == 0 for other in ranks)
    # The check can fail: without surgery the parameters are elsewhere.
    assert far_apart(run(tiny, *overrides, "gradients.combiner={kind: sum}")["parameters"], expected) > 1e-4


@pytest.mark.parametrize("changes", [[], ["mixer={kind: uniform}", "gradients.accumulation=2"]])
def test_weights_are_held_between_surgeries(tiny: Path, changes: list[str]) -> None:
    overrides = [*LAST, "steps=12", PCGRAD, "gradients.every=3", *changes]
    held = [*overrides, "gradients.between=held"]
    expected = written_out(tiny, *held)
    assert far_apart(run(tiny, *held)["parameters"], expected) < 1e-6
    for world in (2, 4):
        ranks = [rank["parameters"] for rank in on_ranks(world, run, tiny, *held)]
        assert far_apart(ranks[0], expected) < 1e-6
        assert all(far_apart(other, ranks[0]) == 0 for other in ranks)
    # The check can fail: the plain sum between surgeries leads elsewhere.
    assert far_apart(run(tiny, *overrides)["parameters"], expected) > 1e-4


def test_products_do_not_follow_what_the_model_may_round(tiny: Path) -> None:
    rows: list[Rows] = []
    plain = Rows.grams

    def noted(these: Rows) -> Tensor:
        rows.append(these)
        return plain(these)

    with patch.object(Rows, "grams", noted):
        run(tiny, *LAST, PCGRAD, "steps=1")
    exact = rows[0].grams()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert rows[0].grams().equal(exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("misfit", ["scope=layers", "match=layers.1", "measure=true"])
def test_what_does_not_go_with_held_weights(tiny: Path, misfit: str) -> None:
    with pytest.raises(UserError, match=r"gradients\.between is held, which .* goes with scope shared, and without"):
        load(Experiment, tiny, [PCGRAD, "gradients.every=3", "gradients.between=held", f"gradients.{misfit}"])


def test_products_are_summed_in_pieces(tiny: Path) -> None:
    whole = run(tiny, *LAST, PCGRAD)["parameters"]
    # Chunks, runs of them and pieces of a row so small that there are many of each.
    with (
        patch("mtl_dist.surgery.rows.CHUNK", 100),
        patch("mtl_dist.surgery.rows.RUN", 3),
        patch("mtl_dist.surgery.rows.PRODUCTS", 100),
    ):
        assert far_apart(run(tiny, *LAST, PCGRAD)["parameters"], whole) < 1e-7


def last_records(config: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (config.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def test_one_row_needs_no_surgery(tiny: Path) -> None:
    alone = [*LAST, "steps=6", "stages=[{tasks: [mood]}]"]
    assert far_apart(run(tiny, *alone, PCGRAD)["parameters"], run(tiny, *alone)["parameters"]) < 1e-7


@pytest.mark.parametrize("reduce", ["all_reduce", "reduce_scatter"])
def test_a_task_absent_from_a_step_leaves_its_head_untouched(tiny: Path, reduce: str) -> None:
    before = run(tiny, *LAST, "epochs=0", "steps=null")["parameters"]
    # Two draws a step; weight decay would move whatever has a gradient, were it zero.
    mixer = "mixer={kind: explicit, p: {mood: 0, same: 1, near: 1}, draws_per_step: 2, draw: balanced}"
    decay = ["optim.weight_decay=0.5", "optim.rules=[{match: '.*'}]", "optim.lr=0.1"]
    overrides = [*LAST, *decay, mixer, PCGRAD, "steps=2", f"gradients.reduce={reduce}"]
    for after in on_ranks(2, run, tiny, *overrides):
        moved = {name for name, p in after["parameters"].items() if not p.equal(before[name])}
        assert "heads.same.layers.0.weight" in moved
        assert not any(name.startswith(("heads.mood", "encoder.pooler")) for name in moved)


def test_measuring_changes_nothing(tiny: Path) -> None:
    plain, measured = (
        run(tiny, *LAST, "steps=12", *changes)["parameters"] for changes in ([], ["gradients.measure=true"])
    )
    assert far_apart(measured, plain) < 1e-6
    surgery = last_records(tiny)[-1]["surgery"]
    assert surgery["weight"] == {"mood": 1, "same": 1, "near": 1}
    assert surgery["norm_ratio"] == pytest.approx(1)
    assert surgery["similarity_to_sum"] == pytest.approx(1)
    assert surgery["cosine"].keys() == {"mood.same", "mood.near", "near.same"}
    assert all(-1 <= cosine <= 1 for cosine in surgery["cosine"].values())
    assert all(norm > 0 for norm in surgery["norm"].values())
    assert 0 < surgery["conflicting_parameters"] < 1


def test_layers_are_measured_on_request(tiny: Path) -> None:
    run(tiny, *LAST, "steps=2", "gradients.measure=layers")
    surgery = last_records(tiny)[-1]["surgery"]
    assert list(surgery["layers"]) == ["embeddings", "layers.0", "layers.1", "pooler"]
    # The squares of a task's norms in the layers, averaged over two steps, are about the square of its whole norm.
    whole = sum(layer["norm"]["same"] ** 2 for layer in surgery["layers"].values()) ** 0.5
    assert whole == pytest.approx(surgery["norm"]["same"], rel=0.05)
    assert surgery["layers"]["pooler"]["norm"]["near"] == 0  # only `mood` goes through the pooler


def test_surgery_every_third_step_and_not_between(tiny: Path) -> None:
    every = [*LAST, PCGRAD, "gradients.every=3", "log.every_steps=1"]
    for ranks in (run(tiny, *every, "steps=4"), on_ranks(2, run, tiny, *every, "steps=4")[0]):
        assert ["surgery" in record for record in last_records(tiny)] == [True, False, False, True]
        # The plain steps are those of plain training, from where surgery left off.
        assert far_apart(ranks["parameters"], run(tiny, *every, "steps=4")["parameters"]) < 1e-6
    measured = [*every, "gradients.measure=true", "steps=4"]
    assert far_apart(run(tiny, *measured)["parameters"], run(tiny, *every, "steps=4")["parameters"]) < 1e-6


def test_the_scope_of_surgery(tiny: Path) -> None:
    runs = {
        scope: run(tiny, *LAST, "steps=6", PCGRAD, f"gradients.{scope}")["parameters"]
        for scope in ("scope=shared", "scope=layers", "match=layers.1")
    }
    with pytest.raises(UserError, match=r"^gradients\.match matches no shared parameter that is trained: 'heads'$"):
        run(tiny, *LAST, PCGRAD, "gradients.match=heads")
    frozen = "optim.rules=[{match: embeddings, freeze: true}, {match: .*}]"
    with pytest.raises(
        UserError, match=r"^gradients\.match matches no shared parameter that is trained: 'embeddings'$"
    ):
        run(tiny, *LAST, PCGRAD, frozen, "gradients.match=embeddings")
    assert far_apart(runs["scope=shared"], runs["scope=layers"]) > 1e-5
    # Seen after one step, before one part moves the gradients of the other.
    one = run(tiny, *LAST, "steps=1", PCGRAD, "gradients.match=layers.1", "gradients.clip_norm=null")["parameters"]
    without = run(tiny, *LAST, "steps=1", "gradients.clip_norm=null")["parameters"]
    apart = {name for name, p in one.items() if (p - without[name]).abs().max() > 1e-7}
    assert apart
    assert all(name.startswith("encoder.layers.1") for name in apart)


@pytest.mark.parametrize("reduce", ["all_reduce", "reduce_scatter"])
def test_rows_in_bf16_are_close(tiny: Path, reduce: str) -> None:
    overrides = [*LAST, "steps=12", "gradients.combiner={kind: mean}", f"gradients.reduce={reduce}"]
    exact = run(tiny, *overrides)["parameters"]
    for rounded in on_ranks(2, run, tiny, *overrides, "gradients.buffer_dtype=bf16"):
        assert 1e-7 < far_apart(rounded["parameters"], exact) < 1e-2


COMBINERS = ["mean", "random", "gradvac", "cagrad", "mgda", "imtl_g", "aligned_mtl", "nash_mtl", "upgrad"]


@pytest.mark.parametrize("kind", [*COMBINERS, "uncertainty", "dwa, window_steps: 1", "famo"])
def test_every_combiner_trains(tiny: Path, kind: str) -> None:
    trained = run(tiny, *LAST, "steps=6", f"gradients.combiner={{kind: {kind}}}")["parameters"]
    assert all(p.isfinite().all() for p in trained.values())
    assert far_apart(trained, run(tiny, *LAST, "steps=6")["parameters"]) > 1e-6


@pytest.mark.parametrize("kind", ["uncertainty", "famo", "gradvac", "random"])
def test_combiners_with_a_state_do_not_depend_on_the_number_of_processes(tiny: Path, kind: str) -> None:
    overrides = [*LAST, "steps=12", f"gradients.combiner={{kind: {kind}}}"]
    expected = run(tiny, *overrides)["parameters"]
    for other in on_ranks(2, run, tiny, *overrides):
        assert far_apart(other["parameters"], expected) < 1e-5


@pytest.mark.parametrize("kind", ["uncertainty", "famo"])
def test_losses_are_learnt_from_before_the_next_step_whenever_they_are_reported(tiny: Path, kind: str) -> None:
    overrides = [*LAST, "steps=6", f"gradients.combiner={{kind: {kind}}}"]
    often = run(tiny, *overrides, "log.every_steps=1")["parameters"]
    assert far_apart(run(tiny, *overrides, "log.every_steps=6")["parameters"], often) == 0


def sent_bytes(config: Path, *overrides: str) -> int:
    """What this rank hands to collectives, as a ring sends it, in the steps of a run; small ones left out."""
    sent = 0
    world = dist.get_world_size() if dist.is_initialized() else 2

    def counting(collective: Any, share: Any) -> Any:
        def counted(output: Tensor, *args: Any, **options: Any) -> Any:
            nonlocal sent
            if output.numel() > 1000:
                sent += share(output)
            return collective(output, *args, **options)

        return counted

    def size(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    shares = {
        "dist.all_reduce": (dist.all_reduce, lambda out: 2 * (world - 1) * size(out) // world),
        "reduce_scatter": (ddp.reduce_scatter, lambda out: (world - 1) * size(out)),
        "all_gather": (ddp.all_gather, lambda out: (world - 1) * size(out) // world),
    }
    with ExitStack() as patches:
        for name, (collective, share) in shares.items():
            patches.enter_context(patch(f"mtl_dist.surgery.ddp.{name}", counting(collective, share)))
        run(config, *overrides)
    return sent


def test_bytes_really_sent(tiny: Path) -> None:
    overrides = [*LAST, PCGRAD, "steps=4"]
    parameters = run(tiny, *overrides)["parameters"]
    shared = 4 * row_length(p.numel() for name, p in parameters.items() if name.startswith("encoder"))
    # Three tasks on two ranks: 2 K P (W - 1) / W, against (K + 1) P (W - 1) / W, each a step.
    (all_reduced, _), (scattered, _) = (
        on_ranks(2, sent_bytes, tiny, *overrides, f"gradients.reduce={reduce}")
        for reduce in ("all_reduce", "reduce_scatter")
    )
    assert all_reduced == pytest.approx(4 * 2 * 3 * shared / 2, rel=0.02)
    assert scattered == pytest.approx(4 * (3 + 1) * shared / 2, rel=0.02)


def bucket_bytes(config: Path, *overrides: str) -> int:
    """What DDP keeps to average gradients in."""
    engines = []
    step = Engine.step

    def noted(engine: Engine[Any], number: int) -> Stepped:
        engines.append(engine)
        return step(engine, number)

    with patch.object(Engine, "step", noted):
        run(config, *overrides)
    return sum(map(int, engines[0].model._get_ddp_logging_data()["bucket_sizes"].split(", ")))


def test_ddp_keeps_no_buckets_for_what_surgery_averages(tiny: Path) -> None:
    whole = 4 * sum(p.numel() for p in run(tiny, *LAST)["parameters"].values())
    assert on_ranks(2, bucket_bytes, tiny, *LAST) == [whole] * 2
    assert on_ranks(2, bucket_bytes, tiny, *LAST, PCGRAD, "gradients.every=2") == [whole] * 2
    assert max(on_ranks(2, bucket_bytes, tiny, *LAST, PCGRAD)) < 0.05 * whole


def begun_elsewhere(config: Path, *overrides: str) -> dict[str, Tensor]:
    """The parameters after training from weights that are other ones on each rank."""

    def build(*args: Any) -> MultiTaskModel:
        model = build_model(*args)
        for parameter in model.parameters():
            parameter.data += 0.1 * dist.get_rank()
        return model

    with patch("mtl_dist.training.setup.build_model", build):
        parameters: dict[str, Tensor] = run(config, *overrides)["parameters"]
    return parameters


@pytest.mark.parametrize("gradients", [[], [PCGRAD]])
def test_all_ranks_begin_with_the_weights_of_the_first(tiny: Path, gradients: list[str]) -> None:
    first, second = on_ranks(2, begun_elsewhere, tiny, *LAST, *gradients, "steps=2")
    assert far_apart(second, first) == 0


def test_surgery_needs_several_tasks_in_a_step(tiny: Path) -> None:
    for mixer in ("{kind: sequential}", "{kind: temperature, draws_per_step: 1}"):
        with pytest.raises(UserError, match=r"draws one task a step, but gradients\.combiner pcgrad needs several"):
            load(Experiment, tiny, [PCGRAD, f"mixer={mixer}"])
    # To measure one alone is of no use, but does no harm; loss weights need no other task in the step.
    load(Experiment, tiny, ["gradients.combiner={kind: dwa}", "mixer={kind: sequential}"])
