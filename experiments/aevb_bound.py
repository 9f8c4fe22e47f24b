"""The bound against the number of training samples: figure 2 of "Auto-Encoding Variational Bayes".

Kingma and Welling (2014) train MNIST with 3, 5, 10, 20 and 200 latents and Frey Faces with 2, 5, 10
and 20 by AEVB and by wake-sleep, and draw the bound of training and test data. Here AEVB stands
twice, with the KL in closed form (their second estimator) and with all terms by Monte Carlo (their
first), and what the closed form gains in the variance of the encoder's gradient (the decoder's is
the same) is measured along training, on one minibatch.

Their protocol: one hidden layer of tanh units, 500 for MNIST and 200 for Frey Faces, Adagrad with
the best of the steps 0.01, 0.02 and 0.1 in the first steps, minibatches of 100, one draw a datum,
a prior N(0, I) of the decoder's weights, initial weights N(0, 0.01) (taken as a variance); for Frey
Faces a normal decoder with means in (0, 1) and a log-variance head. The paper gives a Bernoulli the
grey levels of MNIST as they are, which is no density: its figure bounds no log p(x). Here MNIST is
binarized, each pixel drawn once in proportion to its level, and Frey Faces are dequantized to a
density on [0, 1], so that each figure is a bound; --intensities takes the grey levels as they do.
Errors of bounds: of the draws (standard error), and of data with their draws (sampling error).

    python experiments/aevb_bound.py --root FOLDER --device cuda
    python experiments/aevb_bound.py --root FOLDER --epochs 20 --budget 60 --out runs/20_epochs
"""

import argparse
import json
import math
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv

SAMPLES = 1e8  # where the paper's curves end
BATCH = 100
PARTS = {"train": "elbo", "test": "valid_elbo"}
METHODS: dict[str, tuple[Callable[[], Any], str, float]] = {  # with their lines, wide ones behind
    "AEVB": (TraceMeanField_ELBO, "tab:blue", 1.2),
    "AEVB, all by Monte Carlo": (Trace_ELBO, "lightgreen", 4.0),
    "wake-sleep": (pv.WakeSleep, "tab:red", 1.2),
}
REPORTED = {
    "figure 2, MNIST": "-150 to -100 nats on the axis, AEVB above wake-sleep throughout",
    "figure 2, Frey Faces": "0 to 1600 nats of a density on the axis, AEVB above wake-sleep",
}


def sigmoid_normal(params: Tensor) -> Any:
    """The paper's decoder for Frey Faces: normals with means in (0, 1), and log-variances."""
    loc, log_variance = params.unbind(-2)
    return dist.Normal(loc.sigmoid(), pv.families.exp_half(log_variance)).to_event(1)


# The paper's axes: -150 to -100 nats, which bits leave on both sides, and 0 to 1600.
Panel = namedtuple("Panel", "family hidden latent_dims limits", defaults=[None])
PANELS = {
    "mnist": Panel(pv.families.bernoulli, 500, (3, 5, 10, 20, 200), (-180, -85)),
    "frey_faces": Panel(sigmoid_normal, 200, (2, 5, 10, 20), (0, 1600)),
    "digits": Panel(pv.families.bernoulli, 100, (2, 5)),
    "grey_digits": Panel(sigmoid_normal, 100, (2, 5)),
}


def build(panel: Any, dim: int, latent_dim: int, hidden: int, seed: int) -> tuple[Any, Any]:
    """The paper's pair, with weights N(0, 0.01)."""
    layers: dict[str, Any] = {"hidden_dims": (hidden,), "activation": nn.Tanh}
    to_normal = partial(pv.families.normal, to_scale=pv.families.exp_half, min_scale=0.0)
    encoder = pv.Conditional(pv.networks.mlp(dim, (2, latent_dim), **layers), to_normal)
    heads = 2 if panel.family is sigmoid_normal else 1
    outward = pv.networks.mlp(latent_dim, (heads, dim), **layers)
    likelihood = pv.Conditional(outward, panel.family)
    model, guide = pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*model.parameters(), *guide.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model, guide


def adagrad(model: nn.Module, guide: nn.Module, step: float, size: int) -> Any:
    """Makes the optimizer: N(0, I) over the decoder's weights counts once in an epoch."""
    groups = [{"params": [*model.parameters()], "weight_decay": BATCH / size}]
    return lambda _: torch.optim.Adagrad([*groups, {"params": [*guide.parameters()]}], lr=step)


def chosen_step(make: Any, loss: Any, data: pv.Split, steps: list[float], count: int) -> float:
    """The step size whose bound is best at the end of the first minibatches."""
    found, refresh = dict.fromkeys(steps, -math.inf), data.refresh or (lambda x: x)
    for step in steps if len(steps) > 1 else ():
        pair: tuple[Any, Any] = make()
        svi = pv.SVI(*pair, adagrad(*pair, step, len(data.train)), loss(), compile=False)
        with torch.random.fork_rng(), pyro.validation_enabled(is_validate=data.is_density):
            torch.manual_seed(0)
            order = torch.randint(len(data.train), (count, BATCH))
            with suppress(pv.DivergedError):
                terms = [svi.update(refresh(data.train[rows])) for rows in order]
                last = terms[-max(count // 4, 1) :]
                found[step] = -sum((t.distortion + t.rate).item() for t in last)
    return max(found, key=lambda step: found[step] if math.isfinite(found[step]) else -math.inf)


def noise(model: Any, guide: Any, data: pv.Split, draws: int, seed: int) -> list[float]:
    """Variances of the encoder's gradient without and with the closed form; error of a / b."""
    params, squares = [*guide.parameters()], []
    x = data.test[:BATCH].to(params[0].device)
    # Training goes on with its own noise.
    with torch.random.fork_rng(), pyro.validation_enabled(is_validate=data.is_density):
        torch.manual_seed(seed)
        for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
            bounds = (loss.differentiable_loss(model, guide, x) for _ in range(draws))
            found = [torch.autograd.grad(bound, params) for bound in bounds]
            rows = torch.stack([torch.cat([g.flatten() for g in of_draw]) for of_draw in found])
            squares.append((rows - rows.mean(0)).double().square().sum(1) * draws / (draws - 1))
    a, b = (away.mean().item() for away in squares)
    errors = ((away.std() / away.mean()).item() / draws**0.5 for away in squares)
    return [a, b, a / b * math.hypot(*errors)]


def with_errors(bound: float, model: Any, guide: Any, x: Tensor, size: int) -> dict[str, float]:
    """The bound of so many data with a draw each; errors of the draws, and of data with draws."""
    log_w = pv.log_weights(model, guide, x, num_particles=2).double()
    variances = {"standard_error": log_w.var(0).mean(), "sampling_error": log_w.flatten().var()}
    return {"value": bound} | {k: (v / size).sqrt().item() for k, v in variances.items()}


def thinned(records: list[dict[str, Any]], size: int) -> dict[str, list[float]]:
    """At most some hundred points of the curves, evenly on the logarithmic axis."""
    epochs = {round(len(records) ** (i / 100)) for i in range(101)}
    rows = [row for row in records if row["epoch"] in epochs]
    curves = {key: [row[of] for row in rows] for key, of in PARTS.items()}
    return {"samples": [row["epoch"] * size for row in rows], **curves}


def without_latents(panel: Any, data: pv.Split) -> float:
    """The highest test bound that the family reaches without latents: each dimension fitted."""
    mean, scale = data.test.mean(0).clamp(1e-6, 1 - 1e-6), data.test.std(0, unbiased=False)
    params = torch.stack([mean.logit(), 2 * scale.log()][: 1 + (panel.family is sigmoid_normal)])
    with pyro.validation_enabled(is_validate=data.is_density):
        return panel.family(params).log_prob(data.test).mean().item()


def advantages(rows: list[dict[str, Any]], curves: dict[str, Any]) -> dict[str, Any]:
    """AEVB's nats above wake-sleep where the shorter curve ends; errors as if of unlike data."""
    found, there = {}, {row["name"]: row for row in rows if "diverged" not in row}
    for name in (name for name, row in there.items() if row["method"] == "AEVB"):
        pair = [name, name.replace(", AEVB,", ", wake-sleep,")]
        if pair[1] in there:
            found[name] = facts = {}
            x = min(curves[n]["samples"][-1] for n in pair)
            for part in PARTS:
                a, b = (float(np.interp(x, curves[n]["samples"], curves[n][part])) for n in pair)
                error = math.hypot(*(there[n][f"{part}_bound"]["sampling_error"] for n in pair))
                facts[part] = {"value": a - b, "standard_error": error}
    return found


def picture(rows: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    """A row of panels for each data set, and what the closed form gains at the end of the row."""
    names = dict.fromkeys(row["data"] for row in rows)
    latents = {n: sorted({r["latent_dim"] for r in rows if r["data"] == n}) for n in names}
    shape = len(latents), 1 + max(map(len, latents.values()))
    figure = Figure(figsize=(2.6 * shape[1], 2.7 * shape[0]), layout="constrained")
    grid = dict(zip(latents, figure.subplots(*shape, squeeze=False), strict=True))
    for name, line in grid.items():
        for axes in line:
            axes.set(xscale="log", xlabel="training samples evaluated")
            axes.xaxis.set_minor_formatter("")  # minor ticks, without labels
            axes.set_visible(axes in (*line[: len(latents[name])], line[-1]))
        line[-1].axhline(1.0, color="grey", linewidth=0.8)
        line[-1].set_title("gradient of the encoder:\nvariance by MC / closed form", fontsize=8)
        line[0].set_ylabel("bound, nats per datum")
    for row in rows:
        name, line, curve = row["data"], grid[row["data"]], facts["curves"][row["name"]]
        axes, of = line[latents[name].index(row["latent_dim"])], f"{row['latent_dim']} latents"
        x, (_, colour, width) = curve["samples"], METHODS[row["method"]]
        label = row["method"] if row["seed"] == rows[0]["seed"] else None
        axes.plot(x, curve["train"], color=colour, lw=width, zorder=-width, label=label)
        axes.plot(x, curve["test"], "--", color=colour, lw=width, zorder=-width)
        axes.set(ylim=PANELS[name].limits, title=f"{name}, {of}")
        if found := facts["gradient_variance"].get(row["name"]):
            samples = [row["num_train"] * int(epoch) for epoch in found]
            gains = [a / b for a, b, *_ in found.values()]
            errors = [error[0] if error else 0.0 for _, _, *error in found.values()]
            line[-1].errorbar(samples, gains, errors, fmt=".-", label=of)
            line[-1].legend(fontsize=6)
        line[0].legend(fontsize=6, title="train (dashed: test)", title_fontsize=6)
    figure.savefig(path, dpi=150)


class Training:
    """One of all: a method with a number of latents, on one data set."""

    def __init__(self, job: Any, args: Any, data: pv.Split, results: Any, facts: Any) -> None:
        name, latent_dim, self.method, self.seed = job
        self.args, self.data, self.results, self.facts = args, data, results, facts
        hidden = args.hidden or PANELS[name].hidden
        self.made = partial(build, PANELS[name], data.dim, latent_dim, hidden, self.seed)
        self.epochs = args.epochs or math.ceil(SAMPLES / len(data.train))
        self.label = "{}, {} latents, {}, seed {}".format(*job)
        self.run = args.out / f"{name}-{latent_dim}-{[*METHODS].index(self.method)}-seed{self.seed}"
        self.row: dict[str, Any] = {"data": name, "latent_dim": latent_dim, "method": self.method}
        self.row |= {"seed": self.seed, "epochs": 0}
        for row in (row for row in results.rows if row["name"] == self.label):
            self.row |= {k: of for k, of in row.items() if k not in ("name", "machine", "versions")}

    def ended(self) -> bool:
        """Whether there is nothing left to train."""
        return "diverged" in self.row or self.row["epochs"] >= self.epochs

    def train(self, seconds: float) -> None:
        """Train for so many seconds at most, and keep what came of it."""
        args, row, loss, size = self.args, self.row, METHODS[self.method][0], len(self.data.train)
        until = time.monotonic() + seconds
        step = row.get("step") or chosen_step(self.made, loss, self.data, args.steps, args.pilot)
        model, guide = self.made()

        def watch(record: dict[str, Any]) -> None:
            epoch = record["epoch"]
            if self.method == "AEVB" and epoch.bit_count() == 1:
                measured = noise(model, guide, self.data, args.draws, epoch)
                self.facts["gradient_variance"].setdefault(self.label, {})[str(epoch)] = measured
                self.results.note(**self.facts)

        # The test data stand in the place of the validation data, but choose no parameters.
        watched = replace(self.data, valid=self.data.test, labels=None, source=None)
        options: dict[str, Any] = {"batch_size": BATCH, "seed": self.seed, "out": self.run}
        options |= {"resume": (self.run / "config.json").is_file(), "device": args.device}
        options |= {"optimizer": adagrad(model, guide, step, size), "epochs": self.epochs}
        options |= {"max_seconds": max(until - time.monotonic(), 0.001), "callbacks": [watch]}
        try:
            records = pv.fit(model, guide, watched, loss=loss(), pictures=False, **options).records
        except pv.DivergedError as error:  # the others go on
            print(f"{self.label}: {error}")
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
            records, row["diverged"] = [json.loads(line) for line in lines], True
        self.facts["curves"][self.label] = thinned(records, size)
        self.results.note(**self.facts)
        row |= {"step": step, "num_train": size, "epochs": len(records), "of_epochs": self.epochs}
        if "diverged" in row:
            self.results.put(self.label, **row)
        else:
            row |= {"train_bound": records[-1]["elbo"], "test_bound": records[-1]["valid_elbo"]}
            row |= {"seconds_per_epoch": records[-1]["seconds"] / len(records)}
            self.judge(*pv.load(self.run, model=model, guide=guide, last=True))

    def judge(self, model: Any, guide: Any) -> None:
        """Add the errors to the row, and keep it."""
        row, data = self.row, self.data
        with torch.random.fork_rng(), pyro.validation_enabled(is_validate=data.is_density):
            torch.manual_seed(0)
            some = (data.refresh or (lambda x: x))(data.train[: len(data.test)])
            for part, x in (("train", some), ("test", data.test)):
                pair, size = (model, guide), len(getattr(data, part))
                row[f"{part}_bound"] = with_errors(row[f"{part}_bound"], *pair, x, size)
        if self.method == "AEVB":
            a, b, error = noise(model, guide, data, self.args.draws, 0)
            row["variance_gain"] = {"value": a / b, "standard_error": error}
        self.results.put(self.label, **row)
        said = ", ".join(f"{row[f'{part}_bound']['value']:.2f} {part}" for part in PARTS)
        print(f"{self.label}: {said} nats per datum, {row['epochs']} of {self.epochs} epochs")


def main() -> None:
    """Train every method with every number of latents, as far as the budget goes, and draw."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--data", nargs="+", default=["mnist", "frey_faces"], choices=[*PANELS])
    add("--root", help="folder of the data sets")
    add("--intensities", action="store_true", help="grey levels as in the paper")
    add("--out", type=Path, default=Path("runs/aevb_bound"))
    add("--epochs", type=int, help="by default so many as make 10^8 samples")
    add("--budget", type=float, default=math.inf, help="minutes of this call, with judging")
    add("--latent-dims", type=int, nargs="+", help="the paper's by default")
    add("--hidden", type=int, help="hidden units; the paper's by default")
    add("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    add("--steps", type=float, nargs="+", default=[0.01, 0.02, 0.1])
    add("--pilot", type=int, default=100, help="minibatches that choose the step")
    add("--draws", type=int, default=20, help="of each gradient, for its variance")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--device", default="auto")
    add("--smoke", action="store_true", help="seconds: digits, tiny networks")
    args = parser.parse_args()
    if args.smoke:
        args.data = ["digits" if args.intensities else "grey_digits"]
        args.latent_dims, args.hidden, args.epochs, args.pilot, args.draws = [2], 8, 2, 3, 4
    for name, least in {"epochs": 1, "hidden": 1, "pilot": 1, "draws": 2, "budget": 1e-6}.items():
        if (given := getattr(args, name)) is not None and not given >= least:
            raise ValueError(f"--{name}: expected at least {least}, got {given}.")
    sets = {}
    for name in args.data:
        raw = pv.load_data(name.removeprefix("grey_"), root=args.root)
        way = "dequantize" if PANELS[name].family is sigmoid_normal else "binarize_static"
        sets[name] = getattr(raw, "intensities" if args.intensities else way)()
        print(sets[name].summary())
    wanted = {n: args.epochs or math.ceil(SAMPLES / len(d.train)) for n, d in sets.items()}
    protocol = {
        "data": " ".join(data.summary() for data in sets.values()),
        "epochs": ", ".join(f"{epochs:,} ({name})" for name, epochs in wanted.items()),
        "model": "N(0, I) prior, one hidden layer of tanh units on each side "
        + ", ".join(f"({name}: {args.hidden or PANELS[name].hidden})" for name in sets)
        + ", diagonal normal guide; Bernoulli decoder for bits, else a normal with means in "
        "(0, 1) and a log-variance head; initial weights N(0, 0.01)",
        "training": f"Adagrad, the best of the steps {args.steps} in {args.pilot} minibatches, "
        f"batch {BATCH}, one draw, prior N(0, I) of the decoder's weights",
        "figures": "training bound: mean over the epoch; test bound: at its end, one draw; "
        f"variance of the encoder's gradient on {BATCH} test data, {args.draws} draws",
    }
    out, title = args.out / "results.json", "The bound against the number of training samples"
    results = pv.Results(out, title=title, protocol=protocol, device=args.device)
    facts = {k: json.loads(out.read_text()).get(k, {}) for k in ("curves", "gradient_variance")}
    jobs = [
        Training((name, latent_dim, method, seed), args, data, results, facts)
        for seed in args.seeds
        for name, data in sets.items()
        for latent_dim in args.latent_dims or PANELS[name].latent_dims
        for method in args.methods
    ]
    until = time.monotonic() + 60 * args.budget
    pending = [job for job in jobs if not job.ended()]
    for number, job in enumerate(pending):
        if (left := until - time.monotonic()) > 0:
            job.train(left / (len(pending) - number))
        else:
            print(f"{job.label}: no time left; call again")
    results.note(above_wake_sleep=advantages(results.rows, facts["curves"]))
    alone = {n: without_latents(PANELS[n], of) for n, of in sets.items()}
    there = {row["name"]: row for row in results.rows if "test_bound" in row}
    above = {n: row["test_bound"]["value"] - alone[row["data"]] for n, row in there.items()}
    results.note(without_latents=alone, above_no_latents=above)
    results.note(finished=all(job.ended() for job in jobs), as_reported=REPORTED)
    if results.rows:
        picture(results.rows, facts, args.out / "aevb_bound.png")
    print(f"figures: {results.path}; picture: {args.out / 'aevb_bound.png'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"aevb_bound.py: {error}") from None
