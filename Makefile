# make demo: unlearn basketball from the shipped model.   make test: the whole test suite.
# Both install into .venv first. Without a GPU, torch comes from its CPU index, since PyPI's brings CUDA;
# TORCH_INDEX= (empty) turns that off.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PACKAGE ?= -e
WORKERS ?= 2
TORCH_INDEX ?= $(shell command -v nvidia-smi > /dev/null || echo https://download.pytorch.org/whl/cpu)
PIP = $(VENV)/bin/python -m pip install --quiet -c $(CONSTRAINTS)
export HF_HUB_OFFLINE = 1

.PHONY: demo test check documents benchmarks clean

demo: $(VENV)/installed
	$(VENV)/bin/python examples/quickstart.py

# -P: test what is installed, not the folder that this is run in.
test: $(VENV)/installed
	$(VENV)/bin/python -P -m pytest -n $(WORKERS)

# Lint, format, types.
check: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# Every code block of README.md and docs/, the notebooks, and the site itself.
documents: $(VENV)/installed-dev
	$(VENV)/bin/python -P -m pytest -n $(WORKERS) -m documents
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

benchmarks: $(VENV)/installed
	$(VENV)/bin/python benchmarks/attribution.py
	$(VENV)/bin/python benchmarks/finetune_step.py

clean:
	rm -rf $(VENV) site out

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) torch
	$(PIP) $(PACKAGE) ".[test]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) $(PACKAGE) ".[test,dev,docs]"
	touch $@
