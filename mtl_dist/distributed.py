"""Starts the processes as they were asked for, and keeps them of one mind.

Whatever was asked for and is not there (processes, CUDA, a precision, an engine) is an error, never a quiet fallback.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    gather_object,
    str_to_bool,
)
from pydantic import Field, PositiveInt

from mtl_dist.config import Config, UserError

Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")


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
    finally:
        # Models first: gloo sometimes aborts at exit while DDP still holds the process group.
        accelerator.free_memory()
        gc.collect()
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)  # so that a later run may be of another precision


def start(config: DistributedConfig, precision: Precision | None) -> Accelerator:
    """Joins the processes, after checking that what was asked for is there."""
    for engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if _launcher_says(f"ACCELERATE_USE_{engine}"):
            raise UserError(f"the launcher asks for {engine}, which is not supported; launch with DDP instead")
    cpu = config.device == "cpu" or (config.device == "auto" and _launcher_says("ACCELERATE_USE_CPU"))
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("distributed.device is 'cuda', but torch finds no CUDA device here")
    if config.device == "cuda" and _launcher_says("ACCELERATE_USE_CPU"):
        raise UserError("distributed.device is 'cuda', but the launcher says use_cpu")
    cpu = cpu or not torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.processes not in (None, world):
        raise UserError(
            f"distributed.processes is {config.processes}, but {world} started; "
            "`accelerate launch --config_file accelerate_configs/cpu_2proc.yaml` starts two on a CPU"
        )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    mixed = launched if precision is None else precision.replace("fp32", "no")
    _check_precision(mixed, cpu)

    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        kwargs_handlers=[
            InitProcessGroupKwargs(
                backend="gloo" if cpu and world > 1 else None, timeout=timedelta(seconds=config.timeout_s)
            ),
            # A step's last micro-batch uses one task's head only.
            DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
        ],
    )
    assert accelerator.num_processes == world, f"{world} processes were asked for, {accelerator.num_processes} came"
    assert accelerator.device.type == ("cpu" if cpu else "cuda")
    expected = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    assert accelerator.distributed_type in expected, f"unexpected engine {accelerator.distributed_type}"
    return accelerator


def _launcher_says(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))


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
    return f"{processes} on {device}{threads}, {accelerator.mixed_precision.replace('no', 'fp32')}"


def first_then_others(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Runs `work` on one process of each node, then on the others, which find its files; a UserError stops them all."""
    first = accelerator.is_local_main_process
    (result,) = [*_where(accelerator, first, work), *_where(accelerator, not first, work)]
    return result


def on_one(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Runs `work` on one process of all; a UserError stops them all."""
    _where(accelerator, accelerator.is_main_process, work)


def _where(accelerator: Accelerator, here: bool, work: Callable[[], T]) -> list[T]:
    """The result of `work` on the processes with `here`; raises on every process the UserError that any of them has."""
    result: list[T] = []
    error: str | None = None
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


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes this step's dropout a function of (seed, step, rank), so that it needs no saved state."""
    # Odd factors spread the three numbers over 63 bits; neighbours do not meet in a run's lifetime.
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63)
