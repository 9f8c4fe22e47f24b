"""Noise that turns levels into bits or real values: fixed by a seed, or fresh.

What a seed fixes comes from NumPy's generators, of which each part has one of its own: its noise
does not depend on the sizes of the others. Fresh noise comes from torch's global random state.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["fixed_bernoulli", "fixed_in_cell", "fresh_in_cell"]


def fixed_bernoulli(probs: Tensor, seed: int, part: int) -> Tensor:
    """One draw of x ~ Bernoulli(probs).

    >>> fixed_bernoulli(torch.tensor([0.0, 1.0]), seed=0, part=0)
    tensor([0., 1.])
    """
    return (_uniform(probs, seed, part) < probs).float()


def fixed_in_cell(corner: Tensor, num_levels: int, seed: int, part: int) -> Tensor:
    """One draw from the cells [corner, corner + 1 / L)."""
    return _in_cell(corner, _uniform(corner, seed, part), num_levels)


def fresh_in_cell(corner: Tensor, num_levels: int) -> Tensor:
    """A fresh draw from the cells [corner, corner + 1 / L), on any device."""
    return _in_cell(corner, torch.rand_like(corner), num_levels)


def _uniform(like: Tensor, seed: int, part: int) -> Tensor:
    generator = np.random.default_rng([seed, part])
    return torch.from_numpy(generator.random(tuple(like.shape), dtype=np.float32))


def _in_cell(corner: Tensor, noise: Tensor, num_levels: int) -> Tensor:
    # float32 rounds some sums up to the next level's cell; the largest value below stays inside.
    upper = corner + 1 / num_levels
    return torch.minimum(corner + noise / num_levels, torch.nextafter(upper, corner))
