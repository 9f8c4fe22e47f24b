"""Objectives of importance weights: exact where the truth is known, for pairs of every kind."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_runs import assert_alike
from helpers import (
    PAIRS,
    LinearGaussian,
    auxiliary_pair,
    bernoulli_latents,
    bernoulli_pair,
    bits,
    double_bits,
    library_pair,
    masked_pair,
)
from objective_runs import estimate, gradients
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor

import pyro_vae as pv

OBJECTIVES: dict[str, Callable[[], Any]] = {
    "IWAE": partial(pv.ImportanceWeighted, 3),
    "Renyi": partial(pv.ImportanceWeighted, 3, alpha=0.5),
    "DReG": partial(pv.DReG, 3),
    "STL": partial(pv.StickingTheLanding, 3),
    "RWS": partial(pv.ReweightedWakeSleep, 3),
}
every_objective = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES.keys())


# --- values


@every_objective
def test_with_the_exact_posterior_every_draw_gives_log_evidence(make):
    truth = LinearGaussian.random()
    x = truth.sample(6)
    terms = estimate(make(), (truth.model, truth.guide, (x,)))
    exact = truth.log_evidence(x).sum().item()
    assert terms.loss.item() == pytest.approx(-exact, abs=1e-9)
    assert -(terms.distortion + terms.rate).item() == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize(
    ("loss", "pyros"),
    [
        (pv.ImportanceWeighted(1), Trace_ELBO()),
        (pv.ImportanceWeighted(1, alpha=0.7), Trace_ELBO()),
        (
            pv.ImportanceWeighted(3, alpha=1.0),
            Trace_ELBO(num_particles=3, vectorize_particles=True),
        ),
    ],
    ids=["one particle", "one particle of any order", "order one"],
)
def test_where_they_are_the_elbo_they_equal_it_and_its_gradient(loss, pyros):
    pair = library_pair()
    ours, theirs = estimate(loss, pair), estimate(pyros, pair)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs))
    torch.testing.assert_close(gradients(loss, pair), gradients(pyros, pair))


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
def test_of_one_datum_the_bound_is_pyros(alpha):
    model, guide, _ = library_pair()
    x = double_bits(1)
    ours = estimate(pv.ImportanceWeighted(4, alpha=alpha), (model, guide, (x,)))
    theirs = RenyiELBO(alpha, num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    assert ours.loss.item() == pytest.approx(theirs.loss(model, guide, x), rel=1e-9)


def test_data_have_weights_of_their_own():
    """Two data at once have the bound of each alone, in the mean over many draws."""
    model, guide, (x,) = library_pair()
    n = 4000
    alone = [
        estimate(pv.ImportanceWeighted(5), (model, guide, (row.expand(n, -1),))).loss.item() / n
        for row in x[:2]
    ]
    together = estimate(pv.ImportanceWeighted(5), (model, guide, (x[:2].repeat(n, 1),)))
    assert together.loss.item() / n == pytest.approx(sum(alone), abs=0.02)


@every_objective
def test_a_weight_of_the_kl_weighs_the_latents(make):
    pair = library_pair()
    with pv.kl_weight(0.0):
        free = estimate(make(), pair)
    whole = estimate(make(), pair)
    torch.testing.assert_close(free.rate, whole.rate)
    torch.testing.assert_close(free.distortion, whole.distortion)
    with pv.kl_weight(0.3):
        ours = estimate(pv.ImportanceWeighted(1), pair)
        theirs = estimate(Trace_ELBO(), pair)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs))


# --- gradients


def in_chunks(loss: Any, row: Tensor, chunks: int = 12, size: int = 3000) -> dict[str, Tensor]:
    """Gradients per datum from independent chunks of equal data, (chunks, ...)."""
    torch.manual_seed(3)
    model, guide, _ = library_pair()
    pair = model, guide, (row.expand(size, -1),)
    found = [gradients(loss, pair, seed) for seed in range(chunks)]
    return {name: torch.stack([g[name] for g in found]) / size for name in found[0]}


@pytest.mark.parametrize("beta", [1.0, 0.2, 2.0])
def test_doubly_reparameterized_gradients_have_the_same_mean(beta):
    row = double_bits(1)[0]
    with pv.kl_weight(beta):
        plain = in_chunks(pv.ImportanceWeighted(20), row)
        doubly = in_chunks(pv.DReG(20), row)
    assert plain.keys() == doubly.keys()
    for name, expected in plain.items():
        found = doubly[name]
        error = ((expected.var(0) + found.var(0)) / len(found)).sqrt()
        assert ((expected.mean(0) - found.mean(0)).abs() < 6 * error + 1e-9).all(), name


def shifted_posterior() -> tuple[LinearGaussian, Any]:
    """The exact posterior, in a form that can learn to be another."""
    truth = LinearGaussian.random()
    x = truth.sample(6)

    def guide(x: Tensor) -> None:
        exact: Any = truth.posterior(x)
        shift = pyro.param("shift", torch.zeros(2).double())
        factor = pyro.param("factor", torch.ones(2).double())
        with pyro.plate("data", len(x), dim=-1):
            tril = exact.scale_tril * factor
            pyro.sample("z", dist.MultivariateNormal(exact.loc + shift, scale_tril=tril))

    return truth, (truth.model, guide, (x,))


@pytest.mark.parametrize("loss", [pv.StickingTheLanding(), pv.DReG(4)], ids=repr)
def test_at_the_exact_posterior_the_path_has_no_noise(loss):
    _, pair = shifted_posterior()
    for gradient in gradients(loss, pair).values():
        assert gradient.abs().max() < 1e-10
    assert max(g.abs().max() for g in gradients(Trace_ELBO(), pair).values()) > 0.1


def test_wake_phases_fit_discrete_latents_as_sums_over_them_would():
    model, guide, _ = bernoulli_latents()
    x = double_bits(2)
    # Draws of each datum have their own weights, so copies of the data average what is left of
    # the bias and the noise of two thousand particles.
    found = gradients(pv.ReweightedWakeSleep(2000), (model, guide, (x.repeat(20, 1),)))
    weight, slope = pyro.param("weight"), pyro.param("slope")
    z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 3)
    log_prior = torch.full((8, 1), math.log(1 / 8)).double()
    log_p = log_prior + dist.Bernoulli(logits=z @ weight).to_event(1).log_prob(x[:, None]).T
    log_q = dist.Bernoulli(logits=x @ slope).to_event(1).log_prob(z[:, None])
    posterior = torch.softmax(log_p, 0).detach()
    exact = torch.autograd.grad(-(posterior * (log_p + log_q)).sum(), [weight, slope])
    for name, expected in zip(("weight", "slope"), exact, strict=True):
        ours = next(g for n, g in found.items() if name in n) / 20
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


# --- pairs and steps


SHARED_PLATE = [make for make in PAIRS if make not in (masked_pair, auxiliary_pair)]


@pytest.mark.parametrize("pair", SHARED_PLATE, ids=lambda make: make.__name__)
@every_objective
def test_any_pair_is_trained(make, pair):
    model, guide, args = pair()
    svi = pv.SVI(model, guide, lambda p: torch.optim.SGD(p, lr=1e-4), make())
    assert all(svi.step(*args).isfinite() for _ in range(2))


@pytest.mark.parametrize("pair", SHARED_PLATE[::2], ids=lambda make: make.__name__)
@every_objective
def test_compiled_steps_lead_where_eager_steps_lead(make, pair, interpreted):
    assert_alike(interpreted, pair, loss=make)


@every_objective
def test_of_several_shared_plates_one_holds_the_data(make, interpreted):
    named = partial(make, data_plate="data")
    assert_alike(interpreted, masked_pair, loss=named)
    model, guide, args = masked_pair()
    svi = pv.SVI(model, guide, lambda p: torch.optim.SGD(p, lr=1e-4), make())
    with pytest.raises(ValueError, match="say with data_plate= which one runs over the data"):
        svi.step(*args)


@every_objective
def test_fit_takes_them_and_logs_the_elbo_beside_the_loss(make, tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_vae.runs.fit.draw_run", lambda *run: None)
    (model, guide), x = bernoulli_pair(), bits(7)
    history = pv.fit(
        model, guide, x, loss=make(), epochs=3, batch_size=5, out=tmp_path / "run", progress=False
    )
    assert len(history["loss"]) == 3
    assert all(math.isfinite(value) for value in history["elbo"])
    again = pv.fit(
        model,
        guide,
        x,
        loss=make(),
        epochs=4,
        batch_size=5,
        out=tmp_path / "run",
        resume=True,
        progress=False,
    )
    assert len(again["loss"]) == 4


def test_an_objective_serves_many_pairs():
    loss = pv.ImportanceWeighted(3)
    for make in PAIRS[:3]:
        model, guide, args = make()
        svi = pv.SVI(model, guide, lambda p: torch.optim.SGD(p, lr=1e-4), loss)
        svi.step(*args)
    assert loss.structure is None


# --- what they refuse


def test_latents_without_a_path_are_refused_by_name():
    model, guide, args = bernoulli_latents()
    svi = pv.SVI(model, guide, lambda p: torch.optim.SGD(p, lr=1e-4), pv.DReG())
    with pytest.raises(ValueError, match=r"site 'z': .*\(Bernoulli\), which DReG needs; Rewei"):
        svi.step(*args)


def test_latents_of_all_data_have_no_weights():
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))

    svi = pv.SVI(model, guide, lambda p: torch.optim.SGD(p, lr=1e-4), pv.ImportanceWeighted())
    with pytest.raises(ValueError, match="site 'loc' is a latent outside the plate 'data'"):
        svi.step(torch.randn(5))


def test_sites_of_other_scales_are_refused():
    model, guide, args = library_pair()
    svi = pv.SVI(
        pyro.poutine.scale(model, 2.0),
        guide,
        lambda p: torch.optim.SGD(p, lr=1e-4),
        pv.ImportanceWeighted(),
    )
    with pytest.raises(ValueError, match=r"site 'z': expected the scale 2.0 .* got 1.0"):
        svi.step(*args)


@every_objective
def test_no_particles_are_refused(make):
    with pytest.raises(ValueError, match="expected num_particles >= 1, got 0"):
        make.func(0)
