"""Running all experiments: shares of a budget, going on, failures that stop no other, pages."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SCRIPT = runpy.run_path(str(EXPERIMENTS / "everything.py"))
JOBS = SCRIPT["JOBS"]

# Stands for every experiment: trains an epoch a call, and writes down how it was called.
FAKE = """
import json, sys
from pathlib import Path
name, words = Path(sys.argv[0]).stem, sys.argv[1:]
out = Path(words[words.index("--out") + 1])
out.mkdir(exist_ok=True)
with (out / "calls.jsonl").open("a") as file:
    file.write(json.dumps(words) + "\\n")
if name == "autoencoders":
    raise SystemExit("first line\\nautoencoders.py: the data are missing; put them there")
epochs = len((out / "calls.jsonl").read_text().splitlines())
row = {"name": "one", "epochs": min(epochs, 2), "of_epochs": 2}
protocol = {"epochs": words[words.index("--epochs") + 1] if "--epochs" in words else "full"}
(out / "results.json").write_text(json.dumps({"title": name, "protocol": protocol, "rows": [row]}))
(out / f"{name}.png").touch()
"""

BEHIND_A_SHELL = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkout whose experiments are fakes."""
    experiments = tmp_path / "experiments"
    experiments.mkdir()
    for name in ("everything.py", "tables.py", "notes.md"):
        shutil.copyfile(EXPERIMENTS / name, experiments / name)
    for job in JOBS.values():
        (experiments / f"{job.script}.py").write_text(FAKE)
    (tmp_path / "docs" / "evidence").mkdir(parents=True)
    return tmp_path


def call(folder: Path, *options: str, by: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    words = [*by, sys.executable, str(folder / "experiments" / "everything.py")]
    words += ["--out", str(folder / "runs"), *options]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def calls(folder: Path, name: str) -> list[list[str]]:
    path = folder / "runs" / name / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.parametrize("job", JOBS.values(), ids=list(JOBS))
def test_every_job_is_a_script_with_these_options(job):
    text = (EXPERIMENTS / f"{job.script}.py").read_text()
    options = {"--out", "--device", "--smoke", "--root", "--budget"}
    options |= {word for word in f"{job.options} {job.reduced}".split() if word.startswith("--")}
    written = re.findall(r'"(--[a-z0-9-]+)"', text)
    listed = re.findall(r'^    "([a-z-]+)": \(', text, re.MULTILINE)  # of full_vb.py, in a table
    assert options <= {*written, *(f"--{name}" for name in listed)}
    assert job.weight > 0
    assert f'"{job.script}.png"' in text.replace("args.out / ", "").replace('f"', '"')


def test_a_budget_is_shared_by_weight_and_what_is_not_needed_goes_on(folder):
    names = ["estimator_study_digits", "full_vb_digits", "aevb_bound"]
    told = call(folder, "--only", *names, "--budget", "60")
    assert told.returncode == 0, told.stderr
    weights = [JOBS[name].weight for name in names]
    for i, name in enumerate(names):  # the fakes take next to nothing of an hour
        ((*_, option, minutes),) = calls(folder, name)
        share = 0.9 * 60 * weights[i] / sum(weights[i:])
        assert option == "--budget"
        assert float(minutes) == pytest.approx(share, rel=0.02)


def test_what_is_finished_is_left_alone_and_what_is_not_goes_on(folder):
    names = ["full_vb_digits", "estimator_study_digits"]
    for times in (1, 2, 2):
        assert call(folder, "--only", *names).returncode == 0
        assert [len(calls(folder, name)) for name in names] == [times, times]
    assert call(folder, "--only", "full_vb_digits", "--device", "cuda").returncode == 0
    assert calls(folder, "full_vb_digits")[-1][-2:] == [
        "--device",
        "cuda",
    ]  # another call, another end


def test_a_failure_stops_no_other_and_is_said_at_the_end(folder):
    told = call(folder, "--only", "autoencoders_digits", "estimator_study_digits")
    assert told.returncode == 1
    assert len(calls(folder, "estimator_study_digits")) == 1
    assert "autoencoders_digits: failed (1)" in told.stdout
    assert told.stdout.rstrip().endswith("autoencoders.py: the data are missing; put them there")
    again = call(folder, "--only", "autoencoders_digits")
    assert (again.returncode, len(calls(folder, "autoencoders_digits"))) == (1, 2)


@pytest.mark.parametrize("by", [(), BEHIND_A_SHELL], ids=["in front", "behind a shell"])
def test_time_that_has_run_out_ends_a_script_and_the_others_are_left(folder, by):
    saving = f"open({str(folder / 'saved')!r}, 'w')"
    sleeping = f"import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    {saving}\n"
    (folder / "experiments" / "full_vb.py").write_text(sleeping)
    names = ["full_vb_digits", "neural_nets_digits"]
    told = call(folder, "--only", *names, "--budget", "0.02", by=by)
    assert (folder / "saved").is_file()
    assert "full_vb_digits: out of time; call again" in told.stdout
    assert "neural_nets_digits: no time left; call again" in told.stdout
    assert calls(folder, "neural_nets_digits") == []


def test_a_smoke_run_calls_every_script_once(folder):
    call(folder, "--smoke", "--root", "FOLDER")
    called = {name: words for name in JOBS if (words := calls(folder, name))}
    assert sorted(JOBS[name].script for name in called) == sorted({j.script for j in JOBS.values()})
    assert all(words[0][-1] == "--smoke" for words in called.values())
    assert call(folder, "--smoke", "--publish").returncode == 2


def test_figures_are_published_and_reduced_ones_replace_no_others(folder):
    docs = folder / "docs" / "results"
    only = ["--only", "neural_nets_binarized_mnist", "autoencoders_digits", "--publish"]
    name = f"{only[1]}.json"
    assert call(folder, *only, "--reduced", "--root", "R").returncode == 1
    assert [file.name for file in docs.iterdir() if file.suffix == ".json"] == [name]
    assert (docs / f"{only[1]}.png").is_file()
    assert json.loads((docs / name).read_text())["protocol"] == {"epochs": "5"}
    assert "## neural_nets" in (folder / "docs" / "results.md").read_text()
    call(folder, *only)
    assert json.loads((docs / name).read_text())["protocol"] == {"epochs": "full"}
    told = call(folder, *only, "--reduced")
    assert "not published" in told.stdout
    assert json.loads((docs / name).read_text())["protocol"] == {"epochs": "full"}


def written(rows: list[dict], epochs: str) -> str:
    return json.dumps({"title": "t", "protocol": {"epochs": epochs}, "rows": rows})


@pytest.mark.parametrize(
    ("there", "published"),
    [
        (([{"epochs": 2}], "full"), True),
        (([{"epochs": 2}, {"epochs": 2}], "full"), False),  # of the same protocol, and farther
        (([{"epochs": 5}], "5"), True),  # a reduced one, and ours has come to its end
        (([{"epochs": 1}], "5"), True),
    ],
)
def test_figures_of_more_epochs_are_not_replaced(folder, there, published):
    docs = folder / "docs" / "results"
    docs.mkdir()
    rows = [{"name": f"{i}", **row} for i, row in enumerate(there[0])]
    (docs / "full_vb_digits.json").write_text(written(rows, there[1]))
    only = ["--only", "full_vb_digits"]
    call(folder, *only)
    told = call(folder, *only, "--publish")  # two epochs, of two
    new = json.loads((docs / "full_vb_digits.json").read_text())
    assert (new["rows"][0]["name"] == "one") == published
    assert ("not published" in told.stdout) != published


def test_what_has_not_ended_replaces_nothing_of_another_protocol_that_has(folder):
    (folder / "docs" / "results").mkdir()
    there = folder / "docs" / "results" / "full_vb_digits.json"
    there.write_text(written([{"name": "theirs", "epochs": 1, "of_epochs": 1}], "5"))
    only = ["--only", "full_vb_digits", "--publish"]
    for times, name in enumerate(("theirs", "one"), start=1):  # two epochs, one a call
        told = call(folder, *only)
        assert json.loads(there.read_text())["rows"][0]["name"] == name
        assert ("has come to its end, and this has not" in told.stdout) == (times == 1)


@pytest.mark.parametrize(
    ("rows", "fact", "finished"),
    [
        ([{"epochs": 3, "of_epochs": 9}], {}, False),
        ([{"epochs": 9, "of_epochs": 9}, {"gain": 1.0}], {}, True),
        ([{"epochs": 3, "of_epochs": 9, "finished": True}], {}, True),  # it wanted no more
        ([{"epochs": 3, "of_epochs": 9, "diverged": True}], {}, True),
        ([{"epochs": 9, "of_epochs": 9}], {"finished": False}, False),  # a row is missing
        ([{"epochs": 3, "of_epochs": 9}], {"finished": True}, True),
    ],
)
def test_a_script_is_finished_when_its_trainings_are(rows, fact, finished, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows, **fact}))
    ledger = SCRIPT["Ledger"](tmp_path / "ledger.json")
    ledger.write("job", ["words"], 0, 1.0)
    assert ledger.finished("job", ["words"], tmp_path) == finished
    assert not ledger.finished("job", ["others"], tmp_path)
