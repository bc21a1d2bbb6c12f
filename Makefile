# make train    from a fresh clone to a trained small model (installs first)
# make check    formatting, lint, types, the shape of the house     make test    the laws that a CPU can check in minutes

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# For your own index or cache: make setup PIP_ARGS="--index-url ..."
PIP_ARGS ?=
PYTEST_ARGS ?=
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints-cpu.txt
INSTALLED := .venv/installed

.PHONY: setup train check test faults chaos clean
.DELETE_ON_ERROR:

setup: $(INSTALLED)

# In two steps and without build isolation: DeepSpeed comes as source, and its build asks the torch that is installed.
# DS_BUILD_OPS=0 builds none of its C++ and CUDA parts; megagrok uses none of them.
$(INSTALLED): setup.py constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megagrok needs Python 3.11 or newer, this is " \
		+ sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (a few minutes, once)"
	$(PIP_INSTALL) torch==2.13.0 setuptools wheel ninja packaging psutil py-cpuinfo
	DS_BUILD_OPS=0 $(PIP_INSTALL) --no-build-isolation -e '.[cpu,dev]'
	@touch $@

train: setup
	$(BIN)/megagrok train configs/run/quickstart.yaml

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layering.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)

# Seconds to two minutes: the laws of docs/reliability that every commit checks, also part of make test.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "fault and not slow" $(PYTEST_ARGS)

# Ten minutes on two cores: the rest of them. The reports are left in docs/reliability.
chaos: setup
	$(BIN)/megagrok drill kill --rounds 100 --seed 1 --report docs/reliability/kill
	$(BIN)/megagrok drill preempt node-loss hang slow corrupt disk-full nan --rounds 5 --seed 1 --report docs/reliability/drill
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "fault and slow" -rA --no-header --disable-warnings --tb=short | tee docs/reliability/slow-tier.txt

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
