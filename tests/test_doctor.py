"""What `mtl-dist doctor` says of machines that are not this one."""

import io
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from mtl_dist import doctor
from mtl_dist.doctor import Facts, facts, tables

GIB = 2**30
V100 = SimpleNamespace(name="Tesla V100-SXM2-16GB", total_memory=16 * GIB, major=7)
H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=int(79.6 * GIB), major=9)
XEON = """\
processor\t: {}
model name\t: Xeon 9 @ 2GHz
physical id\t: 0
core id\t\t: {}
flags\t\t: fpu {}
"""


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPU, launcher and SLURM, with four processors, whatever this one is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(doctor, "version", lambda package: "1.2.3")
    for variable in [name for name in os.environ if name.startswith(doctor.VARIABLES)]:
        monkeypatch.delenv(variable)


def with_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: SimpleNamespace) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpus[i])
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    def version(package: str) -> str:
        if package in missing:
            raise PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr(doctor, "version", version)


def with_cpuinfo(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    (folder / "cpuinfo").write_text(text)
    monkeypatch.setattr(doctor, "CPUINFO", folder / "cpuinfo")


def screen(found: Facts, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    for part in tables(found):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_cpu_machine() -> None:
    found = facts()
    assert list(found.devices) == ["cpu"]
    assert (found.devices["cpu"].fp32, found.devices["cpu"].fp16) == ("yes", "no")
    assert found.backends["gloo"] == "yes"
    assert found.backends["nccl"].startswith("no: this torch is built without it")
    slow = "yes, over gloo: slow, to try it out"
    assert found.engines == {"one process": "yes", "DDP": "yes, over gloo", "ZeRO-1, 2, 3": slow, "FSDP2": slow}
    assert "nccl" not in found.versions


def test_a_torch_for_cuda_on_a_machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    found = facts()
    assert found.backends["nccl"] == "no: torch finds no GPU; see what nvidia-smi says"
    assert found.engines["DDP"] == "yes, over gloo"


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, H100, V100)
    found = facts()
    new, old = found.devices["cuda:0"], found.devices["cuda:1"]
    assert (new.name, new.memory_gib, new.bf16, new.fp16) == ("NVIDIA H100 80GB HBM3", 79.6, "yes, native", "yes")
    assert (old.memory_gib, old.bf16, old.fp16) == (16.0, "no, emulated: use fp16", "yes")
    assert found.versions["nccl"] == "2.27.3"
    assert found.engines == dict.fromkeys(("DDP", "ZeRO-1, 2, 3", "FSDP2"), "yes, over nccl") | {"one process": "yes"}


def test_a_gpu_that_fails_is_told_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, H100)

    def fail(_: int) -> None:
        raise RuntimeError("CUDA error: device is busy [/x]\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    found = facts()
    assert found.devices["cuda:0"].fp32 == "no"
    assert "CUDA error: device is busy [/x]" in screen(found, 140)
    assert found.backends["nccl"].startswith("no: torch finds no GPU")
    assert "cpu_2proc" in found.start


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "deepspeed", "transformers")
    found = facts()
    assert found.versions["deepspeed"] is None
    assert found.engines["ZeRO-1, 2, 3"] == "no: pip install 'mtl_dist[deepspeed]'"
    assert "pip install 'mtl_dist[deepspeed]'" in screen(found, 80)  # brackets and all
    assert found.engines["FSDP2"].startswith("yes")
    without(monkeypatch, "transformers")
    assert facts().engines["ZeRO-1, 2, 3"] == "no: pip install transformers"


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    without(monkeypatch, "torch")
    found = facts()
    assert {answer.partition(":")[0] for answer in (found.engines | found.backends).values()} == {"no"}
    assert "torch missing" in screen(found, 140)


def test_the_cores_and_bf16_of_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Four processors are ours: two threads each of cores 0 and 1. Core 2 is not.
    cores = [0, 0, 1, 1, 2]
    for flags, bf16 in (
        ("sse amx_bf16 avx512_bf16", "yes, native: amx_bf16, avx512_bf16"),
        ("", "yes, emulated: slow"),
    ):
        text = "\n".join(XEON.format(i, core, flags) for i, core in enumerate(cores))
        with_cpuinfo(monkeypatch, tmp_path, text)
        cpu = facts().devices["cpu"]
        assert (cpu.name, cpu.cores, cpu.threads, cpu.bf16) == ("Xeon 9 @ 2GHz", 2, 4, bf16)
    with_cpuinfo(monkeypatch, tmp_path, "processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd bf16\n")  # Arm
    cpu = facts().devices["cpu"]
    assert (cpu.cores, cpu.threads, cpu.bf16) == (None, 4, "yes, native: bf16")


def test_no_cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "none")
    cpu = facts().devices["cpu"]
    assert (cpu.cores, cpu.threads, cpu.bf16) == (None, 4, "yes, speed unknown")
    assert "4 threads" in screen(facts(), 80)


def test_what_a_launcher_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts().environment == {}
    assert "nothing that matters is set" in screen(facts(), 80)
    given = {"WORLD_SIZE": "8", "SLURM_JOB_ID": "71", "ACCELERATE_USE_FSDP": "true", "HF_HUB_OFFLINE": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor.shutil, "which", lambda command: "/bin/srun" if command == "srun" else None)
    found = facts()
    assert (found.environment, found.slurm) == (given, ["srun"])
    assert "ACCELERATE_USE_FSDP=true, HF_HUB_OFFLINE=1, SLURM_JOB_ID=71, WORLD_SIZE=8" in screen(found, 140)


@pytest.mark.parametrize(
    ("gpus", "threads", "start"),
    [
        ([], 1, None),
        ([], 4, "cpu_2proc.yaml"),
        ([H100], 4, "single_gpu.yaml"),
        ([V100], 4, "single_gpu.yaml --mixed_precision fp16"),
        ([H100] * 8, 4, "ddp_bf16.yaml"),
        ([H100] * 3, 4, "ddp_bf16.yaml --num_processes 3"),
        ([H100, V100], 4, "ddp_fp16.yaml --num_processes 2"),
    ],
)
def test_the_command_that_fits(
    gpus: list[SimpleNamespace], threads: int, start: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpus:
        with_gpus(monkeypatch, *gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(threads)), raising=False)
    monkeypatch.chdir(Path(__file__).parents[1])
    command = facts().start
    if start is None:
        assert command == "mtl-dist train CONFIG"
    else:
        assert command == f"accelerate launch --config_file accelerate_configs/{start} -m mtl_dist train CONFIG"
        assert (Path(__file__).parents[1] / command.split()[3]).exists()


def test_away_from_the_project_the_launch_file_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = facts().start.split()
    assert Path(command[3]).is_absolute() and Path(command[3]).exists()
    assert facts().launch_files == str(Path(__file__).parents[1] / "accelerate_configs")


@pytest.mark.parametrize(
    ("gpus", "options"),
    [
        ([], "--multi_gpu --num_processes 2 --mixed_precision no"),
        ([H100], "--num_processes 1 --mixed_precision bf16"),
        ([V100] * 3, "--multi_gpu --num_processes 3 --mixed_precision fp16"),
    ],
)
def test_without_launch_files_the_command_needs_none(
    gpus: list[SimpleNamespace], options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpus:
        with_gpus(monkeypatch, *gpus)
    monkeypatch.setattr(doctor, "LAUNCH_FILES", tmp_path / "accelerate_configs")
    found = facts()
    assert found.start == f"accelerate launch {options} -m mtl_dist train CONFIG"
    assert found.launch_files.startswith("no: ")
    assert screen(found, 80).endswith(f"  accelerate launch {options} \\\n    -m mtl_dist train CONFIG\n")


@pytest.mark.parametrize("width", [80, 140])
def test_the_screen_shows_every_fact(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, H100, V100)
    without(monkeypatch, "deepspeed")
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.chdir(Path(__file__).parents[1])
    found = facts()
    shown = screen(found, width)
    assert max(map(len, shown.splitlines())) <= width
    words = shown.replace(",", " ").split()
    told = [found.versions, found.backends, found.engines, found.environment, found.start.split()]
    told += [word for device in found.devices.values() for word in asdict(device).values() if word is not None]
    for fact in told:
        pairs = fact.items() if isinstance(fact, dict) else [("", fact)]
        for name, value in pairs:
            text = f"{name} {' '.join(value) if isinstance(value, list) else value or 'missing'}"
            text = text.replace("SLURM_JOB_ID 71", "SLURM_JOB_ID=71").replace(",", " ")
            assert set(text.split()) <= set(words), text
    # The command can be copied: no column stands beside it, and its lines are joined by backslashes alone.
    start = shown.partition("start with:\n")[2]
    assert start.replace("\\\n", " ").split() == found.start.split()


def test_it_imports_torch_alone() -> None:
    heavy = ("accelerate", "datasets", "deepspeed", "transformers")
    program = f"import sys; from mtl_dist.doctor import facts; facts(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
