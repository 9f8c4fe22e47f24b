"""Every family is the distribution that it is named after: scipy, sums, integrals say so."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from pyro_vae import distributions, families

TRIALS = 5
LEVELS = 4


class Case(NamedTuple):
    family: Callable[[Tensor], Any]
    name: str
    num_params: int
    oracle: Callable[[np.ndarray], Any]  # params (*batch, P, D) -> scipy's distribution
    levels: int | None = None  # how many values a dimension takes; None for reals


class LevelsOracle:
    """The categorical over 0..L-1 by ``scipy.stats.rv_discrete``, elementwise."""

    def __init__(self, params: np.ndarray) -> None:
        probs = np.moveaxis(scipy.special.softmax(params, axis=-2), -2, -1)
        self.shape = probs.shape[:-1]
        values = np.arange(probs.shape[-1])
        self.each = [
            scipy.stats.rv_discrete(values=(values, p)) for p in probs.reshape(-1, probs.shape[-1])
        ]

    def logpmf(self, x: np.ndarray) -> np.ndarray:
        flat = np.broadcast_to(x, self.shape).ravel()
        each = [p.logpmf(value) for p, value in zip(self.each, flat, strict=True)]
        return np.reshape(each, self.shape)

    def stats(self, moments: str) -> list[np.ndarray]:
        each = np.array([p.stats(moments=moments) for p in self.each])
        return [np.reshape(column, self.shape) for column in each.T]


def softplus(u: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, u)


def unpacked(params: np.ndarray) -> list[np.ndarray]:
    return list(np.moveaxis(params, -2, 0))


def location_scale(distribution: Any, scale: Callable[[np.ndarray], np.ndarray] | float) -> Any:
    def oracle(params: np.ndarray) -> Any:
        loc, *rest = unpacked(params)
        return distribution(loc, scale(*rest) if callable(scale) else scale)

    return oracle


CASES = {
    "normal, softplus": Case(
        families.normal,
        "normal",
        2,
        location_scale(scipy.stats.norm, lambda u: 1e-6 + softplus(u)),
    ),
    "normal, exp_half": Case(
        partial(families.normal, to_scale=families.exp_half, min_scale=0.0),
        "normal",
        2,
        location_scale(scipy.stats.norm, lambda u: np.exp(u / 2)),
    ),
    "fixed_normal": Case(
        partial(families.fixed_normal, scale=0.3),
        "fixed_normal",
        1,
        location_scale(scipy.stats.norm, 0.3),
    ),
    "laplace": Case(
        partial(families.laplace, min_scale=0.1),
        "laplace",
        2,
        location_scale(scipy.stats.laplace, lambda u: 0.1 + softplus(u)),
    ),
    "fixed_laplace": Case(
        partial(families.fixed_laplace, scale=0.3),
        "fixed_laplace",
        1,
        location_scale(scipy.stats.laplace, 0.3),
    ),
    "bernoulli": Case(
        families.bernoulli,
        "bernoulli",
        1,
        lambda params: scipy.stats.bernoulli(scipy.special.expit(*unpacked(params))),
        levels=2,
    ),
    "binomial": Case(
        partial(families.binomial, total_count=TRIALS),
        "binomial",
        1,
        lambda params: scipy.stats.binom(TRIALS, scipy.special.expit(*unpacked(params))),
        levels=TRIALS + 1,
    ),
    "categorical": Case(families.categorical, "categorical", LEVELS, LevelsOracle, levels=LEVELS),
}


def over(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


every_family = over(CASES)
discrete_families = over({k: c for k, c in CASES.items() if c.levels is not None})
continuous_families = over({k: c for k, c in CASES.items() if c.levels is None})


def random_params(case: Case, *batch: int, dim: int = 5, dtype=torch.float64) -> Tensor:
    return torch.randn(*batch, case.num_params, dim, dtype=dtype)


def random_values(case: Case, *shape: int, dtype=torch.float64) -> Tensor:
    if case.levels is None:
        return torch.randn(*shape, dtype=dtype)
    return torch.randint(case.levels, shape).to(dtype)


@every_family
def test_log_prob_is_that_of_scipy(case):
    params, x = random_params(case, 3, 4), random_values(case, 3, 4, 5)
    oracle = case.oracle(params.numpy())
    score = oracle.logpdf if case.levels is None else oracle.logpmf
    log_prob = case.family(params).log_prob(x)
    np.testing.assert_allclose(log_prob.numpy(), score(x.numpy()).sum(-1), rtol=1e-10, atol=1e-10)


@every_family
def test_mean_and_variance_are_those_of_scipy(case):
    params = random_params(case, 3)
    mean, variance = case.oracle(params.numpy()).stats(moments="mv")
    distribution = case.family(params)
    np.testing.assert_allclose(distribution.mean.numpy(), mean, rtol=1e-10)
    np.testing.assert_allclose(
        distribution.variance.numpy(), np.broadcast_to(variance, (3, 5)), rtol=1e-10
    )


@every_family
@pytest.mark.parametrize("batch", [(), (7,), (3, 7), (2, 3, 7)], ids=str)
def test_dimensions_are_one_event_and_the_rest_is_batch(case, batch):
    distribution = case.family(random_params(case, *batch))
    assert distribution.batch_shape == batch
    assert distribution.event_shape == (5,)
    assert distribution.mean.shape == (*batch, 5)
    x = distribution.sample()
    assert x.shape == (*batch, 5)
    assert distribution.log_prob(x).shape == batch
    assert distribution.sample((13,)).shape == (13, *batch, 5)


@discrete_families
def test_probabilities_sum_to_one(case):
    distribution = case.family(random_params(case, 3, 1, dim=3))
    values = torch.tensor(list(product(range(case.levels), repeat=3)), dtype=torch.float64)
    total = distribution.log_prob(values).logsumexp(-1)
    torch.testing.assert_close(total, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@continuous_families
def test_densities_integrate_to_one(case):
    params = random_params(case, dim=1)
    distribution, loc = case.family(params), params[0, 0].item()

    def density(x: float) -> float:
        return distribution.log_prob(torch.tensor([x], dtype=torch.float64)).exp().item()

    # In two halves, since the Laplace density has a kink at its centre.
    halves = [(-np.inf, loc), (loc, np.inf)]
    for half in halves:
        value, _ = scipy.integrate.quad(density, *half, epsabs=1e-10)
        assert value == pytest.approx(0.5, abs=1e-8)


@every_family
def test_draws_have_the_moments_of_the_density(case):
    n = 40_000
    params = random_params(case, dim=3)
    draws = case.family(params).sample((n,)).numpy()
    mean, variance, _, kurtosis = (
        np.broadcast_to(moment, 3) for moment in case.oracle(params.numpy()).stats(moments="mvsk")
    )
    # Standard errors of the sample's mean and variance; kurtosis is scipy's, 0 for a normal.
    mean_error = np.sqrt(variance / n)
    variance_error = variance * np.sqrt((kurtosis + 2) / n)
    assert (np.abs(draws.mean(0) - mean) < 4 * mean_error).all()
    assert (np.abs(draws.var(0) - variance) < 4 * variance_error).all()
    # Dimensions are independent: their correlations have standard error 1 / sqrt(n).
    correlations = np.corrcoef(draws.T) - np.eye(3)
    assert np.abs(correlations).max() < 4 / np.sqrt(n)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_precision_is_kept(case, dtype):
    distribution = case.family(random_params(case, 7, dtype=dtype))
    x = random_values(case, 7, 5, dtype=dtype)
    assert distribution.mean.dtype == dtype
    assert distribution.variance.dtype == dtype
    assert distribution.log_prob(x).dtype == dtype
    if case.name != "categorical":  # whose draws are indices, as torch's
        assert distribution.sample().dtype == dtype


@every_family
def test_the_gradient_of_log_prob_is_that_of_finite_differences(case):
    params = random_params(case, 2, dim=3).requires_grad_()
    x = random_values(case, 2, 3)
    assert torch.autograd.gradcheck(lambda p: case.family(p).log_prob(x), (params,))


@continuous_families
def test_draws_are_reparameterized(case):
    params = random_params(case, 2).requires_grad_()
    distribution = case.family(params)
    assert distribution.has_rsample
    (gradient,) = torch.autograd.grad(distribution.rsample().sum(), params)
    # The location moves a draw one to one.
    torch.testing.assert_close(gradient[:, 0], torch.ones_like(gradient[:, 0]))


@every_family
def test_a_wrong_number_of_parameters_is_refused(case):
    wrong = torch.zeros(7, 1 if case.name == "categorical" else case.num_params + 1, 5)
    with pytest.raises(ValueError, match=rf"^families\.{case.name}: expected params of shape"):
        case.family(wrong)
    with pytest.raises(ValueError, match=rf"^families\.{case.name}: .*got \(5,\); build the netw"):
        case.family(torch.zeros(5))


def test_the_refusal_says_how_to_build_the_network():
    expected = (
        r"families\.normal: expected params of shape \(\*batch, 2, D\), which hold loc and "
        r"unconstrained scale, got \(7, 1, 5\); build the network with out=\(2, 5\)\."
    )
    with pytest.raises(ValueError, match=expected):
        families.normal(torch.zeros(7, 1, 5))
    with pytest.raises(ValueError, match=r"L >= 2 levels, got \(7, 1, 5\); .*out=\(L, D\)"):
        families.categorical(torch.zeros(7, 1, 5))
    with pytest.raises(ValueError, match=r"got \(\); build the network with out=\(1, D\)"):
        families.bernoulli(torch.zeros(()))


@discrete_families
@pytest.mark.parametrize("bad", [0.5, -1.0, "one too many"])
def test_values_outside_the_support_are_refused(case, bad):
    value = float(case.levels) if isinstance(bad, str) else bad
    with pytest.raises(ValueError, match="within the support"):
        case.family(random_params(case)).log_prob(torch.full((5,), value, dtype=torch.float64))


@pytest.mark.parametrize("family", [families.normal, families.laplace], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("to_scale", "expected"),
    [(families.softplus, softplus), (families.exp_half, lambda u: np.exp(u) ** 0.5)],
    ids=["softplus", "exp_half"],
)
def test_the_scale_is_the_map_plus_the_least_scale(family, to_scale, expected):
    unconstrained = torch.linspace(-40, 40, 81, dtype=torch.float64)
    params = torch.stack([torch.zeros_like(unconstrained), unconstrained])
    scale = family(params, to_scale=to_scale, min_scale=0.25).base_dist.scale
    # Torch's softplus is the identity above 20, where log(1 + exp(-20)) = 2.1e-9 is missing.
    atol = 2.1e-9 if to_scale is families.softplus else 0.0
    by_hand = 0.25 + expected(unconstrained.numpy())
    np.testing.assert_allclose(scale.numpy(), by_hand, rtol=1e-12, atol=atol)


def test_levels_have_the_mean_and_variance_of_explicit_sums():
    logits = torch.randn(3, 5, LEVELS, dtype=torch.float64)
    p = distributions.Levels(logits=logits)
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    mean = sum(level * probs[..., level] for level in range(LEVELS))
    second = sum(level**2 * probs[..., level] for level in range(LEVELS))
    torch.testing.assert_close(p.mean, mean)
    torch.testing.assert_close(p.variance, second - mean**2)


def test_levels_stay_levels_when_they_are_expanded():
    # A plate expands what stands in it, and reconstruction asks the result for its mean.
    p = distributions.Levels(logits=torch.randn(LEVELS))
    expanded = p.expand(torch.Size([3, 5]))
    assert expanded.batch_shape == (3, 5)
    torch.testing.assert_close(expanded.mean, p.mean.expand(3, 5))
    torch.testing.assert_close(expanded.variance, p.variance.expand(3, 5))
