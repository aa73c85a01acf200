"""Starts the processes as they were asked for, and keeps them of one mind.

Whatever was asked for and is not there (processes, CUDA, a precision, an engine) is an error, never a quiet fallback.
"""

import ctypes
import faulthandler
import gc
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.util import find_spec
from itertools import count
from threading import Event, Thread
from typing import Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    gather_object,
    str_to_bool,
)
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.distributed.distributed_c10d import (
    PrefixStore,
    Store,
    _abort_process_group,
    _get_default_store,
    _world,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from mtl_dist.config import Config, UserError, differences

Precision = Literal["fp32", "bf16", "fp16"]
EngineName = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
ENGINES: dict[EngineName, str] = {  # as people call them
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
}
T = TypeVar("T")
PATIENCE_S = 5  # with the others, of a process that ends with an error


class DistributedConfig(Config):
    """What the run needs of the machine; how many processes there are is the launcher's business."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one, unless the launcher says CPU
    processes: PositiveInt | None = None  # refuses to start on any other number
    timeout_s: float = Field(1800, gt=0, le=1e9)  # how long a process waits for the others before it gives up


@contextmanager
def processes(config: DistributedConfig, precision: Precision | None) -> Iterator[Accelerator]:
    """The processes of this run, from joining them to parting; `precision` None takes the launcher's."""
    accelerator = start(config, precision)
    try:
        yield accelerator
    except BaseException as error:
        _leave_at_once(orderly=isinstance(error, UserError))  # which most often all of them have
        raise
    else:
        # Models first: gloo sometimes aborts at exit while DDP still holds the process group.
        accelerator.free_memory()
        gc.collect()
        accelerator.end_training()
    finally:
        # So that a later one, if alone, may be of another precision.
        AcceleratorState._reset_state(reset_partial_state=True)


def _leave_at_once(orderly: bool) -> None:
    """Parts from the others, who may be waiting for this process, or hang, without waiting for them."""
    if not torch.distributed.is_initialized():
        return
    for group in list(_world.pg_map):
        # Never freed: gloo's groups wait in that for all that was begun, until it fails after `distributed.timeout_s`.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    # NCCL's kernels end when they are aborted only; the orderly way waits for the others.
    leave = torch.distributed.destroy_process_group if orderly else _abort_process_group
    leaving = Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(PATIENCE_S)


def start(config: DistributedConfig, precision: Precision | None) -> Accelerator:
    """Joins the processes, after checking that what was asked for is there."""
    if _launcher_says("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("the launcher asks for Megatron-LM, which is not supported; use DDP, DeepSpeed or FSDP2")
    deepspeed, fsdp = _launcher_says("ACCELERATE_USE_DEEPSPEED"), _launcher_says("ACCELERATE_USE_FSDP")
    if (deepspeed or fsdp) and "LOCAL_RANK" not in os.environ:
        raise UserError("DeepSpeed and FSDP2 need their processes started: accelerate launch -m mtl_dist train CONFIG")
    if (accumulation := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) not in ("1", "auto"):
        raise UserError(
            f"the launcher's gradient_accumulation_steps is {accumulation}; "
            "set gradients.accumulation in the experiment"
        )
    cpu = config.device == "cpu" or (config.device == "auto" and _launcher_says("ACCELERATE_USE_CPU"))
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("distributed.device is 'cuda', but torch finds no CUDA device here")
    if config.device == "cuda" and _launcher_says("ACCELERATE_USE_CPU"):
        raise UserError("distributed.device is 'cuda', but the launcher says use_cpu")
    if cpu and (deepspeed or fsdp) and torch.cuda.is_available():
        raise UserError("DeepSpeed and FSDP2 take the GPUs where there are some; hide them: CUDA_VISIBLE_DEVICES=''")
    cpu = cpu or not torch.cuda.is_available()
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where DeepSpeed is installed, it would warn that it chose so
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.processes not in (None, world):
        raise UserError(
            f"distributed.processes is {config.processes}, but {world} started; "
            f"`accelerate launch --multi_gpu --num_processes {config.processes} -m mtl_dist train CONFIG` starts them "
            "on GPUs, `--config_file accelerate_configs/cpu_2proc.yaml` two on a CPU"
        )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    mixed = launched if precision is None else precision.replace("fp32", "no")
    timeout = timedelta(seconds=config.timeout_s)
    options: dict[str, Any] = {"cpu": cpu}
    if deepspeed:
        plugin = _deepspeed_plugin(precision)
        mixed = deepspeed_precision(plugin.deepspeed_config)
        options = {"deepspeed_plugin": plugin}
    elif fsdp:
        options = {"fsdp_plugin": _fsdp_plugin(mixed)}
    _check_precision(mixed, cpu)
    if cpu and (deepspeed or fsdp):
        _let_accelerate_use_cpus(timeout)

    try:
        accelerator = Accelerator(
            **options,
            mixed_precision=mixed,
            kwargs_handlers=[
                InitProcessGroupKwargs(backend="gloo" if cpu and (world > 1 or deepspeed) else None, timeout=timeout),
                # A step's last micro-batch uses one task's head only.
                DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
            ],
        )
    except torch.distributed.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the processes cannot meet at {where}: {str(error).splitlines()[0]}; give them another port by "
            "--main_process_port or MASTER_PORT"
        ) from error
    assert accelerator.num_processes == world, f"{world} processes were asked for, {accelerator.num_processes} came"
    assert accelerator.device.type == ("cpu" if cpu else "cuda")
    expected = [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU]
    if deepspeed or fsdp:
        expected = [DistributedType.DEEPSPEED if deepspeed else DistributedType.FSDP]
    assert accelerator.distributed_type in expected, f"unexpected engine {accelerator.distributed_type}"
    return accelerator


def launched(precision: Precision | None) -> tuple[EngineName, Precision]:
    """What would train, and in which precision, as the launcher says; nothing is started."""
    if _launcher_says("ACCELERATE_USE_DEEPSPEED"):
        config = _deepspeed_plugin(precision).deepspeed_config
        zero: dict[int, EngineName] = {1: "zero1", 2: "zero2", 3: "zero3"}
        return zero[config["zero_optimization"]["stage"]], _precision_named(deepspeed_precision(config))
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    engine: EngineName = "fsdp2" if _launcher_says("ACCELERATE_USE_FSDP") else "ddp"
    return engine, precision or _precision_named(mixed)


def _launcher_says(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))


def _deepspeed_plugin(precision: Precision | None) -> DeepSpeedPlugin:
    """What the launcher says of DeepSpeed, after checking that nothing in it contradicts the experiment."""
    # Accelerate reads DeepSpeed's config with the help of transformers.
    if find_spec("deepspeed") is None or find_spec("transformers") is None:
        raise UserError("the launcher asks for DeepSpeed, which is not installed: pip install 'mtl_dist[deepspeed]'")
    try:
        plugin = DeepSpeedPlugin()
    except ValueError as error:
        raise UserError(f"DeepSpeed's config cannot be used: {error}") from error
    # DeepSpeed calls collectives by names that torch 2.13 gives up; one warning for each call would drown our lines.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    if zero.get("stage", 0) not in (1, 2, 3):
        raise UserError(f"DeepSpeed's zero_optimization.stage is {zero.get('stage', 0)}; use 1, 2 or 3, or launch DDP")
    for offload in ("offload_optimizer", "offload_param"):
        if zero.get(offload, {}).get("device", "none") != "none":
            raise UserError(f"DeepSpeed's zero_optimization.{offload} is not supported; leave it out")
    if zero.get("round_robin_gradients"):  # it keeps parameters elsewhere than it says
        raise UserError("DeepSpeed's zero_optimization.round_robin_gradients is not supported; leave it out")
    for key, ours in DEEPSPEED_KEYS.items():
        if config.get(key, "auto") not in ("auto", 0, *([1] if key == "gradient_accumulation_steps" else [])):
            raise UserError(
                f"DeepSpeed's {key} is given in its config; remove it there, and set {ours} in the experiment"
            )
    for name in ("bf16", "fp16"):
        if precision is not None:
            config[name] = {**config.get(name, {}), "enabled": precision == name}
    accumulates_in = config.get("data_types", {}).get("grad_accum_dtype")
    if zero["stage"] == 1 and deepspeed_precision(config) == "bf16" and accumulates_in == "fp32":
        raise UserError(
            "ZeRO-1 cannot add up bf16 gradients in fp32; use stage 2, or leave out data_types.grad_accum_dtype"
        )
    # How many rows a step has, and on which rank, is decided by the experiment.
    config.pop("train_batch_size", None)
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    return plugin


DEEPSPEED_KEYS = {  # and what in the experiment decides in their place
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "gradient_clipping": "gradients.clip_norm",
    "gradient_accumulation_steps": "gradients.accumulation",
}


def deepspeed_precision(config: Mapping[str, Any]) -> str:
    """The precision of a DeepSpeed config, in Accelerate's words."""
    return next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True), "no")


def _fsdp_plugin(mixed: str) -> FullyShardedDataParallelPlugin:
    """What the launcher says of FSDP; gradients are averaged in fp32, whatever the precision of the products."""
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError("the launcher asks for FSDP 1, which is not supported; set fsdp_version: 2")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("FSDP's fsdp_offload_params is not supported; leave it out")
    if mixed == "fp16":
        raise UserError("precision fp16 is not supported under FSDP2; use bf16 or fp32")
    if mixed == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    return plugin


def _let_accelerate_use_cpus(timeout: timedelta) -> None:
    """Accelerate runs DeepSpeed and FSDP2 on GPUs; without any, this makes it take CPU processes in their place."""
    os.environ.pop("ACCELERATE_USE_CPU", None)  # which turns either of them into DDP
    if _launcher_says("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does; to compile it takes a minute
    else:
        PartialState(backend="gloo", timeout=timeout)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _check_precision(precision: str, cpu: bool) -> None:
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"the launcher asks for mixed_precision {precision!r}; supported are 'no', 'bf16' and 'fp16'")
    if precision == "fp16" and cpu:
        raise UserError("precision fp16 needs CUDA; use bf16 or fp32 on a CPU")
    if precision == "bf16" and not cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"precision bf16 is not supported by {torch.cuda.get_device_name()}; use fp16 or fp32")


def describe(accelerator: Accelerator) -> str:
    """What the run runs on, in one line."""
    processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} thread(s) each" if accelerator.device.type == "cpu" else ""
    engine = f", {engine_name(accelerator)}" if accelerator.num_processes > 1 else ""
    return f"{processes} on {device}{threads}{engine}, {precision_of(accelerator)}"


def engine_name(accelerator: Accelerator) -> str:
    """What trains, as people call it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP2"
    return "DDP" if accelerator.num_processes > 1 else "one process"


def precision_of(accelerator: Accelerator) -> Precision:
    """In which precision the model computes."""
    return _precision_named(accelerator.mixed_precision)


def _precision_named(mixed: Any) -> Precision:
    """What Accelerate calls a precision, as we do."""
    precision: Precision = mixed.replace("no", "fp32")
    return precision


def autocast(accelerator: Accelerator) -> torch.autocast:
    """Makes a model that no engine wraps compute in the run's precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision_of(accelerator))
    return torch.autocast(accelerator.device.type, dtype=dtype, enabled=dtype is not None)


def first_then_others(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Runs `work` on one process of each node, then on the others, which find its files; a UserError stops them all."""
    first = accelerator.is_local_main_process
    (result,) = [*_where(accelerator, first, work), *_where(accelerator, not first, work)]
    return result


def on_one(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Runs `work` on one process of all, which tells the others what came of it; a UserError stops them all."""
    result: T = gather_object(_where(accelerator, accelerator.is_main_process, work))[0]
    return result


def _where(accelerator: Accelerator, here: bool, work: Callable[[], T]) -> list[T]:
    """The result of `work` on the processes with `here`; raises on every process the UserError that any of them has."""
    result: list[T] = []
    error: str | None = None
    with _however_long():
        if here:
            try:
                result.append(work())
            except UserError as refused:
                error = str(refused)
    errors = gather_object([error])
    first = next((found for found in errors if found is not None), None)
    if first is not None:
        raise UserError(first)
    return result


_meetings = count()  # how often the processes have waited for each other; the same on all of them
BEATS = 8  # signs of life in the time after which a process without any is gone
ALL_DONE = "all done"


@contextmanager
def _however_long() -> Iterator[None]:
    """Leaves when every process wants to leave, for which they wait as long as those who work are alive.

    A collective ends after `distributed.timeout_s`, whatever the others do meanwhile. So they meet in the store that
    they found each other by.
    """
    if not torch.distributed.is_initialized() or (world := torch.distributed.get_world_size()) == 1:
        yield
        return
    rank, common = torch.distributed.get_rank(), _get_default_store()
    timeout: timedelta = common.timeout  # type: ignore[attr-defined]
    store, timeout_s = PrefixStore(f"mtl_dist/{next(_meetings)}", common), timeout.total_seconds()
    done = Event()
    life = Thread(target=_live, args=(store, rank, timeout_s / BEATS, done), daemon=True)
    life.start()
    try:
        try:
            yield
        finally:
            done.set()
            life.join()
        store.set(f"done/{rank}", "")
        if store.add("done", 1) == world:
            store.set("end", ALL_DONE)
        end = _end(store, world, timeout_s)
    except torch.distributed.DistNetworkError as error:
        raise _gone("another rank is gone, and with it the list of who is there") from error
    except BaseException as error:
        with suppress(torch.distributed.DistError):
            store.set("end", f"rank {rank} is gone ({type(error).__name__})")
        raise
    if end != ALL_DONE:
        raise _gone(end)


def _live(store: Store, rank: int, every_s: float, done: Event) -> None:
    """Gives signs of life."""
    with suppress(torch.distributed.DistError):  # the other thread will hear of it
        while not done.wait(every_s):
            store.add(f"alive/{rank}", 1)


def _end(store: Store, world: int, timeout_s: float) -> str:
    """Waits until all are done, or one is gone; says which."""
    signs, silent = [0] * world, [0] * world
    pause_s, paused_s = 0.01, 0.0
    while not store.check(["end"]):
        time.sleep(pause_s)
        paused_s += pause_s  # not by the clock, which runs on while a process is suspended
        pause_s = min(1.2 * pause_s, 1.0, timeout_s / BEATS)
        if paused_s < timeout_s / BEATS:
            continue
        paused_s = 0.0
        for rank in range(world):
            heard = store.add(f"alive/{rank}", 0)
            silent[rank] = silent[rank] + 1 if heard == signs[rank] and not store.check([f"done/{rank}"]) else 0
            signs[rank] = heard
            if silent[rank] > BEATS:
                return f"rank {rank} is gone (no sign of life for {timeout_s:g} s, distributed.timeout_s)"
    return store.get("end").decode()


def _gone(who: str) -> SystemExit:
    """What ends this rank because another one has ended."""
    return SystemExit(f"rank {torch.distributed.get_rank()}: {who}; what it printed last says why")


STOPPING = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)


class Stops:
    """Hears USR1, TERM, HUP and INT, at any moment; the run ends at a step of its choice, the same on all ranks.

    After each step every rank votes. What all of them voted may become known a step later.

    INT, which is Ctrl-C, ends this process at once if a stop was heard before, or no step is done that could be saved.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.heard = 0
        self.stepped = False
        self.alone = accelerator.num_processes == 1
        self.first = accelerator.is_main_process

    def __enter__(self) -> Self:
        # `nohup` and a shell's background jobs ignore these two for what they start.
        kept = {each for each in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(each) is signal.SIG_IGN}
        self.before = {each: signal.signal(each, self._hear) for each in STOPPING if each not in kept}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self.before.items():
            # Clusters say it again, and a process that has saved must not die of that.
            if not self.heard or each == signal.SIGINT:
                signal.signal(each, handler)

    def _hear(self, number: int, frame: object) -> None:
        again = number == signal.SIGTERM and self.heard == signal.SIGINT  # a launcher passes the second one on so
        if again or (number == signal.SIGINT and (self.heard or not self.stepped)):
            raise KeyboardInterrupt
        if number == signal.SIGINT and self.first:
            _say("\nSIGINT: the run is saved after this step, and ends; once more ends it at once")
        self.heard = max(self.heard, number)

    def votes(self) -> list[float]:
        """For each stopping signal, whether this rank heard it last."""
        self.stepped = True
        return [float(self.heard == each) for each in STOPPING]

    def agreed(self, votes: Sequence[float]) -> signal.Signals | None:
        """The signal that any rank heard, from the sums of all ranks' votes."""
        if self.alone:  # and nobody to wait for
            return signal.Signals(self.heard) if self.heard else None
        return max((each for each, vote in zip(STOPPING, votes, strict=True) if vote), default=None)


def refuse_differences(accelerator: Accelerator, mine: Mapping[str, Any]) -> None:
    """Stops ranks that are about to train different things, naming the first key that differs."""
    theirs = gather_object([mine])
    for rank, other in enumerate(theirs):
        if found := differences(theirs[0], other):
            key, first, there = found[0]
            raise UserError(f"the ranks differ: {key} is {first} on rank 0, and {there} on rank {rank}")


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Ends this rank with one line where another one has died."""
    try:
        yield
    except RuntimeError as error:
        cut = re.search(
            r"Connection \w+ by peer|Timed out waiting|Broken pipe|NCCL communicator was aborted", str(error)
        )
        if cut is None:
            raise
        timeout: timedelta = _get_default_store().timeout  # type: ignore[attr-defined]
        waited = f"did not come within {timeout.total_seconds():g} s, distributed.timeout_s"
        late = cut[0] == "Timed out waiting"
        raise _gone(f"another rank {waited if late else f'is gone ({cut[0]})'}") from error


def _say(line: str) -> None:
    """Tells the user, whatever Python is in the middle of."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


class Watchdog:
    """Ends a rank that stands still for longer than the others may wait, after showing where all its threads are."""

    def __init__(self, timeout_s: float, world: int) -> None:
        self.timeout_s = timeout_s if world > 1 else None
        self.signs = 0  # of this rank's going on
        self.over = Event()

    def __enter__(self) -> Self:
        if self.timeout_s is not None:
            self.guard = Thread(target=self._guard, args=(self.timeout_s,), daemon=True)
            self.guard.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.timeout_s is not None:
            self.over.set()
            self.guard.join()
            faulthandler.cancel_dump_traceback_later()

    def watch(self) -> None:
        """Says that this rank goes on."""
        self.signs += 1

    def _guard(self, timeout_s: float) -> None:
        look_s = min(1.0, timeout_s / 10)
        signs, still_s, rank = -1, 0.0, torch.distributed.get_rank()
        while True:
            if signs != self.signs:
                signs, still_s = self.signs, 0.0
                # For a library that stands still with Python's lock, which stops this thread too: shows it all the
                # same, but does not end it, because it goes by the clock.
                faulthandler.dump_traceback_later(timeout_s + 10 * look_s, file=2)
            start = time.monotonic()
            if self.over.wait(look_s):
                return
            # Not by the clock, which runs on while a run is suspended.
            still_s += look_s
            if (suspended_s := time.monotonic() - start) > timeout_s:
                _say(f"rank {rank}: was suspended, or stood still as a whole, for {suspended_s:.0f} s; it goes on")
            if still_s >= timeout_s:
                _say(f"rank {rank}: no step for {timeout_s:g} s (distributed.timeout_s); where its threads stand:")
                faulthandler.dump_traceback(file=2)
                os._exit(1)


class _AllRanksRows(torch.autograd.Function):
    """Gradients go back to the rank that a row came from, those of all ranks' losses added up."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, rows_W: Sequence[int]) -> Tensor:
        ctx.rows_W, ctx.here = rows_W, len(rows_ND)
        rank, most = dist.get_rank(), max(rows_W)
        mine_MD = rows_ND.new_zeros(most, rows_ND.shape[1])
        mine_MD[: rows_W[rank]] = rows_ND[: rows_W[rank]]
        theirs = [torch.empty_like(mine_MD) for _ in rows_W]
        dist.all_gather(theirs, mine_MD)
        return torch.cat([their_MD[:rows] for their_MD, rows in zip(theirs, rows_W, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient_VD = gradients[0].contiguous()
        dist.all_reduce(gradient_VD)
        rank = dist.get_rank()
        first, rows = sum(ctx.rows_W[:rank]), ctx.rows_W[rank]
        mine_ND = gradient_VD.new_zeros(ctx.here, gradient_VD.shape[1])
        mine_ND[:rows] = gradient_VD[first : first + rows]
        return mine_ND, None


def all_ranks_rows(rows_ND: Tensor, rows_W: Sequence[int]) -> Tensor:
    """The rows of all ranks, one rank's after the other's; what a rank has beyond its number of rows is left out.

    Every rank must ask for them, and go backward through them.
    """
    if len(rows_W) == 1:
        return rows_ND
    return _AllRanksRows.apply(rows_ND, rows_W)  # type: ignore[no-any-return, no-untyped-call]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes this step's dropout a function of (seed, step, rank), so that it needs no saved state."""
    # Odd factors spread the three numbers over 63 bits; neighbours do not meet in a run's lifetime.
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63)
