r"""The tail of importance weights: how heavy it is, and what it looks like smoothed.

A few large weights decide an average of many. Above a high cutoff u the weights of almost any guide
follow a generalized Pareto distribution,

.. math:: P(w - u > y \mid w > u) \approx (1 + k\, y / \sigma)^{-1/k},

whose shape k counts their moments: the variance is finite below 1/2, the mean below 1; weights that
are bounded have k < 0. The M = min(K/5, 3 sqrt K) largest of K weights (rounded up) are fitted, u
being the next one, and k is drawn towards 1/2 by the weight of ten observations. Above
min(1 - 1/log10 K, 0.7) an average of K weights is not to be trusted. Pareto smoothing puts the
expected order statistics of the fit in the place of the M largest weights, none above the largest.

References: Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling" (2024);
Zhang and Stephens, "A new and efficient estimation method for the generalized Pareto distribution"
(2009).
"""

import math

import torch
from torch import Tensor

__all__ = ["Tail", "fit_tail", "pareto_k", "pooled", "smoothed", "tail_size", "threshold"]

FEWEST = 5  # exceedances for a fit
# Weights below e^-700 of the largest are nothing beside it in float64, and so are in no tail.
RANGE = 700.0


def pareto_k(log_w: Tensor) -> Tensor:
    """The Pareto shape k of the weights of each datum.

    It takes K log-weights per datum to memory; ``log_evidence`` has the same number from a pass.

    Args:
        log_w: Log-weights ``(K, N)`` in nats, as of ``log_weights``; -infinity is a weight of zero.

    Returns:
        The shape k ``(N,)``, float64, without unit. It is 0 where the tail is constant up to
        rounding, as with the exact posterior for a guide: there is nothing to extrapolate. It is
        NaN where less than five weights stand out of the others: with K < 21, whose fifth is less;
        where all but a few are equal; where all but a few are zero beside the largest.

    Raises:
        ValueError: ``log_w`` has another shape, or holds NaN or +infinity.

    Reference: Vehtari et al., "Pareto smoothed importance sampling" (2024).

    Example:
        >>> uniform = torch.arange(0.5, 10_000, dtype=torch.float64) / 10_000
        >>> log_w = torch.stack([-k * uniform.log() for k in (0.0, 0.3, 0.9)], dim=1)
        >>> [f"{k:.1f}" for k in pv.pareto_k(log_w)]
        ['0.0', '0.3', '0.9']
    """
    return _fit_all("pareto_k", log_w)[0]


def smoothed(log_w: Tensor) -> Tensor:
    """Log-weights with a Pareto-smoothed tail.

    The average of such weights errs less than that of the raw ones where these are skewed, and is
    not unbiased: its logarithm is no lower bound on log p(x).

    Args:
        log_w: Log-weights ``(K, N)`` in nats, as of ``log_weights``.

    Returns:
        The same ``(K, N)``, float64, in nats: for each datum the M largest are the expected order
        statistics of the fitted tail, cut off at the largest raw one, in the order of the raw ones;
        all are as they were where ``pareto_k`` is NaN, or the tail constant.

    Raises:
        ValueError: ``log_w`` has another shape, or holds NaN or +infinity.

    Reference: Vehtari et al., "Pareto smoothed importance sampling" (2024).

    Example:
        >>> log_w = 3 * torch.randn(1000, 1, dtype=torch.float64)
        >>> raw, smooth = (w.sort(0).values for w in (log_w, pv.smoothed(log_w)))
        >>> (raw == smooth)[:905].all().item(), (smooth <= raw[-1]).all().item()
        (True, True)
    """
    _, tail, at = _fit_all("smoothed", log_w)
    return log_w.detach().double().scatter(0, at, tail)


def tail_size(num_particles: int) -> int:
    """How many of the largest weights are the tail."""
    return math.ceil(min(num_particles / 5, 3 * num_particles**0.5))


def threshold(num_particles: int) -> float:
    """The Pareto k up to which an average of so many weights can be trusted."""
    return min(1 - 1 / math.log10(num_particles), 0.7) if num_particles > 1 else -math.inf


def pooled(k: Tensor, num_particles: int) -> Tensor:
    r"""Pareto k of data that share a guide, each drawn towards the mean of all.

    A fitted k has a standard error of about :math:`(1 + k) \sqrt M / (M + 10)`, and it errs in a
    direction that matters: where the largest weights were not drawn, k is too low, the estimate is
    too low, and its error bar too short. So of equally hard data those that look best are worst.
    The mean over the data knows better, as far as they differ by no more than noise does.

    Args:
        k: As of ``pareto_k``, ``(N,)``.
        num_particles: Number of particles K of which they are.

    Returns:
        :math:`\bar k + \lambda (k_n - \bar k)`, ``(N,)``, where lambda is the share of the variance
        of the k that noise does not explain; NaN where k is.
    """
    known, size = k[k.isfinite()], tail_size(num_particles)
    if len(known) < 2:
        return k
    noise = (1 + known.clamp_min(0)).square().mean() * size / (size + 10) ** 2
    share = (1 - noise / known.var()).clamp_min(0).nan_to_num(0.0)
    return known.mean() + share * (k - known.mean())


class Tail:
    """The largest log-weights of a block of data, kept while blocks of particles pass.

    They are kept in place, as running sums are (``Sums``). What passes is gathered first, since
    to pick the largest of a few blocks at once costs little more than of one.

    Args:
        num_particles: Number of particles K that will have passed for each datum.
    """

    def __init__(self, num_particles: int) -> None:
        self.wanted = tail_size(num_particles) + 1
        self.num_particles = num_particles
        self._held: Tensor | None = None  # (rows, width), of which the first are in use
        self._rows = 0

    def add(self, log_w: Tensor) -> None:
        """Let log-weights (k, n) pass."""
        count, width = log_w.shape
        if self._held is None:
            rows = min(self.wanted + 3 * count, self.num_particles)
            self._held = log_w.new_empty(rows, width)
        if self._rows + count > len(self._held):
            self._held[: self.wanted, :width] = self._largest(width, ordered=False)
            self._rows = self.wanted
        self._held[self._rows : self._rows + count, :width] = log_w
        self._rows += count
        self._width = width

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The k of the block's data, and the tail before and after smoothing; then start anew.

        Returns:
            k ``(n,)``, and log-weights ``(M, n)`` and ``(M, n)`` in nats, all in float64; no tail,
            M = 0, where there are too few particles for a fit.
        """
        assert self._held is not None
        if self.wanted <= FEWEST:
            k = self._held.new_full((self._width,), math.nan, dtype=torch.float64)
            none = k.new_empty(0, self._width)
            self._rows = 0
            return k, none, none
        largest = self._largest(self._width, ordered=True).double()
        self._rows = 0
        k, tail = fit_tail(largest, _rounding(self._held))
        return k, largest[:-1], tail

    def _largest(self, width: int, *, ordered: bool) -> Tensor:
        assert self._held is not None
        return self._held[: self._rows, :width].topk(self.wanted, dim=0, sorted=ordered).values


def fit_tail(largest: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Fit and smooth the tails of weights.

    Args:
        largest: The M + 1 largest log-weights of each datum ``(M + 1, n)``, the largest first, in
            float64; the last is the cutoff.
        rounding: Nats within which log-weights are taken for equal.

    Returns:
        k ``(n,)``, and the smoothed tails ``(M, n)``, the largest first.
    """
    top, tail = largest[0], largest[:-1]
    cutoff = torch.maximum(largest[-1], top - RANGE)
    above = tail > cutoff  # without those that equal the cutoff
    count = above.sum(0)
    # w - u in units of the largest weight, without the cancellation of close ones.
    excess = (tail - top).exp() * -torch.expm1(cutoff - tail)
    k, sigma = _fit(torch.where(above, excess, 0.0), count)
    constant = top - largest[-1] <= rounding
    fitted = (count >= FEWEST) & ~constant
    # The chance of a larger one, of the i-th largest of m: (i - 1/2) / m.
    rank = torch.arange(len(tail), dtype=k.dtype, device=k.device).add(0.5).unsqueeze(1)
    log_chance = (rank / count).log()
    flat = k.abs() < torch.finfo(k.dtype).eps
    quantile = torch.where(flat, -log_chance, torch.expm1(-k * log_chance) / k) * sigma
    smooth = torch.minimum(((cutoff - top).exp() + quantile).log(), k.new_zeros(())) + top
    k = torch.where(constant, 0.0, torch.where(fitted, k, math.nan))
    return k, torch.where(above & fitted, smooth, tail)


def _fit(excess: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale of generalized Pareto distributions, for each column of exceedances.

    The posterior mean of b = -k / sigma over a grid, under the prior of Zhang and Stephens; given b
    the likelihood is largest at k = mean log(1 - b x). (Their k has the other sign.)

    Args:
        excess: Exceedances (M, n), the largest first; zero from the ``count``-th on.
        count: How many there are in each column (n,); what is said of less than five means nothing.

    Returns:
        k and sigma, both (n,).
    """
    # Pyro's fit_generalized_pareto and arviz's psislw are this fit to rounding: they leave out
    # points of the grid of posterior weight below 1e-30 and 2e-15, to no effect. Around it they
    # differ: Pyro wants ten exceedances and leaves out weights below 1e-15 of the largest, arviz
    # wants five and leaves out those below e^-708; both say infinity where there is no fit, so that
    # an exact guide looks like the worst. Pyro has no smoothing; ours is arviz's.
    m = count.clamp_min(1).double()
    mean = excess.sum(0) / m
    quartile = excess.gather(0, (count - (m / 4 + 0.5).floor().long()).clamp_min(0).unsqueeze(0))
    grid = 30 + m.sqrt().floor()
    j = torch.arange(30 + math.isqrt(len(excess)), dtype=m.dtype, device=m.device).unsqueeze(1)
    b = (1 - (grid / (j + 0.5)).sqrt()) / (3 * quartile) + 1 / excess[0]
    # Point after point, since all at once would take some fifty times the room.
    k = torch.stack([(excess * -at).log1p_().sum(0) for at in b.unbind()]) / m
    score = m * (torch.where(b == 0, 1 / mean, -b / k).log() - k - 1)
    b = (b * torch.where(j < grid, score, -math.inf).softmax(0)).sum(0)
    k = (excess * -b).log1p_().sum(0) / m
    sigma = torch.where(b == 0, mean, -k / b)
    return (m * k + 5) / (m + 10), sigma


def _fit_all(name: str, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k, the smoothed tail (M, N), and in which rows it stands."""
    if log_w.dim() != 2 or len(log_w) == 0 or not log_w.is_floating_point():
        raise ValueError(
            f"{name}: expected log-weights of shape (K, N), as of log_weights, got "
            f"{tuple(log_w.shape)} of {log_w.dtype}."
        )
    if not (log_w < math.inf).all():
        raise ValueError(
            f"{name}: log_w has NaN or +infinity; log_weights says which site makes them."
        )
    log_w = log_w.detach()
    size = tail_size(len(log_w))
    if size < FEWEST:
        k = log_w.new_full(log_w.shape[1:], math.nan, dtype=torch.float64)
        return k, k.new_empty(0, len(k)), log_w.new_empty(0, len(k), dtype=torch.long)
    largest, at = log_w.topk(size + 1, dim=0)
    k, tail = fit_tail(largest.double(), _rounding(log_w))
    return k, tail, at[:-1]


def _rounding(log_w: Tensor) -> float:
    """Half the digits: tails that differ by less are taken for constant, and weigh nothing."""
    return torch.finfo(log_w.dtype).eps ** 0.5
