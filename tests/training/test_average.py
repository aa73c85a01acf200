"""The average of the weights: scored and kept in the place of the last ones, under every engine, and never trained on.

python -m pytest tests/training/test_average.py
"""

from pathlib import Path

import pytest
from torch import Tensor

from mtl_dist.config import UserError, load
from mtl_dist.experiment import Experiment
from mtl_dist.optim import Average
from tests.distributed import on_ranks
from tests.trained import ENGINES, NO_DROPOUT, far_apart, run, run_under, written_out

AVERAGE = [*NO_DROPOUT, "optim.average={decay: 0.4}", "log.tensorboard=false", "steps=6"]


def average_written_out(config: Path, decay: float, steps: int) -> dict[str, Tensor]:
    """Every step's weights, each from a training of its own, averaged by the formula of the docs."""
    average: dict[str, Tensor] = {}
    for t in range(1, steps + 1):
        weights = written_out(config, *NO_DROPOUT, f"steps={t}")
        d = min(decay, t / (t + 9))
        average = {name: d * average.get(name, weight) + (1 - d) * weight for name, weight in weights.items()}
    return average


def test_it_starts_with_the_last_weights_and_remembers_more_and_more() -> None:
    average = Average(decay=0.5)
    assert [average.share(t) for t in (1, 3, 9, 27, 1000)] == pytest.approx([0.9, 0.75, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("engine", ["one process", *ENGINES])
def test_what_is_kept_is_the_average_and_what_is_trained_is_not(tiny: Path, engine: str) -> None:
    expected = average_written_out(tiny, 0.4, 6)
    last = written_out(tiny, *NO_DROPOUT, "steps=6")
    assert far_apart(expected, last) > 1e-4
    ranks = [run(tiny, *AVERAGE)] if engine == "one process" else on_ranks(2, run_under, engine, tiny, *AVERAGE)
    for rank in ranks:
        assert far_apart(rank["kept"], expected) < 1e-6
        # What was scored is what is kept.
        assert far_apart(rank["parameters"], rank["kept"]) < 1e-6


def test_training_does_not_see_it(tiny: Path) -> None:
    stages = [*NO_DROPOUT, "evaluate.every_steps=2", "stages=[{steps: 4}, {steps: 3}, {steps: 3, carry_moments: true}]"]
    saved = []
    for extra in ([], ["optim.average={}"]):
        run(tiny, *stages, *extra)
        (last,) = (tiny.parent / "run" / "checkpoints").glob("step-*10")
        saved.append(weights_of(last))
    assert far_apart(*saved) == 0


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    (file,) = checkpoint.glob("*.safetensors")
    return {name: value for name, value in load_file(file).items() if name.startswith("weights/")}


def test_every_stage_has_an_average_of_its_own(tiny: Path) -> None:
    second = "{name: b, steps: 1, carry_moments: true}"
    stages = [*NO_DROPOUT, "steps=null", f"stages=[{{name: a, steps: 5}}, {second}]", "evaluate.best_by=mood"]
    averaged = run(tiny, *stages, "optim.average={decay: 0.9}")
    # After the second stage's first step its average is the weights themselves: what is scored without one as well.
    assert far_apart(averaged["parameters"], run(tiny, *stages)["parameters"]) == 0


def test_a_run_that_goes_on_without_an_average_forgets_it(tiny: Path) -> None:
    short = [*NO_DROPOUT, "steps=4", "optim.average={decay: 0.99}"]
    run(tiny, *short)
    gone_on = run(tiny, *NO_DROPOUT, "steps=8", resume="auto")
    assert far_apart(gone_on["parameters"], run(tiny, *NO_DROPOUT, "steps=8")["parameters"]) < 1e-6


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("{decay: 1.0}", "optim.average.decay is 1.0; must be less than 1"),
        ("{dekay: 0.9}", "optim.average has no field 'dekay'; did you mean 'decay'?"),
        ("0.9", "optim.average is 0.9, not a mapping"),
    ],
)
def test_wrong_averages_are_refused(tiny: Path, value: str, line: str) -> None:
    with pytest.raises(UserError) as refused:
        load(Experiment, tiny, [f"optim.average={value}"])
    assert line in str(refused.value)
