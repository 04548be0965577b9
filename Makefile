# Everything a fresh clone needs: Python >= 3.10, a C++ compiler and make.
PYTHON ?= python3
VENV   ?= .venv
# torch goes in first and pinned: left to the resolver, a newer build would be downloaded.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# The packages of one of pyproject's extras. Installing '.[lint]' itself would compile the extension a second time.
EXTRA   = $(BIN)/python .ci/extra.py

# Test files are dealt out to several processes; whole files, because tests of one share what they compile. Not more of them
# than four: each loads torch. ARGS="-n0" runs all in one, for a debugger.
SPREAD  = -n auto --maxprocesses 4 --dist loadfile

# What the compiled part depends on; a change in a plain .py file needs no new install.
BUILD_INPUTS := pyproject.toml $(wildcard CMakeLists.txt) \
  $(shell find cmake csrc fastseq -name '*.cpp' -o -name '*.h' -o -name '*.def' -o -name '*.cmake' \
          -o -name '*.cu' -o -name '*.cuh' \
          -o -name 'CMakeLists.txt' -o -name '*.pyx' -o -name '*.pxi' -o -name '*.pxd' 2>/dev/null)

.DEFAULT_GOAL := help
# Lists what clang-format looks at.
CXX_SOURCES := find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
# What the README shows of measurements comes from these files and nowhere else.
RESULTS := $(addprefix benchmarks/results/,rnn.json attention.json transformer.json)
FILL_README = $(BIN)/python -m fastseq.bench readme $(RESULTS) README.md --figures docs/figures

.PHONY: help demo test test-pure bench report readme lint format clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

demo: $(VENV)/.installed  ## train the same model with torch.nn and fastseq.nn, side by side
	$(BIN)/python examples/next_character.py $(ARGS)

test: $(VENV)/.installed  ## run the test suite
	$(BIN)/python -m pytest -q $(SPREAD) $(ARGS)

# In an environment of its own, where fastseq is installed as on a machine without a compiler.
test-pure:  ## run the test suite without the compiled extension, on Numba
	$(MAKE) VENV=$(VENV)-pure $(VENV)-pure/.torch
	FASTSEQ_NO_EXT=1 $(VENV)-pure/bin/python -m pip --disable-pip-version-check install '.[test]'
	$(VENV)-pure/bin/pytest -q $(SPREAD) $(ARGS)

bench: $(VENV)/.bench  ## time the layers against torch.nn (pytest-benchmark)
	$(BIN)/python -m pytest -q benchmarks --benchmark-only $(ARGS)

report: $(VENV)/.bench  ## measure every peer, then redo the README's tables and pictures, and a page
	$(BIN)/python -m fastseq.bench run --suite rnn --json benchmarks/results/rnn.json $(ARGS)
	$(BIN)/python -m fastseq.bench run --suite attention --json benchmarks/results/attention.json $(ARGS)
	$(BIN)/python -m fastseq.bench run --suite transformer --json benchmarks/results/transformer.json $(ARGS)
	$(FILL_README)
	$(BIN)/python -m fastseq.bench report $(RESULTS) --html build/report.html

readme: $(VENV)/.bench  ## redo the README's tables and pictures from the results that are here
	$(FILL_README)

lint: $(VENV)/.lint  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CXX_SOURCES) | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.lint  ## rewrite the files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CXX_SOURCES) | xargs $(BIN)/clang-format -i

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "fastseq needs Python 3.10 or newer: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) install -e '.[test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	packages=$$($(EXTRA) bench) && $(PIP) install $$packages
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	packages=$$($(EXTRA) lint) && $(PIP) install $$packages
	@touch $@
