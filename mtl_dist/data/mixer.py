"""Which tasks does a step draw, and when is an epoch over.

A mixer holds no state: what a step draws is a function of the step alone, so every rank draws the same and a run
resumes at any step.
"""

import math
from collections.abc import Mapping
from typing import Literal

from mtl_dist.config import Config


class Joint(Config):
    """Draws every task once a step. The longest task sets the epoch's length; the shorter ones start over."""

    kind: Literal["joint"] = "joint"

    def draws(self, tasks: list[str], step: int) -> dict[str, int]:
        """The tasks of a step, each with how often it has been drawn before: the number of its next batch."""
        return dict.fromkeys(tasks, step)

    def steps(self, rows: Mapping[str, int], batch_sizes: Mapping[str, int], epochs: float) -> int:
        """How many steps some epochs take."""
        return max(math.ceil(epochs * rows[task] / batch_sizes[task]) for task in rows)

    def epochs(self, rows: Mapping[str, int], batch_sizes: Mapping[str, int], steps: int) -> float:
        """How many epochs some steps make."""
        return min(steps * batch_sizes[task] / rows[task] for task in rows)


Mixer = Joint
