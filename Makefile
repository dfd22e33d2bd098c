# Every target makes what it needs: Python 3.11 or later and make are enough.

PYTHON ?= python3
VENV ?= .venv

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-slow bench lint coverage clean

help:
	@echo "make demo      watch a small mesh at work on this machine"
	@echo "make test      run the tests, all but the long ones"
	@echo "make test-long run the long ones: proofs that let seconds pass"
	@echo "make test-slow run all of them, the long ones too"
	@echo "make bench     measure this and its peers side by side, and print it"
	@echo "make lint      check style, types and who imports whom"
	@echo "make coverage  run all tests, then list the lines that none of them ran"
	@echo "make clean     remove the virtual environment and everything built"
	@echo
	@echo "PYTHON=$(PYTHON) is used to make the virtual environment VENV=$(VENV)"

demo: $(VENV)/.has-run
	$(VENV)/bin/mesh demo

test: $(VENV)/.has-test
	$(VENV)/bin/python -m pytest

# Some take minutes, after which the others are ended as hung.
LONG = -o faulthandler_timeout=450

test-long: $(VENV)/.has-test
	$(VENV)/bin/python -m pytest $(LONG) -m long

test-slow: $(VENV)/.has-test
	$(VENV)/bin/python -m pytest $(LONG) -m ""

bench: $(VENV)/.has-bench
	$(VENV)/bin/python -m bench

lint: $(VENV)/.has-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

coverage: $(VENV)/.has-test
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* .hypothesis
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What is installed is the tree itself (-e), so that only pyproject.toml makes it stale; without the
# finder that setuptools would put into every start of the interpreter, which no user has.
$(VENV)/.has-run: EXTRA =
$(VENV)/.has-test: EXTRA = [test]
$(VENV)/.has-bench: EXTRA = [bench]
$(VENV)/.has-dev: EXTRA = [dev]
$(VENV)/.has-%: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat -e '.$(EXTRA)'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is missing or older than 3.11; name another: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
