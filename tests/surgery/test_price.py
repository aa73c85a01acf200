"""What surgery costs beside plain training: CPU time in one run. The bounds are far from what is measured.

pytest tests/surgery/test_price.py; figures are in docs/performance.md
"""

import torch

from benchmarks.price import Contest, prices


def test_surgery_costs_little_beside_plain_training() -> None:
    contest = Contest("minilm", tasks=3, rows=24, device=torch.device("cpu"), bf16=False)
    found, _ = prices(contest, rounds=3, only=["plain", "PCGrad", "PCGrad written out"])
    assert found["PCGrad"] < 1.4
    assert found["PCGrad"] < found["PCGrad written out"] - 0.2
