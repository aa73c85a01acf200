"""Trains an experiment: everything is set up, then one loop that reads from top to bottom.

A step draws its tasks, runs forward and backward on each one's micro-batches, combines, clips and steps; then, always
in this order: report, evaluate (and keep the best), save. Stages follow each other on one model, each with an own
optimizer.
"""

import signal

from torch import Tensor

from mtl_dist.checkpoint import RunLock
from mtl_dist.config import UserError
from mtl_dist.data.batches import Batch, prefetched
from mtl_dist.data.mixer import Draw
from mtl_dist.distributed import Stops, lost_ranks, on_one, processes, seed_step
from mtl_dist.experiment import Experiment, Stage
from mtl_dist.model.multitask import BEST
from mtl_dist.optim import set_lr
from mtl_dist.training.books import Books, enough_for, enough_memory
from mtl_dist.training.resume import Saver
from mtl_dist.training.scores import Scores
from mtl_dist.training.setup import Run, Trainer, evaluation_steps, set_up, start_stage
from mtl_dist.watch.profile import Profile, drawn, part
from mtl_dist.watch.recorder import TENSORBOARD
from mtl_dist.watch.screen import score_table, stage_table


def train(
    config: Experiment,
    overwrite: bool = False,
    resume: str = "never",
    allow_changes: bool = False,
    profiled_steps: int = 0,
) -> Scores:
    """Trains from the first step, or from a checkpoint, to the last, or to a signal that stops it.

    Returns the best model's scores; all else is in `config.output_dir`. `resume` is never, auto or a path.
    """
    with (
        processes(config.distributed, config.precision) as accelerator,
        Stops(accelerator) as stops,
        RunLock() as lock,
        lost_ranks(),
    ):
        run = set_up(accelerator, config, lock, overwrite, resume, allow_changes)
        with (
            Books(run, stops) as books,
            Saver(accelerator, config, run.about, books.screen.line) as saver,
            books.watchdog,
            Profile(profiled_steps, config.output_dir, accelerator.process_index, books.screen.console) as profile,
        ):
            stop = None
            for stage in run.stages[run.first[0] :]:
                stop = train_stage(run, stage, books, saver, profile)
                if stop:
                    break
            books.watchdog.watch()
            on_one(accelerator, lambda: saver.finish(stop))
        finish(run, books, saver, stop)
        return books.judge.best


def train_stage(run: Run, stage: Stage, books: Books, saver: Saver, profile: Profile) -> signal.Signals | None:
    """Trains a stage to its end, or to the signal that stops the run there."""
    start, end = run.first_step(stage), run.orders[stage.number].steps
    if len(run.stages) > 1:
        books.screen.line(f"stage {stage.name}: {', '.join(stage.tasks)}, {end:,} steps")
    with enough_memory(f"the set-up of stage {stage.name}"):
        trainer = start_stage(run, stage)
    if not trainer.surgery.names and (stage.gradients.operates or stage.gradients.measure):
        books.screen.line("the tasks share nothing that is trained: there are no gradients to combine or to measure")
    engine, meter = trainer.engine, books.meter

    def evaluate() -> None:
        with meter.paused():
            books.evaluate(trainer)

    def save(step: int) -> None:
        books.settle()
        state = {"stage": stage.number, "step": step, "combiner": trainer.surgery.state, **books.state()}
        with meter.paused():
            books.watchdog.watch()
            saver.save(run.done, engine, run.carried, state)

    def batches_of(step: int) -> tuple[list[Draw], list[Batch]]:
        with enough_memory(f"the batches of step {run.done + 1} or a later one"):  # made ahead
            draws, batches = trainer.batches.of_step(step)
            return draws, [batch.to(run.accelerator.device) for batch in batches]

    meter.start_clock()
    stop, more = None, any(order.steps for order in run.orders[stage.number + 1 :])
    evaluations = (step for step in evaluation_steps(run.config, trainer.order) if step > start)
    next_evaluation = next(evaluations, end)
    steps = range(start, end)
    waiting = drawn(meter.waits(prefetched(batches_of, steps)))
    for step, (draws, batches) in zip(steps, waiting, strict=True):
        books.watchdog.watch()
        with enough_memory(f"step {run.done + 1}"):
            train_step(run, trainer, step, draws, batches, books)
        with meter.paused():
            profile.step()

        last = step + 1 == end
        reports = last or run.done % run.config.log.every_steps == 0
        if evaluates := step + 1 == next_evaluation:
            next_evaluation = next(evaluations, end)
        saves = last or saver.is_due(run.done, evaluates)
        # What came of a step is needed at once, or read while the next one is under way.
        at_once = reports or evaluates or saves or trainer.surgery.learns_from_losses
        books.settle(leave=0 if at_once else 1)
        if reports:
            books.report(trainer)
        if evaluates:
            evaluate()
        if not last or more:  # else there is nothing to stop
            stop = books.stop()
        if saves or stop:
            save(step + 1)
        if stop:
            return stop
    # Where there is nothing to train, the model is scored all the same, unless that was done before the run stopped.
    if start >= end and not (run.goes_on_in(stage) and books.judge.is_up_to_date):
        evaluate()
        save(end)
    carried = any(later.carry_moments for later in run.stages[stage.number + 1 :])
    run.carried = run.carried | trainer.optimizer.state if carried else {}
    trainer.surgery.close()
    run.model = engine.close()
    return None


def train_step(run: Run, trainer: Trainer, step: int, draws: list[Draw], batches: list[Batch], books: Books) -> None:
    """One step of a stage: forward and backward for each task drawn, combine, clip, step."""
    stage, surgery = trainer.stage, trainer.surgery
    seed_step(run.config.seed, run.done, run.accelerator.process_index)
    set_lr(trainer.optimizer, stage.optim.lr * stage.optim.schedule.factor(step, trainer.order.steps))
    of_rows: list[tuple[Batch, Tensor]] = []
    by_task: dict[str, list[Batch]] = {task: [] for task, _ in draws}
    for batch in batches:
        by_task[batch.task].append(batch)
    rows_averaged = rows_of_mean(stage, draws)
    with part("surgery"), surgery.step(step, list(by_task)) as loss_weight:
        for name, batches_of_task in by_task.items():
            task = stage.tasks[name]
            # The ranks' mean of losses scaled so is the mean over the global batch, however rows are dealt.
            scale = task.weight * loss_weight[name] * run.accelerator.num_processes / rows_averaged[name]
            with surgery.task(name, last=True), part(f"forward and backward, {name}"):
                for batch in batches_of_task:
                    last, rows = batch is batches_of_task[-1], 0 if batch.filler else len(batch.rows)
                    own = task.ranking is None or stage.finds_words  # else other ranks' rows are in its gradient
                    with enough_for(batch, run.done + 1), surgery.micro_batch(last, rows, own) as backward:
                        loss_N = stage.objective.losses(task, trainer.engine.forward, batch)
                        backward(loss_N.sum() * scale)
                    of_rows.append((batch, loss_N.detach()))
    with part("optimizer"):
        stepped = trainer.engine.step(step)
    run.done += 1
    books.add(trainer, (task for task, _ in draws), of_rows, stepped)


def rows_of_mean(stage: Stage, draws: list[Draw]) -> dict[str, float]:
    """How many rows the losses of each task are averaged over."""
    sizes = {name: task.batch_size for name, task in stage.tasks.items()}
    if stage.gradients.reweight == "per_task":
        return dict(sizes)
    return dict.fromkeys(sizes, sum(sizes[task] for task, _ in draws) / len(draws))


def finish(run: Run, books: Books, saver: Saver, stop: signal.Signals | None) -> None:
    """Says what came of the run, and where it is."""
    judge, screen, config = books.judge, books.screen, run.config
    if judge.unsaved and not stop:
        raise UserError(judge.unsaved)
    verdict = [] if stop else books.verdict()
    if not (stop or saver.writer.failed):
        books.end()
    books.close()
    if stop:
        screen.line(f"{stop.name}: saved after step {run.done:,} of {run.total_steps:,}; go on with --resume auto")
    else:
        metrics = {name: task.metric for name, task in config.tasks.items()}
        if len(judge.after_stage) > 1:
            screen.console.print(stage_table(judge.after_stage, metrics))
            screen.line(f"\nthe best model, after step {judge.best['step']}:")
        screen.console.print(score_table(judge.best, metrics))
        screen.line(f"best of {run.total_steps} steps was {judge.best['step']}, by {config.evaluate.best_by}")
        screen.line(f"run folder   {config.output_dir}\nbest model   {config.output_dir / BEST}")
        for line in verdict:
            screen.line(f"gradients    {line}")
        if config.log.tensorboard:
            screen.line(f"TensorBoard  tensorboard --logdir {config.output_dir / TENSORBOARD}")
    if saver.writer.failed:  # or the run would be taken for a finished one, which it is not for --resume auto
        raise UserError(saver.writer.failed)
