"""Paired differences: certain where the models differ little and the data much."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import LinearGaussian, library_pair

import pyro_vae as pv


def judged(truth: LinearGaussian, x: torch.Tensor, seed: int = 0) -> pv.Estimate:
    return pv.log_evidence(truth.model, truth.guide, x, num_particles=10, seed=seed)


def test_the_difference_of_exact_evidences_and_its_error():
    truth = LinearGaussian.random()
    other = replace(truth, bias=truth.bias + 0.1)
    x = truth.sample(3000)
    found = pv.compare(judged(truth, x), judged(other, x))
    exact = truth.log_evidence(x) - other.log_evidence(x)
    torch.testing.assert_close(found.difference, exact)
    assert found.mean == pytest.approx(exact.mean().item())
    assert found.mean_standard_error == pytest.approx(exact.std().item() / math.sqrt(3000))
    assert found.share == (exact > 0).double().mean().item()
    assert found.estimator_error < 1e-6
    # The reason for pairing: the means themselves are more than five times as uncertain.
    assert found.mean_standard_error < 0.2 * judged(truth, x).sampling_error * 2**0.5


def test_the_standard_error_covers_new_data():
    truth = LinearGaussian.random()
    other = replace(truth, scale=0.8)
    estimates = [
        pv.compare(judged(truth, x), judged(other, x)) for x in truth.sample(40_000).split(400)
    ]
    means = torch.tensor([e.mean for e in estimates])
    error = torch.tensor([e.mean_standard_error for e in estimates]).mean().item()
    assert means.std().item() == pytest.approx(error, rel=0.25)


def test_it_is_printed_with_both_errors():
    text = str(pv.compare(*(judged(LinearGaussian.random(), torch.zeros(4, 5).double()),) * 2))
    assert "+0.000 nats per datum, +- 0.000 (paired, of which 0.000 the estimators)" in text
    assert "better on 0% of 4 data" in text


def test_one_datum_has_no_error_of_the_mean():
    truth = LinearGaussian.random()
    x = truth.sample(1)
    assert math.isnan(pv.compare(judged(truth, x), judged(truth, x, seed=1)).mean_standard_error)


def test_other_data_are_refused():
    model, guide, (x,) = library_pair()
    whole = pv.log_evidence(model, guide, x, num_particles=5)
    with pytest.raises(ValueError, match="expected estimates of the same data, got 7 and 6 data"):
        pv.compare(whole, pv.log_evidence(model, guide, x[1:], num_particles=5))
    with pytest.raises(ValueError, match="other data, or of the same in another order"):
        pv.compare(whole, pv.log_evidence(model, guide, 1 - x, num_particles=5))
    with pytest.raises(ValueError, match="other data"):
        pv.compare(whole, pv.log_evidence(model, guide, x.flip(0), num_particles=5))
