"""Families whose dimensions depend on one another: scipy and integrals say what they are."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from values import counts, reals

from pyro_vae import families

# --- densities of vectors


def test_normals_of_many_covariances():
    oracle: Any = scipy.stats.multivariate_normal
    params, x = torch.randn(4, 6, 5, dtype=torch.float64), reals(4, 5)
    full = families.full_normal(params)
    low = families.low_rank_normal(params[:, :4])
    for i in range(4):
        matrix = params[i, 1:].tril(-1) + torch.diag(1e-6 + params[i, 1:].diagonal().exp().log1p())
        columns, scale = params[i, 2:4].T, 1e-6 + params[i, 1].exp().log1p()
        for p, covariance in (
            (full, matrix @ matrix.T),
            (low, columns @ columns.T + scale.square().diag()),
        ):
            expected = oracle(params[i, 0].numpy(), covariance.numpy()).logpdf(x[i].numpy())
            assert p.log_prob(x)[i].item() == pytest.approx(expected, rel=1e-9)
    for family, size in ((families.full_normal, 4), (families.low_rank_normal, 2)):
        with pytest.raises(ValueError, match=rf"families\.{family.__name__}: expected params"):
            family(torch.zeros(7, size, 5))


@pytest.mark.parametrize("dim", [2, 3])
def test_directions_integrate_to_one(dim):
    p = families.projected_normal(torch.randn(1, dim, dtype=torch.float64))
    step = np.linspace(0, np.pi, 401)[:-1] + np.pi / 800
    if dim == 2:
        angles = torch.as_tensor(2 * step)
        points, area = torch.stack([angles.cos(), angles.sin()], -1), 2 * np.pi / 400
        total = (p.log_prob(points).exp() * area).sum()
    else:
        polar, around = np.meshgrid(step, 2 * step)
        grid = [np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)]
        points = torch.as_tensor(np.stack(grid, -1))
        weights = torch.as_tensor(np.sin(polar)) * (np.pi / 400) * (2 * np.pi / 400)
        total = (p.log_prob(points).exp() * weights).sum()
    assert total.item() == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ValueError, match="expected D = 2 or 3"):
        families.projected_normal(torch.zeros(1, 4))


# --- counts of a total


def test_counts_of_any_totals_are_scored_as_scipy_scores_them():
    params = torch.randn(6, 1, 4, dtype=torch.float64)
    x = counts(6, 4)
    log_prob = families.multinomial(params).log_prob(x)
    for i in range(6):
        p = torch.softmax(params[i, 0], -1).numpy()
        expected = scipy.stats.multinomial.logpmf(x[i].numpy(), int(x[i].sum()), p / p.sum())
        assert log_prob[i].item() == pytest.approx(expected, rel=1e-9)


def test_counts_are_drawn_of_the_total_that_is_said():
    p = families.multinomial(torch.randn(1, 4, dtype=torch.float64), total_count=20)
    draws = p.sample((20_000,))
    assert (draws.sum(-1) == 20).all()
    assert (draws == draws.round()).all()
    error = (draws.mean(0) - p.mean).abs() / (p.variance / 20_000).sqrt()
    assert (error < 5).all()
    torch.testing.assert_close(draws.var(0), p.variance, rtol=0.1, atol=0.05)


def test_a_total_that_disagrees_is_refused():
    p = families.multinomial(torch.zeros(3, 1, 4), total_count=5)
    with pytest.raises(ValueError, match=r"add up to total_count \(5\), got totals of 4 to 8"):
        p.log_prob(torch.tensor([[1.0, 1, 1, 1], [2, 2, 2, 2], [2, 1, 1, 1]]))
    with pytest.raises(ValueError, match="to draw, say it with total_count="):
        families.multinomial(torch.zeros(1, 4)).sample()
    with pytest.raises(ValueError, match="within the support"):
        families.multinomial(torch.zeros(1, 2)).log_prob(torch.tensor([0.5, 0.5]))


# --- one choice


def test_one_choice_is_a_softmax_over_the_axes():
    params = torch.randn(3, 1, 1, 4, dtype=torch.float64)
    p = families.one_hot(params)
    assert p.batch_shape == (3, 1)
    assert p.event_shape == (4,)
    expected = torch.log_softmax(params[:, :, 0], -1)
    torch.testing.assert_close(p.log_prob(torch.eye(4).double()), expected[:, 0])
    draws = p.sample((20_000,))
    assert (draws.sum(-1) == 1).all()
    share = draws.mean(0)
    error = (expected.exp() * (1 - expected.exp()) / 20_000).sqrt()
    assert ((share - expected.exp()).abs() < 5 * error).all()
    with pytest.raises(ValueError, match=r"^families\.one_hot: expected params of shape"):
        families.one_hot(torch.zeros(7, 2, 4))
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.ones(4))
