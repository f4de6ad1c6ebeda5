# make quickstart   set-up, then the main job: train on the shipped base, measure base against adapter
# make test         set-up, then the whole suite
# make check        lint, format, types
# make bench        the side-by-side measurements under benchmarks/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE = 1

.PHONY: quickstart test check bench clean

quickstart: $(READY)
	rm -rf runs/quickstart
	$(BIN)/lcl-adapter train recipes/pocket.yaml output=runs/quickstart

test: $(READY)
	$(BIN)/pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.predict
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.data

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bnb,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs build merged
