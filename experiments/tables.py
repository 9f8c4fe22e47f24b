"""Write docs/results.md and docs/evidence-results.md from JSON: no figure is typed by hand.

The figures lie in docs/results and docs/evidence, as the experiments left them; what is to be known
of a section of results stands in notes.md, by the name of its file or of its script.

    python experiments/tables.py
"""

import json
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

EVIDENCE = """# What the estimators of evidence say

Measured figures for [evidence.md](evidence.md), with seed, budget and time. This page is written by
`experiments/tables.py` from the files in `docs/evidence/`.
"""

HEADS = {
    "log_evidence": "log p(x)",
    "mean_standard_error": "+- estimator",
    "sampling_error": "+- test set",
    "elbo": "ELBO",
    "bits_per_dim": "bits per dimension",
    "bits_per_dim_weighted": "bits per dimension, weighted",
}

ELSEWHERE = {"title", "protocol", "machine", "versions", "rows", "as_reported"}
# Of rows: their names say it, or "300 of 300" epochs.
TOLD = {"layers", "prior", "objective", "k", "seed", "method", "model", "data", "latent_dim"}
TOLD |= {"finished"}

# A table in Markdown, line by line, and what is to be known besides.
Section = tuple[list[str], dict[str, str]]


def single(figures: dict[str, Any]) -> Section:
    """One experiment: its figure beside those of others."""
    error, sampling = f"{figures['mean_standard_error']:.4f}", f"{figures['sampling_error']:.2f}"
    rows = [["**pyro_vae**", f"**{figures['log_evidence']:.2f}**", error, sampling]]
    rows += [[who, f"{of:.2f}", "", ""] for who, of in figures.get("as_reported", {}).items()]
    facts = {
        "ELBO of the test data": f"{figures['elbo']:.2f} nats",
        "best validation ELBO": f"{figures['best_valid_elbo']:.2f} nats, epoch "
        f"{figures['best_epoch']} of {figures['epochs']}",
        "effective sample size": f"median {figures['ess_median']:.1f}, lowest "
        f"{figures['ess_min']:.2f}, of {figures['num_particles']:,} particles",
        "training": f"{figures['train_seconds']:,.0f} s on {figures['num_train']:,} data",
        "evaluation": f"{figures['seconds']:,.0f} s on {figures['num_test']:,} data",
        "seed": str(figures["seed"]),
        **where(figures),
        **protocol(figures),
    }
    if "bias" in figures:
        facts["bias of the estimator"] = f"about {figures['bias']:.3f} nats (to second order)"
    if "bits_per_dim" in figures:
        facts["bits per dimension"] = f"{figures['bits_per_dim']:.4f}"
    return markdown(["", "log p(x), nats per datum", "+- estimator", "+- test set"], rows), facts


def free(figures: dict[str, Any]) -> Section:
    """Rows of any figures, beside what was published; facts by names of rows are columns."""
    published = dict(figures.get("as_reported", {}))
    names, rows = {row["name"] for row in figures["rows"]}, []
    dicts = {k: of for k, of in figures.items() if k not in ELSEWHERE and isinstance(of, dict)}
    columns = {key: of for key, of in dicts.items() if names.issuperset(of)}
    for row in figures["rows"]:
        beside = row.get("as_reported", published.pop(row["name"], None))
        more = {key: of[row["name"]] for key, of in columns.items() if row["name"] in of}
        if row.get("weighted") and row.get("bits_per_dim"):
            more["bits_per_dim_weighted"] = by_weighting(row)
        untold = {key: of for key, of in cells(row | more).items() if key not in TOLD}
        rows.append({**untold, "as_reported": said("as_reported", beside)})
    rows += [{"name": who, "as_reported": said("", of)} for who, of in published.items()]
    fullest = sorted(rows, key=len, reverse=True)  # which have the columns in their order
    keys = list(dict.fromkeys(key for row in fullest for key in row if key != "as_reported"))
    keys = [key for key in (*keys, "as_reported") if any(row.get(key) for row in rows)]
    head = ["" if key == "name" else HEADS.get(key, key.replace("_", " ")) for key in keys]
    facts = cells({key: fact for key, fact in figures.items() if key not in columns})
    facts = {key.replace("_", " "): fact for key, fact in facts.items() if fact}
    if facts.get("finished") == "no":
        facts["finished"] = "no: the budget ended before the epochs did; the same call goes on"
    made: dict[tuple[str, str], list[str]] = {}
    for row in figures["rows"]:
        facts |= {f"{said} of {row['name']}": why for said, why in remarks(row).items()}
        for fact in where(row).items():
            made.setdefault(fact, []).append(row["name"])
    every = all("machine" in row for row in figures["rows"])  # has its own
    facts = protocol(figures) | facts | where({**figures, "machine": None} if every else figures)
    for (key, fact), own in made.items():
        facts[f"{key} of {'each row' if 1 < len(own) == len(names) else '; '.join(own)}"] = fact
    return markdown(head, [[row.get(key, "") for key in keys] for row in rows]), facts


def remarks(row: dict[str, Any]) -> dict[str, str]:
    """What a figure falls short of, and why, as far as the row tells."""
    found = {}
    for part in (key for key in row if f"{key} annealed" in row):
        if (more := row[f"{part} annealed"]["value"] - row[part]["value"]) > 1:
            found[f"{part} figure"] = (
                f"annealing finds {more:.1f} nats more: the chains of the other estimator had not "
                "come to the posterior from where they began"
            )
    if (beside := compared(row)) is None:
        return found
    done, best = row["epochs"], row.get("best_epoch", row["epochs"])
    if done < row.get("of_epochs", done) and not row.get("finished"):
        why = f"training was stopped by its budget after {done} of {row['of_epochs']} epochs"
    elif best == done:
        why = f"the last of {done} epochs was the best, by the bound of the validation data"
    else:
        why = f"epoch {best} of {done} was best, by the bound of the validation data"
        why += ", and what came after overfitted" * (best < 0.9 * done)
    if (known := row.get("train_elbo")) is not None:
        why += f"; training data stand {known - row['elbo']:.1f} nats above test data, by the ELBO"
    if (better := beside[2]) < 0:
        unit = "bits per dimension" if "bits_per_dim" in row else "nats"
        found["shortfall"] = f"by weighting {-better:.2f} {unit} worse than reported; {why}"
    return found


def compared(row: dict[str, Any]) -> tuple[float, float, float] | None:
    """The best published figure, ours, and by how much ours is better; None where one is missing.

    Published figures are of weighting alone, so ours is too: nats, or bits per dimension of levels.
    """
    published, value = row.get("as_reported"), row.get("log_evidence")
    if isinstance(published, dict):
        published = (min if row.get("bits_per_dim") else max)(published.values())
    if not isinstance(published, float) or value is None:
        return None
    ours = by_weighting(row)
    return published, ours, (published - ours) * (1 if row.get("bits_per_dim") else -1)


def by_weighting(row: dict[str, Any]) -> float:
    """Log p(x) without annealing: nats, or bits per dimension of levels."""
    value = row.get("weighted") or row["log_evidence"]
    return value * (row.get("bits_per_dim") or row["log_evidence"]) / row["log_evidence"]


def overview(every: list[dict[str, Any]]) -> list[str]:
    """What of all experiments has a published figure, beside it."""
    lines = []
    for figures in every:
        published = figures.get("as_reported", {})
        for row in figures.get("rows", [figures]):
            name = row.get("name", "")
            own = {w: of for w, of in published.items() if name in ("", w, w.split(" (")[0])}
            beside = compared({"as_reported": own or None, **row})
            if beside is None:
                continue
            key, unit = ("bits_per_dim", " bits") if row.get("bits_per_dim") else ("", "")
            told, ours = f"{beside[0]:.2f}{unit}", f"{said(key, beside[1])}{unit}"
            epochs = " after ".join(filter(None, map(cells(row).get, ("epochs", "before epochs"))))
            link = re.sub(r"[^\w-]", "", figures["title"].lower().replace(" ", "-"))
            named = [f"[{figures['title']}](#{link})", name]
            # The error of an annealed figure is not that of the one by weighting.
            error = row.get("weighted_error" if row.get("weighted") else "mean_standard_error")
            scale = abs(row["bits_per_dim"] / row["log_evidence"]) if unit else 1.0
            errors = "" if error is None else f"{error * scale:.4f}"
            new = "" if (of := row.get("sampling_error")) is None else f"{of * scale:.3f}"
            doubt = f"{row['untrusted']:.0%}" if "untrusted" in row else ""
            ahead = f"{beside[2]:+.2f}"
            lines.append([*named, told, f"**{ours}**", errors, new, doubt, ahead, epochs])
    head = ["", "", "as reported, at best", "ours, by weighting", "+- estimator", "+- test set"]
    head += ["untrusted", "better by", "epochs"]
    return markdown(head, lines) if lines else []


def cells(figures: dict[str, Any]) -> dict[str, str]:
    """What fits into cells: figures with an error as one; curves are left to the picture."""
    found: dict[str, str] = {}
    for key, value in figures.items():
        if key in ELSEWHERE or isinstance(value, list):
            continue
        if isinstance(value, dict) and "value" in value:
            parts = map(value.get, ("value", "standard_error", "error", "sampling_error"))
            found[key] = " +- ".join(said(key, part) for part in parts if part is not None)
        elif isinstance(value, dict):
            found |= cells({f"{key} {inner}": of for inner, of in value.items()})
        elif key in ("of", "of_epochs") and "epochs" in found:
            stopped = figures.get("finished") is True and figures["epochs"] < value
            found["epochs"] += f" of {'at most ' * stopped}{said(key, value)}"
        else:
            found[key] = said(key, value)
    return found


def said(key: str, value: Any) -> str:
    """A figure as it is printed."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{said('', of)} ({who})" for who, of in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if "seed" not in key else str(value)
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    value += 0.0  # of -0 makes 0
    if "bits_per" in key:
        return f"{value:.4f}"
    if "seconds" in key and abs(value) >= 10:
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:#.3g}"


def comparison(figures: dict[str, Any]) -> Section:
    """Swaps that were trained on the same data: paired differences to the first."""
    rows = figures["rows"]
    with_bits = any(row["bits_per_dim"] is not None for row in rows)
    lines = []
    for row in rows:
        cells = [row["name"], f"{row['elbo']:.2f}", f"{row['log_evidence']:.2f}"]
        cells += [f"{row['mean_standard_error']:.3f}", f"{row['bias']:.3f}"]
        cells += [f"{row['untrusted']:.0%}" if "untrusted" in row else "", *[""] * 3]
        if row["difference"] is not None:
            paired = f"**{row['difference']:+.2f}**", f"{row['difference_error']:.3f}"
            cells[-3:] = [*paired, f"{row['share']:.0%}"]
        cells += [f"{row['bits_per_dim']:.4f}"] if with_bits else []
        of = f" of {row.get('of_epochs')}" * (row.get("of_epochs", 0) > row["epochs"])
        lines.append([*cells, f"{row['epochs']}{of}", said("seconds", row["train_seconds"])])
    head = ["", "ELBO", "log p(x)", "+- estimator", "bias", "untrusted", f"to {rows[0]['name']}"]
    head += ["+- paired", "better on", *["bits per dimension"] * with_bits, "epochs", "train s"]
    facts = protocol(figures) | where(figures)
    if "annealed" in figures:
        more = figures["annealed"]
        facts[f"{more['name']} by annealing, {more['num_data']} test data"] = (
            f"**{more['log_evidence']:.2f}** +- {more['mean_standard_error']:.2f} (estimator) +- "
            f"{more['sampling_error']:.2f} (test set) nats, **{more['bits_per_dim']:.4f}** bits "
            f"per dimension: {more['gain']:+.2f} +- {more['gain_error']:.2f} nats to importance "
            f"weighting; {more['num_chains']} chains, {more['temperatures']} temperatures, "
            f"{more['leapfrog_steps']} leapfrog steps, median ESS {more['ess_median']:.1f}, "
            f"{more['seconds']:,.0f} s"
        )
    if "amortization" in figures:
        cost = figures["amortization"]
        facts[f"gap of {cost['name']}, {cost['num_data']} test data"] = (
            f"{cost['gap']:.2f} nats, of which {cost['amortization']:.2f} +- "
            f"{cost['amortization_error']:.2f} amortization: what a diagonal normal of each "
            "datum's own gains"
        )
    facts |= {f"{name}, left out": why for name, why in figures.get("diverged", {}).items()}
    published = figures.get("as_reported", {})
    facts |= {f"as reported: {who}": said("", of) for who, of in published.items()}
    return markdown(head, lines), facts


def foreign(figures: dict[str, Any]) -> Section:
    """How well scores tell foreign images from a model's own."""
    own, *others = figures["sets"]
    scores, lines = list(others[0]["auroc"]), []
    for of in (own, *others):
        areas = [of["auroc"][score] for score in scores] if of is not own else []
        cells = [f"{area['value']:.3f} +- {area['standard_error']:.3f}" for area in areas]
        alone = [f"{of['log_evidence']:.1f}", f"{of['code_bits']:.0f}", f"{of['ess_median']:.1f}"]
        lines.append([of["name"], *alone, *(cells or [""] * len(scores))])
    head = ["images", "log p(x)", "bits of a code", "median ESS", *scores]
    facts = protocol(figures) | {
        "protocol: scores": "area under the ROC curve, 0.5 is chance",
        "protocol: seed": str(figures["seed"]),
        "protocol: time": f"{figures['seconds']:,.0f} s",
    }
    return markdown(head, lines), facts | where(figures)


def markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    """A table, line by line."""
    rows = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return [rows[0], "|---" * len(head) + "|", *rows[1:]]


def protocol(figures: dict[str, Any]) -> dict[str, str]:
    """What has to be equal for figures to be comparable."""
    return {f"protocol: {key}": said(key, of) for key, of in figures["protocol"].items()}


def where(figures: dict[str, Any]) -> dict[str, str]:
    """The machine, and the versions of what decides numbers."""
    facts = {}
    if machine := figures.get("machine"):
        cores = f"{machine['cores']} core" + "s" * (machine["cores"] != 1)
        facts["machine"] = f"{machine['processor']}, {cores}, {machine['device']}"
    if "versions" in figures:
        facts["versions"] = ", ".join(
            f"{of} {number}" for of, number in figures["versions"].items()
        )
    return facts


# What a file's figures are, by what only its kind has.
KINDS = {"baseline": comparison, "rows": free, "sets": foreign, "title": single}


def notes(path: Path) -> dict[str, str]:
    """What is to be known, by the beginnings of names of files; "" is the head of the page."""
    head, *parts = path.read_text().split("\n## ")
    return {"": head.strip() + "\n"} | {
        name: text.strip() for name, _, text in (part.partition("\n") for part in parts)
    }


def page(told: dict[str, str], folder: Path) -> str:
    """A page of the figures in a folder, with its notes."""
    files = {file: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    for title in {figures["title"] for figures in files.values()}:
        first, *others = (file for file in files if files[file]["title"] == title)
        for file in others:  # their names say what is different
            different = file.stem.removeprefix(first.stem).strip("_").replace("_", " ")
            files[file]["title"] += f", {different}"
    lines = overview(list(files.values()))
    about = ["## Beside what was published", "", told.get("overview", ""), "", *lines, ""]
    sections = [told[""], *(about if lines else [])]
    for file, figures in files.items():
        table, facts = next(of for mark, of in KINDS.items() if mark in figures)(figures)
        path = f"{folder.name}/{file.stem}"
        sections += [f"## {figures['title']}", ""]
        if name := max((n for n in told if file.stem.startswith(n)), key=len):
            sections += [told[name], ""]
        sections += [*table, ""]
        if file.with_suffix(".png").is_file():
            sections += [f"![{figures['title']}]({path}.png)", ""]
        sections += ["| | |", "|---|---|", *(f"| {key} | {of} |" for key, of in facts.items()), ""]
        made = [s.stem for s in Path(__file__).parent.glob("*.py") if file.stem.startswith(s.stem)]
        script = f"experiments/{max(made, key=len, default='')}.py"
        by = f", by [{script}](../{script})" if made else ""
        sections += [f"Figures: [{path}.json]({path}.json){by}", ""]
    return "\n".join(sections)


def main() -> None:
    """Write the pages."""
    docs = Path(__file__).parents[1] / "docs"
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    results = notes(Path(__file__).with_name("notes.md"))
    pages = {
        "results.md": (results, "results"),
        "evidence-results.md": ({"": EVIDENCE}, "evidence"),
    }
    for name, (told, folder) in pages.items():
        (docs / name).write_text(page(told, docs / folder))
        print(docs / name)


if __name__ == "__main__":
    main()
