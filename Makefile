# Everything a contributor or a newcomer runs. Each target makes the virtual environment it needs.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := src tests benchmarks
# One process a core, each with one thread; a file's tests share what they build, so they stay in one process.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
# The tests of numbers: what another processor's kernels could change.
NUMBERS := tests/golden tests/properties tests/unit/method tests/unit/evaluation tests/unit/training

.PHONY: help setup quick test test-elsewhere faults device-check check format docs release-check demo clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: .venv/ready  ## a virtual environment with the package and the developer tools

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clip-cid needs Python 3.11 or newer; run make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quick: setup  ## the quick tests, for while you work, without the checks of shapes (about two minutes on 2 cores)
	HYPOTHESIS_PROFILE=quick $(PYTEST) -o addopts=--strict-markers -m 'not slow'

test: setup  ## all tests (about a quarter of an hour on 2 cores)
	$(PYTEST)

test-elsewhere: setup  ## the tests of numbers as another processor would run them, and on other made-up data
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Prescott OMP_NUM_THREADS=3 $(PYTEST) -m 'not slow' $(NUMBERS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell OMP_NUM_THREADS=1 $(PYTEST) -m 'not slow' $(NUMBERS)
	CLIP_CID_SEED_SHIFT=1000 HYPOTHESIS_PROFILE=elsewhere $(PYTEST) -m 'not slow' --hypothesis-seed=1000 $(NUMBERS)

# How often each command is disturbed in each way, and damaged files of each kind; another SEED gives other ones.
KILLS ?= 40
MUTANTS ?= 170
SEED ?= 0

faults: setup  ## kill commands at file operations, let these fail, cut the power, damage files: hours
	$(BIN)/python tests/faults --kills $(KILLS) --kills-in-time $(KILLS) --power-cuts $(KILLS) --failures $(KILLS) --mutants $(MUTANTS) --seed $(SEED)

device-check: setup  ## on a machine with a CUDA device: tests, results beside the CPU's, speed (eight minutes)
	$(BIN)/python benchmarks/device_check.py

check: setup  ## format, lint, types, and who imports whom
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: setup  ## mend what the formatter and the linter can
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

docs: setup  ## the docs as a site, in build/site; a broken link ends it
	$(BIN)/mkdocs build --strict

# What a user of the package index meets: the built wheel, an environment of its own, the README's first commands.
RELEASE := build/release

release-check: setup  ## build the package, check it, install it afresh, deduplicate with it; uploads nothing (PyTorch is large)
	rm -rf $(RELEASE)
	$(BIN)/python -m build --outdir $(RELEASE)/dist
	$(BIN)/twine check --strict $(RELEASE)/dist/*
	$(PYTHON) -m venv $(RELEASE)/fresh
	$(RELEASE)/fresh/bin/pip install --quiet -c constraints.txt $(RELEASE)/dist/*.whl
	cd $(RELEASE) && fresh/bin/python -c "import numpy; a = numpy.random.default_rng(0).normal(size=(500, 64)); a /= numpy.linalg.norm(a, axis=1, keepdims=True); numpy.save('embeddings.npy', numpy.concatenate([a, a]))"
	cd $(RELEASE) && fresh/bin/clip-cid balance runs/dedup --embeddings embeddings.npy
	cd $(RELEASE) && fresh/bin/clip-cid subset runs/dedup out
	cd $(RELEASE) && fresh/bin/clip-cid init small-gpu.yaml --from small-gpu

demo: setup  ## the whole pipeline on the embedded sample, about five minutes on 2 cores
	$(BIN)/clip-cid sample data/demo
	$(BIN)/clip-cid run runs/demo-teacher --recipe recipes/demo-teacher.yaml
	$(BIN)/clip-cid run runs/demo-baseline --recipe recipes/demo-baseline.yaml
	$(BIN)/clip-cid run runs/demo --recipe recipes/demo.yaml
	@echo "Open runs/demo/report/report.html in a browser."

clean:  ## remove the virtual environment and the demo
	rm -rf .venv data/demo runs/demo runs/demo-teacher runs/demo-baseline
