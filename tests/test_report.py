"""The report says what the files of a run say, escaped, offline, whatever is missing."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from fit_pairs import fit, param_pair
from helpers import bits

from pyro_vae.runs import plots
from pyro_vae.runs.report import write_report

CONFIG = {
    "data": {"name": "digits", "image_shape": [8, 8], "sizes": {"train": 1297}, "kind": "levels"},
    "pair": {
        "nodes": [
            {"make": "networks.mlp", "with": {"in_dim": 64, "hidden_dims": [200, 200]}},
            {"make": "priors.VampPrior", "with": {"encoder": {"node": 0}}},
            {"make": "vae.Model", "with": {"prior": {"node": 1}}},
            {
                "make": "vae.Guide",
                "with": {
                    "encoder": {"node": 0},
                    "family": {"function": "families.normal", "with": {"low": 0.01}},
                },
            },
        ],
        "objects": [{"node": 2}, {"node": 3}],
    },
    "options": {"epochs": 3, "learning_rate": 0.0005, "kl_weight": None},
    "versions": {"torch": "2.15.0"},
    "created": "2026-01-02T03:04:05+00:00",
    "parameters": 56084,
}
RECORDS = [
    {"epoch": e, "seconds": 30.0 * e, "elbo": -90.0 + e, "valid_elbo": v, "learning_rate": 0.0005}
    for e, v in ((1, -95.0), (2, -93.125), (3, float("nan")))
]
EVIDENCE = {
    "quantity": "log p(x)",
    "part": "test",
    "log_evidence": -88.12345,
    "mean_standard_error": 0.0031,
    "sampling_error": 0.234,
    "elbo": -91.5,
    "num_particles": 5000,
    "num_data": 1000,
    "preparation": ["binarized at 0.5"],
    "bits_per_dim": 0.162,
}
MINUS = "\N{MINUS SIGN}"
VOID = {"meta", "img", "br", "hr"}


class Reader(HTMLParser):
    """Collects text and attributes, and checks that every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.said = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.said.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader, " ".join(" ".join(reader.said).split())


def make_run(folder, config=CONFIG, records=RECORDS, evidence=EVIDENCE):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if records is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if evidence is not None:
        (folder / "evidence.json").write_text(json.dumps(evidence))
    return folder


def test_the_key_figures_come_first(tmp_path):
    path = write_report(make_run(tmp_path / "my-run"))
    assert path == tmp_path / "my-run" / "report.html"
    reader, text = read(path)
    assert text.startswith("my-run my-run digits · 56,084 parameters · begun 2026-01-02 03:04:05")
    figures = text[: text.index("Evaluation")]
    for said in (
        f"Log-evidence of the test part {MINUS}88.1235 ± 0.0031 nats per datum",
        "Sampling error of the test set ± 0.23 nats per datum",
        "Particles 5,000",
        "Data 1,000",
        "Bits per dimension 0.162",
        f"Best validation ELBO {MINUS}93.12 nats per datum, at epoch 2",
        "Training time 1 min 30 s 3 epochs",
    ):
        assert said in figures
    assert "score" not in text
    assert ("html", {"lang": "en"}) in reader.tags


def test_the_tables_hold_the_rest(tmp_path):
    _, text = read(write_report(make_run(tmp_path)))
    for said in (
        "image shape 8, 8",
        "learning rate 0.0005",
        "kl weight none",
        "torch 2.15.0",
        "preparation binarized at 0.5",
        f"elbo {MINUS}91.5",
    ):
        assert said in text


def test_the_pair_is_calls_within_calls(tmp_path):
    _, text = read(write_report(make_run(tmp_path)))
    assert (
        "model vae.Model prior priors.VampPrior encoder networks.mlp in_dim 64 hidden_dims 200, 200"
        " guide vae.Guide encoder networks.mlp, the one above family families.normal low 0.01"
    ) in text


@pytest.mark.parametrize(("pair", "said"), [
    (None, "no recipe of it is recorded"),
    ({"model": {"hidden": [1, 2]}, "guide": "own"}, "model hidden 1, 2 guide own"),
    ({"nodes": [], "objects": [{"node": 4}]}, "node 4"),
])  # fmt: skip
def test_any_pair_is_shown(pair, said, tmp_path):
    assert said in read(write_report(make_run(tmp_path, {**CONFIG, "pair": pair})))[1]


def test_everything_is_within_the_page(tmp_path):
    run = make_run(tmp_path)
    for name in ("bound", "latents", "evidence", "graph_model"):
        plots.save(plots.latents(np.eye(2)), run / f"{name}.png")
    reader, text = read(write_report(run))
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 4
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert all(image["alt"] for image in images)
    # 7.6 inches of 100 CSS pixels.
    assert images[0]["width"] == "760"
    order = ["The bound in training", "latent space", "Log-evidence of each datum"]
    assert [text.index(name) for name in order] == sorted(text.index(name) for name in order)
    page = re.sub(r"data:image/png;base64,[^\"]*", "", (run / "report.html").read_text())
    assert "http" not in page
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_text_of_the_files_is_escaped(tmp_path):
    bad = '<script>alert("1")</script>'
    config = {
        "data": {"name": bad, bad: [bad]},
        "pair": {bad: {bad: bad}},
        "options": {bad: {bad: [[bad]]}},
        "versions": {bad: bad},
        "created": bad,
    }
    evidence = {**EVIDENCE, "part": bad, bad: bad}
    run = make_run(tmp_path / "<b>&amp;", config, [{bad: bad}], evidence)
    reader, text = read(write_report(run))
    assert not {"script", "b"} & {tag for tag, _ in reader.tags}
    assert text.count(bad) >= 12
    assert text.startswith("<b>&amp; <b>&amp;")


def test_without_evidence_it_says_so(tmp_path):
    _, text = read(write_report(make_run(tmp_path, evidence=None)))
    assert "Not evaluated so far" in text
    assert f"Best validation ELBO {MINUS}93.12" in text


def test_a_score_is_nowhere_called_log_evidence(tmp_path):
    run = make_run(tmp_path, evidence={**EVIDENCE, "quantity": "score"}, records=RECORDS[:0])
    plots.save(plots.evidence([-1.0], -1.0, 0.1, 0.1, name="score"), run / "evidence.png")
    _, text = read(write_report(run))
    assert f"Score of the test part {MINUS}88.1235 ± 0.0031" in text
    assert "This is a score and no log p(x): the likelihood is no density" in text
    assert "Score of each datum" in text
    assert text.count("log p(x)") == 1
    for name in ("evidence", "elbo", "bits per dim"):
        assert name not in text.lower()


@pytest.mark.parametrize(
    "config", [{"data": {}}, {"data": {}, "pair": [], "options": {}, "created": 3}]
)
def test_missing_keys_are_left_out(config, tmp_path):
    _, text = read(write_report(make_run(tmp_path, config, [{}, {"epoch": 2}], {"seed": None})))
    assert "seed none" in text


def test_broken_files_are_named_on_the_page(tmp_path):
    run = make_run(tmp_path, evidence=None)
    (run / "evidence.json").write_bytes(b'{"log_evid\xff')
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('[1]\n{"epoch": 4, "elb')
    (run / "samples.png").write_bytes(b"not a picture")
    (run / "graph_model.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    _, text = read(write_report(run))
    assert "evidence.json can't be read" in text
    assert "2 of the lines of metrics.jsonl can't be read" in text
    assert "samples.png can't be read as a PNG" in text
    assert "graph_model.png can't be read as a PNG" in text
    assert f"Best validation ELBO {MINUS}93.12" in text
    (run / "metrics.jsonl").unlink()
    assert "There is no metrics.jsonl" in read(write_report(run))[1]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"is no run directory: it has no config\.json"):
            write_report(folder)
    for content in ("{", "[1]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_it_is_rewritten_alike_and_leaves_nothing_behind(tmp_path):
    run = make_run(tmp_path)
    before = {path.name for path in run.iterdir()}
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_bound_of_a_run_is_drawn_as_what_it_is(decay, tmp_path, monkeypatch):
    said = []
    bound = plots.bound

    def watched(records: Any, **options: Any) -> Any:
        said.append(options)
        return bound(records, **options)

    monkeypatch.setattr(plots, "bound", watched)
    fit(*param_pair(), bits(60), epochs=1, ema_decay=decay, out=tmp_path)
    assert said == [{"averaged": decay is not None}]
