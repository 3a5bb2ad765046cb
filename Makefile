# Two commands do everything: `make demo` and `make test`. Both set up .venv first if it is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: setup demo test test-slow lint types bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -e '.[dev,rtx,fp16]'
	touch $@

demo: setup
	$(BIN)/prunectl demo

# one thread a test, two at a time: the whole default suite in minutes on two cores
test: setup
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/pytest -m slow --timeout 3600

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info
