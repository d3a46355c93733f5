# The commands a person types. Each one sets up what it needs first; nothing outside .venv is touched.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# The lock file that fits the driver: CUDA 12 and 11 drivers cannot run the newest torch and DALI.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: \([0-9]*\).*/\1/p')
LOCK ?= $(if $(filter 12,$(CUDA)),requirements-cuda120.lock,$(if $(filter 11,$(CUDA)),requirements-cuda110.lock,requirements.lock))

.PHONY: setup demo test test-nightly check bench lock clean

setup: $(VENV)/.installed

$(VENV)/.installed: $(LOCK) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "uv>=0.8"
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r $(LOCK)
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

demo: setup  ## train on real JPEGs: no GPU, no download
	$(BIN)/cmtrain demo

test: setup  ## what continuous integration runs, with `check`
	$(BIN)/python -m pytest -m "not slow"

test-nightly: setup
	$(BIN)/python -m pytest

check: setup  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/cmtrain bench

lock: setup  ## pin again, from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra cuda130 $(COMPILE) -o requirements.lock
	echo "torch<2.11" | $(BIN)/uv pip compile pyproject.toml --extra cuda120 $(COMPILE) -c - -o requirements-cuda120.lock
	echo "torch<2.11" | $(BIN)/uv pip compile pyproject.toml --extra cuda110 $(COMPILE) -c - -o requirements-cuda110.lock

COMPILE := -q -U --extra demo --extra dev --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache dist
