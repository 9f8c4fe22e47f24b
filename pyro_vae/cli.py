"""The command line: train, evaluate, compare, sample and report, for the common case.

This is the one place where names select pieces; in the library the pieces are passed themselves.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae.data import Kind
from pyro_vae.inference.svi import DivergedError
from pyro_vae.options import ACTIVATIONS, EPOCHS, parser
from pyro_vae.runs import plots
from pyro_vae.runs.directory import Run, atomically
from pyro_vae.runs.pictures import draw_run

__all__ = ["main"]

OF_KIND = {
    Kind.BINARY: "bernoulli",
    Kind.LEVELS: "binomial",
    Kind.UNIT_INTERVAL: "normal",
    Kind.REAL: "normal",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The words after ``pyro-vae``; those of the process by default.

    Returns:
        The exit status: 0; 1 where training diverged; 2 for a user's mistake; 130 after Ctrl-C.
    """
    args = parser(COMMANDS).parse_args(argv)
    warnings.showwarning = _show_warning
    try:
        args.run_command(args)
    except KeyboardInterrupt as stop:
        print(f"\npyro-vae: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, DivergedError) as error:
        if args.traceback:
            raise
        print(f"pyro-vae: error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):
            print(f"  {note}", file=sys.stderr)
        return 1 if isinstance(error, DivergedError) else 2
    return 0


def _train(args: argparse.Namespace) -> None:
    if args.resume is not None:
        _check_alone(args)
        options = Run.open(args.resume).config.get("notes", {}).get("command")
        if options is None:
            raise ValueError(
                f"--resume: the run in {args.resume} was not started by pyro-vae train; go on with "
                "it in Python by fit(..., resume=True)."
            )
        epochs = options["epochs"] if args.epochs is None else args.epochs
        if options["cosine"] and epochs != options["epochs"]:
            raise ValueError(
                f"--epochs: the run's cosine schedule ends at epoch {options['epochs']}; leave it "
                "out, or start another run."
            )
        older = {"compile": False, "ema_decay": None}  # as runs were from before these options
        own = {"epochs": epochs, "out": args.resume, "resume": True}
        args = argparse.Namespace(**{**older, **options, **own})
    elif args.data is None or args.out is None:
        raise ValueError("train: give --data and --out, or --resume RUN.")
    args.epochs = EPOCHS if args.epochs is None else args.epochs
    data = _prepared(pv.load_data(args.data, root=args.root), args)
    print(data.summary())
    torch.manual_seed(args.seed)
    model, guide = _pair(data, args)
    loss = TraceMeanField_ELBO if args.analytic_kl else Trace_ELBO
    command = {k: v for k, v in vars(args).items() if k not in ("run_command", "resume", "out")}
    if command["root"] is not None:
        command["root"] = str(Path(command["root"]).expanduser().resolve())
    if Path(args.data).suffix in (".npy", ".npz"):
        command["data"] = str(Path(args.data).expanduser().resolve())
    warm = pv.warmup(args.warmup) if args.warmup else lambda epoch: 1.0
    history = _fit(
        model,
        guide,
        data,
        loss=loss(num_particles=args.num_particles, vectorize_particles=True),
        optimizer=lambda params: torch.optim.Adam(params, lr=args.learning_rate, fused=True),
        lr_schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=args.epochs)
        if args.cosine
        else None,
        kl_weight=lambda epoch: args.kl_weight * warm(epoch),
        max_grad_norm=args.max_grad_norm,
        ema_decay=args.ema_decay,
        patience=args.patience,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        device=args.device,
        compile=args.compile,
        out=args.out,
        resume=bool(args.resume),
        notes={"command": command},
    )
    name = "ELBO" if data.is_density else "score"
    best = f"best validation {name} {max(history['valid_elbo']):.3f} nats per datum"
    print(f"{best}, epoch {history.best_epoch} of {len(history.records)}")
    print(f"next: pyro-vae evaluate {args.out}; pictures: {Path(args.out) / 'report.html'}")


def _fit(*pair_and_data: Any, **options: Any) -> pv.History:
    try:
        return pv.fit(*pair_and_data, **options)
    except ValueError as error:
        if "is no density for" in str(error):  # the library speaks of Python's ways out
            error.add_note(
                "On the command line: --likelihood, --binarize, --dequantize or --intensities."
            )
        raise


def _check_alone(args: argparse.Namespace) -> None:
    """A run goes on with the options it was started with: say so before ignoring others."""
    untouched = vars(parser(COMMANDS).parse_args(["train"]))
    free = ("resume", "epochs", "traceback")
    given = [
        f"--{key.replace('_', '-')}"
        for key, value in vars(args).items()
        if key not in free and value != untouched[key]
    ]
    if given:
        raise ValueError(
            f"--resume: the run goes on with its own options; only --epochs may be given with it, "
            f"leave out {', '.join(given)}."
        )


def _prepared(data: pv.Split, args: argparse.Namespace) -> pv.Split:
    wanted = {
        "--binarize": args.binarize != "no",
        "--dequantize": args.dequantize,
        "--intensities": args.intensities,
    }
    if sum(wanted.values()) > 1:
        raise ValueError(f"choose one of {', '.join(k for k, v in wanted.items() if v)}.")
    if args.binarize == "threshold":
        return data.binarize()
    if args.binarize == "static":
        return data.binarize_static(seed=args.seed)
    if args.binarize == "dynamic":
        return data.binarize_dynamic(seed=args.seed)
    if args.dequantize:
        return data.dequantize(seed=args.seed)
    if args.intensities:
        return data.intensities()
    return data.standardize() if data.kind is Kind.REAL and args.standardize else data


def _pair(data: pv.Split, args: argparse.Namespace) -> tuple[pv.Model, pv.Guide]:
    name = args.likelihood
    if name == "auto":
        name = OF_KIND[data.kind] if data.is_density else "bernoulli"
        print(f"likelihood: {name}, picked for {data.kind.value}; choose with --likelihood")
    parameters, family = _family(name, data, args)
    latent, dim = args.latent_dim, data.dim
    activation = ACTIVATIONS[args.activation]
    if args.network == "conv":
        if data.image_shape is None:
            raise ValueError("--network conv: the data are no images; use mlp or gated_mlp.")
        shape = data.image_shape
        inward = pv.networks.conv_encoder(shape, (2, latent), activation=activation)
        outward = pv.networks.conv_decoder(
            latent, (parameters, dim), image_shape=shape, activation=activation
        )
    else:
        widths = tuple(args.hidden_dims)
        make: Any = pv.networks.gated_mlp
        if args.network == "mlp":
            make = partial(pv.networks.mlp, activation=activation)
        inward = make(dim, (2, latent), hidden_dims=widths)
        outward = make(latent, (parameters, dim), hidden_dims=widths[::-1])
    if data.kind is Kind.LEVELS:
        inward = pv.networks.rescaled(inward, scale=float(data.num_levels or 2) - 1)
    encoder = pv.Conditional(inward, pv.families.normal)
    likelihood = pv.Conditional(outward, family)
    return pv.Model(pv.priors.StandardNormal(latent), likelihood), pv.Guide(encoder)


def _family(name: str, data: pv.Split, args: argparse.Namespace) -> tuple[int, Any]:
    """The likelihood's number of parameters per dimension, and its family."""
    family = getattr(pv.families, name)
    if name in ("normal", "laplace"):
        return 2, partial(family, min_scale=args.min_scale)
    if name in ("fixed_normal", "fixed_laplace"):
        return 1, partial(family, scale=args.scale)
    if name == "bernoulli":
        return 1, family
    if data.num_levels is None:
        raise ValueError(
            f"--likelihood {name}: the data have {data.kind.value}, no integer levels; use "
            f"{OF_KIND[data.kind]}."
        )
    if name == "binomial":
        return 1, partial(family, total_count=data.num_levels - 1)
    return data.num_levels, family


def _evaluate(args: argparse.Namespace) -> None:
    run = Run.open(args.run)
    data = None
    if args.data is not None:
        data = pv.load_data(args.data)
        for step, options in run.config["data"]["steps"]:
            data = getattr(data, step)(**options)
    found = pv.evaluate_run(
        args.run,
        num_particles=args.num_particles,
        budget=args.budget,
        num_chains=args.num_chains,
        temperatures=args.temperatures,
        leapfrog_steps=args.leapfrog_steps,
        part=args.part,
        limit=args.limit,
        data=data,
        seed=args.seed,
        device=args.device,
        compile=args.compile,
    )
    summary = run.read_json("evidence.json")
    quantity = summary["quantity"]
    print(f"{quantity} of {summary['num_data']} data ({summary['part']})")
    print(found.table("score" if quantity == "score" else "log p(x)"))
    if "bits_per_dim" in summary:
        print(f"{summary['bits_per_dim']:.4f} bits per dimension")
    print(summary["advice"])
    for sentence in summary["preparation"]:
        print(sentence)
    print(f"figures: {run.path / 'evidence.json'}; pictures: {run.path / 'report.html'}")


def _compare(args: argparse.Namespace) -> None:
    print(pv.compare_runs(args.runs, out=args.out))
    if args.out is not None:
        print(f"figures: {Path(args.out) / 'comparison.json'}, comparison.png")


def _sample(args: argparse.Namespace) -> None:
    run = Run.open(args.run)
    model, _ = pv.load(args.run)
    data = pv.generate(model, args.num, draw=args.draw, seed=args.seed)
    out = Path(args.out) if args.out else run.path / "generated.npy"
    if out.suffix != ".npy":
        raise ValueError(f"--out: expected a path that ends in .npy, got {out}.")
    array = data.cpu().double().numpy()
    for step, options in run.config["data"]["steps"]:
        if step == "standardize":
            array = array * np.array(options["scale"]) + np.array(options["loc"])
    with atomically(out) as file:
        np.save(file, array)
    shape = run.config["data"].get("image_shape")
    picture = plots.save(plots.samples(data.cpu(), shape), out.with_suffix(".png"))
    what = "draws from" if args.draw else "means of"
    print(f"{args.num} {what} p(x|z) with z from the prior: {out}, {picture}")


def _report(args: argparse.Namespace) -> None:
    run = Run.open(args.run)
    _ = run.config  # without it there is nothing to draw: not an error to go on after
    try:
        model, guide = pv.load(args.run)
    except ValueError as error:
        print(f"pyro-vae: {error} Only the curves are drawn anew.", file=sys.stderr)
        model = guide = None
    print(draw_run(run, model, guide))


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "sample": _sample,
    "report": _report,
}


def _show_warning(message: Any, *_: Any) -> None:
    print(f"pyro-vae: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
