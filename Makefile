SHELL = /bin/bash
LINT_PATHS = sb3_flow tests benchmarks conftest.py setup.py docs/conf.py
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# make train
ALGO ?= fpo
# (not taken from the environment, where the name has other uses)
ENV = HalfCheetah-v5
STEPS ?= 300000
LOGS ?= logs
# A CPU is faster than a GPU for networks of this size
DEVICE ?= cpu
# make train RESUME=1 goes on with the latest run, up to its own number of steps
RESUME ?=

# A virtual environment with all that the targets below need
$(BIN)/sb3-flow: setup.py
	$(PYTHON) -m venv $(VENV)
	# First, and pinned: an open range would pull gigabytes of CUDA libraries
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[all]"
	touch $@

install: $(BIN)/sb3-flow

# One thread is faster than several for networks of this size
train: install
	$(BIN)/sb3-flow train --algo $(ALGO) --env $(ENV) $(if $(RESUME),--resume,--n-timesteps $(STEPS)) --log-folder $(LOGS) \
		--num-threads 1 --device $(DEVICE) --progress
	$(BIN)/sb3-flow evaluate --algo $(ALGO) --env $(ENV) --folder $(LOGS)

# One thread for each of the two workers: more wait for each other
pytest = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: install
	$(pytest) -m "not slow"

test-slow: install
	$(pytest) -m slow

# Time against Gaussian peers, on an otherwise idle machine
benchmark: install
	$(BIN)/python benchmarks/throughput.py $(BENCHMARK)

lint: install
	$(BIN)/ruff check $(LINT_PATHS)
	$(BIN)/black --check --quiet $(LINT_PATHS)

format: install
	$(BIN)/ruff check --select I --fix $(LINT_PATHS)
	$(BIN)/black $(LINT_PATHS)

type: install
	$(BIN)/mypy $(LINT_PATHS)

doc: install
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

commit-checks: format type lint

clean:
	rm -rf $(VENV) docs/_build build *.egg-info

.PHONY: install train test test-slow benchmark lint format type doc commit-checks clean
