# `make report` and `make test` are all that a fresh clone needs: each makes the virtual environment
# if it is missing, installs the tested versions, and does its job. Choose another interpreter with
# `make PYTHON=/path/to/python3.12 test`. The pip of every supported Python is new enough as it is.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
BIN     := $(VENV)/bin
PYTEST   = $(BIN)/python -m pytest

# One thread a process: the tests use $(WORKERS) processes already.
unit long doctest notebooks test-models: export OMP_NUM_THREADS ?= 1
# A notice about the future of the documentation's theme, which says nothing about this build.
docs: export NO_MKDOCS_2_WARNING = 1

.PHONY: help report test lint types floors unit long doctest notebooks docs fuzz test-models bench gpu clean
.NOTPARALLEL:

help:
	@echo "make report     train a small classifier on digits and report on its kernel: report/"
	@echo "make test       everything below up to unit"
	@echo "make lint       ruff: rules and format"
	@echo "make types      mypy"
	@echo "make floors     import-linter: who may import whom"
	@echo "make docs       build the documentation into site/"
	@echo "make doctest    examples in docstrings, README and docs/"
	@echo "make notebooks  run every notebook"
	@echo "make long       the tests that take their time: several processes, laws, random networks, benchmarks"
	@echo "make unit       the test suite"
	@echo "make fuzz       random networks against dense Jacobians, FUZZ_EXAMPLES=2500 for each test"
	@echo "make test-models  the whole table of models: transformers, peft, timm, torchvision; none downloaded"
	@echo "make bench      benchmarks, JSON into benchmarks/results/"
	@echo "make gpu        tests that need a CUDA device, then large networks on it: 8 minutes"
	@echo "make clean      remove build products and caches, keep $(VENV)"

# ---------------------------------------------------------------------------------- environment

# pip is written last, so a half-made environment is completed.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "ntkops needs Python 3.11 or newer, this is %s; try make PYTHON=/path/to/python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -e '.[$*]' -c constraints.txt
	@touch $@

.PRECIOUS: $(VENV)/.installed-%

DEMO := $(VENV)/.installed-demo
TEST := $(VENV)/.installed-test
DOCS := $(VENV)/.installed-docs
MODELS := $(VENV)/.installed-models
PEERS := $(VENV)/.installed-peers

# The suite tests against other libraries, too: a dozen of their models, their curvature operators. Where these
# cannot be installed it skips those tests, and its summary says so.
OTHERS := $(VENV)/.asked-for-others

$(OTHERS): pyproject.toml constraints.txt | $(TEST)
	-$(MAKE) --no-print-directory $(MODELS)
	-$(MAKE) --no-print-directory $(PEERS)
	@touch $@

# ----------------------------------------------------------------------------------------- jobs

report: $(DEMO)
	$(BIN)/python -m ntkops report

# The test suite comes last, so that its summary closes the log.
test: lint types floors docs doctest notebooks long unit

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TEST)
	$(BIN)/mypy

floors: $(TEST)
	$(BIN)/lint-imports

docs: $(DOCS)
	$(BIN)/mkdocs build --strict

doctest: $(TEST)
	$(PYTEST) --doctest-modules ntkops tests/docs

notebooks: $(TEST)
	$(PYTEST) --nbmake --nbmake-timeout=300 notebooks

# Every process begins with its part of the tests in their order, so that what the tests of one file share is made
# once; who is done takes from the end of another's.
SPREAD = -n $(WORKERS) --dist worksteal

unit: $(TEST) $(OTHERS)
	$(PYTEST) $(SPREAD) --ignore=tests/docs

long: $(TEST) $(OTHERS)
	$(PYTEST) $(SPREAD) -m '(dist or long) and not slow and not models' --ignore=tests/docs

# Two grammars, four tests of random networks and three of random programs; and laws of small networks.
fuzz: export FUZZ_EXAMPLES ?= 2500
fuzz: export OMP_NUM_THREADS ?= 1
fuzz: $(TEST)
	$(PYTEST) $(SPREAD) -m long --timeout 0 --hypothesis-show-statistics \
	  tests/architectures/test_random_networks.py tests/architectures/test_random_programs.py tests/operators/test_random_indices.py

# The whole table of models; unit runs what torch alone can build, and a dozen of the others.
test-models: $(TEST) $(MODELS)
	$(PYTEST) -m '' tests/models

bench: $(DEMO)
	@mkdir -p benchmarks/results
	missed=; for script in $(filter-out benchmarks/trips.py,$(wildcard benchmarks/[!_]*.py)); do \
	  $(BIN)/python $$script --out benchmarks/results/$$(basename $$script .py).json || missed="$$missed $$script"; \
	done; test -z "$$missed" || { echo "a claim is missed, or an error:$$missed"; false; }

gpu: $(DEMO) $(TEST)
	@mkdir -p benchmarks/results
	timeout 180 $(PYTEST) -m gpu
	timeout 300 $(BIN)/python benchmarks/real_networks.py --device cuda --dtypes float32 bfloat16 --seconds 200 \
	  --out benchmarks/results/real_networks_gpu.json

clean:
	rm -rf build site report *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find ntkops tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
