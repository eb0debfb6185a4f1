# A fresh machine needs Python 3.11 or newer, git and make; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow models check bench gpu clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# torch first and by itself: with it in place nothing draws in another build with gigabytes of CUDA.
$(BIN)/vlm-batch: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vlm-batch needs Python 3.11 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(BIN)/vlm-batch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(BIN)/vlm-batch $@

setup: $(VENV)/.dev  ## .venv with everything for development

demo: $(BIN)/vlm-batch  ## the main job on the embedded model and pictures; answers in outputs/demo
	$(BIN)/vlm-batch run
	$(BIN)/python scripts/demo_accuracy.py outputs/demo

test: $(VENV)/.dev  ## all tests that need no GPU (under 10 minutes on two cores)
	$(BIN)/python -m pytest

slow: $(VENV)/.dev  ## the tests that make test leaves out: every architecture and preset, twenty kills (6 minutes)
	$(BIN)/python -m pytest -m slow

models: $(VENV)/.dev  ## every architecture through the whole program (3 minutes), then docs/models.md
	$(BIN)/python -m pytest tests/models -m "slow or not slow" --deselect tests/models/test_models_page.py
	$(BIN)/python tests/models/models_page.py

check: $(VENV)/.dev  ## ruff, formatting, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict pipeline

bench: $(VENV)/.dev  ## speed against plain transformers, memory, planning: one table, and JSON
	$(BIN)/python scripts/bench.py --output outputs/bench

# No setup: a Python with CUDA's torch, transformers, accelerate and pytest is enough (make gpu GPU_PYTHON=python3). A check
# whose package is missing (optimum-quanto, flash-attn, flash-attn-4) says so in the results and is not measured.
GPU_PYTHON ?= $(BIN)/python
gpu:  ## models of real size on a CUDA device, under 8 minutes; results in docs/benchmarks/models_gpu.md and .json
	PYTHONPATH=.:$$PYTHONPATH GPU_RESULTS=docs/benchmarks $(GPU_PYTHON) -m pytest tests/gpu -m gpu -rs -s

clean:  ## remove .venv and caches, keep outputs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
