"""Trains an experiment again and again, each time with other values of some keys, to find the best ones.

A trial is one ordinary run, in a process and a folder of its own. Here is what happens around them: Optuna says which
values come next, every dev score is reported to it, and a run that does worse than the others did is stopped early.

    runs/mine-sweep/
      sweep.db or sweep.journal    the study: every trial with its values, scores and state
      trials/3/, trials/3.log      the run of trial 3
      best.yaml, trials.csv, history.png, importance.png

Whatever ends a sweep, the same command goes on: a trial that was under way goes on from its last checkpoint. Whoever
trains a trial holds a lock that the system lets go of when a process ends, so a trial of nobody's is seen, and taken
over. All that decides who does what happens in a `_turn`, which one process has at a time.
"""

import fcntl
import os
import shlex
import shutil
import signal
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import optuna
import optuna.storages.journal
import sqlalchemy
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.text import Text

from mtl_dist.checkpoint import CHECKPOINTS, RunLock, is_in_use
from mtl_dist.config import UserError, differences, load, refusing
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import BEST
from mtl_dist.runs.story import Reader
from mtl_dist.studies.findings import (
    OWN,
    REASON,
    STATES,
    best_of,
    draw_history,
    draw_importance,
    importances,
    score_of,
    write_best,
    write_trials,
)
from mtl_dist.studies.jobs import Job, Jobs, last_line
from mtl_dist.studies.space import Space, into, overrides_of, own_values, read_space
from mtl_dist.training.folder import refuse_foreign
from mtl_dist.training.resume import OF_A_START
from mtl_dist.training.scores import deciding_score
from mtl_dist.watch.screen import Drawn, plain_table

Storage = Literal["sqlite", "journal"]
STUDY: dict[Storage, str] = {"sqlite": "sweep.db", "journal": "sweep.journal"}
LOCK, ALONE, TRIALS = "sweep.lock", "sweep.alone", "trials"

POLL_S = 0.5
FIRST = 5  # trials that come to their end before any is pruned
PEERS = 3  # scores of the same evaluation that a median is taken of
FAILURES = 3  # of the first trials, after which the config is at fault

ABOUT, FRUITLESS = "about", "fruitless"  # what a study is of; how many trials failed before it began anew


@dataclass
class _Told:
    """What metrics.jsonl has told of a run so far."""

    steps: int | None = None
    step: int = 0
    scores: list[float] = field(default_factory=list)
    ended: bool = False


@dataclass
class _Trial:
    """A trial that this process trains."""

    trial: optuna.Trial
    job: Job
    folder: Path
    config: Experiment
    claim: IO[str]
    again: bool  # whether it was begun before, here or elsewhere
    told: _Told = field(default_factory=_Told)
    pruned: bool = False

    def __post_init__(self) -> None:
        self.reader = Reader(self.folder)

    def read(self) -> bool:
        """Reads on in what the run tells; whether there was anything new."""
        records, anew = self.reader.read()
        if anew:
            self.told = _Told()
        for record in records:
            self.told.step = max(self.told.step, record["step"])
            self.told.ended = record["kind"] == "end"
            if record["kind"] == "start":
                self.told.steps = record["steps"]
            elif record["kind"] == "dev":
                self.told.scores.append(deciding_score(self.config, record))
        return bool(records)


class Sweep:
    """A sweep in a folder, which this process has a part in, or all of."""

    def __init__(
        self, config: Path, overrides: Sequence[str], space_file: Path, out: Path, seed: int, console: Console
    ) -> None:
        self.config = config
        self.overrides = list(overrides)
        self.space_file = space_file
        self.out = out
        self.seed = seed
        self.console = console
        self.experiment = load(Experiment, config, overrides)
        if all(self.experiment.source(task, "dev") is None for task in self.experiment.tasks):
            raise UserError(f"{config}: no task has a dev set, so no trial is better than another; give one to a task")
        self.space: Space = read_space(space_file)
        self.own = own_values(self.space, config, overrides)
        self.metric = self.experiment.evaluate.best_by
        self.running: list[_Trial] = []
        self.stopped: set[int] = set()  # trials that somebody else stopped
        self.orphans: set[int] = set()  # trials whose worker is gone, and whose run still saves
        self.outcomes: list[TrialState] = []  # of the trials that ended here
        self.most = 0  # trials, of all processes together, since the sweep began

    def run(self, trials: int, at_once: int, storage: Storage) -> None:
        """Goes on with the sweep until it has so many trials, all of them together."""
        self.most = trials
        with ExitStack() as stack:
            self._open(storage, stack)
            heard = stack.enter_context(_stops())
            stack.callback(lambda: [each.claim.close() for each in self.running])
            jobs = stack.enter_context(Jobs(at_once))
            screen = stack.enter_context(_Screen(self))
            looks = True  # for more trials; after there were none only when one has ended here, or may be taken over
            while not heard:
                while looks and jobs.has_room and not heard:
                    taken = self._next()
                    if taken is None:
                        looks = bool(self.orphans)
                        break
                    self.running.append(taken)
                    jobs.start(taken.job)
                    screen.begun(taken)
                if not (self.running or looks):
                    break
                screen.refresh()
                time.sleep(POLL_S)
                for each in self.running:
                    self._follow(each, jobs)
                for job, code in jobs.ended():
                    looks = True
                    (ended,) = (each for each in self.running if each.job == job)
                    self._settle(ended, code, screen)
        if heard:
            self.say(f"{signal.Signals(heard[0]).name}: stopped; the same command goes on")
            raise KeyboardInterrupt
        with self._turn():  # a process that was killed may have come no further than to tell how a trial ended
            self._tidy()
            self._write()

    def _open(self, storage: Storage, stack: ExitStack) -> None:
        """Opens the study, or begins it."""
        with refusing(f"--out: cannot write {self.out}"):
            (self.out / TRIALS).mkdir(parents=True, exist_ok=True)
        if storage == "sqlite":
            alone = _locked(self.out / ALONE, patient=False)
            if alone is None:
                raise UserError(
                    f"--out: another process sweeps in {self.out}; wait for its end, or begin a sweep that several "
                    "share: --storage journal"
                )
            stack.enter_context(alone)
        # What it warns of are arguments that may change in later versions, and what we look after.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module="optuna")
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        about = {
            "space": {key: part.model_dump(exclude_unset=True) for key, part in self.space.parameters.items()},
            "config": {
                key: value
                for key, value in self.experiment.model_dump(mode="json", by_alias=True).items()
                if key not in OF_A_START
            },
        }
        with self._turn():
            path = self.out / STUDY[storage]
            try:
                opened: optuna.storages.BaseStorage
                if storage == "sqlite":
                    opened = optuna.storages.RDBStorage(_url(path))
                else:
                    backend = optuna.storages.journal.JournalFileBackend(str(path))
                    opened = optuna.storages.JournalStorage(backend)
                begun = optuna.study.get_all_study_names(opened)  # one at most
                self.study = optuna.create_study(
                    storage=opened,
                    study_name=(begun or [self.config.stem])[0],
                    direction="maximize",
                    pruner=MedianPruner(n_startup_trials=FIRST, n_min_trials=PEERS),
                    load_if_exists=True,
                )
            except Exception as error:  # of SQLAlchemy, of Alembic, of JSON
                reason = str(error).split("\n")[0]
                raise UserError(f"{path}: not a study that can be opened ({reason}); choose another --out") from error
            self._begin(about)

    def _begin(self, about: dict[str, Any]) -> None:
        """Notes what the study is of, or checks that it is the same; the first trial is the config itself.

        Where all trials failed it begins anew, with a config that may have been mended.
        """
        before, trials = self.study.user_attrs.get(ABOUT), self.trials()
        fruitless = bool(trials) and all(trial.state == TrialState.FAIL for trial in trials)
        if before is not None:
            found = [each for each in differences(before, about) if not (fruitless and each[0].startswith("config."))]
            if found:
                key, was, now = found[0]
                raise UserError(
                    f"{self.out}: was begun with {key} = {_shown(was)}, and this is {_shown(now)}; "
                    "give what it was begun with, or choose another --out"
                )
            if not fruitless:
                ended = sum(trial.state in STATES for trial in trials)
                self.say(f"{self.out}: going on after {ended} trials")
                return
            self.say(f"{self.out}: all of its {len(trials)} trials failed; beginning anew")
            self.study.set_user_attr(FRUITLESS, len(trials))
        for key, parameter in self.space.parameters.items():
            own = f"; the config has {_shown(self.own[key])}" if key in self.own else ""
            self.say(f"{key}: {parameter}{own}")
        others = [key for key in self.space.parameters if key not in self.own]
        if self.own:
            self.study.enqueue_trial(self.own, user_attrs={OWN: not others}, skip_if_exists=not fruitless)
        outside = f", but of {', '.join(others)}, which lie outside of the space" if others else ""
        self.say(
            f"the first trial has the config's own values{outside}" if self.own else "the config is not in the space"
        )
        self.study.set_user_attr(ABOUT, about)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One process at a time decides who trains what, and writes what was found out."""
        lock = _locked(self.out / LOCK, patient=True)
        assert lock is not None
        with lock, refusing(f"cannot write {self.out}"):
            yield

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def trials(self) -> list[FrozenTrial]:
        """All trials of all processes, each at the place of its number."""
        return self.study.get_trials(deepcopy=False)

    @property
    def last(self) -> int:
        """How many trials there are in the end, with those that failed before the sweep began anew."""
        return self.most + int(self.study.user_attrs.get(FRUITLESS, 0))

    def _next(self) -> _Trial | None:
        """A trial that nobody trains any more, or else a new one, if there may be one."""
        with self._turn():
            begun = [trial for trial in self.trials() if trial.state != TrialState.WAITING]
            before, self.orphans = self.orphans, set()
            for old in begun:
                left = old.state == TrialState.RUNNING and old.number not in self.stopped
                if left and (claim := self._claim(old.number)):
                    self._seed(old.number)
                    return self._taken(optuna.Trial(self.study, old._trial_id), claim, again=True)
            for number in sorted(self.orphans - before):
                self.say(f"trial {number}  was left by its worker, and its run still saves; waiting for its end")
            if len(begun) >= self.last:
                return None
            self._seed(len(begun))
            trial = self.study.ask()
            claim = _locked(self.log_of(trial.number).with_suffix(".lock"), patient=False)
            assert claim is not None
            return self._taken(trial, claim, again=False)

    def _claim(self, number: int) -> IO[str] | None:
        """The lock of a trial; None where somebody trains it, if only a run that has lost its worker."""
        claim = _locked(self.log_of(number).with_suffix(".lock"), patient=False)
        if claim is None or not is_in_use(self.folder_of(number)):
            return claim
        claim.close()
        self.orphans.add(number)
        return None

    def _seed(self, number: int) -> None:
        # One generator for all would begin again in each process, and draw there what was drawn before.
        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
        self.study.sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def _taken(self, trial: optuna.Trial, claim: IO[str], again: bool) -> _Trial:
        values = {key: parameter.suggest(key, trial) for key, parameter in self.space.parameters.items()}
        folder = self.folder_of(trial.number)
        overrides = [*self.overrides, *overrides_of(values), into(folder)]
        job = Job(str(trial.number), self.config, tuple(overrides), self.log_of(trial.number))
        try:
            config = load(Experiment, self.config, overrides)
        except UserError:  # values that do not go together: the run says it, and fails
            config = self.experiment
        return _Trial(trial, job, folder, config, claim, again)

    def folder_of(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.out / TRIALS / str(number)

    def log_of(self, number: int) -> Path:
        """Where the run of a trial says what it says."""
        return self.out / TRIALS / f"{number}.log"

    def _follow(self, each: _Trial, jobs: Jobs) -> None:
        """Reports what is new of a run, and stops it where it does worse than others did."""
        if each.read() and self._report(each) and not (each.pruned or each.told.ended):
            each.pruned = True
            jobs.stop(each.job)

    def _report(self, each: _Trial) -> bool:
        """Reports the scores that were not yet reported; whether any is too low to go on."""
        # By how many evaluations it has had: epochs of other batch sizes end after other steps.
        reported = self.trials()[each.trial.number].intermediate_values
        low = False
        for evaluation, score in enumerate(each.told.scores):
            if evaluation not in reported:
                each.trial.report(score, evaluation)
                low = low or each.trial.should_prune()
        return low

    def _settle(self, each: _Trial, code: int, screen: "_Screen") -> None:
        """Tells what became of a run that has ended, and what follows from that."""
        each.read()
        self._report(each)
        number, stopped = each.trial.number, code in (0, -signal.SIGTERM, -signal.SIGINT)
        with self._turn():
            if each.told.ended and code == 0:
                state = TrialState.COMPLETE
                self.study.tell(each.trial, max(each.told.scores))
            elif each.pruned:
                state = TrialState.PRUNED
                self.study.tell(each.trial, state=state)
            elif stopped:
                state = TrialState.RUNNING
                self.stopped.add(number)
            else:
                state = TrialState.FAIL
                killed = f"killed by {signal.Signals(-code).name}" if code < 0 else ""
                reason = killed or last_line(each.job.log) or f"exit code {code}"
                each.trial.set_user_attr(REASON, reason)
                self.study.tell(each.trial, state=state)
            self.running.remove(each)
            each.claim.close()
            self.outcomes.append(state)
            screen.ended(self.trials()[number])
            self._tidy()
            self._write()
        trials = self.trials()
        fine = any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
        if self.outcomes.count(TrialState.FAIL) >= FAILURES and not fine:
            reason = trials[number].user_attrs[REASON]
            raise UserError(f"the first {FAILURES} trials failed, the last with: {reason}")

    def _tidy(self) -> None:
        """Removes what nobody goes on from: all checkpoints, and the weights of all trials but the best."""
        trials = self.trials()
        best = best_of(trials)
        for trial in trials:
            folder = self.folder_of(trial.number)
            if trial.state not in STATES or folder.is_symlink():
                continue
            for part in (CHECKPOINTS, BEST):
                path = folder / part
                if not path.is_dir() or path.is_symlink() or (part == BEST and best and trial.number == best.number):
                    continue
                # What somebody has put there stays, and what a run still writes that its worker left.
                with suppress(UserError, OSError), RunLock() as lock:
                    lock.take(folder, 0, lambda warning: None)
                    refuse_foreign(folder, [path])
                    shutil.rmtree(path)

    def _write(self) -> None:
        """Writes what was found out so far."""
        trials = self.trials()
        write_trials(trials, list(self.space.parameters), self.out / "trials.csv")
        draw_history(trials, self.metric, self.out / "history.png")
        if not isinstance(found := importances(self.study), str):
            draw_importance(found, self.out / "importance.png")
        best = best_of(trials)
        if best is None:
            return
        command = ["mtl-dist", "sweep", str(self.config), *self.overrides, "--space", str(self.space_file)]
        file, done = self.out / "best.yaml", sum(trial.state == TrialState.COMPLETE for trial in trials)
        header = [
            f"{self.metric} {score_of(best):.4f}: trial {best.number}, the best of {done} that came to their end in",
            shlex.join([*command, "--trials", str(self.most), "--out", str(self.out)]),
            f"Train it with: mtl-dist train {shlex.quote(str(file))}",
        ]
        write_best(self.config, [*self.overrides, *overrides_of(best.params)], self.out / "best", header, file)

    def close(self) -> None:
        """Says what was found out."""
        trials = self.trials()
        self.say(_counted(trials))
        if (best := best_of(trials)) is None:
            return
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.number != best.number]
        own = next((trial for trial in done if trial.user_attrs.get(OWN)), None)
        compared = f", where the config as it stands has {score_of(own):.4f}" if own else ""
        lines = [f"the best is trial {best.number}: {self.metric} {score_of(best):.4f}{compared}"]
        lines += [f"  {key}: {_shown(value)}" for key, value in best.params.items()]
        missing = importances(self.study)
        importance = f"no importance.png: it {missing}" if isinstance(missing, str) else self.out / "importance.png"
        lines += [
            f"experiment   {self.out / 'best.yaml'}",
            f"best model   {self.folder_of(best.number) / BEST}",
            f"trials       {self.out / 'trials.csv'}",
            f"pictures     {self.out / 'history.png'}, {importance}",
        ]
        for line in lines:
            self.say(line)


class _Screen(Drawn):
    """What a person sees of a sweep: on a terminal the best trial beside those under way, and a line for each end."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        super().__init__(sweep.console, transient=True)

    def __rich__(self) -> Group:
        sweep, trials = self.sweep, self.sweep.trials()
        best = best_of(trials)
        names = _short(sweep.space.parameters)
        table = plain_table("trial", "step", sweep.metric, "values", texts=["trial", "values"])
        for column in table.columns[:3]:  # only the values go over several lines
            column.no_wrap = True
        if best:
            table.add_row(f"best: {best.number}", "", f"{score_of(best):.4f}", Text(_listed(best.params, names)))
        for each in sweep.running:
            told = each.told
            step = f"{told.step:,}/{told.steps:,}" if told.steps else "starting"
            score = f"{told.scores[-1]:.4f}" if told.scores else ""
            table.add_row(each.job.name, step, score, Text(_listed(each.trial.params, names)))
        return Group(f"{_counted(trials)}, of {sweep.last}", table)

    def refresh(self) -> None:
        """Shows how far the trials are."""
        if self.live:
            self.live.refresh()

    def begun(self, each: _Trial) -> None:
        """Tells of a trial that begins, or goes on, where there is no table of those under way."""
        if not self.live:
            self._line(each.trial.number, "goes on" if each.again else "begins", each.trial.params)

    def ended(self, trial: FrozenTrial) -> None:
        """Tells what became of a trial."""
        score = score_of(trial)
        said = STATES.get(trial.state, "was stopped by somebody else, and is left to go on")
        if trial.state == TrialState.FAIL:
            said += f": {trial.user_attrs[REASON]} ({self.sweep.log_of(trial.number)})"
        elif trial.state == TrialState.PRUNED:
            said += f" after evaluation {len(trial.intermediate_values)}: {self.sweep.metric} {score:.4f}"
        elif trial.state == TrialState.COMPLETE:
            best = best_of(self.sweep.trials())
            said = f"{self.sweep.metric} {score:.4f}" + (", the best" if best and best.number == trial.number else "")
        self._line(trial.number, said, trial.params)

    def _line(self, number: int, said: str, params: dict[str, Any]) -> None:
        self.sweep.say(f"trial {number}  {said}  {_listed(params, {})}")


def _counted(trials: Sequence[FrozenTrial]) -> str:
    numbers = {word: sum(trial.state == state for trial in trials) for state, word in STATES.items()}
    numbers["under way"] = sum(trial.state == TrialState.RUNNING for trial in trials)
    return f"trials: {', '.join(f'{number} {word}' for word, number in numbers.items() if number or word == 'done')}"


def _short(keys: Collection[str]) -> dict[str, str]:
    """The last part of each key; the whole of it where another one ends in the same."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _listed(params: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return "  ".join(f"{names.get(key, key)}={_shown(value)}" for key, value in params.items())


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _url(path: Path) -> str:
    """What Optuna opens a study in SQLite by, whatever the path holds."""
    return sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()


def _locked(path: Path, patient: bool) -> IO[str] | None:
    """The file, locked until it is closed; None where another process has it, unless this one waits for it."""
    with refusing(f"--out: cannot write {path}"):
        file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; a sweep needs a file system with locks: choose another --out"
        ) from error
    return file


@contextmanager
def _stops() -> Iterator[list[int]]:
    """The signals that told this process to end, which it does when it is between two things."""
    heard: list[int] = []
    before = {
        each: signal.signal(each, lambda number, _: heard.append(number)) for each in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield heard
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def storage_in(out: Path, asked: Storage | None, in_array: bool) -> Storage:
    """Where the study is: as asked for, as it was begun, or a journal for the tasks of an array."""
    with refusing(f"--out: cannot read {out}"):
        others = sorted(path.name for path in out.iterdir()) if out.exists() else []
        trials = sorted(path.name for path in (out / TRIALS).iterdir()) if TRIALS in others else []
    # After what is there, which another process may be beginning: the study comes first.
    begun = next((storage for storage, name in STUDY.items() if (out / name).exists()), None)
    if begun is None:
        foreign = [name for name in others if name not in (*STUDY.values(), LOCK, ALONE, TRIALS)]
        foreign += [f"{TRIALS}/{name}" for name in trials]
        if foreign:
            raise UserError(f"--out: {out} holds {foreign[0]}, not a sweep; choose another folder")
        return asked or ("journal" if in_array else "sqlite")
    if asked not in (None, begun):
        raise UserError(f"--storage is {asked}, but {out} was begun with {begun}; choose another --out")
    return begun


def sweep(
    config: Path,
    overrides: Sequence[str],
    space: Path,
    trials: int,
    at_once: int,
    out: Path | None,
    storage: Storage | None,
    seed: int,
    console: Console,
) -> None:
    """Sweeps until there are so many trials; what was found out is in `out`, by default beside the run folder."""
    own = load(Experiment, config, overrides).output_dir
    if out is None:
        if not own.name:
            raise UserError(f"output_dir is {own}, and the sweep's folder would be beside it; name one by --out")
        out = own.with_name(f"{own.name}-sweep")
    found = Sweep(config, overrides, space, out, seed, console)
    found.run(trials, at_once, storage_in(out, storage, "SLURM_ARRAY_TASK_ID" in os.environ))
    found.close()
