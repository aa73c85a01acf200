"""A file imports only from lower floors, so that each can be read with nothing above it in mind."""

import ast
import subprocess
import sys
from pathlib import Path

import mtl_dist

PACKAGE = Path(mtl_dist.__file__).parent
FLOORS = {
    "config": 0,
    "distributed": 1,
    "files": 1,
    "metrics": 1,
    "objectives": 1,
    "optim": 1,
    "tokenizer": 1,
    "data.corpus": 1,
    "data.mixer": 1,
    "data.read": 1,
    "model.encoder": 1,
    "surgery.combiners": 1,
    "surgery.conflict": 1,
    "surgery.rows": 1,
    "doctor": 2,
    "zero": 2,
    "model.heads": 2,
    "model.weights": 2,
    "checkpoint": 2,
    "engine": 3,
    "surgery.gradients": 4,
    "telemetry": 2,
    "tasks": 3,
    "data.prepare": 4,
    "model.multitask": 4,
    "data.batches": 5,
    "experiment": 5,
    "evaluate": 6,
    "resume": 6,
    "meter": 6,
    "train": 7,
    "plan": 8,
    "cli": 9,
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")}


def imports(path: Path) -> set[str]:
    """The package's own modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mtl_dist"):
            base = node.module.removeprefix("mtl_dist").removeprefix(".")
            names = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= (names & FLOORS.keys()) or {base}
    return found


def test_every_file_has_a_floor() -> None:
    assert set(FILES) == set(FLOORS)


def test_imports_go_down() -> None:
    climbs = [
        f"{name} [{FLOORS[name]}] imports {other} [{FLOORS[other]}]"
        for name, path in FILES.items()
        for other in imports(path)
        if FLOORS[other] >= FLOORS[name]
    ]
    assert not climbs


def test_the_reader_of_imports_sees_them() -> None:
    assert imports(FILES["train"]) >= {"experiment", "distributed", "data.batches", "model.multitask"}
    assert imports(FILES["evaluate"]) >= {"metrics"}


def test_public_names_load_and_the_package_itself_is_light() -> None:
    for name in mtl_dist.__all__:
        assert getattr(mtl_dist, name).__name__ == name
    heavy = (
        "import sys, mtl_dist, mtl_dist.cli; print([m for m in ('torch', 'numpy', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
