# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two test files at a time; PYTEST_ARGS= runs them one by one.
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: demo test lint bench peers format system-packages clean

demo: $(INSTALLED) system-packages
	$(BIN)/python bench/demo.py

test: $(INSTALLED) system-packages
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	.ci/types

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: peers
	$(BIN)/python bench/latency.py
	$(BIN)/python bench/memory.py

# The systems to compare with, about 6 GB in the cache folder; does nothing where they are.
peers: $(INSTALLED) system-packages
	$(BIN)/python bench/peers/prepare.py

# The compilers, the emulator and valgrind; does nothing where they are.
system-packages:
	@.ci/system-packages

.venv: $(INSTALLED)

# setuptools first and no build isolation: a later `pip install -e .` then needs no network.
$(INSTALLED): pyproject.toml
	@.ci/system-packages venv
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf build dist demo-out bench-out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
