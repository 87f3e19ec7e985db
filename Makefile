# `make demo` runs the main job on real text, `make test` the tests; each does all of its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRITON := build/triton
# What the programs set for themselves (fusiontree/machine.py), for the tests too.
export GOMP_SPINCOUNT := 5000

.PHONY: demo test triton bench lint types types-strict docs clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadgroup

# The adapters to Triton kernels with the real kernels, which Triton's interpreter runs on a CPU, in some minutes.
triton: $(TRITON)/.ready
	TRITON_INTERPRET=1 PYTHONPATH=tests/kernels $(TRITON)/bin/python -W ignore tests/interpreted.py

# Some two hours on two cores; nothing else should run meanwhile.
bench: $(READY)
	$(BIN)/python benchmarks/ops.py
	for tokens in 1024 4096; do for task in forward training; do $(BIN)/python benchmarks/peers.py --task $$task --tokens $$tokens; done; done
	$(BIN)/python benchmarks/peers.py --task prefill --tokens 4096
	for batch in 1 8; do $(BIN)/python benchmarks/peers.py --task decode --tokens 1024 --batch $$batch; done
	$(BIN)/python benchmarks/peers.py --task forward --tokens 16384 --window 1024
	$(BIN)/python benchmarks/peers.py --task training --tokens 16384 --window 1024 --pairs 2
	$(BIN)/python benchmarks/peers.py --task forward --tokens 65536 --window 1024 --pairs 1
	$(BIN)/python benchmarks/peers.py --task forward --tokens 8192 --window 1024 --sides "fusiontree compiled"
	for tokens in 8192 65536; do $(BIN)/python benchmarks/peers.py --task training --tokens $$tokens --window 1024 --sides "fusiontree compiled" --pairs 2; done
	for tokens in 4096 65536; do $(BIN)/python benchmarks/peers.py --task decode --tokens $$tokens --window 1024 --sides "fusiontree compiled"; done
	for task in forward training; do $(BIN)/python benchmarks/peers.py --task $$task --tokens 2048 --dtype float32 --sides transformers fusiontree; done
	for task in forward training prefill; do $(BIN)/python benchmarks/half.py --task $$task; done
	for dtype in bfloat16 float32; do $(BIN)/python benchmarks/families.py --dtype $$dtype; done
	$(BIN)/python benchmarks/block.py --task forward
	$(BIN)/python benchmarks/block.py --task training
	$(BIN)/python benchmarks/block.py --task training --window 1024
	$(BIN)/python benchmarks/report.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --jobs=2 --output-sync types types-strict

types:
	$(BIN)/pyright

# Strict, but for the types that libraries do not tell and for checks of what users pass.
types-strict:
	$(BIN)/pyright --project pyright-strict.json

docs: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/sphinx-build --quiet --fail-on-warning docs docs/_build/html
	@echo "open docs/_build/html/index.html"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Its interpreter wants numpy before 2.4; mamba-ssm without its compiled extension is pure Python.
$(TRITON)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TRITON)
	grep -v "^numpy" constraints.txt > $(TRITON)/constraints.txt
	$(TRITON)/bin/pip install --quiet --disable-pip-version-check --constraint $(TRITON)/constraints.txt --editable . "numpy<2.4" setuptools wheel packaging ninja
	$(TRITON)/bin/pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0 fla-core==0.6.0
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(TRITON)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation mamba-ssm==2.3.2.post1
	@touch $@

clean:
	rm -rf $(VENV) $(TRITON) outputs docs/_build
