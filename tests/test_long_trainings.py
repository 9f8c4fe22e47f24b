"""Many short epochs: what is written and copied after each must not grow with their number."""

from itertools import count

import pytest
import torch
from fit_pairs import fast, fit
from helpers import bernoulli_pair, bits

import pyro_vae as pv
from pyro_vae.inference.loop import Loop
from pyro_vae.runs.directory import Run


def test_metrics_that_take_long_to_write_are_written_seldom(tmp_path, monkeypatch):
    """By a clock on which writing takes as long as an epoch, a twentieth of the time is spent."""
    pair, x, now, written = bernoulli_pair(), bits(20), count(), []
    monkeypatch.setattr("pyro_vae.runs.training.time.monotonic", lambda: float(next(now)))
    write = Run.write_metrics

    def watched(run: Run, records: list) -> None:
        written.append(len(records))
        next(now)
        write(run, records)

    monkeypatch.setattr(Run, "write_metrics", watched)
    history = fit(*pair, x, epochs=60, out=tmp_path / "run", pictures=False)
    assert written[0] == 1
    assert 2 < len(written) < 20
    assert written[-1] == 60
    kept, lost = Run(tmp_path / "run").read_metrics()
    assert (len(kept), lost) == (60, 0)
    assert [record["elbo"] for record in kept] == history["elbo"]


def test_the_start_of_an_epoch_is_kept_without_a_copy_of_all_records():
    svi = pv.SVI(*bernoulli_pair(), fast)
    x = bits(20)
    svi.setup(x)
    loop = Loop(svi, (x,), (x,), batch_size=10, seed=0)
    for _ in range(3):
        loop.run_epoch()
    start = loop._start
    assert start is not None
    assert len(start["records"]) == 2
    assert all(old is new for old, new in zip(start["records"], loop.records, strict=False))
    # What training changes in place is a copy.
    before = {name: p.clone() for name, p in svi.parameters.named.items()}
    loop.load_state_dict(start)
    assert len(loop.records) == 2
    assert any(not torch.equal(p, before[name]) for name, p in svi.parameters.named.items())
    loop.run_epoch()
    assert all(
        torch.allclose(p, before[name], rtol=1e-6) for name, p in svi.parameters.named.items()
    )


@pytest.mark.parametrize("patience", [2, 5])
def test_patience_counts_from_the_end_of_the_warm_up(patience):
    """A validation bound that never gains: of zeros, for a pair that learns ones."""
    train, valid = torch.ones(20, 9), torch.zeros(20, 9)
    options = {"patience": patience, "kl_weight": pv.warmup(10), "optimizer": fast, "epochs": 50}
    history = fit(*bernoulli_pair(), train, valid=valid, **options)
    assert history.best_epoch == 1
    assert len(history.records) == 9 + patience
