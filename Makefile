# `make train`: fine-tune the embedded model. `make test`: everything CI runs. Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test check embedded clean
train: .venv/ready
	$(BIN)/tokenpo train

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

embedded: .venv/ready
	$(BIN)/python scripts/make_embedded.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
