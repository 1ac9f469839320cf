# Every target sets up what it needs in .venv, from nothing, and is quick when nothing changed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo check format test test-slow test-clients bench clean
help:
	@echo "make demo       install, then fine-tune the bundled model and watch it learn"
	@echo "make test       install, then run the tests"
	@echo "make test-slow  the proofs that take minutes"
	@echo "make test-clients  the published clients of other projects at our server"
	@echo "make check      formatting, lint, types, layers"
	@echo "make format     mend what can be mended by a tool"
	@echo "make bench      measure against peers, as ratios"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Weaver needs Python 3.11 or newer; try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[all]'
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[dev]'
	@touch $@ .venv/.installed

install: .venv/.installed

demo: .venv/.installed
	$(BIN)/python -m recipes.demo

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow --timeout 1200 -n 2 --dist worksteal

# Other projects' clients, each as it was published, in an environment of their own.
.venv-clients/.installed: constraints.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt nex-weaver==1.19.2
	@touch $@

test-clients: .venv/.installed-dev .venv-clients/.installed
	$(BIN)/python -m pytest -m clients --timeout 600 tests/clients

bench: .venv/.installed-dev
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf .venv .venv-clients build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis runs wandb
