# Everything a fresh machine needs is made here: Python 3.11+ and make are enough.
#
#   make demo    environment, then `tracekit demo`: a sample trace, its summary, charts, report
#   make test    development environment, lint, types, layering, the manual, tests
#   make docs    the manual, build/manual/index.html
#   make test-capture  tests of capture, which need torch: an environment of their own
#   make test-oldest   tests of the core, with the oldest versions of what pyproject.toml says it needs
#   make bench   the benchmarks of benchmarks/README.md
#   make clean   remove what the above made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo

.PHONY: demo test test-capture test-oldest lint docs bare bench clean

# Stamps record what an environment was made from, so that a second run is quick.
$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "tracekit needs Python 3.11 or later; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@touch $@

$(VENV)/installed: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/developed: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@ $(VENV)/installed

demo: $(VENV)/installed
	@rm -rf $(DEMO)
	$(BIN)/tracekit demo $(DEMO)
	@echo "The command is on the path after: . $(BIN)/activate"

# Tests run last, so that the last line says how many passed.
test: lint docs bare
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/developed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A warning is an error; everything is built anew, so that a page cannot hide one.
docs: $(VENV)/developed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env -b html docs build/manual

# What a user gets from `pip install`: the wheel with its declared dependencies and nothing of the checkout.
BARE := build/bare

$(BARE)/installed: $(VENV)/python pyproject.toml
	@rm -rf $(BARE) && mkdir -p $(BARE)
	$(PYTHON) -m venv $(BARE)
	$(BARE)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BARE)/bin/python -m pip install --quiet --disable-pip-version-check .
	@touch $@

bare: $(VENV)/developed $(BARE)/installed
	@rm -rf $(BARE)/dist
	$(BIN)/python -m hatchling build -t wheel -d $(BARE)/dist
	$(BARE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall $(BARE)/dist/*.whl
	cd $(BARE) && bin/tracekit --version && bin/tracekit --help > help.txt && bin/tracekit query --list > list.txt && bin/tracekit models > models.txt
	cd $(BARE) && rm -rf tracekit-demo && bin/tracekit demo > demo.txt

# torch is large and nothing else needs it, so its tests have an environment of their own.
CAPTURE := build/capture

$(CAPTURE)/installed: $(VENV)/python pyproject.toml
	@rm -rf $(CAPTURE) && mkdir -p $(CAPTURE)
	$(PYTHON) -m venv $(CAPTURE)
	$(CAPTURE)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(CAPTURE)/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(CAPTURE)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[capture]" pytest hypothesis
	@touch $@

test-capture: $(CAPTURE)/installed
	$(CAPTURE)/bin/python -m pytest tests/capture $(PYTEST_ARGS)

# The lower bounds in pyproject.toml are a promise. Newer Pythons than this have no wheels of them.
OLDEST := build/oldest
OLDEST_PYTHON ?= python3.11
CORE := cli tables metrics store store_parts storage queries charts report samples sources_arrays sources_responses

$(OLDEST)/installed: pyproject.toml
	@rm -rf $(OLDEST) && mkdir -p $(OLDEST)
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(OLDEST)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
		| sed 's/>=/==/' > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(OLDEST)/requirements.txt pytest hypothesis
	@touch $@

# Not installed: the tests run on the checkout's package. Another version of numba must not read the cached kernels.
test-oldest: $(OLDEST)/installed
	NUMBA_CACHE_DIR=$(CURDIR)/$(OLDEST)/kernels $(OLDEST)/bin/python -m pytest $(CORE:%=tests/test_%.py) $(PYTEST_ARGS)

bench: $(VENV)/developed
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/scale.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find tracekit tests -name __pycache__ -type d -prune -exec rm -rf {} +
