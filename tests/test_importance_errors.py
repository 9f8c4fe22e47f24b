"""Evidence: what is wrong is named, and what was there before is left alone."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import bernoulli_pair, bits, library_pair, store_pair
from torch import Tensor, nn

import pyro_vae as pv

# --- arguments


@pytest.mark.parametrize("args", [(), ("x", 3), (torch.tensor(1.0),)])
def test_without_data_nothing_is_estimated(args):
    with pytest.raises(ValueError, match="expected data: at least one tensor"):
        pv.log_weights(lambda *a: None, lambda *a: None, *args, num_particles=3)


def test_empty_data_are_refused():
    with pytest.raises(ValueError, match="the data are empty"):
        pv.log_evidence(*bernoulli_pair(), torch.zeros(0, 9), num_particles=3)


@pytest.mark.parametrize("num_particles", [0, -1])
def test_no_particles_are_refused(num_particles):
    with pytest.raises(ValueError, match=r"num_particles: expected at least 1"):
        pv.log_weights(*bernoulli_pair(), bits(), num_particles=num_particles)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_empty_chunks_are_refused(chunk_size):
    with pytest.raises(ValueError, match=r"chunk_size: expected at least 1"):
        pv.log_evidence(*bernoulli_pair(), bits(), num_particles=3, chunk_size=chunk_size)


# --- what is wrong is named


def test_a_latent_that_the_guide_lacks_is_named():
    model, _ = bernoulli_pair()
    with pytest.raises(ValueError, match="no latent site 'z'"):
        pv.log_evidence(model, lambda x: None, bits(), num_particles=3)


def test_data_outside_the_support_are_named_by_their_site():
    with pytest.raises(ValueError, match=r"site 'x': .* outside the support"):
        pv.log_evidence(*bernoulli_pair(), 0.5 * bits(), num_particles=3)


@pytest.mark.parametrize(("where", "site"), [("model", "'x'"), ("guide", "'z'")])
@pytest.mark.parametrize("validation", [True, False])
def test_parameters_that_are_nan_are_named_by_their_site(where, site, validation):
    pair = dict(zip(("model", "guide"), bernoulli_pair(), strict=True))
    with torch.no_grad():
        for parameter in pair[where].parameters():
            parameter.fill_(math.nan)
    with (
        pyro.validation_enabled(is_validate=validation),
        pytest.raises(ValueError, match=f"site {site}"),
    ):
        pv.log_evidence(pair["model"], pair["guide"], bits(), num_particles=3)


def test_a_guide_that_draws_infinite_values_is_named():
    model, _, (x,) = store_pair()

    def broken(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = x.new_zeros(len(x), 2)
            pyro.sample("z", dist.Delta(loc + math.inf, event_dim=1))

    with pytest.raises(ValueError, match="site 'z' of the guide: its value is NaN or infinite"):
        pv.log_weights(model, broken, x, num_particles=3)


# --- what is left alone


def test_the_random_state_is_left_alone():
    model, guide, args = library_pair()
    pyro.set_rng_seed(11)
    before = torch.get_rng_state()
    pv.log_evidence(model, guide, *args, num_particles=60)
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_are_at_rest_while_judged_and_as_before_afterwards():
    model, guide = bernoulli_pair()
    network: Any = guide.encoder.network
    network.layers.insert(1, nn.Dropout(0.9))
    guide.train()
    model.eval()
    modes = [m.training for m in (*model.modules(), *guide.modules())]
    x = bits()
    training = pv.log_weights(model, guide, x, num_particles=4)
    assert [m.training for m in (*model.modules(), *guide.modules())] == modes
    guide.eval()
    assert torch.equal(training, pv.log_weights(model, guide, x, num_particles=4))
    assert not training.requires_grad
    assert torch.is_grad_enabled()


def test_modules_are_as_before_after_an_error():
    model, guide = bernoulli_pair()
    with pytest.raises(ValueError, match="expected input of shape"):
        pv.log_weights(model, guide, bits(dim=8), num_particles=4)
    assert model.training
    assert guide.training
    assert torch.is_grad_enabled()
