"""From the autoencoder to the variational one: the same networks, what each copies and generates.

An autoencoder is a guide of point masses, z = f(x), with a likelihood: up to a constant the squared
error is -log p(x|z) of a normal of scale one. Its prior says nothing, log p(z) = 0 everywhere. So
all of these are Pyro pairs that differ in one piece:

    autoencoder          points, no prior; a code narrower than the data
    over-complete        code and layers twice as wide as the data: nothing keeps it from copying
    sparse               over-complete, with a Laplace prior: the penalty |z| times a weight. The
                         decoder's columns have length one, or codes would shrink and weights grow
    denoising            over-complete; x is seen with noise or without pixels (Vincent et al. 2008)
    VAE, L2, L1, BCE     distributions q(z|x) and the prior N(0, I), with the likelihood whose
                         -log p(x|z) is the squared error, the absolute error, or the cross entropy
    mean field           every datum has a q(z) of its own, and there is no encoder; for held-out
                         data it is sought with the decoder held

Why only the last two are densities. log p(x) integrates p(z) p(x|z) over z. Without a prior there
is nothing to integrate and nothing to draw from; a normal fitted to the codes afterwards draws
better, but training knew of no such thing. The sparse one has a prior, and so a p(x); but the
log-density of a point is infinite, E_q[log p(x, z) - log q(z)] bounds nothing, and what was
maximised is the largest p(x, z). A VAE bounds log p(x), if its likelihood integrates to one over x.
Errors alone do not: exp(-error) has the integral sqrt(2 pi) a pixel for half the squared one, 2 for
the absolute one, less than 1/2 for the cross entropy of grey values, another for every pixel, by
which the continuous Bernoulli divides (Loaiza-Ganem and Cunningham 2019); `constant` says what that
is, in nats per image. And an error is silent on its scale: one is far too wide for pixels in
[0, 1], so that the KL drowns the code. A single learned scale mends that.

Figures, of pixels in [0, 1]: root mean squared error of the `reconstruction`, and from images with
noise (`denoised`); `copied`, the explained share of images of shuffled pixels, one for a network
that copies what it was never shown; `sparseness` of codes (Hoyer 2004); `precision`, the share of
images from N(0, I) draws that lie among the real ones, and `coverage`, the share of real ones that
they come near to (Kynkäänniemi et al. 2019, Naeem et al. 2020; `of_codes`: from a normal fitted to
the codes); log p of held-out levels by importance weighting (a bound: they are dequantized).

    python experiments/autoencoders.py
    python experiments/autoencoders.py --data mnist --root FOLDER --epochs 20 --out runs/of_mnist
"""

import math
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.distributions import TorchDistribution, constraints
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv

BATCH, RATE, SOUGHT, SHOWN = 100, 1e-3, 0.1, 10  # learning rates: of networks, for held-out data
SPARSITY, NOISE, DROPOUT = 0.03, 0.3, 0.5  # weight of |z|, scale in pixels, share of pixels

# Reconstruction errors as they are written in code, and the densities with these as exponents.
ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "L2": lambda x, y: (x - y).square() / 2,
    "L1": lambda x, y: (x - y).abs(),
    "BCE": lambda x, y: F.binary_cross_entropy_with_logits(y, x, reduction="none"),
}
DENSITIES: dict[str, Any] = {
    "L2": pv.families.fixed_normal,
    "L1": pv.families.fixed_laplace,
    "BCE": pv.families.continuous_bernoulli,
    "learned scale": partial(pv.families.normal, min_scale=0.01),
}
CODES: dict[bool, Any] = {  # by whether they are points
    True: lambda params: dist.Delta(params.squeeze(-2), event_dim=1),
    False: pv.families.normal,
}
CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda x: x + NOISE * torch.randn_like(x),
    "dropout": lambda x: x * (torch.rand_like(x) > DROPOUT),
}


def cross_entropy(params: Tensor) -> TorchDistribution:
    """A Bernoulli that scores grey values: no density for them."""
    return dist.Bernoulli(logits=params.squeeze(-2), validate_args=False).to_event(1)


class Penalty(nn.Module):
    """The prior -log p(z) = weight |z| + constant; of weight zero it is no distribution."""

    def __init__(self, weight: float, dim: int) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("zeros", torch.zeros(dim))

    def forward(self) -> TorchDistribution:
        """A Laplace distribution, or the improper uniform, which can't be drawn from."""
        if not self.weight:
            return dist.ImproperUniform(constraints.real_vector, (), self.zeros.shape)
        return dist.Laplace(self.zeros, 1 / self.weight).to_event(1)


class Corrupted(nn.Module):
    """What the encoder of a denoising autoencoder is shown: corrupted data, in training."""

    def __init__(self, corrupt: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.corrupt = corrupt

    def forward(self, x: Tensor) -> Tensor:
        """Data (*batch, D)."""
        return self.corrupt(x) if self.training else x


@dataclass(frozen=True)
class Variant:
    """What is swapped; everything else is the same for all."""

    error: str = "L2"
    trained_as: Any = None  # the likelihood's family in training, where that is no density
    points: bool = False
    wide: bool = False  # codes, and no layer that is narrower
    unit: bool = False  # columns of the decoder
    prior: Callable[[int], nn.Module] = pv.priors.StandardNormal
    seen: Callable[[], nn.Module] = nn.Identity  # between data and encoder
    amortized: bool = True

    def pair(self, num_data: int, dim: int, args: Namespace) -> tuple[Any, Any]:
        """Model and guide."""
        code = 2 * dim if self.wide else args.latent_dim
        hidden_dims = [max(code, h) if self.wide else h for h in args.hidden_dims]
        layers = partial(pv.networks.mlp, hidden_dims=hidden_dims, activation=nn.ReLU)
        outward = layers(code, (1, dim))
        for layer in outward.modules() if self.unit else ():
            if isinstance(layer, nn.Linear):
                parts: Any = weight_norm(layer, dim=1).get_submodule("parametrizations.weight")
                del parts.original0  # the lengths
                parts.register_buffer("original0", torch.ones(1, layer.in_features))
        if self.error == "learned scale":
            outward = pv.networks.with_free(outward, [pv.families.inverse_softplus(0.2)])
        family = self.trained_as or DENSITIES[self.error]
        model = pv.Model(self.prior(code), pv.Conditional(pv.networks.first(outward), family))
        if not self.amortized:
            return model, table(num_data, code)
        network = nn.Sequential(self.seen(), layers(dim, (1 if self.points else 2, code)))
        return model, pv.Guide(pv.Conditional(network, CODES[self.points]))


points: Any = partial(Variant, points=True, prior=partial(Penalty, 0.0))
VARIANTS: dict[str, Variant] = {
    "autoencoder": points(),
    "over-complete": points(wide=True),
    "sparse": points(wide=True, unit=True, prior=partial(Penalty, SPARSITY)),
    "denoising, noise": points(wide=True, seen=partial(Corrupted, CORRUPTIONS["noise"])),
    "denoising, dropout": points(wide=True, seen=partial(Corrupted, CORRUPTIONS["dropout"])),
    "VAE, L2": Variant(),
    "VAE, L1": Variant("L1"),
    "VAE, BCE": Variant("BCE", trained_as=cross_entropy),
    "VAE, BCE with its constant": Variant("BCE"),
    "VAE, L2 with its scale": Variant("learned scale"),
    "mean field, L2 with its scale": Variant("learned scale", amortized=False),
}


def table(num_data: int, dim: int) -> pv.Guide:
    """A q(z) of its own for each datum."""
    return pv.Guide(pv.Conditional(pv.networks.per_datum(num_data, (2, dim)), pv.families.normal))


def adam(params: Any, *, network: float = RATE, row: float = 30 * RATE) -> torch.optim.Optimizer:
    """Adam; the rows of a table are met once an epoch, and move faster than a network."""
    networks, tables = ([p for p in params if (p.dim() == 3) is t] for t in (False, True))
    return torch.optim.Adam([{"params": networks, "lr": network}, {"params": tables, "lr": row}])


def rule(variant: Variant, args: Namespace, epochs: int) -> dict[str, Any]:
    """How is learned, in training and for held-out data."""
    loss = Trace_ELBO() if variant.points else TraceMeanField_ELBO()  # points have no KL
    falling = partial(CosineAnnealingLR, T_max=epochs)
    return {"loss": loss, "lr_schedule": falling, "epochs": epochs, "device": args.device}


def arguments(variant: Variant, x: Tensor) -> tuple[Tensor, ...]:
    """What the pair is called with: data, and without an encoder the number of each."""
    return (x,) if variant.amortized else (x, torch.arange(len(x)).unsqueeze(-1))


def inferred(variant: Variant, pair: Any, x: Tensor, args: Namespace) -> tuple[Any, ...]:
    """Model, guide and arguments for held-out data; without an encoder the guide is new."""
    (model, guide), called = pair, arguments(variant, x)
    if not variant.amortized:
        guide, learned = table(len(x), args.latent_dim), rule(variant, args, args.steps)
        learned |= {"optimizer": partial(adam, network=0.0, row=SOUGHT), "batch_size": len(x)}
        pv.fit(model, guide, called, progress=False, **learned)
    return model, guide, *called


def generation(real: Tensor, made: Tensor, neighbours: int = 5) -> dict[str, float]:
    """The shares of images (M, D) as near to a real one (N, D) as its fifth, and of these ones."""
    radius = torch.cdist(real, real).kthvalue(neighbours + 1, dim=1).values
    inside = (torch.cdist(made, real) <= radius).double()
    return {"precision": inside.amax(1).mean().item(), "coverage": inside.amax(0).mean().item()}


def sparseness(codes: Tensor) -> float:
    """Hoyer's measure, mean over codes (N, Z): 0 where all are equal, 1 where one is not zero."""
    root = codes.shape[1] ** 0.5
    ratio = codes.abs().sum(1) / codes.norm(dim=1).clamp_min(1e-12)
    return ((root - ratio) / (root - 1)).mean().item()


def judged(
    variant: Variant, pair: Any, train: Tensor, data: pv.Split, args: Namespace, run: Path
) -> dict[str, Any]:
    """The figures of a trained pair on test images; what it makes of some is kept for a picture."""
    x = data.test[: args.num_test]
    torch.manual_seed(0)  # the same noise and the same draws for all
    noisy, shuffled = CORRUPTIONS["noise"](x), x.gather(1, torch.rand(x.shape).argsort(1))
    posteriors = [inferred(variant, pair, images, args) for images in (x, noisy, shuffled)]
    found, clean, copy = (pv.reconstruct(*posterior).cpu() for posterior in posteriors)
    model, guide, *called = posteriors[0]
    codes = pv.encode(pair[1], *arguments(variant, train[:5000])).mean.cpu()
    generated = pv.decode(model, {"z": torch.randn(len(x), codes.shape[1])}).mean.cpu()
    mixing = torch.randn(len(x), len(codes)) / (len(codes) - 1) ** 0.5  # to their own covariance
    fitted = codes.mean(0) + mixing @ (codes - codes.mean(0))
    of_codes = pv.decode(model, {"z": fitted}).mean.cpu()
    figures: dict[str, Any] = {
        "reconstruction": (found - x).square().mean().sqrt().item(),
        "denoised": (clean - x).square().mean().sqrt().item(),
        "copied": 1 - ((copy - shuffled).square().mean() / shuffled.var(0).mean()).item(),
        "sparseness": sparseness(codes),
        **generation(x, generated),
        **{f"{key}_of_codes": value for key, value in generation(x, of_codes).items()},
    }
    torch.save({"found": found[:SHOWN], "generated": generated[:SHOWN]}, run / "images.pt")
    if variant.points:
        return {**figures, "log_evidence": "no bound" if model.prior.weight else "no prior"}
    density = DENSITIES[variant.error]
    if variant.error in ERRORS:
        outputs = model.likelihood.network(pv.encode(guide, *called).mean).detach().cpu()
        error = ERRORS[variant.error](x, outputs.squeeze(-2)).sum(-1)
        figures["constant"] = (density(outputs).log_prob(x) + error).mean().item()
    model.likelihood.family = density
    estimate = pv.log_evidence(model, guide, *called, num_particles=args.num_particles)
    return figures | {
        "elbo": estimate.elbo.mean().item() + data.log_jacobian,
        "log_evidence": estimate.mean + data.log_jacobian,
        "mean_standard_error": estimate.mean_standard_error,
        "sampling_error": estimate.sampling_error,
    }


def main() -> None:
    """Train, judge and draw what is not there yet."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist, frey_faces...: levels")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoders"), help="goes on there")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes of this call")
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden-dims", type=int, nargs="*", default=[256])
    parser.add_argument("--num-test", type=int, default=1000, help="test images, at most")
    parser.add_argument("--num-particles", type=int, default=500)
    parser.add_argument("--steps", type=int, default=300, help="for held-out data, no encoder")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help="of variants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, four variants")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_particles, args.num_test, args.latent_dim = 2, 10, 50, 2
        few = ["sparse", "denoising, dropout", "VAE, BCE", "mean field, L2 with its scale"]
        args.only, args.hidden_dims, args.steps = args.only or few, [16], 2
    for option, low in {"budget": 0, "latent_dim": 1, "num_test": 5, "num_particles": 1}.items():
        if not (got := vars(args)[option]) > low:
            raise ValueError(f"--{option.replace('_', '-')}: expected more than {low}, got {got}.")
    data = pv.load_data(args.data, root=args.root).dequantize()
    results = pv.Results(
        args.out / "results.json",
        title=f"From the autoencoder to the VAE: {data.name}",
        protocol={
            "data": data.summary(),
            "networks": f"ReLU layers {args.hidden_dims} on each side, {args.latent_dim} latents; "
            f"over-complete, sparse, denoising: codes of {2 * data.dim}, layers of no less; weight "
            f"{SPARSITY} of |z|, columns of length one in that decoder; noise of scale {NOISE} "
            f"(also for `denoised`), dropout of {DROPOUT}",
            "training": f"{args.epochs} epochs, training data too dequantized once, batch {BATCH}, "
            f"analytic KL, Adam, cosine schedule from {RATE} ({30 * RATE}: a table of q(z)) to 0",
            "evaluation": f"{len(data.test[: args.num_test])} test images, {args.num_particles} "
            "importance weights, every constant is in; a table of q(z) for them: decoder held, "
            f"analytic KL, {args.steps} steps of Adam on all, cosine schedule from {SOUGHT} to 0",
        },
        device=args.device,
    )
    torch.manual_seed(0)
    x = data.refresh(data.train) if data.refresh else data.train
    results.put("training data", **generation(data.test[: args.num_test], x[: args.num_test]))
    done = {r["name"]: math.inf if "diverged" in r else r.get("epochs", 0) for r in results.rows}
    jobs = [(f"{name}, seed {s}", name, s) for s in args.seeds for name in args.only or VARIANTS]
    jobs = [job for job in jobs if done.get(job[0], 0) < args.epochs]
    end = time.monotonic() + 60 * args.budget
    for number, (label, name, seed) in enumerate(jobs):
        variant, run, reached = VARIANTS[name], args.out / label, {"epoch": done.get(label, 0)}
        torch.manual_seed(seed)
        pair = variant.pair(len(x), data.dim, args)
        left = max(end - time.monotonic(), 0.001) / (len(jobs) - number)
        there = {"out": run, "resume": (run / "config.json").exists(), "pictures": False}
        options: Any = {**rule(variant, args, args.epochs), **there, "callbacks": [reached.update]}
        options |= {"batch_size": BATCH, "seed": seed, "max_seconds": left}
        try:
            history = pv.fit(*pair, arguments(variant, x), optimizer=adam, **options)
            figures = judged(variant, pair, x, data, args, run)
            figures["seconds"], reached["epoch"] = history["seconds"][-1], len(history.records)
        except pv.DivergedError as error:  # the others go on
            print(f"{label}: {error}")
            figures = {"diverged": True, "finished": True}
        row = {**figures, "epochs": reached["epoch"], "of_epochs": args.epochs, "seed": seed}
        results.put(label, **row)
        print(label, {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    draw(results, data, args.out)
    print(f"figures: {results.path}; picture: {args.out / 'autoencoders.png'}")


def draw(results: pv.Results, data: pv.Split, out: Path) -> None:
    """Of every pair what it makes of test images, and of draws from N(0, I)."""
    names = [row["name"] for row in results.rows if "reconstruction" in row]
    drawn = {name: torch.load(out / name / "images.pt") for name in names}
    originals = {"found": data.test[:SHOWN], "generated": data.train[:SHOWN]}
    shape = data.image_shape or (1, data.dim)
    figure = Figure(figsize=(10, 0.55 * len(drawn) + 1.2), layout="constrained")
    axes = figure.subplots(len(drawn) + 1, 2, squeeze=False)
    for row, (name, images) in zip(axes, {"data": originals, **drawn}.items(), strict=True):
        for place, part in zip(row, images.values(), strict=True):
            strip = F.pad(part.view(-1, *shape), (0, 1)).permute(1, 0, 2).flatten(1)
            place.imshow(strip.numpy(), cmap="gray_r", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[], frame_on=False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    axes[0][0].set_title("test images, reconstructed")
    axes[0][1].set_title("training images; decoded draws from N(0, I)")
    figure.savefig(out / "autoencoders.png", dpi=150)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"autoencoders.py: {error}") from None
