r"""Priors: modules whose ``forward()`` returns a distribution with ``batch_shape ()``.

==================  ===========================================================  ================
prior               density                                                      of
==================  ===========================================================  ================
``StandardNormal``  :math:`N(z; 0, I)`
``Learned``         any family with free parameters instead of a network's
``Mixture``         :math:`\sum_k \pi_k\, p_k(z)` over members of a family       Dilokthanakul+
                                                                                 2016
``VampPrior``       :math:`\frac1K \sum_k q(z|u_k)`, the encoder at learned      Tomczak, Welling
                    pseudo-inputs                                                2018
``FlowPrior``       :math:`N(f(z); 0, I)\,|\det \partial f / \partial z|`        Chen+ 2017
``UniformSphere``   uniform on the circle or the sphere                          Davidson+ 2018
==================  ===========================================================  ================

A ``Conditional`` is a prior too: p(z|y) of what the model is handed besides the data.
"""

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.context import at_rest
from pyro_vae.program.conditional import Family
from pyro_vae.program.distributions import Reverse
from pyro_vae.program.distributions.mixtures import mixture
from pyro_vae.program.recipe import recorded

__all__ = [
    "FlowPrior",
    "Learned",
    "Mixture",
    "StandardNormal",
    "UniformSphere",
    "VampPrior",
]


class _Located(nn.Module):
    """Holds a vector of zeros, only to follow its module to a device and a dtype."""

    loc: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"priors: expected at least one latent dimension, got dim={dim}.")
        self.dim = dim
        self.register_buffer("loc", torch.zeros(dim), persistent=False)  # nothing to save

    def standard_normal(self) -> TorchDistribution:
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)


@recorded
class StandardNormal(_Located):
    r"""The prior :math:`p(z) = N(z; 0, I)`.

    Args:
        dim: Number of latent dimensions Z.

    Example:
        >>> pv.priors.StandardNormal(50)().event_shape
        torch.Size([50])
    """

    def forward(self) -> TorchDistribution:
        """Return N(0, I) with ``batch_shape ()`` and ``event_shape (Z,)``."""
        return self.standard_normal()


@recorded
class Learned(nn.Module):
    r"""A family with free parameters: :math:`p(z) = \mathrm{family}(z; \theta)`.

    With ``families.normal`` the diagonal normal of learned location and scale; with ``laplace`` or
    ``student_t`` a prior of heavy tails; with ``bernoulli`` or ``one_hot`` discrete latents.
    ``requires_grad_(False)`` keeps the parameters where they start.

    Args:
        family: See ``pyro_vae.families``.
        out: ``(P, Z)``: number of the family's parameters, and of latent dimensions.
        start: The value at which each of the P parameters starts in all dimensions; zeros by
            default. For a scale of 1 under ``softplus``, ``families.inverse_softplus(1.0)``.

    Raises:
        ValueError: ``start`` has another length than P, or the family another P.

    Example:
        >>> prior = pv.priors.Learned(pv.families.laplace, (2, 50), start=(0.0, 0.5413))
        >>> prior().event_shape, sum(p.numel() for p in prior.parameters())
        (torch.Size([50]), 100)
    """

    def __init__(
        self, family: Family, out: tuple[int, int], *, start: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.family = family
        self.params = nn.Parameter(_start("Learned", out, start))
        _check_prior(self)

    def forward(self) -> TorchDistribution:
        """Return the family at its parameters, with ``batch_shape ()``, ``event_shape (Z,)``."""
        return self.family(self.params)


@recorded
class Mixture(nn.Module):
    r"""A mixture of K members of a family.

    .. math:: p(z) = \sum_{k=1}^K \pi_k\,\mathrm{family}(z; \theta_k)

    Weights and parameters are learned. The members start around the origin, one standard normal
    apart in their first parameter, so that no two of them are the same.

    Args:
        family: See ``pyro_vae.families``; ``families.normal`` for a mixture of diagonal normals.
        num_components: Number of members K.
        out: ``(P, Z)``: number of the family's parameters, and of latent dimensions.
        start: Where the P parameters start; see ``Learned``.

    Raises:
        ValueError: As ``Learned``.

    Reference: Dilokthanakul et al., "Deep unsupervised clustering with Gaussian mixture variational
    autoencoders" (2016).

    Example:
        >>> pv.priors.Mixture(pv.families.normal, 10, (2, 50))().log_prob(torch.zeros(7, 50)).shape
        torch.Size([7])
    """

    def __init__(
        self,
        family: Family,
        num_components: int,
        out: tuple[int, int],
        *,
        start: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if num_components < 1:
            raise ValueError(f"priors.Mixture: expected num_components >= 1, got {num_components}.")
        self.family = family
        params = _start("Mixture", out, start).repeat(num_components, 1, 1)
        params[:, 0] += torch.randn(num_components, out[1])
        self.params = nn.Parameter(params)
        self.logits = nn.Parameter(torch.zeros(num_components))
        _check_prior(self)

    def forward(self) -> TorchDistribution:
        """Return the mixture, with ``batch_shape ()`` and ``event_shape (Z,)``."""
        return mixture(self.logits, self.family(self.params))


@recorded
class VampPrior(nn.Module):
    r"""The encoder averaged over learned pseudo-inputs: :math:`p(z) = \frac1K \sum_k q(z|u_k)`.

    The encoder is the guide's own, and both hold it: gradients reach it from both sides.

    Args:
        encoder: Module ``(*batch, D) -> q(z|x)``, e.g. the ``Conditional`` of the guide.
        pseudo_inputs: Where they start, ``(K, D)``: data, such as the first 500 of the training
            set, serve well.
        low: Pseudo-inputs are kept above this, e.g. 0 for pixels; None for no bound.
        high: And below this. With both bounds the parameters are places between them, from 0 to
            1, so that a step of Adam moves grey levels of 0..255 as far as those of 0..1.
        learned_weights: Learn the K weights instead of 1/K each.

    Raises:
        ValueError: ``pseudo_inputs`` is no ``(K, D)``, or not within the bounds, or the encoder
            can't take it; or ``high`` isn't above ``low``.

    Reference: Tomczak and Welling, "VAE with a VampPrior" (2018).

    Example:
        >>> encoder = pv.Conditional(pv.networks.mlp(9, (2, 3)), pv.families.normal)
        >>> prior = pv.priors.VampPrior(encoder, torch.rand(20, 9), low=0.0, high=1.0)
        >>> prior().batch_shape, prior().event_shape
        (torch.Size([]), torch.Size([3]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        pseudo_inputs: Tensor,
        *,
        low: float | None = None,
        high: float | None = None,
        learned_weights: bool = False,
    ) -> None:
        super().__init__()
        if pseudo_inputs.dim() != 2 or not len(pseudo_inputs):
            raise ValueError(
                "priors.VampPrior: expected pseudo_inputs of shape (K, D), one a row, got "
                f"{tuple(pseudo_inputs.shape)}; take some data, such as data.train[:500]."
            )
        lowest, highest = pseudo_inputs.min().item(), pseudo_inputs.max().item()
        if (low is not None and lowest < low) or (high is not None and highest > high):
            raise ValueError(
                f"priors.VampPrior: expected pseudo_inputs between {low} and {high}, got values "
                f"from {lowest:g} to {highest:g}."
            )
        self.encoder = encoder
        self.low, self.high = low, high
        self._origin, self._unit = 0.0, 1.0
        if low is not None and high is not None:
            if not low < high:
                raise ValueError(f"priors.VampPrior: expected low < high, got {low} and {high}.")
            self._origin, self._unit = low, high - low
        dtype = pseudo_inputs.dtype if pseudo_inputs.is_floating_point() else None
        start = pseudo_inputs.detach().clone().to(dtype or torch.get_default_dtype())
        self.places = nn.Parameter((start - self._origin) / self._unit)
        logits = torch.zeros(len(pseudo_inputs), dtype=self.places.dtype)
        if learned_weights:
            self.logits: Tensor = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)
        _check_prior(self)

    @property
    def pseudo_inputs(self) -> Tensor:
        """Where they are now, ``(K, D)``, within the bounds."""
        inputs = self._origin + self._unit * self.places
        if self.low is None and self.high is None:
            return inputs
        # The gradient of a clamp is zero at its bounds, where black and white pixels are.
        within = inputs.detach().clamp(self.low, self.high)
        return inputs + (within - inputs.detach())

    def forward(self) -> TorchDistribution:
        """Return the mixture of posteriors, ``batch_shape ()`` and ``event_shape (Z,)``."""
        return mixture(self.logits, self.encoder(self.pseudo_inputs))


@recorded
class FlowPrior(_Located):
    r"""A normalizing flow: :math:`p(z) = N(f(z); 0, I)\,|\det \partial f / \partial z|`.

    Each transform maps latents towards noise, so that scoring is one pass; drawing inverts them, in
    Z passes where they are autoregressive (for which Pyro's inverses know float32 alone). Between
    transforms the dimensions are reversed.

    Args:
        dim: Number of latent dimensions Z.
        transform: Makes one of Pyro's transforms from Z, e.g.
            ``pyro.distributions.transforms.affine_autoregressive`` or ``spline_coupling``; bind
            their options by ``functools.partial``.
        num_transforms: How many.

    References: Kingma et al., "Improved variational inference with inverse autoregressive flow"
    (2016); Chen et al., "Variational lossy autoencoder" (2017); Durkan et al., "Neural spline
    flows" (2019).

    Example:
        >>> from pyro.distributions import transforms
        >>> prior = pv.priors.FlowPrior(4, transforms.affine_autoregressive)
        >>> prior().log_prob(torch.zeros(7, 4)).shape, prior().sample((3,)).shape
        (torch.Size([7]), torch.Size([3, 4]))
    """

    def __init__(
        self, dim: int, transform: Callable[[int], nn.Module], *, num_transforms: int = 2
    ) -> None:
        super().__init__(dim)
        if num_transforms < 1:
            raise ValueError(
                f"priors.FlowPrior: expected num_transforms >= 1, got {num_transforms}."
            )
        self.transforms = nn.ModuleList(transform(dim) for _ in range(num_transforms))

    def forward(self) -> TorchDistribution:
        """Return the flow's distribution, ``batch_shape ()`` and ``event_shape (Z,)``."""
        towards_noise = [part for t in self.transforms for part in (t, Reverse())][:-1]
        return dist.TransformedDistribution(
            self.standard_normal(), [t.inv for t in reversed(towards_noise)]
        )


@recorded
class UniformSphere(_Located):
    r"""The uniform density on the unit circle or sphere, :math:`\Gamma(Z/2) / 2\pi^{Z/2}`.

    Its guides are ``families.projected_normal``. Pyro has the density of a projected normal in two
    and three dimensions.

    Args:
        dim: Number of dimensions Z of the space around it: 2 or 3.

    Raises:
        ValueError: ``dim`` is another.

    Reference: Davidson et al., "Hyperspherical variational auto-encoders" (2018).

    Example:
        >>> p = pv.priors.UniformSphere(3)().log_prob(torch.tensor([0.0, 0.6, 0.8]))
        >>> torch.isclose(p.exp(), torch.tensor(1 / (4 * torch.pi)))
        tensor(True)
    """

    def __init__(self, dim: int) -> None:
        if dim not in (2, 3):
            raise ValueError(
                f"priors.UniformSphere: expected dim 2 or 3, in which Pyro has a guide's density, "
                f"got {dim}."
            )
        super().__init__(dim)

    def forward(self) -> TorchDistribution:
        """Return the uniform distribution, ``batch_shape ()`` and ``event_shape (Z,)``."""
        return dist.ProjectedNormal(self.loc)


def _start(name: str, out: tuple[int, int], start: Sequence[float] | None) -> Tensor:
    if not isinstance(out, tuple | list) or len(out) != 2 or min(out) < 1:
        raise ValueError(
            f"priors.{name}: expected out=(P, Z), P parameters for each of Z latent dimensions, "
            f"got {out}."
        )
    values = [0.0] * out[0] if start is None else list(start)
    if len(values) != out[0]:
        raise ValueError(
            f"priors.{name}: expected start to hold {out[0]} values, one for each parameter, got "
            f"{len(values)}."
        )
    return torch.tensor(values).unsqueeze(-1).repeat(1, out[1])


def _check_prior(module: nn.Module) -> None:
    """Refuse at once what would fail, or broadcast, at the first step."""
    with at_rest(module):
        prior = module()
    if prior.batch_shape != () or len(prior.event_shape) != 1:
        raise ValueError(
            f"priors.{type(module).__name__}: expected a distribution of batch_shape () and "
            f"event_shape (Z,), got {tuple(prior.batch_shape)} and {tuple(prior.event_shape)}."
        )
