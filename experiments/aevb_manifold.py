"""Learned planes and samples: figures 4 and 5 of "Auto-Encoding Variational Bayes".

Figure 4 of Kingma and Welling (2014) decodes a grid over the plane of two latents, for MNIST and
for Frey Faces: evenly spaced points of the unit square, put through the inverse of the normal's
distribution function, so that each image stands for an equal share of the prior. Figure 5 shows
what MNIST models of 2, 5, 10 and 20 latents generate. Beside them stand the bound and log p(x) of
test data by importance weighting, which say what a picture does not.

The step of Adagrad is 0.02; the paper chooses among 0.01, 0.02 and 0.1 by the first iterations. The
parameters of the best validation bound are drawn and judged; the paper names no such choice. As
there: one hidden layer of tanh units, 500 for MNIST and 200 for Frey Faces, minibatches of 100, one
draw a datum, the KL in closed form, a prior N(0, I) of the decoder's weights, initial weights
N(0, 0.01) (taken as a variance). MNIST is binarized, each pixel drawn once in proportion to its
level; Frey Faces are dequantized to a density on [0, 1].

    python experiments/aevb_manifold.py --root FOLDER --device cuda
    python experiments/aevb_manifold.py --data digits --samples 300000 --out runs/digits_manifold
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv

BATCH = 100


def sigmoid_normal(params: Tensor) -> Any:
    """The paper's decoder for Frey Faces: normals with means in (0, 1), and log-variances."""
    loc, log_variance = params.unbind(-2)
    return dist.Normal(loc.sigmoid(), pv.families.exp_half(log_variance)).to_event(1)


class Kind(NamedTuple):
    """How a data set is prepared and decoded, and the paper's hidden units for it."""

    data: str
    prepare: Callable[[pv.Split], pv.Split]
    family: Callable[[Tensor], Any]
    num_params: int
    hidden: int


def as_bits(raw: pv.Split) -> pv.Split:
    """Each pixel drawn once in proportion to its level."""
    return raw.binarize_static()


def as_greys(raw: pv.Split) -> pv.Split:
    """Levels spread over their cells, for a density on [0, 1]."""
    return raw.dequantize()


KINDS = {
    "mnist": Kind("mnist", as_bits, pv.families.bernoulli, 1, 500),
    "frey_faces": Kind("frey_faces", as_greys, sigmoid_normal, 2, 200),
    "digits": Kind("digits", as_bits, pv.families.bernoulli, 1, 100),
    "grey_digits": Kind("digits", as_greys, sigmoid_normal, 2, 100),
}


def build(kind: Kind, dim: int, latent_dim: int, hidden: int, seed: int) -> tuple[Any, Any]:
    """The paper's pair, with weights N(0, 0.01)."""
    layers: dict[str, Any] = {"hidden_dims": (hidden,), "activation": nn.Tanh}
    to_normal = partial(pv.families.normal, to_scale=pv.families.exp_half, min_scale=0.0)
    encoder = pv.Conditional(pv.networks.mlp(dim, (2, latent_dim), **layers), to_normal)
    outward = pv.networks.mlp(latent_dim, (kind.num_params, dim), **layers)
    likelihood = pv.Conditional(outward, kind.family)
    model, guide = pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*model.parameters(), *guide.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model, guide


def adagrad(model: nn.Module, guide: nn.Module, step: float, size: int, *_: Any) -> Any:
    """The optimizer: N(0, I) over the decoder's weights counts once in an epoch."""
    groups = [
        {"params": [*model.parameters()], "weight_decay": BATCH / size},
        {"params": [*guide.parameters()]},
    ]
    return torch.optim.Adagrad(groups, lr=step)


def plane(size: int) -> Tensor:
    """Points (size, size, 2) of the plane, each for an equal share of N(0, I).

    The first latent grows to the right, the second upwards: the first row is the top.
    """
    ticks = torch.special.ndtri((torch.arange(size) + 0.5) / size)
    upwards, across = torch.meshgrid(ticks.flip(0), ticks, indexing="ij")
    return torch.stack([across, upwards], -1)


def mosaic(images: Tensor, image_shape: tuple[int, int]) -> Tensor:
    """Images (rows, columns, D) beside one another, (rows * height, columns * width)."""
    rows, columns, _ = images.shape
    height, width = image_shape
    cells = images.reshape(rows, columns, height, width)
    return cells.permute(0, 2, 1, 3).reshape(rows * height, columns * width)


def means(model: Any, z: Tensor) -> Tensor:
    """Means of p(x|z) for latents (*batch, Z), (*batch, D), on the CPU."""
    likelihood = pv.decode(model, z.flatten(0, -2).to(next(model.parameters()).device))
    return likelihood.mean.cpu().unflatten(0, z.shape[:-1])


def picture(panels: list[tuple[str, Tensor, tuple[int, int]]], path: Path) -> None:
    """The mosaics, three in a row."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, images, shape) in zip(grid.flat, panels, strict=False):
        axes.set_axis_on()
        axes.imshow(mosaic(images, shape).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=8)
        axes.set(xticks=[], yticks=[])
        if "plane" in title:
            axes.set(xlabel="quantile of z1, 0 to 1", ylabel="quantile of z2, 0 to 1")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train every data set with every number of latents, as far as the budget goes, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["mnist", "frey_faces"], choices=[*KINDS])
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/aevb_manifold"))
    parser.add_argument(
        "--samples", type=int, default=10**7, help="of training, for each: epochs times data"
    )
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="minutes of this call, with judging"
    )
    parser.add_argument(
        "--latent-dims", type=int, nargs="+", default=[2, 5, 10, 20], help="of the first data set"
    )
    parser.add_argument("--hidden", type=int, help="hidden units; the paper's by default")
    parser.add_argument("--step", type=float, default=0.02, help="of Adagrad")
    parser.add_argument("--size", type=int, default=20, help="images in a row of the plane")
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first is drawn")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: digits, tiny networks")
    args = parser.parse_args()
    if args.smoke:
        args.data, args.latent_dims, args.hidden = ["digits", "grey_digits"], [2, 3], 8
        args.samples, args.size, args.num_particles = 2500, 4, 10
    for name in ("samples", "hidden", "size", "num_particles", "budget", "step"):
        if (given := getattr(args, name)) is not None and not given > 0:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: expected more than 0, got {given}.")

    sets = {}
    for name in args.data:
        sets[name] = KINDS[name].prepare(pv.load_data(KINDS[name].data, root=args.root))
        print(sets[name].summary())
    wanted = {name: math.ceil(args.samples / len(data.train)) for name, data in sets.items()}
    results = pv.Results(
        args.out / "results.json",
        title="Learned planes and samples for several numbers of latents",
        protocol={
            "data": " ".join(data.summary() for data in sets.values()),
            "epochs": ", ".join(f"{epochs:,} ({name})" for name, epochs in wanted.items())
            + f": {args.samples:,} samples each",
            "model": "N(0, I) prior, one hidden layer of tanh units on each side "
            + ", ".join(f"({name}: {args.hidden or KINDS[name].hidden})" for name in sets)
            + ", diagonal normal guide; Bernoulli decoder for bits, else a normal with means in "
            "(0, 1) and a log-variance head; initial weights N(0, 0.01)",
            "training": f"analytic KL, one draw, Adagrad, step {args.step}, batch {BATCH}, prior "
            "N(0, I) of the decoder's weights, parameters of the best validation bound so far",
            "evaluation": f"all test data, {args.num_particles} particles",
        },
        device=args.device,
    )
    jobs = [
        (name, latent_dim, seed)
        for seed in args.seeds
        for name in sets
        for latent_dim in (args.latent_dims if name == args.data[0] else [2])
    ]
    labels = {job: "{}, {} latents, seed {}".format(*job) for job in jobs}

    def ended(job: tuple[str, int, int]) -> bool:
        rows = [row for row in results.rows if row["name"] == labels[job]]
        return any("diverged" in row or row["epochs"] >= wanted[job[0]] for row in rows)

    pending = [job for job in jobs if not ended(job)]
    until = time.monotonic() + 60 * args.budget
    for number, (name, latent_dim, seed) in enumerate(pending):
        data, label = sets[name], labels[name, latent_dim, seed]
        if (left := until - time.monotonic()) <= 0:
            print(f"{label}: no time left; call again")
            continue
        hidden = args.hidden or KINDS[name].hidden
        model, guide = build(KINDS[name], data.dim, latent_dim, hidden, seed)
        run = args.out / f"{name}-{latent_dim}-seed{seed}"
        row: dict[str, Any] = {"data": name, "latent_dim": latent_dim, "seed": seed}
        try:
            history = pv.fit(
                model,
                guide,
                data,
                loss=TraceMeanField_ELBO(),
                optimizer=partial(adagrad, model, guide, args.step, len(data.train)),
                epochs=wanted[name],
                batch_size=BATCH,
                seed=seed,
                max_seconds=left / (len(pending) - number),
                out=run,
                resume=(run / "config.json").is_file(),
                device=args.device,
                pictures=False,
            )
        except pv.DivergedError as error:  # the others go on
            print(f"{label}: {error}")
            epochs = len((run / "metrics.jsonl").read_text().splitlines())
            row |= {"epochs": epochs, "of_epochs": wanted[name], "diverged": True}
            results.put(label, **row)
            continue
        judged = pv.log_evidence(model, guide, data.test, num_particles=args.num_particles)
        torch.save(model.state_dict(), run / "decoder.new")  # what the picture is drawn from
        (run / "decoder.new").replace(run / "decoder.pt")
        results.put(
            label,
            **row,
            epochs=len(history.records),
            of_epochs=wanted[name],
            elbo=judged.elbo.mean().item(),
            log_evidence={"value": judged.mean, "standard_error": judged.mean_standard_error},
            sampling_error=judged.sampling_error,
            seconds_per_epoch=history.records[-1]["seconds"] / len(history.records),
        )
        print(
            f"{label}: log p(x) {judged.mean:.2f} +- {judged.mean_standard_error:.2f} nats per "
            f"datum, after {len(history.records)} of {wanted[name]} epochs"
        )
    results.note(finished=all(ended(job) for job in jobs))
    planes, samples = [], []
    for name, latent_dim, seed in jobs:
        if seed != args.seeds[0] or labels[name, latent_dim, seed] not in results:
            continue
        hidden, shape = args.hidden or KINDS[name].hidden, sets[name].image_shape or (1, 1)
        model, _ = build(KINDS[name], sets[name].dim, latent_dim, hidden, seed)
        file = args.out / f"{name}-{latent_dim}-seed{seed}" / "decoder.pt"
        if not file.is_file():
            print(f"{labels[name, latent_dim, seed]}: not drawn, {file} is missing")
            continue
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        if latent_dim == 2:
            planes.append(
                (f"{name}: the plane of 2 latents", means(model, plane(args.size)), shape)
            )
        if name == args.data[0]:
            z = torch.randn(10, 10, latent_dim, generator=torch.Generator().manual_seed(seed))
            samples.append(
                (f"{name}: {latent_dim} latents, means of draws", means(model, z), shape)
            )
    if planes or samples:
        picture(planes + samples, args.out / "aevb_manifold.png")
    print(f"figures: {results.path}; picture: {args.out / 'aevb_manifold.png'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"aevb_manifold.py: {error}") from None
