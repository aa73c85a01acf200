"""What happened between two reports of a run, counted as it trains; what follows from gradients that are no numbers."""

import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim import Optimizer

from mtl_dist.config import UserError
from mtl_dist.data.batches import Batch
from mtl_dist.data.prepare import Split
from mtl_dist.data.read import place
from mtl_dist.engine import Stepped
from mtl_dist.experiment import Stage
from mtl_dist.surgery.conflict import Conflict, mean_of
from mtl_dist.telemetry import Recorder, Screen, StepReport

T = TypeVar("T")


class Meter:
    """Adds up what happened since the last report; waits for the device only when a report is due."""

    def __init__(self, accelerator: Accelerator, sizes: dict[str, int]) -> None:
        self.accelerator = accelerator
        self.sizes = sizes
        self.draws = dict.fromkeys(sizes, 0)
        self.skipped = 0
        self.restart()

    def state(self) -> dict[str, Any]:
        """What was counted so far, by all ranks together; every rank must ask for it."""
        *loss_sums, tokens = self._of_all_ranks()
        return {
            "draws": self.draws,
            "skipped": self.skipped,
            "loss_sums": dict(zip(self.sizes, loss_sums, strict=True)),
            "tokens": tokens,
            "new_draws": self.new_draws,
            "steps": self.steps,
            "waited": self.waited,
            "conflicts": [asdict(conflict) for conflict in self.conflicts],
            "seconds": time.perf_counter() - self.since,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on counting from there."""
        self.draws |= {task: draws for task, draws in state["draws"].items() if task in self.draws}
        self.new_draws |= {task: draws for task, draws in state["new_draws"].items() if task in self.draws}
        self.skipped, self.steps, self.waited = state["skipped"], state["steps"], state["waited"]
        self.seconds = state["seconds"]
        self.conflicts = [Conflict.from_dict(conflict) for conflict in state["conflicts"]]
        if self.accelerator.is_main_process:  # or the sum over the ranks would have it several times
            self.tokens = state["tokens"]
            for task in self.sizes:
                self.loss_sums[task] += state["loss_sums"].get(task, 0)

    def start_clock(self) -> None:
        """Begins to measure the time of a stage's steps."""
        self.since = time.perf_counter() - self.seconds

    def restart(self) -> None:
        """Begins to count anew."""
        self.loss_sums = {task: torch.zeros((), device=self.accelerator.device) for task in self.sizes}
        self.new_draws = dict.fromkeys(self.sizes, 0)
        self.tokens = 0
        self.steps = 0
        self.waited = 0.0
        self.norm = 0.0
        self.of_step: list[tuple[Batch, Tensor]] = []  # this rank's micro-batches, and the losses of their rows
        self.conflicts = list[Conflict]()
        self.seconds = 0.0  # before the clock was started
        self.start_clock()

    def micro_batch(self, batch: Batch, loss_N: Tensor) -> None:
        """Counts a micro-batch of this rank."""
        self.of_step.append((batch, loss_N.detach()))
        self.tokens += batch.packed.num_tokens

    def conflict(self, conflict: Conflict | None) -> None:
        """Notes how far the task gradients of a step agreed, where that is known."""
        if conflict is not None:
            self.conflicts.append(conflict)

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

    def step(self, draws: Iterable[str], stepped: Stepped, dropped: Collection[str]) -> None:
        """Counts a step of all ranks; losses that did not go into it do not enter the means."""
        self.steps += 1
        self.norm = stepped.norm
        self.skipped += stepped.skipped
        if not stepped.skipped:
            for task in draws:
                self.new_draws[task] += task not in dropped
            for batch, loss_N in self.of_step:
                if batch.task not in dropped:
                    self.loss_sums[batch.task] += loss_N.sum()
        self.of_step.clear()

    def rows_without_a_loss(self) -> dict[str, list[int]]:
        """The rows of the step at hand, on this rank, whose losses are infinite or NaN, by their tasks."""
        rows: dict[str, list[int]] = {}
        for batch, loss_N in self.of_step:
            bad = batch.rows[~loss_N.isfinite().cpu().numpy()]
            if len(bad):
                rows.setdefault(batch.task, []).extend(bad.tolist())
        return rows

    def _of_all_ranks(self) -> list[float]:
        here = torch.stack([*self.loss_sums.values(), torch.tensor(self.tokens, device=self.accelerator.device)])
        return self.accelerator.reduce(here).tolist()  # type: ignore[no-any-return]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens inside out of the speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def report(self, stage: str, step: int, optimizer: Optimizer) -> StepReport:
        """The report of the steps since the last one; every rank must ask for it."""
        *loss_sums, tokens = self._of_all_ranks()
        seconds = time.perf_counter() - self.since
        for task, new in self.new_draws.items():
            self.draws[task] += new
        drawn = {task: new * self.sizes[task] for task, new in self.new_draws.items()}
        report = StepReport(
            step=step,
            stage=stage,
            loss={task: s / drawn[task] for task, s in zip(self.sizes, loss_sums, strict=True) if drawn[task]},
            draws=dict(self.draws),
            examples={task: draws * self.sizes[task] for task, draws in self.draws.items()},
            lr={group["name"]: group["lr"] for group in optimizer.param_groups},
            tokens_per_second=tokens / seconds,
            seconds_per_step=seconds / self.steps,
            data_wait=self.waited / seconds,
            gradient_norm=self.norm,
            skipped_steps=self.skipped,
            surgery=mean_of(self.conflicts),
        )
        self.restart()
        return report


@contextmanager
def enough_memory(batch: Batch, step: int) -> Iterator[None]:
    """Ends this rank with one line where a micro-batch takes more memory than there is."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        rank = os.environ.get("RANK", "0")
        raise SystemExit(
            f"rank {rank}: out of memory in step {step}, in a micro-batch of task '{batch.task}' with "
            f"{len(batch.rows)} rows and {batch.packed.num_tokens:,} tokens; set gradients.max_tokens below "
            "that, or raise gradients.accumulation, or set encoder.activation_checkpointing"
        ) from error


class Faults:
    """Says where gradients came from that are no numbers, and ends the run when there are too many of them."""

    def __init__(
        self,
        accelerator: Accelerator,
        meter: Meter,
        splits: Mapping[str, Split],
        screen: Screen,
        recorder: Recorder | None,
    ) -> None:
        self.accelerator = accelerator
        self.meter = meter
        self.splits = splits
        self.screen = screen
        self.recorder = recorder
        self.in_a_row = 0

    def after(self, done: int, stage: Stage, stepped: Stepped, dropped: set[str]) -> None:
        """Looks at a step; every rank finds the same."""
        if not (stepped.skipped or dropped):
            self.in_a_row = 0
            return
        rows: dict[str, list[int]] = {}
        for of_rank in gather_object([self.meter.rows_without_a_loss()]):
            for task, found in of_rank.items():
                rows.setdefault(task, []).extend(found)
        if self.accelerator.scaler is not None and not (rows or dropped):
            return  # an overflow, for which fp16's losses are scaled
        self.in_a_row += 1
        places = {
            task: [place(self.splits[task].source, self.splits[task].line(row)) for row in sorted(found)]
            for task, found in rows.items()
        }
        where = "; ".join(
            f"the loss of task '{task}' is no number at {', '.join(at[:3])}" for task, at in places.items()
        )
        what = f"step {done}: {where or 'the gradient is infinite or NaN'}"
        policy = stage.gradients
        if policy.nonfinite == "stop" or self.in_a_row >= policy.most_nonfinite:
            often = f", {self.in_a_row} steps in a row" if self.in_a_row > 1 else ""
            raise UserError(f"{what}{often}; lower optim.lr, set gradients.clip_norm, or look at these rows")
        self.screen.line(f"{what}; {'left out: ' + ', '.join(sorted(dropped)) if dropped else 'the step is left out'}")
        if self.recorder:
            self.recorder.record(done, "fault", {"stage": stage.name, "rows": places, "dropped": sorted(dropped)})
