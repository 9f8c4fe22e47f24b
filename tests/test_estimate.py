"""The two errors of a mean, and how an estimate is printed."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
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


# --- intervals, and what is to be trusted


def judged(k: list[float], ess: list[float] | None = None, num_particles: int = 1_000) -> Any:
    """An estimate of as many data as ``k`` has, of these k and effective sample sizes."""
    zeros = torch.zeros(len(k), dtype=torch.float64)
    told = zeros + 500 if ess is None else torch.tensor(ess).double()
    tail = torch.tensor(k).double()
    return pv.Estimate(zeros, zeros + 0.1, told, zeros, num_particles, pareto_k=tail)


@pytest.mark.parametrize(("num_particles", "level"), [(2, 0.5), (16, 0.95), (5_000, 0.99)])
def test_intervals_are_students(num_particles, level):
    e = replace(estimate(), num_particles=num_particles)
    lower, upper = e.interval(level)
    expected = scipy.stats.t.interval(level, num_particles - 1, e.value, e.standard_error)
    np.testing.assert_allclose(lower, expected[0], rtol=1e-12)
    np.testing.assert_allclose(upper, expected[1], rtol=1e-12)


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_a_level_that_is_no_probability_is_refused(level):
    with pytest.raises(ValueError, match="expected a level between 0 and 1"):
        estimate().interval(level)


def test_an_estimate_is_trusted_for_its_k_and_its_effective_particles():
    e = judged([0.0, 0.66, 0.67, math.nan, -1.0], [500, 500, 500, 500, 10])
    assert e.trusted.tolist() == [True, True, False, False, False]
    assert e.untrusted == 0.6
    # The threshold grows with particles.
    assert judged([0.67, 0.71], num_particles=10_000).trusted.tolist() == [True, False]


def test_without_a_tail_the_effective_particles_decide_alone():
    e = replace(judged([0.9] * 3, [30, 15, 5], num_particles=40), pareto_k=None)
    assert e.trusted.tolist() == [True, False, False]
    few = judged([math.nan] * 2, [9.0, 2.0], num_particles=10)  # too few for a tail
    assert few.trusted.tolist() == [True, False]
    assert few.advice.endswith("(namely 1). More particles are likely to do.")
    assert "as far as the effective sample size tells" in judged([math.nan], [9], 10).advice


def test_what_has_no_error_or_no_value_is_not_trusted():
    e = judged([0.0] * 3)
    error, value = e.standard_error.clone(), e.value.clone()
    error[0], value[1] = math.nan, -math.inf
    assert replace(e, standard_error=error, value=value).trusted.tolist() == [False, False, True]


def test_advice_names_how_many_which_and_what_to_do():
    assert judged([0.1] * 7).advice == "The error bars of all 7 data can be trusted."
    few = judged([0.1, 0.9, 0.1, math.nan]).advice
    assert few.startswith("2 of 4 data are not to be trusted (namely 3, 1). ")
    assert "pv.ais" in few
    many = judged([0.1, 0.9, 1.2, 0.8, 0.7, 0.75, 0.95, 1.1]).advice
    assert "7 of 8 data are not to be trusted (the worst are 2, 7, 6, 1, 3)." in many
    less = judged([0.1, 0.68, 0.1], [500, 500, 3]).advice
    assert less.startswith("2 of 3 data are not to be trusted (namely 1, 2). More particles")
    assert judged([0.9]).advice.startswith("The datum is not to be trusted. ")
    one = replace(judged([math.nan], [1], 1), standard_error=torch.full((1,), math.nan))
    assert "One particle has no error bar" in one.advice


def test_the_share_above_the_threshold_is_printed():
    text = str(judged([0.1, 0.9, 0.1, math.nan]))
    assert "lowest 500.0, Pareto k above 0.67 for 50%; ELBO" in text
    assert "Pareto" not in str(estimate())
