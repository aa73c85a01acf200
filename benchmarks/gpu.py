"""Single questions to a GPU, each answered in seconds by one line of JSON; `benchmarks/gpu.sh` asks them all.

    python -m benchmarks.gpu fp16 | attention | adamw | mfu
    python -m benchmarks.gpu table FOLDER       # what all parts of gpu.sh said, as one JSON file and one table

On a CPU the sizes are small, and the numbers say only that the script runs.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.conftest import write_experiment  # first: it sets the number of threads

# isort: split
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.encoder import SHAPES, lengths_of
from mtl_dist.data.packed import Packed, pack
from mtl_dist.model import encoder
from mtl_dist.model.encoder import Encoder, Shape
from mtl_dist.optim import AdamW
from tests.trained import far_apart, run

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPE = SHAPES["base"] if ON_GPU else {**SHAPES["minilm"], "num_hidden_layers": 2}
VOCABULARY = 30522
# Dense bf16, in FLOP/s, of the data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
LAST = 30  # lines of a log


def milliseconds(work: Callable[[], object], repetitions: int = 10 if ON_GPU else 3) -> float:
    """The median of some repetitions, waiting for the device; the first three warm up."""
    found = []
    for _ in range(repetitions + 3):
        if ON_GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if ON_GPU:
            torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found[3:])


def batch(lengths: list[int]) -> Packed:
    """Sentences of these lengths."""
    return pack([np.random.default_rng(i).integers(1000, VOCABULARY, n) for i, n in enumerate(lengths)]).to(DEVICE)


def bert(attention_dropout: float = 0.0) -> Encoder:
    """An encoder that is trained."""
    torch.manual_seed(0)
    return Encoder(Shape(**SHAPE, attention_probs_dropout_prob=attention_dropout), VOCABULARY).to(DEVICE).train()


def loss_of(model: nn.Module, packed: Packed) -> Tensor:
    """A loss of every token, in bf16."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        hidden: Tensor = model(packed)
    return hidden.float().square().mean()


def fp16() -> dict[str, Any]:
    """A run with surgery whose losses are scaled, and how far it ends from fp32."""
    if not ON_GPU:
        return {"skipped": "fp16 needs CUDA"}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        config = write_experiment(Path(folder))
        dropout = ["encoder.dropout=0", "encoder.attention_dropout=0"]
        dropout += [f"tasks.{task}.dropout=0" for task in ("mood", "same", "near")]
        overrides = [*dropout, "gradients.combiner=pcgrad", "steps=60", "log.tensorboard=false", "log.every_steps=1"]
        exact = run(config, *overrides, "precision=fp32")["parameters"]
        rounded = run(config, *overrides, "precision=fp16")["parameters"]
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return {
        "furthest from fp32": far_apart(rounded, exact),
        "skipped steps": steps[-1]["skipped_steps"],
        "finite": all(bool(parameter.isfinite().all()) for parameter in rounded.values()),
    }


def attention() -> dict[str, Any]:
    """The encoder with the varlen kernel, and with dense groups: how far apart, how fast."""
    model, found = bert(), {}
    for kind in ("short", "long"):
        lengths = lengths_of(kind, 256 if ON_GPU else 8)
        packed = batch(lengths)
        hidden = {}
        for name, varlen in (("varlen", encoder._varlen_can), ("dense", lambda *_: False)):
            with patch.object(encoder, "_varlen_can", varlen):
                with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
                    hidden[name] = model.eval()(packed).float()
                model.train()
                took = milliseconds(lambda packed=packed: loss_of(model, packed).backward())
            found[f"{kind}: {name}, k tokens/s"] = sum(lengths) / took
        found[f"{kind}: furthest apart"] = (hidden["varlen"] - hidden["dense"]).abs().max().item()
    return found


def adamw() -> dict[str, Any]:
    """A step of ours, and of torch's fused one, on the same gradients."""
    found, after = {}, []
    for name, kind in (("ours", AdamW), ("torch, fused", lambda *a, **k: torch.optim.AdamW(*a, **k, fused=True))):
        model = bert()
        optimizer: Any = kind(model.parameters(), lr=1e-4, eps=1e-8, weight_decay=0.01)
        generator = torch.Generator(DEVICE).manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, device=DEVICE)
        found[f"{name}, ms"] = milliseconds(optimizer.step)
        after.append({key: parameter.detach() for key, parameter in model.named_parameters()})
    return {**found, "furthest apart": far_apart(after[0], after[1])}


def mfu() -> dict[str, Any]:
    """The share of the device's arithmetic that plain steps of an encoder reach: 6 x parameters x tokens."""
    name = torch.cuda.get_device_name() if ON_GPU else platform.machine()
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    found: dict[str, Any] = {"device": name}
    for length in (32, 128, 512) if ON_GPU else (32,):
        tokens = 2**16 if ON_GPU else 2**8
        packed, model = batch([length] * (tokens // length)), bert()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        computing = sum(p.numel() for p in model.parameters()) - VOCABULARY * SHAPE["hidden_size"]

        def step(model: Encoder = model, optimizer: Any = optimizer, packed: Packed = packed) -> None:
            loss_of(model, packed).backward()
            optimizer.step()
            optimizer.zero_grad()

        reached = 6 * computing * tokens / (milliseconds(step) / 1000)
        found[f"sentences of {length}, TFLOP/s (word embeddings not counted)"] = reached / 1e12
        if peak:
            found[f"sentences of {length}, MFU"] = f"{reached / peak:.1%}"
    return found


def table(folder: Path) -> None:
    """Puts together what all parts said: results.json and table.md."""
    device = torch.cuda.get_device_name() if ON_GPU else platform.machine()
    parts = {}
    for file in sorted(folder.glob("*.rc")):
        code, seconds = file.read_text().split()
        lines = file.with_suffix(".log").read_text(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("{")]
        # What no part of this file has said ends with what it found, or with why not.
        answer = json.loads(said[-1]) if said else {f"line {i}": line for i, line in enumerate(lines[-LAST:], 1)}
        parts[file.stem.split("-", 1)[1]] = {"exit code": int(code), "seconds": int(seconds), **answer}
    about = {"device": device, "GPUs": torch.cuda.device_count(), "torch": torch.__version__}
    (folder / "results.json").write_text(json.dumps({**about, "parts": parts}, indent=2) + "\n")
    shown = [
        f"{device}, torch {torch.__version__}, {torch.cuda.device_count()} GPU(s)",
        "",
        "| part | | |",
        "|---|---|---|",
    ]
    for name, answers in parts.items():
        for key, value in answers.items():
            number = f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
            shown.append(f"| {name} | {key} | {number} |")
            name = ""
    (folder / "table.md").write_text("\n".join(shown) + "\n")
    print("\n".join(shown))


PARTS = {part.__name__: part for part in (fp16, attention, adamw, mfu)}

if __name__ == "__main__":
    if sys.argv[1] == "table":
        table(Path(sys.argv[2]))
    else:
        with nullcontext() if ON_GPU else patch.object(torch, "set_num_threads"):
            print(json.dumps(PARTS[sys.argv[1]]()))
