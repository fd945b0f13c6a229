# `make train`: fine-tune the embedded model. `make test`: everything CI runs. Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-verl check embedded clean
train: .venv/ready
	$(BIN)/tokenpo train

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# verl needs another transformers: an environment of its own. Where torch comes with CUDA by default, install a CPU
# build of torch into .venv-verl first.
test-verl: .venv-verl/ready
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest tests_verl

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

.venv-verl/ready: pyproject.toml tests_verl/requirements.txt
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet --requirement tests_verl/requirements.txt
	.venv-verl/bin/python -m pip install --quiet --no-deps verl==0.9.1 --editable .
	touch $@

clean:
	rm -rf .venv .venv-verl .pytest_cache .ruff_cache .mypy_cache
