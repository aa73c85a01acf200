"""Surgery in loops that are not ours: a model as DDP, fully_shard or DeepSpeed left it, torch alone around it.

python -m pytest tests/surgery/test_library.py

The reference is Algorithm 1 (Yu et al. 2020) written out on one process, over the batches of all ranks.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Surgery, UserError, split_groups
from mtl_dist.surgery import FAMO, GradVac, PCGrad
from mtl_dist.surgery.combiners import GramCombiner, State
from mtl_dist.surgery.surgery import by_layer
from tests.distributed import on_ranks
from tests.trained import far_apart

WIDTH, ROWS, STEPS = 12, 8, 6
TASKS = ("nli", "sts", "tags")


class Body(nn.Module):
    """What the tasks share; `spare` is used by nobody, `deep` only by some."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.deep = nn.Linear(WIDTH, WIDTH)
        self.spare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, deep: bool) -> tuple[Tensor, Tensor]:
        for layer in self.layer:
            x = torch.tanh(layer(x))
        return x, torch.tanh(self.deep(x)) if deep else x


class Model(nn.Module):
    """Three heads, of which two go through a layer that is neither shared nor one task's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = Body()
        self.between = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, 1) for task in TASKS})

    def forward(self, x: Tensor, tasks: Sequence[str] = TASKS) -> dict[str, Tensor]:
        shallow, deep = self.body(x, deep={*tasks} != {"tags"})  # one graph for all tasks
        found = {}
        for task in tasks:
            hidden = shallow if task == "tags" else deep
            found[task] = self.heads[task](hidden if task == "nli" else self.between(hidden))
        return found


def batch(step: int, task: str) -> tuple[Tensor, Tensor]:
    """The rows of a step, of all ranks; all tasks have the same inputs, and goals that conflict."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    goal = x.sum(1, keepdim=True).sin() * {"nli": 3.0, "sts": -2.0, "tags": 1.5}[task]
    return x, goal + torch.randn(ROWS, 1, generator=generator) * TASKS.index(task)


def loss_of(raw: Tensor, goal: Tensor) -> Tensor:
    return (raw - goal).square().mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1)


Schedule = Callable[[int], Sequence[str]]


def all_tasks(step: int) -> Sequence[str]:
    return TASKS


def by_turns(step: int) -> Sequence[str]:
    return (TASKS, ("nli",), ("sts", "nli"))[step % 3]


def written_out(
    tasks_of: Schedule = all_tasks, plain: bool = False, every: int = 1, prefix: str = "body."
) -> dict[str, Tensor]:
    model = Model()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        gradients: dict[str, dict[str, Tensor]] = {}
        for task in tasks_of(step):
            x, goal = batch(step, task)
            model.zero_grad()
            loss_of(model(x, [task])[task], goal).backward()
            gradients[task] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        shared = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
        flat = {
            task: torch.cat(
                [found.get(name, torch.zeros_like(model.get_parameter(name))).flatten().double() for name in shared]
            )
            for task, found in gradients.items()
        }
        projected = {task: gradient.clone() for task, gradient in flat.items()}
        # The order of projections is drawn as the seed of step says; everything else is the paper.
        seed = np.random.SeedSequence((0, step)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]) % 2**63)
        if len(flat) > 1 and not plain and step % every == 0:
            for gradient in projected.values():
                own = next(task for task, other in projected.items() if other is gradient)
                for j in torch.randperm(len(flat), generator=generator).tolist():
                    task, other = list(flat.items())[j]
                    if task != own and gradient @ other < 0:
                        gradient -= (gradient @ other) / (other @ other) * other
        combined = torch.stack(list(projected.values())).sum(0)
        start = 0
        for name, parameter in model.named_parameters():
            found_here = [found[name] for found in gradients.values() if name in found]
            parameter.grad = torch.stack(found_here).sum(0) if found_here else None
            if name in shared:
                if found_here:
                    parameter.grad = combined[start : start + parameter.numel()].view_as(parameter).float()
                start += parameter.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------- other people's loops


class Loop:
    """A training loop in torch alone, or with DeepSpeed."""

    def __init__(
        self,
        engine: str,
        parts: int = 1,
        combiner: Any = "pcgrad",
        model: type[Model] = Model,
        split: bool = True,
        find_unused: bool = False,
        zero: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        self.engine, self.parts = engine, parts
        self.module = model()
        self.model: Any = self.module
        if engine == "ddp":
            self.model = DistributedDataParallel(self.module, find_unused_parameters=find_unused)
        elif engine == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for layer in self.module.body.layer:
                fully_shard(layer)
            fully_shard(self.module)
        self.optimizer = optimizer_of(self.module)
        if engine.startswith("zero"):
            if split:
                parts_of_model = ["body.deep", "body.spare", "between", *(f"heads.{task}" for task in TASKS)]
                split_groups(self.optimizer, self.module, *parts_of_model)
            self._start_deepspeed({"stage": int(engine[-1]), **(zero or {})})
        self.surgery = Surgery(self.model, combiner, shared="body", **settings)

    def _start_deepspeed(self, zero: Mapping[str, Any]) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.parts,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }
        self.model, *_ = deepspeed.initialize(model=self.module, optimizer=self.optimizer, config=config)

    def mine(self, step: int, task: str, part: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of a micro-batch."""
        x, goal = batch(step, task)
        here = slice(self.rank * self.parts + part, None, self.world * self.parts)
        return x[here], goal[here]

    def losses(self, step: int, tasks: Sequence[str], part: int) -> dict[str, Tensor]:
        """Of one forward pass: the inputs of all tasks are the same."""
        raw = self.model(self.mine(step, "nli", part)[0], tasks)
        return {task: loss_of(raw[task], self.mine(step, task, part)[1]) for task in tasks}

    def losses_one_by_one(self, step: int, tasks: Sequence[str], part: int) -> Iterator[tuple[str, Tensor]]:
        for task in tasks:
            x, goal = self.mine(step, task, part)
            yield task, loss_of(self.model(x, [task])[task], goal)

    def scaled(self, losses: Any) -> Any:
        """DeepSpeed divides by the number of micro-batches; a plain loop has to."""
        parts = 1 if self.engine.startswith("zero") else self.parts
        if isinstance(losses, Mapping):
            return {task: loss / parts for task, loss in losses.items()}
        return ((task, loss / parts) for task, loss in losses)

    def train(self, tasks_of: Schedule = all_tasks, lazily: bool = False, steps: range = range(STEPS)) -> None:
        for step in steps:
            for part in range(self.parts):
                make = self.losses_one_by_one if lazily else self.losses
                self.surgery.backward(self.scaled(make(step, tasks_of(step), part)), last=part + 1 == self.parts)
            self.step()

    def step(self) -> None:
        if not self.engine.startswith("zero"):  # whose engine has stepped
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def parameters(self) -> dict[str, Tensor]:
        """All of each parameter."""
        if self.engine.startswith("zero"):
            from mtl_dist.surgery.zero import places

            where = places(self.model.optimizer)
            return {name: where[p].gather(where[p].flat.detach()) for name, p in self.module.named_parameters()}
        whole = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in self.module.named_parameters()}
        return {name: p.detach().clone() for name, p in whole.items()}


def trained(engine: str, ways: Mapping[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, dict[str, Tensor]]:
    """The parameters after training in several ways: what makes the loop, and what it trains on."""
    found = {}
    for way, (made, on) in ways.items():
        loop = Loop(engine, **made)
        loop.train(**on)
        found[way] = loop.parameters()
        loop.surgery.close()
    return found


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one forward pass": ({}, {}),
    "accumulated": ({"parts": 2}, {}),
    "one by one": ({}, {"lazily": True}),
    "one by one, accumulated": ({"parts": 2}, {"lazily": True}),
    "by turns": ({}, {"lazily": True, "tasks_of": by_turns}),
    "every other step": ({"every": 2}, {"lazily": True}),
}
EXPECTED: dict[str, dict[str, Any]] = {
    "by turns": {"tasks_of": by_turns},
    "every other step": {"every": 2},
}
OF_DDP: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scattered": ({"reduce": "reduce_scatter"}, {}),
    "scattered, accumulated": ({"reduce": "reduce_scatter", "parts": 2}, {"lazily": True}),
}


@pytest.mark.parametrize(
    ("engine", "world"),
    [("one process", 1), ("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
)
def test_pcgrad_is_algorithm_1(engine: str, world: int) -> None:
    ways = WAYS | (OF_DDP if engine == "ddp" else {})
    if engine == "zero3":  # which frees its weights with the first backward pass
        ways = {way: (made, on) for way, (made, on) in ways.items() if on.get("lazily")}
    ranks = on_ranks(world, trained, engine, ways) if world > 1 else [trained(engine, ways)]
    for way in ways:
        expected = written_out(**EXPECTED.get(way, {}))
        for rank in ranks:
            assert far_apart(rank[way], expected) < 1e-6, way
            assert far_apart(rank[way], ranks[0][way]) == 0, way
        # The check can fail: without surgery the parameters are elsewhere.
        tasks_of = EXPECTED.get(way, {}).get("tasks_of", all_tasks)
        assert far_apart(written_out(tasks_of, plain=True), expected) > 1e-3, way


def test_a_layer_that_is_shared_as_well() -> None:
    loop = Loop("one process")
    loop.surgery.close()
    loop.surgery = Surgery(loop.model, shared=["body", "between"])
    loop.train()
    found = loop.parameters()
    assert far_apart(found, written_out()) > 1e-3
    assert list(by_layer(loop.surgery.names, ("body.", "between."))) == [
        "body.layer.0",
        "body.layer.1",
        "body",
        "between",
    ]
    whole = Loop("one process")
    whole.surgery.close()
    whole.surgery = Surgery(whole.model, shared="")
    whole.train()
    assert far_apart(whole.parameters(), written_out(prefix="")) < 1e-6


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (
            ["embeddings.word.weight", "encoder.layer.0.a.1.b", "encoder.layer.1.a"],
            "embeddings encoder.layer.0 encoder.layer.1",
        ),
        (["layer1.0.conv1.weight", "layer1.1.conv1.weight", "conv1.weight"], "layer1.0 layer1.1 conv1"),
        (["0.weight", "0.bias", "1.weight"], "0 1"),
    ],
)
def test_layers_are_found_by_the_numbers_in_names(names: list[str], layers: str) -> None:
    assert list(by_layer([f"bert.{name}" for name in names], ("bert.",))) == layers.split()


# ------------------------------------------------------------------------------------------- what ranks must agree upon


def several_visits() -> list[dict[str, Tensor]]:
    """A task that comes several times in one call, under DDP: what comes late is averaged by itself and added."""
    found = []
    for reduce in ("all_reduce", "reduce_scatter"):
        loop = Loop("ddp", parts=2, reduce=reduce)
        for step in range(STEPS):
            visits = ((task, loss / 2) for part in range(2) for task, loss in loop.losses_one_by_one(step, TASKS, part))
            loop.surgery.backward(visits, last=True)
            loop.step()
        found.append(loop.parameters())
        loop.surgery.close()
    return found


def test_a_task_may_come_several_times_in_a_step() -> None:
    expected = written_out()
    for rank in on_ranks(2, several_visits):
        for way in rank:
            assert far_apart(way, expected) < 1e-6


def decided_by_one() -> dict[str, Tensor]:
    """Trains with a combiner that says something else on every rank."""
    rank = int(os.environ["RANK"])
    combine = PCGrad.combine

    def otherwise(combiner: PCGrad, *arguments: Any) -> Tensor:
        return combine(combiner, *arguments) * (1 + rank)

    with patch.object(PCGrad, "combine", otherwise):
        loop = Loop("ddp")
        loop.train()
    return loop.parameters()


def test_one_rank_decides_on_the_weights() -> None:
    expected = written_out()
    for rank in on_ranks(2, decided_by_one):
        assert far_apart(rank, expected) < 1e-6


def averagings_of_ddp() -> list[tuple[int, list[Tensor | None]]]:
    """How often DDP averages in a step of two tasks with three micro-batches each, and what comes of it."""
    found = []
    for combiner, find_unused in (("sum", True), ("sum", False), ("pcgrad", True)):
        loop = Loop("ddp", parts=3, combiner=combiner, find_unused=find_unused)
        calls = 0

        def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            nonlocal calls
            calls += bucket.is_last()
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        loop.model.register_comm_hook(None, count)
        with loop.surgery.step(0, ["nli", "sts"]):
            for task in ("nli", "sts"):
                with loop.surgery.task(task, last=True):
                    for part in range(3):
                        x, goal = loop.mine(0, task, part)
                        with loop.surgery.micro_batch(last=part == 2) as backward:
                            backward(loss_of(loop.model(x, [task])[task], goal))
        found.append((calls, [p.grad for p in loop.module.parameters()]))
        loop.surgery.close()
    return found


def after_surgery() -> dict[str, Tensor]:
    loop = Loop("ddp", find_unused=True)
    loop.train(steps=range(1))
    loop.surgery.close()
    for step in range(1, 3):
        sum(loop.losses(step, TASKS, 0).values(), torch.zeros(())).backward()
        loop.step()
    return loop.parameters()


def test_a_model_that_was_let_go_averages_by_itself() -> None:
    first, second = on_ranks(2, after_surgery)
    assert far_apart(first, second) == 0


def test_ddp_averages_once_in_a_plain_step_and_never_in_one_with_surgery() -> None:
    for plain, without_search, operated in on_ranks(2, averagings_of_ddp):
        # DDP that does not look for unused parameters would wait for those of other tasks.
        assert (plain[0], without_search[0], operated[0]) == (1, 0, 0)
        for ours, theirs in zip(without_search[1], plain[1], strict=True):
            assert (ours is None) == (theirs is None)
            # The hook above averages nothing, so that this is what a rank had; ours is the mean.
            assert ours is None or theirs is None or ours.shape == theirs.shape


class Normed(Model):
    """With a buffer that every rank fills from its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor, tasks: Sequence[str] = TASKS) -> dict[str, Tensor]:
        return super().forward(self.norm(x), tasks)


def buffers_after_training() -> Tensor:
    loop = Loop("ddp", model=Normed)
    loop.train()
    loop.model(torch.zeros(4, WIDTH))  # what a step's first forward pass sees are the first rank's
    mean = loop.module.norm.running_mean
    assert isinstance(mean, Tensor)
    return mean


def test_buffers_are_those_of_the_first_rank() -> None:
    first, second = on_ranks(2, buffers_after_training)
    assert torch.equal(first, second) and first.abs().max() > 1e-3


class Experts(Model):
    """Ranks go through layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, tasks: Sequence[str] = TASKS) -> dict[str, Tensor]:
        expert = self.body.experts[int(os.environ["RANK"])]
        return super().forward(torch.tanh(expert(x)), tasks)


def with_experts() -> dict[str, Tensor]:
    loop = Loop("ddp", model=Experts)
    before = loop.parameters()
    loop.train()
    found = loop.parameters()
    moved = {name: (found[name] != before[name]).any() for name in found}
    assert all(moved[f"body.experts.{rank}.weight"] for rank in (0, 1))
    assert not moved["body.experts.2.weight"] and not moved["body.spare.weight"]
    return found


def test_what_any_rank_reaches_moves_on_all() -> None:
    first, second = on_ranks(2, with_experts)
    assert far_apart(first, second) == 0


# ------------------------------------------------------------------------------------------------- precisions, scaling


def test_other_precisions_keep_theirs() -> None:
    for dtype, bound in ((torch.float64, 1e-6), (torch.bfloat16, 0.05)):
        loop = Loop("one process")
        loop.surgery.close()
        loop.module.to(dtype)
        loop.surgery = Surgery(loop.model, shared="body")
        for step in range(STEPS):
            x, _ = batch(step, "nli")
            raw = loop.model(x.to(dtype))
            loop.surgery.backward({task: loss_of(raw[task], batch(step, task)[1].to(dtype)) for task in TASKS})
            gradients = [p.grad for p in loop.module.parameters() if p.grad is not None]
            assert {gradient.dtype for gradient in gradients} == {dtype}
            loop.step()
        found = {name: p.float() for name, p in loop.parameters().items()}
        assert far_apart(found, written_out()) < bound
        loop.surgery.close()


def scaled_losses(overflows: int | None) -> tuple[dict[str, Tensor], list[float]]:
    """Trains with a scaler of torch's; in one step a loss of the last rank overflows when it is scaled."""
    loop = Loop("ddp")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loop.surgery.close()
    loop.surgery = Surgery(loop.model, shared="body", scaler=scaler, drop_nonfinite=True)
    scales = []
    for step in range(STEPS):
        losses = loop.losses(step, TASKS, 0)
        if step == overflows and loop.rank == loop.world - 1:
            losses["sts"].register_hook(lambda gradient: gradient * float("inf"))
        loop.surgery.backward(losses)
        assert loop.surgery.dropped == set()
        scaler.unscale_(loop.optimizer)
        torch.nn.utils.clip_grad_norm_(loop.module.parameters(), 1.0)
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return loop.parameters(), scales


def test_scaled_losses_and_an_overflow_that_the_scaler_sees() -> None:
    for found, scales in on_ranks(2, scaled_losses, None):
        assert far_apart(found, written_out()) < 1e-6
        assert scales == [2.0**10] * STEPS
    ranks = on_ranks(2, scaled_losses, 3)
    for found, scales in ranks:
        assert scales == [2.0**10] * 3 + [2.0**9] * 3
        assert far_apart(found, ranks[0][0]) == 0
        assert all(p.isfinite().all() for p in found.values())


@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_a_task_whose_loss_is_no_number_is_dropped(scale: float | None) -> None:
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    loop = Loop("one process")
    loop.surgery.close()
    loop.surgery = Surgery(loop.model, shared="body", drop_nonfinite=True, scaler=scaler)
    losses = loop.losses(0, TASKS, 0)
    loop.surgery.backward({**losses, "sts": losses["sts"] * float("nan")})
    assert loop.surgery.dropped == {"sts"}
    assert loop.module.heads["sts"].weight.grad is None  # type: ignore[union-attr]
    got = [p.grad for p in loop.module.body.layer.parameters()]
    other = Loop("one process")
    losses = other.losses(0, TASKS, 0)
    other.surgery.backward({task: losses[task] for task in ("nli", "tags")})
    for gradient, parameter in zip(got, other.module.body.layer.parameters(), strict=True):
        # A projection less is drawn for: the generator goes on with the same numbers.
        torch.testing.assert_close(gradient / (scale or 1.0), parameter.grad, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ state, refusals


@pytest.mark.parametrize("combiner", [GradVac(beta=0.5), FAMO(lr=0.5)], ids=["gradvac", "famo"])
def test_a_combiner_that_remembers_goes_on(combiner: Any) -> None:
    undisturbed = Loop("one process", combiner=combiner)
    undisturbed.train()
    first = Loop("one process", combiner=combiner)
    first.train(steps=range(3))
    second = Loop("one process", combiner=combiner)
    second.module.load_state_dict(first.module.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.surgery.load_state_dict(first.surgery.state_dict())
    assert second.surgery.number == 3
    second.train(steps=range(3, STEPS))
    assert far_apart(second.parameters(), undisturbed.parameters()) == 0
    assert second.surgery.state == undisturbed.surgery.state != {}


def test_what_the_gradients_were_like() -> None:
    loop = Loop("one process", measure="layers")
    loop.train()
    conflict = loop.surgery.conflict
    assert conflict is not None and conflict.layers is not None
    assert list(conflict.cosine) == ["nli.sts", "nli.tags", "sts.tags"]
    assert list(conflict.layers) == ["layer.0", "layer.1", "deep", "spare"]
    assert conflict.layers["spare"].norm == {"nli": 0, "sts": 0, "tags": 0}


def refusal(made: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        made()
    return str(error.value)


def test_refused_on_one_process() -> None:
    model = Model()
    assert refusal(lambda: Surgery(model, "pc_grad", shared="body")) == (
        "Surgery: combiner is 'pc_grad'; did you mean 'pcgrad'?"
    )
    assert refusal(lambda: Surgery(model, shared="body", every=0)) == "Surgery: every is 0; must be greater than 0"
    assert "no field 'scop'; did you mean 'scope'?" in refusal(lambda: Surgery(model, shared="body", scop="layers"))
    assert refusal(lambda: Surgery(model, shared="bert")) == (
        "shared names 'bert', which the model has not; it has body, between, heads"
    )
    assert refusal(lambda: Surgery(model, shared="body", match="encoder")) == (
        "match matches no shared parameter that is trained: 'encoder'"
    )
    frozen = Model().requires_grad_(False)
    assert refusal(lambda: Surgery(frozen, shared="body")) == (
        "the model has nothing to train: every parameter is frozen"
    )

    loop = Loop("one process")
    losses = loop.losses(0, TASKS, 0)
    must = "task 'nli': its loss must be one number that depends on trained parameters"
    for wrong in (losses["nli"].detach(), loop.model(torch.zeros(2, WIDTH))["nli"], 0.5):
        assert refusal(lambda wrong=wrong: Loop("one process").surgery.backward({"nli": wrong})) == must
    loop = Loop("one process")
    losses = loop.losses(0, TASKS, 0)
    assert refusal(lambda: loop.surgery.backward((task, loss) for task, loss in losses.items())) == (
        "task 'sts': its loss shares a forward pass with one that is done; give the losses as a mapping"
    )
    loop = Loop("one process")
    assert refusal(lambda: loop.losses(0, ["nli"], 0)["nli"].backward()) == (
        "a backward pass outside of surgery: its gradients would be lost; give every loss to surgery.backward, "
        "or end the surgery by surgery.close()"
    )
    loop.surgery.close()
    loop.losses(0, ["nli"], 0)["nli"].backward()


def refused_on_ranks() -> list[str]:
    loop, other = Loop("ddp"), Loop("ddp")
    mine = "nli" if loop.rank == 0 else "sts"

    def step(tasks: list[str], at_the_end: bool = False) -> None:
        knowing = Loop("ddp")
        ours = knowing.surgery
        with ExitStack() as patches:
            if at_the_end:  # as on GPUs, which do not wait before
                patches.enter_context(patch.object(Surgery, "_refuse_other_tasks"))
            with ours.step(0, tasks), ours.task(mine, last=True), ours.micro_batch(last=True) as backward:
                backward(knowing.losses(0, [mine], 0)[mine])

    found = [
        refusal(lambda: Surgery(Model(), shared="body")),
        refusal(lambda: loop.surgery.backward(loop.losses(0, [mine], 0))),
        refusal(lambda: other.surgery.backward(other.losses(0, [mine, "tags"][: 1 + loop.rank], 0))),
        refusal(lambda: step([mine])),
        refusal(lambda: step([mine, "tags"][: 1 + loop.rank])),
        refusal(lambda: step([mine], at_the_end=True)),
        refusal(lambda: Surgery(DistributedDataParallel(Model(), static_graph=True), shared="body")),
    ]
    hooked = DistributedDataParallel(Model())
    hooked.register_comm_hook(None, default_hooks.allreduce_hook)
    found.append(refusal(lambda: Surgery(hooked, shared="body")))
    return found


def test_refused_on_ranks() -> None:
    for rank, found in enumerate(on_ranks(2, refused_on_ranks)):
        unwrapped, differ, differ_in_number, step, step_in_number, step_at_the_end, static, hooked = found
        assert unwrapped.startswith("the model is not wrapped for the 2 ranks that run; give it to accelerator.prepare")
        mine = ["nli", "sts"][rank]
        assert differ == step == step_at_the_end
        assert differ == (
            f"step 0: the ranks came with different tasks, this one with {mine}; draw the tasks alike on all ranks, in "
            "the same order"
        )
        assert differ_in_number == step_in_number
        assert differ_in_number.startswith("step 0: the ranks came with different tasks, this one with ")
        assert static.startswith("DDP's static_graph reduces gradients by itself")
        assert hooked.startswith("DDP's communication hook would be passed over")


def refused_by_shards() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    loop = Loop("fsdp2")
    found = []
    found.append(refusal(lambda: loop.losses(0, ["nli"], 0)["nli"].backward()))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    hybrid = Model()
    fully_shard(hybrid, mesh=mesh)
    found.append(refusal(lambda: Surgery(hybrid, shared="body")))
    half = Model()
    fully_shard(half.body)
    found.append(refusal(lambda: Surgery(half, shared="body")))
    parallel = nn.Sequential(nn.Linear(2, 2, bias=False))  # as tensor parallelism leaves it
    line = init_device_mesh("cpu", (2,))
    parallel[0].weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), line, [Shard(0)]))
    found.append(refusal(lambda: Surgery(parallel, shared="0")))
    return found


def test_refused_under_fsdp2() -> None:
    for outside, hybrid, half, parallel in on_ranks(2, refused_by_shards):
        assert "HSDP and tensor parallelism are not supported" in parallel
        assert outside.startswith("a backward pass outside of surgery")
        assert "HSDP and tensor parallelism are not supported" in hybrid
        assert "fully_shard must wrap the whole model" in half


def refused_by_zero(stage: int) -> list[str]:
    found = []
    loop = Loop(f"zero{stage}")
    if stage == 3:
        found.append(refusal(lambda: loop.surgery.backward(loop.losses(0, TASKS, 0))))
    offload = {"offload_optimizer": {"device": "cpu"}}
    found.append(refusal(lambda: Loop(f"zero{stage}", zero=offload)))
    loop = Loop(f"zero{stage}", split=False)
    found.append(refusal(lambda: loop.surgery.backward(loop.losses_one_by_one(0, ["nli"], 0))))
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_refused_under_zero(stage: int) -> None:
    for found in on_ranks(2, refused_by_zero, stage):
        assert found[-2] == "DeepSpeed's zero_optimization.offload_optimizer is not supported; leave it out"
        assert found[-1].startswith("ZeRO moves all parameters of an optimizer's group as one, and this step reached ")
        assert "split_groups(optimizer, model, 'HEAD', ...)" in found[-1]
        if stage == 3:
            assert found[0] == (
                "task 'sts': its loss shares a forward pass with one that is done; ZeRO-3 needs one for each task"
            )


def test_weights_of_anybodys_gram_matrix() -> None:
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    weights = PCGrad().weights(gradients @ gradients.T)
    torch.testing.assert_close(weights.float() @ gradients, torch.tensor([0.5, 1.5]))


class Halved(GramCombiner):
    """A method of one's own, which is on no list."""

    kind: str = "halved"

    def combine(self, gram_TT: Tensor, tasks: list[str], state: State, generator: torch.Generator) -> Tensor:
        return gram_TT.new_full((len(tasks),), 0.5)


def test_a_combiner_of_ones_own() -> None:
    gradients = []
    for combiner in ("sum", Halved()):
        loop = Loop("one process", combiner=combiner)
        loop.surgery.backward(loop.losses(0, TASKS, 0))
        gradients.append(loop.module.body.layer[0].weight.grad)
    torch.testing.assert_close(gradients[0], 2 * gradients[1])


def one_task_scattered() -> list[dict[str, Tensor]]:
    loop = Loop("ddp", parts=2, reduce="reduce_scatter")
    loop.train(tasks_of=lambda step: TASKS[: 1 + step % 2])
    return [loop.parameters()]


def test_the_parts_of_one_task_add_up_wherever_they_land() -> None:
    expected = written_out(lambda step: TASKS[: 1 + step % 2])
    for (found,) in on_ranks(2, one_task_scattered):
        assert far_apart(found, expected) < 1e-6


def test_gradients_lie_in_memory_as_their_parameters_do() -> None:
    def gradients(memory_format: torch.memory_format, **settings: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"body": nn.Conv2d(3, 4, 3), "head": nn.Conv2d(4, 2, 2)}).to(memory_format=memory_format)
        surgery = Surgery(model, shared="body", **settings)
        raw = model["head"](model["body"](torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))))
        surgery.backward({"a": raw[:, 0].square().mean(), "b": -raw.mean() + raw[:, 1].square().mean()})
        assert all(p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters())
        return [p.grad for p in model.parameters() if p.grad is not None]

    for settings, bound in (({}, 1e-6), ({"buffer_dtype": "bf16"}, 1e-2)):
        by_rows, by_channel = (
            gradients(memory_format, **settings) for memory_format in (torch.contiguous_format, torch.channels_last)
        )
        for ours, theirs in zip(by_channel, by_rows, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def test_tied_parameters_are_shared_under_any_name() -> None:
    model = Model()
    model.first_name = model.body.layer  # which named_parameters() gives in the place of the other
    model._modules["body"] = model._modules.pop("body")
    surgery = Surgery(model, shared="body")
    assert {name.split(".")[0] for name in surgery.names} == {"first_name", "body"}


def test_what_cannot_be_combined_is_refused() -> None:
    frozen = Model()
    frozen.body.requires_grad_(False)
    assert refusal(lambda: Surgery(frozen, shared="body")) == (
        "nothing of what the tasks share is trained: shared is body"
    )
    sparse = nn.ModuleDict({"body": nn.Embedding(4, 2, sparse=True), "head": nn.Linear(2, 2)})
    assert refusal(lambda: Surgery(sparse, shared="body")).startswith("an embedding has sparse gradients")


@pytest.mark.parametrize("combiner", ["sum", "uncertainty"])
def test_tasks_are_dropped_from_plain_steps_too(combiner: str) -> None:
    loop = Loop("one process", combiner=combiner, drop_nonfinite=True)
    losses = loop.losses(0, TASKS, 0)
    loop.surgery.backward({**losses, "sts": losses["sts"] * float("nan")})
    assert loop.surgery.dropped == {"sts"}
    assert all(p.grad is None or p.grad.isfinite().all() for p in loop.module.parameters())


def weighted_losses(engine: str) -> list[dict[str, Any]]:
    states = []
    for parts in (1, 2):
        loop = Loop(engine, parts=parts, combiner="uncertainty")
        loop.train(lazily=True)
        states.append(loop.surgery.state["losses"])
        loop.surgery.close()
    return states


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_weights_of_losses_do_not_depend_on_accumulation(engine: str) -> None:
    for whole, accumulated in on_ranks(2, weighted_losses, engine):
        assert accumulated == pytest.approx(whole, rel=1e-4) and whole["sts"] != 0


def test_a_step_that_failed_keeps_no_rows() -> None:
    loop = Loop("one process")
    losses = loop.losses(0, TASKS, 0)
    with pytest.raises(UserError):
        loop.surgery.backward({**losses, "none": 0.5})
    assert loop.surgery.rows.rows_KN.numel() == 0
    loop.surgery.backward(loop.losses(0, TASKS, 0))
    assert loop.surgery.rows.rows_KN.numel() > 0


def test_what_was_held_before_a_load_is_forgotten() -> None:
    loop = Loop("one process", every=2, between="held", combiner="mgda")
    loop.surgery.backward(loop.losses(0, TASKS, 0))
    saved = {"step": 1, "combiner": {"held": dict.fromkeys(TASKS, 0.25)}}
    loop.surgery.load_state_dict(saved)
    assert loop.surgery.loss_weights(TASKS) == dict.fromkeys(TASKS, 0.25)
    assert loop.surgery.state_dict() == saved
