"""Wake-sleep: both phases against exhaustive sums, on pairs of every kind, and what it refuses."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_runs import assert_alike
from helpers import (
    PAIRS,
    auxiliary_pair,
    bernoulli_latents,
    bernoulli_pair,
    bits,
    double_bits,
    leaves,
    library_pair,
    store_pair,
    subsampled_pair,
)
from objective_runs import estimate, gradients
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_vae as pv

DREAMING = [make for make in PAIRS if make is not auxiliary_pair]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-4)


# --- values and gradients


def test_the_loss_is_minus_the_elbo():
    pair = library_pair()
    ours, theirs = estimate(pv.WakeSleep(), pair), estimate(Trace_ELBO(), pair)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs))
    with torch.no_grad():
        quiet = estimate(pv.WakeSleep(), pair)
    torch.testing.assert_close(torch.stack(quiet), torch.stack(theirs))


def test_both_phases_have_the_gradients_of_sums_over_all_latents_and_data():
    """Three bits of latents, nine of data: 8 x 512 joint values, of which none is left out."""
    model, guide, _ = bernoulli_latents()
    x = double_bits(2)
    copies, chunks = 2000, 8
    many = (model, guide, (x.repeat(copies, 1),))
    found = [gradients(pv.WakeSleep(), many, seed) for seed in range(chunks)]
    weight, slope = pyro.param("weight"), pyro.param("slope")
    two = torch.tensor([0.0, 1.0]).double()
    z, all_x = torch.cartesian_prod(*[two] * 3), torch.cartesian_prod(*[two] * 9)

    def log_p(x: Tensor) -> Tensor:
        given_z = dist.Bernoulli(logits=z @ weight).to_event(1)
        return math.log(1 / 8) + given_z.log_prob(x[:, None])

    def log_q(x: Tensor) -> Tensor:
        return dist.Bernoulli(logits=x @ slope).to_event(1).log_prob(z[:, None]).T

    awake = -(log_q(x).exp().detach() * log_p(x)).sum()
    asleep = -len(x) * (log_p(all_x).exp().detach() * log_q(all_x)).sum()
    exact = {"weight": awake, "slope": asleep}
    for name, loss in exact.items():
        (expected,) = torch.autograd.grad(loss, [pyro.param(name)])
        ours = torch.stack([g for one in found for n, g in one.items() if name in n]) / copies
        error = ours.std(0) / chunks**0.5
        assert ((ours.mean(0) - expected).abs() < 6 * error + 1e-9).all(), name
        assert expected.abs().max() > 20 * error.max()


def test_neither_phase_reaches_the_parameters_of_the_other():
    """With one program frozen, the other learns what it learned before."""
    model, guide, (x,) = library_pair()
    both = gradients(pv.WakeSleep(), (model, guide, (x,)))
    for frozen, other in ((model, guide), (guide, model)):
        frozen.eval().requires_grad_(False)
        terms = estimate(pv.WakeSleep(), (model, guide, (x,)))
        names, parameters = zip(*other.named_parameters(), strict=True)
        for name, found in zip(names, torch.autograd.grad(terms.loss, parameters), strict=True):
            torch.testing.assert_close(found, both[name])
        frozen.requires_grad_(True)


def test_a_minibatch_stands_for_all_data_in_both_phases():
    model, guide, args = subsampled_pair()
    stands_for = 50 / len(args[0])
    whole = gradients(pv.WakeSleep(), (model, guide, args))
    unscaled = [pyro.poutine.scale(program, 1 / stands_for) for program in (model, guide)]
    for name, gradient in gradients(pv.WakeSleep(), (*unscaled, args)).items():
        torch.testing.assert_close(whole[name], gradient * stands_for)


def test_a_weight_of_the_kl_leaves_the_sleep_phase_alone():
    model, guide, args = library_pair()
    plain = gradients(pv.WakeSleep(), (model, guide, args))
    with pv.kl_weight(0.0):
        free = gradients(pv.WakeSleep(), (model, guide, args))
    for name, _ in guide.named_parameters():
        torch.testing.assert_close(plain[name], free[name])


def test_a_guide_that_may_be_the_posterior_becomes_it():
    """p(z) = N(0, 1), p(x|z) = N(2 z, 1): the posterior is N(0.4 x, 0.2)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.0))
        log_scale = pyro.param("log_scale", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, log_scale.exp()))

    svi = pv.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.02), pv.WakeSleep())
    for _ in range(250):
        svi.step(torch.zeros(500))  # dreams have their own data
    assert pyro.param("slope").item() == pytest.approx(0.4, abs=0.02)
    assert pyro.param("log_scale").exp().item() == pytest.approx(0.2**0.5, abs=0.02)


# --- pairs and steps


@pytest.mark.parametrize("make", DREAMING, ids=lambda make: make.__name__)
def test_any_pair_is_trained(make):
    model, guide, args = make()
    svi = pv.SVI(model, guide, sgd, pv.WakeSleep())
    assert all(svi.step(*args).isfinite() for _ in range(2))


@pytest.mark.parametrize(
    "make", [*DREAMING[::2], bernoulli_latents], ids=lambda make: make.__name__
)
def test_compiled_steps_lead_where_eager_steps_lead(make, interpreted):
    assert_alike(interpreted, make, loss=pv.WakeSleep)


def test_arguments_may_come_by_name():
    model, guide, args = store_pair()
    by_place = gradients(pv.WakeSleep(), (model, guide, args))
    objective = pv.WakeSleep()
    objective.prepare(model, guide, (), {"x": args[0]})
    pyro.set_rng_seed(1)
    terms = objective.terms(model, guide, (), {"x": args[0]})
    named = leaves(model, guide)
    for name, found in zip(named, torch.autograd.grad(terms.loss, [*named.values()]), strict=True):
        torch.testing.assert_close(found, by_place[name])


def test_fit_takes_it_and_logs_the_elbo(tmp_path):
    (model, guide), x = bernoulli_pair(), bits(7)
    options: dict[str, Any] = {"batch_size": 5, "out": tmp_path / "run", "progress": False}
    first = pv.fit(model, guide, x, loss=pv.WakeSleep(), epochs=3, **options)
    assert all(math.isfinite(value) for value in first["elbo"])
    again = pv.fit(model, guide, x, loss=pv.WakeSleep(), epochs=4, resume=True, **options)
    assert again["elbo"][:3] == first["elbo"]


# --- what it refuses


def test_latents_of_the_guide_alone_are_refused():
    model, guide, args = auxiliary_pair()
    svi = pv.SVI(model, guide, sgd, pv.WakeSleep())
    with pytest.raises(ValueError, match="site 'a' stands in the guide alone"):
        svi.step(*args)


def test_a_model_that_can_not_dream_is_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(z + x.mean(), 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * pyro.param("slope", torch.ones(())), 1.0))

    svi = pv.SVI(model, guide, sgd, pv.WakeSleep())
    with pytest.raises(ValueError, match="argument 0: the model computes with a value"):
        svi.step(torch.randn(4))


def test_a_point_gives_no_density_to_dreams():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x * pyro.param("slope", torch.ones(()))))

    svi = pv.SVI(model, guide, sgd, pv.WakeSleep())
    with pytest.raises(ValueError, match=r"site 'z': the guide \(Delta\) gives no finite density"):
        svi.step(torch.randn(4))
