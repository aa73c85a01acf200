"""Runs a function on several gloo ranks, as a test would call it on one.

    losses = on_ranks(2, train_a_little, config)

Every rank is a process of its own, forked off one that has imported what training takes (tests/warm.py): it costs a
fraction of a second, and nothing that a test leaves behind is there for the next. The call returns each rank's result;
if any rank fails, or they are not done in time, all are ended and the error shows what each of them had to say.
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

from tests.limits import limit

T = TypeVar("T")


def on_ranks(
    world: int, function: Callable[..., T], *args: Any, timeout_s: float = 200, patience_s: float = 0
) -> list[T]:
    """The result of `function(*args)` on each of `world` ranks; it must be a module's own function.

    When one fails, the others have `patience_s` to end by themselves. Both limits grow with how slow the machine is.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["tests.warm"])
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
            results, gone = _collect([receiving for receiving, _ in pipes], time.monotonic() + limit(timeout_s))
            what = "a rank failed" if gone else f"not all came through within {limit(timeout_s):.0f} s"
            if len(results) == world:
                what, gone = "a rank did not end well", list(range(world))
            for rank in gone:  # they are about to end, if they have not yet
                ranks[rank].join(timeout=limit(30))
            if [process.exitcode for process in ranks] != [0] * world:
                for process in ranks:
                    process.join(timeout=limit(patience_s))
                raise AssertionError(_what_happened(what, ranks, logs, results))
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


def _collect(pipes: list[Connection], deadline: float) -> tuple[dict[int, Any], list[int]]:
    """What the ranks sent until all had, one died, or the time was over; and which one died."""
    results: dict[int, Any] = {}
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    while open_pipes and (remaining := deadline - time.monotonic()) > 0:
        for pipe in wait(list(open_pipes), timeout=remaining):
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return results, [rank]
    return results, []


def _what_happened(what: str, ranks: list[Any], logs: list[Path], results: dict[int, Any]) -> str:
    for process in ranks:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR2)
    time.sleep(limit(0.5))  # for the stacks to be written
    parts = [f"on {len(ranks)} ranks: {what}"]
    for rank, (process, log) in enumerate(zip(ranks, logs, strict=True)):
        state = "hangs" if process.is_alive() else f"ended with exit code {process.exitcode}"
        parts.append(f"--- rank {rank} {'gave its result and ' if rank in results else ''}{state}\n{log.read_text()}")
    return "\n".join(parts)
