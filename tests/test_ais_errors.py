"""What annealing refuses, and how it says so."""

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian, bernoulli_latents, library_pair
from torch import Tensor

import pyro_vae as pv


def normal_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_discrete_latents_are_refused_with_what_holds_for_them():
    model, guide, (x,) = bernoulli_latents()
    with pytest.raises(ValueError, match=r"'z' is discrete \(Bernoulli\).*log_evidence"):
        pv.ais(model, guide, x)


def test_a_fixed_value_is_no_place_to_start():
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x))

    with pytest.raises(ValueError, match="'z': the guide gives it a fixed value"):
        pv.ais(normal_model, guide, torch.randn(3))


def test_a_sphere_has_no_map_from_the_reals():
    encoder = pv.Conditional(pv.networks.mlp(4, (1, 3)), pv.families.projected_normal)
    likelihood = pv.Conditional(pv.networks.mlp(3, (1, 4)), pv.families.bernoulli)
    model, guide = pv.Model(pv.priors.UniformSphere(3), likelihood), pv.Guide(encoder)
    with pytest.raises(ValueError, match="'z': no map from the reals"):
        pv.ais(model, guide, torch.ones(3, 4))


def test_a_guide_on_a_part_of_the_priors_support_is_refused():
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))

    with pytest.raises(ValueError, match=r"'z': the guide's LogNormal is over .*would never reach"):
        pv.ais(normal_model, guide, torch.randn(3))


def test_latents_outside_the_data_plate_are_refused():
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))

    with pytest.raises(ValueError, match="'mean' is a latent outside the plate 'data'"):
        pv.ais(model, guide, torch.randn(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_particles: expected at least 1"),
        ({"temperatures": 0}, "temperatures: expected at least 1, got 0"),
        ({"temperatures": torch.tensor([0.0, 0.5])}, "rises from 0 to 1"),
        ({"temperatures": torch.tensor([0.0, 0.5, 0.4, 1.0])}, "rises from 0 to 1"),
        ({"leapfrog_steps": 0}, "leapfrog_steps: expected at least 1"),
        ({"acceptance": 1.0}, "acceptance: expected a share between 0 and 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str):
    model, guide, (x,) = library_pair()
    with pytest.raises(ValueError, match=message):
        pv.ais(model, guide, x, **options)


def test_a_model_that_gives_a_datum_no_probability_says_minus_infinity():
    """An honest answer: no error, and no number that looks like an estimate."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            impossible = torch.where(x > 5, -math.inf, 0.0)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("possible", impossible)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.tensor([0.0, 9.0]).double()
    estimate = pv.ais(model, guide, x, num_chains=4, temperatures=5)
    exact = dist.Normal(x.new_zeros(()), 2**0.5).log_prob(x[0])
    assert estimate.value[0] == pytest.approx(exact.item(), abs=1e-10)
    assert estimate.value[1] == -math.inf


def test_a_model_that_is_not_finite_at_the_start_is_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(torch.where(x > 5, math.nan, z), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    with (
        pyro.validation_enabled(is_validate=False),
        pytest.raises(ValueError, match="1 of 2 data of a block have a chain whose weight is NaN"),
    ):
        pv.ais(model, guide, torch.tensor([0.0, 9.0]), num_chains=2, temperatures=3)


def test_what_can_not_be_compiled_runs_as_it_is_and_says_so_once():
    pair = LinearGaussian.random(latent_dim=1)

    def guide(x: Tensor) -> None:
        if x.sum().item() > 1e9:
            raise AssertionError
        pair.guide(x, 1.2)

    x = pair.sample(120)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimate = pv.ais(
            pair.model, guide, x, num_chains=2, temperatures=3, leapfrog_steps=1, compile=True
        )
    assert len(caught) == 1
    assert "annealed chains run without compiling" in str(caught[0].message)
    assert (estimate.value - pair.log_evidence(x)).abs().max() < 0.5
