"""The conditional experiment: p(x|y), and the same networks with the labels hidden."""

import runpy
from pathlib import Path

import pytest
import torch
from affine import affine
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyro_vae as pv

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "conditional.py"))


def test_with_the_exact_posterior_every_weight_is_the_evidence_given_the_label():
    """z = A y + a + S e, x = W z + B y + b + s e': normal given y, and the posterior affine."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    (prior_weight, prior_bias), (across, shift, bias) = (
        (random(2, 3), random(2)),
        (random(5, 2), random(5, 3), random(5)),
    )
    spread, noise = 0.6**2 * torch.eye(2).double(), 0.7**2 * torch.eye(5).double()
    model = pv.Model(
        affine(prior_weight, prior_bias, spread),
        affine(torch.cat([across, shift], 1), bias, noise),
    )
    covariance = across @ spread @ across.T + noise
    weight, mean = across @ prior_weight + shift, across @ prior_bias + bias  # E[x|y]
    gain = torch.linalg.solve(covariance, across @ spread).T
    posterior = affine(
        torch.cat([gain, prior_weight - gain @ weight], 1),
        prior_bias - gain @ mean,
        spread - gain @ across @ spread,
    )
    y = torch.eye(3).double()[torch.arange(7) % 3]
    marginal = MultivariateNormal(y @ weight.T + mean, covariance)
    x = marginal.sample()
    weights = pv.log_weights(model, pv.Guide(posterior), x, y, num_particles=9)
    exact = marginal.log_prob(x).expand(9, 7)
    torch.testing.assert_close(weights, exact, rtol=0, atol=1e-9)


def made(*, hidden: bool) -> tuple[pv.Model, pv.Guide]:
    torch.manual_seed(0)
    return SCRIPT["build"](3, [8], hidden=hidden)


def data() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 17, (12, 64)).float(), SCRIPT["one_hot"](torch.arange(12) % 10)


def test_hidden_labels_are_zeros_in_every_network():
    x, y = data()
    hidden = pv.log_weights(*made(hidden=True), x, y, num_particles=5)
    assert torch.equal(
        hidden, pv.log_weights(*made(hidden=False), x, torch.zeros_like(y), num_particles=5)
    )
    assert torch.equal(hidden, pv.log_weights(*made(hidden=True), x, y.roll(1, 0), num_particles=5))
    shown = pv.log_weights(*made(hidden=False), x, y, num_particles=5)
    other = pv.log_weights(*made(hidden=False), x, y.roll(1, 0), num_particles=5)
    assert (shown != other).all()


def test_both_pairs_are_compared_datum_by_datum():
    x, y = data()
    shown, hidden = (
        pv.log_evidence(*made(hidden=hidden), x, y, num_particles=5) for hidden in (False, True)
    )
    found = pv.compare(shown, hidden)
    assert found.mean == pytest.approx(shown.mean - hidden.mean)


def test_a_step_moves_every_parameter():
    x, y = data()
    model, guide = made(hidden=False)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params, lr=1e-2))
    svi.step(x, y)
    after = (*model.parameters(), *guide.parameters())
    assert all((a != b).any() for a, b in zip(before, after, strict=True))


def test_digits_are_drawn_in_rows(tmp_path):
    model, _ = made(hidden=False)
    SCRIPT["picture"](model, tmp_path / "digits.png", num_columns=3)
    assert (tmp_path / "digits.png").stat().st_size > 1000
