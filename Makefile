# A fresh machine needs Python 3.11 or newer, git and make; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow torture coverage models check bench bench-long bench-cluster bench-gpu gpu vllm clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

# torch first and by itself: with it in place nothing draws in another build with gigabytes of CUDA.
$(BIN)/vlm-batch: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vlm-batch needs Python 3.11 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report]'
	@touch $@

$(VENV)/.dev: $(BIN)/vlm-batch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(BIN)/vlm-batch $@

setup: $(VENV)/.dev  ## .venv with everything for development

demo: $(BIN)/vlm-batch  ## the main job on the embedded model and pictures; answers in outputs/demo
	$(BIN)/vlm-batch run
	$(BIN)/python scripts/demo_accuracy.py outputs/demo

test: $(VENV)/.dev  ## all tests that need no GPU (about 10 minutes on two cores)
	$(BIN)/python -m pytest

slow: $(VENV)/.dev  ## the tests that make test leaves out: every architecture and preset, several workers, Slurm, Ray, disks, clocks (25 minutes)
	$(BIN)/python -m pytest -m "slow and not torture"

torture: $(VENV)/.dev  ## kills by the hundred, at every named point, in the middle of writes; a table of what was lost (25 minutes)
	$(BIN)/python -m pytest tests/torture -m "torture or not slow" --timeout 1800 --faults-page

coverage: $(VENV)/.dev  ## branch coverage of make test's tests, in this process alone; at least 90 % (15 minutes)
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage report

models: $(VENV)/.dev  ## every architecture through the whole program (3 minutes), then docs/models.md
	$(BIN)/python -m pytest tests/models -m "slow or not slow" --deselect tests/models/test_models_page.py
	$(BIN)/python tests/models/models_page.py

check: $(VENV)/.dev  ## ruff, formatting, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

# BENCH="--workload questions --group features" and other words of scripts/bench_engines.py choose more.
bench: $(VENV)/.dev  ## engines side by side, planning, start-up (about 15 minutes on two cores): tables and JSON in outputs/bench
	$(BIN)/python scripts/bench_engines.py --output outputs/bench $(BENCH); engines=$$?; \
	$(BIN)/python scripts/bench.py --output outputs/bench --only plan --only finished --only startup && exit $$engines

bench-long: $(VENV)/.dev  ## all workloads, all sides, three rounds, and the main job with memory over 50,000 rows (hours)
	$(BIN)/python scripts/bench_engines.py --output outputs/bench --rounds 3 --group features --group compiled --group more \
	--workload captions --workload long --workload short --workload questions; engines=$$?; \
	$(BIN)/python scripts/bench.py --output outputs/bench && exit $$engines

bench-cluster: $(VENV)/.dev  ## two processes against one, a slow worker among eight, status of 200 workers (15 minutes)
	$(BIN)/python scripts/bench_cluster.py --output outputs/bench

# No setup: a Python with CUDA's torch, transformers, accelerate and pytest is enough (make gpu GPU_PYTHON=python3). A check
# whose package is missing (optimum-quanto, flash-attn, flash-attn-4) says so in the results and is not measured.
GPU_PYTHON ?= $(BIN)/python
gpu:  ## models of real size on a CUDA device, under 8 minutes; results in docs/benchmarks/models_gpu.md and .json
	PYTHONPATH=.:$$PYTHONPATH GPU_RESULTS=docs/benchmarks $(GPU_PYTHON) -m pytest tests/gpu -m gpu -rs -s

GPU_MODELS ?= idefics2_8b qwen2_5_vl_7b smolvlm_256m
bench-gpu:  ## engines on a CUDA device, under 9 minutes a model (GPU_MODELS); results in docs/benchmarks/engines_gpu_*
	for model in $(GPU_MODELS); do \
	PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) scripts/bench_gpu.py --model $$model --output docs/benchmarks || exit; done

# vLLM for CPUs pins its own versions of nearly everything: an environment of its own, for its tests and the benchmark.
$(VLLM_VENV)/bin/vlm-batch: constraints-vllm.txt scripts/torchvision_without_cuda.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	site=$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	cp scripts/torchvision_without_cuda.py $$site/ && echo 'import torchvision_without_cuda' > $$site/torchvision_without_cuda.pth
	@touch $@

vllm: $(VLLM_VENV)/bin/vlm-batch  ## .venv-vllm with vLLM for CPUs: for the tests of engine=vllm and its side of the benchmark

clean:  ## remove .venv and caches, keep outputs
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
