"""What a run counts, judges and tells as it trains, and the state of all that for a checkpoint.

The meter counts what happens between two reports; alarms say where losses and gradients that are no numbers come from;
the judge scores the dev sets and keeps the best model; recorder and screen tell.

A GPU is still computing a step when its loop has gone through it. So what came of a step is entered when the next one
is under way, or as soon as somebody needs to know: one wait a step, and mostly a short one.
"""

import math
import os
import signal
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim import Optimizer

from mtl_dist.config import UserError, dump
from mtl_dist.data.batches import Batch
from mtl_dist.data.prepare import Split
from mtl_dist.data.read import place
from mtl_dist.distributed import STOPPING, Stops, Watchdog, on_one
from mtl_dist.experiment import Experiment
from mtl_dist.model.multitask import BEST, MultiTaskModel, save_model, saved_scores
from mtl_dist.surgery.conflict import Conflict, mean_of
from mtl_dist.surgery.noise import Noise, Sample
from mtl_dist.surgery.rows import Coming, summed
from mtl_dist.training.engine import Stepped
from mtl_dist.training.scores import Scores, deciding_score, main_scores, score_all
from mtl_dist.training.setup import Run, Trainer
from mtl_dist.watch.recorder import Recorder, StepReport
from mtl_dist.watch.screen import Screen

T = TypeVar("T")

OF_LATE = 100  # losses of a task with which the next one is compared


@dataclass(frozen=True)
class Step:
    """A step that this rank went through, and what will be known of it."""

    done: int  # steps, with this one
    trainer: Trainer
    draws: Counter[str]  # of each task
    micro_batches: list[tuple[Batch, Tensor]]  # this rank's, and the losses of their rows before any weight
    dropped: set[str]  # the tasks that it went without
    # How far the task gradients agreed, and how much of that was noise, where that is known; on the main process alone.
    conflict: Conflict | None
    noise: Sample | None
    coming: Coming  # the norm, the next loss scale; then sums over the ranks: tokens, votes, the losses of each task


@dataclass(frozen=True)
class Outcome:
    """What came of a step on all ranks together."""

    norm: float  # of the gradient, before clipping
    loss_scale: float  # of the next step
    losses: dict[str, float]  # the mean of each task
    tokens: int

    @property
    def skipped(self) -> bool:
        """Whether it left the weights alone."""
        return not math.isfinite(self.norm)


class Meter:
    """Adds up what happened since the last report, on all ranks together."""

    def __init__(self, accelerator: Accelerator, sizes: dict[str, int]) -> None:
        self.accelerator = accelerator
        self.sizes = sizes
        self.draws = dict.fromkeys(sizes, 0)
        self.skipped = 0
        self.tokens_of_run = 0
        self.noise_of_run = Noise()
        self.restart()

    def state(self) -> dict[str, Any]:
        """What was counted so far, the same on all ranks."""
        return {
            "draws": self.draws,
            "skipped": self.skipped,
            "loss_sums": self.loss_sums,
            "tokens": self.tokens,
            "tokens_of_run": self.tokens_of_run,
            "new_draws": self.new_draws,
            "steps": self.steps,
            "waited": self.waited,
            "conflicts": [asdict(conflict) for conflict in self.conflicts],
            "noise": self.noise.state(),
            "noise_of_run": self.noise_of_run.state(),
            "seconds": time.perf_counter() - self.since,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on counting from there."""
        for name in ("draws", "new_draws", "loss_sums"):
            counted = getattr(self, name)
            counted |= {task: value for task, value in state[name].items() if task in counted}
        self.skipped, self.steps, self.tokens = state["skipped"], state["steps"], state["tokens"]
        self.tokens_of_run = state.get("tokens_of_run", 0)  # which checkpoints of before have not
        self.waited, self.seconds = state["waited"], state["seconds"]
        self.conflicts = [Conflict.from_dict(conflict) for conflict in state["conflicts"]]
        if "noise" in state:  # likewise
            self.noise.load(state["noise"])
            self.noise_of_run.load(state["noise_of_run"])

    def start_clock(self) -> None:
        """Begins to measure the time of a stage's steps."""
        self.since = time.perf_counter() - self.seconds

    def restart(self) -> None:
        """Begins to count anew."""
        self.loss_sums = dict.fromkeys(self.sizes, 0.0)  # of the draws' mean losses
        self.new_draws = dict.fromkeys(self.sizes, 0)
        self.tokens = 0
        self.steps = 0
        self.waited = 0.0
        self.norm = 0.0
        self.conflicts = list[Conflict]()
        self.noise = Noise()
        self.seconds = 0.0  # before the clock was started
        self.start_clock()

    def waits(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; measures how long they let the loop wait."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield item

    def step(self, step: Step, outcome: Outcome) -> None:
        """Counts a step of all ranks."""
        self.tokens += outcome.tokens
        self.tokens_of_run += outcome.tokens
        self.steps += 1
        self.norm = outcome.norm
        self.skipped += outcome.skipped
        if not outcome.skipped:
            for task, draws in step.draws.items():
                if task not in step.dropped:  # what did not go into the step does not enter the means
                    self.new_draws[task] += draws
                    self.loss_sums[task] += draws * outcome.losses[task]
        if step.conflict is not None:
            self.conflicts.append(step.conflict)
        if step.noise is not None and not outcome.skipped:
            self.noise.add(step.noise)
            self.noise_of_run.add(step.noise)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens inside out of the speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def report(self, stage: str, step: int, optimizer: Optimizer) -> StepReport:
        """The report of the steps since the last one."""
        seconds = time.perf_counter() - self.since
        for task, new in self.new_draws.items():
            self.draws[task] += new
        report = StepReport(
            step=step,
            stage=stage,
            loss={task: self.loss_sums[task] / new for task, new in self.new_draws.items() if new},
            draws=dict(self.draws),
            examples={task: draws * self.sizes[task] for task, draws in self.draws.items()},
            tokens=self.tokens_of_run,
            lr={group["name"]: group["lr"] for group in optimizer.param_groups},
            tokens_per_second=self.tokens / seconds,
            seconds_per_step=seconds / self.steps,
            data_wait=self.waited / seconds,
            gradient_norm=self.norm,
            skipped_steps=self.skipped,
            surgery=mean_of(self.conflicts),
            noise=self.noise.summary(),
        )
        self.restart()
        return report


@contextmanager
def enough_memory(
    doing: str, way_out: str = "use more GPUs with FSDP2 or ZeRO, or train less of the model"
) -> Iterator[None]:
    """Ends this rank with one line where something takes more memory than there is."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise SystemExit(f"rank {os.environ.get('RANK', '0')}: out of memory in {doing}; {way_out}") from error


def enough_for(batch: Batch, step: int) -> AbstractContextManager[None]:
    """Ends this rank with one line where a micro-batch takes more memory than there is."""
    return enough_memory(
        f"step {step}, in a micro-batch of task '{batch.task}' with {len(batch.rows)} rows and "
        f"{batch.packed.num_tokens:,} tokens",
        "set gradients.max_tokens below that, or raise gradients.accumulation, or set encoder.activation_checkpointing",
    )


class Alarms:
    """Says from which rows gradients came that are no numbers, or losses that are far from usual.

    Ends the run where it was told to, or when there are too many steps in a row whose gradients are no numbers.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        screen: Screen,
        recorder: Recorder | None,
    ) -> None:
        self.splits = splits
        self.screen = screen
        self.recorder = recorder
        self.in_a_row = 0
        # By task, and by what a stage has it learn: the losses of hidden words are of another size.
        self.of_late = defaultdict[str, deque[float]](partial(deque, maxlen=OF_LATE))

    def state(self) -> dict[str, Any]:
        """What was seen so far, the same on all ranks."""
        return {"in_a_row": self.in_a_row, "of_late": {name: list(losses) for name, losses in self.of_late.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.in_a_row = state["in_a_row"]
        for name, losses in state["of_late"].items():
            self.of_late[name].extend(losses)

    def after(self, step: Step, outcome: Outcome) -> None:
        """Looks at a step; every rank finds the same."""
        if outcome.skipped or step.dropped:
            lost = [task for task, loss in outcome.losses.items() if not math.isfinite(loss)]
            # An overflow is what fp16's losses are scaled for, as long as the scale can fall.
            if lost or step.dropped or outcome.loss_scale <= 1:
                self._no_number(step, lost)
        else:
            self.in_a_row = 0
        finite = {task: loss for task, loss in outcome.losses.items() if math.isfinite(loss)}
        of_late = {task: self.of_late[self._learnt(step, task)] for task in finite}
        highest = {task: max(of_late[task]) for task, loss in finite.items() if self._jumps(of_late[task], loss)}
        self._spikes(step, finite, highest)
        for task, loss in finite.items():
            of_late[task].append(loss)

    def _learnt(self, step: Step, task: str) -> str:
        return f"{task}, hidden words" if step.trainer.stage.finds_words else task

    def _no_number(self, step: Step, tasks: list[str]) -> None:
        self.in_a_row += 1
        stage, dropped = step.trainer.stage, sorted(step.dropped)
        rows = losses_of_rows(step, tasks) if tasks else {}
        places = {
            task: self._places(task, sorted(row for loss, row in found if not math.isfinite(loss)))
            for task, found in rows.items()
        }
        where = "; ".join(
            f"the loss of task '{task}' is no number at {', '.join(at[:3])}" for task, at in places.items() if at
        )
        what = f"step {step.done}: {where or 'the gradient is infinite or NaN'}"
        if self.recorder:
            self.recorder.record(step.done, "fault", {"stage": stage.name, "rows": places, "dropped": dropped})
        policy = stage.gradients
        if policy.nonfinite == "stop" or self.in_a_row >= policy.most_nonfinite:
            often = f", {self.in_a_row} steps in a row" if self.in_a_row > 1 else ""
            raise UserError(f"{what}{often}; lower optim.lr, set gradients.clip_norm, or look at these rows")
        self.screen.line(f"{what}; {'left out: ' + ', '.join(dropped) if dropped else 'the step is left out'}")

    def _jumps(self, of_late: Collection[float], loss: float) -> bool:
        """Whether a loss is more than twice the highest one of late; standard deviations would mind long tails."""
        return len(of_late) >= OF_LATE // 2 and loss > 2 * max(of_late) > 0

    def _spikes(self, step: Step, losses: Mapping[str, float], highest_before: Mapping[str, float]) -> None:
        """Tells of the tasks whose loss jumped from the highest before."""
        if not highest_before:
            return
        places = {}
        for task, found in losses_of_rows(step, highest_before).items():
            highest = sorted(found, reverse=True)[:3]
            places[task] = self._places(task, [row for _, row in highest])
            at = ", ".join(f"{place} ({loss:.3g})" for (loss, _), place in zip(highest, places[task], strict=True))
            self.screen.line(
                f"step {step.done}: the loss of task '{task}' is {losses[task]:.3g}, at most "
                f"{highest_before[task]:.3g} of late; highest at {at}"
            )
        if self.recorder:
            spikes = {task: losses[task] for task in highest_before}
            record = {
                "stage": step.trainer.stage.name,
                "loss": spikes,
                "highest_before": highest_before,
                "rows": places,
            }
            self.recorder.record(step.done, "spike", record)

    def _places(self, task: str, rows: Iterable[int]) -> list[str]:
        split = self.splits[task]
        return [place(split.source, split.line(row)) for row in rows]


def losses_of_rows(step: Step, tasks: Collection[str]) -> dict[str, list[tuple[float, int]]]:
    """The losses of the rows that some tasks had in a step, and these rows; every rank must ask for them."""
    here = [
        (batch.task, list(zip(loss_N.tolist(), batch.rows.tolist(), strict=True)))
        for batch, loss_N in step.micro_batches
        if batch.task in tasks and not batch.filler  # which fills in for rows that this rank has not
    ]
    found: dict[str, list[tuple[float, int]]] = {task: [] for task in tasks}
    for task, rows in gather_object(here):
        found[task] += rows
    return found


class Judge:
    """Scores the dev sets, and keeps the best model."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: Experiment,
        splits: dict[str, Split],
        tokenizer: Tokenizer,
        screen: Screen,
        recorder: Recorder | None,
        on_batch: Callable[[], object],
    ) -> None:
        """`on_batch` hears of every batch that is scored."""
        self.accelerator = accelerator
        self.config = config
        self.splits = splits
        self.tokenizer = tokenizer
        self.screen = screen
        self.recorder = recorder
        self.on_batch = on_batch
        self.best: Scores = {}
        self.after_stage: dict[str, Scores] = {}
        self.unsaved: str | None = None  # why the best model so far is not in the run folder

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from these scores, if they can be compared and the model is there; every rank must ask for it."""
        best = state["best"]
        if best and best["tasks"].keys() != self.splits.keys():
            self.screen.line(
                f"{BEST}, of step {best['step']}, has scores of other tasks: the next one scored replaces it"
            )
            return
        self.after_stage, self.unsaved = state["after_stage"], state["unsaved"]
        if on_one(self.accelerator, lambda: saved_scores(self.config.output_dir / BEST)) == best:
            self.best = best
        elif best:
            self.screen.line(
                f"{BEST} is not, or no longer, the model of step {best['step']}: the next one scored replaces it"
            )

    def state(self) -> dict[str, Any]:
        """The scores so far."""
        return {"best": self.best, "after_stage": self.after_stage, "unsaved": self.unsaved}

    @property
    def is_up_to_date(self) -> bool:
        """Whether the run folder has the best model so far."""
        return bool(self.best) and not self.unsaved

    def evaluate(self, model: MultiTaskModel, stage: str, step: int) -> None:
        """Scores all tasks after a step; every rank must take part."""
        config = self.config
        scores = score_all(
            self.accelerator, model, config.tasks, self.splits, config.evaluate.max_tokens, self.on_batch
        )
        self.after_stage[stage] = scores
        self.screen.scores(step, main_scores(config.tasks, scores), scores)
        if self.recorder:
            self.recorder.record(step, "dev", {"stage": stage, **scores})
        # With nothing to score the last model is the best.
        if not self.splits or not self.best or deciding_score(config, scores) > deciding_score(config, self.best):
            best = {"step": step, **scores}
            try:
                on_one(self.accelerator, lambda: save_model(model, self.tokenizer, config.output_dir / BEST, best))
                self.best, self.unsaved = best, None
            except UserError as error:
                self.unsaved = f"step {step}: the best model is not saved: {error}"
                self.screen.line(self.unsaved)


class Books:
    """The books of a run."""

    def __init__(self, run: Run, stops: Stops) -> None:
        config, accelerator = run.config, run.accelerator
        self.stops = stops
        self.run = run
        self.screen = Screen(list(config.tasks), run.total_steps, run.console)
        self.recorder: Recorder | None = None
        if accelerator.is_main_process:
            self.recorder = Recorder(config.output_dir, config.log.tensorboard, run.done)
            self.recorder.start(run.done, run.total_steps)
            if run.resumed is None:
                self.recorder.text("config", dump(config))
        self.watchdog = Watchdog(config.distributed.timeout_s, accelerator.num_processes)
        self.meter = Meter(accelerator, {name: task.batch_size for name, task in config.tasks.items()})
        self.judge = Judge(
            accelerator, config, run.splits["dev"], run.tokenizer, self.screen, self.recorder, self.watchdog.watch
        )
        self.alarms = Alarms(run.splits["train"], self.screen, self.recorder)
        self.under_way = deque[Step]()
        self.votes = [0.0] * len(STOPPING)  # of all ranks, as of the last step that was entered
        if run.resumed is not None:
            state = run.resumed.state
            self.meter.load(state["meter"])
            self.alarms.load(state["alarms"])
            self.judge.load(state)

    def __enter__(self) -> Self:
        self.screen.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.screen.__exit__(*exception)

    def state(self) -> dict[str, Any]:
        """All of it that a checkpoint keeps."""
        return {"meter": self.meter.state(), "alarms": self.alarms.state(), **self.judge.state()}

    def add(
        self,
        trainer: Trainer,
        draws: Iterable[str],
        micro_batches: list[tuple[Batch, Tensor]],
        stepped: Stepped,
    ) -> None:
        """Sends for what came of a step that draws these tasks; every rank must take part."""
        surgery, drawn, device = trainer.surgery, Counter(draws), self.run.accelerator.device
        sums = {task: torch.zeros((), device=device) for task in drawn}
        for batch, loss_N in micro_batches:
            sums[batch.task] += loss_N.sum()
        tokens = sum(batch.packed.num_tokens for batch, _ in micro_batches)
        known = [tokens, *self.stops.votes()]
        numbers = [stepped.norm.reshape(1), stepped.loss_scale.reshape(1), summed(known, sums.values(), device)]
        here = self.run.accelerator.is_main_process
        self.under_way.append(
            Step(
                done=self.run.done,
                trainer=trainer,
                draws=drawn,
                micro_batches=micro_batches,
                dropped=surgery.dropped,
                conflict=surgery.conflict if here else None,
                noise=surgery.noise if here else None,
                coming=Coming(torch.cat(numbers)),
            )
        )

    def settle(self, leave: int = 0) -> None:
        """Enters the steps that are under way, but for so many; every rank must ask for it."""
        while len(self.under_way) > leave:
            step = self.under_way.popleft()
            norm, loss_scale, tokens, *sums = step.coming.read().tolist()
            self.votes, sums = sums[: len(STOPPING)], sums[len(STOPPING) :]
            losses = {
                task: total / (n * self.meter.sizes[task])
                for (task, n), total in zip(step.draws.items(), sums, strict=True)
            }
            outcome = Outcome(norm, loss_scale, losses, round(tokens))
            self.meter.step(step, outcome)
            step.trainer.surgery.observe(losses)
            self.alarms.after(step, outcome)

    def stop(self) -> signal.Signals | None:
        """The signal that ends the run here, the same on all ranks."""
        return self.stops.agreed(self.votes)

    def report(self, trainer: Trainer) -> None:
        """Tells of the steps since the last report."""
        report = self.meter.report(trainer.stage.name, self.run.done, trainer.optimizer)
        self.screen.steps(report)
        if self.recorder:
            self.recorder.record(self.run.done, "train", report.as_record())

    def evaluate(self, trainer: Trainer) -> None:
        """Scores the dev sets; every rank must take part."""
        with trainer.engine.whole(averaged=True) as whole:
            self.judge.evaluate(whole, trainer.stage.name, self.run.done)

    def verdict(self) -> list[str]:
        """What the run says of its tasks' gradients, noise apart; it becomes a record as well."""
        noise = self.meter.noise_of_run
        lines = list(noise.verdict())
        trained = self.run.resumed is None or self.run.done > self.run.resumed.step
        if self.recorder and trained and (summary := noise.summary()) is not None:
            self.recorder.record(self.run.done, "gradients", {"verdict": lines, **summary})
        return lines

    def end(self) -> None:
        """Writes down that the run came to its end."""
        if self.recorder:
            self.recorder.end(self.run.done, self.meter.tokens_of_run)

    def close(self) -> None:
        """Writes out what is still in memory."""
        if self.recorder:
            self.recorder.close()
