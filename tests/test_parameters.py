"""The parameters of a pair: found wherever they live, each once, and restored exactly."""

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import PAIRS, TutorialPair, bernoulli_pair, bits, leaves, library_pair
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inference.parameters import Parameters


def parameters_of(model: Any, guide: Any, *args: Any) -> Parameters:
    """After one run, as the step finds them."""
    with poutine.trace(param_only=True) as capture:
        guide(*args)
        poutine.replay(model, trace=poutine.trace(guide).get_trace(*args))(*args)
    parameters = Parameters(model, guide)
    parameters.collect(capture.trace)
    return parameters


@pytest.mark.parametrize("make", PAIRS)
def test_every_leaf_is_found_once(make):
    model, guide, args = make()
    found = parameters_of(model, guide, *args).named
    assert len({id(leaf) for leaf in found.values()}) == len(found)
    assert {id(leaf) for leaf in found.values()} == {id(v) for v in leaves(model, guide).values()}
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in found.values())


def test_a_module_that_both_programs_share_is_found_once():
    shared = nn.Linear(9, 9)
    decoder = nn.Sequential(shared, nn.Unflatten(-1, (1, 9)))
    encoder = nn.Sequential(shared, nn.Linear(9, 18), nn.Unflatten(-1, (2, 9)))
    likelihood = pv.Conditional(decoder, pv.families.bernoulli)
    model = pv.Model(pv.priors.StandardNormal(9), likelihood)
    guide = pv.Guide(pv.Conditional(encoder, pv.families.normal))
    assert len(parameters_of(model, guide, bits()).named) == 4


@pytest.mark.filterwarnings("ignore:.*requires_grad=False")  # Pyro's own
def test_frozen_parameters_are_left_alone():
    model, guide = bernoulli_pair()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    named = parameters_of(model, guide, bits()).named
    assert named
    assert all(name.startswith("guide.") for name in named)


def test_stale_tensors_under_the_names_of_a_modules_parameters_are_left_out():
    old_model, old_guide = bernoulli_pair()
    stale = parameters_of(old_model, old_guide, bits()).named
    model, guide = bernoulli_pair()
    fresh = parameters_of(model, guide, bits()).named
    own = {id(p) for p in (*model.parameters(), *guide.parameters())}
    assert {id(leaf) for leaf in fresh.values()} == own
    assert not own & {id(leaf) for leaf in stale.values()}


def test_a_parameter_that_comes_to_light_later_is_taken_up_once():
    def program() -> None:
        pyro.param("late", torch.ones(2), constraint=constraints.positive)

    parameters = Parameters(lambda: None, lambda: None)
    trace = poutine.trace(program, param_only=True).get_trace()
    (new,) = parameters.collect(trace)
    torch.testing.assert_close(new.detach(), torch.zeros(2))  # the logarithm of one
    assert parameters.collect(trace) == []
    assert list(parameters.named) == ["late"]


# --- saving and restoring


@pytest.mark.parametrize("make", PAIRS)
def test_a_saved_state_restores_every_value(make):
    model, guide, args = make()
    parameters = parameters_of(model, guide, *args)
    before = {name: leaf.detach().clone() for name, leaf in parameters.named.items()}
    state = copy.deepcopy(parameters.state_dict())
    with torch.no_grad():
        for leaf in parameters.named.values():
            leaf.add_(1.0)
    parameters.load_state_dict(state)
    for name, leaf in parameters.named.items():
        assert torch.equal(leaf, before[name])


def test_buffers_are_part_of_the_state():
    norm = nn.BatchNorm1d(9)
    network = nn.Sequential(norm, nn.Linear(9, 4), nn.Unflatten(-1, (2, 2)))
    model, _ = bernoulli_pair()
    guide = pv.Guide(pv.Conditional(network, pv.families.normal))
    parameters = Parameters(model, guide)
    state = copy.deepcopy(parameters.state_dict())
    network(bits())
    assert norm.running_mean is not None
    assert norm.running_mean.abs().max() > 0
    parameters.load_state_dict(state)
    assert norm.running_mean.abs().max() == 0


def stored_pair(names: dict[str, Tensor]) -> Parameters:
    def program() -> None:
        for name, value in names.items():
            pyro.param(name, value)
        pyro.sample("z", dist.Normal(0.0, 1.0))

    pyro.clear_param_store()
    return parameters_of(program, program)


def test_the_state_of_another_pair_is_refused_and_the_difference_is_named():
    model, guide, _ = library_pair()
    wider = Parameters(*bernoulli_pair(hidden_dims=(16,)))
    deeper = Parameters(*bernoulli_pair(hidden_dims=(8, 8)))
    tutorial = TutorialPair()
    functions = parameters_of(tutorial.model, tutorial.guide, bits())
    parameters = Parameters(model, guide)
    before = [p.detach().clone() for p in parameters.named.values()]
    for other, message in (
        (wider, r"layers.0.weight has shape \(16, 2\) on disk and \(8, 2\) here"),
        (deeper, r"model has .* and the checkpoint has \['likelihood.network.layers.4.bias'"),
        (functions, r"modules has \['guide', 'model'\] here that the checkpoint lacks"),
    ):
        with pytest.raises(ValueError, match=message):
            parameters.load_state_dict(other.state_dict())
    assert all(map(torch.equal, before, parameters.named.values()))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"b": torch.zeros(2)}, r"params has \['a'\] here .* the checkpoint has \['b'\]"),
        ({"a": torch.zeros(3)}, r"a has shape \(3,\) on disk and \(2,\) here"),
    ],
)
def test_the_stored_params_of_another_pair_are_refused(names, message):
    other = stored_pair(names).state_dict()
    parameters = stored_pair({"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=message):
        parameters.load_state_dict(other)


def test_buffers_of_networks_that_functions_register_are_kept():
    """The running statistics of a batch norm stand in no parameter store."""

    def pair() -> tuple[Any, Any, Any]:
        pyro.clear_param_store()
        norm = torch.nn.BatchNorm1d(9)

        def model(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                loc = z.sum(-1, keepdim=True).expand(-1, 9)
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        def guide(x: torch.Tensor) -> None:
            pyro.module("norm", norm)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(norm(x)[:, :2], 1.0).to_event(1))

        return norm, model, guide

    norm, model, guide = pair()
    svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params))
    svi.step(3.0 + torch.randn(50, 9))
    saved = copy.deepcopy(svi.parameters.state_dict())
    again, model, guide = pair()
    svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params))
    svi.setup(torch.randn(50, 9))
    svi.parameters.load_state_dict(saved)
    assert again.running_mean.abs().min() > 0.1
    assert torch.equal(again.running_mean, norm.running_mean)
