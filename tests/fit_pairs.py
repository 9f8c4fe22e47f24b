"""Pairs and data for tests of `fit`, and what two of its runs are compared by."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from helpers import TutorialPair, bernoulli_pair
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data import Split
from pyro_vae.runs.directory import Run

fit = partial(pv.fit, batch_size=20, progress=False)


def adam(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def fast(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.03)


def param_pair(dim: int = 9) -> tuple[Callable[..., None], Callable[..., None]]:
    """A foreign pair whose every parameter is a ``pyro.param``, one of them constrained."""
    start = torch.randn(dim, 2) / 3

    def model(x: Tensor) -> None:
        weight = pyro.param("weight", lambda: start.clone())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight.T).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        weight = pyro.param("back", lambda: start.T.clone())
        scale = pyro.param("scale", lambda: torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight.T, scale).to_event(1))

    return model, guide


class PlainModel(nn.Module):
    """A program that is an ``nn.Module`` and no ``PyroModule``."""

    def __init__(self, dim: int = 9) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, dim))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.network(z)).to_event(1), obs=x)


class PlainGuide(nn.Module):
    def __init__(self, dim: int = 9) -> None:
        super().__init__()
        self.network = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> None:
        loc, scale = self.network(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))


def tutorial_pair() -> tuple[Any, Any]:
    foreign = TutorialPair()
    return foreign.model, foreign.guide


def context_pair(dim: int = 9, context: int = 3) -> tuple[pv.Model, pv.Guide]:
    """p(x | z, y) and q(z | x, y)."""
    make = partial(pv.networks.mlp, hidden_dims=(8,))
    encoder = pv.Conditional(make(dim + context, (2, 2)), pv.families.normal)
    likelihood = pv.Conditional(make(2 + context, (1, dim)), pv.families.bernoulli)
    return pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)


def dropout_pair(dim: int = 9) -> tuple[pv.Model, pv.Guide]:
    def activation() -> nn.Module:
        return nn.Sequential(nn.Softplus(), nn.Dropout(0.3))

    make = partial(pv.networks.mlp, hidden_dims=(8,), activation=activation)
    encoder = pv.Conditional(make(dim, (2, 2)), pv.families.normal)
    likelihood = pv.Conditional(make(2, (1, dim)), pv.families.bernoulli)
    return pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)


PAIRS = {
    "pieces": bernoulli_pair,
    "tutorial": tutorial_pair,
    "params": param_pair,
    "plain modules": lambda: (PlainModel(), PlainGuide()),
    "dropout": dropout_pair,
}


def dynamic(size: int = 60, dim: int = 9) -> Split:
    """Grey values that become other bits in every minibatch."""
    grey = torch.rand(3, size, dim)
    return pv.load_data((grey[0], grey[1, :30], grey[2, :30])).binarize_dynamic()


def parameters(model: Any, guide: Any) -> dict[str, Tensor]:
    """All parameters, wherever they live; copies."""
    found: dict[str, Tensor] = {}
    for role, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            found |= {f"{role}.{name}": p for name, p in program.named_parameters()}
    own = {name.partition(".")[2] for name in found}  # Pyro's modules stand in the store too
    stored = pyro.get_param_store().named_parameters()
    found |= {name: p for name, p in stored if name.replace("$$$", ".") not in own}
    return {name: p.detach().clone() for name, p in found.items()}


def same(a: Any, b: Any) -> bool:
    """Equality to the last bit, also of NaN, of nested values; times of day aside."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(-1), b.view(-1))
    if isinstance(a, dict):
        a, b = ({k: v for k, v in d.items() if k != "seconds"} for d in (a, b))
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def state(out: Path) -> dict[str, Any]:
    return Run(out).load_checkpoint()
