"""A conditional is its family of its network, for any network that keeps the batch."""

from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv


class Own(nn.Module):
    """A network that this library has never met."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x):
        return self.linear(x).unflatten(-1, (2, 3)).sin()


class ForgetsParticles(nn.Module):
    """The usual mistake: one batch dimension, whatever came."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x):
        return self.linear(x).view(-1, 2, 3)


@pytest.mark.parametrize("batch", [(), (7,), (13, 7)], ids=str)
def test_a_conditional_is_its_family_of_its_network(batch):
    network = pv.networks.mlp(4, (2, 3))
    family = partial(pv.families.normal, to_scale=pv.families.exp_half)
    conditional, x = pv.Conditional(network, family), torch.randn(*batch, 4)
    distribution, by_hand = conditional(x), family(network(x))
    z = torch.randn(*batch, 3)
    assert distribution.batch_shape == batch
    assert distribution.event_shape == (3,)
    assert torch.equal(distribution.log_prob(z), by_hand.log_prob(z))


def test_its_parameters_are_those_of_the_network():
    network = pv.networks.mlp(4, (2, 3))
    conditional = pv.Conditional(network, pv.families.normal)
    assert [id(p) for p in conditional.parameters()] == [id(p) for p in network.parameters()]
    conditional(torch.randn(7, 4)).rsample().square().sum().backward()
    for name, parameter in conditional.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_network_of_the_users_own_serves():
    network = Own()
    distribution = pv.Conditional(network, pv.families.normal)(x := torch.randn(13, 7, 4))
    assert distribution.batch_shape == (13, 7)
    assert torch.equal(distribution.mean, network(x)[..., 0, :])


def test_a_family_of_the_users_own_serves():
    network = pv.networks.mlp(4, (1, 3))
    conditional = pv.Conditional(network, lambda p: dist.Poisson(p[..., 0, :].exp()).to_event(1))
    x = torch.randn(13, 7, 4)
    assert conditional(x).batch_shape == (13, 7)
    assert torch.equal(conditional(x).mean, network(x)[..., 0, :].exp())


def test_a_network_that_drops_the_particle_dimension_is_refused():
    conditional = pv.Conditional(ForgetsParticles(), pv.families.normal)
    assert conditional(torch.randn(7, 4)).batch_shape == (7,)
    expected = (
        r"the network \(ForgetsParticles\) maps inputs of shape \(13, 7, 4\) to params of shape "
        r"\(91, 2, 3\); expected \(13, 7, P, D\): it has to keep every batch dimension"
    )
    with pytest.raises(ValueError, match=expected):
        conditional(torch.randn(13, 7, 4))


def test_a_network_without_the_parameter_dimension_is_refused():
    conditional = pv.Conditional(nn.Linear(4, 6), pv.families.normal)
    with pytest.raises(ValueError, match=r"params of shape \(7, 6\); expected \(7, P, D\)"):
        conditional(torch.randn(7, 4))
    # Without any batch there is none to lose; then the family speaks.
    with pytest.raises(ValueError, match=r"families\.normal: expected params of shape"):
        conditional(torch.randn(4))


def test_several_inputs_are_broadcast():
    network = pv.networks.mlp(5, (1, 9))
    conditional = pv.Conditional(network, pv.families.bernoulli)
    z, y = torch.randn(13, 7, 2), torch.randn(7, 3)
    distribution = conditional(z, y)
    assert distribution.batch_shape == (13, 7)
    assert torch.equal(distribution.base_dist.logits, network(z, y)[..., 0, :])


def test_a_refusal_lists_all_inputs():
    class First(nn.Module):
        def forward(self, z, y):
            return z[0, :, None]

    conditional = pv.Conditional(First(), pv.families.bernoulli)
    with pytest.raises(ValueError, match=r"inputs of shape \(13, 7, 2\), \(7, 3\) to params"):
        conditional(torch.randn(13, 7, 2), torch.randn(7, 3))
