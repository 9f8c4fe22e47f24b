"""Mixtures of diagonal normals by products of matrices are torch's mixtures."""

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.graph.work import Work
from pyro_vae.program.distributions.mixtures import mixture


def members(k: int = 5, dim: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits, means and scales."""
    generator = torch.Generator().manual_seed(0)
    logits, *rest = (torch.randn(*s, generator=generator) for s in ((k,), (k, dim), (k, dim)))
    own = (logits, 3 * rest[0], rest[1].exp())
    return [t.to(dtype).requires_grad_() for t in own]


def by_torch(logits: Tensor, loc: Tensor, scale: Tensor) -> dist.MixtureSameFamily:
    return dist.MixtureSameFamily(
        dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1)
    )


def test_densities_and_all_gradients_are_those_of_torch():
    own = members(dtype=torch.float64)
    z = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    found = pv.distributions.NormalMixture(*own).log_prob(z)
    expected = by_torch(*own).log_prob(z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(4, 7, dtype=torch.float64)
    for f, e in zip(
        torch.autograd.grad(found, [z, *own], cotangent),
        torch.autograd.grad(expected, [z, *own], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0, 1e4])
def test_nothing_is_lost_to_rounding_where_the_members_are_narrow(scale):
    """In float32 alone the terms of the square would cancel: by thousands of nats at 1e-3."""
    logits, loc, one = members(50, 40)
    own = (logits, loc, scale * one)
    exact = by_torch(*(t.double() for t in own))
    z = exact.sample((100,)).float()
    expected = exact.log_prob(z.double()).float()
    found = pv.distributions.NormalMixture(*own).log_prob(z)
    assert found.dtype == torch.float32
    error, of_torch = ((p - expected).abs().max() for p in (found, by_torch(*own).log_prob(z)))
    assert error <= 2 * of_torch


def test_it_is_expanded_drawn_from_and_checked_like_torch_s():
    own = members()
    p, torch_s = pv.distributions.NormalMixture(*own), by_torch(*own)
    wide = p.expand([7])
    assert type(wide) is type(wide.expand([2, 7])) is pv.distributions.NormalMixture
    for shape in ((3,), (1, 3), (7, 3), (4, 7, 3)):
        z = torch.randn(shape)
        for ours, theirs in ((p, torch_s), (wide, torch_s.expand([7]))):
            torch.testing.assert_close(ours.log_prob(z), theirs.log_prob(z))
    assert wide.sample((4,)).shape == (4, 7, 3)
    torch.testing.assert_close(wide.mean, torch_s.mean.expand(7, 3))
    with pytest.raises(ValueError, match="within the support"):
        wide.log_prob(torch.full((7, 3), torch.nan))


def test_lower_precision_that_is_asked_for_elsewhere_leaves_the_densities_alone():
    own, z = members(50, 40), torch.randn(10, 40)
    p = pv.distributions.NormalMixture(*own)
    with torch.autocast("cpu", torch.bfloat16):
        found = p.log_prob(z)
    assert torch.equal(found, p.log_prob(z))


def test_no_value_meets_every_dimension_of_every_member():
    own, z = members(50, 40), torch.randn(100, 40)
    with torch.no_grad():
        with Work() as work:
            pv.distributions.NormalMixture(*own).expand([100]).log_prob(z)
        with Work() as by_differences:
            by_torch(*own).log_prob(z)
    assert by_differences.largest >= 100 * 50 * 40 * 4
    assert work.largest <= 100 * 80 * 8


def test_only_diagonal_normals_without_a_batch_are_taken_so():
    logits, loc, scale = members()
    normals = dist.Normal(loc, scale).to_event(1)
    torch_s = torch.distributions.Normal(loc, scale)
    assert type(mixture(logits, normals)) is pv.distributions.NormalMixture
    assert type(mixture(logits, dist.Independent(torch_s, 1))) is pv.distributions.NormalMixture
    others = [
        dist.Laplace(loc, scale).to_event(1),
        dist.Normal(loc[:, 0], scale[:, 0]),
        dist.MultivariateNormal(loc, scale_tril=scale.diag_embed()),
        dist.LogNormal(loc, scale).to_event(1),
    ]
    for of in others:
        assert type(mixture(logits, of)) is dist.MixtureSameFamily, of
    batched = mixture(logits.expand(2, 5), normals.expand([2, 5]))
    assert type(batched) is dist.MixtureSameFamily
