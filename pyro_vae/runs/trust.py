"""The picture of an evaluation: what weighting can't be trusted for, and what annealing adds."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from pyro_vae.evidence.evaluation import Evaluation
from pyro_vae.runs.canvas import BLUE, INK, ORANGE, new_figure, panel, styled

__all__ = ["trust"]


@styled
def trust(found: Evaluation) -> Figure:
    """The diagnostics of weighting, datum by datum, and the gain of annealing where it was made.

    Args:
        found: An evaluation.

    Returns:
        A figure: the Pareto k of each datum against its effective sample size; beside it, where
        data were annealed, what that gains against the effective sample size, with bars of two
        standard errors.

    Example:
        >>> columns = torch.tensor([[-1.0, -3.0], [0.3, 0.4], [9.0, 8.0], [-2.0, -4.0]]).double()
        >>> none = torch.tensor([], dtype=torch.long)
        >>> estimate = pv.Estimate(*columns, num_particles=10)
        >>> found = pv.Evaluation.of(estimate, none, None, budget_for_all=0.0)
        >>> [axes.get_ylabel() for axes in trust(found).axes]
        ['Pareto k']
    """
    weighted, annealed = found.weighted, found.annealed
    size = len(found.value)
    subtitle = f"{found.num_untrusted:,} of {size:,} data can't be trusted to weighting"
    if annealed is not None:
        subtitle += (
            f"; {len(found.rows):,} of them were annealed: {found.missing:+.2f} nats on average"
        )
    figure = new_figure("What of the log-evidence can be trusted", subtitle, height=3.6)
    grid = figure.add_gridspec(1, 1 if annealed is None else 2)
    ess = f"effective sample size, of {weighted.num_particles:,}"
    left = panel(figure, grid[0], xlabel=ess, ylabel="Pareto k")
    _sizes(left, weighted.num_particles)
    trusted = weighted.trusted.numpy()
    k = np.full(size, np.nan) if weighted.pareto_k is None else weighted.pareto_k.numpy()
    if np.isfinite(k).any():
        for rows, colour, name in ((trusted, BLUE, "trusted"), (~trusted, ORANGE, "not trusted")):
            if rows.any():
                left.plot(
                    weighted.ess.numpy()[rows],
                    k[rows],
                    "o",
                    color=colour,
                    markersize=3,
                    alpha=0.6,
                    label=name,
                )
        highest = f"the highest to trust, {weighted.threshold:.2f}"
        left.axhline(weighted.threshold, color=INK, linewidth=1, linestyle="--", label=highest)
        left.legend(loc="lower left")  # a low k at a low effective sample size is rare
    else:
        said = "too few particles for a Pareto k"
        left.set_yticks([])
        left.text(0.5, 0.5, said, transform=left.transAxes, ha="center", color=INK)
    if annealed is not None:
        right = panel(figure, grid[1], xlabel=ess, ylabel="gain of annealing (nats)")
        _sizes(right, weighted.num_particles)
        error = np.hypot(
            annealed.standard_error.numpy(), weighted.standard_error.numpy()[found.rows.numpy()]
        )
        right.errorbar(
            weighted.ess.numpy()[found.rows.numpy()],
            found.gain.numpy(),
            yerr=2 * np.nan_to_num(error),
            fmt="o",
            color=BLUE,
            markersize=3,
            linewidth=0.8,
            alpha=0.7,
        )
        right.axhline(0.0, color=INK, linewidth=1)
        right.yaxis.set_major_locator(MaxNLocator(nbins=6))
    return figure


def _sizes(axes: Axes, largest: int) -> None:
    """Give an axis of effective sample sizes all that there can be, from 1 to K."""
    axes.set_xscale("log")
    axes.set_xlim(0.9, 1.1 * max(largest, 2))
    powers = [10**i for i in range(len(str(largest)))]
    ticks = powers if len(powers) > 1 else range(1, largest + 1)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
