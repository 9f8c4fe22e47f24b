r"""VAE with a VampPrior: what does a prior gain that stands where the encoder puts the data?

The tables of Tomczak and Welling, "VAE with a VampPrior" (2018), for fully connected networks: one
and two stochastic layers, under three priors of the topmost latent,

    N(0, I)     fixed
    mixture     1/K sum_k N(m_k, s_k^2), all of it learned, the weights too
    VampPrior   1/K sum_k q(z|u_k), the encoder itself at K learned pseudo-inputs u_k

on static MNIST (nats) and Frey Faces (a discretized logistic over 256 levels, bits per dimension);
digits need no download. In two layers, as the paper's, both latents reach the data, so that neither
is left out. The paper's recipe stops after 50 epochs without a better validation bound; "ours" has
a cosine schedule in its place, and weights that decay, lest it learn its training data by heart.
Both differ from the authors' code: Adam's gradients are not normalised, weights begin as PyTorch's
(theirs: He's), scales are softplus(.) (theirs: log-variances within -6 and 2), pseudo-inputs begin
at training data (theirs: noise around 0.05, for Frey Faces 0.8). Published figures are of weighting
alone; --anneal B corrects ours for data that it can't be trusted for, at B times its cost. Called
again, the script goes on. --draws K takes a tighter bound, here from where other runs have ended:

    python experiments/vampprior.py --data binarized_mnist --root FOLDER --recipe ours
    python experiments/vampprior.py --data binarized_mnist --root FOLDER --recipe ours --layers 2 \
        --priors VampPrior --start runs/vampprior --draws 20 --epochs 20 --out runs/draws
"""

import dataclasses
import json
import math
import re
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from matplotlib.figure import Figure
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv

ROWS = ("1 layer, N(0, I)", "1 layer, VampPrior", "2 layers, N(0, I)", "2 layers, VampPrior")
REPORTED: dict[str, dict[str, float]] = {  # nats, and bits per dimension for levels
    "binarized_mnist": dict(zip(ROWS, (-88.56, -85.57, -86.05, -83.19), strict=True)),
    "frey_faces": dict(zip(ROWS, (4.63, 4.57, 4.61, 4.51), strict=True)),
}
KEPT = ("log_evidence", "mean_standard_error", "sampling_error", "bias", "elbo", "untrusted")


class Sizes(NamedTuple):
    """Of both latents, of every gated layer, and of the mixture and the pseudo-inputs."""

    latent_dim: int = 40
    hidden: int = 300
    num_components: int = 500


START = (0.0, pv.families.inverse_softplus(1.0))  # of locations and of scales, before softplus
PRIORS: dict[str, Callable[[pv.Conditional, pv.Split, Sizes], nn.Module]] = {
    "N(0, I)": lambda encoder, data, sizes: pv.priors.StandardNormal(sizes.latent_dim),
    "mixture": lambda encoder, data, sizes: pv.priors.Mixture(
        pv.families.normal, sizes.num_components, (2, sizes.latent_dim), start=START
    ),
    "VampPrior": lambda encoder, data, sizes: pv.priors.VampPrior(
        encoder, data.train[: sizes.num_components], low=0.0, high=(data.num_levels or 2) - 1.0
    ),
}


class TwoLayers(PyroModule):
    """p(z2) p(z1|z2) p(x|z1, z2)."""

    def __init__(self, prior: nn.Module, between: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.prior, self.between, self.likelihood = prior, between, likelihood

    def forward(self, x: Tensor) -> Tensor:
        """Score data ``(B, D)``."""
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", self.prior())
            z1 = pyro.sample("z1", self.between(z2))
            return pyro.sample("x", self.likelihood(z1, z2), obs=x)


class TopDown(PyroModule):
    """q(z2|x) q(z1|x, z2)."""

    def __init__(self, top: nn.Module, bottom: nn.Module) -> None:
        super().__init__()
        self.top, self.bottom = top, bottom

    def forward(self, x: Tensor) -> None:
        """Draw z2, then z1."""
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", self.top(x))
            pyro.sample("z1", self.bottom(x, z2))


class Joined(nn.Module):
    """A gated layer for each of two inputs, and one for both: ``(*batch, P, D)``."""

    def __init__(self, in_dims: tuple[int, int], out: tuple[int, int], hidden: int) -> None:
        super().__init__()
        gated = (nn.Sequential(nn.Linear(dim, 2 * hidden), nn.GLU(dim=-1)) for dim in in_dims)
        self.layers = nn.ModuleList(gated)
        self.both = pv.networks.gated_mlp(2 * hidden, out, hidden_dims=(hidden,))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Each input ``(*batch, in_dim)``; what has no particles passes its layer once for all."""
        seen = [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]
        return self.both(torch.cat(torch.broadcast_tensors(*seen), -1))


def build(layers: int, make: Any, data: pv.Split, sizes: Sizes, autocast: Any = None) -> Any:
    """The pair; the prior is that of its only latent, or of z2."""
    conditional = partial(pv.Conditional, autocast=autocast)
    dim, (z, hidden, _) = data.dim, sizes
    gated = partial(pv.networks.gated_mlp, hidden_dims=(hidden, hidden))
    seeing = partial(pv.networks.rescaled, scale=(data.num_levels or 2) - 1.0)  # x, within [0, 1]
    encoder = conditional(seeing(gated(dim, (2, z))), pv.families.normal)
    prior = make(encoder, data, sizes)
    num_params, family = 1, pv.families.bernoulli
    if data.num_levels is not None:
        num_params, least = 2, 2 * math.exp(-4.5)  # the paper's, whose values are within [0, 1]
        family = partial(pv.families.discretized, num_levels=data.num_levels, min_scale=least)
    if layers == 1:
        likelihood = conditional(gated(z, (num_params, dim)), family)
        return pv.Model(prior, likelihood), pv.Guide(encoder)
    likelihood = conditional(Joined((z, z), (num_params, dim), hidden), family)
    between = conditional(gated(z, (2, z)), pv.families.normal)
    bottom = conditional(seeing(Joined((dim, z), (2, z), hidden)), pv.families.normal)
    return TwoLayers(prior, between, likelihood), TopDown(encoder, bottom)


class Variant(NamedTuple):
    """One training, a line of the table."""

    layers: int
    prior: str
    seed: int

    @property
    def name(self) -> str:
        """What its row is called."""
        said = f"{self.layers} layer" + "s" * (self.layers > 1)
        return f"{said}, {self.prior}" + f", seed {self.seed}" * (self.seed > 0)


def adam(params: list[Tensor], programs: Any, args: Any) -> torch.optim.Optimizer:
    """What decays are the weights of linear layers, neither biases nor pseudo-inputs."""
    weights = {id(m.weight) for p in programs for m in p.modules() if isinstance(m, nn.Linear)}
    decay = {"params": [p for p in params if id(p) in weights], "weight_decay": args.weight_decay}
    others = {"params": [p for p in params if id(p) not in weights], "weight_decay": 0.0}
    return torch.optim.AdamW([decay, others], lr=args.learning_rate, fused=True)


def measured(variant: Variant, data: pv.Split, args: Any, seconds: float) -> dict[str, Any]:
    """Train as far as the time goes, and judge: the figures of a row."""
    folder = "-".join(re.findall("[a-z0-9]+", variant.name.lower()))
    out = args.out / folder
    torch.manual_seed(variant.seed)
    autocast = torch.bfloat16 if args.bfloat16 else None
    model, guide = build(variant.layers, PRIORS[variant.prior], data, args.sizes, autocast)
    if args.start:
        pv.load(args.start / folder, model=model, guide=guide)
    shared: Any = {"model": model, "guide": guide, "data": data}
    shared |= {"seed": variant.seed, "device": args.device}
    facts = {"of_epochs": args.epochs, **variant._asdict(), **args.before.get(variant.name, {})}
    try:
        history = pv.fit(
            loss=pv.ImportanceWeighted(args.draws) if args.draws > 1 else None,
            optimizer=partial(adam, programs=(model, guide), args=args),
            lr_schedule=args.schedule,
            kl_weight=pv.warmup(args.warmup),
            ema_decay=args.ema_decay,
            epochs=args.epochs,
            batch_size=100,
            patience=args.patience,
            max_seconds=seconds,
            out=out,
            resume=(out / "config.json").is_file(),
            pictures=False,
            **shared,
        )
    except pv.DivergedError as error:
        print(error, flush=True)
        epochs = len((out / "metrics.jsonl").read_text().splitlines())
        return {"diverged": True, "finished": True, "epochs": epochs, **facts}
    pv.evaluate_run(out, num_particles=args.num_particles, budget=args.anneal, **shared)
    judged, part = json.loads((out / "evidence.json").read_text()), data.train[::50]
    weighting = ("weighted", "weighted_error", "num_annealed") * (args.anneal > 0)
    return {
        **{key: judged[key] for key in (*KEPT, "bits_per_dim", *weighting) if key in judged},
        "as_reported": REPORTED.get(data.name, {}).get(variant._replace(seed=0).name),
        "train_elbo": pv.log_evidence(model, guide, part, num_particles=10).elbo.mean().item(),
        "best_epoch": history.best_epoch,
        "epochs": len(history.records),
        "finished": history.stopped != "time",
        "train_seconds": history["seconds"][-1],
        **facts,
    }


def figure_of(row: dict[str, Any], key: str) -> float:
    """A figure in nats, of levels in bits per dimension; without annealing both are the same."""
    value = row.get(key, row["log_evidence"])
    return row["bits_per_dim"] * value / row["log_evidence"] if "bits_per_dim" in row else value


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """The figure of every row, beside what was reported."""
    figure = Figure(figsize=(7, 1.4 + 0.4 * len(rows)), layout="constrained")
    axes, at = figure.add_subplot(), range(len(rows))
    axes.plot([figure_of(row, "weighted") for row in rows], at, "C0o", label="by weighting")
    if some := max((row.get("num_annealed", 0) for row in rows), default=0):
        found = [figure_of(row, "log_evidence") for row in rows]
        errors = [abs(figure_of(row, "mean_standard_error")) for row in rows]
        axes.errorbar(found, at, xerr=errors, fmt="C0+", label=f"{some} data annealed")
    axes.plot([row.get("as_reported", math.nan) for row in rows], at, "C1x", label="as reported")
    bits = any("bits_per_dim" in row for row in rows)
    axes.set(xlabel="bits per dimension" if bits else "log p(x), nats per image")
    axes.set(yticks=at, yticklabels=[row["name"] for row in rows], ylim=(len(rows) - 0.5, -0.5))
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=150)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows; beside what was reported stands the figure of weighting alone, as that one is."""
    lines = ["nats per image         ELBO      log p(x)            bits  weighted reported  epochs"]
    for row in rows:
        bits = f"{row['bits_per_dim']:.3f}" if "bits_per_dim" in row else ""
        alone = f"{figure_of(row, 'weighted'):.3f}" if "weighted" in row else ""
        ended = f"{row['epochs']} of {row['of_epochs']}" + ", diverged" * ("diverged" in row)
        value = f"{row['log_evidence']:11.3f} +- {row['mean_standard_error']:.3f}{bits:>9}"
        beside = f"{alone:>10}{row.get('as_reported', ''):>9}"
        lines.append(f"{row['name']:20}{row['elbo']:9.2f}{value}{beside}  {ended}")
    return "\n".join(lines)


def beginning(folder: Path, variants: list[Variant]) -> tuple[str, dict[str, Any]]:
    """How the runs were trained that these begin at, and how long; each has come to its end."""
    if not (path := folder / "results.json").is_file():
        raise ValueError(f"--start: expected a folder that this script has filled, no {path} found")
    found = json.loads(path.read_text())
    ended = {row["name"]: row for row in found["rows"] if row.get("finished") and "elbo" in row}
    if left := [variant.name for variant in variants if variant.name not in ended]:
        raise ValueError(f"--start: {'; '.join(left)} not at an end in {folder}")
    done = found["protocol"]
    before: dict[str, Any] = {name: {"before": {}} for name in ended}
    for name, key in product(ended, ("epochs", "train_seconds")):
        before[name]["before"][key] = ended[name].get("before", {}).get(key, 0) + ended[name][key]
    said = done.get("start"), f"{done['training']}, {done['epochs at most']} epochs"
    return "; then ".join(filter(None, said)), before


def main() -> None:
    """Train, judge, tabulate and draw what is not done yet."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", choices=["digits", *REPORTED])
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/vampprior"), help="goes on if there")
    parser.add_argument("--recipe", default="paper", choices=["paper", "ours"])
    parser.add_argument("--epochs", type=int, help="at most; 2000 by default, ours 500")
    parser.add_argument("--warmup", type=int, help="epochs of KL warm-up; 100, with --start 1")
    parser.add_argument("--draws", type=int, default=1, help="of the bound that is trained")
    parser.add_argument("--start", type=Path, help="begin at the runs of this folder")
    parser.add_argument("--bfloat16", action="store_true", help="networks are trained in it")
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes, shared")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="0: 5e-4, ours 1e-3")
    parser.add_argument("--weight-decay", type=float, help="decoupled; 0 by default, ours 0.2")
    parser.add_argument("--ema-decay", type=float, help="average; ours then ends at half its rate")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--priors", nargs="+", default=list(PRIORS), choices=PRIORS)
    parser.add_argument("--num-particles", type=int, default=5000)
    parser.add_argument("--anneal", type=float, default=0.0, help="its budget, e.g. 5")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: few data, tiny networks")
    args = parser.parse_args()
    ours, args.sizes = args.recipe == "ours", Sizes()
    args.epochs = (500 if ours else 2000) if args.epochs is None else args.epochs
    args.learning_rate = args.learning_rate or (1e-3 if ours else 5e-4)
    args.warmup = (1 if args.start else 100) if args.warmup is None else args.warmup
    args.weight_decay = (0.2 if ours else 0.0) if args.weight_decay is None else args.weight_decay
    good = args.budget > 0 < args.learning_rate and args.anneal >= 0 <= args.weight_decay
    if not (good and args.draws > 0 <= (args.ema_decay or 0.0) < 1 < args.num_particles):
        parser.error("expected --num-particles from 2, --anneal and decays >= 0, others above 0")
    data = pv.load_data(args.data, root=args.root)
    every = [Variant(*which) for which in product(args.layers, args.priors, args.seeds)]
    start, args.before = beginning(args.start, every) if args.start else ("", {})
    if args.smoke:
        parts = {part: getattr(data, part)[:200] for part in ("train", "valid", "test")}
        data = dataclasses.replace(data, source=None, labels=None, **parts)
        args.epochs, args.warmup, args.num_particles, args.sizes = 2, 1, 20, Sizes(3, 8, 10)
    args.patience, args.schedule, rates = 50, None, "constant"
    if ours:
        args.patience, averaged = None, args.ema_decay is not None
        rates = "with cosine schedule" + " to half of it" * averaged
        args.schedule = partial(CosineAnnealingLR, T_max=args.epochs * (1 + averaged))
    rates += f", decoupled decay {args.weight_decay:g} of linear layers" * (args.weight_decay > 0)
    rates += ", networks in bfloat16" * args.bfloat16
    bound = f"importance weighted bound of {args.draws} draws"
    kept = "parameters" if args.ema_decay is None else f"averages (decay {args.ema_decay} a step)"
    warm = f"KL weight warmed up over {args.warmup} epochs, " * (args.warmup > 1)
    results = pv.Results(
        args.out / "results.json",
        title=f"VAE with a VampPrior: {data.name}",
        protocol={
            "data": data.summary(),
            "model": f"{args.sizes.latent_dim} latents a layer, two gated layers of "
            f"{args.sizes.hidden} units in every network, diagonal normals; "
            + ("Bernoulli" if data.num_levels is None else "discretized logistic")
            + f" likelihood; {args.sizes.num_components} members of the mixture and pseudo-inputs, "
            "which start at the first training data",
            "training": (bound if args.draws > 1 else "Monte Carlo ELBO, one particle")
            + f", batch 100, Adam, learning rate {args.learning_rate:g} {rates}, {warm}"
            + ("" if ours else f"until {args.patience} epochs bring no better validation bound, ")
            + f"{kept} of the best",
            "epochs at most": args.epochs,
            **({"start": start} if start else {}),
            "evaluation": f"{args.num_particles} importance weights from the guide, whole test set",
            "annealing budget": args.anneal,
        },
        device=args.device,
    )
    left = [v for v in every if v.name not in {r["name"] for r in results.rows if r["finished"]}]
    end = time.monotonic() + max(60 * args.budget, 1.0)  # judging counts too
    for done, variant in enumerate(left):
        seconds = (end - time.monotonic()) / (len(left) - done)
        print(f"{variant.name}{'...' if seconds > 0 else ': no time left; call again'}", flush=True)
        if seconds > 0:
            results.put(variant.name, **measured(variant, data, args, seconds))
    told = REPORTED.get(data.name, {})  # what was not run has a line too
    results.note(reported_by="Tomczak and Welling, 5,000 particles", as_reported=told)
    # What diverged has no figures, nor has what leaves a datum without any weight.
    rows = [{k: v for k, v in row.items() if v is not None} for row in results.rows]
    rows = [dict.fromkeys(KEPT, math.nan) | row for row in rows]
    picture(rows, args.out / "vampprior.png")
    print(f"{table(rows)}\nfigures: {results.path}; picture: {args.out / 'vampprior.png'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"vampprior.py: {error}") from None
