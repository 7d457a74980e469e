# make quickstart   the whole main job on the embedded world, offline, CPU
# make test         the test suite, from nothing
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
# the shipped fixtures are small: one thread is fastest, and reruns are bit-identical
export OMP_NUM_THREADS ?= 1

.PHONY: install quickstart test check lint format benchmarks reliability clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "python 3.11 to 3.13 is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade -c constraints.txt pip setuptools
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/llm-unlearn quickstart --out quickstart

# property tests draw the same examples every time here; plain pytest draws new ones
test: install lint
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --hypothesis-profile=ci

check: test

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmarks: install
	$(BIN)/python benchmarks/grokking.py --preset world40 --out benchmarks/results/grokking_world40.json
	$(BIN)/python benchmarks/grokking.py --preset short40 --out benchmarks/results/grokking_short40.json
	$(BIN)/python benchmarks/loop_speed.py --out benchmarks/results/loop_speed.json
	$(BIN)/python benchmarks/kill_resume.py --out benchmarks/results/kill_resume.json
	$(BIN)/python benchmarks/prepost.py --out benchmarks/results/prepost.json
	$(BIN)/python benchmarks/engines.py --cases finetune,grok,npo,npo_lora,rmu --out benchmarks/results/engines.json

# hours; goes on where it was stopped. Root for the rows with a small disk and with two nodes
reliability: install
	$(BIN)/python benchmarks/reliability.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
