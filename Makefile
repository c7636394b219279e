# The environment is the active one (venv or conda); where none is active, .venv in this directory.
# Works with GNU make 3.81 and later.

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
EXPERIMENT ?= tms_5-2_fast
ARGS ?=
PARALLEL ?= -n auto --maxprocesses 4 --dist worksteal

VENV := $(CURDIR)/.venv
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
# An active environment that has been deleted does not count.
ENV := $(shell [ -n "$(ACTIVE)" ] && [ -x "$(ACTIVE)/bin/python" ] && echo "$(ACTIVE)" || echo "$(VENV)")
BIN := $(ENV)/bin

# The hooks of pre-commit find their programs on PATH.
export PATH := $(BIN):$(PATH)

SETUP = PYTHON="$(PYTHON)" TORCH_VERSION="$(TORCH_VERSION)" sh scripts/setup.sh "$(ENV)"
ifneq ($(ENV),$(ACTIVE))
SAY_ENV = echo "Ready. Activate the environment with: source .venv/bin/activate"
else
SAY_ENV = echo "Ready, in the active environment $(ENV)"
endif

.PHONY: help install install-dev env env-dev check type format test test-slurm test-docs test-all demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: env ## install the package with the pinned PyTorch
	@$(SAY_ENV)

install-dev: env-dev ## the same, plus test and lint tools and the git hook
	@sh scripts/hooks.sh install
	@$(SAY_ENV)

env:
	@$(SETUP) run

env-dev:
	@$(SETUP) dev

check: env-dev ## formatting, lint and types; changes nothing
	@"$(BIN)/python" -m ruff format --check .
	@"$(BIN)/python" -m ruff check --no-fix .
	@"$(BIN)/python" -m pyright

type: env-dev ## types only
	@sh scripts/hooks.sh run pyright

format: env-dev ## fix formatting and lint
	@sh scripts/hooks.sh fix ruff-check ruff-format

test: env-dev ## the tests, without the slow ones
	@"$(BIN)/python" -m pytest -m "not slow and not slurm" $(PARALLEL)

test-slurm: env-dev ## the tests against a real SLURM, where slurm-wlm and munge are installed
	@"$(BIN)/python" -m pytest -m slurm tests/slurm

test-docs: env-dev ## every command and snippet of README and docs, shortened
	@"$(BIN)/python" scripts/run_docs.py

test-all: env-dev ## all tests, and what test-docs does
	@SPD_TESTS_CHECK_ALL=1 "$(BIN)/python" -m pytest
	@"$(BIN)/python" scripts/run_docs.py

demo: env ## decompose a toy model: make demo EXPERIMENT=tms_40-10 ARGS="steps=100"
	@"$(BIN)/spd-run" $(EXPERIMENT) $(ARGS)

clean: ## remove build products and caches; keeps .venv and out/
	@rm -rf build dist .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
