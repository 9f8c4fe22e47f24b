"""One pair, five priors: what does a prior gain, datum by datum?

The same networks, guide, likelihood and budget each time; only p(z) changes. The mixture, the
VampPrior (Tomczak and Welling 2018) and the flow (Chen et al. 2017) can meet the encoder where it
puts the data, which a fixed N(0, I) can't.

    python experiments/priors.py
    python experiments/priors.py --data binarized_mnist --root FOLDER --epochs 60 --out runs/prior60
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.distributions import transforms
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv


def swaps(
    data: pv.Split, latent_dim: int, hidden_dims: tuple[int, ...], num_components: int
) -> dict[str, Callable[[], tuple[pv.Model, pv.Guide]]]:
    """The pairs: they differ in one line."""

    def pair(make_prior: Callable[[pv.Conditional], Any]) -> tuple[pv.Model, pv.Guide]:
        inward = pv.networks.gated_mlp(data.dim, (2, latent_dim), hidden_dims=hidden_dims)
        outward = pv.networks.gated_mlp(latent_dim, (1, data.dim), hidden_dims=hidden_dims[::-1])
        encoder = pv.Conditional(inward, pv.families.normal)
        likelihood = pv.Conditional(outward, pv.families.bernoulli)
        return pv.Model(make_prior(encoder), likelihood), pv.Guide(encoder)

    normal = (2, latent_dim)
    one = pv.families.inverse_softplus(1.0)
    flow = partial(transforms.affine_autoregressive, hidden_dims=[4 * latent_dim])
    pseudo = data.train[:num_components]
    return {
        "N(0, I)": lambda: pair(lambda _: pv.priors.StandardNormal(latent_dim)),
        "learned normal": lambda: pair(
            lambda _: pv.priors.Learned(pv.families.normal, normal, start=(0.0, one))
        ),
        "mixture": lambda: pair(
            lambda _: pv.priors.Mixture(
                pv.families.normal, num_components, normal, start=(0.0, one)
            )
        ),
        "VampPrior": lambda: pair(lambda q: pv.priors.VampPrior(q, pseudo, low=0.0, high=1.0)),
        "flow": lambda: pair(lambda _: pv.priors.FlowPrior(latent_dim, flow)),
    }


def main() -> None:
    """Train, judge and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits, binarized_mnist, mnist...")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/priors"), help="goes on if there")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes, shared")
    parser.add_argument("--warmup", type=int, help="epochs of it; a fifth by default")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--latent-dim", type=int, default=40)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[300, 300])
    parser.add_argument("--num-components", type=int, default=500)
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--only", nargs="+", help="some of the priors, the baseline first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, tiny networks")
    args = parser.parse_args()
    if args.num_particles < 2 or not args.budget > 0:
        parser.error("expected --num-particles from 2, --budget above 0")
    if args.only and len(set(args.only)) < 2:
        parser.error(f"--only: expected two priors or more, got {args.only}")
    if args.smoke:
        args.epochs, args.num_particles, args.num_components = 2, 20, 30
        args.hidden_dims, args.latent_dim = [16], 4
    args.warmup = max(1, args.epochs // 5) if args.warmup is None else args.warmup

    data = pv.load_data(args.data, root=args.root)
    data = data if data.num_levels is None else data.binarize()
    print(data.summary())
    pairs = swaps(data, args.latent_dim, tuple(args.hidden_dims), args.num_components)
    if args.only:
        if unknown := [name for name in args.only if name not in pairs]:
            parser.error(f"--only: there is no {unknown[0]!r}; choose from {', '.join(pairs)}")
        pairs = {name: pairs[name] for name in args.only}
    results = pv.Results(
        args.out / "results.json",
        title=f"Priors: {data.name}",
        protocol={
            "data": data.summary(),
            "model": f"{args.latent_dim} latents, gated layers {args.hidden_dims} on each side, "
            f"Bernoulli likelihood, diagonal normal guide; {args.num_components} members of the "
            "mixture and pseudo-inputs, which start at the first training data; two affine "
            "autoregressive transforms",
            "training": f"Monte Carlo ELBO, one particle, {args.epochs} epochs, batch "
            f"{args.batch_size}, Adam, learning rate {args.learning_rate} with cosine schedule, KL "
            f"weight warmed up over {args.warmup} epochs, parameters of the best validation bound, "
            f"seed {args.seed}",
            "evaluation": f"importance weighting with the guide, {args.num_particles} particles, "
            f"all {len(data.test)} test data",
            "baseline": next(iter(pairs)),
        },
        device=args.device,
    )
    found = pv.compare_swaps(
        pairs,
        data,
        out=args.out,
        num_particles=args.num_particles,
        optimizer=lambda params: torch.optim.Adam(params, lr=args.learning_rate, fused=True),
        lr_schedule=partial(CosineAnnealingLR, T_max=args.epochs),
        kl_weight=pv.warmup(args.warmup),
        epochs=args.epochs,
        batch_size=args.batch_size,
        total_seconds=60 * args.budget,
        seed=args.seed,
        device=args.device,
    )
    quantity = json.loads((args.out / "comparison.json").read_text())["quantity"]
    results.note(quantity=quantity, baseline=found.rows[0]["name"], diverged=found.diverged)
    for row in found.rows:
        results.put(row["name"], **{key: of for key, of in row.items() if key != "name"})
    (args.out / "comparison.png").replace(args.out / "priors.png")
    print(found)
    print(f"figures: {args.out / 'results.json'}; picture: {args.out / 'priors.png'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"priors.py: {error}") from None
