"""Preparation: bits, dequantization and standardization, by their densities."""

import math

import pyro.distributions as dist
import pytest
import torch
from splits import levels, split_of

from pyro_vae.data import Kind, load_data


def test_binarize_compares_with_a_fraction_of_the_largest_level():
    data = split_of([[0, 8, 9, 16]], Kind.LEVELS, 17)
    assert data.binarize().train.tolist() == [[0, 0, 1, 1]]
    assert data.binarize(threshold=0.0).train.tolist() == [[0, 1, 1, 1]]
    assert split_of([[0.2, 0.8]], Kind.UNIT_INTERVAL).binarize().train.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="threshold: expected"):
        data.binarize(threshold=1.0)


def test_static_binarization_has_the_intensity_as_its_mean():
    raw = split_of(torch.tensor([[0.0, 4.0, 12.0, 16.0]]).repeat(20_000, 1), Kind.LEVELS, 17)
    data = raw.binarize_static(seed=3)
    for part in (data.train, data.valid, data.test):
        # five standard errors of a mean of 20,000 bits, of 0.0031 each
        torch.testing.assert_close(
            part.mean(0), torch.tensor([0, 0.25, 0.75, 1]), atol=0.016, rtol=0
        )
    assert data.kind is Kind.BINARY
    assert data.refresh is None
    assert data.train.equal(raw.binarize_static(seed=3).train)
    assert not data.train.equal(raw.binarize_static(seed=4).train)
    assert not data.train.equal(data.test)  # the parts are equal before, their noise is not


def test_dynamic_binarization_draws_training_data_anew_and_the_others_once():
    raw = levels()
    data = raw.binarize_dynamic(seed=1)
    assert data.refresh is not None
    torch.testing.assert_close(data.train, raw.train / 16)
    torch.manual_seed(0)
    draws = torch.stack([data.refresh(data.train) for _ in range(200)])
    assert not draws[0].equal(draws[1])
    torch.testing.assert_close(draws.mean((0, 1)), data.train.mean(0), atol=0.005, rtol=0)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert set(data.test.unique().tolist()) == {0.0, 1.0}
    assert data.test.equal(raw.binarize_dynamic(seed=1).test)
    assert "4,000 training data drawn anew" in data.summary()


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_dequantized_values_stay_in_the_cell_of_their_level(num_levels):
    raw = levels(num_levels=num_levels)
    data = raw.dequantize(seed=1)
    assert data.refresh is not None
    assert data.kind is Kind.UNIT_INTERVAL
    assert data.log_jacobian == pytest.approx(-3 * math.log(num_levels))
    torch.manual_seed(0)
    fresh = data.refresh(data.train)
    for values, before in ((fresh, raw.train), (data.test, raw.test)):
        noise = values.double() * num_levels - before.double()
        assert noise.min() > -1e-4
        assert noise.max() < 1 + 1e-4
        assert noise.mean() == pytest.approx(0.5, abs=5 * (1 / 12 / noise.numel()) ** 0.5)
    assert not fresh.equal(data.refresh(data.train))
    assert data.test.equal(raw.dequantize(seed=1).test)


def test_the_largest_noise_stays_below_the_next_level(monkeypatch):
    largest = 1 - 2.0**-24
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, largest))
    raw = split_of(torch.arange(256)[:, None], Kind.LEVELS, 256)
    data = raw.dequantize()
    assert data.refresh is not None
    assert (data.refresh(data.train) * 256).floor().equal(raw.train)


def test_the_dequantized_density_bounds_the_probability_of_the_levels():
    # The oracle: one dimension, p(y) a normal, P(x) by its distribution function.
    num_levels, density = 4, torch.distributions.Normal(0.4, 0.3)
    edges = torch.arange(num_levels + 1) / num_levels
    log_prob = (density.cdf(edges[1:]) - density.cdf(edges[:-1])).log()
    raw = split_of(torch.arange(num_levels).repeat(50_000)[:, None], Kind.LEVELS, num_levels)
    data = raw.dequantize()
    assert data.refresh is not None
    torch.manual_seed(0)
    y = data.refresh(data.train)
    log_density = (density.log_prob(y).sum(-1) + data.log_jacobian).reshape(-1, num_levels)
    bound = log_density.mean(0)
    assert (bound < log_prob).all()
    assert (bound > log_prob - 0.1).all()
    # without the logarithm inside the expectation the bound is the probability itself
    torch.testing.assert_close(log_density.exp().mean(0).log(), log_prob, atol=0.01, rtol=0)


def test_intensities_are_scores_and_no_density():
    data = levels().intensities()
    assert not data.is_density
    assert data.kind is Kind.UNIT_INTERVAL
    assert data.train.max() == 1
    assert "no log p(x)" in data.summary()
    data.check_likelihood(dist.Bernoulli(logits=torch.zeros(2, 3)).to_event(1), "x")


def test_preparation_refuses_the_wrong_kind_and_says_what_works():
    binary, real = split_of([[0.0, 1.0]], Kind.BINARY), split_of([[-0.5]], Kind.REAL)
    grey = split_of([[0.5]], Kind.UNIT_INTERVAL)
    with pytest.raises(ValueError, match=r"binarize: .* binary values. Use families.bernoulli"):
        binary.binarize()
    with pytest.raises(ValueError, match=r"binarize_static: .* real values. Use families.normal"):
        real.binarize_static()
    with pytest.raises(ValueError, match="dequantize: expected integer levels, got toy with value"):
        grey.dequantize()
    with pytest.raises(ValueError, match="intensities: expected integer levels or values in"):
        real.intensities()
    with pytest.raises(ValueError, match="binarize: toy is already prepared by dequantize"):
        levels().dequantize().binarize()


def test_preparation_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    raw = levels(50)
    for data in (raw.binarize_static(), raw.binarize_dynamic(), raw.dequantize()):
        data.check_likelihood(
            (dist.Normal if data.kind is Kind.UNIT_INTERVAL else _bernoulli)(
                torch.zeros(2, 3), torch.ones(2, 3)
            ).to_event(1),
            "x",
        )
    load_data(torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.get_rng_state().equal(state)


def _bernoulli(logits, _):
    return dist.Bernoulli(logits=logits)


def test_standardize_keeps_densities_exact():
    generator = torch.Generator().manual_seed(0)
    rows = 5.0 + 3.0 * torch.randn(400, 3, generator=generator)
    rows[:, 2] = 7.0
    data = load_data(rows)
    prepared = data.standardize()
    assert prepared.train.mean(0).abs().max() < 1e-5
    assert prepared.train[:, :2].std(0, correction=0).sub(1).abs().max() < 1e-5
    loc, scale = data.train.double().mean(0), data.train.double().std(0, correction=0)
    scale[2] = 1.0
    of_x = torch.distributions.Normal(loc, scale).log_prob(data.test.double()).sum(1)
    of_y = torch.distributions.Normal(0.0, 1.0).log_prob(prepared.test.double()).sum(1)
    torch.testing.assert_close(of_y + prepared.log_jacobian, of_x, rtol=0, atol=1e-5)


def test_standardize_is_for_real_values_alone():
    with pytest.raises(ValueError, match="standardize: expected values in \\[0, 1\\] or real"):
        load_data("digits").standardize()
