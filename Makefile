# Thin on purpose: every recipe is one or two commands that can be typed by hand.
PYTHON := scripts/with_headers.sh .venv/bin/python
IMAGES ?=
ENCODERS ?=
FLAGS ?=
DEMO_FLAGS := $(if $(IMAGES),--images "$(IMAGES)") $(if $(ENCODERS),--encoders $(ENCODERS)) $(FLAGS)
# Two workers with one thread each beat one worker with two threads on the small shapes of the tests.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile
# A change in any of these brings the environment (or only the extension) up to date.
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard scripts/*.sh) $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint type docs bench clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

setup: .venv/.stamp  ## make .venv and install everything into it

.venv/.stamp: $(INPUTS)
	@scripts/setup.sh
	@touch $@

demo: .venv/.stamp  ## real pictures -> embeddings -> training -> samples -> report (IMAGES=folder ENCODERS=clip|full)
	@$(PYTHON) -m blip3o_fast demo $(DEMO_FLAGS)

test: .venv/.stamp  ## the test suite without the slow tests
	@$(PYTEST) -m "not slow"

test-all: .venv/.stamp  ## the whole test suite
	@$(PYTEST)

lint: .venv/.stamp  ## ruff: errors and formatting
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

type: .venv/.stamp  ## mypy
	@$(PYTHON) -m mypy

docs: .venv/.stamp  ## every link, path, command and Python block of the documents
	@$(PYTHON) scripts/check_docs.py

bench: .venv/.stamp  ## time what exists against eager and torch.compile, with correctness in the same run
	@$(PYTHON) -m benchmarks --set quick

clean:  ## remove what builds and tests leave (keeps .venv and runs/)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find blip3o_fast kernels csrc tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
