"""One page on a run, rebuilt from what lies in its folder: `config.json`, figures and pictures.

The page holds everything within itself (pictures as data URIs, no script), so it opens offline and
can be sent by mail. Nothing here knows how a run is trained or judged.
"""

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from pyro_vae.runs.canvas import number
from pyro_vae.runs.directory import Run, atomically
from pyro_vae.runs.page import (
    definitions,
    document,
    duration,
    is_number,
    number_table,
    picture,
    table,
    tree,
    value,
)

__all__ = ["write_report"]

_PICTURES = (
    ("bound.png", "The bound in training", "Early epochs may lie below the axis."),
    ("reconstructions.png", "Reconstructions", "Held-out data and what comes back of them."),
    ("samples.png", "Samples", "What the model generates with no datum in sight."),
    ("interpolations.png", "Interpolations", "Each row leads from one datum to another."),
    ("traversals.png", "Latent traversals", "A row that doesn't change is a latent not used."),
    (
        "manifold.png",
        "The latent plane",
        "Each tile has the same share of the prior's probability.",
    ),
    ("latents.png", "The data in latent space", "Each point is one datum."),
    ("evidence.png", "{Quantity} of each datum", "A long left tail is of data hard to explain."),
    ("trust.png", "What of it can be trusted", "{Quantity} is too low where weighting fails."),
    ("graph_model.png", "The model", "The graph of the generative program, as Pyro traced it."),
    ("graph_guide.png", "The guide", "The graph of the inference program."),
)
_LAST = 5  # epochs shown
_PNG = b"\x89PNG\r\n\x1a\n"


def write_report(folder: Path) -> Path:
    """Write `report.html` from what lies in a run directory.

    Args:
        folder: The run directory, with `config.json`; `metrics.jsonl`, `evidence.json` and the
            pictures are shown where they are there, and what can't be read is named on the page.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: The folder has no `config.json`.
        ValueError: `config.json` can't be read.
        OSError: The page can't be written; an older one is untouched.
    """
    folder = Path(folder)
    run = Run.open(folder)
    config = run.config
    evidence, trouble = _evidence(run)
    records, lost = _records(run)
    troubles = [text for text in (trouble, lost) if text]
    quantity = "score" if evidence.get("quantity") == "score" else "log-evidence"
    title = folder.resolve().name
    parts = [
        _header(title, config),
        "<main>",
        *(f'<p class="note">{escape(text)}</p>' for text in troubles),
        _key_figures(evidence, records, quantity),
        *_pictures(folder, quantity),
        table("Evaluation", _evaluation(evidence, quantity)),
        table("Data and preparation", config.get("data")),
        table("Options", config.get("options")),
        _pair(config.get("pair")),
        table("Versions", config.get("versions")),
        number_table("The last epochs, in nats per datum and seconds", records[-_LAST:]),
        "</main>",
        "<footer>Written by pyro_vae from the files of the run directory alone.</footer>",
    ]
    path = folder / "report.html"
    with atomically(path) as file:
        file.write(document(title, parts).encode())
    return path


def _evidence(run: Run) -> tuple[dict[str, Any], str | None]:
    """The content of `evidence.json`, and what is wrong with it."""
    if not (run.path / "evidence.json").is_file():
        return {}, None
    try:
        evidence = run.read_json("evidence.json")
    except (OSError, ValueError) as error:
        return {}, f"evidence.json can't be read ({error}): evaluate the run again."
    if not isinstance(evidence, dict):
        return {}, "evidence.json holds no JSON object: evaluate the run again."
    return evidence, None


def _records(run: Run) -> tuple[list[dict[str, Any]], str | None]:
    """The readable lines of `metrics.jsonl`, and what is wrong with the others."""
    try:
        records, lost = run.read_metrics()
    except OSError as error:
        return [], f"metrics.jsonl can't be read ({error})."
    if not records and not lost:
        return [], "There is no metrics.jsonl: nothing is known of the training."
    return records, f"{lost} of the lines of metrics.jsonl can't be read." if lost else None


def _header(title: str, config: Mapping[str, Any]) -> str:
    data, parameters = config.get("data"), config.get("parameters")
    created = config.get("created")
    said = [
        data.get("name") if isinstance(data, dict) else None,
        f"{value(parameters)} parameters" if is_number(parameters) else None,
        f"begun {str(created)[:19].replace('T', ' ')}" if created else None,
    ]
    line = " · ".join(escape(str(part)) for part in said if part)
    return f'<header>\n<h1>{escape(title)}</h1>\n<p class="soft">{line}</p>\n</header>'


def _key_figures(evidence: Mapping[str, Any], records: list[dict[str, Any]], quantity: str) -> str:
    judged = _judged(evidence, quantity)
    note = ""
    if quantity == "score":
        note = (
            '<p class="note">This is a score and no log p(x): the likelihood is no density for '
            "these data as they were prepared, so its values aren't log-probabilities of them and "
            "can't be compared with those of another likelihood.</p>\n"
        )
    elif not judged:
        note = (
            '<p class="soft">Not evaluated so far: <code>pyro-vae evaluate</code> adds the '
            "log-evidence.</p>\n"
        )
    if evidence.get("untrusted") and evidence.get("advice"):
        note += f'<p class="note">{escape(str(evidence["advice"]))}</p>\n'
    figures = definitions([*judged, *_trained(records, quantity)], first_is_large=bool(judged))
    return f"<section>\n{note}{figures}\n</section>"


def _judged(evidence: Mapping[str, Any], quantity: str) -> list[tuple[str, str, str]]:
    """Name, figure and unit of what the evaluation found."""
    mean, error = evidence.get("log_evidence"), evidence.get("mean_standard_error")
    if not is_number(mean):
        return []
    known = is_number(error)
    # Two digits of the error, but no more than a log-evidence is ever quoted with.
    digits = min(max(1 - math.floor(math.log10(error)), 2), 4) if known and error > 0 else 2
    part = f" of the {evidence['part']} part" if evidence.get("part") else ""
    text = number(mean, digits) + (f" ± {error:.{digits}f}" if known else "")
    unit = "nats per datum" + (", mean ± standard error of the estimator" if known else "")
    figures = [(f"{quantity.capitalize()}{part}", text, unit)]
    if is_number(evidence.get("sampling_error")):
        spread = f"± {evidence['sampling_error']:.2g}"
        figures.append(("Sampling error of the test set", spread, "nats per datum"))
    for key, name, unit in (("num_particles", "Particles", "per datum"), ("num_data", "Data", "")):
        if is_number(evidence.get(key)):
            figures.append((name, value(evidence[key]), unit))
    if quantity != "score" and is_number(evidence.get("bits_per_dim")):
        figures.append(("Bits per dimension", number(evidence["bits_per_dim"], 3), ""))
    return figures


def _evaluation(evidence: Mapping[str, Any], quantity: str) -> dict[str, Any]:
    """All that the evaluation left, with no score under the name of a log-probability."""
    if quantity != "score":
        return dict(evidence)
    names = {"log_evidence": "score", "elbo": "bound of the score"}
    return {names.get(key, key): item for key, item in evidence.items() if key != "bits_per_dim"}


def _trained(records: list[dict[str, Any]], quantity: str) -> list[tuple[str, str, str]]:
    """Name, figure and unit of what is known of the training."""
    figures = []
    bound = "bound of the score" if quantity == "score" else "ELBO"
    for key, name in (
        ("valid_elbo", f"Best validation {bound}"),
        ("elbo", f"Best training {bound}"),
    ):
        seen = [record for record in records if is_number(record.get(key))]
        if seen:
            best = max(seen, key=lambda record: record[key])
            unit = f"nats per datum, at epoch {value(best.get('epoch'))}"
            figures.append((name, number(best[key], 2), unit))
            break
    if records and is_number(records[-1].get("seconds")):
        epochs = f"{value(records[-1].get('epoch'))} epochs"
        figures.append(("Training time", duration(records[-1]["seconds"]), epochs))
    return figures


def _pictures(folder: Path, quantity: str) -> list[str]:
    sections = []
    for name, heading, caption in _PICTURES:
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError:
            content = b""
        if content.startswith(_PNG) and len(content) > 24:
            heading = heading.format(Quantity=quantity.capitalize())
            titled = not name.startswith("graph_")  # graphviz draws no title into its pictures
            sections.append(picture(content, heading, caption, has_title=titled))
        else:
            sections.append(f'<p class="note">{escape(name)} can\'t be read as a PNG.</p>')
    return sections


def _pair(recipe: Any) -> str:
    if not recipe:
        said = "<p>The pair is the user's own: no recipe of it is recorded.</p>"
    else:
        said = tree(_unfold(recipe))
    return f"<section>\n<h2>Model and guide</h2>\n{said}\n</section>"


def _unfold(recipe: Any) -> Any:
    """Turn the flat list of calls of a recipe into calls within calls; leave all else alone."""
    if not isinstance(recipe, dict) or not {"nodes", "objects"} <= recipe.keys():
        return recipe
    nodes, seen = recipe["nodes"], set()

    def open_up(thing: Any) -> Any:
        if isinstance(thing, list):
            return [open_up(item) for item in thing]
        if not isinstance(thing, dict):
            return thing
        if "node" in thing:
            number_of = thing["node"]
            node = nodes[number_of]
            if number_of in seen:
                return f"{node['make']}, the one above"
            seen.add(number_of)
            return {node["make"]: open_up(node["with"])}
        if "function" in thing:
            bound = thing.get("with")
            return {thing["function"]: open_up(bound)} if bound else thing["function"]
        return {key: open_up(item) for key, item in thing.items()}

    try:
        opened = [open_up(thing) for thing in recipe["objects"]]
    except (KeyError, IndexError, TypeError):
        return recipe
    return dict(zip(("model", "guide"), opened, strict=True)) if len(opened) == 2 else opened
