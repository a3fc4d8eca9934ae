# `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED := 0
# Where this is set, each of the hundreds of processes that tests and stages start compiles torch anew.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# With uv in seconds; where it is not to be had, pip takes minutes.
install = { [ -x $(BIN)/uv ] && $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt $(1); } || $(PIP) $(1)
# DVC runs the stages' `python`: that of the environment.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
CHECK_GIT = @[ -e .git ] || { echo 'no .git here, as in a download without git, and DVC needs one: run `git init`, or clone the project'; exit 1; }
.PHONY: help setup repro sweep compare report test lint slow gpu servers bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## create the environment in .venv from pinned constraints

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) -V 2>&1`: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# torch by pip, which may know of a build without CUDA; what it needs comes with the rest.
	$(PIP) --no-deps --no-compile torch uv || $(PIP) --no-deps --no-compile torch
	$(call install,-e '.[all]' -e '.[test]')
	@touch $@

repro: setup ## run the pipeline on the presets of params.yaml and print where the report is
	$(CHECK_GIT)
	dvc repro report
	@python -m cpmm.cli.summary

sweep: setup ## Table 2 of the paper on digits, ten rows over three seeds (13 minutes on two cores)
	$(CHECK_GIT)
	dvc repro sweep@digits-table2

compare: setup ## CPMM and fifteen baselines in one table on digits (15 minutes on two cores)
	$(CHECK_GIT)
	dvc repro compare@digits

report: setup ## print where the reports are and their main figures
	@python -m cpmm.cli.summary

lint: setup ## check style, layers and types
	ruff check .
	ruff format --check .
	ty check --python $(BIN)/python

# A file's tests share what they make, so a process takes whole files.
test: setup lint ## lint, then every test that is neither slow nor needs a GPU
	pytest -m 'not slow and not gpu' -n logical --maxprocesses 4 --dist loadfile

slow: setup ## the tests left out of `make test`: kills, whole pipelines
	pytest -m 'slow and not gpu'

gpu: setup ## the tests that need a CUDA device (2 minutes)
	pytest -m gpu tests/pipeline/test_gpu.py

servers: setup ## tests with real ssh and S3 servers, and what they need
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin"; command -v sshd > /dev/null || { \
	  if [ `id -u` = 0 ] && command -v apt-get > /dev/null; \
	  then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends openssh-server; \
	  else echo "sshd is needed: install your system's OpenSSH server (Debian: apt-get install openssh-server), then make servers"; exit 1; \
	  fi; }
	$(call install,-e '.[servers]')
	pytest tests/pipeline/test_remotes.py tests/pipeline/test_sweep_nodes.py

bench: setup ## time the log-density, training steps and spaces beside peers (a few minutes)
	-$(call install,-e '.[benchmarks]')
	python benchmarks/speed.py

clean: ## remove the environment and scratch folders; artifacts stay
	rm -rf $(VENV) data/*/.scratch
