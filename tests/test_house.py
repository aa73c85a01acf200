"""The package is a house: a room imports only from rooms below it, and a file only from files below it in its room.

python -m pytest tests/test_house.py
"""

import ast
import subprocess
import sys
from pathlib import Path

import mtl_dist

PACKAGE = Path(mtl_dist.__file__).parent
HOUSE = """
    config
    metrics files checkpoint distributed doctor optim
    watch: charts pictures recorder screen profile
    surgery: combiners conflict noise rows ddp fsdp2 zero surgery
    data: packed tokenizer read corpus mixer prepare batches
    model: encoder heads objectives weights multitask
    tasks
    experiment
    training: engine scores resume folder setup books loop
    runs: story predict slices analysis error_page errors
    studies: cost plan jobs space findings sweep statistics published table picture document compare array study
    cli
"""  # from the ground up; within a line, and so within a room, from left to right


def _files() -> list[str]:
    files = []
    for line in HOUSE.split("\n"):
        room, _, names = line.strip().rpartition(": ")
        files += [f"{room}.{name}" if room else name for name in names.split()]
    return files


FILES = _files()


def path_of(name: str) -> Path:
    return PACKAGE / f"{name.replace('.', '/')}.py"


def imports(path: Path) -> set[str]:
    """The package's own files that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mtl_dist":
            base = node.module.removeprefix("mtl_dist").removeprefix(".")
            names = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names} & set(FILES)
            found |= names or ({base} - {""})
        assert (
            not isinstance(node, ast.Import)
            or not any(alias.name == "mtl_dist" for alias in node.names)
            or (
                path.name == "resume.py"  # for the version
            )
        )
    return found


def test_every_file_has_its_place() -> None:
    there = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert there == set(FILES)


def test_imports_go_down() -> None:
    climbs = [
        f"{name} imports {other}"
        for place, name in enumerate(FILES)
        for other in imports(path_of(name))
        if other not in FILES[:place]
    ]
    assert not climbs


def test_surgery_knows_nothing_of_the_package_but_config() -> None:
    for path in (PACKAGE / "surgery").glob("*.py"):
        assert all(other == "config" or other.startswith("surgery") for other in imports(path)), path


def test_the_reader_of_imports_sees_them() -> None:
    assert imports(path_of("training.loop")) >= {"distributed", "training.setup", "training.books"}
    assert imports(path_of("model.multitask")) >= {"files", "model.encoder"}


HEAVY = (
    *("torch", "numpy", "torch.distributed.fsdp", "accelerate", "deepspeed", "datasets", "pyarrow", "tokenizers"),
    *("transformers", "tensorboard", "PIL", "rich", "matplotlib", "optuna"),
)


def loaded_by(*statements: str) -> list[str]:
    """Which heavy modules are there after these lines of Python."""
    last = f"print(*[m for m in {HEAVY} if m in sys.modules])"
    code = "\n".join(["import sys", *statements, last])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_public_names_load_and_the_package_itself_is_light() -> None:
    for name in mtl_dist.__all__:
        assert getattr(mtl_dist, name).__name__ == name
    assert loaded_by("import mtl_dist, mtl_dist.cli") == []
    assert loaded_by("import mtl_dist.cli", "try: mtl_dist.cli.main(['--help'])", "except SystemExit: pass") == []
    assert loaded_by("import torch")[:2] == ["torch", "numpy"]


def test_surgery_imports_torch_numpy_and_pydantic_at_most() -> None:
    assert loaded_by("import mtl_dist.surgery") == ["torch", "numpy"]


def test_surgery_adds_less_to_an_import_than_torch_takes() -> None:
    now = "time.perf_counter()"
    code = f"import time; a = {now}; import torch; b = {now}; import mtl_dist.surgery; print(b - a, {now} - b)"

    def share() -> float:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        torch, ours = map(float, done.stdout.split())
        return ours / torch

    assert any(share() < 1 for _ in range(3))
