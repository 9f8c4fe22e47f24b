"""Hamiltonian moves: reversible, exact in the limit of small steps, and true to their density."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian
from torch import Tensor

from pyro_vae.evidence.hmc import Kinetics, leapfrog, move, tune
from pyro_vae.evidence.particles import Pair
from pyro_vae.evidence.path import resting
from pyro_vae.evidence.target import Space, State, mix, supports_of


def space_of(pair: LinearGaussian, x: Tensor, chains: int, inflation: float = 1.3) -> Space:
    def guide(x: Tensor) -> None:
        pair.guide(x, inflation)

    found = Pair(pair.model, guide, (x,), None)
    return Space(found, chains, supports_of(found))


def start(space: Space) -> State:
    return space.state(space.flat(space.template), space.pair.args)


def energy(state: State, momentum: Tensor, beta: float) -> Tensor:
    return 0.5 * momentum.square().sum(-1) - mix(beta, state.log_q, state.log_p)


@pytest.fixture
def pair():
    return LinearGaussian.random(dim=5, latent_dim=3)


def test_densities_and_gradients_are_those_of_the_pair(pair):
    x = pair.sample(4)
    space = space_of(pair, x, chains=6)
    state = start(space)
    z = state.u
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    likelihood = dist.Normal(z @ pair.weight.T + pair.bias, pair.scale).log_prob(x).sum(-1)
    torch.testing.assert_close(state.log_p, prior + likelihood, rtol=0, atol=1e-11)
    torch.testing.assert_close(state.log_q, pair.posterior(x, 1.3).log_prob(z), rtol=0, atol=1e-11)
    residual = x - z @ pair.weight.T - pair.bias
    gradient = residual @ pair.weight / pair.scale**2 - z
    torch.testing.assert_close(state.grad_p, gradient, rtol=0, atol=1e-10)
    q = pair.posterior(x, 1.3)
    gradient = -(q.precision_matrix @ (z - q.loc).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(state.grad_q, gradient, rtol=0, atol=1e-10)


def test_a_trajectory_leads_back_when_its_momenta_are_turned(pair):
    space = space_of(pair, pair.sample(4), chains=6)
    state = start(space)
    momentum = torch.randn_like(state.u)
    options = {
        "beta": 0.7,
        "step": torch.full((4, 1), 0.11).double(),
        "scale": torch.rand(4, 3).double() + 0.5,
        "count": 25,
    }
    there, turned = leapfrog(space.state, space.pair.args, state, momentum, **options)
    assert (there.u - state.u).abs().max() > 0.5
    back, again = leapfrog(space.state, space.pair.args, there, -turned, **options)
    torch.testing.assert_close(back.u, state.u, rtol=0, atol=1e-11)
    torch.testing.assert_close(again, -momentum, rtol=0, atol=1e-11)


def test_the_error_of_the_energy_falls_as_the_square_of_the_step(pair):
    space = space_of(pair, pair.sample(4), chains=6)
    state = start(space)
    momentum = torch.randn_like(state.u)
    errors = []
    for halvings in range(4):
        there, turned = leapfrog(
            space.state,
            space.pair.args,
            state,
            momentum,
            1.0,
            step=torch.full((4, 1), 0.05 / 2**halvings).double(),
            scale=torch.ones(4, 3).double(),
            count=8 * 2**halvings,
        )
        error = energy(there, turned, 1.0) - energy(state, momentum, 1.0)
        errors.append(error.abs().mean().item())
    ratios = [big / small for big, small in itertools.pairwise(errors)]
    assert ratios[-1] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_moves_leave_their_density_invariant(pair, beta):
    """Between two normals every density of the path is normal: its mean and covariance."""
    x = pair.sample(2)
    p, q = pair.posterior(x), pair.posterior(x, 1.3)
    precision = beta * p.precision_matrix + (1 - beta) * q.precision_matrix
    between = dist.MultivariateNormal(p.loc, precision_matrix=precision)
    chains = 4_000
    space = space_of(pair, x, chains)
    with resting(space.pair, "test"):
        state = space.state(between.sample((chains,)), space.pair.args)
        kinetics = Kinetics(torch.full((2,), 0.3).double(), torch.ones(2, 3).double())
        result = move(space.state, space.pair.args, state, beta, kinetics, 4)
        for _ in range(4):
            state = result.state
            result = move(space.state, space.pair.args, state, beta, kinetics, 4)
        state = result.state
    assert 0.5 < result.acceptance.mean() < 0.99  # so that refusals count
    away = torch.linalg.solve_triangular(
        between.scale_tril, (state.u - between.loc).unsqueeze(-1), upper=False
    ).squeeze(-1)
    assert away.mean(0).abs().max() < 4.5 / math.sqrt(chains)
    covariance = torch.einsum("kni,knj->nij", away, away) / chains
    assert (covariance - torch.eye(3).double()).abs().max() < 4.5 * math.sqrt(2 / chains)


def test_the_pilot_run_reaches_the_acceptance_that_it_is_asked_for(pair):
    x = torch.cat([pair.sample(3), 5 * pair.sample(3)])
    space = space_of(pair, x, chains=16)
    with resting(space.pair, "test"):
        state, found = tune(
            space.state, (x,), start(space), [1.0] * 20, acceptance=0.65, count=4, moves=5
        )
        shares = []
        for _ in range(60):
            result = move(space.state, (x,), state, 1.0, found[-1], 4)
            state = result.state
            shares.append(result.acceptance)
    reached = torch.stack(shares).mean((0, 1))
    assert abs(reached.mean() - 0.65) < 0.12
    assert reached.min() > 0.3
    assert reached.max() < 0.95


def test_the_pilot_run_finds_the_scales_of_the_latents():
    """A latent that the data pin down moves in steps of its own size."""
    pair = LinearGaussian(
        torch.tensor([[20.0, 0.0], [0.0, 0.2]]).double(), torch.zeros(2).double(), 1.0
    )
    x = pair.sample(5)
    space = space_of(pair, x, chains=16)
    with resting(space.pair, "test"):
        _, found = tune(
            space.state, (x,), start(space), [1.0] * 20, acceptance=0.65, count=4, moves=5
        )
    ratio = found[-1].scale / pair.posterior(x).stddev
    assert ratio.min() > 0.6
    assert ratio.max() < 1.6


def test_a_trajectory_to_where_nothing_is_finite_is_refused_and_counted():
    def cliff(z: Tensor) -> Tensor:
        return torch.where(z.abs() < 1.0, 0.0, torch.nan)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(cliff(z), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 0.1))

    x = torch.zeros(3).double()
    pair = Pair(model, guide, (x,), None)
    with resting(pair, "test"):
        space = Space(pair, 50, supports_of(pair))
        state = start(space)
        kinetics = Kinetics(torch.full((3,), 3.0).double(), torch.ones(3, 1).double())
        result = move(space.state, (x,), state, 1.0, kinetics, 3)
    assert result.divergent.any()
    assert (result.acceptance[result.divergent] == 0).all()
    assert torch.equal(result.state.u[result.divergent], state.u[result.divergent])
    assert result.state.log_p.isfinite().all()
