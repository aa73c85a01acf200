"""An experiment as one YAML file: what it trains, on which data, for how long, and where it leaves its results.

Training is a list of stages. Most experiments have one, which is the experiment's own keys; those with several say in
`stages` what each does differently.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)
from tokenizers import Tokenizer
from torch import nn

from mtl_dist.checkpoint import CheckpointConfig
from mtl_dist.config import Config, Keys, MisfitError, Pattern, UserError, UserPath
from mtl_dist.data.mixer import AnyMixer, Joint, Order, Size
from mtl_dist.data.prepare import Split, prepare, refuse_unusable
from mtl_dist.data.read import Source, SourceError, is_same, name_of
from mtl_dist.distributed import DistributedConfig, Precision
from mtl_dist.metrics import OVERALL
from mtl_dist.model.weights import EncoderConfig, max_positions
from mtl_dist.optim import EVERYTHING, AnySchedule, OptimConfig, Rate
from mtl_dist.surgery.surgery import SurgeryConfig
from mtl_dist.tasks import HiddenWordsLoss, Objective, OwnLosses, SplitName, TaskConfig


def _usable(name: str) -> str:
    # Task names become file names, parameter names and attributes of a module.
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise ValueError("a task's name is a letter followed by letters, digits, '_' or '-'")
    if hasattr(nn.ModuleDict(), name) or name in OVERALL:
        raise ValueError(f"'{name}' has a meaning of its own here; choose another name for the task")
    return name


TaskName = Annotated[str, AfterValidator(_usable)]


# Short names for what a stage trains.
TRAINS = {"all": list(EVERYTHING), "heads": [r"^heads\."]}


def _spelt_out(trains: object) -> object:
    if isinstance(trains, str) and trains not in TRAINS:
        raise ValueError(f"'{trains}' is neither all nor heads; patterns come in a list: ['{trains}']")
    return TRAINS[trains] if isinstance(trains, str) else trains


Trains = Annotated[
    list[Pattern],
    Field(min_length=1),
    BeforeValidator(_spelt_out),
    WithJsonSchema({"anyOf": [{"enum": list(TRAINS)}, {"type": "array", "items": {"type": "string"}}]}),
]
Epochs = Annotated[float, Field(ge=0, le=1e6)]


class GradientsConfig(SurgeryConfig):
    """How a step's gradients are gathered and combined."""

    # per_task: a draw counts by its mean loss; per_sample: every row of a step counts alike, so large batches win.
    reweight: Literal["per_task", "per_sample"] = "per_task"
    accumulation: PositiveInt = 1  # micro-batches that each process computes a draw in; changes memory alone
    max_tokens: PositiveInt | None = None  # of a micro-batch: there are as many more of them as this takes
    clip_norm: PositiveFloat | None = None  # largest norm of the gradient, over all parameters
    # A gradient that is infinite or NaN: the step is left out, the task that it comes from is, or the run ends.
    nonfinite: Literal["skip_step", "drop_task", "stop"] = "skip_step"
    most_nonfinite: PositiveInt = 10  # steps in a row with such a gradient, after which the run ends

    def of_surgery(self) -> dict[str, Any]:
        """The arguments of Surgery."""
        settings = {name: getattr(self, name) for name in SurgeryConfig.model_fields}
        return settings | {"drop_nonfinite": self.nonfinite == "drop_task"}


class StageConfig(Config):
    """One stage of the training; what it leaves out is as the experiment says."""

    name: str | None = Field(None, min_length=1, max_length=40)  # by default its number, from 1
    tasks: list[TaskName] | None = Field(None, min_length=1)  # the ones it trains; all are scored after it
    objective: Objective = OwnLosses()
    mixer: AnyMixer | None = None
    epochs: Epochs | None = None
    steps: PositiveInt | None = None
    lr: Rate | None = None
    schedule: AnySchedule | None = None  # over the steps of the stage
    trains: Trains = TRAINS["all"]  # all, heads, or patterns of the names of parameters; optim.rules can freeze more
    gradients: GradientsConfig | None = None
    carry_moments: bool = False  # whether the optimizer goes on with what it knows from earlier stages


@dataclass(frozen=True)
class Stage:
    """One stage, with all that it takes from the experiment."""

    number: int
    name: str
    label: str  # what errors begin with: nothing where there is only one
    tasks: dict[str, TaskConfig]
    objective: Objective
    mixer: AnyMixer
    epochs: float
    steps: int | None
    optim: OptimConfig
    trains: list[str]
    gradients: GradientsConfig
    carry_moments: bool

    @property
    def finds_words(self) -> bool:
        """Whether it hides words, and trains no head of a task."""
        return isinstance(self.objective, HiddenWordsLoss)

    def order(self, rows: Mapping[str, int], seed: int) -> Order:
        """What each step draws, where a task has so many train rows."""
        sizes = {}
        for name, task in self.tasks.items():
            wanted = rows[name] if task.subsample is None else task.subsample.rows
            if wanted > rows[name]:
                raise UserError(f"tasks.{name}.subsample.rows is {wanted:,}, but train has only {rows[name]:,} rows")
            sizes[name] = Size(wanted, task.batch_size)
        try:
            return self.mixer.order(sizes, (seed, self.number), self.epochs, self.steps)
        except UserError as error:
            raise UserError(f"{self.label}{error}") from None


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
    epochs: Epochs | None = None  # as the mixer counts them, by default 1; 0 scores the untrained model
    steps: PositiveInt | None = None  # instead of epochs
    precision: Precision | None = None  # by default the launcher's, else fp32
    encoder: EncoderConfig
    tasks: dict[TaskName, TaskConfig] = Field(min_length=1)
    mixer: AnyMixer = Joint()
    # So many draws of a task have their rows sorted by length before they are cut into batches, so that sentences of
    # like length are computed together; 1 leaves the shuffled order alone.
    length_window: PositiveInt = 16
    gradients: GradientsConfig = GradientsConfig()
    optim: OptimConfig = OptimConfig()
    stages: list[StageConfig] = Field([])
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    distributed: DistributedConfig = DistributedConfig()

    @model_validator(mode="after")
    def _inherit_gradients(self) -> "Experiment":
        """Lays what a stage says of gradients over what the experiment says."""
        stages = []
        for stage in self.stages:
            if stage.gradients is not None:
                own = {name: getattr(stage.gradients, name) for name in stage.gradients.model_fields_set}
                stage = stage.model_copy(update={"gradients": self.gradients.model_copy(update=own)})
            stages.append(stage)
        self.__dict__["stages"] = stages  # frozen for everybody else
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "Experiment":
        if self.epochs is not None and self.steps is not None:
            message = f"epochs ({self.epochs:g}) and steps ({self.steps}) are both given; set one of them to null"
            raise MisfitError(("epochs",), message)
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "Experiment":
        for index, config in enumerate(self.stages):
            here = f"stages[{index}]"
            if config.epochs is not None and config.steps is not None:
                raise MisfitError(("stages", index), f"{here} has both epochs and steps; give one of them")
            if config.carry_moments and index == 0:
                raise MisfitError(
                    ("stages", 0, "carry_moments"), f"{here}.carry_moments: no stage comes before this one"
                )
            for name in config.tasks or []:
                if name not in self.tasks:
                    known = ", ".join(self.tasks)
                    raise MisfitError(
                        ("stages", index, "tasks"), f"{here}.tasks: there is no task '{name}', only {known}"
                    )
            if config.tasks is not None and len(set(config.tasks)) < len(config.tasks):
                twice = ", ".join(config.tasks)
                raise MisfitError(("stages", index, "tasks"), f"{here}.tasks names a task twice: {twice}")
        names = [stage.name for stage in self.all_stages()]
        if len(set(names)) < len(names):
            raise MisfitError(("stages",), f"stages: two have the same name: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _mixers_and_gradients_fit(self) -> "Experiment":
        for index, stage in enumerate(self.all_stages()):
            own = bool(self.stages) and self.stages[index].mixer is not None
            keys: Keys = ("stages", index, "mixer") if own else ("mixer",)
            try:
                stage.mixer.refuse_others(list(stage.tasks))
            except ValueError as error:
                raise MisfitError(keys, f"{stage.label}mixer.{error}") from None
            gradients = stage.gradients
            of_stage = bool(self.stages) and "gradients" in self.stages[index].model_fields_set
            of_gradients: Keys = ("stages", index, "gradients") if of_stage else ("gradients",)
            try:
                gradients.refuse_misfits()
            except UserError as error:
                raise MisfitError(of_gradients, f"{stage.label}gradients.{error}") from None
            if not stage.finds_words and (gradients.accumulation > 1 or gradients.max_tokens is not None):
                for name, task in stage.tasks.items():
                    if task.ranking is not None:
                        raise MisfitError(
                            ("tasks", name, "ranking"),
                            f"{stage.label}tasks.{name}.ranking compares all pairs of a draw, which micro-batches keep "
                            "apart: leave out gradients.accumulation and max_tokens",
                        )
            if gradients.nonfinite == "drop_task" and not gradients.always_apart:
                raise MisfitError(
                    of_gradients,
                    f"{stage.label}gradients.nonfinite is drop_task, which needs the tasks' gradients apart in every "
                    "step: set measure",
                )
            kind = gradients.combiner.kind
            if gradients.operates and len(stage.tasks) > 1 and stage.mixer.most_tasks(len(stage.tasks)) == 1:
                raise MisfitError(
                    keys,
                    f"{stage.label}mixer {stage.mixer.kind} draws one task a step, but gradients.combiner {kind} "
                    "needs several; joint draws all of them",
                )
        return self

    @model_validator(mode="after")
    def _scored_on_other_rows(self) -> "Experiment":
        for name in self.tasks:
            train, dev = self.source(name, "train"), self.source(name, "dev")
            if train is not None and dev is not None and is_same(train, dev):
                raise MisfitError(
                    ("tasks", name, "dev"),
                    f"tasks.{name}.dev is what the task trains on, {name_of(dev)}: its scores would say nothing; "
                    "name other rows, or set it to null",
                )
        return self

    @model_validator(mode="after")
    def _best_is_scored(self) -> "Experiment":
        scored = [name for name, task in self.tasks.items() if task.dev is not None]
        choices = [*OVERALL, *scored]
        if (best_by := self.evaluate.best_by) not in choices:
            message = f"evaluate.best_by is '{best_by}', none of {', '.join(choices)}"
            raise MisfitError(("evaluate", "best_by"), message)
        return self

    def all_stages(self) -> list[Stage]:
        """The stages in their order, each with what it takes from the experiment."""
        stages = []
        for number, stage in enumerate(self.stages or [StageConfig()]):
            name = stage.name or str(number + 1)
            own_length = stage.epochs is not None or stage.steps is not None
            changes = {"lr": stage.lr, "schedule": stage.schedule}
            stages.append(
                Stage(
                    number=number,
                    name=name,
                    label=f"stage '{name}': " if self.stages else "",
                    tasks={name: self.tasks[name] for name in stage.tasks or self.tasks},
                    objective=stage.objective,
                    mixer=stage.mixer or self.mixer,
                    epochs=next((n for n in (stage.epochs, self.epochs) if n is not None), 1.0),
                    steps=stage.steps if own_length else self.steps,
                    optim=self.optim.model_copy(update={key: new for key, new in changes.items() if new is not None}),
                    trains=stage.trains,
                    gradients=stage.gradients or self.gradients,
                    carry_moments=stage.carry_moments,
                )
            )
        return stages

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
        checked: bool = False,
    ) -> Split | None:
        """The prepared rows of a task's split, or None where the task has no such split."""
        source = self.source(task, split)
        if source is None:
            return None
        return self.open_source(task, source, tokenizer, split, on_rows=on_rows, checked=checked)

    def open_source(
        self,
        task: str,
        source: Source,
        tokenizer: Tokenizer,
        split: SplitName | None = None,
        labelled: bool = True,
        on_rows: Callable[[int], object] = lambda rows: None,
        checked: bool = False,
    ) -> Split:
        """The prepared rows of `source` as rows of a task; refuses bad rows unless the task skips them."""
        reading = self.tasks[task].reading(labelled)
        whose = f"task '{task}'" if split is None else f"task '{task}', {split}"
        with nullcontext() if split is None else self.naming(task, split):
            prepared = prepare(reading, source, tokenizer, self.max_length(task), self.cache_dir, on_rows, checked)
            refuse_unusable(whose, reading, source, len(prepared), prepared.rejected())
        return prepared

    @contextmanager
    def naming(self, task: str, split: SplitName) -> Iterator[None]:
        """Puts before what is wrong with a source which one it is, and where the config names it."""
        try:
            yield
        except SourceError as error:
            raise UserError(f"{self.place_of('tasks', task, split)}: {error}") from error
