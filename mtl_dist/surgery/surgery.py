"""Gradient surgery for anybody's model and loop: one process, DDP, FSDP2, DeepSpeed's ZeRO.

    surgery = Surgery(model, "pcgrad", shared="bert", accelerator=accelerator)
    ...
    surgery.backward({"nli": nli_loss, "sts": sts_loss})     # in the place of accelerator.backward(nli_loss + sts_loss)

Average first, then combine: every task's gradient is the mean over all ranks before its inner products are formed, so
any number of ranks computes what one would compute with the whole global batch.
"""

# Shape suffixes: K = tasks of the step, S = shared parameters.

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist.config import Config, Pattern, UserError, made
from mtl_dist.surgery.combiners import AnyCombiner, GramCombiner, LossCombiner, Sum
from mtl_dist.surgery.conflict import Conflict, conflict
from mtl_dist.surgery.ddp import Replicated, Scattered
from mtl_dist.surgery.noise import Parts, Sample, sample
from mtl_dist.surgery.rows import Coming, Rows, on_device
from mtl_dist.surgery.zero import Partitioned

ALL = "all tasks"  # the one row of a step that keeps no tasks apart


class SurgeryConfig(Config):
    """How the gradients of a step's tasks are kept and combined."""

    combiner: AnyCombiner = Sum()
    # What is combined as one: all shared parameters, or each layer by itself.
    scope: Literal["shared", "layers"] = "shared"
    match: Pattern = "."  # only shared parameters of these names; the others' gradients are added up
    every: PositiveInt = 1  # surgery on every n-th step, plain training on those between
    # There, the plain sum; or the losses count as much as the last surgery had their gradients count, heads' as well.
    between: Literal["sum", "held"] = "sum"
    # How far the tasks' gradients agree, also where they are only added up; `layers`: in each layer by itself as well.
    measure: bool | Literal["layers"] = False
    # Under DDP. all_reduce sends 2 K P elements a step; reduce_scatter (K + 1) P, and keeps K P / W of them.
    reduce: Literal["all_reduce", "reduce_scatter"] = "all_reduce"
    buffer_dtype: Literal["fp32", "bf16"] = "fp32"  # of the tasks' gradients

    @property
    def operates(self) -> bool:
        """Whether the combination is another than the sum."""
        return isinstance(self.combiner, GramCombiner) and not isinstance(self.combiner, Sum)

    def operates_in(self, step: int) -> bool:
        """Whether a step's gradients are combined, and not just added up."""
        return self.operates and step % self.every == 0

    @property
    def always_apart(self) -> bool:
        """Whether every step keeps the tasks' gradients apart."""
        return bool(self.measure) or (self.operates and self.every == 1)

    @property
    def holds(self) -> bool:
        """Whether the weights of one step are those of the next ones."""
        return self.operates and self.between == "held"

    def refuse_misfits(self) -> None:
        """Refuses settings that exclude each other."""
        if self.holds and (self.scope != "shared" or self.match != "." or self.measure):
            raise UserError(
                "between is held, which gives each task's loss one weight and keeps no gradients apart between "
                "surgeries: it goes with scope shared, and without match and measure"
            )


class Surgery:
    """What the tasks' gradients go through on their way to the optimizer."""

    def __init__(
        self,
        model: nn.Module,
        combiner: str | GramCombiner | LossCombiner = "pcgrad",
        *,
        shared: str | Sequence[str],
        accelerator: Any = None,
        scaler: Any = None,
        seed: int | tuple[int, ...] = 0,
        drop_nonfinite: bool = False,
        **settings: Any,
    ) -> None:
        """`model` as its engine has wrapped it; `shared` names the submodules whose gradients are combined.

        `scaler` scales fp16 losses where there is no accelerator to know it. `drop_nonfinite` leaves a task out of a
        step in which its gradient is infinite or NaN. `settings` are the fields of SurgeryConfig.
        """
        if isinstance(combiner, str):
            settings["combiner"] = combiner
        elif not isinstance(combiner, GramCombiner | LossCombiner):
            raise UserError(
                f"Surgery: combiner is {combiner!r}; give a method's name, 'pcgrad', or an object, PCGrad()"
            )
        self.config = made(SurgeryConfig, "Surgery", **settings)
        if not isinstance(combiner, str):  # which may be of a class of one's own
            self.config = self.config.model_copy(update={"combiner": combiner})
        self.config.refuse_misfits()
        self.drop_nonfinite = drop_nonfinite
        self.accelerator = accelerator
        self.seed = (seed,) if isinstance(seed, int) else seed
        self.number = 0  # of the step at hand, or of the next one
        self.state: dict[str, dict[str, Any]] = {}  # the combiner's, for each group of parameters
        # Of the last step: its tasks, their inner products, and the weights of each group of parameters.
        self.measured: tuple[list[str], Tensor, Coming | None] | None = None
        self.of_parts: dict[str, Parts] = {}  # of its batches, where they are known
        self.loss_scale = 1.0
        self.in_step = False

        module = unwrapped(model)
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not trained:
            raise UserError("the model has nothing to train: every parameter is frozen")
        paths = [shared] if isinstance(shared, str) else list(shared)
        ours = _parameters_of(paths, module)  # by themselves: tied ones have another part's name
        self.names = [name for name, parameter in trained.items() if parameter in ours]  # of the shared parameters
        if not self.names and (self.config.operates or self.config.measure):
            raise UserError(f"nothing of what the tasks share is trained: shared is {', '.join(paths)}")
        if any(isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse for part in module.modules()):
            raise UserError("an embedding has sparse gradients, which have no inner products; set sparse=False")
        layers = by_layer(self.names, tuple(f"{path}." if path else "" for path in paths))
        self.layers = layers if self.config.measure == "layers" else None
        self.groups = groups_of(self.names, self.config, layers)
        self.group_of_S = [len(self.groups)] * len(self.names)
        for group, members in enumerate(self.groups.values()):
            for place in members:
                self.group_of_S[place] = group
        rest = [name for name, parameter in trained.items() if parameter not in ours]
        engine = _without_compile(model)  # Accelerate compiles what DDP has wrapped
        self.rows: Rows = _rows_class(engine, self.config.reduce)(
            engine,
            [trained[name] for name in self.names],
            [trained[name] for name in rest],
            torch.bfloat16 if self.config.buffer_dtype == "bf16" else torch.float32,
            scaler if accelerator is None else accelerator.scaler,
        )
        self.places = {parameter: place for place, parameter in enumerate((*self.rows.shared, *self.rows.rest))}

    def close(self) -> None:
        """Lets go of the model, so that it can train without surgery, or with another one."""
        self.rows.close()

    def state_dict(self) -> dict[str, Any]:
        """Numbers by name: `accelerator.register_for_checkpointing(surgery)` saves them.

        What a combiner remembers of gradients is on rank 0 alone, which decides on the weights.
        """
        return {"step": self.number, "combiner": deepcopy(self.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with what `state_dict` once gave."""
        self.number, self.state = state["step"], deepcopy(state["combiner"])
        self.measured = None  # of the loop that was left

    # -------------------------------------------------------------------------------------------- for loops of others

    def backward(self, losses: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], last: bool | None = None) -> None:
        """In the place of `accelerator.backward(sum of the losses)`, once for each micro-batch.

        Takes each task's loss by name; the losses may come from one forward pass or from several. From a generator of
        pairs each loss is asked for when the one before is done, so that one graph is in memory at a time. With the
        step's last micro-batch, which Accelerate knows and others say by `last`, the combined gradient is left in the
        parameters; under DeepSpeed the engine steps, as it does in `accelerator.backward`.
        """
        if last is None:
            last = True if self.accelerator is None else self.accelerator.sync_gradients
        if not self.in_step:
            self._begin(self.number)
        with self._or_give_up():
            self._backward(losses, last)

    def _backward(self, losses: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], last: bool) -> None:
        parts = 1 if self.accelerator is None or self.rows.steps else self.accelerator.gradient_accumulation_steps
        left = 0
        if isinstance(losses, Mapping):
            left, tasks, losses = len(losses), list(losses), losses.items()
            if self.apart:
                self.rows.reserve(len({*self.reached, *tasks}))
            if last or self.rows.scattered:  # else nothing is averaged yet
                self._refuse_other_tasks([*self.reached, *tasks])
        for task, loss in _by_name(losses):
            left -= 1
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise UserError(f"task '{task}': its loss must be one number that depends on trained parameters")
            weight = self.loss_weights([task])[task]
            if isinstance(self.config.combiner, LossCombiner):
                self.losses.setdefault(task, []).append(loss.detach() / (parts * self._divided_later()))
            with self.task(task, last), self.rows.micro_batch(self.rows.averaged_by_engine):
                try:
                    self._add(task, loss * (weight / parts), retain_graph=left > 0 and self.rows.retains)
                except RuntimeError as error:
                    if "a second time" not in str(error):
                        raise
                    way_out = "give the losses as a mapping" if self.rows.retains else "ZeRO-3 needs one for each task"
                    raise UserError(
                        f"task '{task}': its loss shares a forward pass with one that is done; {way_out}"
                    ) from error
            self._count_part(self.current, 1.0, last)
        if last:
            if not self.rows.tasks:
                raise UserError(f"step {self.number} has no losses; give it those of one task at least")
            self._combine()
            self.observe(self._mean_losses())
            if self.rows.steps:
                self.rows.model.step()

    def _divided_later(self) -> int:
        """What DeepSpeed divides losses by, where others do that themselves."""
        return int(self.rows.model.gradient_accumulation_steps()) if self.rows.steps else 1

    def _mean_losses(self) -> dict[str, float]:
        """Each task's mean loss over the step's micro-batches and the ranks, where the combiner asks for it."""
        if not self.losses:
            return {}
        means = torch.stack([torch.stack(values).float().sum() for values in self.losses.values()])
        if self.rows.world > 1:
            dist.all_reduce(means.div_(self.rows.world), group=self.rows.group)
        return dict(zip(self.losses, means.tolist(), strict=True))

    # --------------------------------------------------------------------------- for loops that know their steps before

    @contextmanager
    def step(self, number: int, tasks: Sequence[str]) -> Iterator[dict[str, float]]:
        """Around all backward passes of a step; leaves the combined gradient where the optimizer finds it.

            with surgery.step(number, ["nli", "sts"]) as weight:
                with surgery.task("nli", last=True):              # once for each task, in this order
                    with surgery.micro_batch(last) as backward:   # around forward and backward of a micro-batch
                        backward(loss * weight["nli"])

        Since its tasks are known, a step that keeps nothing apart costs what plain training costs: the engine averages
        the sum, with the last micro-batch of the last task.
        """
        self._begin(number)
        self.by_engine = self.rows.sums and not self.apart
        self.last_task = tasks[-1]
        with self._or_give_up():
            if self.apart:
                if self.rows.device.type == "cpu":  # where nobody waits for it; GPUs hear at the step's end
                    self._refuse_other_tasks(tasks)
                self.rows.reserve(len(tasks))
            yield self.loss_weights(tasks)
            self._combine()

    @contextmanager
    def task(self, task: str, last: bool = False) -> Iterator[None]:
        """Around the backward passes of a task; `last` lets its reduction start at once."""
        self.current = task if self.apart else ALL
        self.ends_step = self.by_engine and task == self.last_task
        self.rows.reached.clear()
        with nullcontext() if self.by_engine else self.rows.of_task(self.current, last and self.apart):
            yield
        self.reached.setdefault(self.current, set()).update(self.rows.reached)

    @contextmanager
    def micro_batch(
        self, last: bool, rows: float = 1.0, independent: bool = True
    ) -> Iterator[Callable[[Tensor], None]]:
        """Around forward and backward of a micro-batch; gives what to call with its loss.

        `last` is its task's last one; `rows` of its task's batch are in it, as compared with its others. Where these
        have a part in its gradient it is not `independent`, and tells nothing of the noise in theirs.
        """
        with self.rows.micro_batch(last and (self.ends_step if self.by_engine else self.rows.averaged_by_engine)):
            yield lambda loss: self._add(self.current, loss)
        self._count_part(self.current, rows, last)
        if not independent:
            self.dependent.add(self.current)

    def _count_part(self, task: str, rows: float, last: bool) -> None:
        counted = self.parts.setdefault(task, [])
        counted.append(rows)
        if self.apart and len(counted) == 1 and not last:
            self.rows.keep_square(task)

    def loss_weights(self, tasks: Iterable[str]) -> dict[str, float]:
        """What the losses of tasks are multiplied with, besides their own weights."""
        if isinstance(self.config.combiner, LossCombiner):
            return self.config.combiner.loss_weights(list(tasks), self.state.setdefault("losses", {}))
        held: dict[str, float] = {}
        if self.config.holds and not self.config.operates_in(self.number):
            if self.measured is not None:
                self._hold()
            held = self.state.get("held", {})
        return {task: held.get(task, 1.0) for task in tasks}

    def _hold(self) -> None:
        """Keeps the weights of the surgery that was just done."""
        assert self.measured is not None
        tasks, _, weights_GK = self.measured
        if weights_GK is not None and (weights_K := weights_GK.read()[0]).isfinite().all():
            self.state.setdefault("held", {}).update(zip(tasks, weights_K.tolist(), strict=True))

    def observe(self, losses: Mapping[str, float]) -> None:
        """Learns from the mean losses of the step's tasks, before any weight."""
        if isinstance(self.config.combiner, LossCombiner):
            self.config.combiner.observe(dict(losses), self.state.setdefault("losses", {}))

    @property
    def learns_from_losses(self) -> bool:
        """Whether `observe` must hear of each step's losses before the next step."""
        return isinstance(self.config.combiner, LossCombiner)

    @property
    def dropped(self) -> set[str]:
        """The tasks that the last step went without."""
        return self.rows.dropped

    # ------------------------------------------------------------------------------------------------ what a step does

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        """Who catches what fails here, out of memory say, begins the step anew."""
        try:
            yield
        except BaseException:
            self.in_step = False
            self.rows.give_up()
            raise

    def _begin(self, number: int) -> None:
        self.number = number
        self.in_step = True
        wanted = self.config.operates_in(number) or bool(self.config.measure) or self.drop_nonfinite
        self.apart = bool(self.names) and wanted
        self.by_engine = False
        self.reached: dict[str, set[nn.Parameter]] = {}
        self.lost: dict[str, Tensor] = {}  # whether some loss of a task was no number
        self.losses: dict[str, list[Tensor]] = {}
        self.parts: dict[str, list[float]] = {}  # the rows of each task's micro-batches on this rank
        self.dependent: set[str] = set()  # tasks whose parts are not independent of each other
        self.rows.start()
        self.rows.keeps_squares = self.apart

    def _add(self, task: str, loss: Tensor, retain_graph: bool = False) -> None:
        if self.drop_nonfinite:
            no_number = ~loss.detach().isfinite()
            self.lost[task] = self.lost[task] | no_number if task in self.lost else no_number
        self.rows.backward(loss, retain_graph)

    def _combine(self) -> None:
        rows, self.in_step, self.measured = self.rows, False, None
        if self.by_engine:
            if rows.steps:
                rows.settle(set().union(*self._agreed([ALL])[0].values()))
        else:
            rows.finish()
            reached, lost, grams_SKK = self._agreed(rows.tasks)
            weights_GK = None
            if self.apart:
                if self.drop_nonfinite:
                    self._drop(grams_SKK, lost)
                weights = None
                if self.config.operates_in(self.number):
                    weights_GK, weights = self._weights(grams_SKK, rows.tasks)
                self.measured = rows.tasks, grams_SKK, weights
                if self.config.holds and rows.rank == 0:  # the others need not wait for it
                    self._hold()
            kept = set().union(*(reached[task] for task in rows.kept))
            rows.settle(kept)
            rows.deposit(weights_GK, self.group_of_S, kept)
        self.number += 1

    def _drop(self, grams_SKK: Tensor, lost: Set[str]) -> None:
        """Leaves out the tasks whose losses or gradients are no numbers.

        Where losses are scaled, gradients of finite losses may overflow. These stay: the scaler has to see them.
        """
        for k, task in enumerate(self.rows.tasks):
            finite = grams_SKK[:, k, k].sum().isfinite()
            if task in lost or not (finite or self.loss_scale > 1):
                self.rows.drop(task)
                grams_SKK[:, k] = grams_SKK[:, :, k] = 0

    def _refuse_other_tasks(self, tasks: Sequence[str]) -> None:
        """Refuses ranks that come with other tasks, before they average what is not the same; waits for the device."""
        if self.rows.world > 1:
            self._refuse_other_names(tasks, self.rows.summed(_checksums(tasks), []))

    def _refuse_other_names(self, tasks: Sequence[str], sums: Tensor) -> None:
        if sums.tolist() != [self.rows.world * each for each in _checksums(tasks)]:
            raise UserError(
                f"step {self.number}: the ranks came with different tasks, this one with {', '.join(tasks)}; draw the "
                "tasks alike on all ranks, in the same order"
            )

    def _agreed(self, tasks: list[str]) -> tuple[dict[str, Set[nn.Parameter]], Set[str], Tensor]:
        """What the ranks know together: the parameters that each task reached on any of them, the tasks some of whose
        losses were no numbers, and the inner products of the tasks' gradients, (S, K, K) in fp64 on the CPU.
        """
        rows, K = self.rows, len(tasks)
        seen_by_task = [[0.0] * len(self.places) for _ in tasks]
        for seen, task in zip(seen_by_task, tasks, strict=True):
            for parameter in self.reached.get(task, ()):
                seen[self.places[parameter]] = 1.0
        none = torch.zeros((), device=rows.device)
        lost = [self.lost.get(task, none) for task in tasks]
        # Each rank's rows are a part of their batch; of one rank alone, its first micro-batch is.
        here = [self.parts.get(task, [0.0]) for task in tasks]
        part_K = [sum(each) if rows.world > 1 else each[0] for each in here]
        squares = [rows.squares.get(k, none) for k in range(K)]
        mine_SKK = [rows.grams()] if self.apart else []
        known = [*_checksums(tasks), *chain.from_iterable(seen_by_task), *part_K, *(part**2 for part in part_K)]
        sums = rows.summed(known, [*lost, *squares, rows.loss_scale, *mine_SKK])
        lengths = [2, len(self.places) * K, K, K, K, K, 1]
        names, seen_KS, sizes_K, sizes2_K, lost_K, squares_K, scale, grams = torch.split(
            sums, [*lengths, len(sums) - sum(lengths)]
        )
        self._refuse_other_names(tasks, names)
        self.loss_scale = scale.item() / rows.world
        grams_SKK = grams.view(-1, K, K) / self.loss_scale**2
        if self.apart:
            whole_K = sizes_K if rows.world > 1 else torch.tensor([sum(each) for each in here])
            parts_K4 = torch.stack(
                [whole_K, squares_K / self.loss_scale**2, sizes_K / whole_K, sizes2_K / whole_K**2], dim=1
            )
            known_apart = [k for k in rows.squares if tasks[k] not in self.dependent]
            self.of_parts = {tasks[k]: Parts(*parts_K4[k].tolist()) for k in known_apart}
        parameters = list(self.places)
        reached: dict[str, Set[nn.Parameter]] = {
            task: {parameters[place] for place in places.nonzero()[:, 0].tolist()}
            for task, places in zip(tasks, seen_KS.view(K, -1), strict=True)
        }
        lost_tasks = {task for task, number in zip(tasks, lost_K.tolist(), strict=True) if number}
        return reached, lost_tasks, grams_SKK

    def _weights(self, grams_SKK: Tensor, tasks: list[str]) -> tuple[Tensor, Coming]:
        """How often each task's gradient goes into the combined one, for each group: (G, K), the same on all ranks; on
        the device, and on the CPU. The last group is of those parameters whose gradients are added up.
        """
        assert isinstance(self.config.combiner, GramCombiner)
        weights_GK = grams_SKK.new_ones(len(self.groups) + 1, len(tasks))
        if self.rows.rank == 0:
            seed = np.random.SeedSequence((*self.seed, self.number)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0]) % 2**63)
            for weights_K, (group, members) in zip(weights_GK, self.groups.items(), strict=False):
                state = self.state.setdefault(group, {})
                gram_KK = grams_SKK[members].sum(0)
                weights_K[:] = self.config.combiner.weights(gram_KK, tasks, state, generator)
        # One rank decides: on another processor a sign near zero could come out the other way.
        there_GK = on_device(weights_GK, self.rows.device)
        if self.rows.world > 1:
            dist.broadcast(there_GK, group_src=0, group=self.rows.group)
        return there_GK, Coming(weights_GK if self.rows.rank == 0 else there_GK)

    @property
    def conflict(self) -> Conflict | None:
        """What the gradients of the last step were like, where its tasks were kept apart."""
        if self.measured is None:
            return None
        tasks, grams_SKK, weights_GK = self.measured
        weights_SK = grams_SKK.new_ones(grams_SKK.shape[:2])
        if weights_GK is not None:
            weights_SK = weights_GK.read()[self.group_of_S]
        return conflict(tasks, grams_SKK, weights_SK, self.layers)

    @property
    def noise(self) -> Sample | None:
        """What of it is signal and what is noise, where parts of the batches are known and no task was dropped."""
        if self.measured is None or self.dropped:
            return None
        tasks, grams_SKK, _ = self.measured
        return sample(tasks, grams_SKK.sum(0).numpy(), self.of_parts)


def _checksums(tasks: Sequence[str]) -> list[float]:
    """Two numbers whose sums over the ranks are multiples of their own only where all ranks have the same tasks."""
    name = zlib.crc32("\n".join(tasks).encode()) >> 16  # the sum of its squares is exact in fp64, over 2^21 ranks
    return [name, name**2]


def _by_name(losses: Any) -> Iterator[tuple[str, Any]]:
    """Pairs, after checking that they are some."""
    for pair in [losses] if isinstance(losses, Tensor) else losses:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(
                "each task's loss comes by its name: surgery.backward({'TASK': loss, ...}), and not their sum"
            )
        yield pair


def unwrapped(model: Any) -> nn.Module:
    """A model without DDP, DeepSpeed and torch.compile around it."""
    model = _without_compile(model)
    while isinstance(model, DistributedDataParallel) or _is_deepspeed(model):
        model = _without_compile(model.module)
    return model  # type: ignore[no-any-return]


def _without_compile(model: Any) -> Any:
    while "_orig_mod" in getattr(model, "_modules", ()):  # DeepSpeed's engine would say that it has what its module has
        model = model._orig_mod
    return model


def _is_deepspeed(model: Any) -> bool:
    return hasattr(model, "set_gradient_accumulation_boundary")


def _rows_class(model: Any, reduce: str) -> type[Rows]:
    """How the gradients of a wrapped model are averaged."""
    if _is_deepspeed(model):
        return Partitioned
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UserError("the model is wrapped by FSDP 1, which is not supported; set fsdp_version: 2")
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        from mtl_dist.surgery.fsdp2 import Sharded  # which takes as long to import as torch does

        return Sharded
    many = dist.is_initialized() and dist.get_world_size() > 1
    return Scattered if reduce == "reduce_scatter" and many else Replicated


def _parameters_of(shared: Sequence[str], module: nn.Module) -> set[nn.Parameter]:
    """The parameters of some submodules."""
    if not shared:
        raise UserError("shared names nothing; name the submodules that the tasks share, or '' for the whole model")
    found: set[nn.Parameter] = set()
    for path in shared:
        try:
            found |= set(module.get_submodule(path).parameters())
        except AttributeError:
            parts = ", ".join(name for name, _ in module.named_children())
            raise UserError(f"shared names '{path}', which the model has not; it has {parts}") from None
    return found


def groups_of(names: Sequence[str], config: SurgeryConfig, layers: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The parameters that are combined as one, by their places; those that no group has are added up."""
    groups = layers if config.scope == "layers" else {"shared": range(len(names))}
    matched = {
        group: [place for place in places if re.search(config.match, names[place])] for group, places in groups.items()
    }
    found = {group: places for group, places in matched.items() if places}
    if names and not found:
        raise UserError(f"match matches no shared parameter that is trained: '{config.match}'")
    return found


def by_layer(names: Sequence[str], prefixes: tuple[str, ...]) -> dict[str, list[int]]:
    """The places of parameters by the layer that they belong to: `embeddings`, `encoder.layer.0`, ...

    A layer is what stands before a name's first number, and the number; or a part of the shared module; or, of several
    shared ones, what each has outside of its numbered layers.
    """
    layers: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        inside = name.removeprefix(prefix)
        numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", inside)
        if len(prefixes) == 1 or not prefix:
            layer = numbered[0] if numbered else inside.split(".")[0]
        else:
            layer = prefix + numbered[0] if numbered else prefix.removesuffix(".")
        layers.setdefault(layer, []).append(place)
    return layers
