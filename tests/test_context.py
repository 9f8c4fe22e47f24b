"""What is borrowed from torch's global state is given back."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_vae.context import at_rest, device_of, forked, modules_of, on_device, seeded


def draw(*seed: int) -> torch.Tensor:
    with seeded(*seed):
        return torch.randn(1000, dtype=torch.float64)


def test_a_seed_reproduces_its_stream():
    first = draw(3)
    torch.randn(17)
    assert torch.equal(draw(3), first)


def test_different_seeds_give_independent_streams():
    seeds = [(0,), (1,), (2,), (0, 1), (1, 1), (0, 2), (2, 1), (0, 1, 2), (10**12,)]
    streams = torch.stack([draw(*seed) for seed in seeds])
    correlations = torch.corrcoef(streams) - torch.eye(len(seeds))
    # 36 correlations of standard error 1 / sqrt(1000): none is as large as four of those.
    assert correlations.abs().max() < 4 / 1000**0.5


@pytest.mark.parametrize(("one", "other"), [((1,), (1, 0)), ((0, 1), (2**32,))], ids=str)
def test_seeds_that_differ_by_zeros_give_different_streams(one, other):
    assert not torch.equal(draw(*one), draw(*other))


def test_the_stream_is_that_of_no_plain_seed():
    torch.manual_seed(3)
    assert not torch.equal(draw(3), torch.randn(1000, dtype=torch.float64))


def test_the_callers_streams_go_on_as_if_nothing_had_been():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    expected = torch.randn(4), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    draw(3)
    with seeded(1):
        torch.randn(3)
        with seeded(2):
            torch.randn(3)
    with pytest.raises(RuntimeError, match="must match"), seeded(1):
        torch.randn(3).add_(torch.randn(4))
    assert torch.equal(torch.randn(4), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]  # noqa: NPY002


def test_an_inner_stream_does_not_disturb_the_outer_one():
    with seeded(1):
        undisturbed = torch.randn(6)
    with seeded(1):
        first = torch.randn(3)
        draw(2)
        assert torch.equal(torch.cat([first, torch.randn(3)]), undisturbed)


def test_a_fork_draws_on_from_the_callers_stream_and_puts_it_back():
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    with forked():
        assert torch.equal(torch.randn(4), expected)
        with forked(device=torch.device("cpu")):
            torch.randn(3)
    with pytest.raises(RuntimeError, match="must match"), forked():
        torch.randn(3).add_(torch.randn(4))
    assert torch.equal(torch.randn(4), expected)


def test_gpus_that_are_not_borrowed_are_not_seeded(monkeypatch):
    # Without a GPU, seeding one is queued until it is first used: the queue is what to look at.
    seeded_gpus = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_gpus.append)
    torch.manual_seed(7)
    assert seeded_gpus == [7]
    with seeded(1, device=torch.device("cpu")):
        torch.randn(3)
    with seeded(1):
        torch.randn(3)
    assert seeded_gpus == [7]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", [None, "cpu", "cuda", "cuda:0"])
def test_the_stream_of_a_gpu_goes_on_as_if_nothing_had_been(device):
    device = None if device is None else torch.device(device)
    torch.cuda.manual_seed(5)
    expected = torch.randn(4, device="cuda")
    torch.cuda.manual_seed(5)
    draws = []
    for _ in range(2):
        with seeded(3, device=device):
            if device is None or device.type == "cuda":
                draws.append(torch.randn(3, device="cuda"))
    assert torch.equal(torch.randn(4, device="cuda"), expected)
    assert not draws or torch.equal(*draws)


def a_network() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    network[1].eval()  # as one who fine-tunes does
    return network


def flags(*modules: nn.Module) -> list[bool]:
    return [m.training for module in modules for m in module.modules()]


def test_at_rest_every_module_evaluates_without_gradients():
    one, other = a_network(), a_network()
    x = torch.randn(5, 2)
    with at_rest(one, other, lambda: None):
        assert not any(flags(one, other))
        assert not torch.is_grad_enabled()
        assert not one(x).requires_grad
        assert torch.equal(one(x), one(x))


def test_at_rest_mixed_flags_and_gradients_come_back():
    one, other = a_network(), a_network().eval()
    before = flags(one, other)
    assert len(set(before)) == 2
    # A module that both programs hold is put to rest once.
    other.append(one[0])
    before = flags(one, other)
    with at_rest(one, other):
        pass
    assert flags(one, other) == before
    assert torch.is_grad_enabled()
    with torch.no_grad():
        with at_rest(one):
            pass
        assert not torch.is_grad_enabled()


def test_at_rest_flags_come_back_after_an_exception():
    network = a_network()
    before = flags(network)
    with pytest.raises(RuntimeError, match="cannot be multiplied"), at_rest(network):
        network(torch.randn(5, 3))
    assert flags(network) == before
    assert torch.is_grad_enabled()


def test_at_rest_running_statistics_stay():
    network = a_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with at_rest(network):
        network(torch.randn(5, 2))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_device_is_that_of_the_first_tensor_of_the_modules():
    buffered = nn.Module()
    buffered.register_buffer("loc", torch.zeros(3, device="meta"))
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)) == torch.device("meta")
    assert device_of(lambda: None, nn.ReLU(), buffered) == torch.device("meta")
    assert device_of(lambda: None, nn.ReLU()) is None


def test_tensors_among_arguments_are_moved_and_the_rest_is_left():
    x, label = torch.zeros(3), object()
    moved, same = on_device([x, label], torch.device("meta"))
    assert moved.device.type == "meta"
    assert same is label
    assert on_device([x, label], None) == (x, label)
    assert on_device((x,), torch.device("cpu"))[0] is x


def test_networks_of_functions_are_at_rest_too():
    """Dropout in a network that a function registers must not be active in an evaluation."""
    network = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2))

    def program(x: torch.Tensor) -> torch.Tensor:
        return network(x)

    class Owner:
        def __init__(self) -> None:
            self.network = network

        def program(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)

    for found in (program, Owner().program, partial(program), poutine.trace(program)):
        assert network in modules_of(found).values()
        with at_rest(found):
            assert not network[0].training
        assert network[0].training
    assert modules_of(network) == {"": network}
    assert modules_of(print) == {}
