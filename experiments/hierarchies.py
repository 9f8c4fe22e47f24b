r"""Two and more stochastic layers: the hierarchy is a loop, and so is its guide, up or down.

The model draws from the top down. A guide can run against it or with it:

    model         p(z_L) p(z_{L-1}|z_L) ... p(z_1|z_2) p(x|z_1)
    bottom-up     q(z_1|x) q(z_2|z_1) ... q(z_L|z_{L-1})
    top-down      q(z_L|x) q(z_{L-1}|z_L, x) ... q(z_1|z_2, x)

Either can hold the exact posterior of such a chain. What differs is where log q - log p may be
integrated over one layer alone, as TraceMeanField_ELBO does. The parent of z_l in the model is
z_{l+1}, and the closed form is unbiased where this parent does not descend from z_l in the guide
(docs/mathematics.md, section 5):

    top-down      at every layer: KL(q(z_l|z_{l+1}, x) || p(z_l|z_{l+1})) at the z_{l+1} drawn
    bottom-up     at the top alone, where z_L has no parent; below it z_{l+1} descends from z_l, so
                  log q - log p is taken at the draw, and a warning says so: expected, and shown

Both are trained in both ways, and judged beside one layer, which is the same loop for L = 1. Read
the rates first: an upper layer whose rate is near zero says nothing of x, and what such a pair
gains over one layer in so short a training is not that layer's. FreeBits keeps it in use.

    python experiments/hierarchies.py --out runs/hierarchies
    python experiments/hierarchies.py --latent-dims 10 6 3 --out runs/three_layers

References: Burda et al., "Importance weighted autoencoders" (2016), for the chain bottom-up;
Sønderby et al., "Ladder variational autoencoders" (2016), for the other direction.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_vae as pv


class Hierarchy(PyroModule):
    """p(z_L) p(z_{L-1}|z_L) ... p(z_1|z_2) p(x|z_1)."""

    def __init__(
        self, prior: nn.Module, layers: Sequence[nn.Module], likelihood: nn.Module
    ) -> None:
        super().__init__()
        self.prior = prior  # p(z_L)
        self.layers = nn.ModuleList(layers)  # p(z_{L-1}|z_L), ..., p(z_1|z_2)
        self.likelihood = likelihood  # p(x|z_1)

    def forward(self, x: Tensor) -> Tensor:
        """Score data ``(B, D)``."""
        depth = 1 + len(self.layers)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample(f"z{depth}", self.prior())
            for level, layer in zip(range(depth - 1, 0, -1), self.layers, strict=True):
                z = pyro.sample(f"z{level}", layer(z))
            return pyro.sample("x", self.likelihood(z), obs=x)


class BottomUp(PyroModule):
    """q(z_1|x) q(z_2|z_1) ... q(z_L|z_{L-1})."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, x: Tensor) -> None:
        """Draw z_1, then z_2, ..."""
        with pyro.plate("data", len(x), dim=-1):
            below = x
            for level, encoder in enumerate(self.encoders, start=1):
                below = pyro.sample(f"z{level}", encoder(below))


class TopDown(PyroModule):
    """q(z_L|x) q(z_{L-1}|z_L, x) ... q(z_1|z_2, x)."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, x: Tensor) -> None:
        """Draw z_L, then z_{L-1}, ..."""
        with pyro.plate("data", len(x), dim=-1):
            above: tuple[Tensor, ...] = ()
            for level, encoder in zip(range(len(self.encoders), 0, -1), self.encoders, strict=True):
                above = (pyro.sample(f"z{level}", encoder(x, *above)),)


def build(
    guide: type[BottomUp] | type[TopDown], latent_dims: Sequence[int], hidden_dims: Sequence[int]
) -> tuple[Hierarchy, BottomUp | TopDown]:
    """The pair for layers of these sizes, z_1 first. One size makes the ordinary VAE."""
    first, top = latent_dims[0], latent_dims[-1]
    upwards = list(pairwise(latent_dims))  # (size of z_l, size of z_{l+1})
    downwards = upwards[::-1]
    mlp = partial(pv.networks.mlp, hidden_dims=hidden_dims)
    seeing = partial(pv.networks.rescaled, scale=16.0)  # what sees x sees levels 0..16
    model = Hierarchy(
        pv.priors.StandardNormal(top),
        [pv.Conditional(mlp(high, (2, low)), pv.families.normal) for low, high in downwards],
        pv.Conditional(mlp(first, (1, 64)), partial(pv.families.binomial, total_count=16)),
    )
    if guide is BottomUp:
        networks = [seeing(mlp(64, (2, first)))]
        networks += [mlp(low, (2, high)) for low, high in upwards]
    else:
        networks = [seeing(mlp(64, (2, top)))]
        networks += [seeing(mlp(64 + high, (2, low))) for low, high in downwards]
    return model, guide([pv.Conditional(network, pv.families.normal) for network in networks])


@torch.no_grad()
def layer_rates(model: Hierarchy, guide: nn.Module, x: Tensor, num_particles: int) -> list[float]:
    r"""The rate of each layer, z_1 first, :math:`E_q[\log q(z_l|.) - \log p(z_l|z_{l+1})]`, nats.

    ELBO = E_q[log p(x|z_1)] - their sum. From the top down a rate is a mean of KLs, never negative;
    from the bottom up only the sum is one.
    """
    x = x.to(next(guide.parameters()).device)
    particles = pyro.plate("particles", num_particles, dim=-2)
    q: Any = poutine.trace(particles(guide)).get_trace(x)
    p: Any = poutine.trace(particles(poutine.replay(model, trace=q))).get_trace(x)
    q.compute_log_prob()
    p.compute_log_prob()
    names = [f"z{level}" for level in range(1, 2 + len(model.layers))]
    return [(q.nodes[z]["log_prob"] - p.nodes[z]["log_prob"]).mean().item() for z in names]


@torch.no_grad()
def redrawn(model: Hierarchy, guide: nn.Module, x: Tensor, kept: int, times: int) -> Tensor:
    """Means of p(x|z_1), the top ``kept`` layers from the guide, those below drawn anew."""
    depth = 1 + len(model.layers)
    q: Any = poutine.trace(guide).get_trace(x.to(next(guide.parameters()).device))
    names = [f"z{level}" for level in range(depth, depth - kept, -1)]
    given = {z: q.nodes[z]["value"].repeat(times, 1) for z in names}
    return pv.decode(model, given, x.repeat(times, 1)).mean.cpu()


def picture(model: Hierarchy, guide: nn.Module, x: Tensor, path: Path) -> None:
    """What each layer decides: the data, and images that keep fewer and fewer layers of theirs."""
    depth = 1 + len(model.layers)
    labels, rows = ["data"], [x]
    for kept in range(depth, -1, -1):
        times = 1 if kept == depth else 3
        names = ", ".join(f"z{level}" for level in range(depth, depth - kept, -1))
        labels += [f"{names or 'none'} kept", *[""] * (times - 1)]
        rows.append(redrawn(model, guide, x, kept, times))
    tiles = nn.functional.pad(torch.cat(rows).view(-1, len(x), 8, 8), (0, 1, 0, 1), value=16)
    canvas = tiles.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    figure = Figure(figsize=(6.3, 0.1 + 0.5 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(canvas.numpy(), cmap="gray", vmin=0, vmax=16)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([9 * i + 4 for i in range(len(labels))], labels=labels)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train both guides in both ways, and one layer; judge, compare and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/hierarchies"))
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--latent-dims", type=int, nargs="+", default=[10, 5], help="z1 first")
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[128, 128])
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, few particles")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_particles = 2, 20

    data = pv.load_data("digits")
    print(data.summary())
    runs: dict[str, tuple[type[BottomUp] | type[TopDown], Any, list[int]]] = {
        "top-down, free bits": (TopDown, pv.FreeBits(3.0), args.latent_dims),
        "top-down, analytic KL": (TopDown, TraceMeanField_ELBO(), args.latent_dims),
        "top-down, Monte Carlo": (TopDown, Trace_ELBO(), args.latent_dims),
        "bottom-up, analytic KL": (BottomUp, TraceMeanField_ELBO(), args.latent_dims),
        "bottom-up, Monte Carlo": (BottomUp, Trace_ELBO(), args.latent_dims),
        "one layer, analytic KL": (TopDown, TraceMeanField_ELBO(), args.latent_dims[:1]),
    }
    main_run, *_, one_layer = runs
    histories: dict[str, pv.History] = {}
    estimates: dict[str, pv.Estimate] = {}
    table: dict[str, dict[str, Any]] = {}
    for name, (direction, loss, latent_dims) in runs.items():
        torch.manual_seed(args.seed)
        model, guide = build(direction, latent_dims, args.hidden_dims)
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message=".* the analytic KL would be biased")
            histories[name] = pv.fit(
                model,
                guide,
                data,
                loss=loss,
                optimizer=lambda params: torch.optim.Adam(params, lr=2e-3, fused=True),
                kl_weight=pv.warmup(20),
                epochs=args.epochs,
                batch_size=100,
                patience=30,
                seed=args.seed,
                out=args.out if name == main_run else None,
            )
        said = [str(warning.message) for warning in caught]
        for sentence in said:
            print(f"{name}: expected, {sentence}")
        if name == main_run:
            estimate = pv.evaluate_run(
                args.out, model=model, guide=guide, num_particles=args.num_particles, budget=0.0
            )
            picture(model, guide, data.test[:10], args.out / "layers.png")
        else:
            estimate = pv.log_evidence(model, guide, data.test, num_particles=args.num_particles)
        estimates[name] = estimate
        table[name] = {
            "elbo": estimate.elbo.mean().item(),
            "log_evidence": estimate.mean,
            "mean_standard_error": estimate.mean_standard_error,
            "rates": layer_rates(model, guide, data.test, min(args.num_particles, 100)),
            "left_to_monte_carlo": said,
            "epochs": len(histories[name].records),
            "train_seconds": histories[name]["seconds"][-1],
        }
    for name, row in table.items():
        found = pv.compare(estimates[name], estimates[one_layer])
        row["against_one_layer"] = found.mean
        row["against_one_layer_standard_error"] = found.mean_standard_error

    history = histories[main_run]
    evidence = json.loads((args.out / "evidence.json").read_text())
    results = {
        "title": f"Digits, {len(args.latent_dims)} stochastic layers",
        "protocol": {
            "data": data.summary(),
            "model": f"N(0, I) at the top, layers of {args.latent_dims} dimensions from z1 up, "
            f"hidden layers {args.hidden_dims} of softplus units in every network, diagonal "
            "normals, binomial likelihood of 16 trials; the first of the pairs in full",
            "training": "free bits of 3 nats a layer, analytic KL, one particle, batch 100, "
            "Adam, learning rate 2e-3, KL weight warmed up over 20 epochs, stopped after "
            "30 epochs without a better validation bound, parameters of the best",
            "evaluation": f"importance weighting with the guide, {args.num_particles} particles "
            "per datum",
        },
        "num_train": len(data.train),
        "num_test": evidence["num_data"],
        "epochs": len(history.records),
        "best_epoch": history.best_epoch,
        "best_valid_elbo": max(history["valid_elbo"]),
        "train_seconds": history["seconds"][-1],
        "pairs": table,
        **evidence,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    width = 8 * len(args.latent_dims)
    head = f"{'nats per image':24}{'ELBO':>10}{'log p(x)':>10}{'+-':>7}"
    print(f"{head}  {'rates, z1 first':{width}}  against one layer")
    for name, row in table.items():
        rates = "".join(f"{rate:8.2f}" for rate in row["rates"])
        print(
            f"{name:24}{row['elbo']:10.3f}{row['log_evidence']:10.3f}"
            f"{row['mean_standard_error']:7.3f}  {rates:{width}}"
            f"  {row['against_one_layer']:+.3f} +- {row['against_one_layer_standard_error']:.3f}"
        )
    print(f"figures: {args.out / 'results.json'}; what each layer decides: layers.png beside it")
    print(f"pictures and report of the first: {args.out / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"hierarchies.py: {error}") from None
