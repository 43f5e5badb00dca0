# Each target sets up its own virtual environment from nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)/tools/bin
LOCK := requirements.lock

.PHONY: demo test test-all lint docs package lock canary matrix peers bench bench-cuda gpu study study-all clean

demo: $(VENV)/.examples ## train a GPT on Python's own source, dense and routed, and compare
	$(BIN)/python examples/train_gpt.py

# a thread for each of the two processes: more threads than cores wait for each other
test: $(VENV)/.dev ## the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(VENV)/.dev ## also the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow"

lint: $(VENV)/.dev ## style, types, and the arrows between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev ## the pages of docs/ as a site, in build/site; any warning fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: $(VENV)/.dev ## what is published, checked, and tried in an environment that has nothing else
	rm -rf dist $(VENV)/package
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(VENV)/package
	$(VENV)/package/bin/python -m pip install --quiet --constraint $(LOCK) dist/*.whl
	$(VENV)/package/bin/ltd-fx env
	$(VENV)/package/bin/python -I tests/project/smoke.py

# pip-compile does not read the constraints in pip's configuration
HELD = $(addprefix --constraint=,$(shell $(PYTHON) -m pip config list | sed -n "s/^global.constraint='\(.*\)'/\1/p"))
lock: $(VENV)/.tools ## requirements.lock: the newest versions that fit together
	CUSTOM_COMPILE_COMMAND="make lock" $(TOOLS)/pip-compile --quiet --upgrade --extra dev --unsafe-package ltd-fx \
	  --strip-extras --no-annotate --no-emit-index-url --no-emit-trusted-host --no-emit-find-links $(HELD) \
	  --output-file $(LOCK) pyproject.toml

canary: $(VENV)/.tools ## the compatibility suite on the newest of everything: what broke, in which package
	$(TOOLS)/nox --envdir $(VENV)/nox --session canary

matrix: $(VENV)/.tools ## the same on the oldest and newest torch and libraries, and docs/versions.md from it
	$(TOOLS)/nox --envdir $(VENV)/nox --session matrix
	PYTHONPATH=tests $(TOOLS)/python -m compat.table build/compat/torch-*.json

peers: $(VENV)/.peers ## other libraries' own tests with every model transformed, and docs/peers.md (SUITE=llama: one of them)
	PYTHONPATH=tests $(BIN)/python -m peer_suites.run $(SUITE)

bench: $(VENV)/.dev ## benchmarks (hours; LTD_FX_ROUNDS=3 for a glance), and docs/performance.md from them
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only -s
	$(BIN)/python tests/benchmarks/report.py

bench-cuda: $(VENV)/.dev ## the CUDA kernels' benchmarks, on a GPU
	$(BIN)/python -m pytest tests/benchmarks/test_cuda_speed.py --benchmark-only -s

gpu: ## all that only a GPU can show, in 8 minutes, with the Python at hand (DRY=--dry: on the CPU): docs/gpu.md
	PYTHONPATH=.:tests/benchmarks $(PYTHON) tests/benchmarks/gpu.py $(DRY)

study: $(VENV)/.study ## does it learn? A part of the study with another seed, in 20 minutes on 2 cores: inside what is published?
	$(BIN)/python study/short.py

study-all: $(VENV)/.study ## all of it, in hours, and docs/learning.md from it
	$(BIN)/python study/all.py
	$(BIN)/python study/report.py

$(VENV)/.%: pyproject.toml $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --editable ".[$*]"
	touch $@

$(VENV)/.tools:
	$(PYTHON) -m venv $(VENV)/tools
	$(TOOLS)/python -m pip install --quiet nox pip-tools
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
