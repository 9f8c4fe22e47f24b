"""Residual networks are their formula, and nothing where every block adds nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyro_vae as pv
from pyro_vae import networks
from pyro_vae.program.recipe import build, describe

SHAPE = (7, 5)
MAKERS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "mlp": (lambda **options: networks.residual_mlp(6, (2, 35), hidden_dim=8, **options), 6),
    "encoder": (
        lambda **options: networks.residual_conv_encoder(
            SHAPE, (2, 35), channels=(4, 3), **options
        ),
        35,
    ),
    "decoder": (
        lambda **options: networks.residual_conv_decoder(
            6, (2, 35), image_shape=SHAPE, channels=(4, 3), **options
        ),
        6,
    ),
}
every_network = pytest.mark.parametrize(("make", "in_dim"), MAKERS.values(), ids=MAKERS)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if hasattr(module, "branch")]


def silent(network: nn.Module) -> nn.Module:
    """The network with the last layer of every block at zero."""
    for block in blocks_of(network):
        last: nn.Module = block.branch[-1]  # type: ignore[index]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    return network.double()


def test_residual_mlp_is_its_formula():
    network = networks.residual_mlp(6, (2, 3), hidden_dim=5, depth=2, activation=nn.SiLU).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    tensors = [p.detach() for p in network.parameters()]
    a, *layers, b = list(zip(tensors[::2], tensors[1::2], strict=True))
    h = x @ a[0].T + a[1]
    for (w1, b1), (w2, b2) in zip(layers[::2], layers[1::2], strict=True):
        h = h + F.silu(F.silu(h) @ w1.T + b1) @ w2.T + b2
    by_hand = F.silu(h) @ b[0].T + b[1]
    torch.testing.assert_close(network(x), by_hand.view(7, 2, 3))


def test_blocks_that_add_nothing_leave_two_affine_maps():
    network = silent(networks.residual_mlp(6, (2, 3), hidden_dim=5, depth=3))
    x = torch.randn(7, 6, dtype=torch.float64)
    w1, b1, *_, w2, b2 = network.parameters()
    by_hand = (x @ w1.T + b1).relu() @ w2.T + b2
    assert torch.equal(network(x), by_hand.view(7, 2, 3))


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_blocks_that_add_nothing_leave_the_plain_convolutions(name):
    make, in_dim = MAKERS[name]
    network = silent(make(depth=2))
    options: Any = {"channels": (4, 3)}
    plain = (
        networks.conv_encoder(SHAPE, (2, 35), **options)
        if name == "encoder"
        else networks.conv_decoder(6, (2, 35), image_shape=SHAPE, **options)
    ).double()
    inside = {id(p) for block in blocks_of(network) for p in block.parameters()}
    outside = [p for p in network.parameters() if id(p) not in inside]
    for ours, theirs in zip(outside, plain.parameters(), strict=True):
        theirs.data.copy_(ours)
    x = torch.randn(7, in_dim, dtype=torch.float64)
    assert torch.equal(network(x), plain(x))


@every_network
def test_a_block_adds_its_branch(make, in_dim):
    network = make(depth=1).double()
    block = blocks_of(network)[0]
    first = next(block.parameters())
    h = torch.randn(2, *((8,) if first.dim() == 2 else (4, 3, 3)), dtype=torch.float64)
    layers = [layer for layer in block.branch if not isinstance(layer, nn.ReLU)]  # type: ignore[union-attr]
    assert torch.equal(block(h), h + layers[1](layers[0](h.relu()).relu()))


@every_network
def test_depth_adds_the_parameters_that_it_says(make, in_dim):
    sizes = [sum(p.numel() for p in make(depth=depth).parameters()) for depth in (1, 2, 5)]
    if in_dim == 6 and make is MAKERS["mlp"][0]:
        block = 2 * (8 * 8 + 8)
    else:
        block = sum(2 * (9 * c * c + c) for c in (4, 3))
    assert [sizes[1] - sizes[0], sizes[2] - sizes[0]] == [block, 4 * block]


@every_network
def test_one_datum_is_scored_alone(make, in_dim):
    """No normalisation over the minibatch, whether the network trains or rests."""
    network = make(depth=2).double()
    x = torch.randn(7, in_dim, dtype=torch.float64)
    others = torch.cat([x[:1], 100 * x[1:]])
    for training in (True, False):
        network.train(training)
        torch.testing.assert_close(network(x)[0], network(others)[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["mlp", "decoder"])
def test_several_inputs_are_joined(name):
    make, _ = MAKERS[name]
    network = make()
    z, y = torch.randn(4, 7, 2), torch.randn(7, 4)
    assert torch.equal(network(z, y), network(torch.cat([z, y.expand(4, 7, 4)], dim=-1)))


@every_network
def test_a_residual_network_is_made_again_from_its_recipe(make, in_dim):
    network = make(depth=2, activation=nn.SiLU)
    (again,) = build(describe(network))
    again.load_state_dict(network.state_dict())
    x = torch.randn(3, in_dim)
    assert torch.equal(again(x), network(x))


def test_a_pair_of_residual_networks_trains_and_is_judged():
    encoder = pv.Conditional(
        networks.residual_conv_encoder((8, 8), (2, 3), channels=(4,)), pv.families.normal
    )
    likelihood = pv.Conditional(
        networks.residual_conv_decoder(3, (1, 64), image_shape=(8, 8), channels=(4,)),
        pv.families.bernoulli,
    )
    model, guide = pv.Model(pv.priors.StandardNormal(3), likelihood), pv.Guide(encoder)
    x = torch.rand(20, 64).round()
    svi = pv.SVI(model, guide, lambda params: torch.optim.Adam(params, lr=1e-2))
    before = pv.log_evidence(model, guide, x, num_particles=20, compile=False)
    for _ in range(30):
        svi.step(x)
    after = pv.log_evidence(model, guide, x, num_particles=20, compile=False)
    assert after.mean > before.mean + 1


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        *(
            (lambda make=make: make(depth=0), r"residual_\w+: expected depth >= 1 .*, got 0")
            for make, _ in MAKERS.values()
        ),
        (
            lambda: networks.residual_mlp(6, (2, 3), hidden_dim=0),
            r"residual_mlp: expected hidden_dim >= 1, got 0",
        ),
        (lambda: networks.residual_mlp(6, (2, 3, 4)), r"residual_mlp: expected out=\(P, D\)"),  # type: ignore[arg-type]
        (
            lambda: networks.residual_conv_decoder(4, (1, 34), image_shape=SHAPE),
            r"residual_conv_decoder: out=\(1, 34\) asks for 34 dimensions, but .* 35 pixels",
        ),
        (
            lambda: networks.residual_conv_encoder(SHAPE, (2, 3), channels=(4, 4, 4)),
            r"image of shape \(7, 5\) cannot be halved 3 times",
        ),
    ],
    ids=["mlp", "encoder", "decoder", "hidden", "out", "pixels", "halved"],
)
def test_impossible_options_are_refused(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
