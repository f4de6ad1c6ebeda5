# make quickstart   set-up, then the main task: train an adapter on the shipped base, and evaluate both
# make test         set-up, then the whole suite
# make check        lint, format, types, known advisories of pinned packages
# make interop      comparison with upstream LLaVA, installed in an environment of its own: both directions, all families
# make harness      comparison with lmms-eval, installed in an environment of its own (contrib/lmms-eval)
# make photos       set-up, the base for photos, then a real result: labelled photos in, judged photos out
# make photos-data  fetches photos from three Debian packages (300 MB), and prepares the photo data sets (docs/photo-data.md)
# make bench        the side-by-side measurements under benchmarks/, stored in benchmarks/results/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE = 1

UPSTREAM := build/upstream
DEEPSPEED := build/deepspeed
HARNESS := build/harness

.PHONY: quickstart test check interop harness photos photos-data bench clean

quickstart: $(READY)
	rm -rf runs/quickstart
	$(BIN)/lcl-adapter train recipes/pocket.yaml output=runs/quickstart

# Two processes with one thread each, because most tests are too small to use two threads.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tools.advisories

interop: $(READY) $(UPSTREAM)/ready $(DEEPSPEED)/ready
	$(BIN)/python -m interop.check
	PYTHONPATH=$(DEEPSPEED) $(BIN)/pytest tests/test_processes.py -k zero3

$(UPSTREAM)/ready: interop/requirements.txt
	$(PYTHON) -m venv $(UPSTREAM)
	$(UPSTREAM)/bin/pip install --quiet torch==2.13.0
	$(UPSTREAM)/bin/pip install --quiet -r interop/requirements.txt
	$(UPSTREAM)/bin/pip install --quiet --no-deps llava-torch==1.2.2.post1
	touch $(UPSTREAM)/ready

$(DEEPSPEED)/ready: $(READY) interop/deepspeed.txt
	rm -rf $(DEEPSPEED)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation --no-deps --target $(DEEPSPEED) -r interop/deepspeed.txt
	touch $(DEEPSPEED)/ready

harness: $(HARNESS)/ready
	$(HARNESS)/bin/pytest tests/test_harness.py -rs

$(HARNESS)/ready: pyproject.toml constraints.txt contrib/lmms-eval/pyproject.toml contrib/lmms-eval/requirements.txt
	$(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/bin/pip install --quiet -c constraints.txt torch
	$(HARNESS)/bin/pip install --quiet -c constraints.txt -e ".[dev]"
	$(HARNESS)/bin/pip install --quiet -r contrib/lmms-eval/requirements.txt
	$(HARNESS)/bin/pip install --quiet --no-deps lmms-eval==0.7.3 -e contrib/lmms-eval
	touch $(HARNESS)/ready

photos: $(READY)
	$(BIN)/lcl-adapter base build photo
	rm -rf judged
	$(BIN)/lcl-adapter ask lcl_adapter/photo/example/labelled lcl_adapter/photo/example/new --base photo --adapter photo-lcl --compare --out judged

photos-data: $(READY)
	$(BIN)/python -m tools.photo.data

bench: $(READY)
	$(BIN)/python -m benchmarks.predict --store
	$(BIN)/python -m benchmarks.train --store
	$(BIN)/python -m benchmarks.data --store
	$(BIN)/python -m benchmarks.merge --store
	$(BIN)/python -m benchmarks.plan --store
	$(BIN)/python -m benchmarks.serve --store

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bnb,page,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs build merged
