"""Oracles and pairs that several tests use."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
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
