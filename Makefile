# `make` alone says what there is.
PYTHON ?= python3
# More options for pip, e.g. an index with CPU builds of torch.
PIP_FLAGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-instruct demo-preference test test-full lint docs bench gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(INSTALLED)  ## set up .venv with the pinned versions (minutes the first time)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) --quiet --upgrade -c constraints.txt pip setuptools
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev,demo]'
	@touch $@

demo: venv  ## adapt a real base to Chinese in 4 bits; results in runs/demo
	$(BIN)/python -m lightning_mixcn.demo

demo-instruct: venv  ## teach the same base to answer in Chinese, and ask it; results in runs/demo_instruct
	$(BIN)/python -m lightning_mixcn.demo instruct

demo-preference: venv  ## teach what demo-instruct made which answers are preferred; results in runs/demo_preference
	$(BIN)/python -m lightning_mixcn.demo preference

# Three processes of one thread each, for two cores: threads would wait for one another, and a third of the time a test
# waits for a process that it has started.
QUICK := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not (slow or gpu or multigpu)" -n 3 --dist loadfile
# Two: slow tests wait less, and some take gigabytes.
SLOW := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not (gpu or multigpu)" -n 2 --dist loadfile

test: lint  ## every quick check (what CI runs)
	$(QUICK)

test-full: lint  ## every check, slow ones too, with lm-evaluation-harness; those of one GPU or several where they are
	$(BIN)/python -m pip install $(PIP_FLAGS) --quiet -c constraints.txt -e '.[dev,demo,eval]'
	$(QUICK)
	$(SLOW)
	$(BIN)/python -m pytest -m "gpu or multigpu"

lint: venv  ## ruff, mypy, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: venv  ## build the documentation into build/site; a broken link is an error
	$(BIN)/python -m pip install $(PIP_FLAGS) --quiet -c constraints.txt -e '.[dev,demo,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: venv  ## every measurement that a CPU can make, beside peers and limits; writes the tables of docs and README (17 GB of memory, an hour)
	$(BIN)/python benchmarks/train_step.py --preset cpu-small --contestants ours stock --result train_step_1024
	$(BIN)/python benchmarks/train_step.py --preset cpu-small --contestants ours stock --micro_batch_size 4 --result train_step_4096
	$(BIN)/python benchmarks/train_step.py --preset cpu-small --result train_step_1024_peers
	$(BIN)/python benchmarks/train_step.py --preset cpu-olmoe --contestants ours stock --result train_step_olmoe_1024
	$(BIN)/python benchmarks/train_step.py --preset cpu-olmoe --contestants ours stock --micro_batch_size 4 --result train_step_olmoe_4096
	$(BIN)/python benchmarks/train_step.py --preset cpu-qwen3 --contestants ours stock --result train_step_qwen3_1024
	$(BIN)/python benchmarks/train_step.py --preset cpu-qwen3 --contestants ours stock --micro_batch_size 4 --result train_step_qwen3_4096
	$(BIN)/python benchmarks/expert_block.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/record.py

# Where `make gpu` writes.
OUT ?= runs/gpu

gpu: venv  ## every measurement that one GPU of 80 GB can make, in 10 minutes; gpu.json in runs/gpu (docs/gpu.md)
	$(BIN)/python benchmarks/gpu_all.py --out $(OUT) --minutes 9.3

clean:  ## remove what was built and cached; runs/ and .venv stay
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find lightning_mixcn callbacks configs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
