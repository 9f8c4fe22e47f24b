"""Pairs of data with missing entries: their evidence, training, saving, and draws."""

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
from torch import Tensor
from weights import assert_exact

import pyro_vae as pv
from pyro_vae import families
from pyro_vae.inference.structure import inspect
from pyro_vae.program.recipe import build, describe


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
