# `make` lists the targets. Everything happens in .venv, which `make setup` builds once.

PYTHON ?= python3

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
PIP := $(PY) -m pip --disable-pip-version-check
TORCH := 2.13.0
# a CUDA build of torch brings the Triton it was made with
TRITON := 3.9.0

# kernels/ under its installed name, for what runs without an installed medground (mypy, make gpu)
LINK := .path/medground_kernels

comma := ,
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
EXTRAS := $(if $(HAS_GPU),dev$(comma)gpu,dev)

.PHONY: help setup test coverage chaos demo mutate lint types bench bench-kernels bench-check gpu clean

help:
	@echo "make setup   make the environment .venv (PYTHON=python3.12 picks the interpreter)"
	@echo "make demo    train, evaluate and show a small model: runs/demo/"
	@echo "make test    run every test (ARGS='-k records' narrows it)"
	@echo "make coverage  the same, and what lines no test runs; takes nearly twice as long"
	@echo "make chaos   kill runs of two ranks at 50 random moments; they have to come to the same (20 minutes)"
	@echo "make mutate  change the kernels line by line and count what the tests notice (ARGS=token_logprob narrows it)"
	@echo "make lint    check style, imports and types"
	@echo "make peers   install TRL, Liger, cut-cross-entropy and DeepSpeed into peers/, to be measured too"
	@echo "make bench   measure whole steps beside TRL and a plain trainer (ARGS=--save keeps it)"
	@echo "make bench-kernels  measure the kernels beside their peers (ARGS='-k sample' narrows it, ARGS=--save keeps it)"
	@echo "make bench-check  record whole steps and compare them with the last kept ones (ARGS=tiny-cpu narrows it)"
	@echo "make gpu     run every test, the benchmark and a profile on the GPU with PYTHON=, which has torch; installs nothing"
	@echo "make clean   remove .venv and caches; runs/ stays"

setup: $(STAMP)

# pip is renewed first because an old one takes twice as long over the rest. torch comes before what needs it,
# pinned, or pip would fetch another build. Bytecode: pip would compile thousands of modules that nobody imports,
# one by one; the last command compiles those that a run imports.
$(STAMP): setup.py pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "MedGround needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another with: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing torch $(TORCH) ($(if $(HAS_GPU),CUDA build: several GB,CPU build: about 500 MB with Triton)) ..."
	@$(PIP) install -qq --no-compile -c constraints.txt pip setuptools
	@if [ -n "$(HAS_GPU)" ] || [ "$$(uname -s)" != Linux ]; then \
	  $(PIP) install -qq --no-compile -c constraints.txt torch==$(TORCH); \
	else \
	  $(PIP) install -qq --no-compile --no-deps torch==$(TORCH)+cpu 2>/dev/null || \
	  $(PIP) install -qq --no-compile --no-deps torch==$(TORCH) --index-url https://download.pytorch.org/whl/cpu; \
	  $(PIP) install -qq --no-compile --no-deps triton==$(TRITON); \
	fi
	@echo "Installing medground and its tools ..."
	@$(PIP) install -qq --no-compile --no-build-isolation --prefer-binary -c constraints.txt -e '.[$(EXTRAS)]'
	@env -u PYTHONDONTWRITEBYTECODE $(PY) -c 'import pytest, torch.distributed.checkpoint, torch.distributed.fsdp, tyro; \
	  from torch.utils.tensorboard import SummaryWriter; from transformers import Qwen2_5_VLForConditionalGeneration'
	@touch $@

# the oldest Triton that kernels are compiled with; a CI machine tries both
OLD_TRITON := .path/triton-3.6.0

$(OLD_TRITON): | setup
	$(PIP) install -qq --no-compile --no-deps --target $@ triton==3.6.0

# not in .venv: transformers imports it wherever it finds it, a second and some warnings in every process
EIGHT_BIT := .path/torchao-0.18.0

$(EIGHT_BIT): | setup
	$(PIP) install -qq --no-compile --no-deps --target $@ torchao==0.18.0

$(LINK):
	@mkdir -p $(@D) && ln -sfn ../kernels $@

# a process for each core, of one thread each: threads of several processes would wait for one another
TESTS := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder --durations=10

test: setup
	$(TESTS) $(ARGS)

coverage: setup
	$(TESTS) --cov $(ARGS)

chaos: setup
	$(PY) tests/chaos.py $(ARGS)

mutate: setup
	$(PY) -m bench.mutate $(ARGS)

demo: setup
	$(VENV)/bin/medground demo --out runs/demo

lint: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	@$(MAKE) --no-print-directory types

types: setup $(LINK)
	$(VENV)/bin/mypy -p medground -p medground_kernels

# what TRL's trainer imports; named one by one, since pip would bring another torch and transformers along. The first
# three are in .venv too, in these versions, but `make gpu` does without it
TRL_NEEDS := accelerate==1.15.0 peft==0.21.2 psutil==7.2.2 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 pandas==3.1.1 \
	python-dateutil==4.0.0 tzdata==2026.6 pyarrow==26.0.1 xxhash==4.1.0 greenlet==3.5.6

DEEPSPEED := 0.19.8
DEEPSPEED_NEEDS := einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2
WHEELS := .path/wheels

# beside ours in benchmarks; apart from .venv, so that nothing of theirs is ever imported elsewhere. DeepSpeed has no
# wheel: it is built first, with .venv's torch, and where that fails the others are installed all the same. One command
# installs all, since pip puts programs (ninja) into a --target folder only once.
peers: | setup
	$(PIP) wheel -q --no-deps --no-build-isolation --wheel-dir $(WHEELS) deepspeed==$(DEEPSPEED) || \
	  echo "DeepSpeed $(DEEPSPEED) could not be built: bench.zero will say so. To try again: rm -r $@ and make $@" >&2
	$(PIP) install -q --no-deps --target $@ trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1 $(TRL_NEEDS) \
	  $(DEEPSPEED_NEEDS) $$(ls $(WHEELS)/deepspeed-$(DEEPSPEED)-*.whl 2>/dev/null)

bench: export PYTHONPATH := $(CURDIR)/peers$(if $(PYTHONPATH),:$(PYTHONPATH))
bench: setup
	$(PY) -m pytest bench/bench_steps.py -q $(ARGS)

bench-kernels: export PYTHONPATH := $(CURDIR)/peers$(if $(PYTHONPATH),:$(PYTHONPATH))
bench-kernels: setup
	$(PY) -m pytest bench -q --ignore=bench/bench_steps.py $(ARGS)

bench-check: setup
	$(PY) -m profiles.check $(ARGS)

gpu: export PYTHONPATH := $(CURDIR):$(CURDIR)/.path:$(CURDIR)/peers$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu: $(LINK)
	@$(PYTHON) -c 'import torch' || { echo "'$(PYTHON)' has no torch: name one that has with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	  echo "torch.cuda.is_available() is False for '$(PYTHON)': make gpu needs an NVIDIA GPU and a CUDA build" >&2; exit 1; }
	$(PYTHON) -m pytest tests -q $(ARGS)
	$(PYTHON) -m pytest bench -q $(BENCH)
	$(PYTHON) -m profiles.record 3b-h100 --out runs/profiles/3b-h100 --keep

clean:
	rm -rf $(VENV) .path peers build *.egg-info .coverage .coverage.* .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
