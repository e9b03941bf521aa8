# The README's two commands are `make demo` and `make test`; each sets up what it needs in .venv.
# GPU=1 (or a working nvidia-smi) installs onnxruntime-gpu instead of onnxruntime; never both.

PYTHON ?= python3.11
GPU ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1)
EXTRA := $(if $(filter 1,$(GPU)),gpu,cpu)
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= demo-out
ARGS ?=

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: demo test test-demo check lint types imports slow clean

demo: .venv/.run-$(EXTRA)
	$(BIN)/icestream demo --out $(OUT) $(ARGS)

test: .venv/.test-$(EXTRA)
	$(PYTEST) -n 2 -m "not slow and not gpu and not ray and not prometheus"
	$(PYTEST) -m "(ray or prometheus) and not slow and not gpu"

test-demo: .venv/.test-$(EXTRA)
	$(PYTEST) tests/e2e/test_demo.py

slow: .venv/.test-$(EXTRA)
	$(PYTEST) -m slow

check: lint types imports test

lint: .venv/.test-$(EXTRA)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.test-$(EXTRA)
	$(BIN)/mypy

imports: .venv/.test-$(EXTRA)
	$(BIN)/lint-imports

.venv/bin/python:
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv .venv || python3 -m venv .venv

.venv/.torch: .venv/bin/python constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv/.run-$(EXTRA): .venv/.torch pyproject.toml
	$(PIP) -e '.[$(EXTRA)]'
	touch $@

.venv/.test-$(EXTRA): .venv/.torch pyproject.toml
	$(PIP) -e '.[$(EXTRA),train,cryosparc,test,dev]'
	touch $@ .venv/.run-$(EXTRA)

clean:
	rm -rf .venv build *.egg-info
