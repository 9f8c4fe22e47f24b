"""Pareto k and smoothed tails, against Pyro, arviz, distributions of known tail, and each other."""

import math
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import LinearGaussian, bernoulli_pair, bits
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evidence.importance import Sums
from pyro_vae.evidence.pareto import Tail, pooled, tail_size, threshold

# --- against other implementations


def k_of_pyro(log_w: Tensor) -> float:
    """Pyro's fit to the exceedances of one datum, in units of the largest weight."""
    ranked = log_w.sort(descending=True).values
    size = math.ceil(min(len(log_w) / 5, 3 * len(log_w) ** 0.5))
    w = (ranked - ranked[0]).exp()
    return fit_generalized_pareto((w - w[size])[:size])[0]


def weights(inflation: float, num_particles: int, dim: int = 3) -> Tensor:
    """Log-weights of a guide with the posterior's covariance times ``inflation``."""
    pair = LinearGaussian.random(latent_dim=dim)
    guide = partial(pair.guide, inflation=inflation)
    return pv.log_weights(pair.model, guide, pair.sample(6), num_particles=num_particles)


@pytest.mark.parametrize("num_particles", [25, 300, 1000])
@pytest.mark.parametrize("inflation", [0.3, 0.9999, 1.0001, 1.3, 4.0])
def test_k_is_pyros(inflation, num_particles):
    log_w = weights(inflation, num_particles)
    expected = torch.tensor([k_of_pyro(datum) for datum in log_w.unbind(1)]).double()
    torch.testing.assert_close(pv.pareto_k(log_w), expected, rtol=0, atol=1e-6)


def test_three_regimes_are_told_apart():
    """docs/mathematics.md, section 10: k is 1 - inflation below 1; above 1 weights are bounded."""
    k = {inflation: pv.pareto_k(weights(inflation, 20_000)) for inflation in (0.1, 1.0, 3.0)}
    assert (k[0.1] > threshold(20_000)).all()
    assert (k[1.0] == 0).all()
    assert (k[3.0] < 0.1).all()


# np.random.default_rng(2024).normal(size=(1000, 4)) times these, but the last column rounded to one
# decimal, which has ties at the cutoff: arviz 0.23.4, psislw(log_w.T, normalize=False).
SPREADS = (0.3, 1.0, 3.0, 1.0)
ARVIZ = {
    "k": (-0.054610738456200264, 0.2932597054943093, 0.8741394379191908, 0.2665286949025225),
    "logsumexp": (6.950095869647735, 7.416761558753272, 10.853906910741284, 7.364248922593331),
    "largest": (0.8975649774363699, 2.8965359403479356, 9.401758310480696, 3.1),
    "sum of the fifty largest": (
        31.078782193369356,
        104.07437220014123,
        304.1835984316125,
        100.66219245511536,
    ),
}


def seeded_log_weights() -> Tensor:
    log_w = np.random.default_rng(2024).normal(size=(1000, 4)) * SPREADS
    log_w[:, 3] = log_w[:, 3].round(1)
    return torch.as_tensor(log_w)


def test_k_and_smoothed_weights_are_those_of_arviz():
    log_w = seeded_log_weights()
    k = torch.tensor(ARVIZ["k"], dtype=torch.float64)
    torch.testing.assert_close(pv.pareto_k(log_w), k, rtol=0, atol=1e-6)
    smooth = pv.smoothed(log_w)
    for name, found in (
        ("logsumexp", smooth.logsumexp(0)),
        ("largest", smooth.amax(0)),
        ("sum of the fifty largest", smooth.topk(50, dim=0).values.sum(0)),
    ):
        expected = torch.tensor(ARVIZ[name], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=lambda m, n=name: n + m)


# --- against distributions of known tail


@pytest.mark.parametrize("shape", [-0.5, 0.0, 0.4, 0.9])
def test_k_of_a_generalized_pareto_distribution_is_its_own(shape):
    uniform = torch.rand(10_000, 200, generator=torch.Generator().manual_seed(0)).double()
    tail = -uniform.log() if shape == 0 else torch.expm1(-shape * uniform.log()) / shape
    k = pv.pareto_k((1 + tail).log())
    size = tail_size(10_000)
    drawn = (size * shape + 5) / (size + 10)  # towards 1/2, by ten observations
    error = (1 + shape) / (200 * size) ** 0.5
    assert abs(k.mean().item() - drawn) < 4 * error + 0.01


def test_the_smoothed_average_of_a_heavy_tail_errs_less():
    uniform = torch.rand(500, 2_000, generator=torch.Generator().manual_seed(0)).double()
    log_w = -0.7 * uniform.log()  # a Pareto distribution of mean 1 / 0.3
    plain, smooth = (w.exp().mean(0) - 1 / 0.3 for w in (log_w, pv.smoothed(log_w)))
    assert smooth.square().mean() < 0.7 * plain.square().mean()
    assert smooth.abs().mean() < plain.abs().mean()


# --- what holds of any weights


def test_smoothing_changes_the_tail_alone_keeps_its_order_and_stays_below_the_largest():
    log_w = torch.randn(1000, 5, dtype=torch.float64) * 2
    smooth = pv.smoothed(log_w)
    order = log_w.argsort(0)
    before, after = log_w.gather(0, order), smooth.gather(0, order)
    assert torch.equal(after[:-95], before[:-95])
    assert (after[-95:-10] != before[-95:-10]).all()
    assert (after.diff(dim=0) >= 0).all()
    assert (smooth.amax(0) <= log_w.amax(0)).all()


@pytest.mark.parametrize("shift", [-5_000.0, 700.0, 1e5])
def test_units_of_the_weights_and_their_order_do_not_matter(shift):
    log_w = torch.randn(400, 5, dtype=torch.float64)
    moved = log_w.flip(0) + shift
    torch.testing.assert_close(pv.pareto_k(moved), pv.pareto_k(log_w), rtol=0, atol=1e-8)
    torch.testing.assert_close(
        pv.smoothed(moved).flip(0) - shift, pv.smoothed(log_w), rtol=0, atol=1e-8
    )


def test_every_datum_is_fitted_on_its_own():
    log_w = seeded_log_weights()
    alone = torch.cat([pv.pareto_k(datum.unsqueeze(1)) for datum in log_w.unbind(1)])
    torch.testing.assert_close(pv.pareto_k(log_w), alone, rtol=0, atol=1e-12)


def test_k_grows_with_the_spread():
    log_w = torch.randn(1000, 1, dtype=torch.float64)
    k = torch.cat([pv.pareto_k(spread * log_w) for spread in (0.01, 0.5, 1.0, 2.0, 5.0, 50.0)])
    assert (k.diff() > 0).all()
    assert k[-1] > 1


# --- constant weights, ties, zeros


@pytest.mark.parametrize("level", [0.0, -90.0, -3_000.0])
def test_constant_weights_have_a_k_of_zero_whatever_their_rounding(level):
    noise = torch.randn(1000, 3, dtype=torch.float64) * 4 * np.spacing(max(abs(level), 1.0))
    for log_w in (torch.full((1000, 3), level).double(), level + noise):
        assert torch.equal(pv.pareto_k(log_w), torch.zeros(3).double())
        assert torch.equal(pv.smoothed(log_w), log_w)


def test_rounding_noise_of_float32_is_harmless():
    """The weights of an exact posterior in float32, summed over many dimensions."""
    pair = LinearGaussian.random(dim=300, latent_dim=5)
    single = LinearGaussian(pair.weight.float(), pair.bias.float(), pair.scale)
    x = pair.sample(50)

    def guide(x: Tensor) -> None:
        exact = pair.posterior(x.double())
        loc, scale_tril = exact.loc.float(), exact.scale_tril.float()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    estimate = pv.log_evidence(single.model, guide, x.float(), num_particles=1000)
    assert estimate.standard_error.max() < 1e-4
    assert estimate.pareto_k is not None
    assert (estimate.pareto_k < 0.5).all()
    assert estimate.trusted.all()


def test_ties_are_fitted_where_enough_stand_out_of_them():
    """Weights of discrete latents: all exceedances equal, and a tail of few values."""
    two = torch.tensor([0.0] * 900 + [1.0] * 100).double()
    few = torch.tensor([0.0] * 800 + [0.3] * 180 + [1.0] * 15 + [2.0] * 5).double()
    k = pv.pareto_k(torch.stack([two, few], dim=1))
    assert k[0] == 0  # the 96th largest is a 1 too
    assert k[1].isfinite()
    # The grid of the fit holds b = 0 for 100 to 120 exceedances: 16 (j - 1/2) = 40 for j = 3.
    ties = torch.tensor([0.0] * 1_900 + [1.0] * 110 + [-1.0] * 90).double().unsqueeze(1)
    assert tail_size(len(ties)) > 110
    assert pv.pareto_k(ties).isfinite().all()
    assert pv.smoothed(ties).isfinite().all()


def test_where_fewer_than_five_stand_out_there_is_no_k():
    ties = torch.zeros(1000, 4).double()
    ties[:4, 0] = 3.0  # four stand out of equal ones
    ties[1:, 1] = -math.inf  # one weight above zero
    ties[:, 2] = -math.inf  # none
    ties[1:, 3] = -800.0  # all others are nothing beside the largest
    assert pv.pareto_k(ties).isnan().all()
    assert torch.equal(pv.smoothed(ties), ties)
    ties[4, 0] = 4.0
    assert pv.pareto_k(ties)[0].isfinite()


@pytest.mark.parametrize("num_particles", [1, 2, 20, 21])
def test_less_than_21_particles_have_no_tail(num_particles):
    log_w = torch.randn(num_particles, 3, dtype=torch.float64)
    assert pv.pareto_k(log_w).isnan().all() == (num_particles < 21)
    assert torch.equal(pv.smoothed(log_w), log_w) == (num_particles < 21)


def test_zero_weights_and_extreme_ones_are_survived():
    log_w = torch.randn(1000, 3, dtype=torch.float64)
    log_w[::2] = -math.inf
    assert pv.pareto_k(log_w).isfinite().all()
    assert torch.equal(pv.smoothed(log_w) == -math.inf, log_w == -math.inf)
    wide = 200 * torch.randn(1000, 3, dtype=torch.float64)
    assert (pv.pareto_k(wide) > 5).all()
    assert pv.smoothed(wide).isfinite().all()


@pytest.mark.parametrize(
    ("log_w", "match"),
    [
        (
            torch.zeros(30),
            r"expected log-weights of shape \(K, N\), as of log_weights, got \(30,\)",
        ),
        (torch.zeros(0, 3), r"got \(0, 3\)"),
        (torch.zeros(30, 3).long(), r"of torch\.int64"),
        (torch.full((30, 3), math.nan), r"log_w has NaN or \+infinity"),
        (torch.full((30, 3), math.inf), r"log_w has NaN or \+infinity"),
    ],
)
def test_what_are_no_log_weights_is_refused(log_w, match):
    for function in (pv.pareto_k, pv.smoothed):
        with pytest.raises(ValueError, match=f"{function.__name__}: .*{match}"):
            function(log_w)


def test_the_threshold_is_that_of_the_paper():
    assert threshold(100) == 0.5
    assert threshold(1_000) == pytest.approx(2 / 3)
    assert threshold(10_000) == threshold(10**6) == 0.7


# --- of many data


def shapes(k: Tensor) -> Tensor:
    """Fitted k of 1,000 draws of Pareto distributions of shape k (N,)."""
    uniform = torch.rand(1_000, len(k), generator=torch.Generator().manual_seed(0)).double()
    return pv.pareto_k(-k * uniform.log())


@pytest.mark.parametrize("shape", [0.1, 0.6, 1.2])
def test_the_k_of_equal_data_are_drawn_to_their_mean(shape):
    k = shapes(torch.full((500,), shape))
    assert k.std() > 0.08  # noise, all of it
    assert pooled(k, 1_000).std() < 0.5 * k.std()
    assert pooled(k, 1_000).mean() == pytest.approx(k.mean().item())


def test_the_k_of_different_data_stay_what_they_are():
    k = shapes(torch.linspace(0.0, 2.0, 500))
    assert (pooled(k, 1_000) - k).abs().max() < 0.15


def test_the_k_of_somewhat_different_data_are_known_better():
    truth = torch.linspace(0.3, 0.9, 500).double()
    k, size = shapes(truth), tail_size(1_000)
    expected = (size * truth + 5) / (size + 10)
    error, drawn = (found - expected for found in (k, pooled(k, 1_000)))
    assert drawn.square().mean() < 0.8 * error.square().mean()


def test_an_unknown_k_stays_unknown_and_a_lone_one_what_it_is():
    k = torch.tensor([0.2, math.nan, 0.9, 0.4], dtype=torch.float64)
    assert pooled(k, 1_000).isnan().tolist() == [False, True, False, False]
    for lone in (k[:1], k[1:2], k[:2]):
        torch.testing.assert_close(pooled(lone, 1_000), lone, equal_nan=True)
    equal = torch.zeros(7, dtype=torch.float64)  # an exact guide
    assert torch.equal(pooled(equal, 1_000), equal)


# --- in passing


@pytest.mark.parametrize("num_particles", [20, 99, 100, 101, 1_050])
def test_log_evidence_has_the_k_and_the_average_of_its_own_weights(num_particles):
    model, guide = bernoulli_pair()
    x = bits(130)
    options: Any = {"num_particles": num_particles, "seed": 3}
    log_w = pv.log_weights(model, guide, x, **options)
    plain = pv.log_evidence(model, guide, x, **options)
    smooth = pv.log_evidence(model, guide, x, smooth=True, **options)
    for estimate in (plain, smooth):
        torch.testing.assert_close(estimate.pareto_k, pv.pareto_k(log_w), equal_nan=True)
    for estimate, weights in ((plain, log_w.double()), (smooth, pv.smoothed(log_w))):
        value = weights.logsumexp(0) - math.log(num_particles)
        torch.testing.assert_close(estimate.value, value, rtol=0, atol=1e-11)
        relative = (weights - value).exp()
        error = relative.std(0) / num_particles**0.5
        torch.testing.assert_close(estimate.standard_error, error, rtol=1e-7, atol=1e-9)
        ess = relative.sum(0).square() / relative.square().sum(0)
        torch.testing.assert_close(estimate.ess, ess, rtol=1e-8, atol=0)
    torch.testing.assert_close(smooth.elbo, plain.elbo)
    assert plain.kind == "importance weighting"
    assert smooth.kind == "Pareto-smoothed importance weighting"


def test_a_smoothed_tail_that_is_all_the_weight_leaves_no_rounding_behind():
    """Ten nats between neighbours: the sums without their tail are nothing but rounding."""
    log_w = 10 * torch.randn(1000, 20, dtype=torch.float64)
    sums, tail = Sums(20, log_w.device), Tail(1000)
    for part in log_w.split(100):
        sums.add(part, slice(0, 20))
        tail.add(part)
    _, raw, other = tail.finish()
    sums.replace(raw, other, slice(0, 20))
    smooth = sums.estimate(1000, "")
    expected = pv.smoothed(log_w)
    torch.testing.assert_close(
        smooth.value, expected.logsumexp(0) - math.log(1000), rtol=0, atol=1e-10
    )
    assert (smooth.ess >= 1 - 1e-9).all()
    assert smooth.standard_error.isfinite().all()


@pytest.mark.parametrize("blocks", [(100,) * 9, (500, 500, 130), (21,), (100, 100, 7)])
def test_a_tail_in_passing_is_the_tail(blocks):
    tail = Tail(sum(blocks))
    for width in (10, 10, 4):  # one block of data after another, the last one narrower
        log_w = torch.randn(sum(blocks), width)
        for part in log_w.split(blocks):
            tail.add(part)
        k, raw, smooth = tail.finish()
        assert torch.equal(raw, log_w.double().topk(tail_size(len(log_w)), dim=0).values)
        torch.testing.assert_close(k, pv.pareto_k(log_w), rtol=0, atol=1e-12)
        ranked = pv.smoothed(log_w).sort(0, descending=True).values
        torch.testing.assert_close(smooth, ranked[: len(smooth)], rtol=0, atol=1e-12)
