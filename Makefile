# Everything is installed into .venv; nothing outside of this folder is touched.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint types docs package install clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps tensorrt-stubs
	touch $@

quickstart: install
	$(BIN)/python -m dsa_hw.prune --config configs/quickstart.yaml

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not measures"
	$(BIN)/python -m pytest -m measures

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

# Into site/; to search it, serve it: .venv/bin/python -m http.server --directory site
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

package: install
	.ci/check-package

clean:
	rm -rf .venv runs build dist site *.egg-info
