"""Fixtures of more than one file."""

from typing import Any

import pytest
import torch

from pyro_vae.graph.capture import Captured


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """Graphs of steps are interpreted instead of compiled; gives the graphs so far."""
    return interpreting(monkeypatch, "pyro_vae.inference.step_graph.lower")


@pytest.fixture
def interpreted_weights(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """Likewise the graphs of log-weights."""
    return interpreting(monkeypatch, "pyro_vae.evidence.compiled.lower")


def interpreting(monkeypatch: pytest.MonkeyPatch, compiler: str) -> list[Captured]:
    graphs: list[Captured] = []

    def interpret(captured: Captured, static: Any, data: Any) -> Any:
        graphs.append(captured)
        module, reached = captured.module, captured.reached
        return torch.no_grad()(lambda arguments: module(*static, *arguments, *reached))

    monkeypatch.setattr(compiler, interpret)
    return graphs
