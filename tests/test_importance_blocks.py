"""Blocks and chunks: they change no weight, bound the memory and cut the data alone."""

from typing import Any

import pytest
import torch
from helpers import LinearGaussian, bernoulli_pair, bits, library_pair, masked_pair
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from weights import WEIGHABLE, assert_exact, weights_of

import pyro_vae as pv


@pytest.mark.parametrize("chunk_size", [1, 7, 50])
@pytest.mark.parametrize("make", WEIGHABLE)
def test_chunks_change_nothing(make, chunk_size):
    options: Any = {"data_plate": "data"} if make is masked_pair else {}
    whole = weights_of(make, **options)
    chunked = weights_of(make, chunk_size=chunk_size, **options)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)


def test_a_chunk_larger_than_a_block_is_a_block():
    assert torch.equal(weights_of(library_pair, chunk_size=1_000), weights_of(library_pair))


def test_more_particles_extend_fewer():
    """Whole blocks of 100 agree bit for bit."""
    few, many = (weights_of(library_pair, k) for k in (100, 230))
    assert torch.equal(many[:100], few)
    assert not torch.equal(many[:100], many[100:200])


def test_more_data_extend_fewer():
    """Whole blocks of 100 data agree, wherever the data end."""
    model, guide = bernoulli_pair()
    x = bits(330)
    longer, shorter = (
        pv.log_weights(model, guide, part, num_particles=20) for part in (x, x[:200])
    )
    torch.testing.assert_close(longer[:, :200], shorter, rtol=0, atol=1e-5)


def test_seeds_are_independent_and_reproducible():
    a, b, c = (weights_of(library_pair, seed=seed) for seed in (0, 1, 0))
    assert torch.equal(a, c)
    assert (a != b).all()
    noise = torch.stack([(w - w.mean(0)).flatten() for w in (a, b)])
    assert abs(torch.corrcoef(noise)[0, 1]) < 4 / a.numel() ** 0.5


def test_progress_adds_up_to_all_particles_of_all_data():
    done: list[int] = []
    pv.log_evidence(*bernoulli_pair(), bits(130), num_particles=120, progress=done.append)
    assert sum(done) == 130 * 120
    assert len(done) == 2 * 2


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_memory_does_not_grow_with_particles_or_data():
    model, guide = bernoulli_pair()
    for num_particles, num_data in ((100, 100), (2_000, 100), (100, 1_000)):
        x = bits(num_data)
        with LargestTensor() as seen:
            pv.log_evidence(model, guide, x, num_particles=num_particles)
        assert seen.numel == 100 * 100 * 9


def test_smaller_chunks_need_less_memory():
    model, guide = bernoulli_pair(latent_dim=1)
    x = bits(100)
    with LargestTensor() as seen:
        pv.log_evidence(model, guide, x, num_particles=80, chunk_size=10)
    assert seen.numel == 10 * 100 * 9


def test_tensors_of_the_datas_length_are_cut_and_everything_else_is_handed_over_whole():
    pair = LinearGaussian.random()
    x = pair.sample(130)
    shift = torch.arange(130, dtype=torch.float64).unsqueeze(-1)
    table = torch.ones(3, dtype=torch.float64)
    sizes: list[tuple[int, ...]] = []

    def model(x: Tensor, shift: Tensor, table: Tensor, name: str, factor: float) -> None:
        sizes.append((len(x), len(shift), len(table)))
        assert name == "kept"
        pair.model(x - factor * shift * table.sum() / 3)

    def guide(x: Tensor, shift: Tensor, table: Tensor, name: str, factor: float) -> None:
        pair.guide(x - factor * shift * table.sum() / 3)

    args = (x + 2 * shift, shift, table, "kept", 2.0)
    log_w = pv.log_weights(model, guide, *args, num_particles=3)
    assert_exact(log_w, pair.log_evidence(x), atol=1e-9)
    assert set(sizes) == {(100, 100, 3), (30, 30, 3)}
