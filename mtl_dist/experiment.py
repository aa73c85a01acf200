"""An experiment as one YAML file: what it trains, on which data, for how long, and where it leaves its results."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator
from tokenizers import Tokenizer
from torch import nn

from mtl_dist.config import Config, UserError, UserPath
from mtl_dist.data.mixer import Joint, Mixer
from mtl_dist.data.prepare import Split, prepare, refuse_unusable
from mtl_dist.data.read import Source
from mtl_dist.distributed import DistributedConfig, Precision
from mtl_dist.metrics import OVERALL
from mtl_dist.model.weights import EncoderConfig, max_positions
from mtl_dist.optim import OptimConfig
from mtl_dist.tasks import SplitName, TaskConfig


def _usable(name: str) -> str:
    # Task names become file names, parameter names and attributes of a module.
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise ValueError("a task's name is a letter followed by letters, digits, '_' or '-'")
    if hasattr(nn.ModuleDict(), name) or name in OVERALL:
        raise ValueError(f"'{name}' has a meaning of its own here; choose another name for the task")
    return name


TaskName = Annotated[str, AfterValidator(_usable)]


class GradientsConfig(Config):
    """How a step's gradients are gathered."""

    accumulation: PositiveInt = 1  # micro-batches that each process computes a task's batch in; changes memory alone
    clip_norm: PositiveFloat | None = None  # largest norm of the gradient, over all parameters


class EvaluateConfig(Config):
    """When the dev sets are scored, and which score decides on the best model."""

    every_steps: PositiveInt | None = None  # by default once an epoch; always after the last step
    best_by: str = "overall_a"  # overall_a, overall_b, or a task's name for its metric
    max_tokens: PositiveInt = 8192  # of one batch on one process


class LogConfig(Config):
    """What is reported while training."""

    every_steps: PositiveInt = 10
    tensorboard: bool = True


class Experiment(Config):
    """The whole experiment."""

    output_dir: UserPath  # the run folder
    data_dir: UserPath = Path()  # where the tasks' relative paths start
    cache_dir: UserPath = Field(
        Path("~/.cache/mtl_dist"), validate_default=True
    )  # tokenised data; shared by all runs, safe to delete
    seed: int = Field(0, ge=0, lt=2**63)
    epochs: float = Field(1.0, gt=0, le=1e6)  # as the mixer counts them
    steps: PositiveInt | None = None  # instead of epochs
    precision: Precision | None = None  # by default the launcher's, else fp32
    encoder: EncoderConfig
    tasks: dict[TaskName, TaskConfig] = Field(min_length=1)
    mixer: Mixer = Joint()
    gradients: GradientsConfig = GradientsConfig()
    optim: OptimConfig = OptimConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()
    distributed: DistributedConfig = DistributedConfig()

    @model_validator(mode="after")
    def _best_is_scored(self) -> "Experiment":
        scored = [name for name, task in self.tasks.items() if task.dev is not None]
        choices = [*OVERALL, *scored]
        if self.evaluate.best_by not in choices:
            raise ValueError(f"evaluate.best_by is '{self.evaluate.best_by}', none of {', '.join(choices)}")
        return self

    def source(self, task: str, split: SplitName) -> Source | None:
        """Where the rows of a task's split are."""
        return self.tasks[task].source(split, self.data_dir)

    def max_length(self, task: str) -> int:
        """How many tokens of a task's inputs the encoder reads."""
        asked, limit = self.tasks[task].max_length, max_positions(self.encoder)
        if asked is not None and asked > limit:
            raise UserError(f"tasks.{task}.max_length is {asked}, the encoder has only {limit} positions")
        return asked or limit

    def open_split(
        self,
        task: str,
        split: SplitName,
        tokenizer: Tokenizer,
        on_rows: Callable[[int], object] = lambda rows: None,
    ) -> Split | None:
        """The prepared rows of a task's split, or None where the task has no such split."""
        source = self.source(task, split)
        return None if source is None else self.open_source(task, source, tokenizer, on_rows=on_rows)

    def open_source(
        self,
        task: str,
        source: Source,
        tokenizer: Tokenizer,
        labelled: bool = True,
        on_rows: Callable[[int], object] = lambda rows: None,
    ) -> Split:
        """The prepared rows of `source` as rows of a task; refuses bad rows unless the task skips them."""
        config, max_length = self.tasks[task], self.max_length(task)
        prepared = prepare(config, source, tokenizer, max_length, self.cache_dir, labelled=labelled, on_rows=on_rows)
        refuse_unusable(task, config, source, len(prepared), prepared.rejected())
        return prepared
