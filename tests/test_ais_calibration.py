"""Annealing where importance weighting fails: its error bars hold, and its bias is negligible."""

import math

import pytest
import torch
from helpers import LinearGaussian
from test_trust import covered, mean_field, wide

import pyro_vae as pv

# What is promised is of 2,000 data and 1,000 temperatures, which take minutes.
SIZES = [(100, 60), pytest.param(2_000, 1_000, marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # from within the compiler
@pytest.mark.parametrize(("size", "temperatures"), SIZES)
@pytest.mark.parametrize("make", [wide, mean_field])
def test_intervals_cover_and_the_mean_is_right(make, size, temperatures):
    torch.manual_seed(0)
    pair = LinearGaussian.random(dim=50, latent_dim=20)
    x = pair.sample(size)
    estimate = pv.ais(
        pair.model,
        make(pair),
        x,
        num_chains=32,
        temperatures=temperatures,
        leapfrog_steps=3,
        compile=size > 100,
    )
    truth = pair.log_evidence(x)
    share = covered(estimate, truth).double().mean().item()
    assert abs(share - 0.95) < max(0.02, 4 * math.sqrt(0.95 * 0.05 / size))
    beyond = ((estimate.value - truth).abs() > 3 * estimate.standard_error).double().mean().item()
    assert beyond <= 0.01 + 4 * math.sqrt(0.01 / size) * (size <= 100)
    bias = estimate.mean - truth.mean().item()
    assert abs(bias) < 3 * estimate.mean_standard_error + estimate.standard_error.square().mean()
    if temperatures >= 1_000:
        assert abs(bias) < 0.02
        assert abs(bias) < 3 * estimate.mean_standard_error
