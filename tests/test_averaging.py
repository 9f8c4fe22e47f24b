"""Averages of the parameters are what is validated, kept and handed back."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_pairs import PAIRS, adam, fit, parameters, same, state
from helpers import LinearGaussian, bits
from loop_runs import library, loop_of, run_epochs, sgd, tutorial, values, written
from torch import Tensor

import pyro_vae as pv
from pyro_vae.inference.averaging import Averages
from pyro_vae.inference.loop import Loop
from pyro_vae.inference.validation import validation_bounds

STEPS = 3  # an epoch of these loops


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Those are for test_pictures."""
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)


def averages(loop: Loop) -> Averages:
    assert loop.averages is not None
    return loop.averages


def followed(loop: Loop, epochs: int) -> list[dict[str, Tensor]]:
    """The parameters after every step."""
    path: list[dict[str, Tensor]] = []
    for _ in range(epochs):
        loop.run_epoch(lambda loss, size: path.append(values(loop)) is not None)
    return path


def weighted_mean(path: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """By the definition: the weights of the steps, decay^(t - s), divided by their sum."""
    weights = torch.tensor([decay ** (len(path) - 1 - s) for s in range(len(path))]).double()
    weights /= weights.sum()
    return {
        name: torch.einsum("s,s...->...", weights, torch.stack([p[name].double() for p in path]))
        for name in path[0]
    }


@pytest.mark.parametrize("make", [library, tutorial])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_they_are_the_weighted_mean_of_the_parameters_after_every_step(make, decay):
    loop = loop_of(make, ema_decay=decay)
    expected = weighted_mean(followed(loop, 4), decay)
    with averages(loop).in_place():
        found = values(loop)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [adam, sgd(1e-2, momentum=0.9)])
def test_the_steps_are_those_without_averages(optimizer):
    plain, averaged = (
        followed(loop_of(library, optimizer, ema_decay=decay), 3) for decay in (None, 0.9)
    )
    assert len(plain) == 3 * STEPS
    assert same(plain, averaged)


def test_a_compiled_step_is_averaged_too(interpreted):
    paths = []
    for compile in (False, True):
        loop = loop_of(library, ema_decay=0.8)
        loop.svi.compile = compile
        run_epochs(loop, 3)
        with averages(loop).in_place():
            paths.append(values(loop))
    assert len(interpreted) >= 1
    for name, value in paths[0].items():
        torch.testing.assert_close(value, paths[1][name], rtol=1e-4, atol=1e-6)


def test_the_validation_bound_is_that_of_the_averages():
    loop = loop_of(library, ema_decay=0.9)
    run_epochs(loop, 3)
    assert loop.valid is not None
    own = validation_bounds(loop.svi, loop.valid, seed=loop.seed)[0]
    with averages(loop).in_place():
        averaged = validation_bounds(loop.svi, loop.valid, seed=loop.seed)[0]
    assert loop.records[-1]["valid_elbo"] == averaged != own


def test_at_a_high_rate_averages_end_nearer_to_the_exact_log_evidence():
    truth = LinearGaussian.random(latent_dim=1)
    train, valid = truth.sample(400), truth.sample(400)
    exact = truth.log_evidence(valid).mean().item()
    gaps = []
    for decay in (None, 0.98):
        torch.manual_seed(0)
        encoder = pv.Conditional(pv.networks.mlp(5, (2, 1), hidden_dims=()), pv.families.normal)
        guide = pv.Guide(encoder).double()

        def high(params: list[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.Adam(params, lr=0.1)

        fit(truth.model, guide, train, epochs=40, optimizer=high, ema_decay=decay)
        gaps.append(
            exact - pv.log_evidence(truth.model, guide, valid, num_particles=200).elbo.mean()
        )
    # The scatter of a rate of 0.1 costs a tenth of a nat, its mean next to nothing.
    assert gaps[1] < gaps[0] / 3


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("validated", [False, True])
def test_a_run_gives_its_averages_back(make, validated, tmp_path):
    data = bits(60)
    options: dict[str, Any] = {"optimizer": adam, "valid": data[:20] if validated else None}
    model, guide = make()
    fit(model, guide, data, epochs=3, ema_decay=0.9, out=tmp_path / "run", **options)
    reached = parameters(model, guide)
    saved = state(tmp_path / "run")
    chosen = saved["best"] if validated else saved["averages"]
    pyro.clear_param_store()
    model, guide = make()
    pv.load(tmp_path / "run", model=model, guide=guide)
    assert same(reached, parameters(model, guide))
    assert not same(chosen["parameters"], saved["parameters"])


@pytest.mark.parametrize("make", [library, tutorial])
def test_a_state_restores_the_averages_bit_for_bit(make):
    whole = loop_of(make, ema_decay=0.9)
    run_epochs(whole, 4)
    expected = averages(whole).state_dict()
    first = loop_of(make, ema_decay=0.9)
    run_epochs(first, 2)
    saved = written(first.state_dict())
    second = loop_of(make, ema_decay=0.9)
    second.load_state_dict(saved)
    run_epochs(second, 2)
    assert same(averages(second).state_dict(), expected)
    assert set(expected["steps"].values()) == {4 * STEPS}


def test_a_divergence_leaves_no_trace_in_them():
    loop = loop_of(library, ema_decay=0.9)
    run_epochs(loop, 2)
    before = written(averages(loop).state_dict())
    assert isinstance(loop.svi.optimizer, torch.optim.Optimizer)
    for group in loop.svi.optimizer.param_groups:
        group["lr"] = 1e30
    with pytest.raises(pv.DivergedError):
        run_epochs(loop, 2)
    assert same(written(averages(loop).state_dict()), before)


def test_the_steps_of_a_parameter_that_is_made_later_count_from_there():
    calls = []

    def model(x: Tensor) -> None:
        calls.append(len(x))
        shift = pyro.param("shift", torch.zeros(2))
        if len(calls) > 5:
            shift = shift + pyro.param("late", torch.ones(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0).to_event(1))
            mean = torch.cat([z, z, z, z, z[:, :1]], -1)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    loop = loop_of(lambda: (model, guide), ema_decay=0.9)
    path = followed(loop, 4)
    since = next(step for step, found in enumerate(path) if "late" in found)
    assert 0 < since < len(path) - 3
    expected = weighted_mean([{"late": found["late"]} for found in path[since:]], 0.9)
    expected |= weighted_mean([{"loc": found["loc"]} for found in path], 0.9)
    with averages(loop).in_place():
        for name, value in expected.items():
            found = loop.svi.parameters.named[name].detach().double()
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5, float("nan")])
def test_a_decay_outside_is_refused_with_what_to_give_and_costs_nothing(decay, tmp_path):
    (model, guide), out = library(), tmp_path / "run"
    before = parameters(model, guide)
    with pytest.raises(ValueError, match=r"ema_decay: expected at least 0 and less than 1, got"):
        fit(model, guide, bits(60), epochs=1, ema_decay=decay, out=out)
    assert same(parameters(model, guide), before)
    assert not out.exists()


def test_a_run_is_not_taken_up_again_under_another_decay(tmp_path):
    data = bits(60)
    fit(*library(), data, epochs=1, ema_decay=0.9, out=tmp_path / "run")
    for other in (None, 0.99):
        with pytest.raises(ValueError, match=r"resume: the run was started with ema_decay=0.9"):
            fit(*library(), data, epochs=2, ema_decay=other, out=tmp_path / "run", resume=True)


def test_buffers_are_those_of_the_last_step():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(9, 4), torch.nn.BatchNorm1d(4), torch.nn.Unflatten(-1, (2, 2))
    )
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9)), pv.families.bernoulli)
    model = pv.Model(pv.priors.StandardNormal(2), likelihood)
    loop = loop_of(
        lambda: (model, pv.Guide(pv.Conditional(network, pv.families.normal))), ema_decay=0.9
    )
    run_epochs(loop, 2)
    averaged = averages(loop).state_dict()["parameters"]["modules"]["guide"]
    found = {name: averaged[f"encoder.network.{name}"] for name, _ in network.named_buffers()}
    assert same(found, dict(network.named_buffers()))
    assert found["1.num_batches_tracked"] == 2 * STEPS
    weight = network.get_parameter("0.weight").detach()
    assert not same(averaged["encoder.network.0.weight"], weight)
