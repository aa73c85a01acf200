"""What a step draws and how long an epoch is, worked by hand.

python -m pytest tests/data/test_mixer.py
"""

import pytest

from mtl_dist.data.mixer import Joint

ROWS = {"sst": 8544, "quora": 141506, "sts": 6041}


def test_joint_draws_the_next_batch_of_every_task() -> None:
    assert Joint().draws(["sst", "quora", "sts"], step=7) == {"sst": 7, "quora": 7, "sts": 7}


@pytest.mark.parametrize(
    ("sizes", "epochs", "steps"),
    [
        # 8544 / 8 = 1068 steps; quora needs 1003.6 and sts 1006.8
        ({"sst": 8, "quora": 141, "sts": 6}, 1, 1068),
        ({"sst": 8, "quora": 141, "sts": 6}, 10, 10680),
        ({"sst": 2, "quora": 35, "sts": 1}, 1, 6041),
        ({"sst": 32, "quora": 32, "sts": 32}, 1, 4423),  # 4422.1: the last rows are a step of their own
        ({"sst": 32, "quora": 32, "sts": 32}, 10, 44221),  # 44220.6: but only once
        ({"sst": 32, "quora": 32, "sts": 32}, 0.5, 2212),
        ({"sst": 32, "quora": 32, "sts": 32}, 1e-9, 1),
    ],
)
def test_the_longest_task_sets_the_epoch(sizes: dict[str, int], epochs: float, steps: int) -> None:
    assert Joint().steps(ROWS, sizes, epochs) == steps


def test_whole_epochs_are_counted_exactly() -> None:
    # 29 / 7 is a little more to a computer, and 7 times that would round up to 30.
    assert Joint().steps({"a": 29}, {"a": 7}, 7) == 29
