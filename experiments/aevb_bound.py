"""The bound against the number of training samples: figure 2 of "Auto-Encoding Variational Bayes".

Kingma and Welling (2014) train MNIST with 3, 5, 10, 20 and 200 latents and Frey Faces with 2, 5, 10
and 20 by AEVB and by wake-sleep, and draw the bound of training and test data. Here AEVB stands
twice, with the KL in closed form (their second estimator) and with all terms by Monte Carlo (their
first), and what the closed form gains in the variance of the encoder's gradient is measured along
training, on one minibatch.

Their protocol: one hidden layer of tanh units, 500 for MNIST and 200 for Frey Faces, Adagrad with
the best of the steps 0.01, 0.02 and 0.1 in the first steps, minibatches of 100, one draw a datum,
a prior N(0, I) of the decoder's weights, initial weights N(0, 0.01) (taken as a variance); for Frey
Faces a normal decoder with means in (0, 1) and a log-variance head. The paper gives a Bernoulli the
grey levels of MNIST as they are, which is no density: its figure bounds no log p(x). Here MNIST is
binarized, each pixel drawn once in proportion to its level, and Frey Faces are dequantized to a
density on [0, 1], so that each figure is a bound; --intensities takes the grey levels as the paper
does.

    python experiments/aevb_bound.py --root ../shared/data --out runs/aevb_bound --device cuda
    python experiments/aevb_bound.py --root ../shared/data --epochs 20 --budget 60
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv

SAMPLES = 1e8  # where the paper's curves end
BATCH = 100
METHODS: dict[str, Callable[[], Any]] = {
    "AEVB": TraceMeanField_ELBO,
    "AEVB, all by Monte Carlo": Trace_ELBO,
    "wake-sleep": pv.WakeSleep,
}
COLOURS = dict(zip(METHODS, ("tab:blue", "tab:green", "tab:red"), strict=True))
REPORTED = {
    "figure 2, MNIST": "-150 to -100 nats on the axis, AEVB above wake-sleep throughout",
    "figure 2, Frey Faces": "0 to 1600 nats of a density on the axis, AEVB above wake-sleep",
}


def sigmoid_normal(params: Tensor) -> Any:
    """The paper's decoder for Frey Faces: normals with means in (0, 1), and log-variances."""
    loc, log_variance = params.unbind(-2)
    return dist.Normal(loc.sigmoid(), pv.families.exp_half(log_variance)).to_event(1)


class Panel(NamedTuple):
    """One data set of the figure, and what the paper uses and draws for it."""

    data: str
    prepare: Callable[[pv.Split], pv.Split]
    family: Callable[[Tensor], Any]
    num_params: int
    hidden: int
    latent_dims: tuple[int, ...]
    limits: tuple[float, float] | None = None  # of the paper's axis, in nats


bits = partial(
    Panel, prepare=lambda raw: raw.binarize_static(), family=pv.families.bernoulli, num_params=1
)
greys = partial(Panel, prepare=lambda raw: raw.dequantize(), family=sigmoid_normal, num_params=2)
PANELS = {
    "mnist": bits("mnist", hidden=500, latent_dims=(3, 5, 10, 20, 200), limits=(-150, -85)),
    "frey_faces": greys("frey_faces", hidden=200, latent_dims=(2, 5, 10, 20), limits=(0, 1600)),
    "digits": bits("digits", hidden=100, latent_dims=(2, 5)),
    "grey_digits": greys("digits", hidden=100, latent_dims=(2, 5)),
}


def watched(data: pv.Split) -> pv.Split:
    """The data with the test part in the place of the validation part: nothing is chosen by it."""
    return dataclasses.replace(data, valid=data.test, labels=None, source=None)


def build(panel: Panel, dim: int, latent_dim: int, hidden: int, seed: int) -> tuple[Any, Any]:
    """The paper's pair, with weights N(0, 0.01)."""
    inward = pv.networks.mlp(dim, (2, latent_dim), hidden_dims=(hidden,), activation=nn.Tanh)
    out = (panel.num_params, dim)
    outward = pv.networks.mlp(latent_dim, out, hidden_dims=(hidden,), activation=nn.Tanh)
    to_normal = partial(pv.families.normal, to_scale=pv.families.exp_half, min_scale=0.0)
    likelihood = pv.Conditional(outward, panel.family)
    model = pv.Model(pv.priors.StandardNormal(latent_dim), likelihood)
    guide = pv.Guide(pv.Conditional(inward, to_normal))
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*model.parameters(), *guide.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model, guide


def adagrad(model: nn.Module, guide: nn.Module, step: float, size: int) -> Any:
    """Makes the optimizer: N(0, I) over the decoder's weights counts once in an epoch."""
    groups = [
        {"params": [*model.parameters()], "weight_decay": BATCH / size},
        {"params": [*guide.parameters()]},
    ]
    return lambda _: torch.optim.Adagrad(groups, lr=step)


def chosen_step(
    make: Callable[[], tuple[Any, Any]], loss: Any, data: pv.Split, steps: list[float], count: int
) -> float:
    """The step size whose bound is best at the end of the first minibatches."""
    if len(steps) == 1:
        return steps[0]
    last = max(count // 4, 1)
    found, refresh = {}, data.refresh or (lambda x: x)
    for step in steps:
        model, guide = make()
        optimizer = adagrad(model, guide, step, len(data.train))
        svi = pv.SVI(model, guide, optimizer, loss(), compile=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            order = torch.randint(len(data.train), (count, BATCH))
            terms = [svi.update(refresh(data.train[rows])) for rows in order]
        bound = -sum((t.distortion + t.rate).item() for t in terms[-last:])
        found[step] = bound if math.isfinite(bound) else -math.inf
    return max(found, key=lambda step: found[step])


def gradient_variance(
    loss: Any, model: Any, guide: Any, x: Tensor, params: list[Tensor], draws: int
) -> float:
    """The variance of a gradient over draws of its noise, summed over its entries."""
    found = []
    for _ in range(draws):
        gradient = torch.autograd.grad(loss.differentiable_loss(model, guide, x), params)
        found.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(found).var(0).sum().item()


class Noise:
    """Measures, after epochs 1, 2, 4, 8..., the variance of the encoder's gradient.

    Of the decoder's gradient both estimators have the same.
    """

    def __init__(self, path: Path, model: Any, guide: Any, x: Tensor, draws: int) -> None:
        self.path, self.pair, self.x, self.draws = path, (model, guide), x, draws
        self.found: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, record: dict[str, Any]) -> None:
        """Measure if it is time."""
        epoch = record["epoch"]
        if epoch & (epoch - 1):
            return
        params = [*self.pair[1].parameters()]
        x = self.x.to(params[0].device)
        with torch.random.fork_rng():  # training goes on with its own noise
            torch.manual_seed(epoch)
            self.found[str(epoch)] = [
                gradient_variance(loss, *self.pair, x, params, self.draws)
                for loss in (Trace_ELBO(), TraceMeanField_ELBO())
            ]
        self.path.write_text(json.dumps(self.found))


def thinned(history: pv.History, size: int) -> dict[str, list[float]]:
    """At most some hundred points of the curves, evenly on the logarithmic axis."""
    count = len(history.records)
    epochs = sorted({round(count ** (i / 100)) for i in range(101)})
    rows = [history.records[epoch - 1] for epoch in epochs]
    curves = {"train": [r["elbo"] for r in rows], "test": [r["valid_elbo"] for r in rows]}
    return {"samples": [row["epoch"] * size for row in rows], **curves}


def picture(results: pv.Results, facts: dict[str, Any], names: list[str], path: Path) -> None:
    """A row of panels for each data set, and what the closed form gains at the end of the row."""
    rows = results.rows
    columns = 1 + max(len({r["latent_dim"] for r in rows if r["data"] == name}) for name in names)
    figure = Figure(figsize=(2.6 * columns, 2.7 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for name, line in zip(names, grid, strict=True):
        mine = [row for row in rows if row["data"] == name]
        latents = sorted({row["latent_dim"] for row in mine})
        for axes, latent_dim in zip(line, latents, strict=False):
            axes.set_visible(True)
            for row in (row for row in mine if row["latent_dim"] == latent_dim):
                curve = facts["curves"][row["name"]]
                colour, first = COLOURS[row["method"]], row["seed"] == mine[0]["seed"]
                label = row["method"] if first else None
                axes.plot(curve["samples"], curve["train"], "-", color=colour, label=label)
                axes.plot(curve["samples"], curve["test"], "--", color=colour)
            axes.set_title(f"{name}, {latent_dim} latents", fontsize=9)
            axes.set_ylim(PANELS[name].limits)
        line[0].set_ylabel("bound, nats per datum")
        line[0].legend(fontsize=6, title="train (dashed: test)", title_fontsize=6)
        line[-1].set_visible(True)
        for row in mine:
            found = facts["gradient_variance"].get(row["name"])
            if found:
                samples = [row["num_train"] * int(epoch) for epoch in found]
                label = f"{row['latent_dim']} latents"
                line[-1].plot(samples, [a / b for a, b in found.values()], ".-", label=label)
        line[-1].axhline(1.0, color="grey", linewidth=0.8)
        line[-1].set_ylabel("variance, Monte Carlo / closed form", fontsize=7)
        line[-1].set_title("gradient of the encoder", fontsize=9)
        if line[-1].get_legend_handles_labels()[0]:
            line[-1].legend(fontsize=6)
        for axes in line:
            axes.set(xscale="log", xlabel="training samples evaluated")
            axes.xaxis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train every method with every number of latents, as far as the budget goes, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["mnist", "frey_faces"], choices=[*PANELS])
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--intensities", action="store_true", help="grey levels as in the paper")
    parser.add_argument("--out", type=Path, default=Path("runs/aevb_bound"))
    parser.add_argument("--epochs", type=int, help="by default so many as make 10^8 samples")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="minutes of training in this call"
    )
    parser.add_argument("--latent-dims", type=int, nargs="+", help="the paper's by default")
    parser.add_argument("--hidden", type=int, help="hidden units; the paper's by default")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--steps", type=float, nargs="+", default=[0.01, 0.02, 0.1])
    parser.add_argument("--pilot", type=int, default=100, help="minibatches that choose the step")
    parser.add_argument("--draws", type=int, default=20, help="of each gradient, for its variance")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: digits, tiny networks")
    args = parser.parse_args()
    if args.smoke:
        args.data, args.latent_dims, args.hidden, args.epochs = ["grey_digits"], [2], 8, 2
        args.pilot, args.draws = 3, 4

    sets = {}
    for name in args.data:
        raw = pv.load_data(PANELS[name].data, root=args.root)
        sets[name] = raw.intensities() if args.intensities else PANELS[name].prepare(raw)
        print(sets[name].summary())
    wanted = {n: args.epochs or math.ceil(SAMPLES / len(d.train)) for n, d in sets.items()}
    results = pv.Results(
        args.out / "results.json",
        title="The bound against the number of training samples",
        protocol={
            "data": " ".join(data.summary() for data in sets.values()),
            "epochs": str(wanted),
            "model": "N(0, I) prior, one hidden layer of tanh units on each side "
            + ", ".join(f"({name}: {args.hidden or PANELS[name].hidden})" for name in sets)
            + ", diagonal normal guide; Bernoulli decoder for bits, else a normal with means in "
            "(0, 1) and a log-variance head; initial weights N(0, 0.01)",
            "training": f"Adagrad, the best of the steps {args.steps} in {args.pilot} minibatches, "
            f"batch {BATCH}, one draw, prior N(0, I) of the decoder's weights",
            "figures": "training bound: mean over the epoch; test bound: at its end, one draw; "
            f"variance of the encoder's gradient on {BATCH} test data, {args.draws} draws",
        },
        device=args.device,
    )
    results.note(as_reported=REPORTED)
    kept = json.loads(results.path.read_text())
    facts = {key: kept.get(key, {}) for key in ("curves", "gradient_variance")}
    jobs = [
        (name, latent_dim, method, seed)
        for seed in args.seeds
        for name in sets
        for latent_dim in args.latent_dims or PANELS[name].latent_dims
        for method in args.methods
    ]
    pending = []
    for job in jobs:
        label = f"{job[0]}, {job[1]} latents, {job[2]}, seed {job[3]}"
        if label not in results or results[label]["epochs"] < wanted[job[0]]:
            pending.append((label, *job))
    left = 60 * args.budget
    for number, (label, name, latent_dim, method, seed) in enumerate(pending):
        panel, data, loss = PANELS[name], watched(sets[name]), METHODS[method]
        make = partial(build, panel, data.dim, latent_dim, args.hidden or panel.hidden, seed)
        known = results[label]["step"] if label in results else None
        step = known or chosen_step(make, loss, data, args.steps, args.pilot)
        run = args.out / f"{name}-{latent_dim}-{[*METHODS].index(method)}-seed{seed}"
        model, guide = make()
        noise = Noise(run.with_suffix(".json"), model, guide, data.test[:BATCH], args.draws)
        began = time.perf_counter()
        try:
            history = pv.fit(
                model,
                guide,
                data,
                loss=loss(),
                optimizer=adagrad(model, guide, step, len(data.train)),
                epochs=wanted[name],
                batch_size=BATCH,
                seed=seed,
                max_seconds=max(left, 0.001) / (len(pending) - number),
                out=run,
                resume=(run / "config.json").is_file(),
                device=args.device,
                callbacks=[noise] if method == "AEVB" else [],
                pictures=False,
            )
        except pv.DivergedError as error:  # the others go on
            print(f"{label}: {error}")
            continue
        left -= time.perf_counter() - began
        done, last = len(history.records), history.records[-1]
        facts["curves"][label] = thinned(history, len(data.train))
        facts["gradient_variance"] |= {label: noise.found} if noise.found else {}
        results.note(**facts)
        gain = [a / b for a, b in noise.found.values()]
        results.put(
            label,
            data=name,
            latent_dim=latent_dim,
            method=method,
            seed=seed,
            step=step,
            num_train=len(data.train),
            epochs=done,
            of_epochs=wanted[name],
            train_bound=last["elbo"],
            test_bound=last["valid_elbo"],
            seconds_per_epoch=last["seconds"] / done,
            **({"variance_gain_first": gain[0], "variance_gain_last": gain[-1]} if gain else {}),
        )
        bounds = f"{last['elbo']:.2f} training, {last['valid_elbo']:.2f} test, nats per datum"
        print(f"{label}: {bounds}, after {done} of {wanted[name]} epochs")
    drawn = [name for name in sets if any(row["data"] == name for row in results.rows)]
    picture(results, facts, drawn, args.out / "aevb_bound.png")
    print(f"figures: {results.path}; picture: {args.out / 'aevb_bound.png'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"aevb_bound: {error}") from None
