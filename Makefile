# `make demo` runs the main job on real text, `make test` the tests; each does all of its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Threads that wait for each other soon sleep: on busy cores spinning ones are ten times slower.
export GOMP_SPINCOUNT := 5000

.PHONY: demo test bench lint docs clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadgroup

bench: $(READY)
	$(BIN)/python benchmarks/peers.py --task forward --tokens 4096
	$(BIN)/python benchmarks/peers.py --task training --tokens 4096
	$(BIN)/python benchmarks/peers.py --task forward --tokens 16384 --window 1024

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/sphinx-build --quiet --fail-on-warning docs docs/_build/html
	@echo "open docs/_build/html/index.html"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) outputs docs/_build
