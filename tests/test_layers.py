"""Imports run one way, files stay small, names are findable, and importing changes nothing."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vae

ROOT = Path(pyro_vae.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
CHECKOUT = Path(__file__).parents[1]
SCRIPTS = sorted([*CHECKOUT.glob("experiments/**/*.py"), *CHECKOUT.glob("tests/**/*.py")])
PAGES = [CHECKOUT / "README.md", *sorted(CHECKOUT.glob("docs/**/*.md"))]

BELOW_RUNS = {"context", "graph", "program", "data", "inference", "evidence"}
ALLOWED = {
    "context": set(),
    "program": {"context"},
    "graph": {"context"},
    "data": set(),
    "inference": {"context", "graph"},
    "evidence": {"context", "graph", "inference"},
    "runs": BELOW_RUNS,
    "__init__": BELOW_RUNS | {"runs"},
    "options": set(),
    "cli": BELOW_RUNS | {"runs", "options", "__init__"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """The layer of a module of the package, e.g. "runs" for "pyro_vae.runs.fit"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_layers(source: str, module: str, *, is_package: bool) -> set[str]:
    """The layers that a module's source imports, its own left out."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            if origin == "pyro_vae":  # "from pyro_vae import data" may mean a layer or a name
                layers = {alias.name for alias in node.names} & set(ALLOWED)
                found |= {f"pyro_vae.{layer}" for layer in layers} or {origin}
            else:
                found.add(origin)
    ours = {name for name in found if name.split(".")[0] == "pyro_vae"}
    return {layer_of(name) for name in ours} - {layer_of(module)}


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_file = pytest.mark.parametrize("path", FILES, ids=names)


@every_file
def test_imports_run_one_way(path):
    module = module_name(path)
    layers = imported_layers(path.read_text(), module, is_package=path.name == "__init__.py")
    assert layers <= ALLOWED[layer_of(module)]


@pytest.mark.parametrize(
    ("source", "layers"),
    [
        ("import torch\nfrom pyro import poutine", set()),
        ("import pyro_vae as pv", {"__init__"}),
        ("from pyro_vae import fit", {"__init__"}),
        ("from pyro_vae import runs, data", {"runs", "data"}),
        ("import pyro_vae.runs.fit", {"runs"}),
        ("def f():\n    from pyro_vae.evidence.importance import log_weights", {"evidence"}),
        ("from pyro_vae.program.recipe import recorded", set()),
        ("from .recipe import recorded\nfrom . import vae", set()),
        ("from ..runs import fit\nfrom ..context import seeded", {"runs", "context"}),
        ("from .. import cli", {"cli"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(sorted(value)),
)
def test_the_reader_of_imports_sees_them(source, layers):
    assert imported_layers(source, "pyro_vae.program.families", is_package=False) == layers


def test_the_table_names_the_layers_that_there_are_and_has_no_circle():
    assert {layer_of(module_name(path)) for path in FILES} == set(ALLOWED)
    rest = dict(ALLOWED)
    while rest:
        lowest = [layer for layer, below in rest.items() if not below & set(rest)]
        assert lowest, f"a circle among {sorted(rest)}"
        rest = {layer: below for layer, below in rest.items() if layer not in lowest}


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: "-".join(path.parts[-2:]))
def test_a_file_holds_one_idea(path):
    assert len(path.read_text().splitlines()) <= 350


@every_file
def test_public_names_exist(path):
    module = importlib.import_module(module_name(path))
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    assert [name for name in public if not hasattr(module, name)] == []


def test_every_module_says_what_is_public():
    silent = [p for p in FILES if p.name != "__init__.py" and "__all__" not in p.read_text()]
    assert [names(path) for path in silent] == []


def test_the_names_of_the_package_are_in_its_documentation():
    for name in pyro_vae.__all__:
        assert getattr(pyro_vae, name).__doc__, name


def test_every_public_name_is_found_in_the_readme_or_on_a_page():
    text = "\n".join(page.read_text() for page in PAGES)
    homes = (pyro_vae, pyro_vae.families, pyro_vae.networks, pyro_vae.priors)
    names = {name for home in homes for name in home.__all__}
    said = {
        word
        for before in ("pv.", "families.", "networks.", "priors.", "`")
        for word in re.findall(rf"{re.escape(before)}(\w+)", text)
    }
    assert sorted(names - said) == []


SIDE_EFFECTS = """
import logging, os, random, signal, warnings
import matplotlib.figure, numpy, pyro, pyro.infer, pyro.optim, torch, tqdm
from torch.distributions import Distribution

random.seed(1); numpy.random.seed(1); torch.manual_seed(1)

def settings():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch validation": Distribution._validate_args,
        "pyro settings": pyro.settings.get(),
        "parameters": list(pyro.get_param_store().keys()),
        "torch stream": torch.get_rng_state().tolist(),
        "gpu in use": torch.cuda.is_initialized(),
        "numpy stream": repr(numpy.random.get_state()),
        "python stream": random.getstate(),
        "numpy errors": numpy.geterr(),
        "print options": (numpy.get_printoptions(), repr(torch._tensor_str.PRINT_OPTS)),
        "warnings": list(warnings.filters),
        "matplotlib": (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "interrupt": signal.getsignal(signal.SIGINT),
        "environment": dict(os.environ),
    }

before = settings()
import pyro_vae, pyro_vae.cli
after = settings()
changed = [name for name in before if before[name] != after[name]]
print("changed:", changed)
"""


def test_importing_the_package_changes_nothing_outside_it():
    result = subprocess.run(
        [sys.executable, "-c", SIDE_EFFECTS], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["changed: []"]
    assert result.stderr == ""
