"""What this machine can run, for `mtl-dist doctor`: reads versions, asks torch, starts nothing, never fails."""

import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

PACKAGES = ("mtl_dist", "torch", "accelerate", "deepspeed", "transformers", "datasets")
CPUINFO = Path("/proc/cpuinfo")
LAUNCH_FILES = Path(__file__).parents[1] / "accelerate_configs"  # in the project's folder alone, not where pip installs
NATIVE_BF16 = {"amx_bf16", "avx512_bf16", "bf16"}  # instructions that multiply bf16; the last is Arm's
VARIABLES = (
    "ACCELERATE_USE_",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "SLURM_JOB_ID",
    "WORLD_SIZE",
)  # or what begins so


@dataclass(frozen=True)
class Device:
    """What computes, and in which precisions."""

    name: str
    fp32: str
    bf16: str
    fp16: str
    cores: int | None = None
    threads: int | None = None  # that this process may use
    memory_gib: float | None = None


@dataclass(frozen=True)
class Facts:
    """What there is; backends and engines say yes, or what is missing and the way out."""

    versions: dict[str, str | None]
    devices: dict[str, Device]
    backends: dict[str, str]
    engines: dict[str, str]
    environment: dict[str, str]  # what a launcher, or the user, has set
    slurm: list[str]  # commands
    launch_files: str  # their folder
    start: str  # the command that fits this machine


def facts() -> Facts:
    """Everything `mtl-dist doctor` knows."""
    torch = _torch()
    cpu, gpus = _cpu(), list(_gpus(torch))
    usable = [gpu for gpu in gpus if gpu.fp32 == "yes"]
    backends = _backends(torch, bool(usable))
    versions = {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}
    if torch is not None and backends["nccl"] == "yes":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return Facts(
        versions=versions,
        devices={"cpu": cpu} | {f"cuda:{i}": gpu for i, gpu in enumerate(gpus)},
        backends=backends,
        engines=_engines(torch, backends, versions),
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        slurm=[command for command in ("sbatch", "srun", "squeue") if shutil.which(command)],
        launch_files=_shown(LAUNCH_FILES)
        if LAUNCH_FILES.is_dir()
        else "no: they are in the project's folder, not here",
        start=_start(usable, cpu),
    )


def _torch() -> ModuleType | None:
    try:
        import torch
    except (ImportError, OSError):  # OSError where one of CUDA's libraries is missing
        return None
    return torch


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> Device:
    text = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""  # Linux alone has it
    processors = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in text.strip().split("\n\n")
    ]
    ours = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))
    here = [p for p in processors if "core id" in p and int(p.get("processor", -1)) in ours]
    cores = len({(p.get("physical id"), p["core id"]) for p in here}) or None
    instructions = (processors[0].get("flags") or processors[0].get("Features") or "").split()
    native = ", ".join(sorted(NATIVE_BF16.intersection(instructions)))
    bf16 = f"yes, native: {native}" if native else "yes, emulated: slow" if instructions else "yes, speed unknown"
    name = processors[0].get("model name") or platform.processor() or platform.machine()
    return Device(name, "yes", bf16, "no", cores, len(ours))


def _gpus(torch: ModuleType | None) -> Iterator[Device]:
    if torch is None or not torch.cuda.is_available():
        return
    for i in range(torch.cuda.device_count()):
        try:
            gpu = torch.cuda.get_device_properties(i)
        except RuntimeError as error:  # taken by another process, or broken
            yield Device(str(error).partition("\n")[0], "no", "no", "no")
            continue
        native = torch.version.hip is not None or gpu.major >= 8
        bf16 = "yes, native" if native else "no, emulated: use fp16"
        yield Device(gpu.name, "yes", bf16, "yes", memory_gib=round(gpu.total_memory / 2**30, 1))


def _backends(torch: ModuleType | None, gpus: bool) -> dict[str, str]:
    if torch is None or not torch.distributed.is_available():
        return dict.fromkeys(("gloo", "nccl"), "no: there is no torch with torch.distributed; see pytorch.org")
    gloo = "yes" if torch.distributed.is_gloo_available() else "no: this torch is built without it"
    if not torch.distributed.is_nccl_available():
        return {"gloo": gloo, "nccl": "no: this torch is built without it; pytorch.org has one for CUDA"}
    return {"gloo": gloo, "nccl": "yes" if gpus else "no: torch finds no GPU; see what nvidia-smi says"}


def _engines(
    torch: ModuleType | None, backends: Mapping[str, str], versions: Mapping[str, str | None]
) -> dict[str, str]:
    over = next((f"yes, over {name}" for name in ("nccl", "gloo") if backends[name] == "yes"), "no: needs gloo or nccl")
    split = zero = over.replace("gloo", "gloo: slow, to try it out") if over.startswith("yes") else over
    if versions["deepspeed"] is None:
        zero = "no: pip install 'mtl_dist[deepspeed]'"
    elif versions["transformers"] is None:  # accelerate takes a class from it whenever it starts DeepSpeed
        zero = "no: pip install transformers"
    one = "yes" if torch is not None else "no: torch cannot be imported; see pytorch.org"
    return {"one process": one, "DDP": over, "ZeRO-1, 2, 3": zero, "FSDP2": split}


def _start(gpus: list[Device], cpu: Device) -> str:
    precision = "bf16" if all(gpu.bf16.startswith("yes") for gpu in gpus) else "fp16"
    if len(gpus) > 1:
        file, options = f"ddp_{precision}.yaml", f" --num_processes {len(gpus)}" if len(gpus) != 8 else ""
        alone = f"--multi_gpu --num_processes {len(gpus)} --mixed_precision {precision}"
    elif gpus:
        file, options = "single_gpu.yaml", "" if precision == "bf16" else " --mixed_precision fp16"
        alone = f"--num_processes 1 --mixed_precision {precision}"
    elif cpu.threads == 1:
        return "mtl-dist train CONFIG"
    else:
        file, options = "cpu_2proc.yaml", ""
        alone = "--multi_gpu --num_processes 2 --mixed_precision no"  # which starts CPU processes where there is no GPU
    path = LAUNCH_FILES / file
    how = f"--config_file {shlex.quote(_shown(path))}{options}" if path.exists() else alone
    return f"accelerate launch {how} -m mtl_dist train CONFIG"


def _shown(path: Path) -> str:
    with suppress(OSError, ValueError):  # there may be no working folder any more
        return str(path.relative_to(Path.cwd()))
    return str(path)


def tables(facts: Facts) -> Iterator[RenderableType]:
    """The facts for people."""
    devices = _table("device", "", "fp32", "bf16", "fp16")
    for place, device in facts.devices.items():
        sizes = {"cores": device.cores, "threads": device.threads, "GiB": device.memory_gib}
        what = ", ".join([device.name, *(f"{size} {unit}" for unit, size in sizes.items() if size is not None)])
        devices.add_row(place, Text(what), *map(_answer, (device.fp32, device.bf16, device.fp16)))
    yield devices
    yield ""
    rest = _table()
    for name, answer in (facts.engines | facts.backends).items():
        rest.add_row(name, _answer(answer))
    variables = [f"{name}={value}" for name, value in facts.environment.items()]
    rest.add_row("versions", ", ".join(f"{name} {number or 'missing'}" for name, number in facts.versions.items()))
    rest.add_row("SLURM", ", ".join(facts.slurm) or "no commands on PATH")
    rest.add_row("launch files", Text(facts.launch_files))
    rest.add_row("environment", Text(", ".join(variables) or "nothing that matters is set"))
    yield rest
    start = re.sub(r"(?<=\.yaml) | (?=-m )", " \\\n    ", facts.start, count=1)
    yield Text("\nstart with:\n  " + start, no_wrap=True, overflow="ignore")


def _table(*columns: str) -> Table:
    return Table(*columns, show_header=bool(columns), header_style="bold", box=None, padding=(0, 2, 0, 0))


def _answer(answer: str) -> Text:
    # A plain string would be markup, which takes the brackets of 'mtl_dist[deepspeed]' for a style.
    return Text(answer, style="" if answer.startswith("yes") else "red")
