"""Priors, likelihoods, guides and networks that go together, small enough to be integrated over.

Two latent dimensions and four data dimensions throughout, so that p(x) is a sum over a grid.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from pyro.distributions import transforms
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import families

Z, D, Y = 2, 4, 2

ALIVE = [20]  # so many units of ReLU, which a transform can't do without, are never all off

Network = Callable[[int, tuple[int, int]], nn.Module]


class Choice(NamedTuple):
    """One prior, likelihood, guide and network, by name."""

    prior: str
    likelihood: str
    guide: str
    network: str

    def __str__(self) -> str:
        return "-".join(self)


# --- networks: one for guides and one for likelihoods


class Own(nn.Module):
    """A network that the library has never met: any inputs, any number of batch dimensions."""

    def __init__(self, in_dim: int, out: tuple[int, int]) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, math.prod(out))
        self.out = out

    def forward(self, *inputs: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        seen = torch.cat([x.expand(*batch, -1) for x in inputs], -1)
        return self.linear(seen).sin().unflatten(-1, self.out)


def mlp(in_dim: int, out: tuple[int, int]) -> nn.Module:
    return pv.networks.mlp(in_dim, out, hidden_dims=(6,), activation=nn.Tanh)


def gated(in_dim: int, out: tuple[int, int]) -> nn.Module:
    return pv.networks.gated_mlp(in_dim, out, hidden_dims=(6,))


def conv_encoder(in_dim: int, out: tuple[int, int]) -> nn.Module:
    return pv.networks.conv_encoder((2, in_dim // 2), out, channels=(3,), activation=nn.Tanh)


def conv_decoder(in_dim: int, out: tuple[int, int]) -> nn.Module:
    return pv.networks.conv_decoder(
        in_dim, out, image_shape=(2, 2), channels=(3,), activation=nn.Tanh
    )


NETWORKS: dict[str, tuple[Network, Network]] = {
    "mlp": (mlp, mlp),
    "gated": (gated, gated),
    "conv": (conv_encoder, conv_decoder),
    "own": (Own, Own),
}


# --- guides: the space of z, and what makes an encoder from a network and its input's size


def conditional(family: Any, num_params: int) -> Callable[[Network, int], nn.Module]:
    return lambda network, in_dim: pv.Conditional(network(in_dim, (num_params, Z)), family)


def iaf(network: Network, in_dim: int) -> nn.Module:
    base = conditional(wide(families.normal), 2)(network, in_dim)
    make = partial(transforms.conditional_affine_autoregressive, hidden_dims=ALIVE)
    return pv.ConditionalFlow(base, network(in_dim, (1, 3)), make, (Z, 3), num_transforms=1)


def wide(family: Any) -> Any:
    """Wider than the priors, so that no weight is large."""
    return partial(family, min_scale=0.7)


GUIDES: dict[str, tuple[str, Callable[[Network, int], nn.Module]]] = {
    "normal": ("plane", conditional(wide(families.normal), 2)),
    "lowrank": ("plane", conditional(wide(families.low_rank_normal), 3)),
    "full": ("plane", conditional(wide(families.full_normal), 1 + Z)),
    "iaf": ("plane", iaf),
    "projected": ("circle", conditional(families.projected_normal, 1)),
    "onehot": ("axes", conditional(families.one_hot, 1)),
    "bits": ("bits", conditional(families.bernoulli, 1)),
}
DISCRETE = ("axes", "bits")

# --- priors: the space of z, and what makes one from the encoder and some data

UNIT = families.inverse_softplus(1.0)
heavy = partial(families.student_t, df=8.0)
autoregressive_flow = partial(transforms.affine_autoregressive, hidden_dims=ALIVE)
spline = partial(transforms.spline_coupling, hidden_dims=[6], count_bins=4)


def gentle(prior: nn.Module) -> nn.Module:
    """With knots that a grid does not miss."""
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(0.4)
    return prior


PRIORS: dict[str, tuple[str | None, Callable[[nn.Module, Tensor], nn.Module]]] = {
    "standard": ("plane", lambda q, x: pv.priors.StandardNormal(Z)),
    "learned": ("plane", lambda q, x: pv.priors.Learned(families.normal, (2, Z), start=(0, UNIT))),
    "laplace": ("plane", lambda q, x: pv.priors.Learned(families.laplace, (2, Z))),
    "student": ("plane", lambda q, x: pv.priors.Learned(heavy, (2, Z))),
    "mixture": ("plane", lambda q, x: pv.priors.Mixture(families.normal, 3, (2, Z))),
    "vamp": (None, lambda q, x: pv.priors.VampPrior(q, x[:3])),  # whatever the guide's
    "flow": ("plane", lambda q, x: pv.priors.FlowPrior(Z, autoregressive_flow)),
    "spline": ("plane", lambda q, x: gentle(pv.priors.FlowPrior(Z, spline))),
    "labels": ("plane", lambda q, x: pv.Conditional(mlp(Y, (2, Z)), families.normal)),
    "sphere": ("circle", lambda q, x: pv.priors.UniformSphere(Z)),
    "onehot": ("axes", lambda q, x: pv.priors.Learned(families.one_hot, (1, Z))),
    "bits": ("bits", lambda q, x: pv.priors.Learned(families.bernoulli, (1, Z))),
}


# --- likelihoods: what makes one from a network and the latents' size, and its data


def levels(count: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randint(count, (size, D)).float()


def reals(size: int) -> Tensor:
    return torch.randn(size, D)


def units(size: int) -> Tensor:
    return 0.05 + 0.9 * torch.rand(size, D)


def counts(size: int) -> Tensor:
    return torch.poisson(torch.ones(size, D))


def of_total(total: int) -> Callable[[int], Tensor]:
    return lambda size: torch.eye(D)[torch.randint(D, (size, total))].sum(1)


def decoder(family: Any, num_params: int) -> Callable[[Network, int], nn.Module]:
    return lambda network, in_dim: pv.Conditional(network(in_dim, (num_params, D)), family)


def free_scale(network: Network, in_dim: int) -> nn.Module:
    free = pv.networks.with_free(network(in_dim, (1, D)), [0.5])
    return pv.Conditional(free, families.normal)


def autoregressive(network: Network, in_dim: int) -> nn.Module:
    return pv.Autoregressive(pv.networks.masked_mlp(D, in_dim, 1), families.bernoulli, D)


# Not ``projected_normal``, which has a density in two and three dimensions only.
LIKELIHOODS: dict[str, tuple[Callable[[Network, int], nn.Module], Callable[[int], Tensor]]] = {
    "normal": (decoder(families.normal, 2), reals),
    "fixed_normal": (decoder(families.fixed_normal, 1), reals),
    "free_normal": (free_scale, reals),
    "lowrank_normal": (decoder(families.low_rank_normal, 3), reals),
    "full_normal": (decoder(families.full_normal, 1 + D), reals),
    "laplace": (decoder(families.laplace, 2), reals),
    "fixed_laplace": (decoder(families.fixed_laplace, 1), reals),
    "student": (decoder(families.student_t, 3), reals),
    "continuous_bernoulli": (decoder(families.continuous_bernoulli, 1), units),
    "beta": (decoder(families.beta, 2), units),
    "bernoulli": (decoder(families.bernoulli, 1), levels(2)),
    "autoregressive": (autoregressive, levels(2)),
    "onehot": (decoder(families.one_hot, 1), of_total(1)),
    "binomial": (decoder(partial(families.binomial, total_count=3), 1), levels(4)),
    "categorical": (decoder(families.categorical, 3), levels(3)),
    "discretized": (decoder(partial(families.discretized, num_levels=4), 2), levels(4)),
    "mixture": (decoder(partial(families.discretized_mixture, num_levels=4), 6), levels(4)),
    "poisson": (decoder(families.poisson, 1), counts),
    "negbin": (decoder(families.negative_binomial, 2), counts),
    "zinb": (decoder(families.zero_inflated_negative_binomial, 3), counts),
    "multinomial": (decoder(partial(families.multinomial, total_count=3), 1), of_total(3)),
}


# --- a pair, and the spaces of z


def space_of(choice: Choice) -> str:
    """Where z lies, as the prior says."""
    return PRIORS[choice.prior][0] or GUIDES[choice.guide][0]


def fits(choice: Choice) -> bool:
    """Whether prior and guide are on the same space."""
    return space_of(choice) == GUIDES[choice.guide][0]


def make(choice: Choice, size: int = 5) -> tuple[pv.Model, pv.Guide, tuple[Tensor, ...]]:
    """The pair, with small weights: posteriors are near the priors; and its arguments."""
    for_guide, for_likelihood = NETWORKS[choice.network]
    context = Y if choice.prior == "labels" else 0
    make_likelihood, values = LIKELIHOODS[choice.likelihood]
    x = values(size)
    encoder = GUIDES[choice.guide][1](for_guide, D + context)
    prior = PRIORS[choice.prior][1](encoder, x)
    model = pv.Model(prior, make_likelihood(for_likelihood, Z + context))
    guide = pv.Guide(encoder)
    with torch.no_grad():
        for parameter in nn.ModuleList([model, guide]).parameters():
            parameter.mul_(0.25)
    # Pyro's inverses of autoregressive transforms know float32 alone.
    inverts = choice.prior == "flow" or (choice.prior, choice.guide) == ("vamp", "iaf")
    dtype = torch.float32 if inverts else torch.float64
    args = (x, torch.eye(Y)[torch.arange(size) % Y]) if context else (x,)
    return model.to(dtype), guide.to(dtype), tuple(a.to(dtype) for a in args)


@cache
def quadrature(space: str) -> tuple[Tensor, Tensor]:
    """Points (M, Z) of a space and the logarithms of their weights (M,)."""
    if space == "plane":  # the steps grow outwards, for heavy tails
        t = torch.linspace(-3.5, 3.5, 101, dtype=torch.float64)
        weights = t.cosh() * (t[1] - t[0])
        points = torch.cartesian_prod(t.sinh(), t.sinh())
        return points, torch.cartesian_prod(weights, weights).log().sum(-1)
    if space == "circle":
        angles = torch.arange(300, dtype=torch.float64) * (2 * math.pi / 300)
        points = torch.stack([angles.cos(), angles.sin()], -1)
        return points, torch.full((300,), math.log(2 * math.pi / 300), dtype=torch.float64)
    bit = torch.tensor([0.0, 1.0], dtype=torch.float64)
    points = torch.eye(Z).double() if space == "axes" else torch.cartesian_prod(bit, bit)
    return points, torch.zeros(len(points), dtype=torch.float64)


# --- few combinations that hold every pair


def covering(factors: Sequence[Iterable[str]], allowed: Callable[[Choice], bool]) -> list[Choice]:
    """Few allowed combinations in which every pair occurs that some allowed one holds.

    Greedy: for the first pair that is still missing, the combination with the most missing pairs.
    """
    every = [choice for c in product(*factors) if allowed(choice := Choice(*c))]
    random.Random(0).shuffle(every)  # ties are spread over all factors
    holding: dict[Any, list[Choice]] = {}
    for choice in every:
        for pair in pairs(choice):
            holding.setdefault(pair, []).append(choice)
    # The rarest pairs first: the others find room beside them.
    missing = dict.fromkeys(sorted(holding, key=lambda pair: len(holding[pair])))
    chosen = []
    while missing:
        choices = holding[next(iter(missing))]
        chosen.append(max(choices, key=lambda c: sum(pair in missing for pair in pairs(c))))
        for pair in pairs(chosen[-1]):
            missing.pop(pair, None)
    return chosen


def pairs(choice: Choice) -> list[Any]:
    """The pairs of choices from two different factors."""
    return list(combinations(enumerate(choice), 2))


FACTORS = (PRIORS, LIKELIHOODS, GUIDES, NETWORKS)
EVERY = [Choice(*c) for c in product(*FACTORS)]
ACCEPTED = covering(FACTORS, fits)
# Each prior with each guide that is on another space, with likelihoods and networks in turn.
REFUSED = [
    Choice(prior, list(LIKELIHOODS)[i % len(LIKELIHOODS)], guide, list(NETWORKS)[i % len(NETWORKS)])
    for i, (prior, guide) in enumerate(product(PRIORS, GUIDES))
    if not fits(Choice(prior, "normal", guide, "mlp"))
]
