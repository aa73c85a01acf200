"""What engines keep of the optimizer: where its moments go when a run goes on.

python -m pytest tests/training/test_engine.py
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mtl_dist.surgery.zero import Place
from mtl_dist.training.engine import Zero


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_zero_restores_the_step_count_where_the_optimizer_reads_it(fused: bool, device: str) -> None:
    # A fused AdamW wants it beside the weights, on the GPU; others read it on the CPU, without waiting for the GPU.
    module = nn.Linear(2, 2, bias=False)
    flat = nn.Parameter(torch.zeros(4, device="meta"))
    optimizer = SimpleNamespace(param_groups=[{"params": [flat], "fused": fused}], state={})
    engine = Zero.__new__(Zero)
    engine.module = module
    engine.model = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    engine.places = {module.weight: Place(flat, slice(0, 4), 0, module.weight.shape)}
    engine.restore({"weight": {"step": torch.tensor(7.0), "exp_avg": torch.ones(2, 2)}})
    assert optimizer.state[flat]["step"].device.type == device
    assert optimizer.state[flat]["exp_avg"].device.type == "meta"
