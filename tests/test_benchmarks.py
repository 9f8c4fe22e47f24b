"""The benchmarks check what they time, and the committed page is what the committed figures say."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PERFORMANCE = ROOT / "docs" / "performance"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    yield
    for name in [name for name in sys.modules if name.startswith("experiments")]:
        del sys.modules[name]


def test_no_figure_is_typed_by_hand():
    from experiments.benchmarks.report import page

    assert (ROOT / "docs" / "performance.md").read_text() == page(PERFORMANCE)


def test_what_was_not_measured_leaves_no_empty_table():
    from experiments.benchmarks.report import page

    lines = pairwise(page(PERFORMANCE).splitlines())
    assert all(below.startswith("|") for above, below in lines if above.startswith("|---"))


def test_every_machine_states_its_protocol_and_has_its_picture():
    files = list(PERFORMANCE.glob("*.json"))
    assert files
    for file in files:
        figures = json.loads(file.read_text())
        assert {"machine", "versions", "date", "protocol", "floor", "steps"} <= set(figures)
        assert file.with_suffix(".png").exists()
        for timing in figures["steps"]:
            assert timing["agreement"]
            for entry in timing["contestants"].values():
                assert len(entry["rounds"]) == timing["rounds"]


def test_contestants_that_compute_another_loss_are_refused():
    from experiments.benchmarks.agreement import check

    reference = [100.0 + 0.1 * (i % 7) for i in range(200)]
    assert check({"torch_eager": reference, "numpyro_svi": reference[::-1]})
    with pytest.raises(SystemExit, match="numpyro_svi"):
        check({"torch_eager": reference, "numpyro_svi": [value + 1.0 for value in reference]})


def test_everybody_starts_from_the_same_weights():
    from experiments.benchmarks.workloads import WORKLOADS, batch, weights

    for workload in WORKLOADS.values():
        one, other = weights(workload, 0), weights(workload, 0)
        assert all((one[name] == other[name]).all() for name in one)
        assert batch(workload, 0).shape == (workload.batch_size, workload.data_dim)
        assert set(batch(workload, 0).ravel().tolist()) == {0.0, 1.0}


@pytest.mark.slow
def test_the_command_measures_and_keeps(tmp_path, monkeypatch, capsys):
    from experiments.benchmarks.__main__ import main

    out = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["benchmarks", "--smoke", "--out", str(out)])
    main()
    (timing,) = json.loads(out.read_text())["steps"]
    assert {"pyro_vae_compiled", "pyro_svi", "torch_whole_step"} <= set(timing["contestants"])
    monkeypatch.setattr("sys.argv", ["benchmarks", "--smoke", "--resume", "--out", str(out)])
    main()
    assert json.loads(out.read_text())["steps"] == [timing]
