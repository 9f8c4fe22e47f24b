"""The two errors of a mean, and how an estimate is printed."""

import math

import numpy as np
import pytest
import torch

import pyro_vae as pv


def estimate(size: int = 50) -> pv.Estimate:
    generator = torch.Generator().manual_seed(0)
    value, error, ess, elbo = torch.rand(4, size, generator=generator, dtype=torch.float64)
    return pv.Estimate(-90 - value, error, 1 + 9 * ess, -95 - elbo, num_particles=10)


def test_the_mean_and_the_sampling_error_are_numpys():
    e = estimate()
    values = e.value.numpy()
    assert e.mean == pytest.approx(np.mean(values), rel=1e-14)
    assert e.sampling_error == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, rel=1e-13)


def test_the_estimators_error_of_the_mean_is_that_of_independent_errors():
    e = estimate()
    expected = math.sqrt(sum(s**2 for s in e.standard_error.tolist())) / 50
    assert e.mean_standard_error == pytest.approx(expected, rel=1e-13)


def test_the_estimators_error_covers_repetitions():
    """Independent errors of known size: their mean scatters as the error says."""
    size, generator = 20, torch.Generator().manual_seed(0)
    errors = torch.linspace(0.1, 2.0, size, dtype=torch.float64)
    noise = torch.randn(20_000, size, generator=generator, dtype=torch.float64) * errors
    e = pv.Estimate(noise[0], errors, errors, errors, num_particles=1)
    assert noise.mean(1).std().item() == pytest.approx(e.mean_standard_error, rel=0.02)


def test_one_datum_has_no_sampling_error():
    e = estimate(1)
    assert math.isnan(e.sampling_error)
    assert e.mean_standard_error == e.standard_error.item()


def test_both_errors_are_printed_and_told_apart():
    e = estimate()
    text = str(e)
    assert f"{e.mean:.3f} nats per datum" in text
    assert f"{e.mean_standard_error:.3f} (estimator)" in text
    assert f"{e.sampling_error:.2f} (test set)" in text
    assert "50 data, 10 particles" in text
    assert f"lowest {e.ess.min().item():.1f}" in text


def test_an_estimate_cannot_be_changed():
    with pytest.raises(AttributeError):
        estimate().num_particles = 3  # type: ignore[misc]


def test_the_bias_is_that_of_the_logarithm_of_an_average():
    """Weights of 1 + noise: E[log mean w] is known by the delta method and by brute force."""
    generator = torch.Generator().manual_seed(0)
    num_particles, num_data = 20, 40_000
    noise = torch.rand(num_particles, num_data, generator=generator, dtype=torch.float64)
    w = 0.5 + noise  # mean 1, so log p(x) = 0
    mean = w.mean(0)
    value, error = mean.log(), w.std(0) / mean / num_particles**0.5
    estimate = pv.Estimate(value, error, error, value, num_particles=num_particles)
    spread = value.std().item() / num_data**0.5
    assert estimate.bias < 0
    assert abs(estimate.mean - estimate.bias) < 4 * spread
