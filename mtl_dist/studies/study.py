"""Trains every config of a folder, with as many seeds as are asked for, and puts what came of it into one table.

DIR/
    runs/<key>/seed-<n>/    a run each, like any other; <key> is the config's name without .yaml
    runs/<key>/seed-<n>.log what it said
    study.md  study.csv  study.json  study.png    written anew after every run that ends

A study keeps no state of its own: what is done is what the run folders say. So the same command goes on after a crash,
more seeds are more runs, and a config that was changed meanwhile is seen and refused.
"""

import fnmatch
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import yaml
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from mtl_dist.checkpoint import RunLock
from mtl_dist.config import CONFIG_FILE, UserError, differences, flow, load
from mtl_dist.data.mixer import AnyMixer, UniMax
from mtl_dist.data.tokenizer import load_tokenizer
from mtl_dist.experiment import TRAINS, Experiment
from mtl_dist.metrics import OVERALL
from mtl_dist.optim import Schedule
from mtl_dist.runs.story import Reader, Record, Story, story_of
from mtl_dist.studies import array, document
from mtl_dist.studies.jobs import Job, Jobs, why_it_ended
from mtl_dist.studies.plan import tokens_of_draws
from mtl_dist.studies.published import PUBLISHED, Published, published_beside
from mtl_dist.studies.table import Outcome, Row, outcome_of, system_of
from mtl_dist.training.setup import load_data
from mtl_dist.watch.screen import Drawn, make_console, plain_table

LOOK_EVERY_S = 0.5
DRAW_EVERY_S = 60.0  # at most; besides the last time


@dataclass(frozen=True)
class Wanted:
    """What a study is asked for."""

    configs: list[Path]
    overrides: list[str]
    out: Path
    seeds: int = 1
    scale: float = 1.0
    lr_scale: float = 1.0
    only: list[str] = field(default_factory=list)
    jobs: int | None = None  # at a time; by default one here, and as many as there is room for on a cluster
    command: list[str] = field(default_factory=list)  # as it was typed


@dataclass(frozen=True)
class Planned:
    """A run that is to be there at the end."""

    key: str
    seed: int
    config: Experiment
    job: Job
    asked: bool  # else it is there from an earlier time, and stays in the table

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.config.output_dir

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.key} seed-{self.seed}"


def run_study(wanted: Wanted, slurm: bool, lock: RunLock) -> None:
    """Runs what is not done yet, here or as an array of SLURM, and gathers all that is."""
    console = make_console(True)
    study = Gathering(wanted, console, lock)
    if not console.is_terminal:  # where they stand under the runs
        for line in study.faults():
            study.tell(line)  # now, and not only when all others have ended
    try:
        if slurm:
            array.submit(study.waiting(), wanted.out, wanted.jobs, study.tell)
        else:
            _run_here(study, console)
    finally:
        study.write()
        console.print(
            f"{len(study.done)} of {len(study.runs)} runs done: {wanted.out / document.MARKDOWN}", highlight=False
        )
    if study.undone:
        raise UserError("\n".join(study.faults()))


def configs_of(paths: Sequence[Path]) -> list[Path]:
    """The configs among files and folders: of a folder those that no other one extends."""
    found = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        files = sorted(file for file in path.glob("*.yaml") if file.name != PUBLISHED) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path}: no *.yaml in this folder")
        bases = {base for file in files if (base := _extended(file)) is not None} if path.is_dir() else set()
        found += [file for file in files if file.resolve() not in bases]
    by_key: dict[str, Path] = {}
    for file in dict.fromkeys(found):
        if (other := by_key.setdefault(file.stem, file)) is not file:
            raise UserError(f"{other} and {file} have the same name, by which a study knows them; rename one of them")
    return list(by_key.values())


def _extended(file: Path) -> Path | None:
    try:
        raw = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):  # it will not load either, and then there is a line on it
        return None
    base = raw.get("extends") if isinstance(raw, dict) else None
    return (file.parent / base).resolve() if isinstance(base, str) else None


def scaled(config: Experiment, scale: float, lr_scale: float = 1.0) -> list[str]:
    """The overrides that multiply every length of every stage (epochs, steps, warm-up, and UniMax's epochs), and the
    learning rate of every stage that trains the encoder.
    """

    def lengths(
        prefix: str, epochs: float | None, steps: int | None, schedule: Schedule | None, mixer: AnyMixer | None
    ) -> Iterator[str]:
        if epochs is not None:
            yield f"{prefix}epochs={_times(epochs, scale)}"
        if steps is not None:
            yield f"{prefix}steps={max(1, round(steps * scale))}"
        if isinstance(mixer, UniMax):
            yield f"{prefix}mixer.max_epochs={_times(mixer.max_epochs, scale)}"
        if schedule is not None and schedule.warmup_steps:
            at = f"{prefix}schedule" if prefix else "optim.schedule"
            yield f"{at}.warmup_steps={round(schedule.warmup_steps * scale)}"

    overrides: list[str] = []
    if scale != 1:
        epochs = 1.0 if config.epochs is None and config.steps is None else config.epochs  # the default is one as well
        overrides += lengths("", epochs, config.steps, config.optim.schedule, config.mixer)
        for number, own in enumerate(config.stages):
            overrides += lengths(f"stages.{number}.", own.epochs, own.steps, own.schedule, own.mixer)
    if lr_scale != 1:
        for stage in config.all_stages():
            if stage.trains != TRAINS["heads"]:  # which another encoder leaves as they are
                key = f"stages.{stage.number}.lr" if config.stages else "optim.lr"
                overrides.append(f"{key}={_times(stage.optim.lr, lr_scale)}")
    return overrides


def _times(length: float, scale: float) -> str:
    return f"{length * scale:.12g}"  # 3 x 0.1 is 0.3


class Gathering:
    """All runs of a study: what they are, which are done, and what came of them."""

    def __init__(self, wanted: Wanted, console: Console, lock: RunLock) -> None:
        self.wanted = wanted
        self.console = console
        self.published: Published = published_beside(wanted.configs)
        self.undone: dict[str, str] = {}  # and why
        self.done: dict[Path, Outcome] = {}
        self.runs: list[Planned] = []
        self.drawn = -math.inf  # when the picture last was
        keys = [path.stem for path in wanted.configs]
        for pattern in wanted.only:
            if not fnmatch.filter(keys, pattern):
                raise UserError(f"--only {pattern} fits no config; there are {', '.join(keys)}")
        self.chosen = {key for key in keys if _is_chosen(key, wanted.only)}
        for path in wanted.configs:
            with self._noting(path.stem):
                self.runs += self._of_config(path)
        for run in self.runs:
            self._look_at(run)
        self.budget = self._budget()
        if not (self.done or self.budget):
            raise UserError("\n".join(self.faults()))
        lock.take(wanted.out, 0, self.tell, "--out")  # or two studies would start the same runs

    def _of_config(self, path: Path) -> Iterator[Planned]:
        """The runs of a config: the seeds that are asked for, and those that are there already."""
        key, wanted = path.stem, self.wanted
        folder = wanted.out / "runs" / key
        names = [run.parent.name.removeprefix("seed-") for run in folder.glob(f"seed-*/{CONFIG_FILE}")]
        there = {int(name) for name in names if name.isdecimal()}
        if not there and key not in self.chosen:
            return
        as_written = load(Experiment, path, wanted.overrides)
        overrides = [*wanted.overrides, *scaled(as_written, wanted.scale, wanted.lr_scale)]
        asked = {as_written.seed + n for n in range(wanted.seeds)} if key in self.chosen else set()
        for seed in sorted(asked | there):
            own = (*overrides, f"seed={seed}", f"output_dir={flow(str(folder / f'seed-{seed}'))}")
            job = Job(f"{key} seed-{seed}", path, own, folder / f"seed-{seed}.log")
            yield Planned(key, seed, load(Experiment, path, own), job, seed in asked)

    def _look_at(self, run: Planned) -> bool:
        """Whether a run is done; refuses one that was made with other settings."""
        if run.folder in self.done:
            return True
        if not (run.folder / CONFIG_FILE).is_file():
            return False
        try:
            story = story_of(run.folder)
        except UserError:  # its config is damaged: the run itself will say so, or write it anew
            return False
        self._refuse_changes(run, story)
        if story.ended:
            self.done[run.folder] = outcome_of(story)
        return story.ended

    def _refuse_changes(self, run: Planned, story: Story) -> None:
        found = differences(system_of(story.config), system_of(run.config))
        if found:
            key, then, now = found[0]
            raise UserError(
                f"{run.folder}: {key} was {_shown(then)}, and would be {_shown(now)} now; "
                "a study does not mix the two: choose another --out"
            )

    def _budget(self) -> dict[Path, float]:
        """About how many tokens each run is trained on that is not done yet; those that cannot start are left out."""
        budget: dict[Path, float] = {}
        of_key: dict[str, float] = {}
        for run in [run for run in self.runs if run.asked and run.folder not in self.done]:
            with self._noting(run.key):
                if run.key not in of_key and run.key not in self.undone:
                    of_key[run.key] = tokens_of(run.config, self.console)
            if run.key in of_key:
                budget[run.folder] = of_key[run.key]
        return budget

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """Makes what is wrong with one config a line about it; the others go on."""
        try:
            yield
        except UserError as error:
            self.undone[name] = "; ".join(str(error).split("\n"))

    def faults(self) -> list[str]:
        """A line for each config and each run that came to nothing."""
        places = {path.stem: str(path) for path in self.wanted.configs}
        names: dict[str, list[str]] = {}
        for name, why in self.undone.items():
            names.setdefault(why, []).append(name)
        lines = []
        for why, of in names.items():
            more = f" and {len(of) - 3} more" if len(of) > 3 else ""
            says_where = why.startswith(places.get(of[0], " "))
            lines.append(why if says_where else f"{', '.join(of[:3])}{more}: {why}")
        return lines

    def waiting(self) -> list[Planned]:
        """The runs that can be started, and are not done: all systems with their first seed, then with the next."""
        left = [run for run in self.runs if run.folder in self.budget and run.folder not in self.done]
        ranks = {run.folder: sorted(r.seed for r in self.runs if r.key == run.key).index(run.seed) for run in left}
        return sorted(left, key=lambda run: ranks[run.folder])

    def ended(self, run: Planned, code: int) -> bool:
        """Notes what came of a run that has just ended; whether it is done."""
        with self._noting(run.name):
            if code or not self._look_at(run):
                raise UserError(f"{why_it_ended(code, run.job.log)} ({run.job.log})")
        now = time.monotonic()
        if due := now - self.drawn > DRAW_EVERY_S:
            self.drawn = now
        self.write(with_picture=due)
        return run.name not in self.undone

    def write(self, with_picture: bool = True) -> None:
        """Writes the table as it is."""
        rows = []
        for key in dict.fromkeys(run.key for run in self.runs):
            runs = [run for run in self.runs if run.key == key]
            outcomes = [self.done[run.folder] for run in runs if run.folder in self.done]
            published = next((r.systems[key] for r in self.published.reports.values() if key in r.systems), None)
            rows.append(Row(key, runs[0].config, outcomes, len(runs), published))
        sections = document.sections_of(rows, self.published)
        wanted = self.wanted
        document.write(
            document.Study(
                wanted.command,
                wanted.scale,
                wanted.overrides,
                sections,
                self.published,
                self.undone,
                wanted.lr_scale,
            ),
            wanted.out,
            with_picture,
        )

    def tell(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _is_chosen(key: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch.fnmatchcase(key, pattern) for pattern in only)


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def tokens_of(config: Experiment, console: Console) -> float:
    """About how many tokens a run is trained on; its data are prepared for that, once for all runs."""
    train = load_data(config, load_tokenizer(config.encoder.tokenizer_source), console)["train"]
    rows = {name: len(split) for name, split in train.items()}
    return sum(
        tokens_of_draws(stage, name, draws, train[name])
        for stage in config.all_stages()
        for name, draws in stage.order(rows, config.seed).expected().items()
    )


def _run_here(study: Gathering, console: Console) -> None:
    """Runs what is left as processes on this machine."""
    left = study.waiting()
    with Jobs(study.wanted.jobs or 1) as jobs, Screen(study, console) as screen:
        of_job = {run.job.name: run for run in left}
        while left or jobs.under_way:
            while left and jobs.has_room:
                jobs.start(left[0].job)
                screen.started(left.pop(0))
            for job, code in jobs.ended():
                run = of_job[job.name]
                screen.ended(run, study.ended(run, code))
            screen.refresh()
            if jobs.under_way:
                time.sleep(LOOK_EVERY_S)


class Watch:
    """What a run that is under way writes down, read as it comes."""

    def __init__(self, run: Planned) -> None:
        self.run = run
        self.began = time.monotonic()
        self.reader = Reader(run.folder)
        self.last: dict[str, Record] = {}  # of each kind
        self.tokens_before: int | None = None  # that it had when this process began to watch

    def look(self) -> None:
        """Reads what is new."""
        records, _ = self.reader.read()
        self.last |= {record["kind"]: record for record in records}
        if self.tokens_before is None and self.last:
            self.tokens_before = self.tokens

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        record: Record = self.last.get("train", {})
        return int(record.get("tokens", 0))


class Screen(Drawn):
    """All runs on one screen: a bar over them, a line for each that is under way, and those that failed."""

    def __init__(self, study: Gathering, console: Console) -> None:
        super().__init__(console)
        self.study = study
        self.watches: dict[Path, Watch] = {}
        self.speeds: dict[Path, float] = {}  # tokens per second of each run
        self.took: list[tuple[float, int]] = []  # seconds and tokens of runs that ended while this study looked on
        self.bar = Progress(
            TextColumn("{task.completed:.0f} of {task.total:.0f} runs"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}"),
            console=console,
        )
        self.bar_id = self.bar.add_task("", total=len(study.runs), completed=len(study.done), state="starting")

    def __rich__(self) -> Group:
        table = plain_table("run", "step", "tokens/s", "dev", texts=["run", "dev"])
        for watch in self.watches.values():
            train, start = watch.last.get("train", {}), watch.last.get("start", {})
            steps = f"{train.get('step', 0):,}/{start['steps']:,}" if start else "starting"
            speed = f"{train['tokens_per_second']:,.0f}" if train else ""
            table.add_row(Text(watch.run.name), steps, speed, self._dev(watch))
        failed = [Text(f"{name}: {why}", "red", overflow="fold") for name, why in self.study.undone.items()]
        parts: list[RenderableType] = [table, ""] if self.watches else []
        return Group(*parts, *failed, self.bar)

    def _dev(self, watch: Watch) -> str:
        record, config = watch.last.get("dev"), watch.run.config
        if record is None:
            return ""
        name = config.evaluate.best_by
        score = record.get(name) if name in OVERALL else record["tasks"][name][config.tasks[name].metric]
        return f"{name} {'undefined' if score is None else f'{score:.4f}'}"

    def __exit__(self, *exception: object) -> None:
        stopped = len(self.watches)
        self.watches.clear()
        self.refresh()
        super().__exit__()
        if any(exception) and stopped:
            self.study.tell(f"stopping: {stopped} runs save what they have; the same command goes on")

    def started(self, run: Planned) -> None:
        """Shows that a run began, or goes on."""
        self.watches[run.folder] = Watch(run)
        if not self.live:
            self.study.tell(f"{run.name}: started, {run.job.log}")

    def ended(self, run: Planned, done: bool) -> None:
        """Shows what came of a run."""
        watch = self.watches.pop(run.folder)
        watch.look()
        self._note_speed(watch)
        self.took.append((time.monotonic() - watch.began, watch.tokens - (watch.tokens_before or 0)))
        if not done:
            self.study.tell(f"{run.name}: failed: {self.study.undone[run.name]}")
        elif not self.live:
            outcome, name = self.study.done[run.folder], run.config.evaluate.best_by
            score = outcome.scores.get(name)
            said = f", {name} {score:.4f}" if score is not None else ""
            self.study.tell(f"{run.name}: done{said}; {self._state()}")

    def refresh(self) -> None:
        """Shows how far all are."""
        for watch in self.watches.values():
            watch.look()
            self._note_speed(watch)
        if self.live:
            self.bar.update(self.bar_id, completed=len(self.study.done), state=self._state())
            self.live.refresh()

    def _note_speed(self, watch: Watch) -> None:
        if speed := watch.last.get("train", {}).get("tokens_per_second"):
            self.speeds[watch.run.folder] = speed

    def _state(self) -> str:
        study = self.study
        parts = [f"{len(self.watches)} running"] if self.watches else []
        parts += [f"{len(study.undone)} failed"] if study.undone else []
        return ", ".join([*parts, self._time_left()])

    def _time_left(self) -> str:
        """From the tokens that are left, the speed of training, and what runs took besides it."""
        study = self.study
        if not self.speeds:
            return "time left not known yet"
        per_token = sum(1 / speed for speed in self.speeds.values()) / len(self.speeds)
        besides = [max(0.0, seconds - tokens * per_token) for seconds, tokens in self.took]
        start = sum(besides) / len(besides) if besides else 0.0
        gone = {run.folder for run in study.runs if run.name in study.undone} | study.done.keys() | self.watches.keys()
        waiting = [tokens for folder, tokens in study.budget.items() if folder not in gone]
        running = [max(0.0, study.budget[folder] - watch.tokens) for folder, watch in self.watches.items()]
        seconds = sum(waiting) * per_token + len(waiting) * start + sum(running) * per_token
        at_once = max(1, min(study.wanted.jobs or 1, len(waiting) + len(running)))
        return f"{timedelta(seconds=round(seconds / at_once))} left"


def study(
    words: Sequence[str],
    out: Path,
    seeds: int,
    scale: float,
    lr_scale: float,
    only: list[str],
    jobs: int | None,
    slurm: bool,
    command: list[str],
) -> None:
    """The command: `words` are configs, folders of them, and overrides; `command` is all of it, as it was typed."""
    numbers = {"seeds": seeds, "scale": scale, "lr-scale": lr_scale, "jobs": 1 if jobs is None else jobs}
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} is {value:g}; give a number above 0")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    # os.path: a long list of stages is no name that a file could have.
    overrides = [word for word in words if "=" in word and not os.path.exists(word)]  # noqa: PTH110
    for override in overrides:
        if override.partition("=")[0] in ("output_dir", "seed"):
            raise UserError(f"override '{override}': a study sets this for every run; see --out and --seeds")
    paths = [Path(word) for word in words if word not in overrides]
    if not paths:
        raise UserError("which configs? give files, or folders of them")
    wanted = Wanted(configs_of(paths), overrides, out, seeds, scale, lr_scale, only, jobs, command)
    with RunLock() as lock:
        run_study(wanted, slurm, lock)
