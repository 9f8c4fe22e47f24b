"""Full variational Bayes over a decoder's weights, against point estimates, on few data.

Appendix F of Kingma and Welling, "Auto-encoding variational Bayes" (2014): p(theta) is a normal
over the weights of the decoder, q(theta) another (Pyro's AutoNormal), and held-out data are judged
by their posterior predictive density. The digits of scikit-learn as bits; the number of training
data varies, that of gradient steps does not.

    python experiments/full_bayes.py --out runs/full_bayes
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

import pyro_vae as pv

BATCH = 25


class FullModel(pv.Model):
    """p(theta) p(z) p(x|z, theta): every weight of the likelihood is a latent, N(0, 1 / fan-in).

    The scale makes the sum over the minibatches of an epoch the bound of the whole set: theta
    counts once in all.
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, num_data: int) -> None:
        to_pyro_module_(likelihood)
        super().__init__(prior, likelihood)
        self.num_data = num_data
        self.sites = [
            (module, name, parameter.shape)
            for module in likelihood.modules()
            for name, parameter in list(module.named_parameters(recurse=False))
        ]
        for module, name, shape in self.sites:
            scale = torch.full(shape, shape[-1] ** -0.5 if name == "weight" else 1.0)
            module.register_buffer(f"{name}_scale", scale)  # goes where the module goes
            setattr(module, name, PyroSample(normal_prior(f"{name}_scale")))

    def forward(self, x: Tensor | int, *context: Tensor) -> Tensor:
        """Score data, or draw them; the weights are drawn here, once for all data."""
        size = x if isinstance(x, int) else len(x)
        with poutine.scale(scale=size / self.num_data):
            for module, name, _ in self.sites:
                getattr(module, name)
        return super().forward(x, *context)


class FullGuide(pv.Guide):
    """q(theta) q(z|x): a guide for the weights beside an encoder."""

    def __init__(self, encoder: nn.Module, weights: nn.Module, num_data: int) -> None:
        super().__init__(encoder)
        self.weights = weights
        self.num_data = num_data

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Draw the weights, once for all data, and the latents."""
        with poutine.scale(scale=len(x) / self.num_data):
            self.weights(x, *context)
        return super().forward(x, *context)


def normal_prior(scale: str) -> Callable[[Any], Any]:
    """p(theta) of one tensor of weights, given the name of the buffer with its scale."""
    return lambda module: dist.Normal(0.0, getattr(module, scale)).to_event()


def pieces(latent_dim: int, hidden: int) -> tuple[pv.Conditional, nn.Module, pv.Conditional]:
    """Encoder, prior and likelihood, the same for all ways."""
    encoder = pv.Conditional(
        pv.networks.mlp(64, (2, latent_dim), hidden_dims=(hidden,)), pv.families.normal
    )
    likelihood = pv.Conditional(
        pv.networks.mlp(latent_dim, (1, 64), hidden_dims=(hidden,)), pv.families.bernoulli
    )
    return encoder, pv.priors.StandardNormal(latent_dim), likelihood


def point_pair(latent_dim: int, hidden: int) -> tuple[pv.Model, pv.Guide]:
    """The pair with weights that are parameters."""
    encoder, prior, likelihood = pieces(latent_dim, hidden)
    return pv.Model(prior, likelihood), pv.Guide(encoder)


def full_pair(latent_dim: int, hidden: int, num_data: int) -> tuple[FullModel, FullGuide]:
    """The pair with weights that are latents."""
    encoder, prior, likelihood = pieces(latent_dim, hidden)
    model = FullModel(prior, likelihood, num_data)
    of_weights = poutine.block(model, hide=["z", "x"])
    weights = AutoNormal(of_weights, init_loc_fn=init_to_sample, init_scale=0.02)
    return model, FullGuide(encoder, weights, num_data)


def main() -> None:
    """Train every way on every number of data, judge all on the same test data, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/full_bayes"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 50, 100, 400])
    parser.add_argument("--steps", type=int, default=3000, help="gradient steps of each training")
    parser.add_argument("--latent-dim", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--num-global", type=int, default=50, help="draws of the weights")
    parser.add_argument("--num-particles", type=int, default=100, help="per draw of the weights")
    parser.add_argument("--num-joint", type=int, default=50, help="weights of the whole set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="seconds: few steps and particles")
    args = parser.parse_args()
    if args.smoke:
        args.sizes, args.steps = [25, 50], 4
        args.num_global, args.num_particles, args.num_joint = 3, 5, 3

    pyro.settings.set(module_local_params=True)  # each pair keeps its own parameters
    data = pv.load_data("digits").binarize()
    rows = [judged(data, size, args) for size in args.sizes]
    args.out.mkdir(parents=True, exist_ok=True)
    results = {
        "title": "Full variational Bayes over the decoder's weights",
        "protocol": {
            "data": data.summary(),
            "model": f"N(0, I) prior in {args.latent_dim} dimensions, one layer of {args.hidden} "
            "softplus units on each side, Bernoulli likelihood, diagonal normal guide",
            "full": "weights N(0, 1 / fan-in), biases N(0, 1), diagonal normal q(theta)",
            "training": f"{args.steps} steps of Adam, batch {BATCH}, learning rate 2e-3 with "
            "cosine schedule, ELBO by Monte Carlo, one particle; 'stopped' is the point estimate "
            "at its best bound of the 250 validation data, the others see training data alone",
            "evaluation": f"{args.num_global} draws of the weights with {args.num_particles} "
            "particles each; point estimates with as many particles in all",
        },
        "num_test": len(data.test),
        "num_global": args.num_global,
        "num_particles": args.num_particles,
        "seed": args.seed,
        "rows": rows,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(rows, args.out / "full_bayes.png")
    print(table(rows))
    print(f"figures: {args.out / 'results.json'}; picture: {args.out / 'full_bayes.png'}")


def judged(data: pv.Split, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: all ways on so many training data, nats per datum."""
    x = data.train[:size]
    started = time.perf_counter()
    estimates: dict[str, pv.Estimate] = {}
    for way, valid in (("point", None), ("stopped", data.valid)):
        torch.manual_seed(args.seed)
        model, guide = point_pair(args.latent_dim, args.hidden)
        train(model, guide, x, args, valid=valid)
        count = args.num_global * args.num_particles
        estimates[way] = pv.log_evidence(model, guide, data.test, num_particles=count)
    torch.manual_seed(args.seed)
    model, guide = full_pair(args.latent_dim, args.hidden, size)
    history = train(model, guide, x, args)
    estimates["full"] = pv.log_predictive(
        model,
        guide,
        data.test,
        num_global=args.num_global,
        num_particles=args.num_particles,
    )
    joint = pv.joint_log_weights(model, guide, x, num_particles=args.num_joint)
    count = len(joint)
    row: dict[str, Any] = {
        "num_train": size,
        "bound": joint.mean().item() / size,
        "bound_error": joint.std().item() / count**0.5 / size,
        "tighter_bound": (joint.logsumexp(0).item() - math.log(count)) / size,
        "logged_elbo": sum(history["elbo"][-20:]) / len(history["elbo"][-20:]),
    }
    for way, estimate in estimates.items():
        row[way] = {
            "log_density": estimate.mean,
            "mean_standard_error": estimate.mean_standard_error,
            "sampling_error": estimate.sampling_error,
            "bias": estimate.bias,
        }
    for way in ("point", "stopped"):
        difference = pv.compare(estimates["full"], estimates[way])
        print(f"{size} data, full against {way}: {difference}")
        row[way]["full_minus_this"] = difference.mean
        row[way]["standard_error"] = difference.mean_standard_error
    row["seconds"] = time.perf_counter() - started
    return row


def train(
    model: pv.Model,
    guide: pv.Guide,
    x: Tensor,
    args: argparse.Namespace,
    valid: Tensor | None = None,
) -> pv.History:
    """Train a pair for the same number of steps, whatever the number of data."""
    # An epoch ends with a validation and a copy of the state: let it hold some steps.
    x = x.repeat(max(1, 1000 // len(x)), 1)
    epochs = max(1, args.steps * BATCH // len(x))
    return pv.fit(
        model,
        guide,
        x,
        valid=valid,
        optimizer=lambda params: torch.optim.Adam(params, lr=2e-3, fused=True),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=epochs
        ),
        kl_weight=pv.warmup(max(1, epochs // 10)),
        epochs=epochs,
        batch_size=BATCH,
        seed=args.seed,
        progress=False,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as a table in Markdown."""
    lines = [
        "| training data | bound on log p(X) / N | held-out: full | point, stopped | point |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ways = (row[way] for way in ("full", "stopped", "point"))
        held_out = [f"{w['log_density']:.2f} +- {w['mean_standard_error']:.2f}" for w in ways]
        bound = f"{row['bound']:.2f} +- {row['bound_error']:.2f}"
        lines.append(f"| {row['num_train']} | {bound} | {' | '.join(held_out)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out log-density against the number of training data."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    sizes = [row["num_train"] for row in rows]
    labels = {
        "full": "full variational Bayes",
        "stopped": "point estimate, stopped by validation data",
        "point": "point estimate",
    }
    for way, label in labels.items():
        values = [row[way]["log_density"] for row in rows]
        errors = [2 * row[way]["mean_standard_error"] for row in rows]
        axes.errorbar(sizes, values, errors, label=label, marker="o", capsize=3)
    axes.set(xscale="log", xlabel="training data", ylabel="held-out log-density, nats per image")
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
