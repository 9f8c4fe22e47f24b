r"""Likelihoods of what is observed of each datum: :math:`\log p(x_o|z)`."""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Independent, constraints, transform_to

from pyro_vae.program.recipe import recorded

__all__ = ["Masked"]


@recorded
class Masked(nn.Module):
    r"""A likelihood that counts the entries that a mask says are there.

    .. math:: \log p(x_o|z) = \sum_{d : m_d = 1} \log p(x_d|z)

    Where the dimensions are independent given z, leaving entries out is integrating over them, so
    the pair's evidence is log p of what is observed. What stands in missing entries is not looked
    at: it may be NaN, or no value of the family at all. The mask is not modelled: that is right
    where entries are missing at random. Means and draws are of whole data.

    The pair is called as ``model(x, mask)``; the encoder's network goes into
    ``networks.without_missing``.

    Args:
        likelihood: Module whose ``forward(z, *context)`` returns p(x|z) of independent dimensions,
            e.g. a ``Conditional`` of any family but ``multinomial``, ``projected_normal`` and the
            normals of many covariances.

    References: Rubin, "Inference and missing data" (1976); Nazábal et al., "Handling incomplete
    heterogeneous data using VAEs" (2020).

    Example:
        >>> bits = pv.Conditional(pv.networks.mlp(2, (1, 3)), pv.families.bernoulli)
        >>> x = torch.tensor([1.0, torch.nan, 0.0])
        >>> pv.Masked(bits)(torch.zeros(2), x.isfinite()).log_prob(x).isfinite()
        tensor(True)
    """

    def __init__(self, likelihood: nn.Module) -> None:
        super().__init__()
        self.likelihood = likelihood

    def forward(self, z: Tensor, mask: Tensor | None = None, *context: Tensor) -> TorchDistribution:
        """Return the distribution of what is observed.

        Args:
            z: Latents ``(*batch, Z)``.
            mask: ``(*batch, D)``, bool or 0 and 1: which entries are observed; None for all. The
                batch dimensions broadcast.
            context: What else the likelihood sees, ``(*batch, C)`` each.

        Returns:
            A distribution with ``batch_shape (*batch,)`` and ``event_shape (D,)``, whose
            log-density, in nats, is that of the observed entries.

        Raises:
            ValueError: The likelihood's dimensions are not independent, or the mask has another
                shape or other values.
        """
        p = self.likelihood(z, *context)
        if not (
            isinstance(p, Independent)
            and p.reinterpreted_batch_ndims == 1
            and not p.base_dist.event_shape
        ):
            raise ValueError(
                "Masked: expected a likelihood of independent dimensions, Independent(base, 1), "
                f"such as families.normal gives, got {type(p).__name__}: where dimensions depend "
                "on one another, the density of some is an integral over the others, and no mask."
            )
        if mask is None:
            return p  # type: ignore[return-value]
        if mask.shape[-1:] != p.event_shape:
            raise ValueError(
                f"Masked: expected a mask of shape (*batch, {p.event_shape[0]}), one for each "
                f"entry of x, got {tuple(mask.shape)}; the mask is the model's second argument, "
                "model(x, mask)."
            )
        observed = mask.bool()
        if p._validate_args and (mask != observed).any():
            raise ValueError("Masked: expected a mask of zeros and ones, or of bool; got others.")
        return _Observed(p, observed)


class _Observed(TorchDistribution):
    """Independent dimensions, of which those are scored that are observed."""

    arg_constraints: Any = {}  # noqa: RUF012 - the base has its own

    def __init__(
        self, base_dist: Any, observed: Tensor, *, validate_args: bool | None = None
    ) -> None:
        batch = torch.broadcast_shapes(base_dist.batch_shape, observed.shape[:-1])
        self.base_dist = base_dist if batch == base_dist.batch_shape else base_dist.expand(batch)
        self.observed = observed
        super().__init__(batch, base_dist.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry a gradient."""
        return self.base_dist.has_rsample

    @constraints.dependent_property
    def support(self) -> Any:  # type: ignore[override]
        """The base's support where entries are observed, anything elsewhere."""
        return _WhereObserved(self.base_dist.base_dist.support, self.observed)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "_Observed":
        """The same distribution with a larger batch shape."""
        base = self.base_dist.expand(torch.Size(batch_shape))
        return _Observed(base, self.observed, validate_args=self._validate_args)

    def filled(self, value: Tensor) -> Tensor:
        """The value ``(*batch, D)`` with legal entries in place of the missing ones."""
        each = self.base_dist.base_dist
        return torch.where(self.observed, value, _legal(each, value))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the observed entries, ``(*batch,)``, in nats."""
        # Filled in before scoring: a NaN that is left out after it still makes gradients NaN.
        each = self.base_dist.base_dist.log_prob(self.filled(value))
        return torch.where(self.observed, each, 0.0).sum(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - as torch's
        """Whole data, ``sample_shape + batch_shape + (D,)``."""
        return self.base_dist.sample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - as torch's
        """Whole data, ``sample_shape + batch_shape + (D,)``, with gradients."""
        return self.base_dist.rsample(sample_shape)

    @property
    def mean(self) -> Tensor:
        """The mean of whole data, ``(*batch, D)``."""
        return self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        """The variances of whole data, ``(*batch, D)``."""
        return self.base_dist.variance


class _WhereObserved(constraints.Constraint):
    """A support of single entries, where they are observed."""

    event_dim = 1

    def __init__(self, each: constraints.Constraint, observed: Tensor) -> None:
        self.each = each
        self.observed = observed
        self.is_discrete = each.is_discrete
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether the observed entries are legal, ``(*batch,)``."""
        return (self.each.check(value) | ~self.observed).all(-1)

    def __repr__(self) -> str:
        return f"{self.each} of observed entries"


def _legal(each: Any, like: Tensor) -> Any:
    """A value of a distribution's support, by which a missing entry can be scored."""
    try:
        support = each.support
        while hasattr(support, "base_constraint"):  # that of a mixture
            support = support.base_constraint
        if support.is_discrete:
            bound = getattr(support, "lower_bound", getattr(support, "upper_bound", 0))
            return bound.to(like.dtype) if isinstance(bound, Tensor) else bound
        return transform_to(support)(like.new_zeros(())).detach().to(like.dtype)
    except NotImplementedError as error:
        raise ValueError(
            f"Masked: no value is known that {type(each).__name__} could score in place of missing "
            "entries; give the distribution one of torch's supports, such as real, positive or "
            "unit_interval."
        ) from error
