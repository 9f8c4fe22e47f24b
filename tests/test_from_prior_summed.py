"""The prior as a guide where discrete latents are summed out."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import (
    double_bits,
)
from pyro import poutine
from test_enumeration import Pixels, Semi
from torch import Tensor
from weights import Spied, add_up

import pyro_vae as pv
from pyro_vae.inference.handlers import latent_sites, unscaled_log_prob

ENUMERATED: Any = {"enumerate": "parallel"}


def test_a_latent_below_a_class_is_drawn_from_the_mixture():
    semi, x = Semi(), double_bits(20)
    spied = Spied(semi.model)
    log_w = pv.log_weights(spied.model, pv.from_prior(spied.model), x, num_particles=30)
    # x does not depend on the class given z, so its likelihood is that of any class.
    torch.testing.assert_close(log_w, spied.log_p, rtol=0, atol=1e-12)
    found = pv.log_evidence(semi.model, pv.from_prior(semi.model), x, num_particles=20_000)
    with torch.no_grad():
        y = dist.Categorical(logits=semi.logits).sample(torch.Size([20_000]))
        z = dist.Normal(semi.loc[y], 1.0).sample().unsqueeze(1)
        log_w = dist.Bernoulli(logits=semi.decoder(z)).log_prob(x).sum(-1)
    value = log_w.logsumexp(0) - math.log(20_000)
    error = (log_w - value).exp().std(0) / 20_000**0.5
    error = (found.standard_error.square() + error.square()).sqrt()
    assert ((found.value - value).abs() < 4 * error).all()
    assert error.max() < 0.2


def test_a_class_beside_a_latent_is_summed_out_of_the_likelihood():
    loc = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    weight = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            y = pyro.sample("y", dist.Categorical(weight), infer=ENUMERATED)
            pyro.sample("x", dist.Normal(z + loc[y], 0.5), obs=x)

    x = torch.randn(9, dtype=torch.float64)
    found = pv.log_evidence(model, pv.from_prior(model), x, num_particles=20_000)
    parts = dist.Normal(loc, 1.25**0.5).log_prob(x.unsqueeze(-1)) + weight.log()
    assert ((found.value - parts.logsumexp(-1)).abs() < 4 * found.standard_error).all()


TABLES = {
    name: torch.tensor(values, dtype=torch.float64)
    for name, values in {
        "c1": [0.3, 0.7],
        "c2": [[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]],  # given c1
        "z1": [-2.0, 0.0, 3.0],  # its mean given c2
        "z2": [-1.0, 1.5],  # its mean given c1, at z1 = 0
    }.items()
}


def chain(x: Tensor) -> None:
    """Classes c1 -> c2 -> z1 and c1 -> z2 <- z1, and a class that has nothing to do with them."""
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("other", dist.Bernoulli(torch.tensor(0.4)), infer=ENUMERATED)
        c1 = pyro.sample("c1", dist.Categorical(TABLES["c1"]), infer=ENUMERATED)
        c2 = pyro.sample("c2", dist.Categorical(TABLES["c2"][c1]), infer=ENUMERATED)
        z1 = pyro.sample("z1", dist.Normal(TABLES["z1"][c2], 1.0))
        z2 = pyro.sample("z2", dist.Normal(TABLES["z2"][c1] + 0.5 * z1, 0.7))
        pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=x)


def test_the_density_of_latents_below_classes_is_the_exhaustive_sum():
    x = torch.randn(6, dtype=torch.float64)
    inside = pyro.plate("num_particles", 5, dim=-2)(pv.from_prior(chain))
    for _ in range(2):  # a whole run, and one that leaves off
        trace = poutine.trace(inside).get_trace(x)
        sites = dict(latent_sites(trace))
        assert list(sites) == ["z1", "z2"]
        z1, z2 = (site["value"] for site in sites.values())
        assert z1.shape == z2.shape == (5, 6)
        total = []
        for c1 in range(2):
            for c2 in range(3):
                log_c = TABLES["c1"][c1].log() + TABLES["c2"][c1, c2].log()
                log_z = dist.Normal(TABLES["z1"][c2], 1.0).log_prob(z1)
                log_z = log_z + dist.Normal(TABLES["z2"][c1] + 0.5 * z1, 0.7).log_prob(z2)
                total.append(log_c + log_z)
        log_q = add_up(unscaled_log_prob(site) for site in sites.values())
        exact = torch.stack(total).logsumexp(0)
        torch.testing.assert_close(log_q, exact, rtol=0, atol=1e-12)


def test_latents_below_classes_are_drawn_as_they_are_scored():
    """Moments against draws of the model itself, classes and all."""
    x = torch.zeros(1, dtype=torch.float64)
    moments = []
    for program in (pv.from_prior(chain), chain):
        inside = pyro.plate("num_particles", 40_000, dim=-2)(program)
        sites = dict(latent_sites(poutine.trace(inside).get_trace(x)))
        z = torch.cat([sites["z1"]["value"], sites["z2"]["value"]], -1)
        moments.append(torch.cat([z, z.square(), z.prod(-1, keepdim=True)], -1))
    difference = moments[0].mean(0) - moments[1].mean(0)
    error = add_up(m.var(0) / len(m) for m in moments).sqrt()
    assert (difference.abs() < 4 * error).all()


def test_where_nothing_is_left_to_draw_the_evidence_is_exact():
    pair, x = Pixels(), double_bits(130)
    guide = pv.from_prior(pair.model)
    found = pv.log_evidence(pair.model, guide, x, num_particles=2, data_plate="data")
    torch.testing.assert_close(found.value, pair.log_evidence(x), rtol=1e-12, atol=0.0)


def test_a_class_of_another_plate_is_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)), infer=ENUMERATED)
            with pyro.plate("pixels", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(y, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"site 'z' depends on the sum over \['y'\].*'pixels'"):
        pv.log_weights(
            model, pv.from_prior(model), torch.zeros(7, 3), num_particles=3, data_plate="data"
        )
