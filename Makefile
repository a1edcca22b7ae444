# Everything a user or a contributor runs. Each target installs what it needs first;
# a stamp file in the environment makes the second time immediate.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
ORACLES ?= .venv-oracles
KERNELS ?= .venv-kernels
# Tests compile far more than they compute: LLVM need not optimise what they run once.
QUICK = --xla_backend_optimization_level=0
KVPRESS ?= .venv-kvpress
BENCH_ARGS ?=
KERNEL_ARGS ?=
PYTEST_ARGS ?=
PY := $(VENV)/bin/python
ORACLE_PY := $(ORACLES)/bin/python
PIP := -m pip --disable-pip-version-check install --quiet --progress-bar off

.PHONY: help install demo test test-all pages lint bench bench-caches oracles kernels clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.package  ## .venv with the pinned packages and lclm itself

demo: install  ## the demonstration: a real model over four times its trained context
	$(VENV)/bin/lclm run --config=configs/demo.py

test: install  ## the fast tests (at most 15 minutes on 2 cores)
	XLA_FLAGS="$(QUICK) $${XLA_FLAGS:-}" $(PY) -m pytest -n 2 --dist loadfile -m "not slow and not browser" $(PYTEST_ARGS)

test-all: install  ## every test that needs no browser
	$(PY) -m pytest -n 2 --dist loadfile -m "not browser" $(PYTEST_ARGS)

pages: $(VENV)/.pages  ## the report pages in headless chromium, screenshots in build/pages
	$(PY) -m pytest -m browser tests/evals/test_browser.py $(PYTEST_ARGS)

lint: $(VENV)/.requirements  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: install $(ORACLES)/.llamacpp  ## side by side with PyTorch and llama.cpp
	$(PY) -m benchmarks.compare --peer-python=$(ORACLE_PY) $(BENCH_ARGS)

bench-caches: install $(KVPRESS)/.requirements  ## evicting caches beside kvpress (BENCH_ARGS=--tasks, --speed, --memory)
	$(PY) -m benchmarks.caches --peer-python=$(KVPRESS)/bin/python $(BENCH_ARGS)

oracles: install $(ORACLES)/.requirements $(ORACLES)-megalodon/.requirements $(ORACLES)-lm-eval/.requirements  ## regenerate the goldens and compare
	set -e; for family in make_goldens mamba mamba2 jamba longbench_metrics; do \
	    $(ORACLE_PY) tests/oracles/$$family.py --check; done
	$(ORACLES)-megalodon/bin/python tests/oracles/megalodon.py --check
	PYTHONPATH=. $(ORACLES)-lm-eval/bin/python tests/oracles/lm_eval_harness.py --check

kernels: install $(KERNELS)/.requirements  ## the kernels' values, and their compilation for chips that are not here
	PYTHONPATH=$$(echo $(KERNELS)/lib/python*/site-packages) $(PY) -m tests.kernels.prove $(KERNEL_ARGS)

clean:  ## remove the environments (runs and the model cache stay)
	rm -rf $(VENV) $(ORACLES) $(ORACLES)-megalodon $(ORACLES)-lm-eval $(KERNELS) $(KVPRESS)

$(VENV)/.requirements: requirements.txt
	python=$${PYTHON:-$$(tools/python.sh 3.12)} && "$$python" -m venv $(VENV)
	$(PY) $(PIP) -r requirements.txt
	touch $@

$(VENV)/.package: $(VENV)/.requirements pyproject.toml
	$(PY) $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.pages: $(VENV)/.package requirements-pages.txt
	$(PY) $(PIP) -r requirements-pages.txt
	touch $@

$(ORACLES)/.requirements: requirements-oracles.txt
	python=$$(tools/python.sh 3.11 exact) && "$$python" -m venv $(ORACLES)
	$(ORACLE_PY) $(PIP) -r requirements-oracles.txt
	touch $@

$(ORACLES)-megalodon/.requirements: requirements-megalodon.txt
	python=$$(tools/python.sh 3.12) && "$$python" -m venv $(ORACLES)-megalodon
	$(ORACLES)-megalodon/bin/python $(PIP) -r $<
	touch $@

$(ORACLES)-lm-eval/.requirements: requirements-lm-eval.txt requirements.txt
	python=$$(tools/python.sh 3.12) && "$$python" -m venv $(ORACLES)-lm-eval
	$(ORACLES)-lm-eval/bin/python $(PIP) -r $<
	touch $@

$(KERNELS)/.requirements: requirements-kernels.txt
	python=$$(tools/python.sh 3.12) && "$$python" -m venv $(KERNELS)
	$(KERNELS)/bin/python $(PIP) -r $<
	touch $@

$(KVPRESS)/.requirements: requirements-kvpress.txt
	python=$$(tools/python.sh 3.11 exact) && "$$python" -m venv $(KVPRESS)
	$(KVPRESS)/bin/python $(PIP) -r $<
	touch $@

$(ORACLES)/.llamacpp: $(ORACLES)/.requirements benchmarks/peers/build_llamacpp.sh
	benchmarks/peers/build_llamacpp.sh $(ORACLE_PY)
	touch $@

