# Sekisho: what a developer, or a stranger who wants to see it run, types.
#   make demo     a copy onto a stick becomes a line in the admin's tail (root or sudo; without, the smaller part)
#   make test     all tests that can run on this machine, and a list of those that can't and why
#   make check    formatting, lint and strict types
#   make test-vm  the real-hardware tier: a Debian guest in QEMU with USB sticks and a phone (root; builds its image once)
#   make test-load  50,000 small files copied out while the collector is away and the disk full (root; some minutes)
#   make chaos    200 blows at random under load: agent, collector and disks killed, filled, without power (root; ten minutes)
#   make ways-out the matrix of ways out: every way to carry a file out, and what the agent told of it (root; FILE=yours.toml)
#   make bench    the measurements of docs/benchmarks.md
#   make venv     the development environment in .venv (made anew only when pyproject.toml changed)
#   make clean    remove what the above made
# PYTHON=python3.12 make …   another interpreter (3.11 or later);  make test ARGS='-k tail'   only some tests

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
FILE   ?=
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-vm test-load chaos ways-out check bench venv clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.installed-collector
	@$(BIN)/python demo/demo.py $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-vm: $(VENV)/.installed-dev
	SEKISHO_VM=1 $(BIN)/python -m pytest tests/vm $(ARGS)

ways-out: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.ways_out $(FILE) $(ARGS)

test-load: $(VENV)/.installed-dev
	SEKISHO_LOAD=50000 $(BIN)/python -m pytest tests/test_whole_load.py $(ARGS)

chaos: $(VENV)/.installed-dev
	SEKISHO_CHAOS=200 $(BIN)/python -m pytest tests/test_chaos.py $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench $(ARGS)

venv: $(VENV)/.installed-dev

$(VENV)/.installed-%: pyproject.toml packaging/venv.sh
	@PYTHON="$(PYTHON)" packaging/venv.sh "$(VENV)" "$*"

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis sekisho.egg-info
	find . -path ./.git -prune -o -name __pycache__ -type d -print0 | xargs -0r rm -rf
