"""Families beside those of the main job: scipy, sums and integrals say what they are."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from values import counts, reals, units

from pyro_vae import distributions, families

L = 8


class Case(NamedTuple):
    family: Callable[[Tensor], Any]
    num_params: int
    values: Callable[..., Tensor]
    oracle: Callable[[np.ndarray, np.ndarray], np.ndarray]  # params (P, ..., D), x: elementwise
    support: tuple[float, float] | int  # an interval, or the first count that can be left out


def softplus(u: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, u)


def levels(*shape: int) -> Tensor:
    return torch.randint(L, shape).double()


def continuous_bernoulli(params: np.ndarray, x: np.ndarray) -> np.ndarray:
    p = scipy.special.expit(params[0])
    constant = np.log(2 * np.arctanh(1 - 2 * p) / (1 - 2 * p))
    return x * np.log(p) + (1 - x) * np.log1p(-p) + constant


def rounded(base: Any, params: np.ndarray, x: np.ndarray) -> np.ndarray:
    loc, scale = (1 + params[0]) * (L - 1) / 2, (1e-4 + softplus(params[1])) * (L - 1) / 2
    lower, upper = (x - 0.5 - loc) / scale, (x + 0.5 - loc) / scale
    right = lower + upper > 0  # where both values of F are nearly one: all three are symmetric
    a, b = np.where(right, -upper, lower), np.where(right, -lower, upper)
    inside = base.logcdf(b) + np.log1p(-np.exp(base.logcdf(a) - base.logcdf(b)))
    return np.where(x == 0, base.logcdf(upper), np.where(x == L - 1, base.logsf(lower), inside))


def rounded_mixture(params: np.ndarray, x: np.ndarray) -> Any:
    logits, loc, scale = np.split(params, 3)
    each = [
        rounded(scipy.stats.logistic, np.stack([m, s]), x) for m, s in zip(loc, scale, strict=True)
    ]
    return scipy.special.logsumexp(scipy.special.log_softmax(logits, 0) + np.stack(each), 0)


def negative_binomial(params: np.ndarray, x: np.ndarray) -> np.ndarray:
    mean, r = np.exp(params[0]), 1e-4 + softplus(params[1])
    return scipy.stats.nbinom.logpmf(x, r, r / (r + mean))


def zero_inflated(params: np.ndarray, x: np.ndarray) -> np.ndarray:
    gate = scipy.special.expit(params[2])
    return np.log(gate * (x == 0) + (1 - gate) * np.exp(negative_binomial(params[:2], x)))


REALS, INTERVAL = (-np.inf, np.inf), (0.0, 1.0)
CASES = {
    "student_t, df": Case(
        partial(families.student_t, df=3.0),
        2,
        reals,
        lambda p, x: scipy.stats.t.logpdf(x, 3.0, p[0], 1e-6 + softplus(p[1])),
        REALS,
    ),
    "student_t": Case(
        families.student_t,
        3,
        reals,
        lambda p, x: scipy.stats.t.logpdf(x, 1 + softplus(p[2]), p[0], 1e-6 + softplus(p[1])),
        REALS,
    ),
    "continuous_bernoulli": Case(
        families.continuous_bernoulli, 1, units, continuous_bernoulli, INTERVAL
    ),
    "beta": Case(
        families.beta,
        2,
        units,
        lambda p, x: scipy.stats.beta.logpdf(x, 1e-3 + softplus(p[0]), 1e-3 + softplus(p[1])),
        INTERVAL,
    ),
    **{
        f"discretized, {ours.__name__}": Case(
            partial(families.discretized, num_levels=L, base=ours),
            2,
            levels,
            partial(rounded, theirs),
            L,
        )
        for ours, theirs in (
            (dist.Logistic, scipy.stats.logistic),
            (dist.Normal, scipy.stats.norm),
            (dist.Laplace, scipy.stats.laplace),
        )
    },
    "discretized_mixture": Case(
        partial(families.discretized_mixture, num_levels=L), 6, levels, rounded_mixture, L
    ),
    "poisson": Case(
        families.poisson,
        1,
        counts,
        lambda p, x: scipy.stats.poisson.logpmf(x, 1e-6 + softplus(p[0])),
        100,
    ),
    "negative_binomial": Case(families.negative_binomial, 2, counts, negative_binomial, 2000),
    "zero_inflated_negative_binomial": Case(
        families.zero_inflated_negative_binomial, 3, counts, zero_inflated, 2000
    ),
}
every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def random_params(case: Case, *batch: int, dim: int = 5) -> Tensor:
    return torch.randn(*batch, case.num_params, dim, dtype=torch.float64)


@every_family
def test_log_prob_is_the_oracles(case):
    params, x = random_params(case, 3, 4), case.values(3, 4, 5)
    expected = case.oracle(np.moveaxis(params.numpy(), -2, 0), x.numpy()).sum(-1)
    # Torch's continuous Bernoulli has a Taylor series around one half.
    tolerance = 1e-6 if case.family is families.continuous_bernoulli else 1e-9
    np.testing.assert_allclose(case.family(params).log_prob(x).numpy(), expected, tolerance)


@every_family
@pytest.mark.parametrize("batch", [(), (7,), (3, 7), (2, 3, 7)], ids=str)
def test_dimensions_are_one_event_and_the_rest_is_batch(case, batch):
    distribution = case.family(random_params(case, *batch))
    assert distribution.batch_shape == batch
    assert distribution.event_shape == (5,)
    x = distribution.sample((2,))
    assert x.shape == (2, *batch, 5)
    assert distribution.log_prob(x).isfinite().all()
    expanded = distribution.expand((4, *batch))
    assert expanded.log_prob(x[0]).shape == (4, *batch)
    assert distribution.mean.shape == (*batch, 5)


@every_family
def test_the_density_integrates_to_one_and_has_the_moments_that_it_says(case):
    params = random_params(case, dim=1)
    distribution = case.family(params)

    def moment(power: int) -> float:
        def density(x: Any) -> Any:
            value = torch.as_tensor(x, dtype=torch.float64)[..., None]
            return (distribution.log_prob(value).exp() * value[..., 0] ** power).numpy()

        if isinstance(case.support, int):
            return float(density(np.arange(case.support)).sum())
        middle = distribution.mean.item()
        halves = [(case.support[0], middle), (middle, case.support[1])]
        return sum(scipy.integrate.quad(density, *half, limit=200)[0] for half in halves)

    assert moment(0) == pytest.approx(1.0, abs=1e-6)
    assert moment(1) == pytest.approx(distribution.mean.item(), rel=1e-4, abs=1e-4)
    variance = distribution.variance.item()
    if np.isfinite(variance):
        assert moment(2) - moment(1) ** 2 == pytest.approx(variance, rel=1e-2)


@every_family
def test_draws_are_from_the_density(case):
    """The mean log-density of draws is minus the entropy, which the oracle's moments give."""
    n = 20_000
    distribution = case.family(random_params(case, dim=1))
    draws = distribution.sample((n,))
    mean, variance = distribution.mean.item(), distribution.variance.item()
    if np.isfinite(variance):
        assert abs(draws.mean().item() - mean) < 5 * np.sqrt(variance / n)
    # The share of draws below their median value, by the density's own cumulative sum.
    middle = draws.median()
    share = (draws <= middle).double().mean().item()

    def density(x: Any) -> Any:
        return (
            distribution.log_prob(torch.as_tensor(x, dtype=torch.float64)[..., None]).exp().numpy()
        )

    if isinstance(case.support, int):
        expected = density(np.arange(int(middle) + 1)).sum()
    else:
        expected, _ = scipy.integrate.quad(density, case.support[0], middle.item(), limit=200)
    assert abs(share - expected) < 5 * np.sqrt(0.25 / n)


@every_family
def test_gradients_reach_every_parameter(case):
    params = random_params(case, 2, dim=3).requires_grad_()
    x = case.values(2, 3)
    assert torch.autograd.gradcheck(lambda p: case.family(p).log_prob(x), (params,), atol=1e-4)
    (gradient,) = torch.autograd.grad(case.family(params).log_prob(x).sum(), params)
    assert (gradient.abs().sum((0, 2)) > 0).all()


@every_family
def test_a_wrong_number_of_parameters_is_refused(case):
    name = getattr(case.family, "func", case.family).__name__
    with pytest.raises(ValueError, match=rf"^families\.{name}: expected params of shape"):
        case.family(torch.zeros(7, case.num_params + 4, 5))
    with pytest.raises(ValueError, match=rf"^families\.{name}: .*build the network with"):
        case.family(torch.zeros(5))


@every_family
def test_single_precision_is_kept_and_good_enough(case):
    params, x = random_params(case, 50), case.values(50, 5)
    exact = case.family(params).log_prob(x)
    single = case.family(params.float()).log_prob(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-3)


# --- levels far away


@pytest.mark.parametrize("base", [dist.Logistic, dist.Normal, dist.Laplace])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 50.0])
def test_levels_far_out_have_a_finite_probability_and_gradient(base, scale):
    loc = torch.tensor([-300.0, 3.0, 300.0], dtype=torch.float32, requires_grad=True)
    p = distributions.Discretized(base(loc, torch.tensor(scale)), L)
    log_prob = p.log_prob(torch.arange(float(L))[:, None])
    (gradient,) = torch.autograd.grad(log_prob.sum(), loc)
    assert log_prob.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(log_prob.logsumexp(0), torch.zeros(3), rtol=0, atol=1e-4)


def test_other_bases_are_refused():
    with pytest.raises(TypeError, match="expected base to be one of Logistic, Normal, Laplace"):
        distributions.Discretized(dist.Cauchy(0.0, 1.0), L)
