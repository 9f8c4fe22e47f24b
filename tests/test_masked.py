"""Entries that are missing drop out exactly, whatever stands in their place."""

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_runs import assert_alike
from helpers import LinearGaussian, double_bits, logits
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from weights import assert_exact

import pyro_vae as pv
from pyro_vae import families
from pyro_vae.inference.structure import inspect
from pyro_vae.program.recipe import build, describe

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


# --- the distribution


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


# --- the pair


def known(size: int = 12) -> tuple[LinearGaussian, pv.Model, Tensor, Tensor]:
    """A linear-Gaussian model of the library's pieces, data with NaN for what is missing, mask."""
    truth = LinearGaussian.random()
    network: Any = pv.networks.mlp(2, (1, 5), hidden_dims=())
    likelihood = pv.Conditional(network, partial(families.fixed_normal, scale=truth.scale))
    model = pv.Model(pv.priors.StandardNormal(2), pv.Masked(likelihood)).double()
    weight, bias = network.parameters()
    weight.data, bias.data = truth.weight, truth.bias
    mask = torch.rand(size, 5) < 0.5
    mask[0], mask[1] = True, False
    return truth, model, torch.where(mask, truth.sample(size), math.nan), mask


def marginal(truth: LinearGaussian, x: Tensor, mask: Tensor) -> Tensor:
    """Exact log p of the observed coordinates of each datum, (N,)."""
    found = x.new_zeros(len(x))
    for n, (row, seen) in enumerate(zip(x, mask, strict=True)):
        if seen.any():
            part = LinearGaussian(truth.weight[seen], truth.bias[seen], truth.scale)
            found[n] = part.log_evidence(row[seen])
    return found


def test_the_weights_of_the_exact_posterior_are_log_p_of_what_is_observed():
    truth, model, x, mask = known()

    def guide(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            seen = mask.double()
            weight = truth.weight / truth.scale
            precision = torch.eye(2) + torch.einsum("nd,di,dj->nij", seen, weight, weight)
            residual = torch.where(mask.bool(), x - truth.bias, 0.0) / truth.scale
            loc = torch.linalg.solve(precision, residual @ weight)
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))

    for given in (mask, mask.double()):
        log_w = pv.log_weights(model, guide, x, given, num_particles=30, compile=False)
        assert_exact(log_w, marginal(truth, x, mask))
    estimate = pv.log_evidence(model, guide, x, mask, num_particles=30, compile=False)
    torch.testing.assert_close(estimate.value, marginal(truth, x, mask), rtol=0, atol=1e-10)


def test_a_trained_guide_finds_log_p_of_what_is_observed():
    truth, model, x, mask = known()
    model.requires_grad_(False).eval()
    network = pv.networks.without_missing(pv.networks.mlp(10, (2, 2), hidden_dims=(20,)))
    wide = partial(families.normal, min_scale=0.3)
    guide = pv.Guide(pv.Conditional(network, wide)).double()
    svi = pv.SVI(
        model, guide, lambda p: torch.optim.Adam(p, lr=1e-2), TraceMeanField_ELBO(), compile=False
    )
    for _ in range(200):
        assert svi.step(x, mask).isfinite()
    estimate = pv.log_evidence(model, guide, x, mask, num_particles=2000, compile=False)
    error = (estimate.value - marginal(truth, x, mask)).abs()
    assert (error < 5 * estimate.standard_error + 1e-3).all()


def pair(missing: float = math.nan, dtype: torch.dtype = torch.bool) -> Any:
    torch.manual_seed(0)
    small: Any = {"hidden_dims": (8,)}
    network = pv.networks.without_missing(pv.networks.mlp(18, (2, 2), **small))
    likelihood = pv.Conditional(pv.networks.mlp(2, (1, 9), **small), families.bernoulli)
    model = pv.Model(pv.priors.StandardNormal(2), pv.Masked(likelihood))
    guide = pv.Guide(pv.Conditional(network, families.normal))
    mask = torch.rand(7, 9) < 0.7
    x = torch.where(mask, double_bits(), missing)
    return model.double(), guide.double(), (x, mask.to(dtype))


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, pv.StickingTheLanding])
def test_losses_and_gradients_do_not_see_what_is_missing(loss):
    def gradients(missing: float) -> list[Tensor]:
        model, guide, args = pair(missing)
        svi = pv.SVI(model, guide, lambda p: torch.optim.SGD(p, lr=0.1), loss(), compile=False)
        torch.manual_seed(1)
        losses = [svi.step(*args) for _ in range(2)]
        return [*losses, *(p.detach() for m in (model, guide) for p in m.parameters())]

    with_nan, with_number = gradients(math.nan), gradients(7.0)
    assert all(t.isfinite().all() for t in with_nan)
    assert all(map(torch.equal, with_nan, with_number))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
def test_compiled_steps_lead_where_eager_steps_lead(dtype, interpreted):
    assert_alike(interpreted, partial(pair, dtype=dtype), loss=Trace_ELBO)


def test_observed_values_are_held_against_the_support_and_missing_ones_are_not():
    model, guide, (x, mask) = pair()
    inspect(model, guide, (x, mask), {})
    wrong = torch.where(mask, 0.5, x)
    with pytest.raises(ValueError, match="observed data have values outside"):
        inspect(model, guide, (wrong, mask), {})
    wrong = torch.where(mask, math.inf, x)
    with pytest.raises(ValueError, match="NaN or infinite"):
        inspect(model, guide, (wrong, mask), {})


def test_fit_takes_a_mask_and_load_gives_the_pair_back(tmp_path):
    torch.manual_seed(0)
    mask = torch.rand(60, 9) < 0.8
    x = torch.where(mask, (torch.rand(60, 9) < 0.9).float(), 5.0)  # few zeros, and nonsense
    model, guide, _ = pair()
    model, guide = model.float(), guide.float()
    history = pv.fit(
        model,
        guide,
        (x[:40], mask[:40]),
        valid=(x[40:], mask[40:]),
        optimizer=lambda params: torch.optim.Adam(params, lr=5e-2),
        epochs=30,
        batch_size=20,
        out=tmp_path / "run",
        progress=False,
        compile=False,
    )
    assert history["elbo"][-1] > history["elbo"][0] + 1
    again, other = pv.load(tmp_path / "run")
    options: Any = {"num_particles": 20, "compile": False}
    expected = pv.log_evidence(model, guide, x, mask, **options)
    found = pv.log_evidence(again, other, x, mask, **options)
    assert torch.equal(found.value, expected.value)


def test_a_masked_pair_is_made_again_from_its_recipe():
    model, guide, args = pair()
    again, other = build(describe(model, guide))
    again.double().load_state_dict(model.state_dict())
    other.double().load_state_dict(guide.state_dict())
    options: Any = {"num_particles": 20, "compile": False}
    expected = pv.log_evidence(model, guide, *args, **options)
    assert torch.equal(pv.log_evidence(again, other, *args, **options).value, expected.value)


def test_whole_images_are_generated_and_reconstructed():
    model, guide, (x, mask) = pair()
    model.requires_grad_(False)
    assert pv.generate(model, 3, draw=True).shape == (3, 9)
    assert pv.generate(model, 7, mask, draw=True).isfinite().all()
    mean, draw = (pv.reconstruct(model, guide, x, mask, draw=draw) for draw in (False, True))
    assert mean.shape == draw.shape == (7, 9)
    assert mean.isfinite().all()
    assert set(draw.unique().tolist()) <= {0.0, 1.0}
    z = pv.encode(guide, x, mask).mean.detach()
    assert torch.equal(pv.decode(model, z, x, mask).mean, pv.decode(model, z).mean)


def test_the_likelihood_sees_the_context_after_the_mask():
    likelihood = pv.Conditional(pv.networks.mlp(5, (1, 9)), families.bernoulli)
    z, y, mask = torch.randn(7, 2), torch.randn(7, 3), torch.rand(7, 9) < 0.5
    p: Any = pv.Masked(likelihood)(z, mask, y)
    assert torch.equal(logits(p.base_dist), logits(likelihood(z, y)))


def test_an_encoder_sees_zeros_the_mask_and_the_context():
    inner = pv.networks.mlp(9, (2, 2))
    network = pv.networks.without_missing(inner)
    x, mask, y = torch.randn(7, 3), torch.rand(7, 3) < 0.5, torch.randn(7, 3)
    expected = inner(x * mask, mask.float(), y)
    for given in (mask, mask.float()):
        assert torch.equal(network(torch.where(mask, x, math.nan), given, y), expected)


def test_missing_values_are_not_blamed_for_another_mistake():
    """With NaN in the data it is the mask's shape that is wrong, and is named."""
    encoder = pv.Conditional(
        pv.networks.without_missing(pv.networks.mlp(6, (2, 2))), pv.families.normal
    )
    likelihood = pv.Conditional(pv.networks.mlp(2, (2, 3)), pv.families.normal)
    model = pv.Model(pv.priors.StandardNormal(2), pv.Masked(likelihood))
    x = torch.tensor([[1.0, torch.nan, 2.0]] * 4)
    with pytest.raises(ValueError, match=r"expected a mask of shape \(\*batch, 3\)"):
        pv.log_weights(model, lambda x, m: guide_of(encoder, x), x, x[:, :2] > 0, num_particles=2)


def guide_of(encoder: Any, x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", encoder(x, x.isfinite()))
