"""NumPyro's ``SVI`` on plain functions, its update compiled by XLA as one program."""

# pyright: reportMissingImports=false

from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import numpy as jnp
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from experiments.benchmarks.contestant import Contestant, Objective
from experiments.benchmarks.workloads import LEARNING_RATE, MIN_SCALE, Side, Workload

__all__ = ["make"]


class _Pair:
    """Model and guide that take every weight from ``numpyro.param``."""

    def __init__(self, workload: Workload, weights: dict[str, np.ndarray]) -> None:
        self.gated = workload.gated
        self.latent_dim = workload.latent_dim
        # (in, out), so that a layer is x @ w + b.
        self.weights = {name: jnp.asarray(w.T, jnp.float32) for name, w in weights.items()}

    def model(self, x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            zeros = jnp.zeros(self.latent_dim)
            z = numpyro.sample("z", dist.Normal(zeros, jnp.ones_like(zeros)).to_event(1))
            logits = self._network("decoder", z)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: jax.Array) -> None:
        loc, unconstrained = jnp.split(self._network("encoder", x), 2, axis=-1)
        scale = jax.nn.softplus(unconstrained) + MIN_SCALE
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def _network(self, side: Side, x: Any) -> jax.Array:
        count = sum(name.startswith(side) for name in self.weights) // 2
        for i in range(count):
            weight, bias = (
                numpyro.param(name, self.weights[name])
                for name in (f"{side}.{i}.weight", f"{side}.{i}.bias")
            )
            x = x @ weight + bias
            if i < count - 1:
                x = jax.nn.glu(x) if self.gated else jax.nn.softplus(x)
        return x


class _NumPyroSteps:
    def __init__(self, pair: _Pair, x: np.ndarray, objective: Objective, seed: int) -> None:
        elbo = TraceMeanField_ELBO() if objective == "meanfield" else Trace_ELBO()
        adam = numpyro.optim.Adam(LEARNING_RATE)
        svi = SVI(pair.model, pair.guide, adam, elbo)
        self.x = jnp.asarray(x)
        self.key, first = jax.random.split(jax.random.key(seed))
        self.state = svi.init(first, self.x)
        # The old state is given up, so that the new one may take its place in memory.
        self.update = jax.jit(svi.update, donate_argnums=0)
        self.evaluate = jax.jit(svi.evaluate)
        self.elbo = type(elbo).__name__

    def step(self) -> None:
        self.state, loss = self.update(self.state, self.x)
        jax.block_until_ready((self.state, loss))

    def loss(self) -> float:
        self.key, fresh = jax.random.split(self.key)
        return float(self.evaluate(self.state._replace(rng_key=fresh), self.x))

    def describe(self) -> str:
        return (
            f"numpyro.infer.SVI, jax.jit of update, {self.elbo}, NumPyro {numpyro.__version__}, "
            f"jax {jax.__version__} on {jax.default_backend()}"
        )


def make(
    workload: Workload,
    objective: Objective,
    weights: dict[str, np.ndarray],
    batch: np.ndarray,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> Contestant:
    """Make the contestant; see ``contestant.Make``."""
    jax.config.update("jax_enable_x64", False)  # noqa: FBT003 (jax takes it so)
    # A GPU would round the factors of products to ten bits; torch does not.
    jax.config.update("jax_default_matmul_precision", "float32")
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        raise ImportError("jax is installed without support for this GPU")
    return _NumPyroSteps(_Pair(workload, weights), batch, objective, seed)
