# The only commands to remember:
#   make demo    set up, then train, attribute and verify on real images; writes runs/demo
#   make test    set up, then run the tests
#   make check   lint, types and import layers
#   make bench   the benchmarks, side by side with the field's tools
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AOT := .venv-aot
BENCHES := trak projection kernel_inverse surrogate factored influence unlearning replay
export JAX_PLATFORMS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all check bench clean

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

$(AOT)/.ready: pyproject.toml
	$(PYTHON) -m venv $(AOT)
	$(AOT)/bin/pip install --quiet --editable ".[aot]"
	touch $@

$(VENV)/.peers: $(VENV)/.dev
	$(BIN)/pip install --quiet "torch==2.13.0" || $(BIN)/pip install --quiet torch
	$(BIN)/pip install --quiet --editable ".[peers]"
	touch $@

demo: $(VENV)/.base
	$(BIN)/jattrib run configs/attribution/trak_fashion_mnist.toml --out runs/demo

test: $(VENV)/.dev $(AOT)/.ready
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not gpu"
	$(AOT)/bin/python -m pytest -n auto --dist worksteal tests/compile -m "not slow and not gpu"

test-all: $(VENV)/.dev $(AOT)/.ready
	status=0; \
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not gpu" || status=$$?; \
	$(AOT)/bin/python -m pytest -n auto --dist worksteal tests/compile -m "not gpu" || status=$$?; \
	exit $$status

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(VENV)/.peers
	set -e; for name in $(BENCHES); do $(BIN)/jattrib bench $$name --out bench/results/$$name.jsonl; done

clean:
	rm -rf $(VENV) $(AOT) runs
