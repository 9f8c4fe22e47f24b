"""The semi-supervised experiment: its sum over labels, by hand and in closed form."""

import math
import runpy
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import leaves
from objective_runs import estimate
from pyro.infer import TraceEnum_ELBO
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot, softplus

import pyro_vae as pv

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "semi_supervised.py"))
LOSS = TraceEnum_ELBO(max_plate_nesting=1)
ALPHA = 1.7


def made(hidden_dims: list[int]) -> tuple[Any, Any, tuple[Tensor, Tensor, Tensor]]:
    """The script's pair in float64, and seven images of which three have labels."""
    model, guide = SCRIPT["build"](3, hidden_dims, ALPHA)
    x = torch.randint(0, 17, (7, 64)).double()
    known = torch.tensor([True, False, False, True, False, True, False])
    args = SCRIPT["arguments"](x, torch.randint(0, 10, (7,)), known)
    return model.double(), guide.double(), args


def by_hand(pair: Any, noise: Tensor) -> Tensor:
    """Minus the objective of the script's head: labels one after the other, densities spelled out.

    Args:
        noise: Of z for every label, (C, B, Z).
    """
    model, guide, (x, y, known) = pair
    log_q = guide.classifier.network(x).squeeze(-2).log_softmax(-1)
    bounds = []
    for label, epsilon in zip(torch.eye(10, dtype=x.dtype), noise, strict=True):
        digit = label.expand(len(x), 10)
        loc, unconstrained = guide.encoder.network(x, digit).unbind(-2)
        scale = 1e-6 + softplus(unconstrained)
        z = loc + scale * epsilon
        logits = model.likelihood.network(z, digit).squeeze(-2)
        log_choose = math.lgamma(17) - torch.lgamma(x + 1) - torch.lgamma(17 - x)
        log_x = (log_choose + x * logsigmoid(logits) + (16 - x) * logsigmoid(-logits)).sum(-1)
        log_z = (-0.5 * z**2).sum(-1)  # the constant is also in log q(z|x, y)
        log_q_z = (-0.5 * epsilon**2 - scale.log()).sum(-1)
        bounds.append(log_x - math.log(10) + log_z - log_q_z)
    bound = torch.stack(bounds, -1)
    without = (log_q.exp() * (bound - log_q)).sum(-1)
    labelled = (y * bound).sum(-1) + ALPHA * (y * log_q).sum(-1)
    return -torch.where(known, labelled, without).sum()


def test_the_enumerated_loss_is_the_sum_over_labels_by_hand():
    pair = made([8])
    terms = estimate(LOSS, pair, seed=3)
    pyro.set_rng_seed(3)
    zeros = torch.zeros(10, 7, 3, dtype=torch.float64)
    expected = by_hand(pair, torch.normal(zeros, torch.ones_like(zeros)))
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    parameters = leaves(*pair[:2])
    assert len(parameters) == 12
    ours = torch.autograd.grad(terms.loss, list(parameters.values()))
    exact = torch.autograd.grad(expected, list(parameters.values()))
    for name, one, other in zip(parameters, ours, exact, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def naive_bayes() -> tuple[Any, tuple[Tensor, Tensor, Tensor], Tensor]:
    """The script's pair, affine, z unused: q(y|x) is the exact posterior of y.

    Levels are binomial with logits l_y, so log p(x|y) = x l_y - 16 sum_d log(1 + e^l_yd) + a
    constant of x, which the classifier can say exactly.

    Returns:
        The pair, its arguments, and log p(x, y), (B, C).
    """
    model, guide, args = made([])
    levels = torch.randn(10, 64, dtype=torch.float64) / 4
    with torch.no_grad():
        for parameter in leaves(model, guide).values():
            parameter.zero_()
        model.likelihood.network.layers[0].weight[:, 3:] = levels.T
        guide.classifier.network.network.layers[0].weight.copy_(16 * levels)
        guide.classifier.network.network.layers[0].bias.copy_(-16 * softplus(levels).sum(-1))
        bias = guide.encoder.network.network.layers[0].bias  # q(z|x, y) = N(0, I)
        bias[3:] = pv.families.inverse_softplus(1 - 1e-6)
    x = args[0].unsqueeze(-2)
    log_joint = dist.Binomial(16, logits=levels).log_prob(x).sum(-1) - math.log(10)
    return (model, guide, args), args, log_joint


def test_with_the_exact_posterior_weights_and_bound_are_the_evidence():
    (model, guide, _), (x, _, _), log_joint = naive_bayes()
    exact = log_joint.logsumexp(-1)
    args = SCRIPT["unlabelled"](x)
    weights = pv.log_weights(model, guide, *args, num_particles=20)
    torch.testing.assert_close(weights, exact.expand(20, 7), rtol=0, atol=1e-9)
    found = estimate(LOSS, (model, guide, args)).loss.item()
    assert found == pytest.approx(-exact.sum().item(), rel=1e-12)


def test_a_known_label_gives_the_joint_density_and_the_classifiers_term():
    pair, (_, y, known), log_joint = naive_bayes()
    exact = log_joint.logsumexp(-1)
    of_label = (y * log_joint).sum(-1)
    labelled = of_label + ALPHA * (of_label - exact)
    expected = -torch.where(known, labelled, exact).sum().item()
    assert estimate(LOSS, pair).loss.item() == pytest.approx(expected, rel=1e-12)


def test_a_step_moves_every_parameter():
    model, guide, args = made([8])
    parameters = leaves(model, guide)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params, lr=1e-2), loss=LOSS)
    svi.step(*args)
    assert set(map(id, svi.parameters.named.values())) == set(map(id, parameters.values()))
    assert all((p != before[name]).any() for name, p in parameters.items())


def test_what_stands_in_place_of_an_unknown_label_is_looked_at_by_nobody():
    model, guide, (x, y, known) = made([8])
    other = torch.where(known.unsqueeze(-1), y, y.roll(3, -1))
    assert (other != y).any(1).equal(~known)
    one = estimate(LOSS, (model, guide, (x, y, known))).loss
    assert torch.equal(one, estimate(LOSS, (model, guide, (x, other, known))).loss)
    swapped = estimate(LOSS, (model, guide, (x, y.roll(3, -1), known))).loss
    assert not torch.isclose(one, swapped)


def test_few_labels_are_spread_over_the_classes():
    labels = torch.randint(0, 10, (500,))
    known = SCRIPT["few"](labels, 40, 0)
    assert torch.equal(labels[known].bincount(minlength=10), torch.full((10,), 4))
    assert torch.equal(known, SCRIPT["few"](labels, 40, 0))
    assert not torch.equal(known, SCRIPT["few"](labels, 40, 1))
    _, y, _ = SCRIPT["arguments"](torch.zeros(500, 64), labels, known)
    assert torch.equal(y[known], one_hot(labels[known], 10).float())
    assert (y[~known].argmax(-1) == 0).all()


def test_labels_alone_teach_a_classifier():
    x = 16 * torch.eye(10).repeat(1, 7)[:, :64]
    classifier = SCRIPT["make_classifier"]([16])
    SCRIPT["train_alone"](classifier, x, torch.eye(10), 300)
    assert classifier(x).logits.argmax(-1).tolist() == list(range(10))
