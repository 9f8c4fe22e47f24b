"""The step leads where Pyro's leads, with any optimizer, loss and pair."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.infer
import pyro.optim
import pytest
import torch
from helpers import PAIRS, leaves, library_pair, masked_pair, module_pair, store_pair, tutorial_pair
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

import pyro_vae as pv

optim: Any = pyro.optim

LOSSES = (Trace_ELBO, TraceMeanField_ELBO)


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2)


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def trained(make: Callable[[], Any], build: Callable[[Any, Any], Any], steps: int = 4) -> Any:
    """The losses and the parameters of a fresh pair after a few steps under one seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = make()
    svi = build(model, guide)
    pyro.set_rng_seed(1)
    losses = torch.tensor([float(svi.step(*args)) for _ in range(steps)], dtype=torch.float64)
    return losses, {name: leaf.detach().clone() for name, leaf in leaves(model, guide).items()}


def assert_alike(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-10)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("factory", "theirs"), [(sgd, optim.SGD), (adam, optim.Adam)], ids=["sgd", "adam"]
)
@pytest.mark.parametrize("make", PAIRS)
def test_a_few_steps_lead_where_pyros_lead(make, factory, theirs, loss):
    assert_alike(
        trained(make, lambda m, g: pv.SVI(m, g, factory, loss=loss())),
        trained(make, lambda m, g: pyro.infer.SVI(m, g, theirs({"lr": 1e-2}), loss())),
    )


@pytest.mark.parametrize("make", [tutorial_pair, store_pair, module_pair, masked_pair])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: optim.Adam({"lr": 1e-2}),
        lambda: optim.ClippedAdam({"lr": 1e-2, "clip_norm": 0.5, "lrd": 0.9}),
        lambda: optim.Adam(lambda name: {"lr": 1e-2 if "coder" in name else 1e-3}),
        lambda: optim.SGD({"lr": 1e-1}, {"clip_norm": 0.3}),
        lambda: optim.ExponentialLR(
            {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-2}, "gamma": 0.5}
        ),
    ],
    ids=["adam", "clipped", "by name", "clip", "scheduled"],
)
def test_an_optimizer_of_pyros_takes_pyros_steps(make, optimizer):
    assert_alike(
        trained(make, lambda m, g: pv.SVI(m, g, optimizer())),
        trained(make, lambda m, g: pyro.infer.SVI(m, g, optimizer(), Trace_ELBO())),
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda: RenyiELBO(alpha=0.5, num_particles=3),  # type: ignore[arg-type]
        lambda: RenyiELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        lambda: TraceGraph_ELBO(),
        lambda: Trace_ELBO(num_particles=2),
        lambda: Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    ],
    ids=["renyi", "vectorized renyi", "graph", "particles", "vectorized particles"],
)
def test_other_losses_of_pyros_take_pyros_steps(loss):
    optimizer = optim.Adam({"lr": 1e-2})
    assert_alike(
        trained(library_pair, lambda m, g: pv.SVI(m, g, adam, loss=loss())),
        trained(library_pair, lambda m, g: pyro.infer.SVI(m, g, optimizer, loss())),
    )


def test_a_users_function_is_minimised():
    def twice(model: Any, guide: Any, *args: Any) -> Tensor:
        return 2 * Trace_ELBO().differentiable_loss(model, guide, *args)

    ours = trained(library_pair, lambda m, g: pv.SVI(m, g, sgd, loss=twice))
    plain = trained(library_pair, lambda m, g: pv.SVI(m, g, lambda p: torch.optim.SGD(p, lr=2e-2)))
    assert_alike((ours[0] / 2, ours[1]), plain)


def test_the_weight_of_the_kl_reaches_the_step_as_it_reaches_pyros():
    def weighted(svi: Any) -> Any:
        step = svi.step

        def inside(*args: Any) -> Any:
            with pv.kl_weight(0.3):
                return step(*args)

        svi.step = inside
        return svi

    optimizer = optim.SGD({"lr": 1e-2})
    assert_alike(
        trained(library_pair, lambda m, g: weighted(pv.SVI(m, g, sgd))),
        trained(library_pair, lambda m, g: weighted(pyro.infer.SVI(m, g, optimizer, Trace_ELBO()))),
    )


def test_an_instance_and_a_factory_take_the_same_steps():
    def with_instance(model: Any, guide: Any) -> pv.SVI:
        return pv.SVI(model, guide, adam([*model.parameters(), *guide.parameters()]))

    assert_alike(
        trained(library_pair, with_instance),
        trained(library_pair, lambda m, g: pv.SVI(m, g, adam)),
    )
