"""The step says what is wrong with a pair, an optimizer, a loss or the data."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import bernoulli_pair, bits
from torch import Tensor, nn

import pyro_vae as pv


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def test_what_does_not_exist_yet_says_so():
    svi = pv.SVI(*bernoulli_pair(), adam)
    with pytest.raises(RuntimeError, match="before setup or a step"):
        _ = svi.parameters
    with pytest.raises(RuntimeError, match="before setup or a step"):
        _ = svi.optimizer


@pytest.mark.parametrize("optimizer", [None, "adam", 1e-3])
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises(TypeError, match="a torch optimizer, a factory such as"):
        pv.SVI(*bernoulli_pair(), optimizer)


def test_what_is_no_loss_is_refused():
    with pytest.raises(TypeError, match="expected a Pyro ELBO"):
        pv.SVI(*bernoulli_pair(), adam, loss="elbo")


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan])
def test_a_norm_that_is_not_positive_is_refused(norm):
    with pytest.raises(ValueError, match="max_grad_norm > 0"):
        pv.SVI(*bernoulli_pair(), adam, max_grad_norm=norm)


def parameterless(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(9), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x)


def parameterless_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))


def test_a_pair_without_parameters_is_refused_but_can_be_evaluated():
    svi = pv.SVI(parameterless, parameterless_guide, adam)
    assert svi.evaluate_loss(bits()).isfinite()
    with pytest.raises(ValueError, match=r"no parameters to train.*pyro.module"):
        svi.step(bits())


def test_a_loss_that_depends_on_no_parameter_is_refused():
    def idle(x: Tensor) -> None:
        pyro.param("idle", torch.zeros(2))
        parameterless(x)

    with pytest.raises(ValueError, match="depends on none of the pair's 1 parameters"):
        pv.SVI(idle, parameterless_guide, adam).step(bits())


def test_a_parameter_without_a_gradient_is_named():
    model, guide = bernoulli_pair()
    model.register_parameter("idle", nn.Parameter(torch.zeros(2)))
    with pytest.warns(UserWarning, match=r"1 of 9 parameters got no gradient .* 'model.idle'"):
        pv.SVI(model, guide, adam).step(bits())


def test_a_guide_without_the_models_latent_is_refused():
    model, _ = bernoulli_pair()
    with pytest.raises(ValueError, match="the guide has no latent site 'z'"):
        pv.SVI(model, lambda x: None, adam).step(bits())


def test_a_guide_of_another_latent_size_is_refused():
    model, _ = bernoulli_pair(latent_dim=2)
    _, guide = bernoulli_pair(latent_dim=3)
    with pytest.raises(ValueError, match=r"site 'z': .*\(20, 3\).*\(20, 2\)"):
        pv.SVI(model, guide, adam).step(bits())


def test_a_likelihood_of_another_size_is_refused():
    model, _ = bernoulli_pair(dim=8)
    _, guide = bernoulli_pair(dim=9)
    with pytest.raises(ValueError, match=r"site 'x': the observed value has shape \(20, 9\)"):
        pv.SVI(model, guide, adam).step(bits())


def test_values_outside_the_support_are_refused():
    with pytest.raises(ValueError, match=r"site 'x': 20 of 20 observed data have values outside"):
        pv.SVI(*bernoulli_pair(), adam).step(torch.full((20, 9), 0.5))
