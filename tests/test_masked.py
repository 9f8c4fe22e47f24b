"""Entries that are missing drop out of a likelihood exactly, whatever stands in their place."""

import math
from functools import partial
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import families

D = 6
FAMILIES: dict[str, tuple[Any, int]] = {
    "normal": (families.normal, 2),
    "fixed_normal": (partial(families.fixed_normal, scale=0.3), 1),
    "laplace": (families.laplace, 2),
    "fixed_laplace": (families.fixed_laplace, 1),
    "student_t": (families.student_t, 3),
    "continuous_bernoulli": (families.continuous_bernoulli, 1),
    "beta": (families.beta, 2),
    "bernoulli": (families.bernoulli, 1),
    "binomial": (partial(families.binomial, total_count=5), 1),
    "categorical": (families.categorical, 4),
    "discretized": (partial(families.discretized, num_levels=8), 2),
    "discretized_mixture": (partial(families.discretized_mixture, num_levels=8), 6),
    "poisson": (families.poisson, 1),
    "negative_binomial": (families.negative_binomial, 2),
    "zero_inflated_negative_binomial": (families.zero_inflated_negative_binomial, 3),
}
# What a user may bring: a support with a bound that is learned, and one that is none of ours.
FOREIGN: dict[str, tuple[Any, int]] = {
    "log normal": (lambda p: dist.LogNormal(p[..., 0, :], 0.5).to_event(1), 1),
    "uniform": (lambda p: dist.Uniform(p[..., 0, :], p[..., 0, :] + 2).to_event(1), 1),
    "mixture": (
        lambda p: dist.MixtureSameFamily(
            dist.Categorical(logits=p.mT), dist.Beta(2 + p.mT.exp(), 3.0)
        ).to_event(1),
        2,
    ),
}
every_family = pytest.mark.parametrize(
    ("family", "size"), (FAMILIES | FOREIGN).values(), ids=FAMILIES | FOREIGN
)
ANYTHING = [math.nan, math.inf, -math.inf, -1.0, 0.5, 3e30]


def bound(family: Any, size: int, *, dim: int = D) -> pv.Masked:
    """A likelihood whose latents are its flattened params."""
    return pv.Masked(pv.Conditional(nn.Unflatten(-1, (size, dim)), family))


def case(family: Any, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Params (4, P, D), a draw, and a mask that leaves a datum whole and one out."""
    params = torch.randn(4, size, D, dtype=torch.float64)
    x = family(params).sample().double()
    mask = torch.rand(4, D) < 0.6
    mask[0], mask[1] = True, False
    return params, x, mask


@every_family
def test_the_density_is_the_sum_over_what_is_observed(family, size):
    params, x, mask = case(family, size)
    each = [family(params[..., d : d + 1]).log_prob(x[:, d : d + 1]) for d in range(D)]
    expected = [sum(each[d][n] for d in range(D) if mask[n, d]) for n in range(4)]
    p = bound(family, size)(params.flatten(-2), mask)
    torch.testing.assert_close(p.log_prob(x), torch.tensor(expected).double())
    assert p.log_prob(x)[1] == 0


@every_family
@pytest.mark.parametrize("missing", ANYTHING)
def test_what_stands_in_missing_entries_changes_neither_value_nor_gradient(family, size, missing):
    params, x, mask = case(family, size)

    def scored(value: Tensor) -> tuple[Tensor, Tensor]:
        leaf = params.clone().requires_grad_()
        log_prob = bound(family, size)(leaf.flatten(-2), mask).log_prob(value)
        (gradient,) = torch.autograd.grad(log_prob.sum(), leaf)
        return log_prob, gradient

    log_prob, gradient = scored(torch.where(mask, x, missing))
    expected, others = scored(x)
    assert torch.equal(log_prob, expected)
    assert torch.equal(gradient, others)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()


@every_family
def test_illegal_entries_are_refused_only_where_they_are_observed(family, size):
    params, x, mask = case(family, size)
    p = bound(family, size)(params.flatten(-2), mask)
    assert p.support.check(torch.where(mask, x, math.nan)).all()
    assert p.support.is_discrete == family(params).support.is_discrete
    x[0, 2] = math.nan
    assert p.support.check(x).tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(x)


@every_family
def test_draws_and_means_are_of_whole_data(family, size):
    params, _, mask = case(family, size)
    p, base = bound(family, size)(params.flatten(-2), mask), family(params)
    assert torch.equal(p.mean, base.mean)
    assert torch.equal(p.variance, base.variance)
    assert p.has_rsample == base.has_rsample
    torch.manual_seed(1)
    draws = p.sample((3,))
    torch.manual_seed(1)
    assert torch.equal(draws, base.sample((3,)))
    assert draws.shape == (3, 4, D)


@pytest.mark.parametrize("batch", [(), (4,), (3, 4), (2, 3, 4)], ids=str)
def test_the_batch_is_that_of_latents_and_mask(batch):
    params, x, mask = case(families.normal, 2)
    z = params[0].flatten().expand(*batch, -1)
    p = bound(families.normal, 2)(z, mask)
    shape = torch.broadcast_shapes(batch, (4,))
    assert (p.batch_shape, p.event_shape) == (shape, (D,))
    assert p.log_prob(x).shape == p.log_prob(p.rsample()).shape == shape
    larger = p.expand((5, *shape))
    assert larger.sample().shape == (5, *shape, D)
    torch.testing.assert_close(larger.log_prob(x), p.log_prob(x).expand(5, *shape))


def test_nothing_missing_is_the_likelihood():
    params, x, mask = case(families.normal, 2)
    p, z = bound(families.normal, 2), params.flatten(-2)
    expected = families.normal(params).log_prob(x)
    assert torch.equal(p(z, torch.ones_like(mask)).log_prob(x), expected)
    assert torch.equal(p(z).log_prob(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_a_mask_may_be_zeros_and_ones(dtype):
    params, x, mask = case(families.normal, 2)
    p, z = bound(families.normal, 2), params.flatten(-2)
    assert torch.equal(p(z, mask.to(dtype)).log_prob(x), p(z, mask).log_prob(x))


def test_single_precision_is_kept():
    params, x, mask = case(families.beta, 2)
    p = bound(families.beta, 2)(params.float().flatten(-2), mask)
    assert p.log_prob(x.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "size", "name"),
    [
        (families.multinomial, 1, "CountsOfTotal"),
        (families.full_normal, 4, "MultivariateNormal"),
        (families.low_rank_normal, 3, "LowRankMultivariateNormal"),
        (families.projected_normal, 1, "ProjectedNormal"),
        (lambda p: dist.Normal(p, 1.0).to_event(2), 1, "Independent"),
        (lambda p: dist.Normal(p[..., 0, :], 1.0), 1, "Normal"),
    ],
)
def test_dimensions_that_depend_on_one_another_are_refused(family, size, name):
    p = bound(family, size, dim=3)
    for mask in (torch.ones(7, 3).bool(), None):
        with pytest.raises(ValueError, match=f"Masked: expected .* independent .* got {name}: .*"):
            p(torch.zeros(7, size * 3), mask)


def test_an_autoregressive_likelihood_is_refused():
    network = pv.networks.masked_mlp(3, 2, 1)
    p = pv.Masked(pv.Autoregressive(network, families.bernoulli, 3))
    with pytest.raises(ValueError, match=r"Masked: expected .* integral over the others"):
        p(torch.zeros(7, 2), torch.ones(7, 3))


def test_wrong_masks_are_refused():
    p, z = bound(families.bernoulli, 1), torch.zeros(7, D)
    with pytest.raises(ValueError, match=r"mask of shape \(\*batch, 6\), .* got \(7, 3\)"):
        p(z, torch.ones(7, 3))
    for wrong in (0.5, 2.0, math.nan):
        with pytest.raises(ValueError, match="mask of zeros and ones"):
            p(z, torch.full((7, D), wrong))
    network = pv.networks.without_missing(pv.networks.mlp(12, (2, 2)))
    with pytest.raises(ValueError, match=r"without_missing: expected .* \(\*batch, 6\), .* \(7, 1"):
        network(torch.zeros(7, D), torch.ones(7, 1))


def test_a_support_without_a_known_value_is_named():
    class Odd(dist.Normal):
        support: Any = dist.constraints.dependent

    p = bound(lambda p: Odd(p[..., 0, :], 1.0, validate_args=False).to_event(1), 1)
    with pytest.raises(ValueError, match="Masked: no value is known that Odd could"):
        p(torch.zeros(7, D), torch.ones(7, D)).log_prob(torch.zeros(7, D))
