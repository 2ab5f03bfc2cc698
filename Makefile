# The everyday commands. The environment is made by the first one that needs it; to choose its
# interpreter: make PYTHON3=python3.12 install

VENV := .venv
PYTHON := $(VENV)/bin/python
# An environment that exists keeps its interpreter unless another is named.
PYTHON3 ?= $(or $(wildcard $(PYTHON)),python3)

NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f)
# Stamps, written last: an install that fails half-way is taken up again.
STACK := $(VENV)/.stack-$(shell $(PYTHON3) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
READY := $(VENV)/.ready

# What pip cannot bring: a supported interpreter, its headers (for pybind11, and for the launchers
# that Triton compiles on a GPU machine), the means to make an environment, a compiler.
define CHECK
import os, shutil, sys, sysconfig
version = "%d.%d" % sys.version_info[:2]
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit("fastast needs Python 3.10 to 3.13; $(PYTHON3) is " + version
             + ". Name another one: make PYTHON3=python3.12 install")
try:
    import ensurepip
except ImportError:
    ensurepip = None
found = [
    ("python%s-dev" % version, os.path.exists(sysconfig.get_path("include") + "/Python.h")),
    ("python%s-venv" % version, ensurepip),
    ("g++", shutil.which(os.environ.get("CXX", "c++"))),
]
missing = " ".join(package for package, there in found if not there)
if missing:
    sudo = "sudo " if os.geteuid() else ""
    sys.exit("Not on this machine: %s. On Debian and Ubuntu:\n    %sapt-get install -y %s"
             % (missing, sudo, missing))
endef
export CHECK

# True where the environment is whole and of the version asked for.
SAME_VERSION := import pip, sys; sys.exit("$(STACK)" != "$(VENV)/.stack-%d.%d" % sys.version_info[:2])

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint aot bench sanitize clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

install: $(READY)  ## environment, pinned packages and native build, in .venv

demo: $(READY)  ## train two models on generated sounds and compare them; DATA=folder for your own
	$(PYTHON) recipes/demo/run.py $(if $(DATA),--data $(DATA))

test: $(READY)  ## all tests that this machine can run
	$(PYTHON) -m pytest -q

lint: $(READY)  ## style, format and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo

aot: $(READY)  ## compile all kernels for all architectures, check what they need, write docs/kernels.md
	$(PYTHON) -m fastast.kernels.aot --table docs/kernels.md

bench: $(READY)  ## measure ops, whole models and memory against their peers
	$(PYTHON) -m bench ops e2e memory

# The sanitizers must be in the process before Python is; what it never frees is no leak of ours.
sanitize: $(READY)  ## test the compiled filterbank with the address and undefined-behaviour sanitizers
	FASTAST_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libubsan.so)" \
	$(PYTHON) -m pytest -q --capture=no tests/csrc/test_mel_kernels.py

clean:  ## remove builds and caches; the environment stays
	rm -rf build dist *.egg-info fastast/*.so .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
	rm -f $(READY)

$(STACK): requirements-dev.txt
	@command -v $(PYTHON3) >/dev/null || { echo "$(PYTHON3) not found; fastast needs Python 3.10 to 3.13"; exit 1; }
	@$(PYTHON3) -c "$$CHECK"
	@$(PYTHON) -c '$(SAME_VERSION)' 2>/dev/null || $(PYTHON3) -m venv --clear $(VENV)
	$(PYTHON) -m pip install --disable-pip-version-check -r $<
	@touch $@

$(READY): $(STACK) pyproject.toml $(NATIVE)
	$(PYTHON) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
