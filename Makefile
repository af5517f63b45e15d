# make demo    install, then turn the shipped dense teacher into a sparse model and report on it
# make test    install the development tools, then run the tests (those that need a GPU where one is)
# make faults  inject every fault of tests/faults/README.md in full counts (hours); writes benchmarks/results/
# make check   lint, format, types, import direction
# Needs Python 3.11 (or 3.12), make and git. Everything is installed into .venv.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import ensurepip, venv' 2>/dev/null && echo $$p && break; done)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Torch comes first and pinned: with it installed, nothing below replaces it by another build.
TORCH  := torch==2.13.0
TRITON := triton==3.7.1

.PHONY: demo install dev test faults check format clean

demo: install
	$(BIN)/gossamer train recipe=demo

install: $(VENV)/.installed

dev: $(VENV)/.developed

test: dev
	@gpu=$$($(BIN)/python -c 'import torch; print("not full" + " and not gpu" * (not torch.cuda.is_available()))') && \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist worksteal -m "$$gpu"

FAULTS ?= full
faults: dev
	FAULTS=$(FAULTS) OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m case tests/faults tests

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build gossamer.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; make demo PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info' 2>/dev/null || \
	{ echo "error: $(PYTHON) is too old: allowed is Python 3.11 or newer; make demo PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install $(TORCH) $(TRITON) -e .
	@touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(PIP) install $(TORCH) $(TRITON) -e '.[dev,wandb,data,lora]'
	@touch $@
