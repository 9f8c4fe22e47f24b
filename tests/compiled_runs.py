"""Training with and without compiling, to be compared."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from helpers import Made, double_bits
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.optim import SGD

import pyro_vae as pv
from pyro_vae.graph.capture import Captured


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def sgd(params: Any) -> torch.optim.Optimizer:
    return SGD(params, lr=1e-3, momentum=0.9)


def trained(
    make: Callable[[], Any],
    compile: Any,
    *,
    optimizer: Callable[..., Any] = lambda *_: sgd,  # few operations, so quickly captured
    loss: Callable[[], Any] = Trace_ELBO,
    script: Callable[[Any], Iterator[Any]] = lambda svi: iter(()),
    steps: int = 4,
    **options: Any,
) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
    """The terms of every step, each taken where the script yields, and all tensors at the end."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = make()
    svi = pv.SVI(model, guide, optimizer(model, guide), loss(), compile=compile, **options)
    svi.setup(*args)
    pyro.set_rng_seed(1)
    terms, around = [], script(svi)
    for _ in range(steps):
        next(around, None)
        terms.append(torch.stack([t.double() for t in svi.update(*args)]))
    next(around, None)
    state = svi.parameters.state_dict()
    parts = {**state["modules"], "params": state["params"], "buffers": state["buffers"]}
    return torch.stack(terms), {(k, name): t for k in parts for name, t in parts[k].items()}


def assert_alike(graphs: list[Captured], make: Callable[[], Any], **options: Any) -> None:
    losses, tensors = trained(make, True, **options)
    assert len(graphs) == 1
    expected, others = trained(make, False, **options)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0.0, equal_nan=True)
    torch.testing.assert_close(tensors, others, rtol=1e-9, atol=1e-9)
    assert len({loss.item() for loss in losses[:, 0]}) == len(losses)


def written_pair(encoder: nn.Module, decoder: nn.Module, size: int | None = None) -> Made:
    """Functions over data of their own, of which the plates draw some at each call."""
    data = double_bits(20)

    def model() -> None:
        pyro.module("a_decoder", decoder.double())
        with pyro.plate("data", 20, subsample_size=size) as i:
            z = pyro.sample("z", dist.Normal(data.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=data[i])

    def guide() -> None:
        pyro.module("an_encoder", encoder.double())
        scale = pyro.param("scale", torch.tensor(0.5).double(), constraint=constraints.positive)
        with pyro.plate("data", 20, subsample_size=size) as i:
            pyro.sample("z", dist.Normal(encoder(data[i]), scale).to_event(1))

    return model, guide, ()


def drawn_pair() -> Made:
    return written_pair(nn.Linear(9, 2), nn.Linear(2, 9), 7)


def normalized_pair() -> Made:
    """Batch normalization in both networks, and noise of torch's own in one."""
    # No bias before a normalization: its gradient is zero but for rounding, which Adam scales up.
    first, norm = nn.Linear(9, 8, bias=False), nn.BatchNorm1d(8)
    decoder = nn.Sequential(nn.Linear(2, 9, bias=False), nn.BatchNorm1d(9))
    return written_pair(nn.Sequential(first, norm, nn.Dropout(0.2), nn.Linear(8, 2)), decoder)
