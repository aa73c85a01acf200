"""Runs a function on several gloo ranks, as a test would call it on one.

    losses = on_ranks(2, train_a_little, config)

Every rank is a process of its own. The call returns each rank's result; if any rank fails, or they are not done in
time, all are ended and the error shows what each of them had to say.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_ranks(
    world: int, function: Callable[..., T], *args: Any, timeout_s: float = 120, patience_s: float = 0
) -> list[T]:
    """The result of `function(*args)` on each of `world` ranks; it must be a module's own function.

    When one fails, the others have `patience_s` to end by themselves.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ranks are forked off a process that has imported what takes seconds, and done nothing else.
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["mtl_dist.training.loop", "torch.utils.tensorboard", "deepspeed"])
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world)]
        pipes = [spawn.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            spawn.Process(target=_rank, args=(rank, world, port, logs[rank], pipes[rank][1], function, args))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for _, sending in pipes:
            sending.close()  # so that a rank that dies is seen as an end of file
        try:
            results, failed = _collect([receiving for receiving, _ in pipes], time.monotonic() + timeout_s)
            if failed or len(results) < world:
                for process in ranks:
                    process.join(timeout=patience_s)
                raise AssertionError(_what_happened(ranks, logs, results, timeout_s))
            for process in ranks:
                process.join(timeout=30)
                assert process.exitcode == 0, _what_happened(ranks, logs, results, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return [results[rank] for rank in range(world)]


def _rank(
    rank: int, world: int, port: int, log: Path, results: Connection, function: Callable[..., Any], args: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        faulthandler.register(signal.SIGUSR2, file=stream, all_threads=True)  # where does this rank stand?
        try:
            # Pickled here: sent as they are, tensors would stay in the shared memory of a process that ends.
            results.send_bytes(pickle.dumps(function(*args)))
            if dist.is_initialized():
                dist.destroy_process_group()  # gloo's threads may abort a process that ends without it
        except BaseException:
            traceback.print_exc(file=stream)
            sys.exit(1)


def _collect(pipes: list[Connection], deadline: float) -> tuple[dict[int, Any], bool]:
    """What the ranks sent until all had, one died, or the time was over; and whether one died."""
    results: dict[int, Any] = {}
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    while open_pipes and (remaining := deadline - time.monotonic()) > 0:
        for pipe in wait(list(open_pipes), timeout=remaining):
            assert isinstance(pipe, Connection)
            try:
                results[open_pipes.pop(pipe)] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return results, True
    return results, False


def _what_happened(ranks: list[Any], logs: list[Path], results: dict[int, Any], timeout_s: float) -> str:
    for process in ranks:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR2)
    time.sleep(0.5)  # for the stacks to be written
    parts = [f"not all of {len(ranks)} ranks came through within {timeout_s:g} s"]
    for rank, (process, log) in enumerate(zip(ranks, logs, strict=True)):
        state = "hangs" if process.is_alive() else f"ended with exit code {process.exitcode}"
        parts.append(f"--- rank {rank} {'gave its result and ' if rank in results else ''}{state}\n{log.read_text()}")
    return "\n".join(parts)
