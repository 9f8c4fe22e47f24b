"""Grey levels, six likelihoods: which density explains them in the fewest bits?

Every likelihood here gives probabilities to the integer levels themselves, so that all figures are
log P(x) of the same data and can be compared: the normal and the Laplace are integrated over each
level instead of being evaluated in its middle.

Importance weighting finds too little where levels pin the latents down (look at the median ESS);
`--anneal` judges the best of them by annealed importance sampling besides.

    python experiments/likelihoods.py
    python experiments/likelihoods.py --data frey_faces --root FOLDER --epochs 600 --out runs/frey
    python experiments/likelihoods.py --data mnist --root FOLDER --epochs 20 --out runs/grey
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv


def swaps(
    data: pv.Split, latent_dim: int, hidden_dims: tuple[int, ...], num_components: int
) -> dict[str, Callable[[], tuple[pv.Model, pv.Guide]]]:
    """The pairs: they differ in the family, and in how many parameters the network gives it."""
    levels = data.num_levels
    assert levels is not None

    def pair(num_params: int, family: Any) -> tuple[pv.Model, pv.Guide]:
        inward = pv.networks.gated_mlp(data.dim, (2, latent_dim), hidden_dims=hidden_dims)
        inward = pv.networks.rescaled(inward, scale=levels - 1.0)
        outward = pv.networks.gated_mlp(
            latent_dim, (num_params, data.dim), hidden_dims=hidden_dims[::-1]
        )
        encoder = pv.Conditional(inward, pv.families.normal)
        likelihood = pv.Conditional(outward, family)
        return pv.Model(pv.priors.StandardNormal(latent_dim), likelihood), pv.Guide(encoder)

    rounded = partial(pv.families.discretized, num_levels=levels)
    mixture = partial(pv.families.discretized_mixture, num_levels=levels)
    found = {
        "discretized logistic": lambda: pair(2, rounded),
        "mixture of logistics": lambda: pair(3 * num_components, mixture),
        "discretized normal": lambda: pair(2, partial(rounded, base=dist.Normal)),
        "discretized Laplace": lambda: pair(2, partial(rounded, base=dist.Laplace)),
        "binomial": lambda: pair(1, partial(pv.families.binomial, total_count=levels - 1)),
    }
    if levels <= 32:  # one output for each level of each pixel: with 256 of them too many weights
        found["categorical"] = lambda: pair(levels, pv.families.categorical)
    return found


def main() -> None:
    """Train, judge and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits, frey_faces, mnist...: levels")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/likelihoods"))
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes, shared")
    parser.add_argument("--warmup", type=int, help="epochs of it; a fifth by default")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--latent-dim", type=int, default=40)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[300, 300])
    parser.add_argument("--num-components", type=int, default=5, help="of the mixture")
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--anneal", type=int, help="temperatures; judge the best by annealing too")
    parser.add_argument("--annealed", type=int, default=200, help="test data that are annealed")
    parser.add_argument("--num-chains", type=int, default=8, help="of the annealing")
    parser.add_argument("--leapfrog-steps", type=int, default=5, help="of the annealing")
    parser.add_argument("--only", nargs="+", help="some of the likelihoods, the baseline first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="seconds: two epochs, tiny networks")
    args = parser.parse_args()
    if min(args.num_particles, args.annealed) < 2 or not args.budget > 0:
        parser.error("expected --num-particles and --annealed from 2, --budget above 0")
    if args.only and len(set(args.only)) < 2:
        parser.error(f"--only: expected two likelihoods or more, got {args.only}")
    if args.smoke:
        args.epochs, args.num_particles = 2, 20
        args.hidden_dims, args.latent_dim = [16], 4
    args.warmup = max(1, args.epochs // 5) if args.warmup is None else args.warmup

    data = pv.load_data(args.data, root=args.root)
    if data.num_levels is None:
        parser.error(f"--data {args.data}: expected integer levels, got {data.kind.value}")
    print(data.summary())
    pairs = swaps(data, args.latent_dim, tuple(args.hidden_dims), args.num_components)
    if args.only:
        if unknown := [name for name in args.only if name not in pairs]:
            parser.error(f"--only: there is no {unknown[0]!r}; choose from {', '.join(pairs)}")
        pairs = {name: pairs[name] for name in args.only}
    results = pv.Results(
        args.out / "results.json",
        title=f"Likelihoods: {data.name}",
        protocol={
            "data": data.summary(),
            "model": f"N(0, I) prior in {args.latent_dim} dimensions, gated layers "
            f"{args.hidden_dims} on each side, diagonal normal guide; {args.num_components} "
            "logistics in the mixture",
            "training": f"Monte Carlo ELBO, one particle, {args.epochs} epochs, batch "
            f"{args.batch_size}, Adam, learning rate {args.learning_rate} with cosine schedule, KL "
            f"weight warmed up over {args.warmup} epochs, parameters of the best validation bound, "
            f"seed {args.seed}",
            "evaluation": f"importance weighting with the guide, {args.num_particles} particles, "
            f"all {len(data.test)} test data",
            "annealing": f"{args.anneal} temperatures, {args.num_chains} chains, "
            f"{args.leapfrog_steps} leapfrog steps, {args.annealed} test data"
            if args.anneal
            else "none",
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
    (args.out / "comparison.png").replace(args.out / "likelihoods.png")
    print(found)
    if args.anneal:
        best = max(found.rows, key=lambda row: row["log_evidence"])["name"]
        annealed = annealing(args, data, best)
        results.note(annealed=annealed)
        print(
            "annealed: {name}, {log_evidence:.2f} nats, {bits_per_dim:.4f} bits".format(**annealed)
        )
    print(f"figures: {args.out / 'results.json'}; picture: {args.out / 'likelihoods.png'}")


def annealing(args: argparse.Namespace, data: pv.Split, name: str) -> dict[str, Any]:
    """What annealing finds beyond importance weighting."""
    model, guide = pv.load(args.out / name.lower().replace(" ", "-"))
    best = "cuda" if torch.cuda.is_available() else "cpu"
    for program in (model, guide):
        program.to(best if args.device == "auto" else args.device)
    rows = torch.linspace(0, len(data.test) - 1, min(args.annealed, len(data.test))).round().long()
    x = data.test[rows]
    weighted = pv.log_evidence(model, guide, x, num_particles=args.num_particles, seed=args.seed)
    started = time.perf_counter()
    annealed = pv.ais(
        model,
        guide,
        x,
        num_chains=args.num_chains,
        temperatures=args.anneal,
        leapfrog_steps=args.leapfrog_steps,
        seed=args.seed,
    )
    gain = pv.compare(annealed, weighted, different_kinds=True)
    return {
        "name": name,
        "num_data": len(x),
        "log_evidence": annealed.mean,
        "mean_standard_error": annealed.mean_standard_error,
        "sampling_error": annealed.sampling_error,
        "bits_per_dim": -annealed.mean / (data.dim * math.log(2)),
        "gain": gain.mean,
        "gain_error": gain.estimator_error,
        "ess_median": annealed.ess.median().item(),
        "num_chains": args.num_chains,
        "temperatures": args.anneal,
        "leapfrog_steps": args.leapfrog_steps,
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, pv.DivergedError) as error:
        raise SystemExit(f"likelihoods.py: {error}") from None
