"""Every network keeps one contract, and computes what its docstring says."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vae import networks


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    in_dim: int
    out: tuple[int, int]


def conv_pair(height: int, width: int, **options) -> list[Case]:
    image, size = (height, width), height * width
    return [
        Case(lambda: networks.conv_encoder(image, (2, 3), **options), size, (2, 3)),
        Case(
            lambda: networks.conv_decoder(4, (2, size), image_shape=image, **options), 4, (2, size)
        ),
    ]


SMALL: dict[str, Any] = {"channels": (3, 2)}
CASES = {
    "mlp": Case(lambda: networks.mlp(6, (2, 3), hidden_dims=(5,)), 6, (2, 3)),
    "mlp, affine": Case(lambda: networks.mlp(6, (1, 4), hidden_dims=()), 6, (1, 4)),
    "mlp, deep": Case(
        lambda: networks.mlp(6, (3, 1), hidden_dims=[5, 4, 3], activation=nn.Tanh), 6, (3, 1)
    ),
    "gated_mlp": Case(lambda: networks.gated_mlp(6, (2, 3), hidden_dims=(5, 4)), 6, (2, 3)),
    "gated_mlp, affine": Case(lambda: networks.gated_mlp(6, (1, 2), hidden_dims=()), 6, (1, 2)),
    "conv_encoder, square": conv_pair(28, 28, **SMALL)[0],
    "conv_decoder, square": conv_pair(28, 28, **SMALL)[1],
    "conv_encoder, not square": conv_pair(28, 20, **SMALL)[0],
    "conv_decoder, not square": conv_pair(28, 20, **SMALL)[1],
    "conv_encoder, odd": conv_pair(7, 5, **SMALL)[0],
    "conv_decoder, odd": conv_pair(7, 5, **SMALL)[1],
    "conv_encoder, not divisible by 4": conv_pair(10, 6, **SMALL)[0],
    "conv_decoder, not divisible by 4": conv_pair(10, 6, **SMALL)[1],
    "conv_encoder, three layers": conv_pair(9, 15, channels=(2, 3, 2), activation=nn.SiLU)[0],
    "conv_decoder, three layers": conv_pair(9, 15, channels=(2, 3, 2), activation=nn.SiLU)[1],
    "residual_mlp": Case(
        lambda: networks.residual_mlp(6, (2, 3), hidden_dim=5, depth=3), 6, (2, 3)
    ),
    "residual_conv_encoder": Case(
        lambda: networks.residual_conv_encoder((7, 5), (2, 3), depth=2, **SMALL), 35, (2, 3)
    ),
    "residual_conv_decoder": Case(
        lambda: networks.residual_conv_decoder(4, (2, 35), image_shape=(7, 5), **SMALL), 4, (2, 35)
    ),
    "first": Case(lambda: networks.first(networks.mlp(6, (2, 3), hidden_dims=(5,))), 6, (2, 3)),
    "rescaled": Case(
        lambda: networks.rescaled(networks.mlp(6, (2, 3), hidden_dims=(5,)), loc=1.0, scale=3.0),
        6,
        (2, 3),
    ),
}
every_network = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_network
@pytest.mark.parametrize("batch", [(), (7,), (3, 7), (2, 3, 7), (0,), (2, 0)], ids=str)
def test_any_number_of_batch_dimensions_is_kept(case, batch):
    params = case.make()(torch.randn(*batch, case.in_dim))
    assert params.shape == (*batch, *case.out)
    assert params.dtype == torch.float32


@every_network
def test_a_batch_gives_what_its_rows_give(case):
    network = case.make().double()
    x = torch.randn(2, 3, 4, case.in_dim, dtype=torch.float64)
    params = network(x)
    for index in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])).tolist():
        row = network(x[tuple(index)])
        torch.testing.assert_close(params[tuple(index)], row, rtol=1e-11, atol=1e-13)


@every_network
def test_memory_layout_of_the_input_makes_no_difference(case):
    network = case.make().double()
    x = torch.randn(case.in_dim, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(network(x.permute(2, 1, 0)), network(x.permute(2, 1, 0).clone()))


@every_network
def test_gradients_reach_every_parameter_and_the_input(case):
    network = case.make()
    x = torch.randn(16, case.in_dim, requires_grad=True)
    # Unequal weights, so that no gradient is zero by symmetry.
    params = network(x)
    (params * torch.randn_like(params)).sum().backward()
    named = dict(network.named_parameters())
    assert named
    for name, tensor in [*named.items(), ("input", x)]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().max() > 0, name


@every_network
def test_a_state_dict_carries_the_whole_network(case):
    one, other = case.make(), case.make()
    x = torch.randn(5, case.in_dim)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


@every_network
def test_a_wrong_number_of_features_is_refused(case):
    wrong = case.in_dim + 1
    expected = (
        rf"expected input of shape \(\*batch, {case.in_dim}\), got \(7, {wrong}\); "
        rf"build it with {wrong} input dimensions or check the data"
    )
    with pytest.raises(ValueError, match=expected):
        case.make()(torch.zeros(7, wrong))


RESIDUAL = ["residual_mlp", "residual_conv_encoder", "residual_conv_decoder"]


@pytest.mark.parametrize("name", ["mlp", "gated_mlp", "conv_encoder", "conv_decoder", *RESIDUAL])
def test_the_refusal_names_the_network(name):
    case = next(case for key, case in CASES.items() if key.startswith(name))
    with pytest.raises(ValueError, match=rf"^networks\.{name}:"):
        case.make()(torch.zeros(case.in_dim - 1))


def weights_of(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    tensors = list(network.parameters())
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def test_mlp_is_its_formula():
    network = networks.mlp(6, (2, 3), hidden_dims=(5,)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    (w1, b1), (w2, b2) = weights_of(network)
    by_hand = torch.log1p((x @ w1.T + b1).exp()) @ w2.T + b2
    # Parameter p of dimension d is output p * D + d.
    torch.testing.assert_close(network(x), torch.stack([by_hand[:, :3], by_hand[:, 3:]], dim=1))


def test_mlp_without_hidden_layers_is_affine():
    network = networks.mlp(6, (1, 4), hidden_dims=()).double()
    x, y = torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(network(0.3 * x + 0.7 * y), 0.3 * network(x) + 0.7 * network(y))


def test_gated_mlp_is_its_formula():
    network = networks.gated_mlp(6, (1, 3), hidden_dims=(5,)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    (w1, b1), (w2, b2) = weights_of(network)
    linear, gate = x @ w1[:5].T + b1[:5], x @ w1[5:].T + b1[5:]
    by_hand = (linear / (1 + (-gate).exp())) @ w2.T + b2
    torch.testing.assert_close(network(x)[:, 0], by_hand)


@pytest.mark.parametrize("shape", [(28, 28), (28, 20), (7, 5)], ids=str)
def test_conv_encoder_is_its_convolutions(shape):
    network = networks.conv_encoder(shape, (2, 3), channels=(4, 5)).double()
    x = torch.randn(7, prod(shape), dtype=torch.float64)
    (w1, b1), (w2, b2), (w3, b3) = weights_of(network)
    h = F.conv2d(x.view(7, 1, *shape), w1, b1, stride=2, padding=1).relu()
    h = F.conv2d(h, w2, b2, stride=2, padding=1).relu()
    assert h.shape == (7, 5, shape[0] // 4, shape[1] // 4)
    torch.testing.assert_close(network(x), (h.flatten(1) @ w3.T + b3).view(7, 2, 3))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((28, 28), [(7, 7), (14, 14)]),
        ((28, 20), [(7, 5), (14, 10)]),
        ((7, 5), [(1, 1), (3, 2)]),
        ((10, 6), [(2, 1), (5, 3)]),
    ],
    ids=str,
)
def test_conv_decoder_is_its_transposed_convolutions(shape, sizes):
    network = networks.conv_decoder(4, (2, prod(shape)), image_shape=shape, channels=(5, 3))
    network = network.double()
    z = torch.randn(7, 4, dtype=torch.float64)
    (w1, b1), (w2, b2), (w3, b3) = weights_of(network)
    h = (z @ w1.T + b1).view(7, 5, *sizes[0]).relu()
    for weight, bias, size in ((w2, b2, sizes[1]), (w3, b3, shape)):
        grown = F.conv_transpose2d(h, weight, bias, stride=2, padding=1, output_padding=1)
        # One row or column of output padding more than needed changes nothing but the border.
        h = grown[..., : size[0], : size[1]]
        if weight is w2:
            h = h.relu()
    torch.testing.assert_close(network(z), h.flatten(2))


def test_several_inputs_are_broadcast_and_joined():
    network = networks.mlp(6, (2, 3), hidden_dims=(5,))
    z, y, c = torch.randn(4, 7, 2), torch.randn(7, 3), torch.randn(1)
    joined = torch.cat([z, y.expand(4, 7, 3), c.expand(4, 7, 1)], dim=-1)
    assert torch.equal(network(z, y, c), network(joined))


@pytest.mark.parametrize("make", [networks.mlp, networks.gated_mlp], ids=lambda f: f.__name__)
def test_several_inputs_all_get_gradients(make):
    inputs = [torch.randn(4, 7, 2, requires_grad=True), torch.randn(7, 3, requires_grad=True)]
    make(5, (1, 2), hidden_dims=(4,))(*inputs).square().sum().backward()
    for x in inputs:
        assert x.grad is not None
        assert x.grad.abs().min() > 0


def test_several_inputs_of_a_wrong_total_are_refused():
    with pytest.raises(ValueError, match=r"expected input of shape \(\*batch, 5\), got \(7, 6\)"):
        networks.mlp(5, (1, 2))(torch.zeros(7, 2), torch.zeros(7, 4))


def test_rescaled_shows_its_network_the_first_input_rescaled():
    inner = networks.mlp(5, (1, 2), hidden_dims=(4,))
    network = networks.rescaled(inner, loc=2.0, scale=16.0)
    x, y = 16 * torch.rand(7, 2), torch.randn(7, 3)
    assert torch.equal(network(x, y), inner((x - 2.0) / 16.0, y))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: networks.conv_decoder(4, (1, 783), image_shape=(28, 28)),
            r"networks\.conv_decoder: out=\(1, 783\) asks for 783 dimensions, but "
            r"image_shape=\(28, 28\) has 784 pixels; make them agree",
        ),
        (
            lambda: networks.conv_encoder((7, 5), (2, 3), channels=(4, 4, 4)),
            r"image of shape \(7, 5\) cannot be halved 3 times; give fewer channels",
        ),
        (
            lambda: networks.conv_decoder(4, (1, 35), image_shape=(7, 5), channels=(4, 4, 4)),
            r"image of shape \(7, 5\) cannot be halved 3 times; give fewer channels",
        ),
        (
            lambda: networks.conv_encoder((7, 5), (2, 3), channels=()),
            r"channels is empty; give at least one",
        ),
        (
            lambda: networks.conv_decoder(4, (1, 35), image_shape=(7, 5), channels=()),
            r"channels is empty; give at least one",
        ),
    ],
    ids=["pixels", "encoder halved", "decoder halved", "encoder empty", "decoder empty"],
)
def test_impossible_options_are_refused(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
