"""Normals that are affine in what they are given: programs of them have exact posteriors."""

from functools import partial

import torch
from torch import Tensor

import pyro_vae as pv


def affine(weight: Tensor, bias: Tensor, covariance: Tensor) -> pv.Conditional:
    """N(weight v + bias, covariance), for ``v`` of all inputs beside one another."""
    dim, in_dim = weight.shape
    network = pv.networks.mlp(in_dim, (1 + dim, dim), hidden_dims=()).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        tensors = dict(network.named_parameters())
        tensors["layers.0.weight"][:dim] = weight
        tensors["layers.0.bias"].copy_(
            torch.cat([bias, torch.linalg.cholesky(covariance).flatten()])
        )
    return pv.Conditional(
        network, partial(pv.families.full_normal, to_scale=torch.abs, min_scale=0.0)
    )


class Variables:
    """Jointly normal vectors by name, each a mean and its loadings on common noise."""

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self.loadings: dict[str, list[Tensor]] = {}
        self.steps: dict[str, pv.Conditional] = {}

    def add(self, name: str, dim: int, scale: float, above: str | None = None) -> None:
        """A vector of noise and, where one is named, a random affine map of the one above."""
        noise = scale * torch.eye(dim, dtype=torch.float64)
        if above is None:
            self.means[name] = torch.zeros(dim, dtype=torch.float64)
            self.loadings[name] = [noise]
            return
        weight = torch.randn(dim, len(self.means[above]), dtype=torch.float64)
        bias = torch.randn(dim, dtype=torch.float64)
        self.means[name] = weight @ self.means[above] + bias
        self.loadings[name] = [*(weight @ part for part in self.loadings[above]), noise]
        self.steps[name] = affine(weight, bias, noise @ noise.T)

    def covariance(self, one: str, other: str) -> Tensor:
        """Of two vectors: what they share of the noise."""
        pairs = zip(self.loadings[one], self.loadings[other], strict=False)
        return sum((a @ b.T for a, b in pairs), torch.zeros((), dtype=torch.float64))

    def given(self, name: str, *others: str) -> pv.Conditional:
        """p(name | others), exactly."""
        across = torch.cat([self.covariance(name, other) for other in others], 1)
        within = torch.cat([torch.cat([self.covariance(a, b) for b in others], 1) for a in others])
        weight = torch.linalg.solve(within, across.T).T
        bias = self.means[name] - weight @ torch.cat([self.means[other] for other in others])
        return affine(weight, bias, self.covariance(name, name) - weight @ across.T)

    def marginal(self, *names: str) -> torch.distributions.MultivariateNormal:
        """p(names), the vectors beside one another."""
        mean = torch.cat([self.means[name] for name in names])
        rows = [torch.cat([self.covariance(a, b) for b in names], 1) for a in names]
        return torch.distributions.MultivariateNormal(mean, torch.cat(rows))
