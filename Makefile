# Each target sets up its own virtual environment from nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint bench bench-cuda clean

demo: $(VENV)/.examples ## train a GPT on Python's own source, dense and routed, and compare
	$(BIN)/python examples/train_gpt.py

# a thread for each of the two processes: more threads than cores wait for each other
test: $(VENV)/.dev ## the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(VENV)/.dev ## also the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow"

lint: $(VENV)/.dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev ## benchmarks (hours; LTD_FX_ROUNDS=3 for a glance), and docs/performance.md from them
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only -s
	$(BIN)/python tests/benchmarks/report.py

bench-cuda: $(VENV)/.dev ## the CUDA kernels' benchmarks, on a GPU
	$(BIN)/python -m pytest tests/benchmarks/test_cuda_speed.py --benchmark-only -s

$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
