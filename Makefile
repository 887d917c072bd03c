# Every target sets up what it needs: `make test` on a fresh clone is enough.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install test test-notebooks test-models test-wheel test-lower-bounds soak test-all lint format demo docs \
	check-pages dist clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

install: $(STAMP) ## Set up .venv with everything development needs

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The pinned development set needs Python 3.11 or newer: make install PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# One thread for each worker: two OpenMP pools on the same cores mostly wait for each other.
test: $(STAMP) ## Quick tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto -m 'not slow and not soak' $(PYTEST_ARGS)

test-models: $(STAMP) ## Whole models of torchvision, transformers, timm and diffusers
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto -m slow tests/test_torchvision.py tests/zoo

test-wheel: $(STAMP) ## The wheel, installed with its dependencies alone
	$(PY) -m pytest -q -m slow tests/test_wheel.py

test-lower-bounds: $(STAMP) ## The lowest versions that setup.cfg allows (downloads them)
	OMP_NUM_THREADS=1 $(PY) -m tests.release.lower_bounds

test-notebooks: $(STAMP) ## Notebooks, the site's pages that take longer, what `make demo` prints
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto -m slow tests/notebooks tests/benchmarks tests/docs

soak: $(STAMP) ## Long campaigns: interrupts, threads, damaged files, budgets by brute force
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto -m soak tests/soak $(PYTEST_ARGS)

test-all: $(STAMP) ## Every test but those of `make soak`, the slow ones too, with coverage
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto -m 'not soak' --cov --cov-report=term $(PYTEST_ARGS)

lint: $(STAMP) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## Let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: $(STAMP) ## Compare the methods on the shipped network (results/)
	$(PY) -m benchmarks.compare $(DEMO_ARGS)

docs: $(STAMP) ## Build the documentation (site/index.html); warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs --quiet build --strict

check-pages: docs ## Open every page of site/ in Debian's chromium, wide and narrow
	$(PY) -m pip install --quiet --constraint constraints.txt playwright
	$(PY) docs/check_pages.py

dist: $(STAMP) ## Build what is released into dist/, check it and try it in a fresh environment
	$(PY) -m tests.release.dist

clean: ## Remove .venv, caches, results and the site
	rm -rf $(VENV) build dist results site *.egg-info .coverage .coverage.* coverage.xml
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
