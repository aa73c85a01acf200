"""The harness itself: what it returns, and that no failure of a rank goes unseen."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState

from mtl_dist.config import UserError
from mtl_dist.distributed import DistributedConfig, first_then_others, seed_step, start
from tests.distributed import on_ranks


def _sum_of_ranks() -> tuple[int, float]:
    state = PartialState(cpu=True)
    total = torch.tensor(float(state.process_index + 1))
    dist.all_reduce(total)
    return state.process_index, total.item()


def _fail_on(failing_rank: int) -> None:
    print("about to look")
    if os.environ["RANK"] == str(failing_rank):
        raise ValueError("this rank is unlucky")
    time.sleep(60)


def test_ranks_talk_and_return_in_order() -> None:
    assert on_ranks(2, _sum_of_ranks) == [(0, 3.0), (1, 3.0)]


def test_one_failing_rank_fails_the_call_at_once() -> None:
    start_time = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 0 hangs.*rank 1 ended with exit code 1.*is unlucky"):
        on_ranks(2, _fail_on, 1)
    assert time.monotonic() - start_time < 30


def test_a_hanging_rank_is_shown_with_its_stack() -> None:
    with pytest.raises(AssertionError, match=r"(?s)within 5 s.*rank 0 hangs.*_fail_on"):
        on_ranks(1, _fail_on, 7, timeout_s=5)


def _first_then_others(failing_rank: int | None) -> list[str]:
    accelerator = start(DistributedConfig(), None)
    seen = []

    def work() -> str:
        if accelerator.process_index == failing_rank:
            raise UserError("no such file")
        return f"rank {accelerator.process_index}"

    try:
        seen.append(first_then_others(accelerator, work))
    except UserError as error:
        seen.append(str(error))
    accelerator.end_training()
    return seen


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_users_mistake_on_one_rank_stops_all(failing_rank: int) -> None:
    assert on_ranks(2, _first_then_others, failing_rank) == [["no such file"]] * 2


def test_every_rank_gets_its_own_result() -> None:
    assert on_ranks(2, _first_then_others, None) == [["rank 0"], ["rank 1"]]


@pytest.mark.parametrize(
    ("environment", "config", "precision", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, None, "asks for DEEPSPEED, which is not supported"),
        ({}, {"device": "cuda"}, None, "distributed.device is 'cuda', but torch finds no CUDA device"),
        ({}, {"processes": 2}, None, "distributed.processes is 2, but 1 started"),
        ({}, {"device": "cpu"}, "fp16", "precision fp16 needs CUDA"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {"device": "cpu"}, None, "asks for mixed_precision 'fp8'"),
    ],
)
def test_what_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    config: dict[str, object],
    precision: str,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        start(DistributedConfig(**config), precision)


def test_dropout_differs_by_step_and_rank_and_repeats() -> None:
    def draw(*where: int) -> float:
        seed_step(*where)
        return torch.rand(()).item()

    places = [(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)]
    draws = {place: draw(*place) for place in places}
    assert len(set(draws.values())) == len(places)
    assert draws == {place: draw(*place) for place in places}
