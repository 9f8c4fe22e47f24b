PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   ?= runs/digits-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-slow benchmark check format clean

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "pyro_vae needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## train on the embedded digits and judge the result
	$(BIN)/python experiments/digits.py --out $(DEMO)

test: $(VENV)/.installed  ## everything that takes seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

test-slow: $(VENV)/.installed  ## what takes minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --numprocesses=auto --dist=worksteal

benchmark: $(VENV)/.installed  ## half an hour on an idle machine: docs/performance.md
	$(BIN)/pip install --quiet --editable '.[dev,peers]'
	$(BIN)/python -m experiments.benchmarks

check: $(VENV)/.installed  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
