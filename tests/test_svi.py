"""The step: trains as Pyro's does, with any optimizer, loss and pair, and says what is wrong."""

import copy
import math
from collections.abc import Callable
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
    masked_pair,
    module_pair,
    store_pair,
    tutorial_pair,
)
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv

optim: Any = pyro.optim

LOSSES = (Trace_ELBO, TraceMeanField_ELBO)


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2)


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def trained(make: Callable[[], Any], build: Callable[[Any, Any], Any], steps: int = 4) -> Any:
    """The losses and the parameters of a fresh pair after a few steps under one seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = make()
    svi = build(model, guide)
    pyro.set_rng_seed(1)
    losses = torch.tensor([float(svi.step(*args)) for _ in range(steps)], dtype=torch.float64)
    return losses, {name: leaf.detach().clone() for name, leaf in leaves(model, guide).items()}


def assert_alike(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-10)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=1e-10, atol=1e-10, msg=name)


# --- as Pyro trains


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("factory", "theirs"), [(sgd, optim.SGD), (adam, optim.Adam)], ids=["sgd", "adam"]
)
@pytest.mark.parametrize("make", PAIRS)
def test_a_few_steps_lead_where_pyros_lead(make, factory, theirs, loss):
    assert_alike(
        trained(make, lambda m, g: pv.SVI(m, g, factory, loss=loss())),
        trained(make, lambda m, g: pyro.infer.SVI(m, g, theirs({"lr": 1e-2}), loss())),
    )


@pytest.mark.parametrize("make", [tutorial_pair, store_pair, module_pair, masked_pair])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: optim.Adam({"lr": 1e-2}),
        lambda: optim.ClippedAdam({"lr": 1e-2, "clip_norm": 0.5, "lrd": 0.9}),
        lambda: optim.Adam(lambda name: {"lr": 1e-2 if "coder" in name else 1e-3}),
        lambda: optim.SGD({"lr": 1e-1}, {"clip_norm": 0.3}),
        lambda: optim.ExponentialLR(
            {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-2}, "gamma": 0.5}
        ),
    ],
    ids=["adam", "clipped", "by name", "clip", "scheduled"],
)
def test_an_optimizer_of_pyros_takes_pyros_steps(make, optimizer):
    assert_alike(
        trained(make, lambda m, g: pv.SVI(m, g, optimizer())),
        trained(make, lambda m, g: pyro.infer.SVI(m, g, optimizer(), Trace_ELBO())),
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda: RenyiELBO(alpha=0.5, num_particles=3),  # type: ignore[arg-type]
        lambda: RenyiELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        lambda: TraceGraph_ELBO(),
        lambda: Trace_ELBO(num_particles=2),
        lambda: Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    ],
    ids=["renyi", "vectorized renyi", "graph", "particles", "vectorized particles"],
)
def test_other_losses_of_pyros_take_pyros_steps(loss):
    optimizer = optim.Adam({"lr": 1e-2})
    assert_alike(
        trained(library_pair, lambda m, g: pv.SVI(m, g, adam, loss=loss())),
        trained(library_pair, lambda m, g: pyro.infer.SVI(m, g, optimizer, loss())),
    )


def test_a_users_function_is_minimised():
    def twice(model: Any, guide: Any, *args: Any) -> Tensor:
        return 2 * Trace_ELBO().differentiable_loss(model, guide, *args)

    ours = trained(library_pair, lambda m, g: pv.SVI(m, g, sgd, loss=twice))
    plain = trained(library_pair, lambda m, g: pv.SVI(m, g, lambda p: torch.optim.SGD(p, lr=2e-2)))
    assert_alike((ours[0] / 2, ours[1]), plain)


def test_the_weight_of_the_kl_reaches_the_step_as_it_reaches_pyros():
    def weighted(svi: Any) -> Any:
        step = svi.step

        def inside(*args: Any) -> Any:
            with pv.kl_weight(0.3):
                return step(*args)

        svi.step = inside
        return svi

    optimizer = optim.SGD({"lr": 1e-2})
    assert_alike(
        trained(library_pair, lambda m, g: weighted(pv.SVI(m, g, sgd))),
        trained(library_pair, lambda m, g: weighted(pyro.infer.SVI(m, g, optimizer, Trace_ELBO()))),
    )


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
    with pytest.raises(ValueError, match=r"depends on none .* pyro.clear_param_store\(\)"):
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


def test_an_instance_and_a_factory_take_the_same_steps():
    def with_instance(model: Any, guide: Any) -> pv.SVI:
        return pv.SVI(model, guide, adam([*model.parameters(), *guide.parameters()]))

    assert_alike(
        trained(library_pair, with_instance),
        trained(library_pair, lambda m, g: pv.SVI(m, g, adam)),
    )


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


# --- errors


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
    with pytest.raises(ValueError, match=r"site 'x': 20 of 20 observed values lie outside"):
        pv.SVI(*bernoulli_pair(), adam).step(torch.full((20, 9), 0.5))


def test_a_hierarchical_pair_trains():
    model, guide, x = TopDownModel(), TopDownGuide(), bits()
    svi = pv.SVI(model, guide, adam, loss=TraceMeanField_ELBO())
    first = svi.evaluate_loss(x)
    for _ in range(50):
        svi.step(x)
    assert svi.evaluate_loss(x) < first - 10
