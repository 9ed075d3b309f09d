# make demo        install into .venv, pre-train a small EVE on two expert-parallel ranks, report its results
# make demo-seeds  the same for three seeds
# make test        install the development tools as well, then run every test
# make lint        ruff (rules and format), mypy, codespell
# make format      apply ruff's fixes and formatting
# make soak        minutes of fault tests: 25 kills in a row, signals under every launcher, a checkpoint of 4 GiB,
#                  20,000 samples of a faulty server through ten kills
# make gpu         on a machine with a GPU: build, test, sanitize and time the ops in eight minutes
#                  (without network: make gpu WHEELS=DIR)
# make gpu-wheels  collect DIR: the packages that a machine with torch, transformers and pytest still lacks
# Another interpreter: make PYTHON=python3.12 ...    Single tests: make test TESTS="tests/config -k nearest"

PYTHON ?= python3
TESTS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
SEVERAL := tests/distributed tests/launch
IN_PARALLEL := -n logical --maxprocesses 8 --dist loadfile
GPU_PYTHON ?= 3.12
GPU_PACKAGES := pydantic|pydantic_core|annotated-types|typing-inspection|webdataset|braceexpand|msgpack
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu

# Take the launchers (deepspeed, torchrun, mpirun) and the programs they start from the environment.
MACHINE_PATH := $(PATH)
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Compile no DeepSpeed extension at installation; a CPU needs none.
export DS_BUILD_OPS := 0
# Run one thread per rank: two per rank on shared cores can be ten times slower.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE

.PHONY: venv venv-dev demo demo-seeds test soak gpu gpu-wheels lint format clean

venv: $(INSTALLED)

venv-dev: $(INSTALLED_DEV)

# Without a GPU driver, install the CPU build of torch first, so that no later line pulls CUDA packages: from pip's own
# sources if they have it (a local mirror, a folder of wheels), otherwise from PyTorch's index of CPU builds.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " \
	  + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@echo "Installing into $(VENV): a few minutes, mostly downloads"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	nvidia-smi > /dev/null 2>&1 || $(BIN)/pip install -q -c constraints.txt torch==$(TORCH)+cpu 2> /dev/null || \
	  $(BIN)/pip install -q -c constraints.txt --index-url $(CPU_INDEX) torch==$(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

# Tests and linters on top; the stamp of the runtime is a prerequisite, so that both follow the same files.
# Megatron's dependencies are large, and tensor parallelism needs none of them.
$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps megatron-core
	touch $@

demo: $(INSTALLED)
	$(BIN)/python launcher/demo.py --out runs/demo

demo-seeds: $(INSTALLED)
	$(BIN)/python launcher/demo.py --out runs/demo --seeds 3

# Use a new cache of DeepSpeed extensions per run: a killed build leaves a lock there, and the next build waits for it.
# Tests that start several processes have time limits: they run one after another, all other tests on all cores.
test: $(INSTALLED_DEV)
	@extensions=$$(mktemp -d) && trap 'rm -rf "$$extensions"' EXIT && \
	export DS_ACCELERATOR=$${DS_ACCELERATOR:-cpu} TORCH_EXTENSIONS_DIR="$$extensions" && \
	if test -n "$(TESTS)"; then $(BIN)/pytest $(TESTS); else \
	  failed=0; $(BIN)/pytest $(IN_PARALLEL) $(SEVERAL:%=--ignore %) || failed=$$?; \
	  $(BIN)/pytest $(SEVERAL) || failed=$$?; exit $$failed; fi

soak: $(INSTALLED_DEV)
	EVE_DS_SOAK=1 $(MAKE) test TESTS="-s tests/launch/test_kills.py \
	  tests/launch/test_signals.py tests/launch/test_slurm.py tests/launch/test_universal_memory.py \
	  tests/data/remote/test_remote_shards.py"

gpu:
	PATH="$(MACHINE_PATH)" $(PYTHON) launcher/gpu.py --out runs/gpu $(if $(WHEELS),--wheels $(WHEELS))

# Collect the versions of this environment for the other machine's interpreter. DeepSpeed compiles its ops on first use.
gpu-wheels: $(INSTALLED)
	$(BIN)/pip download -q --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels \
	  $$($(BIN)/pip freeze | grep -i -E '^($(GPU_PACKAGES))==')
	$(BIN)/pip wheel -q --no-deps -w wheels $$($(BIN)/pip freeze | grep -E '^(deepspeed|hjson)==')

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keep runs and data sets.
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
