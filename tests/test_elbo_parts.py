"""The parts of the ELBO: against integrals over the aggregate posterior, and exhaustive sums."""

import math
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import bernoulli_latents, hierarchical_pair, library_pair
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evidence.dimensions import activity

Parts = dict[str, float]


def normal_pair(loc: Tensor, scale: Tensor) -> tuple[Any, Any]:
    """Data by their index: q(z|n) = N(loc_n, scale_n^2), p(z) = N(0, I), p(x|z) = N(sum z, 1)."""

    def model(n: Tensor, x: Tensor) -> None:
        zeros = torch.zeros(loc.shape[1], dtype=loc.dtype)
        with pyro.plate("data", len(n)):
            z = pyro.sample("z", dist.Normal(zeros, zeros + 1).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(n: Tensor, x: Tensor) -> None:
        with pyro.plate("data", len(n)):
            pyro.sample("z", dist.Normal(loc[n], scale[n]).to_event(1))

    return model, guide


def by_integrals(loc: Tensor, scale: Tensor, x: Tensor) -> Parts:
    """All parts for two latent dimensions, on a grid and in closed form."""
    grid = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    step = grid[1] - grid[0]
    each = dist.Normal(loc.unsqueeze(-1), scale.unsqueeze(-1)).log_prob(grid).exp()  # (N, 2, G)
    marginal = each.mean(0)
    joint = torch.einsum("ng,nh->gh", each[:, 0], each[:, 1]) / len(loc)
    prior = dist.Normal(0.0, 1.0).log_prob(grid)

    def integral(density: Tensor, values: Tensor, area: Tensor) -> float:
        return (torch.where(density > 0, density * values, 0.0).sum() * area).item()

    product = marginal[0].unsqueeze(1) * marginal[1]
    marginal_kl = integral(joint, joint.log() - prior.unsqueeze(1) - prior, step**2)
    rates = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log())
    distortion = 0.5 * ((x - loc.sum(1)).square() + scale.square().sum(1) + math.log(2 * math.pi))
    rate = rates.sum(1).mean().item()
    return {
        "elbo": -distortion.mean().item() - rate,
        "distortion": distortion.mean().item(),
        "rate": rate,
        "mutual_information": rate - marginal_kl,
        "marginal_kl": marginal_kl,
        "total_correlation": integral(joint, joint.log() - product.log(), step**2),
        "dimension_kl": sum(integral(m, m.log() - prior, step) for m in marginal),
    }


@pytest.fixture
def few() -> tuple[Tensor, Tensor, Tensor]:
    """Locations and scales of six data, whose codes overlap and lie along a line."""
    torch.manual_seed(0)
    along = torch.linspace(-2, 2, 6, dtype=torch.float64)
    loc = torch.stack([along, 0.7 * along + 0.2], 1)
    return loc, 0.3 + torch.rand(6, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)


def test_every_part_is_the_integral(few):
    loc, scale, x = few
    found = pv.elbo_parts(*normal_pair(loc, scale), torch.arange(6), x, num_particles=4_000)
    truth = by_integrals(loc, scale, x)
    assert truth["total_correlation"] > 0.2
    assert truth["mutual_information"] < math.log(6) - 0.3
    for name, value in truth.items():
        part = getattr(found, name)
        assert part.mean_standard_error < 0.03
        assert part.mean == pytest.approx(value, abs=4 * part.mean_standard_error), name
    rates = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log())
    assert ((found.kl_per_dim - rates.mean(0)).abs() < 4 * found.kl_per_dim_error).all()
    torch.testing.assert_close(found.activity, loc.var(0))
    assert found.activity_error.max() < 1e-9


def test_the_errors_are_those_that_are_made(few):
    """Few draws: unbiased, and as far off as the standard errors say."""
    loc, scale, x = few
    truth = by_integrals(loc, scale, x)
    pair = normal_pair(loc, scale)
    runs = [pv.elbo_parts(*pair, torch.arange(6), x, num_particles=5, seed=s) for s in range(150)]
    for name in ("distortion", "mutual_information", "marginal_kl", "total_correlation"):
        parts = [getattr(run, name) for run in runs]
        errors = torch.tensor([part.mean - truth[name] for part in parts])
        said = torch.tensor([part.mean_standard_error for part in parts])
        assert abs(errors.mean()) < 3.5 * errors.std() / 150**0.5, name
        assert 0.8 < errors.std() / said.square().mean().sqrt() < 1.25, name


def test_the_parts_add_up_for_every_datum():
    torch.manual_seed(0)
    model, guide, _ = library_pair()
    x = (torch.rand(130, 9) < 0.5).double()
    found = pv.elbo_parts(model, guide, x, num_particles=25)
    assert found.marginal_kl is not None
    assert found.total_correlation is not None
    assert found.dimension_kl is not None
    for whole, parts in (
        (found.elbo, (-found.distortion.value, -found.rate.value)),
        (found.rate, (found.mutual_information.value, found.marginal_kl.value)),
        (found.marginal_kl, (found.total_correlation.value, found.dimension_kl.value)),
    ):
        torch.testing.assert_close(whole.value, sum(parts), rtol=0, atol=1e-10)
        assert whole.value.shape == (130,)
    assert found.kl_per_dim.sum().item() == pytest.approx(found.rate.mean)
    bound = pv.log_evidence(model, guide, x, num_particles=2_000).elbo.mean().item()
    assert found.elbo.mean == pytest.approx(bound, abs=4 * found.elbo.mean_standard_error + 5e-3)


def test_one_latent_dimension_has_no_total_correlation():
    loc = torch.linspace(-1, 1, 5, dtype=torch.float64).unsqueeze(1)
    found = pv.elbo_parts(
        *normal_pair(loc, loc * 0 + 0.5), torch.arange(5), torch.zeros(5).double()
    )
    assert found.total_correlation is not None
    assert found.total_correlation.value.abs().max() < 1e-12


def test_discrete_latents_by_summing_over_all_values():
    model, guide, (x,) = bernoulli_latents()
    found = pv.elbo_parts(model, guide, x, num_particles=4_000)
    states = torch.tensor(list(product([0.0, 1.0], repeat=3))).double()
    slope = pyro.param("slope").detach()
    log_q = dist.Bernoulli(logits=(x @ slope).unsqueeze(1)).to_event(1).log_prob(states)  # (7, 8)
    aggregate = log_q.exp().mean(0)
    entropy = -(aggregate * aggregate.log()).sum()
    information = (log_q.exp() * (log_q - aggregate.log())).sum(1).mean()
    marginal_kl = 3 * math.log(2) - entropy
    assert found.marginal_kl is not None
    for part, truth in (
        (found.mutual_information, information),
        (found.marginal_kl, marginal_kl),
    ):
        assert part.mean == pytest.approx(truth.item(), abs=4 * part.mean_standard_error)
        assert truth > 0.05
    torch.testing.assert_close(found.activity, (x @ slope).sigmoid().var(0))


def test_two_levels_are_one_joint_latent():
    """A chain of normals: the aggregate is a mixture of two-dimensional normals."""
    loc = torch.tensor([-1.5, 0.0, 1.0], dtype=torch.float64)

    def model(n: Tensor) -> None:
        with pyro.plate("data", len(n)):
            u = pyro.sample("u", dist.Normal(loc.new_zeros(()), 1.0))
            z = pyro.sample("z", dist.Normal(u, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=loc[n])

    def guide(n: Tensor) -> None:
        with pyro.plate("data", len(n)):
            u = pyro.sample("u", dist.Normal(loc[n], 0.8))
            pyro.sample("z", dist.Normal(0.5 * u + loc[n], 0.6))

    found = pv.elbo_parts(model, guide, torch.arange(3), num_particles=4_000)
    grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
    u, z = grid.unsqueeze(1), grid
    log_q = torch.stack(
        [dist.Normal(m, 0.8).log_prob(u) + dist.Normal(0.5 * u + m, 0.6).log_prob(z) for m in loc]
    )
    log_p = dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(u, 1.0).log_prob(z)
    aggregate = log_q.exp().mean(0)
    step = (grid[1] - grid[0]) ** 2
    marginal_kl = (aggregate * (aggregate.log() - log_p)).nan_to_num().sum() * step
    rate = (log_q.exp() * (log_q - log_p)).sum((1, 2)).mean() * step
    assert found.marginal_kl is not None
    for part, truth in (
        (found.rate, rate),
        (found.marginal_kl, marginal_kl),
        (found.mutual_information, rate - marginal_kl),
    ):
        assert part.mean == pytest.approx(truth.item(), abs=4 * part.mean_standard_error)
    assert found.total_correlation is None
    assert "one latent site" in str(found)
    assert found.dims == {"u": 1, "z": 1}
    assert found.kl_per_dim.sum().item() == pytest.approx(found.rate.mean)
    # z has the mean 1.5 loc; given a draw of u it is known better than by draws of z alone.
    exact = torch.stack([loc.var(), (1.5 * loc).var()])
    assert ((found.activity - exact).abs() < 4 * found.activity_error + 1e-9).all()


def test_a_prior_of_each_datum_has_no_marginal_kl():
    loc = torch.randn(6, 1, dtype=torch.float64)

    def model(n: Tensor) -> None:
        with pyro.plate("data", len(n)):
            z = pyro.sample("z", dist.Normal(0.5 * loc[n], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=loc[n, 0])

    def guide(n: Tensor) -> None:
        with pyro.plate("data", len(n)):
            pyro.sample("z", dist.Normal(loc[n], 0.7).to_event(1))

    found = pv.elbo_parts(model, guide, torch.arange(6), num_particles=500)
    assert (found.marginal_kl, found.total_correlation, found.dimension_kl) == (None, None, None)
    assert "the prior differs from datum to datum" in str(found)
    rate = 0.5 * (0.25 * loc.square() + 0.49 - 1).mean().item() - math.log(0.7)
    assert found.rate.mean == pytest.approx(rate, abs=4 * found.rate.mean_standard_error)
    assert 0 < found.mutual_information.mean < math.log(6)


# --- used and unused latents


@pytest.mark.parametrize("known", [True, False])
def test_active_latents_are_those_that_the_data_move(known):
    """With means that are known, and with a refined guide, of which only draws are."""
    torch.manual_seed(0)
    loc = torch.randn(80, 4, dtype=torch.float64) * torch.tensor([1.0, 0.5, 0.02, 0.0]).double()
    scale = torch.tensor([0.3, 0.6, 1.0, 1.0]).double().expand(80, 4)
    pair, args = normal_pair(loc, scale), (torch.arange(80), loc.sum(1))
    if not known:
        model, guide, *args = pv.refine(*pair, *args, steps=1, learning_rate=0.0)
        pair = (model, guide)
    found = pv.elbo_parts(*pair, *args, num_particles=40)
    assert found.active.tolist() == [True, True, False, False]
    assert (found.activity_error.max().item() > 1e-9) != known
    error = 4 * found.activity_error + 1e-9
    assert ((found.activity - loc.var(0)).abs() < error).all()
    assert "2 of 4 latent dimensions are used" in str(found)
    assert "collapsed" not in str(found)
    rates = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).mean(0)
    assert ((found.kl_per_dim - rates).abs() < 4 * found.kl_per_dim_error + 1e-9).all()
    assert found.total_correlation is not None


def test_the_error_of_an_activity_is_the_one_that_is_made():
    """Of draws alone, of a latent at the prior and of one that the data move."""
    torch.manual_seed(0)
    loc = torch.stack([torch.zeros(100), torch.linspace(-2, 2, 100)], 1).double()
    draws = loc + torch.randn(400, 4, 100, 2).double()
    found, said = zip(*(activity(d.mean(0), d.var(0) / 4, 4) for d in draws), strict=True)
    errors = torch.stack(found) - loc.var(0)
    made = errors.std(0)
    assert (errors.mean(0).abs() < 3.5 * made / 20).all()
    ratio = torch.stack(said).square().mean(0).sqrt() / made
    assert ((ratio > 0.85) & (ratio < 1.2)).all()


@pytest.mark.parametrize(("scale", "collapsed"), [(1.0, True), (0.3, False)])
def test_a_guide_that_ignores_the_data_is_said_to(scale, collapsed):
    loc = torch.zeros(20, 3, dtype=torch.float64)
    found = pv.elbo_parts(
        *normal_pair(loc, loc + scale), torch.arange(20), torch.zeros(20).double()
    )
    printed = str(found)
    assert found.collapsed == collapsed
    assert "0 of 3 latent dimensions are used" in printed
    assert ("The posterior has collapsed: the rate is 0.00 nats" in printed) == collapsed
    assert ("pv.FreeBits" in printed) == collapsed
    assert ("is the same for all data but is not the prior" in printed) != collapsed


def test_codes_apart_are_cut_off_at_the_logarithm_of_their_number():
    loc = 100 * torch.arange(8, dtype=torch.float64).unsqueeze(1)
    found = pv.elbo_parts(
        *normal_pair(loc, loc * 0 + 0.5), torch.arange(8), torch.zeros(8).double()
    )
    assert found.mutual_information.mean == pytest.approx(math.log(8), abs=1e-12)
    assert "near log N = 2.08" in str(found)


def test_the_printed_table_has_a_row_for_every_part():
    model, guide, (x,) = library_pair()
    lines = str(pv.elbo_parts(model, guide, x)).splitlines()
    assert lines[0] == "nats per datum; 7 data, 5 particles"
    names = [line.partition("+-")[0].rpartition("  ")[0].strip() for line in lines[1:8]]
    assert names == [
        "ELBO",
        "distortion",
        "rate",
        "mutual information",
        "marginal KL",
        "total correlation",
        "dimension-wise KL",
    ]
    assert len({line.index(".") for line in lines[1:8]}) == 1  # the points stand in a column
    model, guide, args = hierarchical_pair()
    assert len(str(pv.elbo_parts(model, guide, *args)).splitlines()) == 1 + 5 + 2
