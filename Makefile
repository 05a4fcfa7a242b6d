# make demo   the whole recipe on real images, about nine minutes on two CPU cores
# make test   all tests
# make quick  tests that are not marked slow; of some files only with TESTS="FILE FOLDER ..."
# make lint   style, format and the order of imports
# make soak   runs that are killed, filled disks and long runs, about an hour
# make judge  lmms-eval with this library against its own llava_hf; MODEL=DIR, in .venv-judge
# make engines  vLLM for CPUs on exports against this library's answers, in .venv-engines
# make tpu    tests with the compiler for TPUs, which needs none; Linux on x86; FAST=1 leaves out
#             those marked slow
# Each makes the virtual environment .venv and installs what it needs, once.
# `PYTHON=python3.13 make test` does so with another interpreter, in .venv-3.13.

PYTHON ?= python3
ifeq ($(origin PYTHON), file)
VENV ?= .venv
else
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
$(if $(VERSION),,$(error PYTHON is $(PYTHON), which does not run; accepted: a Python interpreter))
VENV ?= .venv-$(VERSION)
endif
BIN := $(VENV)/bin
# Tests of a file share models and compiled programs: one worker runs them all.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick soak lint judge engines tpu clean

# Huge pages spare a quarter of the time on Linux, where each step allocates its buffers again.
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: $(VENV)/demo.installed
	$(BIN)/python -m tools.easy_vqa --out data/easy_vqa
	$(BIN)/python -m moddistill.recipe --config experiments/llava_mod.py:demo --workdir runs/demo

test: $(VENV)/test.installed
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

quick: $(VENV)/test.installed
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not soak" $(TESTS)

soak: $(VENV)/test.installed
	$(BIN)/python -m pytest -m soak -s

lint: $(VENV)/lint.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

judge: .venv-judge/installed
	.venv-judge/bin/python -m benchmarks.judge --model $(MODEL)

engines: .venv-engines/installed
	.venv-engines/bin/python -m benchmarks.engines --models $(MODELS)

# Runs last: with libtpu installed, JAX probes for TPUs at start-up and warns.
tpu: $(VENV)/tpu.installed
	$(BIN)/python -m pytest tests/test_tpu.py $(if $(FAST),-m "not slow")

clean:
	rm -rf $(VENV) .venv-* build *.egg-info .pytest_cache .ruff_cache

$(VENV)/demo.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moddistill needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	touch $@

$(VENV)/lint.installed: $(VENV)/demo.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,lint]'
	touch $@

.venv-judge/installed: setup.cfg
	test -x .venv-judge/bin/python || $(PYTHON) -m venv .venv-judge
	.venv-judge/bin/python -m pip install --quiet --disable-pip-version-check -e '.[eval,judge]'
	touch $@

# PyTorch's builds for CPUs are on an index of their own, which pip has to be configured with.
.venv-engines/installed: setup.cfg
	test -x .venv-engines/bin/python || $(PYTHON) -m venv .venv-engines
	.venv-engines/bin/python -m pip install --quiet --disable-pip-version-check -e '.[engines]'
	touch $@

$(VENV)/tpu.installed: $(VENV)/test.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test,tpu]'
	touch $@

# lmms-eval without its dependencies, which are gigabytes: tests use its classes. torchvision, of
# torch 2.13, in a folder that one test adds to its path: where it is found, transformers imports it,
# which fails next to a torch for CPUs.
$(VENV)/test.installed: $(VENV)/demo.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3
	if $(BIN)/python -c 'import torch' 2>/dev/null; then $(BIN)/python -m pip install --quiet \
		--disable-pip-version-check --no-deps --target $(VENV)/torchvision/site-packages torchvision==0.28.0; fi
	touch $@
