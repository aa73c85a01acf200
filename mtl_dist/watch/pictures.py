"""Pictures of what a run tells: which tasks' gradients conflict, and in which layers."""

import math
from collections.abc import Callable, Mapping
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Of heatmaps, in pixels but for the number of cells. Shape suffixes: R = rows, C = columns.
LARGEST = 1600  # an image
LINE, MARGIN = 15, 10
BAR = 200  # the scale's length
MOST_PAIRS = 80  # columns
WRITTEN = 512  # up to so many cells show their numbers
COLOURS = [(178, 24, 43), (239, 138, 98), (255, 255, 255), (103, 169, 207), (33, 102, 172)]  # from -1 to 1
BLACK, NOTHING, LINES, WHITE = (0, 0, 0), (200, 200, 200), (230, 230, 230), (255, 255, 255)


def surgery_images(tasks: list[str], surgery: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Which tasks conflict, and in which layers, where these were told apart; nothing where no step had two tasks."""
    if not surgery["cosine"]:
        return {}
    tasks = [task for task in tasks if task in surgery["norm"]]
    pairs = [".".join(sorted(pair)) for pair in combinations(tasks, 2)]

    def matrix(cosine: Mapping[str, float]) -> NDArray[np.float64]:
        cosine_KK = np.full((len(tasks), len(tasks)), np.nan)
        above = np.triu_indices(len(tasks), 1)
        cosine_KK[above] = cosine_KK.T[above] = [cosine.get(pair, np.nan) for pair in pairs]
        return cosine_KK

    what = "cosine of the tasks' gradients"
    images = {"cosine": heatmap(what, tasks, tasks, matrix(surgery["cosine"]), _cosine)}
    if layers := surgery.get("layers"):
        pairs_found = [pair for pair in pairs if pair in surgery["cosine"]]
        if len(pairs_found) <= MOST_PAIRS:
            cosine_RC = np.array([[layer["cosine"][pair] for pair in pairs_found] for layer in layers.values()])
            images["layers"] = heatmap(f"{what}, by layer", list(layers), pairs_found, cosine_RC, _cosine)
        else:
            cosine_RCK = np.stack([matrix(layer["cosine"]) for layer in layers.values()])
            known_RC = np.isfinite(cosine_RCK).sum(-1)
            share_RC = np.where(known_RC, (cosine_RCK < 0).sum(-1) / known_RC.clip(1), np.nan)
            title = "share of a task's pairs that conflict, by layer"
            images["layers"] = heatmap(title, list(layers), tasks, 0.5 - share_RC, _share_of_conflicts)
    return images


def _cosine(value: float, scale: float) -> str:
    return f"{value:.{min(max(1 - math.floor(math.log10(scale)), 2), 9)}f}"


def _share_of_conflicts(agreement: float, _: float) -> str:
    return f"{0.5 - agreement:.0%}"


def heatmap(
    title: str,
    rows: list[str],
    columns: list[str],
    agreement_RC: NDArray[np.float64],
    shown: Callable[[float, float], str],
) -> Image.Image:
    """A table of colours: red below zero, blue above, as strong as a number is against the largest; grey for NaN.

    `shown` writes a number, given the largest. Numbers stand in the cells where these are few.
    """
    font = _font()
    scale = float(np.nanmax(np.abs(agreement_RC))) or 1.0
    low, high = f"conflict  {shown(-scale, scale)}", f"{shown(scale, scale)}  agreement"
    row_names, column_names = ([_shortened(name) for name in names] for names in (rows, columns))

    def widest(*texts: str) -> int:
        return math.ceil(max(map(font.getlength, texts)))

    left = widest(*row_names) + 2 * MARGIN
    number_width = max(4 * LINE, widest(shown(-scale, scale)) + MARGIN)
    written = agreement_RC.size <= WRITTEN and left + len(columns) * number_width <= LARGEST
    upright = not written or widest(*column_names) > number_width - MARGIN  # the columns' names
    above = widest(*column_names) + MARGIN if upright else 2 * LINE
    top = 5 * LINE + above
    width, height = (number_width, 2 * LINE) if written else (LINE, LINE)
    width = max(1, min(width, (LARGEST - left - MARGIN) // len(columns)))
    height = max(1, min(height, (LARGEST - top - MARGIN) // len(rows)))
    bar = 2 * MARGIN + widest(low)
    right = max(left + width * len(columns), bar + BAR + MARGIN + widest(high), MARGIN + widest(title))

    image = Image.new("RGB", (right + MARGIN, top + height * len(rows) + MARGIN), WHITE)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, LINE), title, BLACK, font, "lm")
    draw.text((MARGIN, 3 * LINE), low, BLACK, font, "lm")
    image.paste(Image.fromarray(_colours(np.linspace(-1, 1, BAR))[None].repeat(LINE, 0)), (bar, 3 * LINE - LINE // 2))
    draw.text((bar + BAR + MARGIN, 3 * LINE), high, BLACK, font, "lm")

    cells = _colours(agreement_RC / scale).repeat(height, 0).repeat(width, 1)
    if min(width, height) >= LINE // 2:
        cells[height - 1 :: height] = cells[:, width - 1 :: width] = LINES
    image.paste(Image.fromarray(cells), (left, top))
    middle_R, middle_C = (np.arange(len(rows)) + 0.5) * height, (np.arange(len(columns)) + 0.5) * width
    for r in range(0, len(rows), math.ceil(LINE / height)):  # as many names as have room
        draw.text((left - MARGIN // 2, top + middle_R[r]), row_names[r], BLACK, font, "rm")
    if upright:
        names = Image.new("RGB", (above, width * len(columns)), WHITE)
        draw_names = ImageDraw.Draw(names)
        for c in range(0, len(columns), math.ceil(LINE / width)):
            draw_names.text((MARGIN // 2, middle_C[c]), column_names[c], BLACK, font, "lm")
        image.paste(names.rotate(90, expand=True), (left, top - above))
    else:
        for x, name in zip(middle_C, column_names, strict=True):
            draw.text((left + x, top - LINE), name, BLACK, font, "mm")
    if written:
        for r, c in np.argwhere(np.isfinite(agreement_RC)):
            value = agreement_RC[r, c]
            ink = WHITE if abs(value) > 0.6 * scale else BLACK
            draw.text((left + middle_C[c], top + middle_R[r]), shown(value, scale), ink, font, "mm")
    return image.quantize(palette=_palette(), dither=Image.Dither.NONE)


@cache
def _palette() -> Image.Image:
    """The colours of a heatmap, with those between them and black that letters have at their edges."""
    shades = _colours(np.linspace(-1, 1, 75))
    greys = np.arange(0, 250, 9)[:, None].repeat(3, 1)
    colours = np.concatenate([shades, shades // 3 * 2, shades // 3, greys, [NOTHING, LINES]])
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours.astype(np.uint8).tobytes())
    return palette


@cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(12)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _shortened(name: str) -> str:
    parts = name.split(".")
    return ".".join(part if len(part) <= 30 else f"{part[:27]}..." for part in parts)


def _colours(shade: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The colours of numbers from -1 to 1."""
    stops = np.linspace(-1, 1, len(COLOURS))
    channels = [np.interp(shade, stops, channel) for channel in zip(*COLOURS, strict=True)]
    colours = np.stack(channels, -1)
    colours[np.isnan(shade)] = NOTHING
    return colours.round().astype(np.uint8)
