"""What annealing refuses, and how it says so."""

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian, bernoulli_latents, library_pair
from pyro import poutine
from pyro.distributions import transforms
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
        ({"num_chains": 0}, "num_chains: expected at least 1"),
        ({"temperatures": 0}, "temperatures: expected a number of at least 1"),
        ({"temperatures": 20.0}, "temperatures: expected a number of at least 1, or a schedule"),
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


def scaled_pair(first: Any, second: Any) -> tuple[Any, Any]:
    """A positive latent under one distribution in the model, under another in the guide."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", first)
            pyro.sample("x", dist.Normal(0.0, s), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("s", second)

    return model, guide


@pytest.mark.parametrize(
    "prior", [dist.Gamma(torch.tensor(2.0).double(), 1.0), dist.HalfNormal(torch.ones(()).double())]
)
def test_the_end_of_a_support_makes_no_difference(prior):
    model, guide = scaled_pair(prior, dist.LogNormal(torch.zeros(()).double(), 0.5))
    x = torch.tensor([0.3, 1.0]).double()
    annealed = pv.ais(model, guide, x, num_chains=64, temperatures=20, leapfrog_steps=3)
    weighted = pv.log_evidence(model, guide, x, num_particles=20_000)
    error = annealed.standard_error + weighted.standard_error
    assert ((annealed.value - weighted.value).abs() < 4 * error).all()


@pytest.mark.parametrize("size", [1, 3, 101])
def test_bounds_that_depend_on_another_latent_are_refused(size):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(x.new_zeros(()), 0.5))
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(s), s))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    with pytest.raises(ValueError, match="'z': the bounds of its support differ"):
        pv.ais(model, pv.from_prior(model), torch.ones(size).double(), num_chains=2, temperatures=3)


def test_bounds_that_differ_among_blocks_of_data_are_refused():
    width = torch.ones(200).double()
    width[100:] = 2.0

    def model(x: Tensor, width: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(width), width))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    with pytest.raises(ValueError, match="'z': the bounds of its support differ among data"):
        pv.ais(
            model,
            pv.from_prior(model),
            torch.ones(200).double(),
            width,
            num_chains=2,
            temperatures=3,
            leapfrog_steps=1,
        )


def test_angles_are_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 2.0), obs=x)

    with pytest.raises(ValueError, match="'z': VonMises is a density of angles"):
        pv.ais(model, pv.from_prior(model), torch.zeros(3))


def test_masked_latents_are_refused():
    def model(x: Tensor) -> None:
        seen: Any = x > 0
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="'z' is masked"):
        pv.ais(model, pv.from_prior(model), torch.tensor([1.0, -1.0]))


def test_a_guide_that_can_not_score_is_refused():
    encoder = pv.ConditionalFlow(
        pv.Conditional(pv.networks.mlp(4, (2, 2)), pv.families.normal),
        pv.networks.mlp(4, (1, 3)),
        transforms.conditional_planar,
        (2, 3),
    )
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 4)), pv.families.bernoulli)
    model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
    with pytest.raises(ValueError, match="can't score values that it has not drawn"):
        pv.ais(model, guide, torch.ones(3, 4), num_chains=2, temperatures=3)


def test_one_chain_moves_and_has_no_error_bar():
    pair = LinearGaussian.random()
    x = pair.sample(20)

    def guide(x: Tensor) -> None:
        pair.guide(x, 1.5)

    estimate = pv.ais(pair.model, guide, x, num_chains=1, temperatures=60, leapfrog_steps=3)
    assert estimate.acceptance.mean() > 0.3
    assert (estimate.value - pair.log_evidence(x)).abs().max() < 1.0
    assert "One chain has no error bar" in estimate.advice
