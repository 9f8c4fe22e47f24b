"""The posterior predictive density, with errors that cover though all data share draws."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from shared_mean import SharedMean
from torch import Tensor

import pyro_vae as pv


def test_the_predictive_density_is_the_exact_one_within_its_errors():
    truth = SharedMean.random(5)
    new = SharedMean(truth.local, truth.x + 0.5).x
    estimate = pv.log_predictive(
        truth.model, partial(truth.guide, own=1.5), new, num_global=150, num_particles=10
    )
    error = estimate.value - truth.log_predictive(new)
    assert (error.abs() < 4 * estimate.standard_error).all()
    assert estimate.standard_error.max() < 0.3
    assert abs(error.mean()) < 4 * estimate.mean_standard_error
    assert (estimate.elbo < estimate.value).all()
    assert estimate.share.shape == (150, 5)
    assert ((estimate.ess > 1) & (estimate.ess < 150)).all()


def test_the_errors_cover_repetitions_though_all_data_share_the_draws():
    truth = SharedMean.random(5)
    new = truth.local.sample(40)
    exact, count = truth.log_predictive(new), 30
    estimates = [
        pv.log_predictive(
            truth.model,
            partial(truth.guide, own=1.3),
            new,
            num_global=15,
            num_particles=3,
            seed=seed,
        )
        for seed in range(count)
    ]
    misses = torch.tensor([(e.value - exact).mean() - e.bias for e in estimates])
    told = torch.tensor([e.mean_standard_error for e in estimates]).square().mean().sqrt()
    assert misses.square().mean().sqrt().item() == pytest.approx(told.item(), rel=0.4)
    independent = torch.stack([e.standard_error for e in estimates]).square().mean(0)
    assert independent.sum().sqrt() / 40 < 0.6 * told  # what errors of each datum alone would say


def test_errors_of_shared_draws_by_simulation():
    """Known shares: the error of the mean, the test set's, and that of a comparison."""
    generator = torch.Generator().manual_seed(0)
    s, n, repetitions = 100, 20, 1000
    means, told, sampling, paired = [], [], [], []
    for _ in range(repetitions):
        shared, own, data = (
            torch.randn(*shape, generator=generator).double() for shape in ((s, 1), (s, n), (n,))
        )
        p = (1 + 0.3 * shared + 0.3 * own).clamp_min(0.01)  # of mean one for every draw
        value, share = data / 10 + p.mean(0).log(), p / p.sum(0)
        error = (p.std(0) / p.mean(0)) / s**0.5
        e = pv.PredictiveEstimate(value, error, error, value, num_particles=1, share=share)
        means.append(e.mean - e.bias)
        told.append(e.mean_standard_error)
        sampling.append(e.sampling_error)
        zeros = torch.zeros(n).double()
        exact = pv.Estimate(zeros, zeros, zeros, zeros, num_particles=1)
        paired.append(pv.compare(e, exact).mean_standard_error)
    spread = torch.tensor(means).std().item()
    assert torch.tensor(sampling).square().mean().sqrt().item() == pytest.approx(spread, rel=0.08)
    assert paired == pytest.approx(sampling, rel=1e-9)
    of_draws = math.sqrt((0.3**2 + 0.3**2 / n) / s)
    assert torch.tensor(told).square().mean().sqrt().item() == pytest.approx(of_draws, rel=0.08)


def test_a_draw_without_spread_has_no_error():
    truth = SharedMean.random(5)
    e = pv.log_predictive(truth.model, truth.guide, truth.x, num_global=1, num_particles=2)
    assert math.isnan(e.mean_standard_error)
    assert e.standard_error.isnan().all()
    text = str(replace(e, share=torch.full((2, 5), 0.5).double()))
    assert "2 draws of the global latents, 2 particles each" in text


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_chunks_change_nothing(chunk_size):
    truth = SharedMean.random(120)
    guide = partial(truth.guide, own=1.3)
    count: Any = {"num_global": 3, "num_particles": 10}
    plain = pv.log_predictive(truth.model, guide, truth.x, **count, compile=False)
    other = pv.log_predictive(truth.model, guide, truth.x, **count, chunk_size=chunk_size)
    torch.testing.assert_close(other.value, plain.value, rtol=0, atol=1e-10)
    torch.testing.assert_close(other.share, plain.share, rtol=0, atol=1e-10)


def test_more_data_extend_fewer():
    truth = SharedMean.random(220)
    guide = partial(truth.guide, own=1.3)
    longer, shorter = (
        pv.log_predictive(truth.model, guide, x, num_global=3, num_particles=10)
        for x in (truth.x, truth.x[:200])
    )
    torch.testing.assert_close(longer.value[:200], shorter.value, rtol=0, atol=1e-10)


def test_the_estimates_of_a_point_and_of_its_average_are_of_the_same_data():
    """A guide of one value: the predictive density is the likelihood there, of local error only."""
    truth = SharedMean.random(9)
    value = truth.posterior().loc
    point = replace(truth.local, bias=value)

    def guide(x: Tensor) -> None:
        pyro.sample("theta", dist.Delta(value, event_dim=1))
        point.guide(x)

    averaged = pv.log_predictive(truth.model, guide, truth.x, num_global=3, num_particles=2)
    plain = pv.log_evidence(point.model, point.guide, truth.x, num_particles=2)
    difference = pv.compare(averaged, plain)
    torch.testing.assert_close(difference.difference, torch.zeros(9).double(), rtol=0, atol=1e-10)
    assert averaged.mean_standard_error < 1e-10
