"""The words of the command line: every option, its default, and what it is for."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

__all__ = ["ACTIVATIONS", "EPOCHS", "parser"]

ACTIVATIONS = {"softplus": nn.Softplus, "relu": nn.ReLU, "tanh": nn.Tanh}
LIKELIHOODS = (
    "bernoulli",
    "binomial",
    "categorical",
    "normal",
    "fixed_normal",
    "laplace",
    "fixed_laplace",
)
EPOCHS = 20


def parser(commands: Mapping[str, Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        commands: What is to be run under each of its words: "train", "evaluate"...
    """
    whole = argparse.ArgumentParser(
        prog="pyro-vae", description="Variational autoencoders as Pyro programs: say, fit, judge."
    )
    whole.add_argument(
        "--traceback", action="store_true", help="show the whole traceback of an error"
    )
    subparsers = whole.add_subparsers(required=True, metavar="COMMAND")
    with_defaults = _WithDefaults

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = subparsers.add_parser(
            name, help=text, description=text, formatter_class=with_defaults
        )
        made.set_defaults(run_command=commands[name])
        return made

    _add_train_options(command("train", "train a pair and leave a run directory"))

    evaluate = command(
        "evaluate", "estimate the log-evidence of held-out data; goes on if it was stopped"
    )
    evaluate.add_argument("run", metavar="RUN", help="run directory")
    evaluate.add_argument("--num-particles", type=_positive, default=5000, help="weights per datum")
    evaluate.add_argument(
        "--budget",
        type=_share,
        default=1.0,
        help="what annealing of untrusted data may cost, in units of weighting all data; 0: none, "
        "inf: whatever it takes",
    )
    evaluate.add_argument("--num-chains", type=_positive, default=16, help="chains per datum")
    evaluate.add_argument(
        "--temperatures", type=_positive, default=1000, help="annealing steps of each chain"
    )
    evaluate.add_argument(
        "--leapfrog-steps", type=_positive, default=10, help="leapfrog steps of each move"
    )
    evaluate.add_argument(
        "--part", choices=("test", "valid", "train", "all"), default="test", help="data"
    )
    evaluate.add_argument("--limit", type=int, help="judge so many data, spread evenly")
    evaluate.add_argument("--data", help="path of the data, where the run can't load them itself")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of particles and chains")
    evaluate.add_argument("--compile", **_COMPILE)
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1...")

    compare = command("compare", "hold judged runs against the first, datum by datum")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="run directories, baseline first")
    compare.add_argument("--out", help="folder for comparison.json and comparison.png")

    sample = command("sample", "generate data from the prior")
    sample.add_argument("run", metavar="RUN", help="run directory")
    sample.add_argument("--num", type=_positive, default=64, help="number of data")
    sample.add_argument("--draw", action="store_true", help="draw from p(x|z), not its mean")
    sample.add_argument("--seed", type=int, default=0, help="seed")
    sample.add_argument("--out", help="an .npy file; in the run directory if not given")

    report = command("report", "draw a run's pictures and write its report anew")
    report.add_argument("run", metavar="RUN", help="run directory")
    return whole


_COMPILE: dict[str, Any] = {
    "action": argparse.BooleanOptionalAction,
    "default": "auto",
    "help": "compile; auto: where the work would take longer than 20 seconds without",
}


class _WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        help="digits, mnist, fashion_mnist, binarized_mnist, frey_faces, or an .npy or .npz file",
    )
    add("--root", help="folder of the data set's files; downloads go to the user's cache without")
    add(
        "--binarize",
        choices=("no", "threshold", "static", "dynamic"),
        default="no",
        help="levels to bits: above half of the largest; drawn once; or drawn anew at every step",
    )
    add("--dequantize", action="store_true", help="add uniform noise to levels")
    add(
        "--standardize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="shift and scale real values; figures are of the values as they were",
    )
    add("--intensities", action="store_true", help="grey levels as if they were bits: no log p(x)")

    add = parser.add_argument_group("pair").add_argument
    add(
        "--likelihood",
        choices=("auto", *LIKELIHOODS),
        default="auto",
        help="auto: by the values; fixed_normal is squared error, fixed_laplace absolute error",
    )
    add("--scale", type=float, default=1.0, help="scale of fixed_normal and fixed_laplace")
    add("--min-scale", type=float, default=1e-3, help="least scale of normal and laplace")
    add("--latent-dim", type=_positive, default=20, help="number of latent dimensions")
    add("--network", choices=("mlp", "gated_mlp", "conv"), default="mlp", help="networks")
    add(
        "--hidden-dims",
        type=_positive,
        nargs="+",
        default=[400],
        help="widths of the hidden layers",
    )
    add("--activation", choices=tuple(ACTIVATIONS), default="softplus", help="of mlp and conv")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, help=f"passes over the training data, in all (default: {EPOCHS})")
    add("--batch-size", type=_positive, default=100, help="data per step")
    add("--learning-rate", type=float, default=1e-3, help="of Adam")
    add("--cosine", action="store_true", help="let the learning rate fall to 0 on a cosine")
    add("--analytic-kl", action=argparse.BooleanOptionalAction, default=True, help="closed-form KL")
    add("--num-particles", type=_positive, default=1, help="draws per datum and step")
    add("--kl-weight", type=float, default=1.0, help="weight of the KL")
    add("--warmup", type=int, default=0, help="epochs in which the KL weight rises")
    add("--max-grad-norm", type=float, help="clip the gradient's norm")
    add(
        "--ema-decay",
        type=float,
        help="of averages of the parameters, per step; 0.99 for 100 steps",
    )
    add("--patience", type=int, help="stop after so many epochs without a better validation bound")
    add("--seed", type=int, default=0, help="seed of everything")
    add("--compile", **_COMPILE)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1...")
    add("--out", metavar="RUN", help="run directory to make")
    add("--resume", metavar="RUN", help="go on with a run; only --epochs may be given with it")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
