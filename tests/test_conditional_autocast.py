"""Networks that multiply in bfloat16 while they are trained: float32 is all that is seen of it."""

from typing import Any

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv


def conditionals(autocast: torch.dtype | None) -> list[pv.Conditional]:
    torch.manual_seed(0)
    networks = pv.networks.gated_mlp(64, (2, 5)), pv.networks.gated_mlp(5, (1, 64))
    families = pv.families.normal, pv.families.bernoulli
    return [
        pv.Conditional(network, family, autocast=autocast)
        for network, family in zip(networks, families, strict=True)
    ]


def pair_of(autocast: torch.dtype | None, *, vampprior: bool = False) -> tuple[Any, Any]:
    encoder, likelihood = conditionals(autocast)
    prior: Any = pv.priors.StandardNormal(5)
    if vampprior:
        prior = pv.priors.VampPrior(encoder, torch.rand(10, 64), low=0.0, high=1.0)
    return pv.Model(prior, likelihood), pv.Guide(encoder)


def bits() -> pv.Split:
    return pv.load_data("digits").binarize()


def test_training_rounds_the_products_and_nothing_else():
    (full, _), (half, _) = conditionals(None), conditionals(torch.bfloat16)
    x = torch.randn(3, 7, 64)
    by_hand = full.network(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = full.network(x)
    assert rounded.dtype == torch.bfloat16
    q = half(x)
    assert q.base_dist.loc.dtype == q.rsample().dtype == torch.float32
    assert torch.equal(q.base_dist.loc, rounded.float()[..., 0, :])
    assert not torch.equal(q.base_dist.loc, by_hand[..., 0, :])
    torch.testing.assert_close(q.base_dist.loc, by_hand[..., 0, :], rtol=0.05, atol=0.05)


def test_at_rest_and_in_evidence_there_is_no_difference():
    x = bits().test[:20]
    found, expected = (
        pv.log_weights(*pair_of(autocast), x, num_particles=10)
        for autocast in (torch.bfloat16, None)
    )
    assert torch.equal(found, expected)
    full, half = (conditionals(autocast)[0].eval() for autocast in (None, torch.bfloat16))
    assert torch.equal(full(x).base_dist.loc, half(x).base_dist.loc)


def test_double_networks_stay_double():
    full, half = (conditionals(autocast)[0].double() for autocast in (None, torch.bfloat16))
    x = torch.randn(7, 64, dtype=torch.float64)
    assert torch.equal(full(x).base_dist.loc, half(x).base_dist.loc)


def losses(*, vampprior: bool, compile: bool) -> Tensor:
    model, guide = pair_of(torch.bfloat16, vampprior=vampprior)
    torch.manual_seed(0)
    svi = pv.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=1e-3), compile=compile)
    return torch.stack([svi.step(x) for x in bits().train[:500].split(100)])


@pytest.mark.parametrize("vampprior", [False, True])
def test_the_graph_of_a_step_holds_the_same_precisions(vampprior, interpreted):
    expected, found = (losses(vampprior=vampprior, compile=compile) for compile in (False, True))
    assert expected.dtype == torch.float32
    (graph,) = interpreted
    # A mixture of normals multiplies in float64.
    dtypes = {torch.bfloat16, torch.float64} if vampprior else {torch.bfloat16}
    products = [n for n in graph.module.graph.nodes if "mm" in str(n.target)]
    assert {n.meta["val"].dtype for n in products} == dtypes
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


def test_compiled_steps_are_the_uncompiled_ones():
    expected, found = (losses(vampprior=False, compile=compile) for compile in (False, True))
    # A compiled network doesn't round between products.
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=0.0)


def test_training_comes_as_far_as_in_full_precision():
    bounds = []
    for autocast in (None, torch.bfloat16):
        model, guide = pair_of(autocast)
        history = pv.fit(model, guide, bits(), epochs=10, progress=False, pictures=False)
        bounds.append(history["valid_elbo"])
        assert all(p.dtype == torch.float32 for p in guide.parameters())
    assert bounds[0][-1] > bounds[0][0] + 5
    assert bounds[1] != bounds[0]
    assert bounds[1][-1] == pytest.approx(bounds[0][-1], abs=0.3)


def test_gradients_are_those_of_full_precision_but_for_rounding():
    x = bits().train[:500]
    found = []
    for autocast in (None, torch.bfloat16):
        model, guide = pair_of(autocast)
        torch.manual_seed(1)
        loss: Tensor = Trace_ELBO().differentiable_loss(model, guide, x)
        params = [*model.parameters(), *guide.parameters()]
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
    assert torch.cosine_similarity(*found, dim=0) > 0.999


def test_a_pair_is_saved_and_loaded_with_it(tmp_path):
    model, guide = pair_of(torch.bfloat16)
    data = bits()
    pv.fit(model, guide, data, epochs=1, out=tmp_path / "run", progress=False, pictures=False)
    run = pv.load(tmp_path / "run")
    assert run.guide.encoder.autocast is torch.bfloat16
    # The keys are those of a pair without.
    plain = pair_of(None)
    plain[0].load_state_dict(model.state_dict())
    assert run.model.state_dict().keys() == plain[0].state_dict().keys()


@pytest.mark.parametrize("autocast", [torch.float16, torch.float64, "bfloat16"])
def test_other_precisions_are_refused(autocast):
    with pytest.raises(ValueError, match=r"expected autocast to be torch\.bfloat16 or None, got"):
        pv.Conditional(nn.Linear(4, 4), pv.families.normal, autocast=autocast)
    if autocast is torch.float16:
        with pytest.raises(ValueError, match="vanish unless they are scaled"):
            pv.Conditional(nn.Linear(4, 4), pv.families.normal, autocast=autocast)
