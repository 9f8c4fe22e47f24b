"""From the autoencoder to the VAE: what errors lack to be densities, PCA, copying, and the run."""

import math
import runpy
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_vae as pv

PATH = Path(__file__).parents[1] / "experiments" / "autoencoders.py"
SCRIPT = runpy.run_path(str(PATH))
ERRORS, DENSITIES, VARIANTS = (SCRIPT[name] for name in ("ERRORS", "DENSITIES", "VARIANTS"))


@pytest.mark.parametrize("name", list(ERRORS))
@pytest.mark.parametrize("output", [-2.0, 0.3, 1.5])
def test_a_density_integrates_to_one_and_its_error_to_what_the_constant_says(name, output):
    low, high = (0.0, 1.0) if name == "BCE" else (output - 40.0, output + 40.0)
    edges = torch.linspace(low, high, 400_001, dtype=torch.float64)
    x = (edges[1:] + edges[:-1]) / 2
    outputs = torch.full((len(x),), output, dtype=torch.float64)
    log_p = DENSITIES[name](outputs.view(-1, 1, 1)).log_prob(x.unsqueeze(-1))
    error = ERRORS[name](x, outputs)

    def integral(log_density: Tensor) -> float:
        return (log_density.exp().mean() * (high - low)).item()

    assert integral(log_p) == pytest.approx(1.0, rel=1e-6)
    constant = log_p + error  # the same for every x
    assert constant.std().item() < 1e-6
    assert -math.log(integral(-error)) == pytest.approx(constant.mean().item(), abs=1e-6)
    if name == "BCE":
        assert integral(-error) < 0.5
    else:
        assert integral(-error) == pytest.approx({"L2": math.tau**0.5, "L1": 2.0}[name], rel=1e-6)


@pytest.mark.parametrize("name", ["autoencoder", "over-complete"])
def test_without_layers_an_autoencoder_is_pca_and_a_wide_one_copies(name):
    """A linear one leaves the eigenvalues that its code has no room for (Baldi and Hornik 1989)."""
    factors = torch.randn(4, 4) * torch.tensor([2.0, 1.5, 0.5, 0.2])
    x = torch.randn(100, 4) @ factors.T
    x = x - x.mean(0)
    model, guide = VARIANTS[name].pair(len(x), 4, Namespace(latent_dim=2, hidden_dims=[]))
    params = [*model.parameters(), *guide.parameters()]
    lbfgs = torch.optim.LBFGS(
        params, max_iter=100, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = Trace_ELBO().differentiable_loss(model, guide, x)
        loss.backward()
        return loss

    lbfgs.step(closure)  # type: ignore[arg-type]
    left = (pv.reconstruct(model, guide, x) - x).square().sum(1).mean().item()
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / len(x))
    expected = eigenvalues[:2].sum().item() if name == "autoencoder" else 0.0
    assert left == pytest.approx(expected, rel=0.01, abs=0.01)


def test_an_autoencoder_has_nothing_to_draw_from():
    model, guide = VARIANTS["autoencoder"].pair(3, 4, Namespace(latent_dim=2, hidden_dims=[3]))
    assert pv.reconstruct(model, guide, torch.rand(3, 4)).shape == (3, 4)
    with pytest.raises(NotImplementedError, match="does not support sampling"):
        pv.generate(model, 3)


def test_the_penalty_of_the_sparse_one_is_its_prior():
    """Its loss is half the squared error plus the weighted code, up to a constant."""
    model, guide = VARIANTS["sparse"].pair(3, 4, Namespace(latent_dim=2, hidden_dims=[3]))
    x = torch.rand(5, 4)
    z = pv.encode(guide, x).mean
    error = ERRORS["L2"](x, pv.decode(model, {"z": z}).mean).sum(1)
    expected = (error + SCRIPT["SPARSITY"] * z.abs().sum(1)).detach()
    losses = [Trace_ELBO().loss(model, guide, row.unsqueeze(0)) for row in x]
    constant = torch.tensor(losses) - expected
    assert constant.std().item() < 1e-4
    per_code = math.log(2 / SCRIPT["SPARSITY"])
    assert constant.mean().item() == pytest.approx(2 * math.log(math.tau) + 8 * per_code, rel=1e-5)


def test_noise_is_shown_to_the_encoder_in_training_alone():
    for name in ("denoising, noise", "denoising, dropout"):
        _, guide = VARIANTS[name].pair(3, 4, Namespace(latent_dim=2, hidden_dims=[3]))
        x = torch.rand(5, 4)
        assert not torch.equal(guide(x), guide(x))
        assert torch.equal(pv.encode(guide, x).mean, pv.encode(guide, x).mean)


def test_inference_without_an_encoder_leaves_the_decoder_alone():
    variant = VARIANTS["mean field, L2 with its scale"]
    args = Namespace(latent_dim=2, hidden_dims=[3], steps=60, device="cpu")
    pair = variant.pair(3, 4, args)
    before = [p.clone() for p in pair[0].parameters()]
    x = torch.rand(5, 4)
    model, guide, *called = SCRIPT["inferred"](variant, pair, x, args)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert called[0] is x
    untrained = SCRIPT["table"](5, 2)
    gained, start = (
        pv.log_evidence(model, g, *called, num_particles=200).elbo.mean()
        for g in (guide, untrained)
    )
    assert gained > start + 0.1


def test_without_an_encoder_held_out_data_get_nearly_their_best_factorised_normal():
    """Of a linear decoder: the posterior's mean, and one over the diagonal of its precision.

    Steps that do not fall stay 0.13 nats above it.
    """
    torch.manual_seed(0)
    variant = SCRIPT["Variant"]("L2", amortized=False)
    args = Namespace(latent_dim=4, hidden_dims=[], steps=150, device="cpu")
    pair = variant.pair(3, 30, args)
    weight, bias = (p.detach().double() for p in pair[0].parameters())
    x = torch.randn(40, 4).double() @ weight.T + torch.randn(40, 30)
    _, guide, *called = SCRIPT["inferred"](variant, pair, x.float(), args)
    q = pv.encode(guide, *called)
    precision = torch.eye(4) + weight.T @ weight
    off = q.mean.double() - torch.linalg.solve(precision, (x - bias) @ weight, left=False)
    variance = q.variance.double()
    excess = (variance * precision.diagonal() - 1 - (variance * precision.diagonal()).log()).sum(1)
    excess = 0.5 * (excess + torch.einsum("ni,ij,nj->n", off, precision, off))
    assert excess.min().item() > 0
    assert excess.mean().item() < 0.08


def copying(name: str) -> tuple[Any, Any]:
    """A wide pair whose weights copy: x = relu(x) - relu(-x) at each layer."""
    model, guide = VARIANTS[name].pair(3, 4, Namespace(latent_dim=2, hidden_dims=[3]))
    both, plus = torch.cat([torch.eye(4), -torch.eye(4)]), torch.eye(8)
    params = {**dict(model.named_parameters()), **dict(guide.named_parameters())}
    found = [p for p in params.values() if p.dim() == 2]
    assert [tuple(p.shape) for p in found] == [(8, 8), (4, 8), (8, 4), (8, 8)]
    for p, value in zip(found, [plus, both.T, both, plus], strict=True):
        p.data.copy_(value)
    for p in params.values():
        if p.dim() == 1:
            p.data.zero_()
    return model, guide


@pytest.mark.parametrize("name", ["over-complete", "sparse", "denoising, noise"])
def test_no_layer_keeps_a_wide_one_from_copying(name):
    model, guide = copying(name)
    x = torch.randn(5, 4)
    torch.testing.assert_close(pv.reconstruct(model, guide, x), x)


@pytest.mark.parametrize(("name", "gained"), [("over-complete", True), ("sparse", False)])
def test_codes_that_shrink_gain_nothing_where_the_decoder_cannot_make_up_for_it(name, gained):
    model, guide = copying(name)
    x = torch.randn(5, 4)

    def objective() -> float:
        z = pv.encode(guide, x).mean
        error = ERRORS["L2"](x, pv.decode(model, {"z": z}).mean).sum(1)
        return (error + SCRIPT["SPARSITY"] * z.abs().sum(1)).sum().item()

    before = objective()
    *_, last = (p for p in guide.parameters() if p.dim() == 2)
    first = next(p for p in model.parameters() if p.dim() == 2)
    last.data.mul_(0.1)
    first.data.mul_(10.0)
    assert (objective() < before) is gained


def test_two_samples_of_one_distribution_cover_each_other_by_chance_alone():
    """No k nearest of 2 N - 1 points are real ones alone: 1 - prod (N - 1 - j) / (2 N - 1 - j)."""
    size, k = 60, 5
    found = [
        SCRIPT["generation"](torch.randn(size, 3), torch.randn(size, 3))["coverage"]
        for _ in range(100)
    ]
    missed = math.prod((size - 1 - j) / (2 * size - 1 - j) for j in range(k))
    error = torch.tensor(found).std().item() / len(found) ** 0.5
    assert torch.tensor(found).mean().item() == pytest.approx(1 - missed, abs=4 * error)
    assert error < 0.005


def test_precision_and_coverage_tell_quality_from_variety():
    real, generation = torch.randn(50, 3), SCRIPT["generation"]
    assert generation(real, real) == {"precision": 1.0, "coverage": 1.0}
    assert generation(real, real + 100) == {"precision": 0.0, "coverage": 0.0}
    one = generation(real, real[:1].expand(50, 3))
    assert one["precision"] == 1.0
    distances = torch.cdist(real, real)
    reached = [distances[i, 0] <= distances[i].sort().values[5] for i in range(50)]
    assert one["coverage"] == pytest.approx(sum(map(float, reached)) / 50)
    assert one["coverage"] < 0.5


def test_sparseness_is_hoyers():
    codes = torch.tensor([[0.0, 0.0, 5.0, 0.0], [2.0, -2.0, 2.0, 2.0]])
    assert SCRIPT["sparseness"](codes[:1]) == pytest.approx(1.0)
    assert SCRIPT["sparseness"](codes[1:]) == pytest.approx(0.0, abs=1e-6)
    assert SCRIPT["sparseness"](codes) == pytest.approx(0.5)
