"""A model with a latent that all data share, in which everything is normal and known."""

from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import torch
from helpers import LinearGaussian
from torch import Tensor


@dataclass
class SharedMean:
    """theta ~ N(0, I), z_n ~ N(0, I), x_n ~ N(theta + W z_n, s^2 I): all of it is normal."""

    local: LinearGaussian
    x: Tensor  # the data X, (N, D)

    @classmethod
    def random(cls, size: int, dim: int = 3) -> "SharedMean":
        local = LinearGaussian.random(dim)
        return cls(local, replace(local, bias=torch.randn(dim).double()).sample(size))

    @property
    def noise(self) -> Tensor:
        """The covariance of x_n given theta."""
        weight, eye = self.local.weight, torch.eye(self.x.shape[1]).double()
        return weight @ weight.T + self.local.scale**2 * eye

    def log_evidence(self) -> Tensor:
        """Exact log p(X), as that of one normal vector of N D dimensions."""
        n, d = self.x.shape
        ones, eye = torch.ones(n, n).double(), torch.eye(d).double()
        covariance = torch.kron(torch.eye(n).double(), self.noise) + torch.kron(ones, eye)
        zeros = torch.zeros(n * d).double()
        return dist.MultivariateNormal(zeros, covariance).log_prob(self.x.flatten())

    def posterior(self, inflation: float = 1.0) -> dist.MultivariateNormal:
        """Exact p(theta|X), with its covariance multiplied by ``inflation``."""
        n, d = self.x.shape
        precision = torch.linalg.inv(self.noise)
        covariance = torch.linalg.inv(torch.eye(d).double() + n * precision)
        loc = covariance @ precision @ self.x.sum(0)
        return dist.MultivariateNormal(loc, covariance_matrix=inflation * covariance)

    def log_predictive(self, new: Tensor) -> Tensor:
        """Exact log p(x|X)."""
        theta = self.posterior()
        return dist.MultivariateNormal(theta.loc, theta.covariance_matrix + self.noise).log_prob(
            new
        )

    def model(self, x: Tensor, size: int | None = None) -> None:
        zeros = torch.zeros(x.shape[1]).double()
        theta = pyro.sample("theta", dist.Normal(zeros, 1.0).to_event(1))
        with pyro.plate("data", size or len(x), subsample_size=len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = z @ self.local.weight.T + theta
            pyro.sample("x", dist.Normal(loc, self.local.scale).to_event(1), obs=x)

    def guide(
        self, x: Tensor, size: int | None = None, shared: float = 1.0, own: float = 1.0
    ) -> None:
        theta = pyro.sample("theta", self.posterior(shared))
        with pyro.plate("data", size or len(x), subsample_size=len(x), dim=-1):
            pyro.sample("z", replace(self.local, bias=theta).posterior(x, own))
