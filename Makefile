# Two commands are enough: `make quickstart` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test test-slow test-peer bench lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/opdkit quickstart --out quickstart $(ARGS)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -q -m slow

test-peer: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps trl==1.16.0
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m peer

bench: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps trl==1.16.0
	for name in vs_trl head sampler scaling; do $(BIN)/python benchmarks/$$name.py || exit 1; done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv quickstart build dist *.egg-info
