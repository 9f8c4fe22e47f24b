"""Pictures of many data side by side, each an image or a line: what a model makes of its data.

Where a function takes `image_shape`, that is (H, W) or, in torch's order, (C, H, W) with one or
three channels; None draws the D values of a datum as a line. All cells of a figure share one scale.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from pyro_vae.runs.canvas import BLUE, GREY, array, count, new_figure, number, styled

__all__ = ["interpolations", "manifold", "reconstructions", "samples", "traversals"]

_WIDEST = 0.86  # inches, of one cell
_LINE_CELL = (36, 60)  # height and width, in the units of the canvas, of a datum drawn as a line


@styled
def reconstructions(
    inputs: ArrayLike, means: ArrayLike, draws: ArrayLike, image_shape: Sequence[int] | None
) -> Figure:
    """Data above their reconstructions: the mean of p(x|z) and a draw from it, z from q(z|x).

    Args:
        inputs: Data (N, D), N about 10.
        means: Means of p(x|z), (N, D).
        draws: Draws from p(x|z), (N, D).
        image_shape: Shape of an image, or None for lines.

    Raises:
        ValueError: The three differ in shape.

    Example:
        >>> x = np.eye(4)
        >>> axes = reconstructions(x, x, x, (2, 2)).axes[0]
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['input', 'mean', 'draw']
    """
    parts = {"inputs": inputs, "means": means, "draws": draws}
    rows = [array(name, value, 2) for name, value in parts.items()]
    if len({row.shape for row in rows}) > 1:
        shapes = ", ".join(str(row.shape) for row in rows)
        raise ValueError(f"inputs, means, draws: expected three equal shapes (N, D), got {shapes}")
    return _cells(
        np.stack(rows),
        image_shape,
        f"Reconstructions of {count(len(rows[0]))}",
        "a datum x; the mean of p(x|z), for a z of q(z|x); and a draw from p(x|z)",
        row_labels=["input", "mean", "draw"],
        # A draw may stray far (a normal's noise): the scale is that of the data and the means.
        scale=np.stack(rows[:2]),
    )


@styled
def samples(means: ArrayLike, image_shape: Sequence[int] | None) -> Figure:
    """Data generated from the prior.

    Args:
        means: Means of p(x|z) for draws z of the prior, (N, D).
        image_shape: Shape of an image, or None for lines.

    Example:
        >>> len(samples(np.eye(4), (2, 2)).axes)
        1
    """
    values = array("means", means, 2)
    number_of, size = values.shape
    # About twice as wide as high, and without a hole in the last row where the number allows it.
    wanted = np.sqrt(2 * number_of)
    whole = [c for c in range(number_of, 0, -1) if number_of % c == 0 and 0.5 < c / wanted < 2]
    columns = min(whole, key=lambda c: abs(np.log(c / wanted)), default=round(wanted))
    rows = -(-number_of // columns)
    padded = np.full((rows * columns, size), np.nan)
    padded[:number_of] = values
    return _cells(
        padded.reshape(rows, columns, size),
        image_shape,
        "Samples from the prior",
        f"means of p(x|z), z drawn from p(z), {number_of:,} in all",
    )


@styled
def interpolations(rows: ArrayLike, image_shape: Sequence[int] | None) -> Figure:
    """Ways through the latent space from one datum to another.

    Args:
        rows: Means of p(x|z) at S steps of R ways, (R, S, D).
        image_shape: Shape of an image, or None for lines.

    Example:
        >>> figure = interpolations(np.zeros((2, 3, 4)), (2, 2))
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['0 %', '50 %', '100 %']
    """
    values = array("rows", rows, 3)
    steps = values.shape[1]
    return _cells(
        values,
        image_shape,
        "Interpolations between data",
        "means of p(x|z), z going from the latent of one datum (left) to that of another (right)",
        column_labels=[f"{100 * step / max(steps - 1, 1):.0f} %" for step in range(steps)],
        xlabel="share of the way",
    )


@styled
def traversals(
    rows: ArrayLike,
    image_shape: Sequence[int] | None,
    names: Sequence[str],
    values: ArrayLike | None = None,
) -> Figure:
    """One latent dimension varied along each row, the others held.

    Args:
        rows: Means of p(x|z) at S steps in R dimensions, (R, S, D).
        image_shape: Shape of an image, or None for lines.
        names: The R names of the dimensions, e.g. "z7".
        values: The S values that the varied latent takes, or None to leave them out.

    Raises:
        ValueError: The names or values aren't as many as the rows or steps.

    Example:
        >>> figure = traversals(np.zeros((1, 3, 4)), (2, 2), ["z7"], [0, 1, 2])
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['0.0', '1.0', '2.0']
    """
    data = array("rows", rows, 3)
    if len(names) != len(data):
        raise ValueError(f"names: expected one for each of {len(data)} rows, got {len(names)}")
    labels = None
    if values is not None:
        labels = [number(value, 1) for value in array("values", values, 1)]
        if len(labels) != data.shape[1]:
            raise ValueError(f"values: expected one a step, {data.shape[1]}, got {len(labels)}")
    return _cells(
        data,
        image_shape,
        "Latent traversals",
        "means of p(x|z), one latent dimension varied along each row and the others held",
        row_labels=list(names),
        column_labels=labels,
        xlabel=None if labels is None else "value of the varied latent",
    )


@styled
def manifold(
    grid: ArrayLike, image_shape: Sequence[int] | None, ticks: ArrayLike | None = None
) -> Figure:
    """What the decoder makes of the plane of two latents, through the quantiles of the prior.

    Args:
        grid: Means of p(x|z), (G, G, D): `grid[i, j]` is at z1 = `ticks[j]`, z2 = `ticks[i]`;
            z2 grows upwards in the picture.
        image_shape: Shape of an image, or None for lines.
        ticks: The G values of either latent, ascending, or None to leave them out.

    Raises:
        ValueError: The grid isn't square, or the ticks aren't as many as its rows.

    Example:
        >>> manifold(np.zeros((2, 2, 4)), (2, 2), [-1, 1]).axes[0].get_xlabel()
        'z1'
    """
    values = array("grid", grid, 3)
    size = len(values)
    if values.shape[1] != size:
        raise ValueError(f"grid: expected (G, G, D), got {values.shape}")
    labels = None
    if ticks is not None:
        positions = array("ticks", ticks, 1)
        if len(positions) != size:
            raise ValueError(f"ticks: expected one a row, {size}, got {len(positions)}")
        # All of a few, else as many as keep the two halves of the axis alike.
        shown = np.linspace(0, size - 1, size if size <= 10 else 6 + size % 2).round()
        labels = [number(v, 1) if i in shown else "" for i, v in enumerate(positions)]
    return _cells(
        values[::-1],
        image_shape,
        "The latent plane",
        "means of p(x|z), z at equal steps of the prior's probability",
        row_labels=None if labels is None else labels[::-1],
        column_labels=labels,
        xlabel="z1",
        ylabel="z2",
        gap=image_shape is None,
        width=6.6,
    )


def _cells(
    values: NDArray[np.floating],
    image_shape: Sequence[int] | None,
    title: str,
    subtitle: str,
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    scale: NDArray[np.floating] | None = None,
    gap: bool = True,
    width: float = 9.0,
) -> Figure:
    """Return a figure of R x S data, each an image or a line, on one scale.

    Args:
        values: The data, (R, S, D); a datum of NaN leaves its cell empty.
        image_shape: (H, W) or (C, H, W), or None for lines.
        title: See `new_figure`.
        subtitle: See `new_figure`.
        row_labels: R labels.
        column_labels: S labels.
        xlabel: What the columns are.
        ylabel: What the rows are.
        scale: Values whose range is that from black to white, or from the foot of a cell to its
            top; `values` themselves by default.
        gap: Whether white parts the cells.
        width: Of the figure, in inches.

    Raises:
        ValueError: The image shape isn't that of D values.
    """
    rows, columns, _ = values.shape
    height, wide = _LINE_CELL if image_shape is None else tuple(image_shape)[-2:]
    space = max(1, wide // 14) if gap else 0
    step_y, step_x = height + space, wide + space
    labels_width = 0.25 + 0.075 * max((len(label) for label in row_labels or [""]), default=0)
    cell_width = min((width - labels_width - (0.3 if ylabel else 0)) / columns, _WIDEST)
    below = 0.16 + (0.25 if column_labels else 0) + (0.25 if xlabel else 0)
    figure = new_figure(title, subtitle, rows * cell_width * step_y / step_x + below, width)
    axes = figure.add_subplot()
    axes.set_anchor("NW")
    low, high = _range(values if scale is None else scale)
    unit = np.clip((values - low) / (high - low), 0, 1)
    if image_shape is None:
        _draw_lines(axes, unit, space)
    else:
        axes.imshow(_tile(unit, image_shape, space), vmin=0, vmax=1)
    axes.set_aspect("equal")
    axes.set(
        xlim=(-0.5, columns * step_x - space - 0.5),
        ylim=(rows * step_y - space - 0.5, -0.5),
        xlabel=xlabel or "",
        ylabel=ylabel or "",
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=GREY, labelsize=9)
    for labels, count_, step, extent, set_ticks in (
        (column_labels, columns, step_x, wide, axes.set_xticks),
        (row_labels, rows, step_y, height, axes.set_yticks),
    ):
        centres = np.arange(count_) * step + (extent - 1) / 2
        set_ticks(centres if labels else [], labels=labels)
    return figure


def _tile(unit: NDArray[np.floating], image_shape: Sequence[int], space: int) -> NDArray[Any]:
    """Images (R, S, D) of values 0 to 1 as one RGB canvas, white between them."""
    rows, columns, size = unit.shape
    shape = tuple(image_shape)
    channels, height, wide = (1, *shape) if len(shape) == 2 else shape
    if channels not in (1, 3) or channels * height * wide != size:
        raise ValueError(
            f"image_shape: expected (H, W) or (C, H, W), C of 1 or 3, with {size} values in all, "
            f"got {shape}; None draws lines"
        )
    canvas = np.ones((rows * (height + space) - space, columns * (wide + space) - space, 3))
    for r, c in np.ndindex(rows, columns):
        y, x = r * (height + space), c * (wide + space)
        image = np.moveaxis(unit[r, c].reshape(channels, height, wide), 0, -1)
        canvas[y : y + height, x : x + wide] = np.nan_to_num(image, nan=1.0)
    return canvas


def _draw_lines(axes: Axes, unit: NDArray[np.floating], space: int) -> None:
    """Data (R, S, D) of values 0 to 1, each as a line in a cell of its own."""
    rows, columns, size = unit.shape
    height, wide = _LINE_CELL
    x = np.linspace(3, wide - 4, size) if size > 1 else np.array([(wide - 1) / 2])
    # One line for all cells, broken by NaN between them.
    left = np.arange(columns)[:, None] * (wide + space) + np.append(x, np.nan)
    across = np.broadcast_to(left, (rows, *left.shape))
    broken = np.concatenate([unit, np.full((rows, columns, 1), np.nan)], -1)
    top = np.arange(rows)[:, None, None] * (height + space)
    up = top + 3 + (1 - broken) * (height - 7)
    dot = "o" if size <= 8 else ""
    axes.set_facecolor("white")
    for r, c in np.ndindex(rows, columns):
        corner = (c * (wide + space) - 0.5, r * (height + space) - 0.5)
        if np.isfinite(unit[r, c]).any():
            axes.add_patch(Rectangle(corner, wide, height, facecolor="#f3f3f3"))
    axes.plot(across.ravel(), up.ravel(), color=BLUE, linewidth=1.2, marker=dot, markersize=2.5)


def _range(values: NDArray[np.floating]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    # A constant is drawn as mid-grey: black or white would be read as a value.
    return (low, high) if high > low else (low - 0.5, high + 0.5)
