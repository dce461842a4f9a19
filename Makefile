# make setup | test | demo | lint | types: each sets up what it needs in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The CPU build of ONNX Runtime where no NVIDIA device is present.
RUNTIME := $(if $(wildcard /dev/nvidia0 /dev/nvhost-gpu),daemon,cpu)

DATA ?=
SECONDS ?= 120
OUT ?= demo-out

.PHONY: setup test test-slow demo lint types format clean

setup: $(READY)

$(READY): pyproject.toml configs/constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint configs/constraints.txt \
	    --editable '.[$(RUNTIME),meta,dev]'
	$(BIN)/python -m pip install --quiet --constraint configs/constraints.txt pesq \
	    || echo 'PESQ could not be compiled: audio is then measured without it' >&2
	touch $@

test: setup
	$(BIN)/python -m pytest -q

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

demo: setup
	$(BIN)/mclnf-edge demo $(if $(DATA),--data "$(DATA)") --seconds $(SECONDS) --out "$(OUT)"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy -p mclnf_edge -p meta_trainer
	$(BIN)/mypy --explicit-package-bases tools

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache "$(OUT)"
