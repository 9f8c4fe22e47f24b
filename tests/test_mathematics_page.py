"""The simulated figures of docs/mathematics.md, simulated again by the library's own estimator."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae.evidence.importance import Sums

PAGE = (Path(__file__).parents[1] / "docs" / "mathematics.md").read_text()
PARTICLES, REPETITIONS = 1000, 2000
ROWS = [
    tuple(float(figure) for figure in re.findall(r"-?[\d.]+", row))
    for row in re.findall(r"^\| 0\.\d \| \d+ \|.*$", PAGE, re.MULTILINE)
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}, {row[1]:g}")
def test_when_the_error_bars_lie(row):
    """Posterior N(0, I), guide N(0, tau^2 I): log w / p(x) is affine in a chi-square."""
    assert f"$K = {PARTICLES}$, over {REPETITIONS:,} repetitions" in PAGE
    variance, dim, shape, mean_error, median_error, covered, median_ess = row
    chi_square = np.random.default_rng(0).chisquare(dim, (PARTICLES, REPETITIONS))
    log_w = (1 - variance) / 2 * chi_square + dim / 2 * math.log(variance)
    sums = Sums(REPETITIONS, torch.device("cpu"))
    sums.add(torch.from_numpy(log_w), slice(0, REPETITIONS))
    found = sums.estimate(PARTICLES, "")
    assert shape == pytest.approx(1 - variance)
    # The page's figures come from as many repetitions, so both sides have noise.
    noise = 4 * 2**0.5
    spread = found.value.std().item() / REPETITIONS**0.5
    assert abs(found.mean - mean_error) < noise * spread + 0.005 * abs(mean_error)
    assert found.standard_error.median().item() == pytest.approx(median_error, rel=0.1)
    share = (found.value.abs() < 2 * found.standard_error).double().mean().item()
    binomial = (share * (1 - share) / REPETITIONS) ** 0.5
    assert abs(share - covered / 100) < noise * binomial + 0.005
    assert found.ess.median().item() == pytest.approx(median_ess, rel=0.1)


def test_the_table_is_there():
    assert len(ROWS) == 3
