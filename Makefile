# Each target is all a fresh machine needs (python3 with venv): it makes .venv, installs what is missing, and runs.
PYTHON ?= python3
BIN := .venv/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv native demo test lint clean

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[export,dev]'
	$(BIN)/pip install --quiet --no-deps open-mythos
	touch $@

# The operators' C++ kernels; says why where they cannot be built here (exit 3), and all else works without them.
native:
	runtimes/native/build.sh || [ $$? -eq 3 ]

demo: venv native
	$(BIN)/mythos-export demo

test: lint native
	$(BIN)/pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv dist build runtimes/native/build runtimes/native/lib .pytest_cache .mypy_cache .ruff_cache .hypothesis
