# Two commands: `make run` opens the workbench, `make test` runs every check.
# Both make .venv on first use and need the network only for that.

PYTHON ?= python3
BIN := .venv/bin
# Of the 22,000 files in .venv the workbench imports 4,000. pip would take a minute to compile them all, so Python does it
# when it imports one, and keeps it for the next start also where it is told to keep nothing, as in many containers.
export PYTHONDONTWRITEBYTECODE :=

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
