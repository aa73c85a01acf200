"""The launch files, as accelerate and DeepSpeed read them when training starts; at the end, trainings with them."""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from mtl_dist.model.encoder import Encoder, Layer, Shape

ROOT = Path(__file__).parents[1]
PROMISED = {  # engine, processes, precision
    "cpu_2proc": ("DDP", 2, "no"),
    "single_gpu": ("one process", 1, "bf16"),
    "ddp_bf16": ("DDP", 8, "bf16"),
    "ddp_fp16": ("DDP", 8, "fp16"),
    "multi_node_ddp": ("DDP", 16, "bf16"),
    "fsdp2": ("FSDP", 8, "bf16"),
    "deepspeed_zero1": ("DEEPSPEED", 8, "no"),  # the JSON file says bf16
    "deepspeed_zero2": ("DEEPSPEED", 8, "no"),
    "deepspeed_zero3": ("DEEPSPEED", 8, "no"),
}
NAMES = list(PROMISED)
ZERO = [1, 2, 3]


@pytest.mark.parametrize("line", ["config.yaml output_dir=a 'mixer={kind: uniform}", 'config.yaml "a'])
def test_a_line_of_a_study_that_is_not_quoted_trains_nothing(tmp_path: Path, line: str) -> None:
    (tmp_path / "study.txt").write_text(f"# all of them\n{line}\n")
    command = ["bash", str(ROOT / "slurm" / "array_study.sbatch"), "study.txt"]
    done = subprocess.run(
        command, env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == f"line 1 of study.txt is not quoted as in a shell: {line}\n"


def path(name: str) -> Path:
    return ROOT / "accelerate_configs" / f"{name}.yaml"


def launched(
    monkeypatch: pytest.MonkeyPatch, name: str, *options: str
) -> tuple[str, argparse.Namespace, dict[str, str]]:
    """Which of its launchers accelerate takes, with which arguments, and what its processes find in the environment."""
    taken: list[Any] = []
    launchers = {
        "simple_launcher": lambda a: prepare_simple_launcher_cmd_env(a)[1],
        "multi_gpu_launcher": prepare_multi_gpu_env,
        "deepspeed_launcher": lambda a: prepare_deepspeed_cmd_env(a)[1],
    }
    for launcher, prepare in launchers.items():
        monkeypatch.setattr(launch, launcher, lambda a, n=launcher, p=prepare: taken.extend((n, a, p(a))))
    launch.launch_command(
        launch.launch_command_parser().parse_args(["--config_file", str(path(name)), *options, "-m", "mtl_dist"])
    )
    launcher, arguments, environment = taken
    return launcher, arguments, environment


def enter(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)


def test_these_are_all_files() -> None:
    assert {file.stem for file in (ROOT / "accelerate_configs").iterdir()} == set(NAMES)
    assert {file.stem for file in (ROOT / "ds_configs").glob("*.json")} == {f"zero{stage}" for stage in ZERO}


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_key(name: str) -> None:
    load_config_from_file(str(path(name)))  # refuses unknown keys, but not those inside others
    options = vars(launch.launch_command_parser().parse_args(["script.py"]))
    content = yaml.safe_load(path(name).read_text())
    inner = {key for part in ("deepspeed_config", "fsdp_config") for key in content.get(part, {})}
    assert inner <= options.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_it_is_and_how_it_is_used(name: str) -> None:
    lines = path(name).read_text().splitlines()
    assert lines[0].startswith("# ") and lines[0].endswith(".")
    assert lines[2].startswith(f"#   accelerate launch --config_file accelerate_configs/{name}.yaml ")


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_starts_what_the_file_promises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, processes, precision = PROMISED[name]
    # Not the first machine, which looks whether the port is free here.
    options = ["--machine_rank", "1"] if name == "multi_node_ddp" else []
    launcher, arguments, environment = launched(monkeypatch, name, *options)
    assert arguments.num_processes == processes
    assert environment["ACCELERATE_MIXED_PRECISION"] == precision
    found = [kind for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM") if environment.get(f"ACCELERATE_USE_{kind}")]
    assert found == [engine] * (engine in ("DEEPSPEED", "FSDP"))
    by_engine = {"one process": "simple_launcher", "DEEPSPEED": "deepspeed_launcher"}
    assert launcher == by_engine.get(engine, "multi_gpu_launcher")
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment
    if name == "multi_node_ddp":
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    elif processes > 1:
        assert int(arguments.master_port) > 0  # a free one instead of 0


def test_the_number_of_processes_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ddp_bf16", "fsdp2", "deepspeed_zero3"):
        _, arguments, _ = launched(monkeypatch, name, "--num_processes", "4")
        assert arguments.nproc_per_node == "4"


def test_cpu_processes_see_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, environment = launched(monkeypatch, "cpu_2proc")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environment["CUDA_VISIBLE_DEVICES"])
    for rocm in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(rocm, raising=False)
    assert torch.cuda._parse_visible_devices() == []


def test_fsdp2_wraps_the_encoders_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, launched(monkeypatch, "fsdp2")[2])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"  # which offloads nothing
    assert plugin.cpu_ram_efficient_loading is False
    shape = Shape(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    plugin.set_auto_wrap_policy(Encoder(shape, vocab_size=5))  # fails where the model has no such class
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {Layer}


@pytest.mark.parametrize("stage", ZERO)
def test_deepspeeds_file_is_found_and_says_its_stage(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    enter(monkeypatch, launched(monkeypatch, f"deepspeed_zero{stage}")[2])
    plugin = DeepSpeedPlugin()  # fails where the launch file says what the JSON file has to say
    assert plugin.zero_stage == stage
    assert plugin.zero3_init_flag is False
    # The name is looked up from the folder of the launch.
    monkeypatch.chdir(ROOT / "tests")
    with pytest.raises(ValueError, match=f"existing deepspeed config.*ds_configs/zero{stage}.json"):
        DeepSpeedPlugin()


@pytest.fixture(scope="module")
def deepspeed() -> ModuleType:
    module: ModuleType = pytest.importorskip("deepspeed")
    return module


@pytest.mark.parametrize("stage", ZERO)
def test_deepspeed_accepts_the_file(stage: int, deepspeed: ModuleType) -> None:
    from deepspeed.runtime import constants
    from deepspeed.utils.config import TIMERS

    file = ROOT / "ds_configs" / f"zero{stage}.json"
    config = deepspeed.DeepSpeedConfig(str(file))
    assert config.zero_optimization_stage == stage
    assert config.bfloat16_config.enabled
    # ZeRO-1 with gradients in fp32 would become DeepSpeed's other optimizer, whose gradients surgery cannot read.
    assert config.grad_accum_dtype == (None if stage == 1 else "fp32")
    # What the experiment decides; DeepSpeed would clip at 1.0 if nothing were said.
    assert (config.gradient_clipping, config.gradient_accumulation_steps) == (0.0, 1)
    assert (config.optimizer_name, config.scheduler_name) == (None, None)
    assert config.zero_allow_untested_optimizer
    assert config.zero_config.offload_optimizer is config.zero_config.offload_param is None

    # It refuses unknown keys inside zero_optimization and bf16 only.
    content = json.loads(file.read_text())
    known = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization", TIMERS}
    assert not config.timers_config.enabled
    assert content.keys() | content.get("data_types", {}).keys() <= known
    assert "auto" not in file.read_text()


def test_every_key_of_deepspeeds_files_is_explained() -> None:
    explained = (ROOT / "ds_configs" / "README.md").read_text()
    for stage in ZERO:
        content = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        names = {*content, *content["zero_optimization"]} - {"bf16", "data_types"} | {"bf16.enabled"}
        if "data_types" in content:
            names |= {f"data_types.{key}" for key in content["data_types"]}
        assert {name for name in names if f"| `{name}` |" not in explained} == set()


RUN = {"ddp_bf16": "DDP", "fsdp2": "FSDP2", **{f"deepspeed_zero{stage}": f"ZeRO-{stage}" for stage in ZERO}}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def starting(name: str, tiny: Path, *options: str) -> subprocess.Popen[str]:
    """A training with a launch file."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(path(name))]
    train = ["-m", "mtl_dist", "train", str(tiny), "steps=3", "gradients.combiner={kind: pcgrad}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "FSDP"))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*launch, *options, *train], **pipes, text=True, env=environment, cwd=ROOT)


def ended_well(training: subprocess.Popen[str], tiny: Path) -> str:
    """What it printed."""
    try:
        out, err = training.communicate()
    finally:
        training.kill()
    assert training.returncode == 0, err
    assert "FutureWarning" not in err
    records = [json.loads(line) for line in (tiny.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "surgery" in record] == [2, 3]
    return out


@without_gpu
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "deepspeed_zero2" else pytest.mark.long) for name in RUN]
)
def test_two_cpu_processes_train_with_the_file(name: str, tiny: Path) -> None:
    out = ended_well(starting(name, tiny, "--num_processes", "2"), tiny)
    assert f"2 processes on CPU, 1 thread(s) each, {RUN[name]}, bf16" in out
    assert out.count("best model") == 1


@without_gpu
@pytest.mark.long
def test_one_process_trains_with_the_file_for_one_gpu(tiny: Path) -> None:
    assert "1 process on CPU" in ended_well(starting("single_gpu", tiny), tiny)


@without_gpu
@pytest.mark.long
def test_two_machines_train_together(tiny: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    first, second = (starting("multi_node_ddp", tiny, *options, "--machine_rank", rank) for rank in "01")
    try:
        assert "2 processes on CPU" in ended_well(first, tiny)
        assert "best model" not in ended_well(second, tiny)
    finally:
        second.kill()
