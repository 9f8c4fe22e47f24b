"""Free bits: the ELBO above the floor, a constant below it, for each latent site."""

import pytest
import torch
from compiled_runs import assert_alike
from helpers import (
    bernoulli_latents,
    hierarchical_pair,
    library_pair,
    store_pair,
    subsampled_pair,
)
from objective_runs import estimate, gradients
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_vae as pv

LOSSES = (Trace_ELBO, TraceMeanField_ELBO)
PAIRS = (library_pair, store_pair, subsampled_pair, hierarchical_pair)


@pytest.mark.filterwarnings("ignore:.*Monte Carlo")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("make", PAIRS, ids=lambda make: make.__name__)
def test_without_a_floor_it_is_the_elbo(make, loss):
    pair = make()
    ours, theirs = estimate(pv.FreeBits(0.0, loss()), pair), estimate(loss(), pair)
    if theirs.rate > 0:
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs))


def test_below_the_floor_the_rate_has_no_gradient():
    pair = library_pair()
    ours = estimate(pv.FreeBits(50.0), pair)
    theirs = estimate(TraceMeanField_ELBO(), pair)
    assert ours.loss.item() == pytest.approx((theirs.distortion + 50.0 * 7).item())
    torch.testing.assert_close(torch.stack(ours[1:]), torch.stack(theirs[1:]))
    with pv.kl_weight(0.0):
        free = gradients(TraceMeanField_ELBO(), pair)
    torch.testing.assert_close(gradients(pv.FreeBits(50.0), pair), free)


def test_every_latent_has_a_floor_of_its_own_and_subsampled_data_count_in_full():
    hierarchy = hierarchical_pair()
    n = len(hierarchy[2][0])
    ours = estimate(pv.FreeBits(50.0, Trace_ELBO()), hierarchy)
    assert ours.loss.item() == pytest.approx(ours.distortion.item() + 2 * 50.0 * n)
    pair = subsampled_pair()
    ours = estimate(pv.FreeBits(50.0, Trace_ELBO()), pair)
    scale = estimate(Trace_ELBO(), pair)
    assert ours.distortion == scale.distortion
    floor = (ours.loss - ours.distortion).item() / 50.0
    assert floor > len(pair[2][0])


@pytest.mark.parametrize("nats", [0.01, 50.0])
@pytest.mark.parametrize("make", PAIRS[:3], ids=lambda make: make.__name__)
def test_compiled_steps_lead_where_eager_steps_lead(make, nats, interpreted):
    assert_alike(interpreted, make, loss=lambda: pv.FreeBits(nats, Trace_ELBO()))


def test_what_makes_no_floor_is_refused():
    with pytest.raises(ValueError, match="expected nats >= 0, got -1"):
        pv.FreeBits(-1.0)
    with pytest.raises(TypeError, match=r"expected loss to be TraceMeanField_ELBO\(\) or Trace"):
        pv.FreeBits(1.0, "elbo")
    with pytest.raises(ValueError, match="expected a loss of one particle, got 3"):
        pv.FreeBits(1.0, Trace_ELBO(num_particles=3))
    model, guide, args = bernoulli_latents()
    svi = pv.SVI(
        model, guide, lambda p: torch.optim.SGD(p, lr=1e-4), pv.FreeBits(1.0, Trace_ELBO())
    )
    with pytest.raises(ValueError, match="site 'z': the guide draws it without a pathwise"):
        svi.step(*args)
