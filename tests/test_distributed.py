"""The harness itself: what it returns, and that no failure of a rank goes unseen."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState

from mtl_dist.config import UserError
from mtl_dist.distributed import DistributedConfig, first_then_others, lost_ranks, on_one, processes, seed_step, start
from tests.distributed import on_ranks
from tests.limits import limit
from tests.trained import ENGINES


def _sum_of_ranks() -> tuple[int, float]:
    state = PartialState(cpu=True)
    total = torch.tensor(float(state.process_index + 1))
    dist.all_reduce(total)
    return state.process_index, total.item()


def _fail_on(failing_rank: int) -> None:
    print("about to look")
    if os.environ["WORLD_SIZE"] != "1":
        _sum_of_ranks()  # all are there
    if os.environ["RANK"] == str(failing_rank):
        raise ValueError("this rank is unlucky")
    time.sleep(3600)


def test_ranks_talk_and_return_in_order() -> None:
    assert on_ranks(2, _sum_of_ranks) == [(0, 3.0), (1, 3.0)]


def test_one_failing_rank_fails_the_call_while_the_other_hangs() -> None:
    said = r"(?s)on 2 ranks: a rank failed.*rank 0 hangs.*_fail_on.*rank 1 ended with exit code 1.*is unlucky"
    with pytest.raises(AssertionError, match=said):
        on_ranks(2, _fail_on, 1)


def test_a_hanging_rank_is_shown_with_its_stack() -> None:
    with pytest.raises(AssertionError, match=r"(?s)not all came through within \d+ s.*rank 0 hangs.*_fail_on"):
        on_ranks(1, _fail_on, 7, timeout_s=5)


def _dirty() -> tuple[str | None, bool]:
    """What an earlier call may have left in this rank; leaves it there."""
    found = os.environ.get("LEFT_BEHIND"), hasattr(dist, "left_behind")
    os.environ["LEFT_BEHIND"] = dist.left_behind = "1"
    return found


def test_ranks_begin_clean_with_training_imported() -> None:
    for _ in range(2):
        assert on_ranks(1, _dirty) == [(None, False)]
    assert on_ranks(1, _modules, ["mtl_dist.training.loop", "torch._dynamo", "pandas"]) == [[]]


def _modules(names: list[str]) -> list[str]:
    """Those that are not imported yet."""
    return [name for name in names if name not in sys.modules]


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


def _one_works_for_long(engine: str, timeout_s: float, per_node: int) -> list[Any]:
    """The last rank that works first does so for three times as long as a rank waits in a collective."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ |= {**ENGINES[engine], "LOCAL_RANK": str(rank % per_node), "LOCAL_WORLD_SIZE": str(per_node)}
    accelerator = start(DistributedConfig(timeout_s=timeout_s), None)

    def work() -> float:
        if rank == world - per_node:
            time.sleep(3 * timeout_s)
        return time.time()

    finished = first_then_others(accelerator, work)
    told = on_one(accelerator, work)
    accelerator.end_training()
    return [rank, finished, told]


@pytest.mark.long
@pytest.mark.parametrize(("engine", "per_node"), [("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("ddp", 1)])
def test_who_works_for_long_is_waited_for(engine: str, per_node: int) -> None:
    nodes = 2 if engine == "ddp" else 1
    found = on_ranks(nodes * per_node, _one_works_for_long, engine, limit(3), per_node)
    firsts = [finished for rank, finished, _ in found if rank % per_node == 0]
    others = [finished for rank, finished, _ in found if rank % per_node]
    assert all(other >= max(firsts) for other in others)
    assert len({told for _, _, told in found}) == 1


def _fails_at_work(failing_rank: int, how: str, timeout_s: float) -> None:
    accelerator = start(DistributedConfig(timeout_s=timeout_s), None)

    def work() -> None:
        if accelerator.process_index == failing_rank:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("this rank is unlucky")

    with lost_ranks():
        first_then_others(accelerator, work)


@pytest.mark.long
@pytest.mark.parametrize(
    ("failing_rank", "how", "timeout_s", "message"),
    [
        (1, "dies", 4, r"rank 0: rank 1 is gone \(no sign of life for TIMEOUT s, distributed\.timeout_s\)"),
        # With rank 0 goes the list of who is there.
        (0, "dies", 500, r"rank 1: another rank is gone"),
        (0, "raises", 500, r"rank 1: (rank 0 is gone \(ValueError\)|another rank is gone)"),
        (1, "raises", 500, r"rank 0: rank 1 is gone \(ValueError\)"),
    ],
)
def test_who_fails_at_work_is_not_waited_for(failing_rank: int, how: str, timeout_s: float, message: str) -> None:
    timeout_s = ceil(limit(timeout_s))
    with pytest.raises(AssertionError, match=message.replace("TIMEOUT", str(timeout_s))):
        on_ranks(2, _fails_at_work, failing_rank, how, timeout_s, patience_s=30)


def _comes_late(timeout_s: float) -> None:
    with processes(DistributedConfig(timeout_s=timeout_s), None), lost_ranks():
        if os.environ["RANK"] == "1":
            time.sleep(3600)
        dist.all_reduce(torch.ones(1))


def test_who_does_not_come_is_told_with_the_setting() -> None:
    timeout_s = ceil(limit(3))
    message = rf"another rank did not come within {timeout_s} s, distributed\.timeout_s; what it printed last says why"
    with pytest.raises(AssertionError, match=f"rank 0: {message}"):
        on_ranks(2, _comes_late, timeout_s)


UNLUCKY = """
import os, sys, time
import torch
from mtl_dist.config import UserError
from mtl_dist.distributed import DistributedConfig, processes

with processes(DistributedConfig(), None):
    torch.distributed.barrier()
    if os.environ["RANK"] == "1":
        time.sleep(3600)
    sent = torch.distributed.all_reduce(torch.ones(1000), async_op=True)
    print("sent", file=sys.stderr, flush=True)
    raise eval(sys.argv[1])("this rank is unlucky")
"""


@pytest.mark.long
@pytest.mark.parametrize("error", ["ValueError", "UserError"])
def test_who_fails_beside_one_that_hangs_ends_at_once(error: str) -> None:
    # In processes of their own, because Python's exit could hang too.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", UNLUCKY, error]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        messages = ranks[0].stderr
        assert messages is not None
        assert "sent\n" in messages
        assert ranks[0].wait(timeout=limit(30)) == 1
        assert "this rank is unlucky" in messages.read()
        assert ranks[1].poll() is None
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def _parts(error: BaseException | None) -> tuple[int, bool]:
    with (
        patch("torch.distributed.destroy_process_group", wraps=dist.destroy_process_group) as destroy,
        suppress(UserError, ValueError),
        processes(DistributedConfig(), None),
    ):
        if error is not None:
            raise error
    return destroy.call_count, dist.is_initialized()


@pytest.mark.parametrize(
    ("error", "destroyed"), [(None, 1), (UserError("no such file"), 1), (ValueError("unlucky"), 0)]
)
def test_processes_part_in_order_but_for_a_failure(error: BaseException | None, destroyed: int) -> None:
    assert on_ranks(2, _parts, error) == [(destroyed, False)] * 2


@pytest.mark.parametrize(
    ("environment", "config", "precision", "message"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, None, "asks for Megatron-LM, which is not supported; use DDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, None, "need their processes started: accelerate launch"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, None, r"is 4; set gradients\.accumulation"),
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


@pytest.mark.parametrize(
    ("changes", "precision", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, None, "stage is 0; use 1, 2 or 3, or launch DDP"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, None, "offload_optimizer is not"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            None,
            "offload_param is not supported",
        ),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, None, "round_robin_gradients is not"),
        ({"optimizer": {"type": "Adam"}}, None, "optimizer is given in its config; remove it there, and set optim in"),
        ({"scheduler": {"type": "WarmupLR"}}, None, r"and set optim\.schedule in the experiment"),
        ({"gradient_clipping": 1.0}, None, r"and set gradients\.clip_norm in the experiment"),
        ({"gradient_accumulation_steps": 2}, None, r"and set gradients\.accumulation in the experiment"),
        (
            {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            "bf16",
            r"ZeRO-1 cannot add up bf16 gradients in fp32; use stage 2, or leave out data_types\.grad_accum_dtype",
        ),
        ({"fp16": {"enabled": True}}, None, "precision fp16 needs CUDA"),
        ("nowhere.json", None, "DeepSpeed's config cannot be used: .*nowhere.json"),
    ],
)
def test_what_deepspeed_cannot_do_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object] | str, precision: str, message: str
) -> None:
    path = tmp_path / "zero.json"
    if isinstance(changes, str):
        path = tmp_path / changes
    else:
        path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **changes}))
    for name, value in {"USE_DEEPSPEED": "true", "DEEPSPEED_CONFIG_FILE": str(path)}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=message):
        start(DistributedConfig(), precision)


@pytest.mark.parametrize(
    ("environment", "precision", "message"),
    [
        ({}, None, "asks for FSDP 1, which is not supported; set fsdp_version: 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, None, "fsdp_offload_params is not supported"),
        ({"FSDP_VERSION": "2"}, "fp16", "fp16 is not supported under FSDP2; use bf16 or fp32"),
    ],
)
def test_what_fsdp_cannot_do_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], precision: str, message: str
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "LOCAL_RANK": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        start(DistributedConfig(), precision)


def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl_dist.distributed.find_spec", lambda name: None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=r"not installed: pip install 'mtl_dist\[deepspeed\]'"):
        start(DistributedConfig(), None)


def test_dropout_differs_by_step_and_rank_and_repeats() -> None:
    def draw(*where: int) -> float:
        seed_step(*where)
        return torch.rand(()).item()

    places = [(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)]
    draws = {place: draw(*place) for place in places}
    assert len(set(draws.values())) == len(places)
    assert draws == {place: draw(*place) for place in places}
