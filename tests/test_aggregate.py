"""The aggregate posterior of any pair: against each datum's guide alone; and pairs without one."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import (
    bernoulli_latents,
    bernoulli_pair,
    bits,
    double_bits,
    hierarchical_pair,
    library_pair,
    masked_pair,
    store_pair,
)
from pyro import poutine
from pyro.distributions import transforms
from torch import Tensor
from weights import WEIGHABLE

import pyro_vae as pv
from pyro_vae.context import at_rest
from pyro_vae.evidence import aggregate
from pyro_vae.evidence.aggregate import AggregatePosterior
from pyro_vae.evidence.particles import Pair
from pyro_vae.inference.handlers import latent_sites


def drawn(make: Any, **options: Any) -> tuple[Pair, Any, AggregatePosterior]:
    """A pair, draws of its guide, and the aggregate posterior."""
    model, guide, args = make()
    plate = "data" if make is masked_pair else None
    with at_rest(model, guide):
        pair = Pair(model, guide, args, plate)
        trace, _ = pair.draw(args, 3)
    made = AggregatePosterior(pair, args, trace, by_dimension=False, latents=21, **options)
    return pair, trace, made


@pytest.mark.parametrize("make", [*WEIGHABLE, bernoulli_latents], ids=lambda m: m.__name__)
def test_latents_are_scored_under_the_guide_of_every_datum(make):
    """The same latents with the data moved on by one place, seven times: no plate of particles."""
    pair, trace, made = drawn(make, compile=False)
    found, dimensions = made.log_density(trace)
    assert found.shape == (3, 7)
    assert dimensions is None
    each = torch.empty(7, 3, 7, dtype=torch.float64)
    for places in range(7):
        args = tuple(a.roll(places, 0) if isinstance(a, Tensor) else a for a in pair.args)
        for k in range(3):
            part: Any = poutine.util.prune_subsample_sites(pair.part(trace, slice(k, k + 1)))
            for name, site in latent_sites(part):  # without the dimension of particles
                axis = site["value"].dim() - site["fn"].event_dim - 1 - pair.nesting
                part.nodes[name] = {**site, "value": site["value"].squeeze(axis)}
            with torch.no_grad(), pyro.validation_enabled(is_validate=False):
                alone = poutine.trace(poutine.replay(pair.guide, trace=part)).get_trace(*args)
            each[places, k] = one_each(alone, pair.dim)
    torch.testing.assert_close(found, each.logsumexp(0) - math.log(7), rtol=0, atol=1e-10)


def one_each(trace: Any, dim: int) -> Tensor:
    """The log-density of each datum's latents in a trace without particles."""
    total = torch.zeros(7, dtype=torch.float64)
    for _, site in latent_sites(trace):
        log_q = site["fn"].log_prob(site["value"])
        total = total + log_q.movedim(log_q.dim() + dim, 0).reshape(7, -1).sum(1)
    return total


# Bytes that make chunks of some tens of latents, and not all of one size.
SMALL = {library_pair: 1 << 17, hierarchical_pair: 1 << 24}


@pytest.mark.parametrize("make", SMALL, ids=lambda m: m.__name__)
def test_memory_changes_no_number(make, monkeypatch):
    model, guide, _ = make()
    x = double_bits(130)
    whole = pv.elbo_parts(model, guide, x, num_particles=2)
    monkeypatch.setitem(aggregate.MEMORY_BUDGET, "cpu", SMALL[make])
    parts = pv.elbo_parts(model, guide, x, num_particles=2)
    torch.testing.assert_close(
        parts.mutual_information.value, whole.mutual_information.value, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "make", [library_pair, hierarchical_pair, store_pair, masked_pair], ids=lambda m: m.__name__
)
def test_a_kernel_says_the_same(make, monkeypatch):
    """Blocks of another size go without it, and chunks are filled up."""
    shapes = []

    def lower(captured: Any, static: Any, data: Any) -> Any:
        shapes.append([tuple(t.shape) for t in data])
        return torch.no_grad()(
            lambda arguments: captured.module(*static, *arguments, *captured.reached)
        )

    monkeypatch.setattr(aggregate, "lower", lower)
    monkeypatch.setitem(aggregate.MEMORY_BUDGET, "cpu", SMALL.get(make, 1 << 17))
    model, guide, _ = make()
    x = double_bits(130)
    args = (x, torch.rand(130, 9) < 0.7) if make is masked_pair else (x,)
    options: Any = {"num_particles": 2, "data_plate": "data" if make is masked_pair else None}
    expected = pv.elbo_parts(model, guide, *args, **options, compile=False)
    assert not shapes
    found = pv.elbo_parts(model, guide, *args, **options, compile=True)
    assert len(shapes) == 1
    torch.testing.assert_close(found.rate.value, expected.rate.value)
    torch.testing.assert_close(
        found.mutual_information.value, expected.mutual_information.value, rtol=0, atol=1e-10
    )
    monkeypatch.setattr(aggregate, "WORTH_COMPILING", 1e-6)
    pv.elbo_parts(model, guide, *args, **options)
    assert len(shapes) == 2


@pytest.mark.slow
def test_compiled_equals_uncompiled():
    model, guide, _ = library_pair()
    x = double_bits(130)
    one, other = (pv.elbo_parts(model, guide, x, compile=c) for c in (False, True))
    assert one.total_correlation is not None
    assert other.total_correlation is not None
    for a, b in (
        (one.mutual_information, other.mutual_information),
        (one.total_correlation, other.total_correlation),
    ):
        torch.testing.assert_close(a.value, b.value, rtol=0, atol=1e-10)


def test_flows_are_inverted():
    model, _ = bernoulli_pair()
    base = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)
    make = transforms.conditional_affine_autoregressive
    guide = pv.Guide(pv.ConditionalFlow(base, pv.networks.mlp(9, (1, 4)), make, (2, 4)))
    found = pv.elbo_parts(model, guide, bits(15), num_particles=20)
    assert -0.05 < found.mutual_information.mean < math.log(15)
    assert found.total_correlation is None
    assert found.kl_per_dim.isnan().all()


def test_the_random_state_is_left_alone_and_seeds_count():
    pair, x = bernoulli_pair(), bits(5)
    state = torch.get_rng_state()
    first, same, other = (pv.elbo_parts(*pair, x, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.elbo.value, same.elbo.value)
    assert not torch.equal(first.elbo.value, other.elbo.value)


# --- bad input


def test_a_guide_that_scores_its_own_draws_alone_is_refused():
    model, _ = bernoulli_pair()
    planar = transforms.Planar(2)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[:, :2], 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [planar]))

    with pytest.raises(ValueError, match="can't score a value that it did not draw"):
        pv.elbo_parts(model, guide, bits(5))


def test_points_have_no_rate():
    model, _ = bernoulli_pair()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :2], event_dim=1))

    with pytest.raises(ValueError, match=r"site 'z': .*\(Delta\) without a density"):
        pv.elbo_parts(model, guide, bits(5))


def test_latents_that_the_model_sums_out_are_named():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            half = torch.tensor(0.5)
            y = pyro.sample("y", dist.Bernoulli(half), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="site 'y' is summed out by the model"):
        pv.elbo_parts(model, guide, torch.randn(5))


def test_latents_that_all_data_share_are_refused():
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(0.5, 0.5))

    with pytest.raises(ValueError, match="site 'mean' is a latent outside the plate"):
        pv.elbo_parts(model, guide, torch.randn(7))


def test_what_is_too_little_is_refused():
    with pytest.raises(ValueError, match="expected at least 2 data, got 1"):
        pv.elbo_parts(*bernoulli_pair(), bits(1))
    with pytest.raises(ValueError, match=r"at least 2 for elbo_parts.* got 1"):
        pv.elbo_parts(*bernoulli_pair(), bits(5), num_particles=1)


def test_parameters_that_are_nan_are_named_by_their_site():
    model, guide = bernoulli_pair()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(ValueError, match="site 'z'"):
        pv.elbo_parts(model, guide, bits(5))
