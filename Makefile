# `make demo` and `make test` set themselves up: they need a Python of 3.10 or newer, and nothing else installed.
#
#   make demo     train the stock model and the patched one, print and plot the comparison
#   make test     lint, format check, types, tests: what continuous integration runs
#   make sweep    patch one model of every class of transformers' auto-mappings
#   make bench    the timings, the memory and the accuracy of the filter
#
# torch is installed first and alone, so that a machine that offers a build of its own (a CPU wheel, an index) can say so:
#     make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13 python3.10 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$name && break; done)
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# The pinned versions need Python 3.11; on 3.10, pip takes the newest ones that still support it.
PINS = $(shell $(BIN)/python -c 'import sys; print("--constraint constraints.txt" if sys.version_info >= (3, 11) else "")')

.PHONY: help demo test lint format types pytest slow sweep bench clean

help:
	@sed -n 's/^#   make/make/p' Makefile

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "xhead needs Python 3.10 or newer, and found none: name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Two stages, so that the demo does not wait for the development tools.
$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(PINS) --editable ".[plots]"
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet $(PINS) --editable ".[dev]"
# Builds of torch for a GPU bring their own triton; for the others its interpreter and compiler serve the tests.
	@[ "$$(uname)" != Linux ] || $(BIN)/python -c 'import triton' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet $(TRITON)
	touch $@

demo: $(VENV)/.base
	$(BIN)/python -m recipes.one_billion_word.demo

test: lint types pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS)

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

sweep: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) -m sweep

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.filter_accuracy
	$(BIN)/python -m benchmarks.spherical_losses
	$(BIN)/python -m benchmarks.spherical
	$(BIN)/python -m benchmarks.number_tokens

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
