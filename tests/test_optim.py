"""python -m pytest tests/test_optim.py"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from mtl_dist.config import UserError, load
from mtl_dist.optim import AdamW, Constant, Cosine, Linear, OptimConfig, Rule, Schedule, build_optimizer, set_lr

SHAPES = [(7, 3), (5,), (4, 4), ()]


def twins(**kwargs: Any) -> tuple[AdamW, torch.optim.AdamW]:
    """Ours and torch's, over equal parameters in two groups."""
    made = []
    for optimizer_class in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        groups = [
            {"params": params[:2], "lr": 1e-2, "weight_decay": 0.1},
            {"params": params[2:], "lr": 1e-3, "betas": (0.8, 0.99), "eps": 1e-3},
        ]
        made.append(optimizer_class(groups, eps=1e-6, weight_decay=0.0, **kwargs))
    return tuple(made)


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_grads(step: int, *optimizers: torch.optim.Optimizer) -> None:
    """The same random gradients for all; parameter 0 has one at every step, parameter i none at every (i+2)-th."""
    generator = torch.Generator().manual_seed(step)
    for i, shape in enumerate(SHAPES):
        scale = 10.0 ** torch.randint(-4, 3, (), generator=generator)
        grad = scale * torch.randn(shape, generator=generator)
        for optimizer in optimizers:
            params_of(optimizer)[i].grad = grad.clone() if i == 0 or step % (i + 2) else None


def assert_equal_updates(ours: torch.optim.Optimizer, reference: torch.optim.Optimizer, tolerance: float) -> None:
    for mine, theirs in zip(params_of(ours), params_of(reference), strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()
        assert ours.state[mine]["step"] == reference.state[theirs]["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[mine][key], reference.state[theirs][key])


def test_adamw_equals_torch_after_a_thousand_steps() -> None:
    ours, reference = twins()
    start = [param.detach().clone() for param in params_of(ours)]
    for step in range(1000):
        set_grads(step, ours, reference)
        for optimizer in (ours, reference):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 1000)
            optimizer.step()
    assert_equal_updates(ours, reference, tolerance=1e-6)
    steps = [int(ours.state[param]["step"]) for param in params_of(ours)]
    assert steps == [1000, 666, 750, 800]
    assert all((param - before).norm() > 0.01 for param, before in zip(params_of(ours), start, strict=True))


def test_first_step_by_hand() -> None:
    param = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    param.grad = torch.tensor([0.5, -0.001], dtype=torch.float64)
    AdamW([param], lr=0.1, eps=0.001, weight_decay=0.01).step()
    # Bias correction makes the first step g / (|g| + eps): 0.5/0.501 and -0.001/0.002. Decay takes 0.1 * 0.01 first.
    expected = torch.tensor([0.999 - 0.1 * 0.5 / 0.501, -1.998 + 0.1 * 0.5], dtype=torch.float64)
    torch.testing.assert_close(param.detach(), expected)


def test_parameter_without_gradient_is_untouched() -> None:
    moving, resting = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([moving, resting], lr=0.1, weight_decay=0.5)
    moving.grad = torch.ones(3)
    optimizer.step()
    assert moving[0] < 1
    assert torch.equal(resting, torch.ones(3))
    assert resting not in optimizer.state


@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_interchange_with_torch(ours_first: bool) -> None:
    first, second = twins() if ours_first else reversed(twins())
    for step in range(5):
        set_grads(step, first)
        first.step()
    with torch.no_grad():
        for source, target in zip(params_of(first), params_of(second), strict=True):
            target.copy_(source)
    second.load_state_dict(deepcopy(first.state_dict()))
    for step in range(5, 10):
        set_grads(step, first, second)
        first.step()
        second.step()
    assert_equal_updates(first, second, tolerance=1e-6)


def test_closure_sees_gradients_and_its_loss_is_returned() -> None:
    param = nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamW([param], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert param.item() == pytest.approx(1.9)


def factors(schedule: Schedule, total_steps: int) -> list[float]:
    return [schedule.factor(step, total_steps) for step in range(total_steps + 1)]


def test_schedules_by_hand() -> None:
    assert factors(Constant(warmup_steps=2), 4) == [0.5, 1, 1, 1, 1]
    assert factors(Linear(), 4) == [1, 0.75, 0.5, 0.25, 0]
    assert factors(Linear(warmup_share=0.5, final_share=0.5), 4) == [0.5, 1, 1, 0.75, 0.5]
    assert factors(Cosine(), 3) == pytest.approx([1, 0.75, 0.25, 0])  # (1 + cos 60°) / 2 = 3/4
    assert factors(Cosine(warmup_steps=1, final_share=0.2), 3) == pytest.approx([1, 1, 0.6, 0.2])
    assert factors(Linear(warmup_steps=3, final_share=0.1), 3) == pytest.approx([1 / 3, 2 / 3, 1, 0.1])


schedules = st.builds(
    lambda schedule, **warmup: schedule.model_copy(update=warmup),
    st.sampled_from([Constant(), Linear(), Linear(final_share=0.3), Cosine(), Cosine(final_share=0.3)]),
    warmup_share=st.floats(0, 1),
)


@given(schedules, st.integers(1, 200))
def test_schedules_climb_to_one_then_never_climb_again(schedule: Schedule, total_steps: int) -> None:
    values = factors(schedule, total_steps)
    warmup = round(schedule.warmup_share * total_steps)
    climb, fall = values[:warmup], values[warmup:]
    assert max(values[:-1]) == 1.0
    assert all(0 < value <= 1 for value in values[:-1])
    assert climb == sorted(climb)
    assert fall == sorted(fall, reverse=True)
    assert values[-1] == pytest.approx(getattr(schedule, "final_share", 1.0), abs=1e-12)


def test_two_warmups_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"give warmup_steps \(10\) or warmup_share \(0.1\), not both"):
        Linear(warmup_steps=10, warmup_share=0.1)


def model_names(num_layers: int = 2) -> list[str]:
    layers = [f"encoder.layers.{i}" for i in range(num_layers)]
    return [
        "encoder.embeddings.word.weight",
        "encoder.embeddings.norm.weight",
        *[f"{layer}.{name}" for layer in layers for name in ("query.weight", "query.bias", "attention_norm.weight")],
        "encoder.pooler.weight",
        "heads.sst.weight",
        "heads.sst.bias",
    ]


def parameters(names: list[str]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(2)) for name in names}


def built(rules: list[dict[str, Any]], **fields: Any) -> dict[str, tuple[float, float] | None]:
    """(lr_scale, weight decay) of every parameter by name; None where frozen."""
    params = parameters(model_names())
    optimizer = build_optimizer(params.items(), OptimConfig.model_validate({"rules": rules, **fields}), "cpu")
    group_of = {param: group for group in optimizer.param_groups for param in group["params"]}
    assert all(param.requires_grad == (param in group_of) for param in params.values())
    return {
        name: (group_of[param]["lr_scale"], group_of[param]["weight_decay"]) if param in group_of else None
        for name, param in params.items()
    }


def test_default_rules_spare_biases_and_norms_from_decay() -> None:
    params = parameters(model_names())
    optimizer = build_optimizer(params.items(), OptimConfig(weight_decay=0.1), "cpu")
    decayed = {param for group in optimizer.param_groups if group["weight_decay"] == 0.1 for param in group["params"]}
    assert {name for name, param in params.items() if param in decayed} == {
        "encoder.embeddings.word.weight",
        "encoder.layers.0.query.weight",
        "encoder.layers.1.query.weight",
        "encoder.pooler.weight",
        "heads.sst.weight",
    }
    assert [group["name"] for group in optimizer.param_groups] == ["lr x 1, decay 0.1", "lr x 1, decay 0"]


def test_each_aspect_is_decided_by_the_first_rule_that_sets_it() -> None:
    rules = [
        {"match": "bias$", "weight_decay": 0.0},
        {"match": "^encoder", "lr_scale": 0.5, "weight_decay": 0.2},
        {"match": "layers", "lr_scale": 0.1},
        {"match": ".*"},
    ]
    found = built(rules, weight_decay=0.3)
    assert found["encoder.layers.0.query.bias"] == (0.5, 0.0)
    assert found["encoder.layers.0.query.weight"] == (0.5, 0.2)
    assert found["heads.sst.bias"] == (1.0, 0.0)
    assert found["heads.sst.weight"] == (1.0, 0.3)


def test_layer_decay_counts_from_the_top() -> None:
    rules = [{"match": "^heads", "lr_scale": 3.0}, {"match": ".*", "layer_decay": 0.5, "lr_scale": 2.0}]
    scales = {name: setting[0] for name, setting in built(rules).items() if setting}
    assert scales["encoder.layers.1.query.bias"] == 2.0
    assert scales["encoder.layers.0.query.bias"] == 1.0
    assert scales["encoder.embeddings.word.weight"] == 0.5
    assert scales["encoder.pooler.weight"] == 2.0
    assert scales["heads.sst.weight"] == 3.0


def test_layer_decay_of_bert_base_follows_the_report() -> None:
    params = parameters(model_names(num_layers=12))
    config = OptimConfig(lr=1e-5, rules=[Rule(match=".*", layer_decay=0.95)])
    lrs = sorted(group["lr"] for group in build_optimizer(params.items(), config, "cpu").param_groups)
    # The i-th layer from the top learns at lr x 0.95^(i-1); the embeddings lie one below the last.
    assert lrs == pytest.approx([1e-5 * 0.95**depth for depth in range(12, -1, -1)])


def test_frozen_parameters_stay_out_and_exceptions_come_first() -> None:
    rules = [{"match": "pooler", "freeze": False}, {"match": "^encoder", "freeze": True}, {"match": ".*"}]
    found = built(rules)
    trained = {name for name, setting in found.items() if setting}
    assert trained == {"encoder.pooler.weight", "heads.sst.weight", "heads.sst.bias"}


def test_a_later_stage_thaws_what_an_earlier_one_froze() -> None:
    params = parameters(model_names())
    heads_first = OptimConfig(rules=[Rule(match="^encoder", freeze=True), Rule(match=".*")])
    build_optimizer(params.items(), heads_first, "cpu")
    assert not params["encoder.pooler.weight"].requires_grad
    build_optimizer(params.items(), OptimConfig(), "cpu")
    assert all(param.requires_grad for param in params.values())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["^encoder"], "optim.rules match nothing for 'heads.sst.weight'; end the list with a '.*' rule"),
        ([".*", "encodr"], "optim.rules[1] matches no parameter: 'encodr'; did you mean 'encoder'?"),
        ([".*", r"\d{5}"], r"optim.rules[1] matches no parameter: '\d{5}'"),
    ],
)
def test_rules_must_cover_and_be_used(rules: list[str], message: str) -> None:
    config = OptimConfig(rules=[Rule(match=match) for match in rules])
    with pytest.raises(UserError) as error:
        build_optimizer(parameters(model_names()).items(), config, "cpu")
    assert str(error.value) == message


def test_freezing_everything_is_refused() -> None:
    config = OptimConfig(rules=[Rule(match=".*", freeze=True)])
    with pytest.raises(UserError, match=r"optim\.rules freeze every parameter"):
        build_optimizer(parameters(model_names()).items(), config, "cpu")


def test_broken_regex_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"'\(bias' is not a regular expression: missing \)"):
        Rule(match="(bias")


@pytest.mark.parametrize(
    "field",
    [{"lr": 0.0}, {"betas": [0.9, 1.0]}, {"eps": 0.0}, {"weight_decay": -0.1}, {"schedule": {"kind": "step"}}],
)
def test_values_out_of_range_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OptimConfig.model_validate(field)


def test_config_reads_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "optim.yaml"
    path.write_text("""
        betas: [0.9, 0.98]
        weight_decay: 0
        schedule: {kind: cosine, warmup_steps: 5}
        rules: [{match: '^encoder\\.', layer_decay: 0.95}, {match: '.*'}]
    """)
    assert load(OptimConfig, path) == OptimConfig(
        betas=(0.9, 0.98),
        schedule=Cosine(warmup_steps=5),
        rules=[Rule(match=r"^encoder\.", layer_decay=0.95), Rule(match=".*")],
    )


def test_set_lr_keeps_the_scales() -> None:
    rules = [Rule(match="^encoder", lr_scale=0.5), Rule(match=".*")]
    optimizer = build_optimizer(parameters(model_names()).items(), OptimConfig(lr=1e-3, rules=rules), "cpu")
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 1e-3]
    set_lr(optimizer, 1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 1e-4]


@pytest.mark.parametrize(
    ("implementation", "device_type", "expected"),
    [
        ("auto", "cpu", AdamW),
        ("auto", "cuda", torch.optim.AdamW),
        ("foreach", "cuda", AdamW),
        ("fused", "cpu", torch.optim.AdamW),
    ],
)
def test_implementation_follows_the_device(implementation: Any, device_type: str, expected: type) -> None:
    config = OptimConfig(implementation=implementation, betas=(0.8, 0.9), eps=1e-4)
    optimizer = build_optimizer(parameters(model_names()).items(), config, device_type)
    assert type(optimizer) is expected
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.9), 1e-4)
    assert optimizer.defaults.get("fused", False) == (expected is torch.optim.AdamW)


def test_fused_where_torch_has_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.implementation is 'fused', which torch lacks on 'xla'; use 'auto'"):
        build_optimizer(parameters(model_names()).items(), OptimConfig(implementation="fused"), "xla")
