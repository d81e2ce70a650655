# `make demo`, `make test` and `make check` each work alone on an empty machine with Python 3.11 or newer.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || echo python3)
# Without an NVIDIA GPU, the one version that CI tests; with one, the newest build. Handed to `pip install`.
TORCH_VERSION ?= 2.13.0
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==$(TORCH_VERSION))
# What the tests need: every optional part that runs on any machine.
EXTRAS ?= dev,eval,train,ray,peers
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
NO_GPU := $(if $(shell command -v nvidia-smi),,and not gpu)

# The repository root must not be on sys.path: our folder `kernels` would stand before Hugging Face's package.
export PYTHONSAFEPATH := 1

.PHONY: help demo test check lint format types devtree clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The stamps: what is installed stays until pyproject.toml changes.
$(VENV)/.torch:
	@echo "Installing $(TORCH) into $(VENV) (a few minutes, once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffeff needs Python 3.11 or newer")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.base: pyproject.toml $(VENV)/.torch
	@echo "Installing diffeff ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	@echo "Installing diffeff[$(EXTRAS)] ..."
	@$(PIP) --editable ".[$(EXTRAS)]"
	@touch $(VENV)/.base $@

demo: $(VENV)/.base ## a clip from a bundled model, plain and accelerated: out/demo.side-by-side.mp4, out/demo.sheet.png
	@mkdir -p out
	$(BIN)/diffeff generate "a red circle moving left, camera pans right" --compare -o out/demo.mp4

test: $(VENV)/.dev ## the test suite; ARGS="-k cache -x" is handed to pytest
	$(BIN)/python -m pytest -m "not network $(NO_GPU)" $(ARGS)

check: lint types test ## everything that has to pass before a commit

lint: $(VENV)/.dev ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev ## format, and apply the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.dev devtree ## mypy --strict
	$(BIN)/mypy --strict

# Type checkers do not follow setuptools' package-dir mapping: this is the installed layout, in symlinks.
devtree: ## the installed layout in symlinks, for type checkers and editors
	@rm -rf .devtree
	@mkdir -p .devtree/diffeff
	@ln -s $(foreach entry,$(filter-out %/__pycache__,$(wildcard diffeff/*)),../../$(entry)) .devtree/diffeff/
	@ln -s $(addprefix ../../,kernels pipelines apps eval) .devtree/diffeff/

clean: ## remove the environment and everything built
	rm -rf $(VENV) .devtree build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache
