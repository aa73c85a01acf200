"""The table of promises names tests that exist.

python -m pytest tests/faults/test_table.py
"""

import ast
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "reliability.md"


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_promise_has_a_test_that_exists() -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    promises = [line for line, below in pairwise(lines) if line.startswith("| ") and not below.startswith("|---")]
    assert len(promises) >= 40
    for row in promises:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row.split(" | ")[-1])
        assert named, f"no test in: {row}"
        for file, name in named:
            assert name in functions_of(file), f"{file} has no {name}"
