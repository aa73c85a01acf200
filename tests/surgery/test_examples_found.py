"""What the examples and the documentation of the library brought to light.

python -m pytest tests/surgery/test_examples_found.py
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Surgery, UserError
from mtl_dist.surgery import GradVac, PCGrad
from mtl_dist.surgery.surgery import by_layer
from tests.distributed import on_ranks


class Model(nn.Module):
    """Two tasks that want the opposite of one body."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8))
        self.up, self.down = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {"up": (self.up(hidden) - 1).square().mean(), "down": (self.down(hidden) + 1).square().mean()}


def rows() -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    return x[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def refusal(made: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        made()
    return str(error.value)


# --------------------------------------------------------------------------------------------- what a loop gets wrong


@pytest.mark.parametrize("zero", [False, True], ids=["none", "zeros"])
def test_gradients_that_were_not_cleared_are_refused(zero: bool) -> None:
    # A loop that accumulates and says nothing of it: every micro-batch would be a step, and but the last be lost.
    model = Model()
    surgery = Surgery(model, shared="body")
    surgery.backward(model(rows()))
    assert refusal(lambda: surgery.backward(model(rows()))) == (
        "there are gradients of the step before: clear them after each step, with optimizer.zero_grad(); where "
        "micro-batches add up, give last=False with all but the last"
    )
    model.zero_grad(set_to_none=not zero)
    surgery.backward(model(rows()))
    assert surgery.number == 2


def test_losses_come_by_name() -> None:
    model = Model()
    surgery = Surgery(model, shared="body")
    for wrong in (sum(model(rows()).values()), list(model(rows()).values()), [("up",)]):
        assert refusal(lambda wrong=wrong: surgery.backward(wrong)) == (
            "each task's loss comes by its name: surgery.backward({'TASK': loss, ...}), and not their sum"
        )


def test_a_step_has_losses() -> None:
    surgery = Surgery(Model(), shared="body")
    assert refusal(lambda: surgery.backward({})) == "step 0 has no losses; give it those of one task at least"


def test_shared_names_something() -> None:
    assert refusal(lambda: Surgery(Model(), shared=[])) == (
        "shared names nothing; name the submodules that the tasks share, or '' for the whole model"
    )


@pytest.mark.parametrize("combiner", [PCGrad, {"kind": "pcgrad"}, None])
def test_a_combiner_is_a_name_or_an_object(combiner: Any) -> None:
    # Anything else would have been plain training, and nobody told.
    assert refusal(lambda: Surgery(Model(), combiner, shared="body")) == (
        f"Surgery: combiner is {combiner!r}; give a method's name, 'pcgrad', or an object, PCGrad()"
    )


def test_layers_of_several_shared_modules() -> None:
    names = [
        "bert.embeddings.word.weight",
        "bert.embeddings.norm.bias",
        "bert.encoder.layer.0.a",
        "bert.encoder.layer.1.a",
    ]
    layers = by_layer(names, ("bert.embeddings.", "bert.encoder."))
    assert layers == {"bert.embeddings": [0, 1], "bert.encoder.layer.0": [2], "bert.encoder.layer.1": [3]}
    assert by_layer(names, ("bert.",)) == {"embeddings": [0, 1], "encoder.layer.0": [2], "encoder.layer.1": [3]}


# ---------------------------------------------------------------------------------------------- a step that is given up


def failing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield "up", model(rows())["up"]
    raise MemoryError


def after_a_failure(**settings: Any) -> list[Tensor]:
    """The gradients of a step, whose first attempt fails with a micro-batch and a task behind it."""
    model: nn.Module = Model()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    surgery = Surgery(model, shared="body", **settings)
    surgery.backward(model(rows()), last=False)
    with pytest.raises(MemoryError):
        surgery.backward(failing(model), last=True)
    surgery.backward(model(rows()))
    assert surgery.number == 1
    return gradients(model)


def test_a_step_that_failed_leaves_nothing_behind() -> None:
    fresh = Model()
    Surgery(fresh, shared="body").backward(fresh(rows()))
    for ours, theirs in zip(after_a_failure(), gradients(fresh), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_that_knew_its_tasks_leaves_nothing_behind() -> None:
    model, fresh = Model(), Model()
    surgery = Surgery(model, shared="body")
    with pytest.raises(MemoryError), surgery.step(0, ["up", "down"]), surgery.task("up"):
        with surgery.micro_batch(last=True) as backward:
            backward(model(rows())["up"])
        raise MemoryError
    surgery.backward(model(rows()))
    Surgery(fresh, shared="body").backward(fresh(rows()))
    for ours, theirs in zip(gradients(model), gradients(fresh), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_that_failed_leaves_nothing_behind_on_ranks() -> None:
    averaged, scattered = (on_ranks(2, after_on_ranks, reduce) for reduce in ("all_reduce", "reduce_scatter"))
    for rank in (*averaged, *scattered):
        for ours, theirs, fresh in zip(rank[0], averaged[0][0], rank[1], strict=True):
            torch.testing.assert_close(ours, fresh)
            torch.testing.assert_close(ours, theirs)


def after_on_ranks(reduce: str) -> tuple[list[Tensor], list[Tensor]]:
    failed = after_a_failure(reduce=reduce)
    model = DistributedDataParallel(Model())
    Surgery(model, shared="body", reduce=reduce).backward(model(rows()))
    return failed, gradients(model)


# -------------------------------------------------------------------------------------------------------------- state


def test_a_state_stays_as_it_was_taken() -> None:
    model = Model()
    surgery = Surgery(model, GradVac(beta=0.5), shared="body")
    surgery.backward(model(rows()))
    taken = surgery.state_dict()
    before = repr(taken)
    other = Surgery(Model(), GradVac(beta=0.5), shared="body")
    other.load_state_dict(taken)
    model.zero_grad()
    surgery.backward(model(rows()))
    assert repr(taken) == before == repr(other.state_dict()) != repr(surgery.state_dict())


# ---------------------------------------------------------------------------------------------------------- compilation


def compiled_around_ddp() -> list[list[Tensor]]:
    """The gradients of a model that is compiled as Accelerate does it, and of one that is not."""
    dist.init_process_group("gloo")
    found = []
    for compiles in (False, True):
        model: Any = DistributedDataParallel(Model())
        called = torch.compile(model, backend="aot_eager") if compiles else model
        surgery = Surgery(called, shared="body")
        for _ in range(2):
            model.zero_grad()
            surgery.backward(called(rows()))
        called(rows())  # the buffers that a step begins with are the first rank's
        found.append([*gradients(model), *(buffer.clone() for buffer in model.buffers())])
    return found


def test_a_model_may_be_compiled_around_ddp() -> None:
    for eager, compiled in on_ranks(2, compiled_around_ddp):
        for ours, theirs in zip(compiled, eager, strict=True):
            torch.testing.assert_close(ours, theirs)
