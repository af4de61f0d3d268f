# Each target makes .venv by itself; only Python >= 3.11 and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train r1 test test-all mutants bench docs lint clean

train: $(READY)
	@$(BIN)/python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny

# From nothing to a model that has learned a task by reinforcement.
r1: $(READY)
	@$(BIN)/python -m experiments.r1 --workdir=runs/r1

# The tests' shapes are so small that compiling is most of their time; files
# go in the order of their names, the many small ones of the root last.
test: $(READY)
	@JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"
	@echo "The slow tests were left out: 'make test-all' runs them, too."

test-all: $(READY)
	@$(BIN)/python -m pytest -q

# Wrong programs by the hundred, and the tests that see them: tests/mutants.md.
mutants: $(READY)
	@$(BIN)/python tests/mutants.py

bench: $(READY)
	@$(BIN)/python -m experiments.bench train

docs: $(READY)
	@$(BIN)/python -m sphinx -q -W -b html docs docs/_build
	@echo docs/_build/index.html

lint: $(READY)
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

$(READY): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else f"Python {v} is too old: mla_moe needs 3.11 or newer; run make PYTHON=python3.11")'
	@echo "Setting up .venv (once, about two minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
