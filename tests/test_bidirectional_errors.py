"""What bounds from both sides refuse, and what their errors mean."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evidence.chains import Tally, Walk


def guide(x: Tensor, *_: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))


def shifted(x: Tensor, shift: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)


def test_an_argument_that_only_equals_the_data_stays():
    zeros = torch.zeros(4)
    bounds = pv.bidirectional(shifted, guide, zeros, zeros.clone(), temperatures=3)
    simulated, shift = bounds.data
    assert torch.equal(shift, zeros)
    assert not torch.equal(simulated, zeros)


def test_which_of_two_equal_arguments_is_observed_has_to_be_known():
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=1.0 * x)

    with pytest.raises(ValueError, match=r"equals the arguments \[0, 1\]"):
        pv.bidirectional(model, guide, torch.ones(4), torch.ones(4))


def test_a_model_that_computes_with_what_it_observes_is_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + x.mean(), 0.5), obs=x)

    with pytest.raises(ValueError, match="argument 0: the model computes with a value"):
        pv.bidirectional(model, guide, torch.randn(4), temperatures=1)


def test_one_argument_can_not_hold_what_two_sites_simulate():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("first", dist.Normal(z, 0.5), obs=x)
            pyro.sample("other", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="sites 'first' and 'other' both observe argument 0"):
        pv.bidirectional(model, guide, torch.randn(4), temperatures=1)


def test_a_factor_says_nothing_of_how_data_come_about():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            pyro.factor("more", -z.square())

    with pytest.raises(ValueError, match=r"'more' is a pyro\.factor"):
        pv.bidirectional(model, guide, torch.randn(4))


def test_the_error_of_the_mean_gap_is_its_scatter():
    """Few temperatures: chains that begin together agree, and the gap scatters all the same."""
    pair = LinearGaussian.random(dim=10, latent_dim=5)

    def wide(x: Tensor) -> None:
        pair.guide(x, 3.0)

    options: dict[str, Any] = {"num_chains": 8, "temperatures": 4, "leapfrog_steps": 1}
    found = [
        pv.bidirectional(pair.model, wide, torch.zeros(60, 10).double(), seed=seed, **options)
        for seed in range(12)
    ]
    means = torch.tensor([bounds.mean_gap for bounds in found])
    claimed = torch.tensor([bounds.mean_standard_error for bounds in found]).mean()
    assert 0.5 < means.std() / claimed < 1.7


@pytest.mark.parametrize("sign", [1, -1])
def test_the_bias_of_an_estimate_from_above_is_positive(sign):
    """Lognormal weights of mean one, or reciprocals of such: log p(x) is 0."""
    torch.manual_seed(0)
    width = 0.6
    log_w = sign * (width * torch.randn(16, 20_000).double() - width**2 / 2)
    tally = Tally(len(log_w), sign=sign)
    tally.walked([Walk(log_w, torch.ones(20_000).double(), torch.zeros(20_000).double())])
    found = tally.estimate("", "known weights", moves=0, gradients=0)
    assert found.bias * sign < 0
    assert found.mean == pytest.approx(found.bias, abs=4 * found.mean_standard_error)
