"""The pictures of a run: functions from arrays to a matplotlib figure.

They know nothing of models, data sets or run directories, and never touch pyplot: no global state,
no window. Those that show data side by side are in `tiles`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from pyro_vae.runs.canvas import (
    BLUE,
    INK,
    ORANGE,
    array,
    count,
    new_figure,
    number,
    panel,
    save,
    styled,
)
from pyro_vae.runs.tiles import interpolations, manifold, reconstructions, samples, traversals

__all__ = [
    "bound",
    "differences",
    "evidence",
    "interpolations",
    "latents",
    "manifold",
    "reconstructions",
    "samples",
    "save",
    "traversals",
]

# Tol (2021), "muted", its yellow darkened and its pale grey too, to be seen on white.
_CLASSES = ["#332288", "#cc6677", "#117733", "#ddaa33", "#88ccee"]
_CLASSES += ["#882255", "#44aa99", "#999933", "#aa4499", "#777777"]


@styled
def bound(records: Sequence[Mapping[str, Any]], *, averaged: bool = False) -> Figure:
    """The ELBO against epochs and against time, and the rate where it is known.

    The axis may leave out the lowest of the first epochs, which would squash all the others.

    Args:
        records: One mapping an epoch: "epoch" (from 1), "seconds" (of training so far), "elbo",
            "valid_elbo" and "rate" (nats per datum; missing, None and NaN are left out).
        averaged: The validation bound is that of averages of the parameters, and is called so.

    Returns:
        A figure of two panels, or of three with the rate.

    Raises:
        ValueError: There is no record.

    Example:
        >>> [axes.get_xlabel() for axes in bound([{"epoch": 1, "seconds": 2.0, "elbo": -9.0}]).axes]
        ['epoch', 'training time (seconds)']
    """
    if not records:
        raise ValueError("records: expected one mapping an epoch, got none")
    epochs, seconds, training, validation, rate = (
        np.array([np.nan if (v := record.get(key)) is None else v for record in records], float)
        for key in ("epoch", "seconds", "elbo", "valid_elbo", "rate")
    )
    longest = seconds[np.isfinite(seconds)].max(initial=0.0)
    unit, length = ("hours", 3600) if longest >= 7200 else ("minutes", 60)
    if longest < 180:
        unit, length = "seconds", 1
    ranked = np.where(np.isfinite(validation), validation, -np.inf)
    best = int(np.argmax(ranked))
    has_best, has_rate = bool(np.isfinite(ranked[best])), bool(np.isfinite(rate).any())
    subtitle = "no validation bound was recorded"
    if has_best:
        value = number(validation[best], 2)
        subtitle = f"best validation bound {value} nats per datum, at epoch {epochs[best]:,.0f}"
    figure = new_figure("The evidence lower bound in training", subtitle, height=3.3)
    grid = figure.add_gridspec(1, 2 + has_rate)
    left = panel(figure, grid[0], xlabel="epoch", ylabel="ELBO (nats per datum)")
    right = panel(figure, grid[1], left, xlabel=f"training time ({unit})")
    right.tick_params(labelleft=False)
    validated = "validation" + " of the averaged parameters" * averaged
    for axes, x in ((left, epochs), (right, seconds / length)):
        _curve(axes, x, training, BLUE, "training")
        _curve(axes, x, validation, ORANGE, validated)
        if has_best:
            ring: dict[str, Any] = {"marker": "o", "markersize": 9, "markerfacecolor": "none"}
            ring |= {"linestyle": "none", "color": INK, "label": "best validation"}
            axes.plot(x[best], validation[best], **ring)
    limits = _robust_limits(training, validation)
    if limits is not None:
        left.set_ylim(*limits)
    if has_rate:
        third = panel(figure, grid[2], xlabel="epoch", ylabel="rate, the KL (nats per datum)")
        _curve(third, epochs, rate, BLUE, "rate")
    for axes in figure.axes:
        whole = axes.get_xlabel() == "epoch"
        locator = MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1)
        axes.xaxis.set_major_locator(locator)
        axes.set_xlim(left=0)
    handles, names = left.get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc="outside lower left", ncols=3)
    return figure


def _curve(axes: Axes, x: NDArray[Any], y: NDArray[Any], colour: str, label: str) -> None:
    """A line through the finite values: a bound taken every fifth epoch is still a line."""
    seen = np.isfinite(x) & np.isfinite(y)
    if seen.any():
        dot, width = ("o" if seen.sum() <= 30 else ""), (1.6 if seen.sum() <= 300 else 0.9)
        look: dict[str, Any] = {"marker": dot, "markersize": 3, "linewidth": width}
        axes.plot(x[seen], y[seen], color=colour, label=label, **look)


def _robust_limits(*curves: NDArray[Any]) -> tuple[float, float] | None:
    """Limits that hold nine tenths of each curve, and of the lowest tenth what is near."""
    finite = [curve[np.isfinite(curve)] for curve in curves if np.isfinite(curve).any()]
    if not finite:
        return None
    high = max(float(curve.max()) for curve in finite)
    tenth = min(float(np.percentile(curve, 10)) for curve in finite)
    least = min(float(curve.min()) for curve in finite)
    low = max(least, tenth - 0.5 * (high - tenth))
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


@styled
def latents(
    points: ArrayLike, labels: ArrayLike | None = None, explained: ArrayLike | None = None
) -> Figure:
    """Where the encoder puts the data: two latents, or the first two principal components.

    Args:
        points: Coordinates (N, 2).
        labels: Labels (N,), or None. Up to ten different ones get a colour each, more a scale.
        explained: The share of the variance, 0 to 1, of each principal component; None says that
            the coordinates are the two latents themselves.

    Raises:
        ValueError: The points aren't in a plane, or the labels aren't as many.

    Example:
        >>> latents(np.eye(2), explained=(0.37, 0.2)).axes[0].get_xlabel()
        'first principal component (37 % of the variance)'
    """
    values = array("points", points, 2)
    if values.shape[1] != 2:
        raise ValueError(f"points: expected (N, 2), got {values.shape}")
    names = ["z1", "z2"]
    if explained is not None:
        names = [
            f"{which} principal component ({100 * share:.0f} % of the variance)"
            for which, share in zip(
                ("first", "second"), array("explained", explained, 1), strict=True
            )
        ]
    subtitle = f"means of q(z|x) of {count(len(values))}"
    subtitle += "" if labels is None else ", coloured by label"
    figure = new_figure("The data in latent space", subtitle, height=6.0, width=7.6)
    axes = panel(figure, figure.add_gridspec(1, 1)[0], xlabel=names[0], ylabel=names[1])
    axes.set_aspect("equal", adjustable="datalim")
    # Drawn in a shuffled order: a set sorted by class would bury the first under the last.
    order = np.random.default_rng(0).permutation(len(values))
    x, y = values[order].T
    dots: dict[str, Any] = {"s": float(np.clip(2e4 / len(values), 5, 28)), "alpha": 0.75}
    dots["linewidths"] = 0
    if labels is None:
        axes.scatter(x, y, color=BLUE, **dots)
        return figure
    classes = np.asarray(labels)
    if classes.shape != (len(values),):
        raise ValueError(f"labels: expected one a point, ({len(values)},), got {classes.shape}")
    kinds, codes = np.unique(classes, return_inverse=True)
    if len(kinds) > len(_CLASSES):
        scale = classes if np.issubdtype(classes.dtype, np.number) else codes
        drawn = axes.scatter(x, y, c=scale[order], cmap="viridis", **dots)
        figure.colorbar(drawn, ax=axes, label="label", shrink=0.6)
        return figure
    axes.scatter(x, y, c=np.asarray(_CLASSES)[codes[order]], **dots)
    for kind, colour in zip(kinds, _CLASSES, strict=False):
        axes.scatter([], [], color=colour, s=28, linewidths=0, label=str(kind))
    axes.legend(title="label", loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0.1)
    return figure


@styled
def evidence(
    values: ArrayLike,
    mean: float,
    mean_standard_error: float,
    sampling_error: float,
    name: str = "log p(x)",
) -> Figure:
    """How the log-evidence spreads over the data, with its mean and the two errors of that.

    Args:
        values: Log-evidence of each datum (N,), nats.
        mean: Their mean.
        mean_standard_error: Monte Carlo standard error of the mean: the estimator's.
        sampling_error: Standard error of the mean over draws of the test set.
        name: What the values are: "log p(x)", or "score" where they're no log-probability.

    Example:
        >>> evidence([-1.0, -2.0], -1.5, 0.01, 0.5).axes[0].get_xlabel()
        'log p(x) (nats per datum)'
    """
    data = array("values", values, 1)
    finite = data[np.isfinite(data)]
    estimator, sampling = (
        f"{error:.2g}" if np.isfinite(error) else "unknown"
        for error in (mean_standard_error, sampling_error)
    )
    subtitle = (
        f"mean {number(mean, 2)} nats; its standard error is {estimator} from the estimator "
        f"and {sampling} from the sampling of the test set"
    )
    if len(finite) < len(data):
        subtitle += f"; {len(data) - len(finite):,} of them not finite, not drawn"
    figure = new_figure(f"Histogram of {name} over {count(len(data))}", subtitle, height=3.6)
    place = figure.add_gridspec(1, 1)[0]
    axes = panel(figure, place, xlabel=f"{name} (nats per datum)", ylabel="number of data")
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    if len(finite):
        bins = int(np.clip(np.sqrt(len(finite)), 5, 60))
        axes.hist(finite, bins=bins, color=BLUE, alpha=0.8, edgecolor="white", linewidth=0.5)
    if np.isfinite(mean):
        axes.axvline(mean, color=ORANGE, linewidth=2, label="mean")
        axes.legend(loc="upper left")
    return figure


@styled
def differences(rows: Sequence[Mapping[str, Any]], name: str = "log p(x)") -> Figure:
    """Several models on the same data: their bounds, and what each gains over the first.

    Args:
        rows: One mapping a model, the baseline first: "name", "elbo", "log_evidence",
            "difference" and "difference_error" (None for the baseline), nats per datum.
        name: What the values are.

    Raises:
        ValueError: There are less than two rows.

    Example:
        >>> row = {"name": "a", "elbo": -2.0, "log_evidence": -1.0, "difference": None}
        >>> other = {**row, "name": "b", "difference": 0.5, "difference_error": 0.1}
        >>> [axes.get_xlabel() for axes in differences([row, other]).axes]
        ['nats per datum', 'difference to a (nats per datum)']
    """
    if len(rows) < 2:
        raise ValueError(f"rows: expected at least two models, got {len(rows)}")
    baseline = rows[0]["name"]
    subtitle = (
        f"left: {name} and, hollow, the ELBO; right: the paired difference to {baseline}, with "
        "bars of two standard errors"
    )
    figure = new_figure("What each swap gains", subtitle, height=0.9 + 0.36 * len(rows))
    grid = figure.add_gridspec(1, 2)
    left = panel(figure, grid[0], xlabel="nats per datum")
    label = f"difference to {baseline} (nats per datum)"
    right = panel(figure, grid[1], left, xlabel=label)
    right.tick_params(labelleft=False)
    heights = np.arange(len(rows))[::-1]
    for height, row in zip(heights, rows, strict=True):
        gap = [row["elbo"], row["log_evidence"]]
        left.plot(gap, [height, height], color=BLUE, linewidth=1, alpha=0.5)
        left.plot(gap[0], height, "o", color=BLUE, markerfacecolor="white")
        left.plot(gap[1], height, "o", color=BLUE)
        if row["difference"] is not None:
            spread = 2 * row["difference_error"]
            right.errorbar(row["difference"], height, xerr=spread, fmt="o", color=ORANGE, capsize=3)
    right.axvline(0.0, color=INK, linewidth=1)
    left.set_yticks(heights, [row["name"] for row in rows], fontsize=10, color=INK)
    left.set_ylim(-0.6, len(rows) - 0.4)
    return figure
