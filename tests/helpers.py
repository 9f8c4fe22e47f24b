"""Oracles and pairs that several tests use."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyro_vae as pv


@dataclass
class LinearGaussian:
    """p(z) = N(0, I), p(x|z) = N(W z + b, s^2 I): log p(x) and p(z|x) are known exactly.

    Reference: Tipping and Bishop, "Probabilistic principal component analysis" (1999).
    """

    weight: Tensor  # (D, Z)
    bias: Tensor  # (D,)
    scale: float

    @classmethod
    def random(cls, dim: int = 5, latent_dim: int = 2, scale: float = 0.7) -> "LinearGaussian":
        return cls(
            torch.randn(dim, latent_dim, dtype=torch.float64),
            torch.randn(dim, dtype=torch.float64),
            scale,
        )

    def sample(self, size: int) -> Tensor:
        z = torch.randn(size, self.weight.shape[1], dtype=torch.float64)
        noise = torch.randn(size, len(self.bias), dtype=torch.float64)
        return z @ self.weight.T + self.bias + self.scale * noise

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x), (N,)."""
        covariance = self.weight @ self.weight.T
        covariance = covariance + self.scale**2 * torch.eye(len(self.bias), dtype=x.dtype)
        return dist.MultivariateNormal(self.bias, covariance).log_prob(x)

    def posterior(self, x: Tensor, inflation: float = 1.0) -> dist.MultivariateNormal:
        """Exact p(z|x), with its covariance multiplied by ``inflation``."""
        eye = torch.eye(self.weight.shape[1], dtype=x.dtype)
        precision = eye + self.weight.T @ self.weight / self.scale**2
        covariance = torch.linalg.inv(precision)
        loc = (x - self.bias) @ self.weight @ covariance / self.scale**2
        return dist.MultivariateNormal(loc, covariance_matrix=inflation * covariance)

    def model(self, x: Tensor) -> None:
        zeros = torch.zeros(self.weight.shape[1], dtype=x.dtype)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            loc = z @ self.weight.T + self.bias
            pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor, inflation: float = 1.0) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x, inflation))


def bernoulli_pair(
    dim: int = 9, latent_dim: int = 2, hidden_dims: tuple[int, ...] = (8,)
) -> tuple[pv.Model, pv.Guide]:
    """A small pair of the library's own pieces, for bits."""
    encoder = pv.Conditional(
        pv.networks.mlp(dim, (2, latent_dim), hidden_dims=hidden_dims), pv.families.normal
    )
    likelihood = pv.Conditional(
        pv.networks.mlp(latent_dim, (1, dim), hidden_dims=hidden_dims), pv.families.bernoulli
    )
    return pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder)


class TutorialPair:
    """A foreign pair: Pyro functions with ``pyro.module``, no class of this library in sight."""

    def __init__(self, dim: int = 9, latent_dim: int = 2) -> None:
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(nn.Linear(dim, 8), nn.Softplus(), nn.Linear(8, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 8), nn.Softplus(), nn.Linear(8, dim))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", x.shape[0]):
            loc = x.new_zeros(x.shape[0], self.latent_dim)
            z = pyro.sample("latent", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            logits = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def bits(size: int = 20, dim: int = 9) -> Tensor:
    """Random bits (N, D)."""
    return torch.rand(size, dim).round()


def logits(likelihood: Any) -> Tensor:
    """The logits (*batch, D) of a Bernoulli likelihood."""
    return likelihood.base_dist.logits


def same_normal(one: Any, other: Any) -> bool:
    """Whether two normals over D dimensions are equal to the last bit."""
    one, other = one.base_dist, other.base_dist
    return torch.equal(one.loc, other.loc) and torch.equal(one.scale, other.scale)


# --- pairs of every kind that a user may write, in float64; each call makes (model, guide, args)

Made = tuple[Any, Any, tuple[Any, ...]]


def double_bits(size: int = 7, dim: int = 9) -> Tensor:
    """Random bits (N, D) in float64."""
    return bits(size, dim).double()


def vampprior_pair() -> tuple[Any, ...]:
    """A VampPrior whose pseudo-inputs are far more than the data."""
    torch.manual_seed(0)
    mlp = partial(pv.networks.mlp, hidden_dims=(20,))
    encoder = pv.Conditional(mlp(9, (2, 3)), pv.families.normal)
    likelihood = pv.Conditional(mlp(3, (1, 9)), pv.families.bernoulli)
    prior = pv.priors.VampPrior(encoder, torch.rand(200, 9), low=0.0, high=1.0)
    model, guide = pv.Model(prior, likelihood).double(), pv.Guide(encoder).double()
    return model, guide, (double_bits(7),)


def library_pair() -> Made:
    model, guide = bernoulli_pair()
    return model.double(), guide.double(), (double_bits(),)


def bernoulli_latents() -> Made:
    """Discrete latents, which have no pathwise gradient."""

    def model(x: Tensor) -> None:
        weight = pyro.param("weight", torch.linspace(-1, 1, 27).double().view(3, 9))
        with pyro.plate("data", len(x)):
            half = torch.full((3,), 0.5, dtype=torch.float64)
            z = pyro.sample("z", dist.Bernoulli(half).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.linspace(-1, 1, 27).double().view(9, 3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x @ slope).to_event(1))

    return model, guide, (double_bits(),)


def tutorial_pair() -> Made:
    pair = TutorialPair()
    pair.encoder.double()
    pair.decoder.double()
    return pair.model, pair.guide, (double_bits(),)


def _ramp(*shape: int) -> Tensor:
    """Numbers between -1 and 1: an initial value that draws no noise."""
    return torch.linspace(-1.0, 1.0, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def store_pair(size: int | None = None) -> Made:
    """Functions with constrained and unconstrained ``pyro.param``.

    With ``size``, minibatches stand for that many data (a subsampling plate).
    """

    def plate(x: Tensor) -> Any:
        return pyro.plate("data", size or len(x), subsample_size=len(x), dim=-1)

    def model(x: Tensor) -> None:
        scale = pyro.param("prior_scale", 1.5 + _ramp(2) / 4, constraint=constraints.positive)
        weight = pyro.param("weight", _ramp(2, 9))
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", _ramp(9, 2) / 3)
        scale = pyro.param("scale", 0.7 + _ramp(2) / 4, constraint=constraints.positive)
        with plate(x):
            pyro.sample("z", dist.Normal(x @ slope, scale).to_event(1))

    return model, guide, (double_bits(),)


def subsampled_pair() -> Made:
    return store_pair(size=50)


class ModuleModel(PyroModule):
    """A model that is a ``PyroModule`` with a constrained ``PyroParam``."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = PyroModule[nn.Linear](2, 9)  # type: ignore[call-arg]
        self.prior_scale = PyroParam(torch.tensor([1.2, 0.8]), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        scale: Any = self.prior_scale
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


class ModuleGuide(PyroModule):
    """The guide of a ``ModuleModel``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PyroModule[nn.Linear](9, 2)  # type: ignore[call-arg]
        self.guide_scale = PyroParam(torch.tensor([0.9, 0.6]), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            scale: Any = self.guide_scale
            pyro.sample("z", dist.Normal(self.encoder(x), scale).to_event(1))


def module_pair() -> Made:
    return ModuleModel().double(), ModuleGuide().double(), (double_bits(),)


class TopDownModel(PyroModule):
    """Two levels: p(z2) p(z1|z2) p(x|z1)."""

    def __init__(self) -> None:
        super().__init__()
        self.lower_prior = pv.Conditional(pv.networks.mlp(2, (2, 3)), pv.families.normal)
        self.likelihood = pv.Conditional(pv.networks.mlp(3, (1, 9)), pv.families.bernoulli)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            zeros = x.new_zeros(2)
            z2 = pyro.sample("z2", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            z1 = pyro.sample("z1", self.lower_prior(z2))
            pyro.sample("x", self.likelihood(z1), obs=x)


class TopDownGuide(PyroModule):
    """Its guide, in the same order: q(z2|x) q(z1|z2, x)."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
        self.lower = pv.Conditional(pv.networks.mlp(11, (2, 3)), pv.families.normal)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", self.upper(x))
            pyro.sample("z1", self.lower(z2, x))


def hierarchical_pair() -> Made:
    return TopDownModel().double(), TopDownGuide().double(), (double_bits(),)


def masked_pair() -> Made:
    """Data at dimension -2, pixels at -1, some of which are missing."""
    decoder, encoder = nn.Linear(2, 9).double(), nn.Linear(9, 4).double()

    def model(x: Tensor, seen: Any) -> None:
        pyro.module("pixel_decoder", decoder)
        with pyro.plate("data", len(x), dim=-2):
            zeros = x.new_zeros(2)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            with pyro.plate("pixels", 9, dim=-1), poutine.mask(mask=seen):
                pyro.sample("x", dist.Bernoulli(logits=decoder(z).squeeze(-2)), obs=x)

    def guide(x: Tensor, seen: Any) -> None:
        pyro.module("pixel_encoder", encoder)
        with pyro.plate("data", len(x), dim=-2):
            loc, log_scale = encoder(x * seen).unsqueeze(-2).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, (double_bits(), torch.rand(7, 9) < 0.7)


def auxiliary_pair() -> Made:
    """A guide with a latent of its own, which the model does not have."""
    model, _, args = store_pair()

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", _ramp(9, 2) / 3)
        mixing = pyro.param("mixing", _ramp(2, 2))
        with pyro.plate("data", len(x), dim=-1):
            base = dist.Normal(x @ slope, torch.ones_like(x @ slope)).to_event(1)
            a = pyro.sample("a", base, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(a @ mixing, 0.5).to_event(1))

    return model, guide, args


PAIRS: tuple[Callable[[], Made], ...] = (
    library_pair,
    tutorial_pair,
    store_pair,
    module_pair,
    hierarchical_pair,
    subsampled_pair,
    masked_pair,
    auxiliary_pair,
)


def leaves(model: Callable[..., Any], guide: Callable[..., Any]) -> dict[str, Tensor]:
    """The unconstrained trainable tensors of a pair that has run once, each once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for program in (model, guide):
        if isinstance(program, nn.Module):
            for name, parameter in program.named_parameters():
                found[id(parameter)] = (name, parameter)
    for name, parameter in pyro.get_param_store().named_parameters():
        found.setdefault(id(parameter), (name, parameter))
    return dict(sorted(found.values(), key=lambda item: item[0]))
