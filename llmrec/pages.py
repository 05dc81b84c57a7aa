"""What the pages this package makes have in common: one look, figures inside the page, no address outside."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jinja2
import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from llmrec.assignments import format_value
from llmrec.console import redact
from llmrec.encoders.pictures import BROKEN, to_rgb

COLOURS = ("#3565c4", "#d1701f", "#888888", "#2f9661", "#8e4bb8")
LINE_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 5)))
THUMB_PIXELS = 72
"""Longer side of a small picture."""

STYLE = {
    # Text as text and fixed ids: small files, readable in light and dark, equal bytes for equal input.
    "svg.fonttype": "none",
    "svg.hashsalt": "llmrec",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": "#7a7a7a",
    "axes.labelcolor": "#7a7a7a",
    "axes.edgecolor": "#9a9a9a",
    "xtick.color": "#7a7a7a",
    "ytick.color": "#7a7a7a",
    "axes.prop_cycle": cycler(color=COLOURS),
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Figures made inside have the look of our pages."""
    with matplotlib.rc_context(cast(Any, STYLE)):
        yield


def plot(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure of so many inches, and its axes.

    Not by pyplot, which would need a display or change that of a notebook, and keep the figure.
    """
    made = Figure(figsize=(width, height))
    return made, made.subplots()


def environment(folder: Path) -> jinja2.Environment:
    """Templates of a folder, beside those that all pages share."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {
        "figure": figure,
        "setting": lambda value: redact(format_value(value)),  # a mirror of data may have a password
        "percent": functools.partial(percent, digits=1),
        "share": functools.partial(percent, digits=0),
        "heading": whole_brackets,
    }
    return made


def legend_above(axes: Any) -> None:
    """The legend above the plot, where it hides nothing, in as few lines as the plot is wide enough for."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0}
    axes.figure.tight_layout()
    for columns in range(5, 0, -1):
        made = axes.legend(frameon=False, fontsize=8, ncols=columns, **place)
        if made.get_window_extent().width <= axes.get_window_extent().width:
            return
    made.set_in_layout(False)


def legend_beside(axes: Any) -> None:
    """The legend at the right of the plot, one line below the other; none where nothing is labelled."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7, handlelength=3, loc="center left", bbox_to_anchor=(1, 0.5))


def name_points(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside points in data units; where these would overlap, in a column at the right, with a line
    from each to its point."""
    texts = [
        axes.annotate(name, point, xytext=(5, 2), textcoords="offset points", fontsize=8)
        for name, point in points.items()
    ]
    axes.figure.tight_layout()
    boxes = [text.get_window_extent() for text in texts]
    places = axes.transData.transform(list(points.values()))
    if not any(
        box.overlaps(other) or box.contains(*place)
        for number, box in enumerate(boxes)
        for other, place in zip(boxes[:number] + boxes[number + 1 :], np.delete(places, number, axis=0))
    ):
        return
    for text in texts:
        text.remove()
    apart = 1.1 * boxes[0].height / axes.get_window_extent().height
    order = np.argsort(-places[:, 1], kind="stable")
    heights = spread_out(axes.transAxes.inverted().transform(places)[order, 1], apart)
    names, ends = list(points), {"shrinkA": 1, "shrinkB": 2}
    for number, height in zip(order, heights):
        axes.annotate(
            names[number],
            points[names[number]],
            xytext=(1.04, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#9a9a9a", "linewidth": 0.5, "relpos": (0, 0.5), **ends},
        )


def spread_out(heights: np.ndarray, apart: float) -> np.ndarray:
    """Heights from the highest to the lowest, moved so that neighbours are at least so far apart; between 0
    and 1 as long as there is room."""
    steps = apart * np.arange(len(heights))
    down = np.minimum.accumulate(np.minimum(heights, 1) + steps) - steps
    return np.maximum.accumulate((np.maximum(down, 0) + steps)[::-1])[::-1] - steps


def epochs_along(axes: Any, **text: Any) -> None:
    """Epochs, which are whole numbers, along the horizontal axis."""
    axes.set_xlabel("epoch", **text)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def line_looks(number: int) -> list[dict[str, Any]]:
    """Colour and style of so many lines: every colour once, then with the next style."""
    pairs = itertools.cycle((style, colour) for style in LINE_STYLES for colour in COLOURS)
    return [{"color": colour, "linestyle": style} for style, colour in itertools.islice(pairs, number)]


def line_colours(number: int) -> list[Any]:
    """Colours of so many lines that have an order: ours as far as they reach, else from dark to light."""
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.92, number)))


def svg(figure_: Any) -> str:
    """A figure as an inline SVG element."""
    buffer = io.StringIO()
    figure_.tight_layout()
    figure_.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # The metadata block only names vocabularies by web address.
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def figure(value: Any) -> str:
    """A number as people read it: four digits for rates, thousands separated."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)


def whole_brackets(text: str) -> str:
    """A column's heading that breaks into lines before and after brackets and not within them."""
    return re.sub(r"\([^()]*\)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


def percent(value: float, digits: int) -> str:
    """A share in percent; what is rounded neither reads as nothing nor as all."""
    least = 10.0 ** -(digits + 2)
    if 0 < value < least / 2:
        return f"< {least:.{digits}%}"
    if 1 - least / 2 <= value < 1:
        return f"> {1 - least:.{digits}%}"
    return f"{value:.{digits}%}"


def thumbnail(file: Path | None) -> str | None:
    """A small picture as a data address; None if there is none that can be read."""
    if file is None:
        return None
    try:
        with Image.open(file) as image:
            small = to_rgb(image)
        small.thumbnail((THUMB_PIXELS, THUMB_PIXELS))
    except BROKEN:
        return None
    out = io.BytesIO()
    small.save(out, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
