# Two commands: `make run` opens the workbench, `make test` runs every check.
# Both make .venv on first use and need the network only for that. --no-compile: of 22,000 files the workbench imports
# 4,000, and Python compiles those when it does; all of them take a minute.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test
.DEFAULT_GOAL := run

run: .venv/installed
	$(BIN)/python -m streamlit run Home.py

test: .venv/installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	touch $@
