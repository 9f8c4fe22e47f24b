"""The look of the pictures in one place: style, head, panels, numbers and files.

A figure is nine inches wide or less, with a title and one explaining line at its top left. The two
accent colours are of Okabe and Ito (2008): colour-blind readers tell them apart.
"""

import os
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from pyro_vae.runs.directory import atomically

__all__ = [
    "BLUE",
    "DPI",
    "GREY",
    "INK",
    "ORANGE",
    "array",
    "count",
    "new_figure",
    "number",
    "panel",
    "save",
    "styled",
]

BLUE, ORANGE = "#0072b2", "#d55e00"
INK, GREY = "#222222", "#666666"
DPI = 150  # nine inches fill a column of 900 CSS pixels one and a half times

styled = style.context(
    {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#b5b5b5",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
    },
    after_reset=True,
)


def new_figure(title: str, subtitle: str, height: float, width: float = 9.0) -> Figure:
    """Return a figure with its head.

    Args:
        title: What is shown.
        subtitle: How to read it; wrapped to the width.
        height: Of what lies below the head, in inches.
        width: In inches.
    """
    lines = wrap(subtitle, int(13.5 * width))
    head = 0.5 + 0.19 * len(lines)
    whole = height + head
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, height / whole), w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(width, whole), layout=layout)
    left = 0.08 / width
    figure.text(left, 1 - 0.1 / whole, title, fontsize=13, fontweight="bold", va="top")
    body = "\n".join(lines)
    figure.text(left, 1 - 0.38 / whole, body, color=GREY, fontsize=10, va="top", linespacing=1.25)
    return figure


def panel(figure: Figure, place: Any, sharey: Axes | None = None, **labels: str) -> Axes:
    """Add axes with a light grid at a place of a grid; `labels` are those of `Axes.set`."""
    axes = figure.add_subplot(place, sharey=sharey)
    axes.grid(color="#ebebeb")
    axes.tick_params(color="#b5b5b5", labelcolor=GREY, labelsize=9)
    axes.set(**labels)  # type: ignore[arg-type]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    return axes


def array(name: str, value: ArrayLike, ndim: int) -> NDArray[np.floating]:
    """Return `value` as floats, with an error that names it where it's empty or misshapen."""
    values = np.asarray(value, dtype=float)
    if values.ndim != ndim or not values.size:
        raise ValueError(
            f"{name}: expected an array of {ndim} dimensions that isn't empty, got {values.shape}"
        )
    return values


def number(value: float, digits: int) -> str:
    """Return a number as text, with a true minus sign and no minus before a zero."""
    return f"{value:z,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def count(size: int) -> str:
    """Return the number of data in words, e.g. "1 datum" or "1,000 data"."""
    return "1 datum" if size == 1 else f"{size:,} data"


@styled
def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as a PNG, atomically; equal figures give equal bytes.

    Args:
        figure: The figure.
        path: The file; its folder exists.

    Returns:
        The path.

    Raises:
        OSError: It can't be written; an older file is untouched.
    """
    path = Path(path)
    with atomically(path) as file:
        # Matplotlib would write its version into the file.
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return path
