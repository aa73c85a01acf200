"""A machine that has no room, no terminal, no reader or no port: training goes on, or one line says what is missing.

python -m pytest tests/faults/test_machine.py
"""

import fcntl
import io
import json
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from typing import TextIO

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from mtl_dist.cli import main
from mtl_dist.config import UserError, load
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.distributed import DistributedConfig, start
from mtl_dist.experiment import Experiment
from mtl_dist.runs.predict import write_predictions
from mtl_dist.training.scores import Predicted
from mtl_dist.watch.recorder import METRICS, TENSORBOARD, Recorder
from tests.limits import limit

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What standard error says of a command that ends with exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


# Folders that cannot be written


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=/proc/run", "output_dir: cannot write /proc/run: No such file or directory\n"),
        ("output_dir=/dev/null", "output_dir: cannot write /dev/null: "),
        ("output_dir=/dev/null/run", "output_dir: cannot write /dev/null/run: Not a directory\n"),
        ("cache_dir=/proc/cache", "cache_dir: cannot write /proc/cache/."),
        ("cache_dir=/dev/null", "cache_dir: cannot write /dev/null/."),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert refused(capsys, "train", tiny, override).startswith(message)


@needs_full
def test_predictions_that_have_no_room_are_one_line(tiny: Path) -> None:
    experiment = load(Experiment, tiny)
    split = experiment.open_split("mood", "dev", load_tokenizer(experiment.encoder.tokenizer_source))
    assert split is not None
    with pytest.raises(UserError) as caught:
        write_predictions(FULL, experiment.tasks["mood"], split, Predicted(np.zeros(len(split))))
    assert str(caught.value) == "cannot write /dev/full: No space left on device"


# TensorBoard and metrics.jsonl


def lines_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / METRICS).read_text().splitlines()]


def test_a_tensorboard_folder_that_cannot_be_made_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / TENSORBOARD).write_text("a file in its place")
    recorder = Recorder(tmp_path, tensorboard=True)
    recorder.text("config", "seed: 0")
    for step in (1, 2):
        recorder.record(step, "train", {"loss": {"a": 0.5}})
    recorder.close()
    assert lines_of(tmp_path) == [1, 2]
    (told,) = caplog.messages
    assert told.startswith("TensorBoard's files cannot be written ([Errno 17] File exists")
    assert told.endswith("training goes on without them")


def test_a_disk_that_fills_up_costs_tensorboard_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's thread ends with the same error
    before = threading.enumerate()
    recorder = Recorder(tmp_path, tensorboard=True)
    recorder.record(1, "train", {"loss": {"a": 0.5}})
    soft, hard = getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (10_000, hard))  # of any file
    try:
        recorder.text("config", "x" * 20_000)
        for step in range(2, 20):
            recorder.record(step, "train", {"loss": {"a": 0.5}})
        recorder.close()
        for thread in set(threading.enumerate()) - set(before):
            thread.join(timeout=limit(10))
    finally:
        setrlimit(RLIMIT_FSIZE, (soft, hard))
    assert lines_of(tmp_path) == list(range(1, 20))
    (told,) = caplog.messages
    assert "File too large" in told


def test_metrics_that_have_no_room_end_the_run_in_one_line(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, tensorboard=False)
    soft, hard = getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError) as caught:
            for step in range(100):
                recorder.record(step, "train", {"loss": {"a": 0.5}})
    finally:
        setrlimit(RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"cannot write {tmp_path / METRICS}: File too large"


# The screen


class Reader:
    """A terminal or a pipe, and what was written to it."""

    def __init__(self, columns: int | None) -> None:
        reading, writing = os.pipe() if columns is None else pty.openpty()
        if columns is not None:
            fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = open(writing, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        self.text = b""
        self.thread = threading.Thread(target=self._read, args=(reading,))
        self.thread.start()

    def _read(self, reading: int) -> None:
        while True:
            try:
                part = os.read(reading, 4096)
            except OSError:  # so ends a terminal
                part = b""
            if not part:
                os.close(reading)
                return
            self.text += part

    def all(self) -> str:
        self.stream.close()
        self.thread.join()
        return self.text.decode()


@pytest.mark.parametrize("term", ["xterm", "dumb", "unknown"])
def test_twenty_columns_are_enough_to_train(tiny: Path, monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    reader = Reader(columns=20)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "20")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", reader.stream)
        assert main(["train", str(tiny), "steps=4"]) == 0
    text = reader.all()
    assert "best model" in text and "Traceback" not in text


@pytest.fixture
def gone() -> Iterator[TextIO]:
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = open(writing, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    yield stream
    stream.close()


@pytest.fixture
def full() -> Iterator[TextIO]:
    with FULL.open("w", encoding="utf-8") as stream:
        yield stream


@pytest.mark.parametrize("where", ["gone", pytest.param("full", marks=needs_full)])
def test_training_outlasts_its_screen(
    tiny: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    stream = request.getfixturevalue(where)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(["train", str(tiny), "steps=4"]) == 0
    assert lines_of(tiny.parent / "run") == [0, 2, 4, 4, 4]
    assert (tiny.parent / "run" / "best" / "scores.json").exists()
    reason = {"gone": "Broken pipe", "full": "No space left on device"}[where]
    assert caplog.messages == [f"the screen cannot be written ({reason}); training goes on without it"]


@needs_full
@pytest.mark.parametrize("arguments", [["validate", "{tiny}"], ["prepare", "{tiny}"], ["schema"], ["doctor"]])
def test_results_that_cannot_be_written_are_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, full: TextIO, arguments: list[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main([argument.format(tiny=tiny) for argument in arguments]) == 2
    assert capsys.readouterr().err == "cannot write the output: No space left on device\n"


def test_a_reader_that_has_seen_enough_is_no_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gone: TextIO
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        assert main(["schema"]) == 0
    assert capsys.readouterr().err == ""


@needs_full
def test_python_has_nothing_to_add_to_a_full_disk(tmp_path: Path) -> None:
    # At its exit Python writes what is left of the output once more.
    command = [sys.executable, "-m", "mtl_dist", "corpus", str(tmp_path), "--rows", "100", "--dev-rows", "1"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with FULL.open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
    assert (done.returncode, done.stderr) == (2, "cannot write the output: No space left on device\n")


def test_a_path_that_the_screen_has_no_letters_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
        assert main(["train", str(tiny), "steps=2", f"output_dir={tiny.parent}/größe"]) == 0
        sys.stdout.flush()
        assert rb"run folder   " + str(tiny.parent).encode() + rb"/gr\xf6\xdfe" in screen.getvalue()


# The port at which the processes meet


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield str(server.getsockname()[1])


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch, taken_port: str) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken_port}.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(UserError) as caught:
            start(DistributedConfig(device="cpu"), None)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert str(caught.value).startswith(f"the processes cannot meet at 127.0.0.1:{taken_port}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.long
def test_the_launcher_takes_another_port(tiny: Path, taken_port: str) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", taken_port]
    launch += ["--config_file", str(Path(__file__).parents[2] / "accelerate_configs" / "cpu_2proc.yaml")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    command = [*launch, "-m", "mtl_dist", "train", str(tiny), "steps=1", "distributed.processes=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"Port `{taken_port}` is already in use" in done.stderr
    assert "2 processes on CPU" in done.stdout
