# make demo: unlearn basketball from the shipped model.   make test: the whole test suite.
# Both install into .venv first. On Linux, PyPI's torch brings CUDA; for a small CPU build say
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PACKAGE ?= -e
PIP_FLAGS ?=
export HF_HUB_OFFLINE = 1

.PHONY: demo test check documents benchmarks clean

demo: $(VENV)/installed
	$(VENV)/bin/python examples/quickstart.py

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

# Lint, format, types.
check: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# Every code block of README.md and docs/, the notebooks, and the site itself.
documents: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -m documents
	$(VENV)/bin/mkdocs build --strict --quiet

benchmarks: $(VENV)/installed
	$(VENV)/bin/python benchmarks/attribution.py
	$(VENV)/bin/python benchmarks/finetune_step.py

clean:
	rm -rf $(VENV) site out

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) -c $(CONSTRAINTS) torch
	$(VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) -c $(CONSTRAINTS) $(PACKAGE) ".[test]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) -c $(CONSTRAINTS) $(PACKAGE) ".[test,dev,docs]"
	touch $@
