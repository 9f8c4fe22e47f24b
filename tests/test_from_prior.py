"""The prior as a guide: weights are likelihoods, of any model, and no decoder is run to draw."""

import math
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import (
    LinearGaussian,
    bernoulli_pair,
    bits,
    double_bits,
    hierarchical_pair,
    library_pair,
    masked_pair,
    store_pair,
    tutorial_pair,
)
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK
from test_enumeration import Semi
from torch import Tensor, nn
from weights import WEIGHABLE, Spied, add_up

import pyro_vae as pv
from pyro_vae.context import at_rest, bare, device_of, modules_of
from pyro_vae.evidence import compiled
from pyro_vae.inference.handlers import latent_sites, observed_sites, unscaled_log_prob

ENUMERATED: Any = {"enumerate": "parallel"}


def options_of(make: Any) -> Any:
    return {"data_plate": "data" if make is masked_pair else None}


# --- weights


@pytest.mark.parametrize("make", WEIGHABLE)
def test_the_weights_of_any_model_are_its_likelihoods(make):
    model, _, args = make()
    spied = Spied(model)
    log_w = pv.log_weights(
        spied.model, pv.from_prior(spied.model), *args, num_particles=30, **options_of(make)
    )
    assert log_w.shape == (30, 7)
    torch.testing.assert_close(log_w, spied.log_p, rtol=0, atol=1e-12)
    assert log_w.std(0).min() > 1e-3  # the draws differ, for every datum


@pytest.mark.parametrize("make", WEIGHABLE)
def test_the_average_is_that_of_the_model_run_by_itself(make):
    model, _, args = make()
    found = pv.log_evidence(
        model, pv.from_prior(model), *args, num_particles=4_000, **options_of(make)
    )
    spied = Spied(model)
    nesting = 2 if make is masked_pair else 1
    with torch.no_grad():
        pyro.plate("num_particles", 4_000, dim=-1 - nesting)(spied.model)(*args)
    log_w = spied.log_p
    value = log_w.logsumexp(0) - math.log(4_000)
    error = (log_w - value).exp().std(0) / 4_000**0.5
    error = (found.standard_error.square() + error.square()).sqrt()
    assert ((found.value - value).abs() < 4 * error).all()
    assert error.max() < 0.4


def test_the_value_is_log_p_where_that_is_known():
    pair = LinearGaussian.random(dim=3, latent_dim=1)
    x = pair.sample(100)
    found = pv.log_evidence(pair.model, pv.from_prior(pair.model), x, num_particles=20_000)
    z = (found.value - pair.log_evidence(x)) / found.standard_error
    assert found.standard_error.max() < 0.1
    assert z.abs().max() < 5
    assert abs(z.mean()) < 0.5
    assert 0.7 < z.std() < 1.4


def test_a_prior_given_labels_is_drawn_given_them():
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    y = torch.linspace(-50, 50, 9, dtype=torch.float64)
    x = y + torch.randn(9, dtype=torch.float64)
    found = pv.log_evidence(model, pv.from_prior(model), x, y, num_particles=5_000)
    exact = torch.distributions.Normal(y, 2**0.5).log_prob(x)
    assert ((found.value - exact).abs() < 4 * found.standard_error).all()
    assert found.standard_error.max() < 0.05


def test_a_latent_given_what_was_observed_before_it_is_drawn():
    """p(z1) p(y|z1) p(z2|y, z1) p(x|z2): the last latent stands behind an observed site."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z1, 1.0), obs=y)
            z2 = pyro.sample("z2", dist.Normal(z1 + y, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    x, y = torch.randn(2, 9, dtype=torch.float64)
    found = pv.log_evidence(model, pv.from_prior(model), x, y, num_particles=20_000)
    # (y, x) is z1 + noise and z1 + y + two noises.
    mean, covariance = torch.zeros(2).double(), torch.tensor([[2.0, 3.0], [3.0, 7.0]]).double()
    exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(
        torch.stack([y, x], -1)
    )
    assert ((found.value - exact).abs() < 4 * found.standard_error).all()


def test_latents_that_all_data_share_are_drawn_too():
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        drawn.append(mean.item())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    drawn: list[float] = []
    x = torch.randn(7, dtype=torch.float64)
    log_w = pv.joint_log_weights(model, pv.from_prior(model), x, num_particles=5)
    means = torch.tensor(sorted(set(drawn)), dtype=torch.float64)
    log_p = dist.Normal(means.unsqueeze(-1), 1.0).log_prob(x).sum(-1)
    assert len(set(log_w.tolist())) == 5
    for value in log_w:
        assert (log_p - value).abs().min() < 1e-5


def test_the_guide_scores_other_values_than_its_own_with_gradients():
    """What annealing asks of it."""
    model, _, args = hierarchical_pair()
    guide = pv.from_prior(model)
    trace = poutine.trace(guide).get_trace(*args)
    for _, site in latent_sites(trace):
        site["value"] = torch.randn_like(site["value"]).requires_grad_()
    z2, z1 = (site["value"] for _, site in latent_sites(trace))
    scored = poutine.trace(poutine.replay(guide, trace=trace)).get_trace(*args)
    log_q = add_up(unscaled_log_prob(site) for _, site in latent_sites(scored))
    expected = dist.Normal(0.0, 1.0).log_prob(z2).sum(-1) + model.lower_prior(z2).log_prob(z1)
    torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(t.sum(), [z1, z2]) for t in (log_q, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


# --- what it costs, and what it leaves behind


def test_no_decoder_is_run_to_draw():
    model, _ = bernoulli_pair()
    ran: list[int] = []
    decoder: Any = model.likelihood.network
    decoder.register_forward_hook(lambda _, inputs, __: ran.append(inputs[0].numel()))
    pv.log_weights(model, pv.from_prior(model), bits(7), num_particles=50)
    assert [size for size in ran if size == 50 * 7 * 2] == [50 * 7 * 2]


@pytest.fixture
def interpreted(monkeypatch):
    """Graphs are interpreted; lists the names of the operations in them."""
    operations = []

    def lower(captured, static, data):
        operations.append([str(node.target) for node in captured.module.graph.nodes])

        def kernel(arguments):
            with torch.no_grad():
                return captured.module(*static, *arguments, *captured.reached)

        return kernel

    monkeypatch.setattr(compiled, "lower", lower)
    return operations


def semi_pair() -> Any:
    semi = Semi()
    return semi.model, semi.guide_of_z, (double_bits(),)


@pytest.mark.parametrize(
    "make", [library_pair, tutorial_pair, store_pair, hierarchical_pair, masked_pair, semi_pair]
)
def test_compiled_weights_are_the_uncompiled_ones(make, interpreted):
    torch.manual_seed(0)
    model, _, args = make()
    options: Any = {"num_particles": 21, "seed": 3, **options_of(make)}
    expected = pv.log_weights(model, pv.from_prior(model), *args, **options, compile=False)
    found = pv.log_weights(model, pv.from_prior(model), *args, **options, compile=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    draw, score = interpreted
    if make is library_pair:
        assert not any("mm" in name for name in draw)
        assert any("mm" in name for name in score)


def test_the_compiler_itself():
    torch.manual_seed(0)
    model, _ = bernoulli_pair(dim=64, latent_dim=3, hidden_dims=(32,))
    x = bits(20, 64)
    guide = pv.from_prior(model)
    found = pv.log_weights(model, guide, x, num_particles=50, compile=True)
    expected = pv.log_weights(model, guide, x, num_particles=50, compile=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_what_sees_through_handlers_sees_the_model():
    model, _ = bernoulli_pair()
    guide = pv.from_prior(model)
    assert bare(guide) is model
    assert modules_of(guide) == {"": model}
    assert device_of(guide) == next(model.parameters()).device
    model.train()
    with at_rest(guide):
        assert not model.likelihood.training
    assert model.likelihood.training


def test_other_arguments_may_have_other_latents():
    """A series: one latent for each step of time."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = x.new_zeros(())
            for t in range(x.shape[1]):
                z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])

    guide = pv.from_prior(model)
    for steps in (2, 4, 3, 4):
        x = torch.zeros(5, steps, dtype=torch.float64)
        time = torch.arange(1, steps + 1).double()
        covariance = torch.minimum(time, time.unsqueeze(-1)) + torch.eye(steps).double()
        exact = torch.distributions.MultivariateNormal(x[0], covariance).log_prob(x)
        found = pv.log_evidence(model, guide, x, num_particles=2_000)
        assert ((found.value - exact).abs() < 5 * found.standard_error).all()


def test_a_flag_may_decide_which_latents_there_are():
    def model(x: Tensor, deep: bool) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            if deep:
                z = pyro.sample("z2", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = pv.from_prior(model), torch.randn(9, dtype=torch.float64)
    for deep, variance in ((False, 2.0), (True, 3.0), (False, 2.0)):
        found = pv.log_evidence(model, guide, x, deep, num_particles=5_000)
        exact = dist.Normal(0.0, variance**0.5).log_prob(x)
        assert ((found.value - exact).abs() < 4 * found.standard_error + 1e-6).all()


def test_leaving_off_leaves_nothing_behind():
    closed = []

    @contextmanager
    def resource():
        try:
            yield
        finally:
            closed.append(True)

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> None:
            with resource(), pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                raise_later.append(True)
                pyro.sample("x", dist.Normal(x, 1.0), obs=x)

    raise_later: list[bool] = []
    model, x = Inner(), torch.zeros(3)
    guide = pv.from_prior(model)
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(x)
        assert [name for name, _ in latent_sites(trace)] == ["z"]
        assert not list(observed_sites(trace))
        assert not _PYRO_STACK
    assert len(closed) == 3
    assert len(raise_later) == 1
    with pyro.plate("data", 4, dim=-1):  # its dimension is free again
        pass


def test_a_mistake_in_the_model_is_its_own():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            raise RuntimeError("of the model")

    guide = pv.from_prior(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="of the model"):
            guide(torch.zeros(3))


def test_a_number_of_data_is_no_datum():
    """Model(5) draws x too: the guide does not show it."""
    model, _ = bernoulli_pair()
    trace = poutine.trace(pv.from_prior(model)).get_trace(5)
    assert [name for name, _ in latent_sites(trace)] == ["z"]


def test_what_is_no_program_is_refused():
    with pytest.raises(TypeError, match=r"from_prior: expected a Pyro model.*got Tensor"):
        pv.from_prior(torch.zeros(3))  # type: ignore[arg-type]
