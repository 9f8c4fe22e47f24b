r"""Importance weighted autoencoders: what do k draws buy, in the bound and in its gradient?

Table 1 of Burda et al., "Importance weighted autoencoders" (2016): log p(x) of test images and the
number of active units, for one and two stochastic layers and k draws, where

    VAE    the mean of k log-weights: the same bound, its gradient less noisy
    IWAE   the logarithm of the mean of k weights: a tighter bound (for k = 1 it is the VAE)
    DReG   the same bound, with the doubly reparameterized gradient of Tucker et al. (2019)

binarized_mnist is static. mnist (59,600 images train) and digits are binarized afresh in every
minibatch, and once for the test. The paper's recipe is not its authors' code: 400 images choose the
parameters, minibatches are shuffled, active units are of test data, Adam's epsilon comes after the
correction of bias, beta1 is 0.9. By --after-vae E, more draws begin at the VAE, at half the rate.

    python experiments/iwae.py --data mnist --root FOLDER --budget 60 --out runs/iwae_paper
    python experiments/iwae.py --data binarized_mnist --root FOLDER --recipe ours --after-vae 20
"""

import dataclasses
import json
import math
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import pyro_vae as pv

REPORTED: dict[tuple[str, int, str], dict[int, float]] = {  # nats, by k
    ("binarized_mnist", 1, "VAE"): {1: -88.71},
    ("binarized_mnist", 1, "IWAE"): {5: -87.63, 50: -86.82},
    ("mnist", 1, "VAE"): {1: -86.76, 5: -86.47, 50: -86.35},
    ("mnist", 1, "IWAE"): {5: -85.54, 50: -84.78},
    ("mnist", 1, "DReG"): {1: -86.08, 5: -84.90, 50: -84.32},
    ("mnist", 2, "VAE"): {1: -85.33},
    ("mnist", 2, "IWAE"): {5: -83.89, 50: -82.90},
}
KEPT = ("log_evidence", "mean_standard_error", "sampling_error", "bias", "elbo", "untrusted")
OBJECTIVES: dict[str, Callable[[int], Any]] = {
    "VAE": lambda k: Trace_ELBO(num_particles=k, vectorize_particles=True),
    "IWAE": pv.ImportanceWeighted,
    "DReG": pv.DReG,
}


def stages(epoch: int, epochs: int) -> float:
    """The paper's schedule, 3^i epochs at 10^(-i/7) for i = 0..7, stretched to so many epochs."""
    # The first i stages take (3^i - 1) / 2 of the 3,280 epochs.
    stage = min(int(math.log(2 * 3280 * epoch / epochs + 1, 3) + 1e-9), 7)
    return round(10 ** (1 - stage / 7), 1) / 10


def tanh_mlp(in_dim: int, out: tuple[int, int], *, hidden_dims: Sequence[int]) -> nn.Module:
    """Tanh layers as the authors start them: Glorot's uniform weights, biases 0."""
    network = pv.networks.mlp(in_dim, out, hidden_dims=hidden_dims, activation=nn.Tanh)
    *others, last, bias = network.parameters()
    # Each parameter of a distribution has a last layer of its own there.
    for start in (*others, bias, *last.data.chunk(out[0])):
        _ = nn.init.zeros_(start) if start.dim() == 1 else nn.init.xavier_uniform_(start)
    return network


def adamw(params: list[Tensor], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam, with decoupled decay of what is no bias."""
    decay = {"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay}
    others = {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([decay, others], lr=lr, fused=True)


class Recipe(NamedTuple):
    """How the networks look and how they are trained."""

    network: Callable[..., nn.Module]
    hidden_dims: tuple[tuple[int, ...], ...]  # of each layer, from the data upwards
    epochs: int
    batch_size: int
    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Callable[..., float]  # factor of the learning rate, by epoch and epochs
    words: str
    warmup: float = 0.0  # the part of the epochs after which the KL weight is 1
    family: Callable[[Tensor], Any] = pv.families.normal
    autocast: torch.dtype | None = None  # in which the networks multiply while they are trained


RECIPES = {
    "paper": Recipe(
        network=tanh_mlp,
        hidden_dims=((200, 200), (100, 100)),
        epochs=3280,
        batch_size=20,
        optimizer=partial(torch.optim.Adam, lr=1e-3, eps=1e-4, fused=True),
        schedule=stages,
        words="tanh layers, Glorot's weights, scales exp(.); Adam, eps 1e-4, stages 1e-3 to 1e-4",
        family=partial(pv.families.normal, to_scale=torch.exp),
    ),
    "ours": Recipe(
        network=pv.networks.gated_mlp,
        hidden_dims=((300, 300), (100, 100)),
        epochs=500,
        batch_size=100,
        optimizer=partial(adamw, lr=1e-3, weight_decay=0.1),
        schedule=lambda epoch, epochs: (1 + math.cos(math.pi * epoch / epochs)) / 2,
        words="gated layers, scales softplus(.); Adam, 1e-3 by a cosine, decoupled decay 0.1 of "
        "weights, a tenth of KL warm-up",
        warmup=0.1,
    ),
}


class Generative(PyroModule):
    """p(z_L) p(z_{L-1}|z_L) ... p(x|z_1)."""

    def __init__(self, prior: nn.Module, conditionals: Sequence[nn.Module]) -> None:
        super().__init__()
        self.prior = prior
        self.conditionals = nn.ModuleList(conditionals)  # the topmost first, p(x|z_1) last

    def forward(self, x: Tensor) -> None:
        """Score data ``(B, D)``."""
        *below, likelihood = self.conditionals
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample(f"z{len(self.conditionals)}", self.prior())
            for level, conditional in zip(range(len(below), 0, -1), below, strict=True):
                z = pyro.sample(f"z{level}", conditional(z))
            pyro.sample("x", likelihood(z), obs=x)


class Recognition(PyroModule):
    """q(z_1|x) q(z_2|z_1) ... q(z_L|z_{L-1})."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, x: Tensor) -> None:
        """Draw z_1, then z_2, ..."""
        with pyro.plate("data", len(x), dim=-1):
            for level, encoder in enumerate(self.encoders, start=1):
                x = pyro.sample(f"z{level}", encoder(x))


def build(mean: Tensor, latent_dims: Sequence[int], recipe: Recipe) -> tuple[Any, Any]:
    """The pair, z_1 first; its decoder starts at the mean of the training data ``(D,)``."""
    conditional = partial(pv.Conditional, autocast=recipe.autocast)

    def normal(here: int, there: int, hidden: tuple[int, ...]) -> pv.Conditional:
        return conditional(recipe.network(here, (2, there), hidden_dims=hidden), recipe.family)

    steps = list(zip(pairwise([len(mean), *latent_dims]), recipe.hidden_dims, strict=False))
    upwards = [normal(low, high, hidden) for (low, high), hidden in steps]
    downwards = [normal(high, low, hidden) for (low, high), hidden in steps[:0:-1]]
    out = recipe.network(latent_dims[0], (1, len(mean)), hidden_dims=recipe.hidden_dims[0])
    [*out.parameters()][-1].data.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())  # its bias
    downwards.append(conditional(out, pv.families.bernoulli))
    return Generative(pv.priors.StandardNormal(latent_dims[-1]), downwards), Recognition(upwards)


def divided(data: pv.Split) -> pv.Split:
    """The parts of the protocol: all but 400 of MNIST's images train."""
    both = torch.cat([data.train, data.valid])
    done = ("the last 400 training images are the validation part",)
    parts = {"train": both[:-400], "valid": both[-400:], "source": None, "preparation": done}
    return dataclasses.replace(data, labels=None, **parts) if data.name == "mnist" else data


class Variant(NamedTuple):
    """One training, a line of the table."""

    layers: int
    objective: str
    k: int
    seed: int

    @property
    def name(self) -> str:
        """What its row is called."""
        said = f"{self.layers} layer" + "s" * (self.layers > 1)
        return f"{said}, {self.objective}, k = {self.k}" + f", seed {self.seed}" * (self.seed > 0)


def measured(variant: Variant, raw: pv.Split, args: Any, seconds: float) -> dict[str, Any]:
    """Train as far as the time goes, judge, and count active units: the figures of a row."""
    data = raw if raw.num_levels is None else raw.binarize_dynamic(variant.seed)
    out, more = args.out / "_".join(map(str, variant)), variant.k > 1
    torch.manual_seed(variant.seed)
    recipe = args.recipe._replace(autocast=torch.bfloat16 if args.bfloat16 and more else None)
    model, guide = build(data.train.mean(0), args.latent_dims[-variant.layers :], recipe)
    shared: Any = {"model": model, "guide": guide, "data": data}
    shared |= {"seed": variant.seed, "device": args.device}
    epochs, rate, warmup = args.epochs, 1.0, max(1, round(recipe.warmup * args.epochs))
    if args.after_vae and more:
        epochs, rate, warmup = args.after_vae, 0.5, 1
        pv.load(args.out / f"{variant.layers}_VAE_1_{variant.seed}", model=model, guide=guide)
    facts = {"of_epochs": epochs, **variant._asdict()}
    try:
        history = pv.fit(
            loss=OBJECTIVES[variant.objective](variant.k),
            optimizer=recipe.optimizer,
            lr_schedule=lambda o: LambdaLR(o, lambda e: rate * recipe.schedule(e, epochs)),
            kl_weight=pv.warmup(warmup),
            epochs=epochs,
            batch_size=recipe.batch_size,
            max_seconds=seconds,
            out=out,
            resume=(out / "config.json").is_file(),
            pictures=False,
            **shared,
        )
    except pv.DivergedError as error:
        print(error, flush=True)
        done = len((out / "metrics.jsonl").read_text().splitlines())
        return {"diverged": True, "finished": True, "epochs": done, **facts}
    pv.evaluate_run(out, num_particles=args.num_particles, budget=0, **shared)
    judged = json.loads((out / "evidence.json").read_text())
    parts = pv.elbo_parts(model, guide, data.test[:: -(-len(data.test) // 1000)], num_particles=10)
    return {
        **{key: judged[key] for key in KEPT},
        "active_units": parts.active_units,
        "as_reported": REPORTED.get((raw.name, *variant[:2]), {}).get(variant.k),
        "best_epoch": history.best_epoch,
        "epochs": len(history.records),
        "finished": history.stopped != "time",
        "train_seconds": history["seconds"][-1],
        **facts,
    }


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Log p(x) and active units against k, a column of panels for each number of layers."""
    depths = sorted({row["layers"] for row in rows})
    figure = Figure(figsize=(4.5 * len(depths), 6), layout="constrained")
    panels: Any = figure.subplots(2, len(depths), sharex=True, squeeze=False)
    for (top, low), depth in zip(panels.T, depths, strict=True):
        for i, objective in enumerate(OBJECTIVES):
            own = [r for r in rows if (r["layers"], r["objective"]) == (depth, objective)]
            own = sorted((r for r in own if "active_units" in r), key=lambda row: row["k"])
            ks = [row["k"] for row in own]
            top.plot(ks, [r["log_evidence"] for r in own], f"C{i}o-", label=objective * bool(own))
            top.plot(ks, [r.get("as_reported", math.nan) for r in own], f"C{i}x", ms=8)
            low.plot(ks, [sum(row["active_units"].values()) for row in own], f"C{i}o-")
        top.set(title=f"layers: {depth}; crosses as reported", ylabel="log p(x), nats per image")
        low.set(xlabel="k", ylabel="active units", xscale="log", ylim=(0, 1.1 * low.get_ylim()[1]))
        low.set_xticks(seen := sorted({row["k"] for row in rows}), [*map(str, seen)])
        top.legend()
    figure.savefig(path, dpi=150)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, beside what was reported."""
    lines = [f"{'nats per image':24}  ELBO     log p(x)         reported  active    epochs"]
    for row in rows:
        units = " + ".join(map(str, row.get("active_units", {}).values()))
        ended = f"{row['epochs']} of {row['of_epochs']}" + ", diverged" * ("diverged" in row)
        value = f"{row['elbo']:8.2f}{row['log_evidence']:10.3f} +- {row['mean_standard_error']:.3f}"
        lines.append(f"{row['name']:24}{value}{row.get('as_reported', ''):>9}  {units:8}  {ended}")
    return "\n".join(lines)


def main() -> None:
    """Train, judge, tabulate and draw what is not done yet."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", choices=["digits", "binarized_mnist", "mnist"])
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/iwae"), help="goes on if there")
    parser.add_argument("--recipe", default="paper", choices=list(RECIPES))
    parser.add_argument("--epochs", type=int, help="by default the recipe's: 3280, ours 500")
    parser.add_argument("--after-vae", type=int, default=0, metavar="E", help="0: from scratch")
    parser.add_argument("--bfloat16", action="store_true", help="train what takes more draws in it")
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes, shared")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 5, 50], help="numbers of draws")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--num-particles", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: few data, tiny networks")
    args = parser.parse_args()
    if min(*args.ks, args.num_particles - 1, args.after_vae + 1) < 1 or not args.budget > 0:
        parser.error("expected --ks >= 1, --after-vae >= 0, --num-particles >= 2, --budget > 0")
    name, args.recipe, args.latent_dims = args.recipe, RECIPES[args.recipe], [100, 50]
    data = divided(pv.load_data(args.data, root=args.root))
    if args.smoke:
        args.recipe = args.recipe._replace(hidden_dims=((8,), (8,)), batch_size=50)
        args.latent_dims, args.ks, args.epochs, args.num_particles = [3, 2], [1, 3], 2, 20
        parts = {part: getattr(data, part)[:500] for part in ("train", "valid", "test")}
        data = dataclasses.replace(data, source=None, labels=None, **parts)
    args.epochs = args.recipe.epochs if args.epochs is None else args.epochs
    results = pv.Results(
        args.out / "results.json",
        title=f"Importance weighted autoencoders: {data.name}",
        protocol={
            "data": data.summary() + " Binarized afresh in every minibatch; validation and test "
            "data once, under each seed." * (data.num_levels is not None),
            "model": f"{args.latent_dims[-1]} latents in one layer, {args.latent_dims} in two, "
            f"hidden layers {args.recipe.hidden_dims} from the data up; N(0, I) at the top, "
            "diagonal normals, Bernoulli likelihood that starts at the mean of the training data",
            "recipe": f"{name}{', bfloat16 for k > 1' * args.bfloat16}: {args.recipe.words}; "
            f"batch {args.recipe.batch_size}, parameters of the best validation bound",
            "epochs": f"{args.epochs:,}"
            + f", then {args.after_vae} of more draws at half the rate" * (args.after_vae > 0),
            "evaluation": f"{args.num_particles} importance weights from the guide, whole test set",
            "active units": "posterior means of variance surely above 0.01, up to 1,000 test data",
        },
        device=args.device,
    )
    every = [Variant(*v) for v in product(args.layers, args.objectives, args.ks, args.seeds)]
    vaes = [variant._replace(objective="VAE", k=1) for variant in every]
    # The IWAE of one draw is the VAE, which --after-vae needs in any case.
    every = [v if v[1:3] != ("IWAE", 1) else vae for v, vae in zip(every, vaes, strict=True)]
    every = dict.fromkeys(vaes + every if args.after_vae else every)
    left = [v for v in every if v.name not in {r["name"] for r in results.rows if r["finished"]}]
    end = time.monotonic() + max(60 * args.budget, 1.0)  # judging counts too
    for done, variant in enumerate(left):
        vae = variant._replace(objective="VAE", k=1).name
        ended = {row["name"]: row for row in results.rows if row["finished"] and "elbo" in row}
        if (after := args.after_vae and variant.k > 1) and vae not in ended:
            print(f"{variant.name}: left out until {vae} has come to its end", flush=True)
            continue
        seconds = (end - time.monotonic()) / (len(left) - done)
        print(f"{variant.name}{'...' if seconds > 0 else ': no time left; call again'}", flush=True)
        if seconds > 0:
            before = {k: ended[vae][k] for k in ("epochs", "train_seconds") if after}
            results.put(variant.name, before=before, **measured(variant, data, args, seconds))
    by = "Burda et al. (static, k = 50: pythae; theirs -87.10), 5,000 particles; DReG: nbip/IWAE"
    tables = [(n, what, row) for (name, n, what), row in REPORTED.items() if name == data.name]
    told = {Variant(n, what, k, 0).name: of for n, what, row in tables for k, of in row.items()}
    results.note(reported_by=by, as_reported=told)  # what was not run has a line too
    # What diverged has no figures, nor has what leaves a datum without any weight.
    rows = [{k: v for k, v in row.items() if v is not None} for row in results.rows]
    rows = [dict.fromkeys(KEPT, math.nan) | row for row in rows]
    picture(rows, args.out / "iwae.png")
    print(f"{table(rows)}\nfigures: {results.path}; picture: {args.out / 'iwae.png'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"iwae.py: {error}") from None
