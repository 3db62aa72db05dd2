PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint docs clean

# torch first: a constrained install keeps the later ones from choosing another build
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[test,plot]"
	touch $@

demo: $(VENV)/ready
	$(PY) examples/01_flow_posterior.py

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

lint: $(VENV)/ready
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

# the pages that are generated from what was measured
docs: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_compat.py tests/objectives/test_bound_programs.py -n 2 --write-compatibility
	$(PY) -m pip install --quiet ".[docs]"
	$(PY) -m mkdocs build --strict

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache site
