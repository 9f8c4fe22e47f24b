"""Estimators of a gradient against the exact one of a linear-Gaussian pair."""

import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LinearGaussian
from pyro.distributions import MultivariateNormal
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vae as pv

PATH = Path(__file__).parents[1] / "experiments" / "estimator_study.py"
SCRIPT = runpy.run_path(str(PATH))
ESTIMATORS, gradients = (SCRIPT[n] for n in ("ESTIMATORS", "gradients"))
WEIGHTED = ("importance weighted", "doubly reparameterized")  # with several draws, another bound
OF_THE_ELBO = [(e, k) for e in ESTIMATORS for k in (1, 3) if k == 1 or e not in WEIGHTED]
SCALE, COPIES, REPEATS = 0.7, 400, 30

pytestmark = pytest.mark.filterwarnings("ignore:.*REINFORCE")


def linear_pair(orthogonal: bool = False) -> tuple[pv.Model, pv.Guide, LinearGaussian]:
    """Affine encoder and decoder, so that bound and posterior are known exactly."""
    layers = partial(pv.networks.mlp, hidden_dims=())
    encoder = pv.Conditional(layers(5, (2, 2)), pv.families.normal)
    family = partial(pv.families.fixed_normal, scale=SCALE)
    likelihood = pv.Conditional(layers(2, (1, 5)), family)
    model, guide = pv.Model(pv.priors.StandardNormal(2), likelihood), pv.Guide(encoder)
    model, guide = model.double(), guide.double()
    parameters = dict(model.named_parameters())
    weight, bias = (parameters[f"likelihood.network.layers.0.{n}"] for n in ("weight", "bias"))
    with torch.no_grad():
        weight.copy_(torch.linalg.qr(weight).Q if orthogonal else 2 * weight)
    return model, guide, LinearGaussian(weight, bias, SCALE)


def exact_bound(guide: pv.Guide, oracle: LinearGaussian, x: Tensor) -> Tensor:
    """log p(x) - KL(q(z|x) || p(z|x)), mean over the data, in nats."""
    q: Any = pv.families.normal(guide.encoder.network(x)).base_dist  # type: ignore[operator]
    full = MultivariateNormal(q.loc, scale_tril=torch.diag_embed(q.scale))
    gap = kl_divergence(full, oracle.posterior(x))
    return (oracle.log_evidence(x) - gap).mean()


def exact_gradient(program: torch.nn.Module, bound: Tensor) -> Tensor:
    found = torch.autograd.grad(bound, list(program.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def z_scores(rows: Tensor, expected: Tensor) -> Tensor:
    """How many standard errors the mean of estimates (R, P) is off; rounding counts for none."""
    error = rows.std(0) / len(rows) ** 0.5 + 1e-9
    return (rows.mean(0) - expected) / error


@pytest.mark.parametrize(("name", "particles"), OF_THE_ELBO)
def test_all_estimators_but_the_detached_ones_are_unbiased(name, particles):
    model, guide, oracle = linear_pair()
    x = torch.randn(3, 5, dtype=torch.float64)
    bound = exact_bound(guide, oracle, x)
    loss, guide.encoder.family = ESTIMATORS[name]
    rows = gradients((model, guide), loss(particles), [x.repeat(COPIES, 1)] * REPEATS)[0]
    assert z_scores(rows["decoder"], exact_gradient(model, bound)).abs().max() < 5
    off = z_scores(rows["encoder"], exact_gradient(guide, bound))
    if name.startswith("detached"):
        assert off.abs().max() > 30
    else:
        assert off.abs().max() < 5


def test_what_is_left_of_a_detached_gradient():
    """Nothing but noise, or the KL alone, which has no noise."""
    model, guide, _ = linear_pair()
    x = torch.randn(3, 5, dtype=torch.float64)
    q: Any = pv.families.normal(guide.encoder.network(x)).base_dist  # type: ignore[operator]
    kl = (q.scale.square() + q.loc.square() - 1).sum() / 2 - q.scale.log().sum()
    for name, expected in (("detached", 0.0), ("detached, exact KL", -kl / 3)):
        loss, guide.encoder.family = ESTIMATORS[name]
        rows = gradients((model, guide), loss(1), [x.repeat(COPIES, 1)] * REPEATS)[0]["encoder"]
        if isinstance(expected, Tensor):
            assert rows.std(0).max() < 1e-12
            torch.testing.assert_close(rows[0], exact_gradient(guide, expected))
        else:
            assert z_scores(rows, torch.zeros(())).abs().max() < 5
            assert rows.std(0).max() > 0.01


def test_doubly_reparameterized_weights_have_the_gradient_of_the_weighted_bound():
    model, guide, _ = linear_pair()
    batches = [torch.randn(3, 5, dtype=torch.float64).repeat(COPIES, 1)] * REPEATS
    found = []
    for name in WEIGHTED:
        loss, guide.encoder.family = ESTIMATORS[name]
        found.append(gradients((model, guide), loss(4), batches)[0]["encoder"])
    error = sum(rows.var(0) / len(rows) for rows in found) ** 0.5
    assert ((found[0].mean(0) - found[1].mean(0)) / error).abs().max() < 5
    assert found[1].var(0).sum() < found[0].var(0).sum()


def test_at_the_posterior_the_draws_path_has_no_noise_and_the_score_function_has():
    model, guide, oracle = linear_pair(orthogonal=True)
    x = torch.randn(50, 5, dtype=torch.float64)
    posterior = oracle.posterior(x)
    layer: Any = guide.encoder.network.layers[0]  # type: ignore[index, union-attr]
    with torch.no_grad():  # loc = covariance W'(x - b) / s^2, one scale for all
        covariance = posterior.covariance_matrix[0]
        layer.weight[:2] = covariance @ oracle.weight.T / SCALE**2
        layer.bias[:2] = -layer.weight[:2] @ oracle.bias
        layer.weight[2:] = 0.0
        layer.bias[2:] = (covariance.diagonal().sqrt() - 1e-6).expm1().log()
    noise = {}
    for name in ("sticking the landing", "Monte Carlo", "score function"):
        loss, guide.encoder.family = ESTIMATORS[name]
        rows = gradients((model, guide), loss(1), [x] * 20)[0]["encoder"]
        noise[name] = rows.var(0).sum().item()
    assert noise["sticking the landing"] < 1e-20
    assert noise["Monte Carlo"] > 1e-4
    assert noise["score function"] > 1e-4
