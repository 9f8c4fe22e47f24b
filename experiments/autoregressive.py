r"""p(x) without latents, dimension by dimension, and with latents: do they still say anything?

There are two ways to a density of many dimensions. The chain rule needs no latent, and nothing is
inferred; a latent lets the dimensions be independent once it is known:

    autoregressive    p(x) = prod_i p(x_i | x_<i)
    latents           p(x) = int p(z) prod_i p(x_i | z) dz
    both              p(x) = int p(z) prod_i p(x_i | x_<i, z) dz

The product is Germain et al.'s MADE: one masked network gives every conditional in one pass. It is
a Pyro model whose only site is observed, with a guide that draws nothing. The bound is then
log p(x) itself, so fit maximizes the likelihood, log_evidence is exact (its standard error is 0),
and generate draws one dimension after another. "Independent" is the product without conditions.

Where a decoder sees x_<i, the latents may stay unused: the rate KL(q(z|x) || p(z)) falls to zero,
and with it what z tells about x (Chen et al., "Variational lossy autoencoder", 2017). Free bits
make the first nats of the rate cost nothing. Called again, the script goes on where it stopped.

    python experiments/autoregressive.py
    python experiments/autoregressive.py --data binarized_mnist --root FOLDER --out runs/made

Reported: MADE of one hidden layer and one order, table 6 of Germain et al. (2015); from memory, its
layer had 8,000 units, where ours has --hidden of them, or two for each dimension if that is more.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv

REPORTED = {"binarized_mnist": {"autoregressive": -88.40}}
REPORTED_UNITS = 8000  # of its hidden layer, from memory of the paper
SHOWN, USED = 12, 500  # draws in the picture; data of which the use of latents is measured


class Direct(PyroModule):
    """p(x) itself: a model without latents, whose likelihood is a distribution of no batch."""

    def __init__(self, likelihood: nn.Module) -> None:
        super().__init__()
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> Tensor:
        """Score data ``(B, D)``."""
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("x", self.likelihood(), obs=x)


class Nothing(PyroModule):
    """The guide of a model without latents: there is nothing to draw."""

    def forward(self, x: Tensor) -> None:
        """Draw nothing."""


def units(dim: int, hidden: int) -> int:
    """The width of a masked layer: it has units for each of the dimensions."""
    return max(hidden, 2 * dim)


def pairs(dim: int, latent_dim: int, hidden: int, free_nats: float) -> dict[str, Any]:
    """From a name to the function that makes (model, guide, loss)."""

    def conditions(in_dim: int) -> pv.Autoregressive:
        network = pv.networks.masked_mlp(dim, in_dim, 1, hidden_dims=(units(dim, hidden),))
        return pv.Autoregressive(network, pv.families.bernoulli, dim)

    def independent() -> nn.Module:
        network = pv.networks.mlp(latent_dim, (1, dim), hidden_dims=(hidden,))
        return pv.Conditional(network, pv.families.bernoulli)

    def direct(likelihood: nn.Module) -> tuple[Any, ...]:
        return Direct(likelihood), Nothing(), Trace_ELBO()

    def latent(likelihood: nn.Module, loss: Any) -> tuple[Any, ...]:
        inward = pv.networks.mlp(dim, (2, latent_dim), hidden_dims=(hidden,))
        encoder = pv.Conditional(inward, pv.families.normal)
        return pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder), loss

    kl = TraceMeanField_ELBO
    return {
        "independent": lambda: direct(pv.priors.Learned(pv.families.bernoulli, (1, dim))),
        "autoregressive": lambda: direct(conditions(0)),
        "latents": lambda: latent(independent(), kl()),
        "both": lambda: latent(conditions(latent_dim), kl()),
        "both, free bits": lambda: latent(conditions(latent_dim), pv.FreeBits(free_nats)),
    }


def use_of_latents(model: Any, guide: Any, x: Tensor, seed: int) -> dict[str, Any]:
    """What latents cost and tell, nats per datum, and how many the data move; none is no latent."""
    if isinstance(guide, Nothing):
        return {"rate": 0.0, "mutual_information": 0.0, "active_units": 0, "latents": 0}
    parts = pv.elbo_parts(model, guide, x, num_particles=5, seed=seed)
    return {
        "rate": parts.rate.mean,
        "mutual_information": parts.mutual_information.mean,
        "active_units": int(parts.active.sum()),
        "latents": len(parts.active),
    }


class Variant(NamedTuple):
    """One training, a line of the table."""

    model: str
    seed: int

    @property
    def name(self) -> str:
        """What its row is called."""
        return self.model + f", seed {self.seed}" * (self.seed > 0)


def folder(out: Path, name: str) -> Path:
    """Where the training of a row is kept."""
    return out / name.replace(", ", "_").replace(" ", "_")


def measured(
    variant: Variant, data: pv.Split, args: argparse.Namespace, reached: dict[str, Any]
) -> dict[str, Any]:
    """Train as far as the time goes, judge, and draw: the figures of a row.

    The last epoch that was trained is left in ``reached``, also where training diverges.
    """
    out = folder(args.out, variant.name)
    shared: Any = {"seed": variant.seed, "device": args.device}
    torch.manual_seed(variant.seed)
    made = pairs(data.dim, args.latent_dim, args.hidden, args.free_nats)[variant.model]
    model, guide, loss = made()
    history = pv.fit(
        model,
        guide,
        data,
        loss=loss,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
        lr_schedule=lambda optimizer: CosineAnnealingLR(optimizer, T_max=args.epochs),
        epochs=args.epochs,
        batch_size=100,
        max_seconds=args.seconds,
        callbacks=[reached.update],
        out=out,
        resume=(out / "config.json").is_file(),
        pictures=False,
        **shared,
    )
    # All weights of a model without latents are p(x): two of them have a standard error, of 0.
    particles = 2 if isinstance(guide, Nothing) else args.num_particles
    of_pair: Any = {"model": model, "guide": guide, "data": data}
    pv.evaluate_run(out, num_particles=particles, budget=0, **of_pair, **shared)
    judged = json.loads((out / "evidence.json").read_text())
    kept = ("log_evidence", "mean_standard_error", "sampling_error", "bias", "elbo", "untrusted")
    rows = torch.linspace(0, len(data.test) - 1, min(USED, len(data.test))).round().long()
    drawn = pv.generate(model, data.test[:SHOWN], draw=True, seed=variant.seed)
    np.save(out / "draws.npy", drawn.cpu().numpy())
    reported = REPORTED.get(data.name, {})
    beside = f"{REPORTED_UNITS:,} hidden units, ours {units(data.dim, args.hidden):,}"
    return {
        **{key: judged[key] for key in kept},
        **use_of_latents(model, guide, data.test[rows], variant.seed),
        **({"as_reported": {beside: reported[variant.model]}} if variant.model in reported else {}),
        "num_particles": particles,
        "best_epoch": history.best_epoch,
        "epochs": len(history.records),
        "of_epochs": args.epochs,
        "train_seconds": history["seconds"][-1],
        **variant._asdict(),
    }


def picture(rows: list[dict[str, Any]], data: pv.Split, out: Path) -> None:
    """Data, and draws of each model beside its log p(x) and rate."""
    height, width = data.image_shape or (1, data.dim)
    tiles = [data.test[torch.linspace(0, len(data.test) - 1, SHOWN).round().long()]]
    labels = ["test data"]
    for row in rows:
        tiles.append(torch.as_tensor(np.load(folder(out, row["name"]) / "draws.npy")))
        labels.append(f"{row['name']}\nlog p(x) {row['log_evidence']:.2f} nats\n")
        labels[-1] += f"KL {row['rate']:.2f} nats" if row["latents"] else "no latents"
    images = nn.functional.pad(
        torch.cat(tiles).view(-1, SHOWN, height, width), (1, 1, 1, 1), value=0.4
    )
    canvas = images.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    figure = Figure(figsize=(2 + 0.55 * SHOWN, 0.2 + 0.6 * len(labels)))
    axes = figure.add_subplot()
    axes.imshow(canvas.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    at = [(height + 2) * (i + 0.5) for i in range(len(labels))]
    axes.set_yticks(at, labels=labels, fontsize=7)
    figure.savefig(out / "autoregressive.png", dpi=150, bbox_inches="tight")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, beside what was reported."""
    lines = [
        f"{'nats per image':16}   ELBO   log p(x)          reported   KL    I(n; z)  active  epochs"
    ]
    for row in rows:
        reported = next(iter(row.get("as_reported", {}).values()), "")
        active = f"{row['active_units']} of {row['latents']}" if row["latents"] else "-"
        lines.append(
            f"{row['name']:16}{row['elbo']:8.2f}{row['log_evidence']:10.3f} +- "
            f"{row['mean_standard_error']:.3f}{reported:>8}"
            f"{row['rate']:8.2f}{row['mutual_information']:8.2f}{active:>10}  "
            f"{row['epochs']} of {row['of_epochs']}"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, judge, tabulate and draw what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = ["digits", "binarized_mnist", "mnist", "fashion_mnist"]
    parser.add_argument("--data", default="digits", choices=sets, help="grey levels at a threshold")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/autoregressive"))
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="minutes of this call, shared"
    )
    parser.add_argument("--models", nargs="+", choices=list(pairs(2, 1, 1, 0.0)))
    parser.add_argument("--latent-dim", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=500, help="units of each hidden layer")
    parser.add_argument("--free-nats", type=float, default=5.0, help="of the rate, free of charge")
    parser.add_argument("--num-particles", type=int, default=1000, help="for those with latents")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: few data, tiny networks")
    args = parser.parse_args()
    if not args.budget > 0:
        raise ValueError(f"--budget: expected minutes > 0, got {args.budget}.")
    data = pv.load_data(args.data, root=args.root)
    data = data if data.num_levels is None else data.binarize()
    if args.smoke:
        parts = {part: getattr(data, part)[:200] for part in ("train", "valid", "test")}
        data = dataclasses.replace(data, source=None, labels=None, **parts)
        args.epochs, args.num_particles, args.latent_dim, args.hidden = 2, 20, 3, 16

    count = min(USED, len(data.test))
    results = pv.Results(
        args.out / "results.json",
        title=f"The chain rule and latents: {data.name}",
        protocol={
            "data": data.summary(),
            "model": "Bernoulli; conditionals by one masked hidden layer of "
            f"{units(data.dim, args.hidden)} ReLU units; {args.latent_dim} latents, N(0, I), "
            f"diagonal normal guide, {args.hidden} softplus units in its and the plain decoder's "
            "hidden layer",
            "training": "maximum likelihood, or the ELBO with analytic KL, with free bits of "
            f"{args.free_nats:g} nats where said; Adam, learning rate 1e-3 with cosine schedule, "
            "batch 100, parameters of the best validation bound",
            "epochs": args.epochs,
            "evaluation": f"exact without latents, else {args.num_particles} importance weights "
            "from the guide; whole test set",
            "use of latents": "rate, mutual information with the index of the datum (of N data at "
            f"most log N = {math.log(count):.2f} nats), and active units, of {count} test data",
        },
        device=args.device,
    )
    done = {row["name"]: row["epochs"] for row in results.rows}
    over = [row["name"] for row in results.rows if "diverged" in row]
    models = args.models or list(pairs(2, 1, 1, 0.0))
    every = [Variant(model, seed) for seed in args.seeds for model in models]
    left = [v for v in every if done.get(v.name, 0) < args.epochs and v.name not in over]
    end = time.monotonic() + 60 * args.budget
    for number, variant in enumerate(left):
        if number and time.monotonic() > end:  # judging may have taken more than its part
            print(f"{variant.name}: no time left; call again", flush=True)
            continue
        print(f"{variant.name}...", flush=True)
        args.seconds = max(end - time.monotonic(), 0.001) / (len(left) - number)
        reached = {"epoch": done.get(variant.name, 0)}
        try:
            row = measured(variant, data, args, reached)
        except pv.DivergedError as error:  # the others go on
            print(f"{variant.name}: {error}")
            row = {"diverged": True, "finished": True, "epochs": reached["epoch"]}
            row |= {"of_epochs": args.epochs, **variant._asdict()}
        results.put(variant.name, **row)
    judged = [row for row in results.rows if "diverged" not in row]
    picture(judged, data, args.out)
    print(table(judged))
    print(f"figures: {args.out / 'results.json'}; picture: {args.out / 'autoregressive.png'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"autoregressive.py: {error}") from None
