"""The space of a sweep: a YAML file that says what the values of some keys of an experiment are drawn from.

optim.lr: {low: 1e-5, high: 2e-4, log: true}
tasks.quora.head: {choices: [sbert, cross_encoder]}
"""

import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, PositiveFloat, WrapValidator, model_validator

from mtl_dist.config import Config, MisfitError, UserError, flow, load
from mtl_dist.experiment import Experiment

if TYPE_CHECKING:
    import optuna

FINEST = 2**53  # steps of a range: more of them no float tells apart

# What only the sweep can say, or no trial could be compared with another.
NOT_DRAWN = {"output_dir": "every trial has a folder of its own below --out"}
DECIDES = "it decides which trial is the best; set it for all of them, in the config"

Value = float | str  # of a choice its YAML on one line, which also stands for lists and mappings


def _as_written(value: Any, check: Callable[[Any], float]) -> Any:
    check(value)
    return value


Number = Annotated[float, WrapValidator(_as_written)]  # a whole number stays one


class Parameter(Config):
    """What the values of one key are drawn from: a range, both ends of it included, or choices."""

    low: Number | None = None  # of two whole numbers only whole ones are drawn; 1.0 is none
    high: Number | None = None
    step: Annotated[PositiveFloat, WrapValidator(_as_written)] | None = None  # from low on
    log: bool = False  # as many values from 1 to 10 as from 10 to 100
    choices: list[Any] | None = Field(None, min_length=1)  # of any YAML

    @model_validator(mode="after")
    def _makes_sense(self) -> "Parameter":
        if self.choices is not None:
            if others := self.model_fields_set - {"choices"}:
                raise ValueError(f"choices stand alone, without {', '.join(sorted(others))}")
            twice = [choice for choice in self.texts if self.texts.count(choice) > 1]
            if twice:
                raise MisfitError(("choices",), f"choices has {twice[0]} twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low is {self.low}, not below high, which is {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}; on a log scale it must be above 0")
        if self.log and self.step is not None:
            raise ValueError("log and step are both given; leave one of them out")
        if self.step is not None:
            # In decimal, as it is written: 0.3 is three times 0.1.
            low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
            if (high - low) / step > FINEST:
                raise ValueError(f"step is {self.step}, too fine for {self.low} to {self.high}; leave it out")
            if (high - low) % step:
                last = low + (high - low) // step * step
                raise ValueError(f"high is {self.high}, which no step of {self.step} meets; the last one is at {last}")
        return self

    @property
    def texts(self) -> list[str]:
        """The choices, each as YAML on one line."""
        return list(map(flow, self.choices or []))

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    @property
    def ends(self) -> list[str]:
        """The values that stand for all when a config is checked: of a range both ends."""
        return self.texts or [flow(self.low), flow(self.high)]

    def suggest(self, key: str, trial: "optuna.Trial") -> Value:
        """The value of a trial; it is drawn once."""
        if self.choices is not None:
            return str(trial.suggest_categorical(key, self.texts))
        assert self.low is not None and self.high is not None
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(key, int(self.low), int(self.high), step=step, log=self.log)
        return trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether a number could be drawn from this range."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        assert self.low is not None and self.high is not None
        if not self.low <= value <= self.high:
            return False
        return self.step is None or not (Decimal(str(value)) - Decimal(str(self.low))) % Decimal(str(self.step))

    def __str__(self) -> str:
        if self.choices is not None:
            return ", ".join(self.texts)
        steps = "" if self.step is None else f" in steps of {self.step}"
        return f"{self.low} to {self.high}{' on a log scale' if self.log else steps}{', whole' if self.whole else ''}"


class Space(Config):
    """The keys of an experiment that are drawn, and from what."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Parameter]

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What is drawn, by its key."""
        return self.__pydantic_extra__

    @model_validator(mode="after")
    def _keys_are_apart(self) -> "Space":
        for key in self.parameters:
            inside = [other for other in self.parameters if other.startswith(f"{key}.")]
            if inside:
                raise MisfitError(
                    (inside[0],), f"{inside[0]} is a part of {key}, which is drawn as well; write it into its choices"
                )
        return self


def read_space(path: Path) -> Space:
    """The space in a YAML file."""
    space = load(Space, path)
    if not space.parameters:
        raise UserError(f"{path}: no key is drawn; name one, such as optim.lr: {{low: 1e-5, high: 1e-4, log: true}}")
    return space


def own_values(space: Space, config: Path, overrides: Sequence[str]) -> dict[str, Value]:
    """The values that the experiment itself has of what is drawn, as far as they lie in the space.

    Refuses a space of which a value, each taken alone, does not fit the experiment, or would decide which is the best.
    """
    experiment = load(Experiment, config, overrides)
    fields = experiment.model_dump(mode="json", by_alias=True)
    own: dict[str, Value] = {}
    problems = []
    for key, parameter in space.parameters.items():
        for text in parameter.ends:
            override, place = f"{key}={text}", space.place_of(key).removesuffix(key)
            try:
                drawn = load(Experiment, config, [*overrides, override])
            except UserError as error:
                problems.append(str(error).split("\n")[0].replace(f"override {override!r}: ", place))
                break
            if changed := next(
                (part for part, fixed in _fixed(experiment) if (part, fixed) not in _fixed(drawn)), None
            ):
                what = changed if changed == key else f"{key} changes {changed}, which"
                problems.append(f"{place}{what} cannot be drawn: {NOT_DRAWN.get(changed, DECIDES)}")
                break
            if parameter.choices is not None and drawn == experiment:
                own.setdefault(key, text)
        value = _at(fields, key)
        if parameter.choices is None and parameter.holds(value):
            own[key] = value
    if problems:
        raise UserError("\n".join(problems))
    return own


def _fixed(experiment: Experiment) -> list[tuple[str, Any]]:
    """What must be the same in all trials, by its key."""
    found: list[tuple[str, Any]] = [
        ("output_dir", experiment.output_dir),
        ("evaluate.best_by", experiment.evaluate.best_by),
        ("tasks", experiment.tasks.keys()),
    ]
    for name, task in experiment.tasks.items():
        found += [(f"tasks.{name}.metric", task.metric), (f"tasks.{name}.dev", experiment.source(name, "dev"))]
    return found


def _at(fields: Any, key: str) -> Any:
    """What a dotted key leads to; None where there is nothing."""
    for part in key.split("."):
        if isinstance(fields, Mapping):
            fields = fields.get(part)
        else:
            fields = fields[int(part)] if isinstance(fields, list) and part in map(str, range(len(fields))) else None
    return fields


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """What a trial's values are as overrides of the experiment."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def into(folder: Path) -> str:
    """A run's folder as an override, whatever its name holds."""
    return f"output_dir={flow(str(folder))}"
