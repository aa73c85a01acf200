"""What `mtl-dist errors` shows: a table on the screen, a page of Markdown, and pictures."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from mtl_dist.metrics import accuracy_interval
from mtl_dist.model.objectives import Regression
from mtl_dist.runs.analysis import Analysis, Calibration, Measured, SliceScore, WrongRow
from mtl_dist.runs.predict import class_names
from mtl_dist.tasks import TaskConfig
from mtl_dist.training.folder import CONFUSION, PREDICTIONS, RELIABILITY, ROWS
from mtl_dist.watch.charts import COLOURS, INK, new_chart, save_chart
from mtl_dist.watch.screen import plain_table, shown_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES = 12  # whose confusions the page has as a table; of more it has the largest
MOST_NUMBERS = 20  # classes whose confusions are written into the picture
MOST_SLICES = 24  # on the screen
LONGEST_TEXT = 400  # letters of a sentence on the page


@dataclass(frozen=True)
class About:
    """Whose errors they are."""

    run: str
    task: str
    split: str
    source: str
    step: int | None  # that the best model is of
    rows: int
    no_number: str | None  # what a user reads of rows without a prediction
    skipped_rows: int  # that the task cannot use


def shown_measured(score: Measured) -> str:
    """A score with its interval, as people read it."""
    return shown_score(score.value) + (f" ({_interval(score)})" if score.low is not None else "")


def _interval(score: Measured, digits: int = 4) -> str:
    return "" if score.low is None or score.high is None else f"{score.low:.{digits}f} to {score.high:.{digits}f}"


def _of_calibration(calibration: Calibration) -> str:
    sure, right = calibration.confidence, calibration.accuracy
    return f"ECE {calibration.ece:.4f}: {sure:.1%} sure on average, {right:.1%} right"


def _of_threshold(analysis: Analysis) -> str:
    assert analysis.threshold is not None and analysis.score.value is not None
    best, gain = analysis.threshold, analysis.threshold.accuracy - analysis.score.value
    threshold = _below_one(best.threshold)
    if gain <= 0:
        return f"no threshold on p({best.yes}) does better than 0.5 on these rows"
    return (
        f"a threshold of {threshold} on p({best.yes}) gives accuracy {best.accuracy:.4f} ({gain:+.4f}) here; "
        "it is fitted on these rows, so expect less of it on others"
    )


def _below_one(probability: float) -> str:
    """A probability with as many digits as tell it from 1."""
    digits = 4 if probability >= 1 else max(4, 2 - math.floor(math.log10(1 - probability)))
    return f"{probability:.{min(digits, 15)}f}".rstrip("0")


def _cells(each: SliceScore) -> list[str]:
    return [
        f"{each.kind}: {each.name}",
        f"{each.rows:,}",
        f"{each.share:.1%}",
        shown_score(each.score.value),
        _interval(each.score),
        shown_score(each.rest),
        *([] if each.pearson is None else [shown_measured(each.pearson)]),
        "worse" if each.worse else "",
    ]


def _heads(analysis: Analysis) -> list[str]:
    of_regression = [] if analysis.pearson is None else ["pearson"]
    return ["slice", "rows", "share", analysis.measure, "95 %", "the rest", *of_regression, ""]


_TEXTS = ("slice", "95 %", "", "score", "gold", "prediction", "id", "pearson")  # columns to the left


# ---------------------------------------------------------------------------------------------------------- the screen


def tables(about: About, analysis: Analysis, files: Sequence[Path]) -> Iterator[Table | str]:
    """What a person reads first: the score, the calibration, the slices from the worst on, where the files are."""
    scores = f"{analysis.measure} {shown_measured(analysis.score)}"
    if analysis.pearson is not None:
        scores += f", pearson {shown_measured(analysis.pearson)}"
    yield escape(f"{about.run}, {about.task} {about.split}: {about.rows:,} rows, {scores}")
    if analysis.calibration is not None:
        yield escape(_of_calibration(analysis.calibration))
    if analysis.threshold is not None:
        yield escape(_of_threshold(analysis))
    if about.no_number is not None:
        yield escape(about.no_number)
    of_regression = [] if analysis.pearson is None else ["pearson"]
    head = ["slice", "rows", "error" if of_regression else "accuracy", "95 %", "the rest", *of_regression, ""]
    table = plain_table(*head, texts=("slice", "95 %", ""))
    for each in sorted(analysis.slices, key=_badness, reverse=True)[:MOST_SLICES]:
        table.add_row(*map(escape, _on_screen(each)))
    if len(analysis.slices) > MOST_SLICES:
        table.add_row(f"... {len(analysis.slices) - MOST_SLICES} more")
    if analysis.slices:
        yield table
    yield escape(f"{files[0].parent}: {', '.join(path.name for path in files)}")


def _on_screen(each: SliceScore) -> list[str]:
    """As few letters as 80 columns have room for."""
    pearson = [] if each.pearson is None else [each.pearson.value]
    numbers = ["" if value is None else f"{value:.3f}" for value in (each.score.value, each.rest, *pearson)]
    numbers.insert(1, _interval(each.score, 3))
    return [f"{each.kind}: {each.name}", f"{each.rows:,}", *numbers, "worse" if each.worse else ""]


def _badness(each: SliceScore) -> float:
    value = each.score.value
    if value is None:
        return -math.inf
    return -value if each.pearson is None else value


# ------------------------------------------------------------------------------------------------------------ the page

# What Markdown, a table of it, HTML or a formula would take for its own.
_ESCAPES = str.maketrans(
    {letter: f"&#{ord(letter)};" for letter in "&<>|\\$@"} | {letter: f"\\{letter}" for letter in "*_`[]~"}
)


def markdown(text: object) -> str:
    """A text as a cell of a Markdown table shows it, letter for letter, but for its line breaks and its length."""
    line = " ".join(str(text).split())
    return (line if len(line) <= LONGEST_TEXT else line[:LONGEST_TEXT] + "...").translate(_ESCAPES)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], texts: Sequence[str] = _TEXTS) -> list[str]:
    lines = [
        "| " + " | ".join(map(markdown, head)) + " |",
        "|" + "|".join("---" if name in texts else "---:" for name in head) + "|",
    ]
    return [*lines, *("| " + " | ".join(map(markdown, row)) + " |" for row in rows), ""]


def page_of(task: TaskConfig, about: About, analysis: Analysis, most: int) -> Iterator[str]:
    """The lines of the page."""
    of_step = "" if about.step is None else f", the model of step {about.step:,}"
    yield f"# Where {markdown(about.run)} is wrong: {markdown(about.task)}, {about.split}\n"
    yield f"{about.rows:,} rows of {markdown(about.source)}{of_step}.\n"
    if about.no_number is not None:
        yield f"{markdown(about.no_number)}.\n"
    if about.skipped_rows:
        yield f"{about.skipped_rows:,} more rows cannot be used, and are not among these.\n"
    scores = {metric: shown_score(value) for metric, value in analysis.scores.items() if metric != "confusion"}
    scores[analysis.measure] = shown_measured(analysis.score)
    if analysis.pearson is not None:
        scores["pearson"] = shown_measured(analysis.pearson)
    yield from _table(["", "score"], scores.items())
    yield from _most_wrong(task, analysis, most)
    if isinstance(task.label, Regression):
        yield f"## Predictions\n\n![Predictions against labels]({PREDICTIONS})\n"
    else:
        yield from _confusion(class_names(task), analysis)
    yield from _slices(analysis)
    if analysis.calibration is not None:
        yield from _calibration(analysis.calibration)
    if analysis.threshold is not None:
        sentence = _of_threshold(analysis)
        yield f"## Threshold\n\n{markdown(sentence[0].upper() + sentence[1:])}.\n"


def _most_wrong(task: TaskConfig, analysis: Analysis, most: int) -> Iterator[str]:
    wrong = [row for row in analysis.rows if row.prediction != row.gold]
    shown = wrong[:most]
    yield "## The most wrong rows\n"
    yield f"{len(shown):,} of the {len(wrong):,} that are wrong; all rows are in [{ROWS}]({ROWS}).\n"
    if shown:
        texts = task.columns.sentences
        of_classes = [] if analysis.calibration is None else ["p(gold)", "p(prediction)"]
        yield from _table(
            ["line", "id", *texts, "gold", "prediction", *of_classes, "how wrong"],
            [[row.line, row.id, *row.sentences, *_labels(row, analysis), shown_score(row.how_wrong)] for row in shown],
            texts=(*_TEXTS, *texts),
        )


def _labels(row: WrongRow, analysis: Analysis) -> list[str]:
    labels = ["no number" if label is None else _shown_label(label) for label in (row.gold, row.prediction)]
    if analysis.calibration is None:
        return labels
    by_class = row.probabilities or {}
    return [*labels, *(f"{by_class[label]:.4f}" if label in by_class else "" for label in labels)]


def _shown_label(label: str | int | float) -> str:
    return f"{label:.4g}" if isinstance(label, float) else str(label)


def _confusion(names: list[str], analysis: Analysis) -> Iterator[str]:
    counts = np.array(analysis.scores["confusion"])
    yield f"## Confusion\n\n![Predictions of each class]({CONFUSION})\n"
    if len(names) <= MOST_CLASSES:
        rows = [[name, *line.tolist(), line.sum()] for name, line in zip(names, counts, strict=True)]
        yield from _table(["gold", *(f"predicted {name}" for name in names), "rows"], rows)
    else:
        np.fill_diagonal(counts, 0)
        largest = [divmod(cell, len(names)) for cell in np.argsort(-counts, axis=None, kind="stable")[:MOST_CLASSES]]
        yield from _table(
            ["gold", "prediction", "rows"],
            [[names[gold], names[pred], counts[gold, pred]] for gold, pred in largest if counts[gold, pred]],
        )


def _slices(analysis: Analysis) -> Iterator[str]:
    side = "above" if analysis.pearson is not None else "below"
    yield f"## Slices\n\nA slice is called worse if its 95 % interval lies wholly {side} the {analysis.measure} of all"
    yield "rows; by chance at most one in forty is, far fewer of those that hold many rows.\n"
    yield from _table(_heads(analysis), map(_cells, analysis.slices))


def _calibration(calibration: Calibration) -> Iterator[str]:
    yield f"## Calibration\n\n{_of_calibration(calibration)}.\n\n![Accuracy against confidence]({RELIABILITY})\n"
    rows = []
    for each in calibration.bins:
        accuracy = Measured(each.accuracy, *accuracy_interval(round(each.accuracy * each.rows), each.rows))
        between = f"{each.above:.3f} to {each.up_to:.3f}"
        rows.append([between, f"{each.rows:,}", f"{each.confidence:.4f}", f"{each.accuracy:.4f}", _interval(accuracy)])
    yield from _table(["confidence", "rows", "on average", "accuracy", "95 %"], rows)


# -------------------------------------------------------------------------------------------------------- the pictures


def _plain(text: object, longest: int = 18) -> str:
    line = str(text)
    return (line if len(line) <= longest else line[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}").replace("$", r"\$")


def _title(ax: "Axes", about: About, what: str) -> None:
    ax.set_title(f"{about.task} {about.split}: {what}", color=INK, fontsize=10, loc="left")


def draw_confusion(path: Path, names: list[str], about: About, analysis: Analysis) -> None:
    """Which class is taken for which: rows, and their share of the gold class."""
    counts = np.array(analysis.scores["confusion"])
    of_gold = counts / counts.sum(axis=1, keepdims=True).clip(1)
    side = min(2.0 + 0.62 * len(names), 12.0)
    figure, (ax,) = new_chart(side + 1.2, side)
    image = ax.imshow(of_gold, cmap="Blues", vmin=0, vmax=1)
    ax.grid(False)
    every = math.ceil(len(names) / 40)
    ticks = range(0, len(names), every)
    shown = [_plain(names[tick]) for tick in ticks]
    turned = max(map(len, shown)) > 6
    ax.set_xticks(
        ticks, shown, rotation=45 if turned else 0, ha="right" if turned else "center", rotation_mode="anchor"
    )
    ax.set_yticks(ticks, shown)
    ax.set_xlabel("prediction", color=INK)
    ax.set_ylabel("gold", color=INK)
    if len(names) <= MOST_NUMBERS:
        for (gold, predicted), count in np.ndenumerate(counts):
            share = of_gold[gold, predicted]
            colour = "white" if share > 0.6 else INK
            ax.text(predicted, gold, f"{count:,}\n{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
    bar = figure.colorbar(image, ax=ax, shrink=0.7)
    bar.set_label("share of the gold class", color=INK, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    _title(ax, about, f"{analysis.measure} {shown_score(analysis.score.value)}")
    save_chart(figure, path)


def draw_reliability(path: Path, about: About, calibration: Calibration) -> None:
    """Accuracy against confidence, over the number of rows in each bin."""
    figure, (above, below) = new_chart(5.0, 5.6, 2, 1, sharex=True, height_ratios=[3, 1])
    bins = calibration.bins
    confidence, accuracy = (np.array([getattr(b, name) for b in bins]) for name in ("confidence", "accuracy"))
    lows, highs = np.array([accuracy_interval(round(b.accuracy * b.rows), b.rows) for b in bins]).T
    above.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--", label="as sure as right")
    # An interval need not hold a share of 0 or 1 but for rounding.
    spread = np.stack([accuracy - lows, highs - accuracy]).clip(min=0)
    above.errorbar(confidence, accuracy, spread, fmt="o-", color=COLOURS[0], ecolor=COLOURS[5], label="bins, 95 %")
    above.set(xlim=(0, 1), ylim=(-0.03, 1.03))
    above.set_ylabel("accuracy", color=INK)
    above.legend(frameon=False, fontsize=8, loc="upper left")
    below.bar([b.above for b in bins], [b.rows for b in bins], [b.up_to - b.above for b in bins], align="edge",
              color=COLOURS[0], edgecolor="white")  # fmt: skip
    below.set_ylabel("rows", color=INK)
    below.set_xlabel("probability of the predicted class", color=INK)
    _title(above, about, f"ECE {calibration.ece:.4f}")
    save_chart(figure, path)


def draw_predictions(path: Path, label: Regression, about: About, analysis: Analysis) -> None:
    """Every row's prediction against its label, and what they are on average."""
    given = [row for row in analysis.rows if row.prediction is not None]
    gold, predicted = (np.array([getattr(row, name) for row in given], dtype=float) for name in ("gold", "prediction"))
    figure, (ax,) = new_chart(5.4, 5.0)
    ax.plot([label.min, label.max], [label.min, label.max], color=INK, linewidth=0.8, linestyle="--", label="no error")
    ax.scatter(gold, predicted, s=9, color=COLOURS[5], alpha=0.5, linewidths=0, label="rows")
    middles, means, spreads = _by_gold(label, gold, predicted)
    ax.errorbar(
        middles, means, spreads, fmt="o-", color=COLOURS[0], label="mean and spread (s.d.) of tenths of the range"
    )
    ax.set_xlabel("gold", color=INK)
    ax.set_ylabel("prediction", color=INK)
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    pearson = analysis.pearson.value if analysis.pearson else None
    _title(ax, about, f"{analysis.measure} {shown_score(analysis.score.value)}, pearson {shown_score(pearson)}")
    save_chart(figure, path)


def _by_gold(
    label: Regression, gold: NDArray[np.float64], predicted: NDArray[np.float64]
) -> tuple[list[float], list[float], list[float]]:
    """Of each tenth of the range that has rows: the mean label, the mean prediction and its standard deviation."""
    tenth = ((gold - label.min) / (label.max - label.min) * 10).astype(int).clip(max=9)
    parts = [tenth == i for i in np.unique(tenth)]
    return (
        [float(gold[part].mean()) for part in parts],
        [float(predicted[part].mean()) for part in parts],
        [float(predicted[part].std()) for part in parts],
    )
