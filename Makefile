PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint docs compatibility clean

# torch first: a constrained install keeps the later ones from choosing another build
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --constraint constraints.txt torch
	$(PY) -m pip install --constraint constraints.txt --editable ".[test,plot]"
	touch $@

demo: $(VENV)/ready
	$(PY) examples/01_flow_posterior.py

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

lint: $(VENV)/ready
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

# the site, in site/; pages with `run: true` run their code
docs: $(VENV)/docs
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

$(VENV)/docs: $(VENV)/ready
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# docs/compatibility.md, from the tests that it shows
compatibility: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_compat.py tests/objectives/test_bound_programs.py -n 2 --write-compatibility

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .cache site
