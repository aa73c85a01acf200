"""docs/library.md: every block of code runs, in the order of the page, and every line of a refusal is one of ours.

python -m pytest tests/test_library_page.py
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

import mtl_dist.surgery
from tests.distributed import on_ranks
from tests.trained import ROOT

PAGE = ROOT / "docs" / "library.md"


def run_blocks() -> dict[str, Any]:
    """Each block goes on with the names of those before; tells what some of them came to."""
    dist.init_process_group("gloo")  # for the block that wraps a model in DDP
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    layers = []
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: block.start()].count("\n") + 1  # so that an error shows the page's own line
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)
        conflict = names["surgery"].conflict
        layers.append(list((conflict and conflict.layers) or ()))
    return {"combined": names["combined"].tolist(), "layers": layers, "steps": names["order"].steps}


def test_every_block_runs() -> None:
    (found,) = on_ranks(1, run_blocks)
    assert found["combined"] == [0.5, 1.5]
    assert ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"] in found["layers"]
    assert found["steps"] == 3 * (120 + 12) // 2


def refusals() -> Iterator[str]:
    """The patterns of all lines that surgery refuses with."""
    for path in Path(mtl_dist.surgery.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                (message,) = node.args
                parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                yield "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in parts)


def test_every_refusal_is_on_the_page() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("| the line | why |")[2]
    listed = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    patterns = set(refusals())
    assert len(patterns) > 15
    for pattern in patterns:
        assert any(re.fullmatch(pattern, line) for line in listed), f"the page has no line for {pattern}"
    for line in listed:
        assert any(re.fullmatch(pattern, line) for pattern in patterns), f"nothing says {line}"


def test_the_reader_of_refusals_sees_them() -> None:
    line = "task 'sts': its loss must be one number that depends on trained parameters"
    assert sum(bool(re.fullmatch(pattern, line)) for pattern in refusals()) == 1
