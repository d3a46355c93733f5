# The commands a person types. Each one sets up what it needs first; nothing outside .venv is touched.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# The lock file that fits driver and GPUs. Drivers for CUDA 12, and GPUs older than Turing (compute capability
# 7.5), cannot run the newest torch and DALI. Since driver 610 nvidia-smi prints "CUDA UMD Version".
CUDA    := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA \(UMD \)*Version: \([0-9]*\).*/\2/p')
OLD_GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | awk '/^[0-9.]+$$/ && $$1 < 7.5' | head -n 1)
LOCK    ?= $(if $(filter 12,$(CUDA))$(OLD_GPU),requirements-cuda120.lock,requirements.lock)
# No lock can use a GPU through a driver for CUDA 11 or older: torch needs driver 525.
TOO_OLD := $(if $(filter file,$(origin LOCK)),$(filter 8 9 10 11,$(CUDA)))

# Environments for the other DALIs that are supported, the last one of nvidia-dali-cuda110 and the newest: layers over VENV
# that differ in DALI alone. What 1.34 needs, at the version and hashes of its lock file:
DALI110_NAMES := nvidia-dali-cuda110 dm-tree absl-py attrs wrapt
SITE          := 'import sysconfig; print(sysconfig.get_path("purelib"))'

.PHONY: setup tools tools-nightly demo test test-dali110 test-dali24 test-nightly check bench dashboards image dist lock clean

setup: $(VENV)/.installed

# The wheels of DALI 1.34 end with Python 3.12.
NEEDED   := 3.11 or $(if $(filter %cuda110.lock,$(LOCK)),3.12,newer)
BEFORE   := 3, $(if $(filter %cuda110.lock,$(LOCK)),13,99)
UNUSABLE := Python $(NEEDED) is needed; name one, as in: make setup PYTHON=python3.12

# docker/build.lock: uv, and what builds the wheel. All that is fetched here has to have a hash of a lock file.
$(VENV)/.installed: $(LOCK) docker/build.lock pyproject.toml
	@if [ "$(TOO_OLD)" ]; then echo "the NVIDIA driver is for CUDA $(TOO_OLD): install driver 525 or newer, or ask for a CPU's packages with LOCK=requirements.lock" >&2; exit 2; fi
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < ($(BEFORE)) and "$(PYTHON): $(UNUSABLE)")'
	@echo "installing torch, DALI and the rest into $(VENV): about 6 GB, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --disable-pip-version-check --no-deps --only-binary :all: --require-hashes -r docker/build.lock
	@$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --offline -e .
	@$(BIN)/uv pip install --python $(BIN)/python --require-hashes -r $(LOCK)
	@touch $@

demo: setup  ## train on real JPEGs: no GPU, no download
	$(BIN)/cmtrain demo

# Programs that tests start, as packages of Debian and Ubuntu. Where one is missing its tests are skipped and
# listed; with TOOLS=required they fail.
TOOLS_TEST    := prometheus prometheus-alertmanager chromium gcc libc6-dev
TOOLS_NIGHTLY := podman runc debootstrap iproute2
INSTALL       := DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends
have           = for tool in $(1); do command -v $$tool >/dev/null || exit 1; done
TOOLS         ?=
PYTEST        := -m pytest $(if $(filter required,$(TOOLS)),--tools-required)

tools:  ## as root: the programs that `make test` uses
	@($(call have,prometheus promtool amtool chromium cc)) || { apt-get update -q && $(INSTALL) $(TOOLS_TEST); }

tools-nightly: tools  ## as root: those of `make test-nightly`, too
	@($(call have,podman runc debootstrap ip)) || { apt-get update -q && $(INSTALL) $(TOOLS_NIGHTLY); }

test: setup  ## what continuous integration runs, with `check`
	$(BIN)/python $(PYTEST) -n 2 --dist loadfile -m "not slow"

# What 1.34 itself warns about, and nothing of ours.
DALI110_WARNS := -W "ignore:invalid escape sequence:DeprecationWarning" \
	-W "ignore:The distutils package is deprecated:DeprecationWarning" \
	-W "ignore:distutils Version classes are deprecated:DeprecationWarning"
test-dali110: VERSION_WANTED := 1.34.
test-dali24:  VERSION_WANTED := 2.4.
test-dali110 test-dali24: test-dali%: $(VENV)-dali%/.installed  ## the tests of the pipelines on DALI 1.34 and 2.4
	$(VENV)-dali$*/bin/python -c 'import nvidia.dali as dali; print("DALI", dali.__version__); assert dali.__version__.startswith("$(VERSION_WANTED)")'
	$(VENV)-dali$*/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(DALI110_WARNS) tests/pipelines

$(VENV)-dali110/requirements.txt: requirements-cuda110.lock
	@mkdir -p $(@D)
	for name in $(DALI110_NAMES); do sed -n "/^$$name==/,/[^\\]$$/p" $<; done > $@

$(VENV)-dali24/requirements.txt: tests/requirements-dali24.lock
	@mkdir -p $(@D)
	cp $< $@

$(VENV)-dali%/.installed: $(VENV)-dali%/requirements.txt $(VENV)/.installed
	$(BIN)/uv venv -q --allow-existing --python $(BIN)/python $(@D)
	$(BIN)/uv pip sync -q --python $(@D)/bin/python --require-hashes $<
	echo "import site; site.addsitedir('$$($(BIN)/python -c $(SITE))')" > $$($(@D)/bin/python -c $(SITE))/layer.pth
	@touch $@

test-nightly: setup  ## everything, the slow tests too
	$(BIN)/python $(PYTEST)

check: setup  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/cmtrain bench

dashboards: setup  ## Grafana's JSON again, from docker/grafana/panels.py
	$(BIN)/python docker/grafana/dashboards.py

# The image's target (runtime or cpu) and what builds it (docker or podman).
TARGET   ?= runtime
DOCKER   ?= docker
# Its name, and more options for the build. podman keeps the health check only in Docker's format.
IMAGE    ?= cmtrain
BUILD    ?=
export BUILDAH_FORMAT := docker
VERSION  := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' cmtrain/__init__.py)
REVISION := $(shell git rev-parse HEAD 2>/dev/null)

image:  ## the container image, with the lock file that fits this machine's driver
	$(DOCKER) build $(BUILD) -f docker/Dockerfile --target $(TARGET) -t $(IMAGE) -t $(IMAGE):$(VERSION) \
		--build-arg LOCK=$(LOCK) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) .

dist: setup  ## wheel and source archive
	$(BIN)/uv build -q --build-constraints docker/build.lock --require-hashes

lock: setup  ## pin again, from pyproject.toml
	echo "nvidia-dali-cuda130$(DALI_2)" | $(BIN)/uv pip compile pyproject.toml --extra cuda130 $(COMPILE) -c - -o requirements.lock
	printf '%s\n' "torch<2.11" "nvidia-dali-cuda120$(DALI_2)" | $(BIN)/uv pip compile pyproject.toml --extra cuda120 $(COMPILE) -c - -o requirements-cuda120.lock
	echo "torch<2.11" | $(BIN)/uv pip compile pyproject.toml --extra cuda110 $(COMPILE) -c - -o requirements-cuda110.lock
	printf '%s\n' editables hatchling uv | $(BIN)/uv pip compile - $(BARE) -o docker/build.lock
	printf '%s\n' "nvidia-dali-cuda130~=2.4.0" "nvidia-nvimgcodec-cu13~=0.9.0" "nvidia-libnvcomp-cu13~=5.3" \
		nvidia-nvjpeg nvidia-nvjpeg2k-cu13 nvidia-nvtiff-cu13 | $(BIN)/uv pip compile - $(BARE) --no-deps -o tests/requirements-dali24.lock

# The last DALI that goes with nvImageCodec 0.8. 0.9 is reported to crash on an H100 when it decodes regions, and
# decodes them on the CPU where nvJPEG is older than 13.2, as it is for CUDA 12.
DALI_2  := <2.3
COMPILE := -q -U --extra demo --extra dev --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header
BARE     = $(filter-out --extra demo dev,$(COMPILE))

clean:
	rm -rf $(VENV) $(VENV)-dali* .pytest_cache .ruff_cache .mypy_cache dist
