"""Full variational Bayes over a decoder's weights, against point estimates, on few data.

Appendix F of Kingma and Welling, "Auto-encoding variational Bayes" (2014), which derives it and
measures nothing: p(theta) is a normal over the weights of the decoder, q(theta) another (Pyro's
AutoNormal), and held-out data are judged by their posterior predictive density. The bound is that
of the whole training set, in which the weights are paid for once. The number of training data
varies, that of gradient steps does not. Called again, the script goes on where it stopped.

    python experiments/full_vb.py --out runs/full_vb
    python experiments/full_vb.py --data mnist --root FOLDER --sizes 100 1000 --hidden 500

Against it stand two point estimates of the weights: trained to the end, and stopped at the best
bound of the validation data, which the others never see.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv

BATCH = 25
STEPS = 40  # of an epoch, about, whatever the number of data
WAYS = {
    "full": "full variational Bayes",
    "stopped": "point estimate, stopped by validation data",
    "point": "point estimate",
}


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


def pieces(
    latent_dim: int, hidden: int, dim: int = 64
) -> tuple[pv.Conditional, nn.Module, pv.Conditional]:
    """Encoder, prior and likelihood, the same for all ways."""
    encoder = pv.Conditional(
        pv.networks.mlp(dim, (2, latent_dim), hidden_dims=(hidden,)), pv.families.normal
    )
    likelihood = pv.Conditional(
        pv.networks.mlp(latent_dim, (1, dim), hidden_dims=(hidden,)), pv.families.bernoulli
    )
    return encoder, pv.priors.StandardNormal(latent_dim), likelihood


def point_pair(latent_dim: int, hidden: int, dim: int = 64) -> tuple[pv.Model, pv.Guide]:
    """The pair with weights that are parameters."""
    encoder, prior, likelihood = pieces(latent_dim, hidden, dim)
    return pv.Model(prior, likelihood), pv.Guide(encoder)


def full_pair(
    latent_dim: int, hidden: int, num_data: int, dim: int = 64
) -> tuple[FullModel, FullGuide]:
    """The pair with weights that are latents."""
    encoder, prior, likelihood = pieces(latent_dim, hidden, dim)
    model = FullModel(prior, likelihood, num_data)
    of_weights = poutine.block(model, hide=["z", "x"])
    weights = AutoNormal(of_weights, init_loc_fn=init_to_sample, init_scale=0.02)
    return model, FullGuide(encoder, weights, num_data)


class Clock:
    """Shares the training time of a call equally among the trainings that are left."""

    def __init__(self, minutes: float | None, trainings: int) -> None:
        self.seconds = math.inf if minutes is None else 60 * minutes
        self.trainings = trainings

    def train(self, model: nn.Module, guide: nn.Module, x: Tensor, **options: Any) -> pv.History:
        """Train a pair, or go on with that, for its share of the time."""
        share = max(self.seconds / self.trainings, 1e-3)
        started = time.perf_counter()
        history = pv.fit(
            model,
            guide,
            x,
            batch_size=BATCH,
            optimizer=lambda params: torch.optim.Adam(params, lr=2e-3, fused=True),
            resume=(options["out"] / "config.json").is_file(),
            max_seconds=share if share < math.inf else None,
            pictures=False,
            progress=False,
            **options,
        )
        self.seconds -= time.perf_counter() - started
        self.trainings -= 1
        return history


def measured(
    data: pv.Split, size: int, seed: int, clock: Clock, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: all ways on so many training data, nats per datum."""
    x, test = data.train[:size], data.test[: args.num_test]
    # An epoch ends with a validation and a copy of the state: let it hold some steps.
    train = x.repeat(max(1, args.steps * BATCH // size), 1)
    epochs = max(1, round(args.epochs * args.steps * BATCH / len(train)))
    shape = args.latent_dim, args.hidden
    estimates: dict[str, pv.Estimate] = {}
    histories: dict[str, pv.History] = {}
    row: dict[str, Any] = {"num_train": size, "seed": seed}
    for way in WAYS:
        torch.manual_seed(seed)
        full = way == "full"
        pair = full_pair(*shape, size, data.dim) if full else point_pair(*shape, data.dim)
        histories[way] = clock.train(
            *pair,
            train,
            valid=data.valid if way == "stopped" else None,
            lr_schedule=partial(CosineAnnealingLR, T_max=epochs),
            kl_weight=pv.warmup(max(1, epochs // 10)),
            epochs=epochs,
            seed=seed,
            out=args.out / f"{size}-{seed}-{way}",
            device=args.device,
        )
        if full:
            row |= bound_of_the_set(pair, x, args.num_joint)
            draws = {"num_global": args.num_global, "num_particles": args.num_particles}
            estimates[way] = pv.log_predictive(*pair, test, **draws)
        else:
            count = args.num_global * args.num_particles
            estimates[way] = pv.log_evidence(*pair, test, num_particles=count)
        row[way] = figure(estimates[way]) | {"sampling_error": estimates[way].sampling_error}
    for way in ("stopped", "point"):
        row[f"full minus {way}"] = figure(pv.compare(estimates["full"], estimates[way]))
    row["epochs"] = min(len(history.records) for history in histories.values())
    row["of_epochs"] = epochs
    row["train_seconds"] = sum(history["seconds"][-1] for history in histories.values())
    return row


def figure(found: pv.Estimate | pv.Comparison) -> dict[str, float]:
    """A mean with its error, nats per datum."""
    return {"value": found.mean, "standard_error": found.mean_standard_error}


def bound_of_the_set(pair: tuple[Any, Any], x: Tensor, num_joint: int) -> dict[str, Any]:
    """Bounds on log p(X) / N: of one draw of the weights, without bias, and of all together."""
    log_w = pv.joint_log_weights(*pair, x, num_particles=num_joint) / len(x)
    error = log_w.std().item() / num_joint**0.5
    tighter = ((len(x) * log_w).logsumexp(0).item() - math.log(num_joint)) / len(x)
    return {
        "bound of the set": {"value": log_w.mean().item(), "standard_error": error},
        "tighter_bound": tighter,
    }


def main() -> None:
    """Train every way on every number of data, judge all on the same test data, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits, mnist, binarized_mnist...")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/full_vb"), help="goes on if there")
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 50, 100, 400])
    parser.add_argument("--epochs", type=int, default=75, help=f"of {STEPS} gradient steps")
    parser.add_argument("--budget", type=float, help="minutes of training in this call")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--latent-dim", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--num-test", type=int, default=1000, help="test data that are judged")
    parser.add_argument("--num-global", type=int, default=50, help="draws of the weights")
    parser.add_argument("--num-particles", type=int, default=100, help="per draw of the weights")
    parser.add_argument("--num-joint", type=int, default=50, help="weights of the whole set")
    parser.add_argument("--smoke", action="store_true", help="seconds: tiny, two epochs")
    args = parser.parse_args()
    args.steps = STEPS
    if args.smoke:
        args.sizes, args.epochs, args.steps = args.sizes[:2], 2, 4
        args.hidden, args.num_test = 8, 30
        args.num_global, args.num_particles, args.num_joint = 3, 5, 3

    pyro.settings.set(module_local_params=True)  # each pair keeps its own parameters
    data = pv.load_data(args.data, root=args.root)
    data = data if data.num_levels is None else data.binarize()
    results = pv.Results(
        args.out / "results.json",
        title=f"Full variational Bayes over the decoder's weights: {data.name}",
        protocol={
            "data": data.summary(),
            "model": f"N(0, I) prior in {args.latent_dim} dimensions, one layer of {args.hidden} "
            "softplus units on each side, Bernoulli likelihood, diagonal normal guide",
            "full": "weights N(0, 1 / fan-in), biases N(0, 1), diagonal normal q(theta)",
            "training": f"about {args.epochs * args.steps} steps of Adam, batch {BATCH}, learning "
            "rate 2e-3 with cosine schedule, a tenth of KL warm-up, ELBO by Monte Carlo, one "
            "particle; 'stopped' is the point estimate at its best bound of the "
            f"{len(data.valid)} validation data, the others see training data alone",
            "evaluation": f"{min(args.num_test, len(data.test))} test data; {args.num_global} "
            f"draws of the weights with {args.num_particles} particles each, point estimates with "
            f"as many particles in all; {args.num_joint} weights of the whole set",
        },
        device=args.device,
    )
    jobs = [(f"{n} data, seed {seed}", n, seed) for seed in args.seeds for n in args.sizes]
    jobs = [job for job in jobs if not finished(results, job[0])]
    clock = Clock(args.budget, len(jobs) * len(WAYS))
    for name, size, seed in jobs:
        print(f"{name}...", flush=True)
        results.put(name, **measured(data, size, seed, clock, args))
    print("\n".join(map(line, results.rows)))
    draw(results.rows, args.out / "full_vb.png")
    print(f"figures: {results.path}; picture: {args.out / 'full_vb.png'}")


def finished(results: pv.Results, name: str) -> bool:
    """Whether a row is there, and all of its trainings came to their end."""
    return name in results and results[name]["epochs"] == results[name]["of_epochs"]


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    parts = ("bound of the set", *WAYS, "full minus stopped", "full minus point")
    said = (
        f"{part} {row[part]['value']:.2f} +- {row[part]['standard_error']:.2f}" for part in parts
    )
    return f"{row['name']}: {', '.join(said)}; {row['epochs']} of {row['of_epochs']} epochs"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out log-density against the number of training data, and what the weights gain."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    values, gains = figure.subplots(1, 2)
    sizes = sorted({row["num_train"] for row in rows})
    against = {f"full minus {way}": f"against the {WAYS[way]}" for way in ("stopped", "point")}
    for axes, parts in ((values, WAYS), (gains, against)):
        for part, label in parts.items():
            found = [[row[part] for row in rows if row["num_train"] == size] for size in sizes]
            means = [sum(of["value"] for of in seeds) / len(seeds) for seeds in found]
            # The errors are those of these test data, which all seeds share.
            errors = [2 * max(of["standard_error"] for of in seeds) for seeds in found]
            color = f"C{list(WAYS).index(part.removeprefix('full minus '))}"
            axes.errorbar(sizes, means, errors, label=label, marker="o", capsize=3, color=color)
        axes.set(xscale="log", xlabel="training data")
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.minorticks_off()
        axes.legend()
    values.set_ylabel("held-out log-density, nats per image")
    gains.set_ylabel("gain of full variational Bayes, nats per image")
    gains.axhline(0.0, color="gray", linewidth=0.8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"full_vb.py: {error}") from None
