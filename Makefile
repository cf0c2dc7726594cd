# Everything is installed into .venv; nothing outside of this folder is touched.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint types package install clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps tensorrt-stubs
	touch $@

quickstart: install
	$(BIN)/python -m dsa_hw.prune --config configs/quickstart.yaml

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

package: install
	.ci/check-package

clean:
	rm -rf .venv runs build *.egg-info
