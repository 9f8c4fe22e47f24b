"""The step: what it trains, what it gives back, and what it leaves alone."""

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.infer.util
import pyro.optim
import pytest
import torch
from helpers import (
    PAIRS,
    TopDownGuide,
    TopDownModel,
    TutorialPair,
    bernoulli_pair,
    bits,
    leaves,
    library_pair,
    store_pair,
)
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv

optim: Any = pyro.optim


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2)


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


# --- every parameter moves


@pytest.mark.parametrize("make", PAIRS)
@pytest.mark.parametrize("engine", ["ours", "pyro's"])
def test_every_parameter_moves(make, engine):
    model, guide, args = make()
    if engine == "ours":
        svi: Any = pv.SVI(model, guide, adam)
        svi.setup(*args)
    else:
        svi = pyro.infer.SVI(model, guide, optim.Adam({"lr": 1e-2}), Trace_ELBO())
        svi.evaluate_loss(*args)
    before = {name: leaf.detach().clone() for name, leaf in leaves(model, guide).items()}
    svi.step(*args)
    after = leaves(model, guide)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (after[name] != value).any(), name


class PlainGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = pv.Conditional(pv.networks.mlp(9, (2, 2)), pv.families.normal)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.encoder(x))


class PlainModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z), obs=x)


@pytest.mark.parametrize("optimizer", [adam, optim.Adam({"lr": 1e-2})], ids=["torch", "pyro"])
def test_plain_modules_train(optimizer):
    model, guide, x = PlainModel(), PlainGuide(), bits()
    parameters = [*model.parameters(), *guide.parameters()]
    before = [p.detach().clone() for p in parameters]
    svi = pv.SVI(model, guide, optimizer)
    first = svi.evaluate_loss(x)
    for _ in range(30):
        svi.step(x)
    assert not any(map(torch.equal, before, parameters))
    assert svi.evaluate_loss(x) < first - 10


@pytest.mark.parametrize("make", [bernoulli_pair, lambda: (PlainModel(), PlainGuide())])
@pytest.mark.parametrize("optimizer", [adam, optim.Adam], ids=["torch", "pyro"])
def test_a_second_pair_of_the_same_process_trains_its_own_parameters(make, optimizer):
    x = bits()
    for _ in range(2):  # with the parameter store as the first pair left it
        model, guide = (program for program in make())
        made = optimizer({"lr": 1e-2}) if optimizer is optim.Adam else optimizer
        parameters = [*model.parameters(), *guide.parameters()]
        before = [p.detach().clone() for p in parameters]
        pv.SVI(model, guide, made).step(x)
        assert not any(map(torch.equal, before, parameters))


def test_networks_registered_under_the_names_of_older_ones_are_spoken_of():
    x = bits()
    first, second = TutorialPair(), TutorialPair()
    pv.SVI(first.model, first.guide, adam).step(x)
    with pytest.raises(
        ValueError, match=r"older network under the name '(en|de)coder'.*clear_param_store"
    ):
        pv.SVI(second.model, second.guide, adam).step(x)


# --- optimizers


def test_an_optimizer_instance_trains_what_it_was_given_and_nothing_else():
    model, guide = bernoulli_pair()
    frozen = copy.deepcopy(model.state_dict())
    encoder = [p.detach().clone() for p in guide.parameters()]
    optimizer = torch.optim.Adam(guide.parameters(), lr=1e-2)
    svi = pv.SVI(model, guide, optimizer)
    svi.step(bits())
    assert svi.optimizer is optimizer
    assert all(torch.equal(v, frozen[k]) for k, v in model.state_dict().items())
    assert not any(map(torch.equal, encoder, guide.parameters()))


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(max_norm):
    model, guide, args = library_pair()
    parameters = [*model.parameters(), *guide.parameters()]
    before = [p.detach().clone() for p in parameters]
    pyro.set_rng_seed(1)
    gradients = torch.autograd.grad(
        Trace_ELBO().differentiable_loss(model, guide, *args), parameters
    )
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert 0.5 < norm < 1e6
    factor = min(1.0, max_norm / (norm.item() + 1e-6))
    svi = pv.SVI(model, guide, lambda p: torch.optim.SGD(p, lr=1.0), max_grad_norm=max_norm)
    pyro.set_rng_seed(1)
    svi.step(*args)
    for old, new, gradient in zip(before, parameters, gradients, strict=True):
        torch.testing.assert_close(new.detach(), old - factor * gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("optimizer", [sgd, optim.SGD({"lr": 1e-2})], ids=["torch", "pyro"])
def test_a_parameter_that_comes_late_is_trained(optimizer):
    calls = {"model": 0}
    model, guide, args = store_pair()

    def growing(x: Tensor) -> None:
        calls["model"] += 1
        if calls["model"] > 2:
            late = pyro.param("late", torch.zeros((), dtype=torch.float64))
            pyro.factor("penalty", -((late - 1) ** 2))
        model(x)

    svi = pv.SVI(growing, guide, optimizer)
    svi.step(*args)
    assert "late" not in svi.parameters.named
    svi.step(*args)
    assert "late" in svi.parameters.named
    # The gradient of (late - 1)^2 at 0 is -2: one step of 0.01 leads to 0.02.
    assert pyro.param("late").item() == pytest.approx(0.02, rel=1e-12)


# --- what a step gives back, and what it leaves alone


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO(), RenyiELBO(num_particles=2)])
def test_losses_are_detached_scalars(loss):
    model, guide = bernoulli_pair()
    svi = pv.SVI(model, guide, adam, loss=loss)
    for value in (svi.step(bits()), svi.evaluate_loss(bits())):
        assert isinstance(value, Tensor)
        assert value.shape == ()
        assert not value.requires_grad


def test_evaluating_changes_nothing_and_agrees_with_the_step():
    model, guide, args = library_pair()
    svi = pv.SVI(model, guide, adam)
    pyro.set_rng_seed(1)
    value = svi.evaluate_loss(*args)
    before = copy.deepcopy((model.state_dict(), guide.state_dict()))
    pyro.set_rng_seed(1)
    assert svi.evaluate_loss(*args) == value
    for module, state in zip((model, guide), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in svi.parameters.named.values())
    pyro.set_rng_seed(1)
    assert svi.step(*args) == value


def test_keyword_arguments_reach_model_and_guide():
    model, guide, (x,) = store_pair()
    svi = pv.SVI(model, guide, sgd)
    pyro.set_rng_seed(1)
    by_name = svi.evaluate_loss(x=x)
    pyro.set_rng_seed(1)
    assert svi.evaluate_loss(x) == by_name


def test_a_smaller_minibatch_follows_a_larger_one():
    model, guide, (x,) = library_pair()
    svi = pv.SVI(model, guide, adam)
    svi.step(x)
    pyro.set_rng_seed(1)
    value = svi.evaluate_loss(x[:3])
    pyro.set_rng_seed(1)
    assert value.item() == pytest.approx(Trace_ELBO().loss(model, guide, x[:3]), rel=1e-12)


@pytest.mark.parametrize("state", [True, False])
def test_validation_is_as_it_was_after_steps(state):
    model, guide = bernoulli_pair()
    with pyro.validation_enabled(is_validate=state):
        svi = pv.SVI(model, guide, adam)
        svi.step(bits())
        svi.evaluate_loss(bits())
        assert pyro.infer.util.is_validation_enabled() is state
        assert torch.distributions.Distribution._validate_args is state


def test_setup_leaves_the_random_state_alone_and_a_step_draws_once():
    model, guide, args = library_pair()
    pyro.set_rng_seed(5)
    svi = pv.SVI(model, guide, adam)
    before = torch.get_rng_state()
    svi.setup(*args)
    assert torch.equal(torch.get_rng_state(), before)
    svi.step(*args)
    ours = torch.get_rng_state()
    torch.manual_seed(5)
    torch.empty(7, 2, dtype=torch.float64).normal_()
    assert torch.equal(ours, torch.get_rng_state())


def test_a_hierarchical_pair_trains():
    model, guide, x = TopDownModel(), TopDownGuide(), bits()
    svi = pv.SVI(model, guide, adam, loss=TraceMeanField_ELBO())
    first = svi.evaluate_loss(x)
    for _ in range(50):
        svi.step(x)
    assert svi.evaluate_loss(x) < first - 10
