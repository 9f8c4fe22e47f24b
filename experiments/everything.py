"""Run all experiments that reproduce a figure or a table, within a budget, and publish them.

Each is a script of this folder, run by itself in a folder of its own below --out, with its part of
the time that is left; what one doesn't need goes to those after it. Called again, all go on where
they stopped, and those that came to their end are left alone. One that fails stops no other: it is
said at the end, with the last lines of its log. With --publish, the figures and pictures of those
that ended well are copied to docs/results, unless there stand more epochs of the same protocol, the
full one where this is reduced, or trainings of another that have ended while these have not;
tables.py makes the page of results.

    python experiments/everything.py --smoke --out runs/smoke
    python experiments/everything.py --root FOLDER --device cuda --budget 120 --publish
    python experiments/everything.py --root FOLDER --reduced --budget 60 --only aevb_bound

With --reduced, each follows a protocol that two cores of a processor can go through; the results
state it, and are never mixed with those of the full one.
"""

import argparse
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARE = 0.9  # of its part of the time that a script is given; the rest is for what it can't stop
LAST_LINES = 6


@dataclass(frozen=True)
class Job:
    """A script with its options.

    Attributes:
        script: Its name.
        weight: Its part of the time, relative to those of the others.
        options: Of its full protocol.
        reduced: Besides, with --reduced.
    """

    script: str
    weight: float
    options: str = ""
    reduced: str = ""


FEW = "--num-particles 500"
JOBS = {
    "autoencoders_digits": Job("autoencoders", 2),
    "estimator_study_digits": Job("estimator_study", 2, "", "--epochs 100 --draws 50"),
    "full_vb_digits": Job("full_vb", 2, "", "--sizes 25 100 400 --epochs 75"),
    "neural_nets_digits": Job("neural_nets", 1),
    "autoregressive_digits": Job("autoregressive", 1),
    "neural_nets_binarized_mnist": Job("neural_nets", 1, "--data binarized_mnist", "--epochs 5"),
    "aevb_manifold": Job("aevb_manifold", 3, "", "--samples 1000000"),
    "aevb_bound": Job("aevb_bound", 8, "", "--epochs 20"),
    "aevb_marginal_mnist": Job("aevb_marginal", 6, "", "--sizes 1000 --epochs 200 --images 100"),
    "iwae_mnist": Job(
        "iwae",
        8,
        "--data mnist --recipe ours --epochs 200 --after-vae 10 --bfloat16",
        f"--epochs 20 --after-vae 5 --ks 1 5 --layers 1 {FEW}",
    ),
    "iwae_binarized_mnist": Job(
        "iwae",
        8,
        "--data binarized_mnist --recipe ours --epochs 300 --after-vae 50 --bfloat16",
        f"--epochs 40 --after-vae 5 --objectives IWAE --ks 1 50 --layers 1 {FEW}",
    ),
    "vampprior_binarized_mnist": Job(
        "vampprior",
        8,
        "--data binarized_mnist --recipe ours --epochs 300",
        f"--epochs 20 --warmup 5 --layers 1 {FEW}",
    ),
    "guides_binarized_mnist": Job(
        "guides",
        6,
        "--data binarized_mnist --only diagonal IAF --num-particles 5000",
        f"--epochs 40 {FEW}",
    ),
    "vampprior_frey_faces": Job(
        "vampprior", 4, "--data frey_faces --anneal 8", "--epochs 200 --layers 1"
    ),
    "autoregressive_binarized_mnist": Job(
        "autoregressive", 3, "--data binarized_mnist --epochs 100", f"--epochs 40 {FEW}"
    ),
}


def command(name: str, job: Job, args: argparse.Namespace) -> list[str]:
    """What a job is called by, but for its part of the time."""
    words = [sys.executable, str(HERE / f"{job.script}.py"), "--out", str(args.out / name)]
    words += ["--device", args.device]
    if args.smoke:
        return [*words, "--smoke"]
    words += ["--root", args.root] if args.root is not None else []
    return [*words, *job.options.split(), *(job.reduced.split() if args.reduced else [])]


class Ledger:
    """What was called, how it ended and how long it took, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def write(self, name: str, words: list[str], code: int, seconds: float) -> None:
        """Add a call; the seconds of a job add up over its calls."""
        before = self.entries.get(name, {}).get("seconds", 0.0)
        self.entries[name] = {"command": words, "code": code, "seconds": before + seconds}
        half_written = self.path.with_suffix(".tmp")
        half_written.write_text(json.dumps(self.entries, indent=1) + "\n")
        half_written.replace(self.path)

    def finished(self, name: str, words: list[str], out: Path) -> bool:
        """Whether the same call came to its end, and so did all trainings that it says it made."""
        entry = self.entries.get(name, {})
        figures = out / "results.json"
        if (entry.get("command"), entry.get("code")) != (words, 0) or not figures.is_file():
            return False
        found = json.loads(figures.read_text())
        return whole(found)


def whole(figures: dict[str, Any]) -> bool:
    """Whether all trainings of a script came to their end, by what it says itself, or by row."""
    return figures.get("finished", all(map(came_to_its_end, figures["rows"])))


def came_to_its_end(row: dict[str, Any]) -> bool:
    """Whether a training has no epochs left, or has said that it wants no more."""
    of = row.get("of_epochs", row.get("of", 0))
    return row.get("finished", row.get("diverged", row.get("epochs", 0) >= of))


def run(words: list[str], log: Path, seconds: float) -> int:
    """Call a script and write down what it says; its exit code, 124 if its time ran out."""
    with log.open("ab") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(None if seconds == math.inf else seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # trainings save what they have
        except KeyboardInterrupt:  # which the script was sent too
            process.wait()
            raise
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return 124


def publish(name: str, script: str, out: Path, *, reduced: bool) -> None:
    """Copy figures and picture to where the page of results is made of them."""
    docs = HERE.parent / "docs" / "results"
    found, there = out / "results.json", docs / f"{name}.json"
    if there.is_file():
        here, other = (json.loads(file.read_text()) for file in (found, there))
        same = here["protocol"] == other["protocol"]
        if reduced and not same:
            print(f"{name}: not published, {there} is of another protocol")
            return
        ours, theirs = (sum(row.get("epochs", 0) for row in of["rows"]) for of in (here, other))
        if ours < theirs and (same or not whole(here)):
            print(f"{name}: not published, {there} is of {theirs:,} epochs in all, not {ours:,}")
            return
        if not same and whole(other) and not whole(here):
            print(f"{name}: not published, {there} has come to its end, and this has not")
            return
    docs.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, there)
    shutil.copyfile(out / f"{script}.png", docs / f"{name}.png")


def main() -> int:
    """Run what is left, in turn; returns how many have failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="runs/everything, runs/reduced or runs/smoke")
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes in all")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), metavar="NAME")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--reduced", action="store_true", help="protocols for a processor")
    parser.add_argument("--publish", action="store_true", help="to docs/results, and the page")
    parser.add_argument("--smoke", action="store_true", help="each script once, in seconds")
    args = parser.parse_args()
    if args.publish and args.smoke:
        parser.error("--publish: figures of a smoke run are none; leave --smoke or --publish out.")
    which = "smoke" if args.smoke else "reduced" if args.reduced else "everything"
    args.out = args.out or Path("runs", which)
    jobs = {name: JOBS[name] for name in args.only}
    if args.smoke:  # a script's first job stands for all of them
        first = {job.script: name for name, job in reversed(jobs.items())}
        jobs = {name: job for name, job in jobs.items() if first[job.script] == name}
    # What runs behind a shell ignores SIGINT, and so would the scripts, which are stopped by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(args.out / "everything.json")
    end = time.monotonic() + 60 * args.budget
    left = {
        name: job
        for name, job in jobs.items()
        if not ledger.finished(name, command(name, job, args), args.out / name)
    }
    failed = []
    for name, job in list(left.items()):
        seconds = end - time.monotonic()
        share = max(seconds, 0.0) * job.weight / sum(j.weight for j in left.values())
        del left[name]
        if seconds <= 0:
            print(f"{name}: no time left; call again", flush=True)
            continue
        words = command(name, job, args)
        budget = [] if share == math.inf else ["--budget", f"{SHARE * share / 60:.4g}"]
        print(f"{name}: {' '.join(words[1:] + budget)}", flush=True)
        started = time.monotonic()
        code = run([*words, *budget], args.out / f"{name}.log", seconds)
        took = time.monotonic() - started
        ledger.write(name, words, code, took)
        said = {0: "done", 124: "out of time; call again"}.get(code, f"failed ({code})")
        print(f"{name}: {said}, {took:,.0f} s", flush=True)
        if code not in (0, 124):
            failed.append(name)
    if args.publish:
        for name, job in jobs.items():
            entry = ledger.entries.get(name, {})
            if (entry.get("command"), entry.get("code")) == (command(name, job, args), 0):
                publish(name, job.script, args.out / name, reduced=args.reduced)
        subprocess.run([sys.executable, str(HERE / "tables.py")], check=True)
    for name in failed:
        lines = (args.out / f"{name}.log").read_text(errors="replace").splitlines()
        print(
            f"\n{name} failed; the end of {args.out / name}.log:", *lines[-LAST_LINES:], sep="\n  "
        )
    return min(len(failed), 100)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("everything.py: stopped; the same command goes on.")
