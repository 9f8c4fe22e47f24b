"""The hierarchies of the experiment: exact with exact posteriors, in both orders, at any depth."""

import runpy
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from affine import Variables
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

import pyro_vae as pv

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "hierarchies.py"))
Hierarchy, BottomUp, TopDown = (SCRIPT[name] for name in ("Hierarchy", "BottomUp", "TopDown"))
DIRECTIONS = pytest.mark.parametrize("direction", [BottomUp, TopDown], ids=["up", "down"])
DEPTHS = pytest.mark.parametrize("dims", [(2,), (3, 2), (2, 3, 2)], ids=["one", "two", "three"])


def exact_pair(direction: Any, dims: tuple[int, ...]) -> tuple[Variables, Any, Any]:
    """A linear-Gaussian chain in the script's programs, with its posterior as the guide."""
    names = [f"z{level}" for level in range(1, len(dims) + 1)]
    chain = Variables()
    chain.add(names[-1], dims[-1], 1.0)
    for below, above in reversed(list(pairwise(names))):
        chain.add(below, dims[int(below[1:]) - 1], 0.8, above)
    chain.add("x", 5, 0.7, "z1")
    model = Hierarchy(
        pv.priors.StandardNormal(dims[-1]).double(),
        [chain.steps[name] for name in reversed(names[:-1])],
        chain.steps["x"],
    )
    if direction is BottomUp:
        return chain, model, BottomUp([chain.given(*p[::-1]) for p in pairwise(["x", *names])])
    lower = [chain.given(below, "x", above) for below, above in reversed(list(pairwise(names)))]
    return chain, model, TopDown([chain.given(names[-1], "x"), *lower])


@DEPTHS
@DIRECTIONS
def test_with_the_exact_posterior_every_weight_is_the_evidence(direction, dims):
    chain, model, guide = exact_pair(direction, dims)
    marginal = chain.marginal("x")
    x = marginal.sample((7,))
    weights = pv.log_weights(model, guide, x, num_particles=9)
    exact = marginal.log_prob(x).expand(9, 7)
    torch.testing.assert_close(weights, exact, rtol=0, atol=1e-9)


@DEPTHS
@DIRECTIONS
def test_the_rates_of_the_layers_add_up_to_the_kl_of_all(direction, dims):
    chain, model, guide = exact_pair(direction, dims)
    names = [f"z{level}" for level in range(1, len(dims) + 1)]
    x = chain.marginal("x").sample((4,))
    rates = SCRIPT["layer_rates"](model, guide, x, 20_000)
    prior, joint, n = chain.marginal(*names), chain.marginal(*names, "x"), sum(dims)
    covariance = joint.covariance_matrix
    gain = torch.linalg.solve(covariance[n:, n:], covariance[n:, :n]).T
    posterior = torch.distributions.MultivariateNormal(
        prior.mean + (x - joint.mean[n:]) @ gain.T, covariance[:n, :n] - gain @ covariance[n:, :n]
    )
    total = kl_divergence(posterior, prior).mean().item()
    # A draw scatters by two or three nats, the mean of 80,000 by a hundredth.
    assert sum(rates) == pytest.approx(total, abs=0.05)
    if direction is TopDown:
        top = kl_divergence(chain.given(names[-1], "x")(x), chain.marginal(names[-1]))
        assert rates[-1] == pytest.approx(top.mean().item(), abs=0.05)


def small(direction: Any, *dims: int) -> tuple[Any, Any, torch.Tensor]:
    model, guide = SCRIPT["build"](direction, dims, [8])
    return model, guide, torch.randint(0, 17, (12, 64)).float()


def test_one_layer_is_the_ordinary_pair():
    model, guide, x = small(TopDown, 3)
    other, x_again = small(BottomUp, 3)[1:]
    assert [p.shape for p in guide.parameters()] == [p.shape for p in other.parameters()]
    assert x.shape == x_again.shape
    plain = pv.Model(model.prior, model.likelihood), pv.Guide(guide.encoders[0])
    weights = pv.log_weights(model, guide, x, num_particles=5)
    assert torch.equal(weights, pv.log_weights(*plain, x, num_particles=5))


@DIRECTIONS
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_step_moves_every_parameter(direction, loss):
    model, guide, x = small(direction, 4, 3, 2)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params, lr=1e-2), loss=loss())
    with warnings.catch_warnings():
        if (direction, loss) == (BottomUp, TraceMeanField_ELBO):
            warnings.simplefilter("ignore")  # the next test is about this one
        svi.step(x)
    after = (*model.parameters(), *guide.parameters())
    assert len(before) == len(after) > 20
    assert all((a != b).any() for a, b in zip(before, after, strict=True))


def test_the_closed_form_is_left_where_the_script_says():
    def warned(direction: Any) -> list[str]:
        model, guide, x = small(direction, 4, 3, 2)
        svi = pv.SVI(model, guide, lambda p: torch.optim.Adam(p), loss=TraceMeanField_ELBO())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            svi.setup(x)
        assert all("analytic KL would be biased" in str(w.message) for w in caught)
        return [str(w.message).split("'")[1] for w in caught]

    assert warned(TopDown) == []
    assert warned(BottomUp) == ["z1", "z2"]


def test_what_is_kept_comes_from_the_datum_and_nothing_else_does():
    model, guide, x = small(TopDown, 4, 2)
    redrawn = SCRIPT["redrawn"]
    assert redrawn(model, guide, x, 0, 3).shape == (36, 64)
    assert torch.equal(redrawn(model, guide, x, 0, 1), redrawn(model, guide, 16 - x, 0, 1))
    for kept in (1, 2):
        torch.manual_seed(0)
        one = redrawn(model, guide, x, kept, 1)
        torch.manual_seed(0)
        assert torch.equal(redrawn(model, guide, x, kept, 1), one)
        torch.manual_seed(0)
        assert (redrawn(model, guide, 16 - x, kept, 1) != one).any(1).all()
    # With all layers kept nothing is left to draw.
    first, second = redrawn(model, guide, x, 2, 2).split(12)
    assert torch.equal(first, second)
