# Every target makes .venv when it is missing or older than pyproject.toml or constraints.txt; nothing else is needed
# than Python >= 3.11 with pip.  PYTHON=python3.12 chooses the interpreter;  TORCH=cpu | cu126 | cu130 | ... chooses
# PyTorch's own package index (empty: whatever pip is configured for, on Linux the CUDA build of PyPI).
PYTHON ?= python3
TORCH ?=
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
INDEX := $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))
FAST := not slow and not gpu and not network
NONE_IS_FINE = test $$? -eq 5
GROUP := import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"]))
VERSION := import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python {sys.version.split()[0]} found, 3.11 or newer needed: make PYTHON=python3.11 ...")

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu lint format exactness stage-model evaluate bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(VERSION)'
	$(PYTHON) -m venv .venv
	@$(BIN)/python -c '$(GROUP)' > .venv/dev-requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(INDEX) -c constraints.txt -e . -r .venv/dev-requirements.txt
	@touch $@

demo: $(STAMP) ## the shipped model end to end: writes a video with two changes of prompt, and a contact sheet
	$(BIN)/unspool demo $(ARGS)

test: $(STAMP) ## the fast tests, on WORKERS=2 processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "$(FAST)" $(ARGS)

test-slow: $(STAMP) ## the tests that take minutes
	$(BIN)/python -m pytest -q -m "slow and not gpu and not network" $(ARGS) || $(NONE_IS_FINE)

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu $(ARGS) || $(NONE_IS_FINE)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

exactness: $(STAMP) ## print the exactness table of docs/exactness.md
	$(BIN)/unspool exactness $(ARGS)

stage-model: $(STAMP) ## train the stage model from nothing at 64 px, an estimated ten hours; MINUTES=150 ends a leg
	$(BIN)/unspool stage-model $(if $(MINUTES),--max-minutes $(MINUTES)) $(ARGS)

evaluate: $(STAMP) ## measure the stage model against the exact scorer: ARGS="--model runs/stage-64/model"
	$(BIN)/unspool evaluate stage $(ARGS)

bench: $(STAMP) ## time of the rollout against its bare matmuls
	$(BIN)/python bench/rollout.py $(ARGS)

clean: ## remove .venv, caches and build output
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
