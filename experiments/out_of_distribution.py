r"""Is an image foreign to what a model was trained on? log p(x) alone does not say.

A density is no detector: what a model has never seen may be as probable as its data, or more so,
because it is simpler. To a model of binarized MNIST an empty image is more probable than nearly all
digits. On the digits of scikit-learn a model that was trained on all of them but the ones gives
ones about the log p(x) of held-out data, and one of seventeen grey levels gives it to digits in
black and white.

Four scores of held-out data and of foreign images, each the larger the more foreign, and how well
each tells them apart:

    likelihood    -log p(x)
    typicality    |-log p(x) - mean over the training data|                Nalisnick et al. 2019
    complexity    -log2 p(x) - bits of x under a lossless code (zlib)        Serrà et al. 2020
    ratio         -log p(x) + log p_0(x), with p_0 of perturbed data         Ren et al. 2019

The figure is the area under the ROC curve (AUROC): how often a foreign image scores higher than
one of the data's own; 0.5 is chance, and below it the score prefers the foreign ones. Nothing is
tuned on foreign images, which a detector has not seen when it is made.

    python experiments/out_of_distribution.py
    python experiments/out_of_distribution.py --data binarized_mnist --root FOLDER \
        --out runs/foreign_to_bits --epochs 12 --latent-dim 40 --hidden-dims 300 300 --num-test 500
    python experiments/out_of_distribution.py --data fashion_mnist --foreign mnist --root FOLDER \
        --out runs/foreign_to_fashion --epochs 20

References: Nalisnick et al., "Do deep generative models know what they don't know?" (2019) and
"Detecting out-of-distribution inputs to deep generative models using typicality" (2019); Ren et
al., "Likelihood ratios for out-of-distribution detection" (2019); Serrà et al., "Input complexity
and out-of-distribution detection with likelihood-based generative models" (2020).
"""

import argparse
import dataclasses
import json
import math
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyro_vae as pv

SCORES = ("likelihood", "typicality", "complexity", "ratio")
OWN = "held-out data"


def build(data: pv.Split, latent_dim: int, hidden_dims: list[int]) -> tuple[pv.Model, pv.Guide]:
    """The pair, for bits or for grey levels."""
    inward = pv.networks.gated_mlp(data.dim, (2, latent_dim), hidden_dims=hidden_dims)
    if data.num_levels is not None:
        inward = pv.networks.rescaled(inward, scale=data.num_levels - 1.0)
        family: Any = partial(pv.families.discretized, num_levels=data.num_levels)
    else:
        family = pv.families.bernoulli
    rows = 1 if data.num_levels is None else 2
    outward = pv.networks.gated_mlp(latent_dim, (rows, data.dim), hidden_dims=hidden_dims[::-1])
    encoder = pv.Conditional(inward, pv.families.normal)
    likelihood = pv.Conditional(outward, family)
    return pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder)


def some(x: Tensor, count: int) -> Tensor:
    """So many rows at random, or all."""
    return x[torch.randperm(len(x))[:count]]


def perturbed(x: Tensor, rate: float, top: int) -> Tensor:
    """Every pixel replaced by a uniform level with some probability: what is left is background."""
    noise = torch.randint(0, top + 1, x.shape).to(x.dtype)
    return torch.where(torch.rand(x.shape) < rate, noise, x)


def without(data: pv.Split, label: int) -> tuple[pv.Split, Tensor]:
    """The data without one of their classes, and the images of that class."""
    assert data.labels is not None
    rest, taken = {}, []
    for part, labels in data.labels._asdict().items():
        values = getattr(data, part)
        rest[part] = values[labels != label]
        taken.append(values[labels == label])
    sentence = f"without the images of class {label}"
    words = (*data.preparation, sentence)
    left = dataclasses.replace(data, source=None, labels=None, preparation=words, **rest)
    return left, torch.cat(taken)


def foreign_images(x: Tensor, shape: tuple[int, int], top: int) -> dict[str, Tensor]:
    """Images made of the data's that are none of them, as many as there are data."""
    found = {
        "mirrored": x.view(-1, *shape).flip(2).flatten(1),
        "inverted": top - x,
        "shuffled pixels": x.gather(1, torch.rand(x.shape).argsort(1)),
        "noise": torch.randint(0, top + 1, x.shape).to(x.dtype),
        "empty": torch.zeros_like(x),
    }
    return {"black and white": top * (x > top / 2).to(x.dtype), **found} if top > 1 else found


def code_length(x: Tensor, shape: tuple[int, int], top: int) -> Tensor:
    """Bits of each image (N,) under a lossless code: zlib, of pixels or of their differences.

    As in PNG, an image may be coded as it is, or as the differences to the pixel on the left or
    above; which of the three it was takes two bits. Bits are packed, eight to a byte.
    """
    images = x.to(torch.int64).view(len(x), *shape)
    left = torch.nn.functional.pad(images, (1, 0))[..., :-1]
    above = torch.nn.functional.pad(images, (0, 0, 1, 0))[..., :-1, :]
    lengths = []
    for coded in (images, (images - left) % (top + 1), (images - above) % (top + 1)):
        rows = coded.flatten(1).to(torch.uint8).numpy()
        if top == 1:
            rows = [_packed(row) for row in coded.flatten(1)]
        lengths.append([8 * len(_deflated(bytes(row))) for row in rows])
    return torch.tensor(lengths, dtype=torch.float64).amin(0) + 2


def _packed(bits: Tensor) -> bytes:
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return bytes((padded << torch.arange(8)).sum(1).tolist())


def _deflated(raw: bytes) -> bytes:
    """Without zlib's header and checksum, which say nothing of an image."""
    coder = zlib.compressobj(level=9, wbits=-15)
    return coder.compress(raw) + coder.flush()


def auroc(own: Tensor, foreign: Tensor) -> dict[str, float]:
    """P(a foreign score is above one of the data's own), ties counted half, and its error.

    Reference: DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated
    receiver operating characteristic curves" (1988).
    """
    above = (foreign.unsqueeze(1) > own).double() + 0.5 * (foreign.unsqueeze(1) == own).double()
    of_foreign, of_own = above.mean(1), above.mean(0)
    variance = of_foreign.var() / len(foreign) + of_own.var() / len(own)
    return {"value": above.mean().item(), "standard_error": variance.sqrt().item()}


def main() -> None:
    """Train the pair and its background, score all images, and tell them apart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits, binarized_mnist, mnist...")
    parser.add_argument("--foreign", nargs="*", default=[], help="further sets of that size")
    parser.add_argument(
        "--unseen", type=int, default=1, help="class to leave out, if there are any"
    )
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/out_of_distribution"))
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[128, 128])
    parser.add_argument("--rate", type=float, default=0.2, help="of pixels that are perturbed")
    parser.add_argument("--num-particles", type=int, default=500)
    parser.add_argument("--num-test", type=int, default=1000, help="images of each set, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, tiny networks")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_particles, args.num_test = 2, 20, 40
        args.hidden_dims, args.latent_dim = [16], 2

    started = time.perf_counter()
    data = pv.load_data(args.data, root=args.root)
    shape = data.image_shape
    if shape is None or (data.num_levels is None and data.kind.value != "binary values"):
        parser.error(f"--data {args.data}: expected images of bits or of levels")
    top = 1 if data.num_levels is None else data.num_levels - 1
    torch.manual_seed(args.seed)
    unseen = {}
    if data.labels is not None:
        data, of_class = without(data, args.unseen)
        unseen[f"unseen class ({args.unseen})"] = some(of_class, args.num_test)
    own = some(data.test, args.num_test)
    images = {OWN: own, **unseen, **foreign_images(own, shape, top)}
    print(data.summary())
    for name in args.foreign:
        other = pv.load_data(name, root=args.root)
        if data.num_levels is None and other.num_levels is not None:
            other = other.binarize()
        if (other.dim, other.num_levels) != (data.dim, data.num_levels):
            parser.error(f"--foreign {name}: expected {data.dim} pixels as in {data.name}")
        images[name] = some(other.test, args.num_test)
    train = some(data.train, args.num_test)
    background = dataclasses.replace(
        data,
        source=None,
        name=f"{data.name}, perturbed",
        **{part: perturbed(getattr(data, part), args.rate, top) for part in ("train", "valid")},
    )

    found = {}
    for name, seen in (("model", data), ("background", background)):
        model, guide = trained(seen, args.out / name, args)
        found[name] = {
            key: pv.log_evidence(model, guide, x, num_particles=args.num_particles, seed=args.seed)
            for key, x in {**images, "training": train}.items()
        }
    typical = found["model"]["training"].mean
    lengths = {key: code_length(x, shape, top) for key, x in images.items()}
    scores = {}
    for key in images:
        log_p, log_p_0 = (found[name][key].value for name in ("model", "background"))
        scores[key] = {
            "likelihood": -log_p,
            "typicality": (typical - log_p).abs(),
            "complexity": -log_p / math.log(2) - lengths[key],
            "ratio": log_p_0 - log_p,
        }
    sets = []
    for key in images:
        estimate = found["model"][key]
        row: dict[str, Any] = {
            "name": key,
            "num_data": len(images[key]),
            "log_evidence": estimate.mean,
            "mean_standard_error": estimate.mean_standard_error,
            "sampling_error": estimate.sampling_error,
            "ess_median": estimate.ess.median().item(),
            "code_bits": lengths[key].mean().item(),
        }
        if key != OWN:
            row["auroc"] = {
                score: auroc(scores[OWN][score], scores[key][score]) for score in SCORES
            }
        sets.append(row)

    results = {
        "title": f"Out of distribution: {data.name}",
        "protocol": {
            "data": data.summary(),
            "model": f"N(0, I) prior in {args.latent_dim} dimensions, gated layers "
            f"{args.hidden_dims} on each side, "
            f"{'Bernoulli' if top == 1 else 'discretized logistic'} likelihood, diagonal normal "
            "guide",
            "background": f"the same, trained on data with {args.rate:.0%} of the pixels replaced "
            "by uniform levels",
            "training": f"Monte Carlo ELBO, one particle, at most {args.epochs} epochs, batch 100, "
            "Adam, learning rate 1e-3, KL weight warmed up over a tenth of them, stopped after 30 "
            "without a better validation bound, parameters of the best",
            "evaluation": f"importance weighting with the guide, {args.num_particles} particles",
        },
        "num_particles": args.num_particles,
        "seed": args.seed,
        "log_evidence_train": typical,
        "sets": sets,
        "seconds": time.perf_counter() - started,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    picture(scores, args.out / "out_of_distribution.png")
    print(table(sets))
    preferred = [r["name"] for r in sets[1:] if r["log_evidence"] > sets[0]["log_evidence"]]
    print(
        "higher log p(x) than the held-out data on average, although foreign: "
        f"{', '.join(preferred) or 'none'}"
    )
    print(f"figures: {args.out / 'results.json'}; picture: {args.out / 'out_of_distribution.png'}")


def trained(data: pv.Split, out: Path, args: argparse.Namespace) -> tuple[pv.Model, pv.Guide]:
    """A pair trained on some data, in a run directory of its own."""
    torch.manual_seed(args.seed)
    model, guide = build(data, args.latent_dim, args.hidden_dims)
    pv.fit(
        model,
        guide,
        data,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
        kl_weight=pv.warmup(max(1, args.epochs // 10)),
        epochs=args.epochs,
        batch_size=100,
        patience=30,
        seed=args.seed,
        out=out,
        resume=args.resume,
        device=args.device,
        progress=False,
    )
    return model, guide


def table(sets: list[dict[str, Any]]) -> str:
    """The figures as a table in Markdown: nats, bits, and the area under each curve."""
    lines = [
        f"| images | log p(x), nats | median ESS | code, bits | {' | '.join(SCORES)} |",
        "|---" * (4 + len(SCORES)) + "|",
    ]
    for row in sets:
        cells = [row["name"], f"{row['log_evidence']:.1f}", f"{row['ess_median']:.1f}"]
        cells.append(f"{row['code_bits']:.0f}")
        for score in SCORES:
            area = row.get("auroc", {}).get(score)
            cells.append(f"{area['value']:.3f} +- {area['standard_error']:.3f}" if area else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(scores: dict[str, dict[str, Tensor]], path: Path) -> None:
    """The distribution of each score over each set of images, around that of the held-out data."""
    units = {"likelihood": "nats", "typicality": "nats", "complexity": "bits", "ratio": "nats"}
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, score in zip(figure.subplots(2, 2).flat, SCORES, strict=True):
        own = scores[OWN][score]
        reach = (own.max() - own.min()).clamp_min(1.0)
        low = min(of_set[score].min() for of_set in scores.values()).clamp_min(own.min() - reach)
        edges = torch.linspace(low.item(), (own.max() + reach).item(), 41)
        for number, (key, of_set) in enumerate(scores.items()):
            inside = of_set[score].float().clamp(edges[0], edges[-1])  # the rest at the ends
            axes.stairs(
                (torch.histogram(inside, edges).hist / len(inside)).numpy(),
                edges.numpy(),
                label=key,
                fill=number == 0,
                color="lightgrey" if number == 0 else f"C{number - 1}",
            )
        axes.set(title=score, xlabel=f"{units[score]}: the larger the more foreign", ylim=(0, 0.4))
    figure.axes[0].legend(fontsize=8)
    figure.axes[0].set(ylabel="share (what is beyond: at the ends)")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"out_of_distribution.py: {error}") from None
