"""What a step sends and what a rank holds, by formulas, under each engine; counted on ranks by the tests.

A ring all-reduce passes every rank's share on twice around, and so sends 2 (W - 1) / W of what it reduces; a
reduce-scatter or a gathering sends half of that.
"""

# Suffixes: P = trained parameters, S = those that the tasks share, W = ranks, K = tasks of a step.

from dataclasses import dataclass

from mtl_dist.distributed import EngineName, Precision
from mtl_dist.experiment import GradientsConfig

FLOAT_BYTES = 4  # moments and what the optimizer steps are fp32, whatever the precision of the products


@dataclass(frozen=True)
class Work:
    """What the steps of a stage work on."""

    parameters: int  # of the model, frozen ones too
    layers: int  # of the encoder's layers, likewise
    trained: int
    shared: int  # trained, and of the encoder
    row: int  # the same as a row of surgery holds them, each tensor filled up to whole chunks
    tasks: int  # of a step
    micro_batches: float  # of a step, on each rank
    moments: int = 2  # of a weight: AdamW's two, and its average


@dataclass(frozen=True)
class StageCost:
    """What training takes on each rank."""

    bytes_sent_per_step: int
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    task_gradient_bytes: int


def cost_of(work: Work, gradients: GradientsConfig, engine: EngineName, precision: Precision, ranks: int) -> StageCost:
    """What a step costs with AdamW; activations and fixed buckets of the engines come on top.

    Of steps with surgery and without (`every`) the bytes sent are the mean, and what is held is that of surgery.
    """
    apart = gradients.operates or bool(gradients.measure)
    sent = _sent(work, gradients, engine, precision, ranks, apart)
    if gradients.operates and not gradients.measure:
        between = _sent(work, gradients, engine, precision, ranks, apart=False)
        sent += (between - sent) * (gradients.every - 1) / gradients.every
    whole, weights = FLOAT_BYTES * work.trained, FLOAT_BYTES * work.parameters
    share = whole // ranks
    computed = 2 if precision != "fp32" else FLOAT_BYTES  # ZeRO's weights that the model computes with, per element
    moments = work.moments * (whole if engine == "ddp" else share)
    row = _row(work, gradients)
    rows = work.tasks * row // ranks if apart else 0
    match engine:
        case "ddp":
            held, buckets = whole, 0
            if apart:
                scatters = _scatters(gradients, ranks)
                # In fp32 the combination takes the place of a row.
                combined = FLOAT_BYTES * work.row if gradients.buffer_dtype == "bf16" else 0
                held = FLOAT_BYTES * (work.trained - work.shared) + combined + (combined // ranks if scatters else 0)
                # DDP's own, for what it averages itself; surgery averages heads in one piece.
                buckets = FLOAT_BYTES * (work.trained - work.shared)
                if not gradients.always_apart:
                    held, buckets = max(held, whole), whole
                rows = work.tasks * row
                if scatters:
                    rows = rows // ranks + 2 * row  # one is filled while the other is on its way
            held += buckets if ranks > 1 else 0
        case "zero1":
            weights = computed * work.parameters + share
            # Every gradient is whole until it is averaged; the sum of a plain step is kept in a row.
            held = max(computed * work.trained, share) + computed * work.trained // ranks
            rows = rows or row // ranks
        case "zero2":
            weights = computed * work.parameters + share
            held = 2 * share  # averaged, and once more in one piece for the step
        case "zero3":
            weights = computed * work.parameters // ranks + share
            held = 2 * share
        case "fsdp2":
            weights //= ranks
            # Gradients that wait for a later micro-batch are whole.
            waits = work.micro_batches > (work.tasks if apart else 1)
            held = share + (whole if waits else 0)
    return StageCost(round(sent), weights, held, moments, rows)


def _row(work: Work, gradients: GradientsConfig) -> int:
    return (2 if gradients.buffer_dtype == "bf16" else FLOAT_BYTES) * work.row


def _scatters(gradients: GradientsConfig, ranks: int) -> bool:
    return gradients.reduce == "reduce_scatter" and ranks > 1


def _sent(
    work: Work, gradients: GradientsConfig, engine: EngineName, precision: Precision, ranks: int, apart: bool
) -> float:
    """The bytes of a step, `apart` with a gradient for each task; every task counts as reaching all that is shared."""
    own = work.trained - work.shared  # heads; each task reaches its own
    computed = 2 if precision != "fp32" else FLOAT_BYTES
    # Forward passes gather all weights, backward passes those of the layers.
    gathered = work.micro_batches * computed * (work.parameters + work.layers)
    match engine:
        case "ddp":
            passed_on: float = 2 * FLOAT_BYTES * work.trained
            if apart:
                rows = work.tasks * _row(work, gradients)
                scattered = _scatters(gradients, ranks)
                passed_on = (rows + FLOAT_BYTES * work.row if scattered else 2 * rows) + 2 * FLOAT_BYTES * own
        case "zero1":  # which averages with every task, as the comment on `sums` in zero.py says
            passed_on = computed * (2 * (work.tasks * work.shared + own) + work.trained)
        case "zero2":
            visits = work.micro_batches / work.tasks
            passed_on = computed * (2 * visits * (work.tasks * work.shared + own) + work.trained)
        case "zero3":
            visits = work.micro_batches / work.tasks
            passed_on = gathered + computed * visits * (work.tasks * work.shared + own)
        case "fsdp2":
            averaged = work.tasks * work.shared + own if apart else work.trained
            passed_on = gathered + FLOAT_BYTES * averaged
    return (ranks - 1) / ranks * passed_on
