PYTHON ?= python3
WORKDIR ?= runs/quickstart

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.stamp

.PHONY: help quickstart test faults lint clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

quickstart: $(READY)  ## train a small MEGABYTE on this machine, score it and let it write
	$(RUN) train.py --config=configs/quickstart.py --workdir='$(WORKDIR)'
	$(RUN) eval.py --workdir='$(WORKDIR)' --split=test
	$(RUN) generate.py --workdir='$(WORKDIR)' --prompt='def ' --num_bytes=400 --seed=0

test: $(READY)  ## run the tests on the CPU
	$(RUN) -m pytest --numprocesses=auto --dist=worksteal

faults: $(READY)  ## kill, starve and damage real runs for most of an hour; see tests/faults
	$(RUN) -m tests.faults.full --output=runs/faults.json

lint: $(READY)  ## check format, style and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

clean:  ## remove the environment and every cache; what was trained in runs/ stays
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv installs ten times faster than pip, but knows nothing of pip's settings (mirrors, certificates):
# where it cannot be had or fails, pip does the same. Both compile what they install: the tests start
# hundreds of processes that import it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("PYTHON=$(PYTHON) is Python %d.%d; 3.11 or newer is needed, e.g. make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "PYTHON=$(PYTHON) lacks the venv module; install it (Debian, Ubuntu: the package python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV), once; about a minute ..."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check uv \
	  && $(RUN) -m uv pip install --quiet --compile-bytecode --python $(RUN) -c constraints.txt -e '.[dev]' \
	  || $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
