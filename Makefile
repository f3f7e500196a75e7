# Thin on purpose: every recipe is one or two commands that can be typed by hand.
PYTHON := scripts/with_headers.sh .venv/bin/python
IMAGES ?=
ENCODERS ?=
FLAGS ?=
BASE ?=
THRESHOLD ?= 1.10
VERSIONS ?=
PYTHONS ?=
# Python of a machine with a GPU: its own where it has PyTorch for it, else that of .venv.
GPU_PYTHON ?= $(shell python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null && echo python3 || \
	{ test -x .venv/bin/python && echo .venv/bin/python; } || echo python3)
DEMO_FLAGS := $(if $(IMAGES),--images "$(IMAGES)") $(if $(ENCODERS),--encoders $(ENCODERS)) $(FLAGS)
# Two workers with one thread each beat one worker with two threads on the small shapes of the tests.
# The interpreter also where there is a GPU, which `make gpu-check` is for: the tests give kernels CPU tensors.
PYTEST := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile \
	--durations=15 --durations-min=0.5
# A change in any of these brings the environment (or only the extension) up to date.
INPUTS := pyproject.toml setup.py constraints.txt scripts/setup.sh scripts/python_headers.sh $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-matrix wheels lint type docs bench bench-cpu bench-compare readme-table \
	memory-report sass-report launch-report gpu-check tune sanitize clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 24

setup: .venv/.stamp  ## make .venv and install everything into it

.venv/.stamp: $(INPUTS)
	@scripts/setup.sh
	@touch $@

demo: .venv/.stamp  ## real pictures -> embeddings -> training -> samples -> report (IMAGES=folder ENCODERS=clip|full)
	@$(PYTHON) -m blip3o_fast demo $(DEMO_FLAGS)

test: .venv/.stamp  ## the test suite without the slow tests
	@$(PYTEST) -m "not slow and not gpu"

test-all: .venv/.stamp  ## the whole test suite
	@$(PYTEST) -m "not gpu"

test-matrix: .venv/.stamp  ## the quick tests with every torch from the floor to the newest (VERSIONS="2.11.0 2.14.1")
	@scripts/test_matrix.sh $(VERSIONS)

wheels: .venv/.stamp  ## sdist and repaired Linux wheels of the last commit, in dist/ (PYTHONS="3.12 3.13")
	@scripts/build_wheels.sh $(PYTHONS)

lint: .venv/.stamp  ## ruff: errors and formatting
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

type: .venv/.stamp  ## mypy
	@$(PYTHON) -m mypy

docs: .venv/.stamp  ## every link, path, command and Python block of the documents
	@$(PYTHON) scripts/check_docs.py

bench: .venv/.stamp  ## time what exists against eager and torch.compile, with correctness in the same run
	@$(PYTHON) -m benchmarks --set quick

bench-cpu: .venv/.stamp  ## the CPU engine: products, ops, a block and its training beside their peers, and its goals
	@$(PYTHON) -m benchmarks --set cpu $(FLAGS)

readme-table: .venv/.stamp  ## rewrite the README's table of times from the committed result file that it names
	@$(PYTHON) -m benchmarks.readme_table $(FLAGS)

bench-compare: .venv/.stamp  ## is this checkout slower than another commit? (BASE=HEAD~3 THRESHOLD=1.1 FLAGS="--op swiglu")
	@$(PYTHON) -m scripts.bench_compare --base "$(BASE)" --threshold $(THRESHOLD) $(FLAGS)

memory-report: .venv/.stamp  ## peak memory and time of a full forward on a CPU, per way of storing the weights
	@$(PYTHON) -m benchmarks.model_memory $(FLAGS)

sass-report: .venv/.stamp  ## registers, memory and instructions of every kernel for every GPU, without one
	@$(PYTHON) scripts/sass_report.py $(FLAGS)

launch-report: .venv/.stamp  ## launches, bytes and FLOPs of block, model, training and sampling step beside stock's
	@$(PYTHON) scripts/launch_report.py $(FLAGS)
	@$(PYTHON) -m scripts.step_report

# Not in .venv: a machine with a GPU brings its own PyTorch and Triton.
gpu-check:  ## on a machine with a GPU: install in place, every GPU test, then the times, in under 9 minutes
	@$(GPU_PYTHON) scripts/gpu_check.py $(FLAGS)

tune:  ## on a GPU: search launch configurations and write kernels/_tuned.json
	@$(GPU_PYTHON) scripts/tune.py $(FLAGS)

sanitize: .venv/.stamp  ## the CPU kernels' tests with an extension that stops at bad accesses and undefined operations
	@scripts/with_headers.sh scripts/sanitize.sh $(FLAGS)

clean:  ## remove what builds and tests leave (keeps .venv and runs/)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find blip3o_fast kernels csrc tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
