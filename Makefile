# `make help` lists the targets.  Variables: VENV (folder of the environment), DEVICE (auto, cpu, cuda),
# PYTHON (the interpreter to make the environment with), TESTS (what `make test` runs), JOBS (its processes: one more than cores, 8 at most).
VENV ?= .venv
DEVICE ?= auto
TESTS ?= tests
PYTHON ?=
JOBS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1); echo $$((n < 8 ? n + 1 : 8)))
export PYTHON

PY = $(VENV)/bin/python
STEP = @bash launch/setup_environment.sh
DONE = @touch $@

.PHONY: help setup setup-sharded setup-ray setup-encoders train test test-instruction-sets bench-gpu bench-cpu check format clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r a b; do printf '  %-20s %s\n' "$$a" "$$b"; done

setup: $(VENV)/.gr ## the environment: Python packages, CPU or CUDA builds as the machine needs, compiled operators
	@echo "[setup] ready: $(PY)"

$(VENV)/.venv: launch/setup_environment.sh
	$(STEP) venv $(VENV) $(DEVICE)
	$(DONE)

$(VENV)/.torch: gr/tested_set.txt | $(VENV)/.venv
	$(STEP) torch $(VENV) $(DEVICE)
	$(DONE)

$(VENV)/.packages: pyproject.toml $(VENV)/.torch
	$(STEP) packages $(VENV) $(DEVICE)
	$(DONE)

$(VENV)/.kernels: kernels/setup.py kernels/pyproject.toml $(wildcard kernels/csrc/* kernels/csrc/cuda/*) $(VENV)/.torch | $(VENV)/.packages
	$(STEP) kernels $(VENV) $(DEVICE)
	$(DONE)

$(VENV)/.gr: setup.py pyproject.toml $(VENV)/.packages $(VENV)/.kernels
	$(STEP) gr $(VENV) $(DEVICE)
	$(DONE)

setup-sharded: setup $(VENV)/.sharded ## also TorchRec, FBGEMM and DeepSpeed, for models over many devices
	@echo "[setup] ready: $(PY), for models over many devices"

$(VENV)/.sharded: pyproject.toml gr/tested_set.txt $(VENV)/.torch | $(VENV)/.gr
	$(STEP) sharded $(VENV) $(DEVICE)
	$(DONE)

setup-ray: setup $(VENV)/.ray ## also Ray and the client of S3, for logs and datasets of a cluster
	@echo "[setup] ready: $(PY), for logs and datasets of a cluster"

$(VENV)/.ray: pyproject.toml gr/tested_set.txt | $(VENV)/.gr
	$(STEP) ray $(VENV) $(DEVICE)
	$(DONE)

setup-encoders: setup $(VENV)/.encoders ## also transformers and small encoders, for items by their texts and pictures
	@echo "[setup] ready: $(PY), for items by their texts and pictures"

$(VENV)/.encoders: pyproject.toml gr/tested_set.txt | $(VENV)/.gr
	$(STEP) encoders $(VENV) $(DEVICE)
	$(DONE)

train: setup ## quickstart: makes a small synthetic stream, trains HSTU on it, ends with a table and a plot
	@$(PY) launch/quickstart.py

test: setup setup-sharded setup-ray setup-encoders ## all tests (TESTS=tests/unit for some)
	@GR_TEST_ALL=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

test-instruction-sets: setup ## the numeric tests under other instruction sets, libraries' settings and threads (hours)
	@$(PY) tests/instruction_sets.py $(if $(SETTINGS),--only $(SETTINGS))

bench-gpu: setup ## kernels on a GPU: tests, sanitizer, resources, every benchmark, one report (STEPS="tests block" for some)
	@$(PY) benchmarks/kernels/suite.py --device cuda $(if $(STEPS),--steps $(STEPS))

bench-cpu: setup ## kernels on this machine's CPU: every benchmark, one report
	@$(PY) benchmarks/kernels/suite.py --device cpu $(if $(STEPS),--steps $(STEPS))

check: setup ## style, types, file sizes
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@large=$$(git ls-files -z 2>/dev/null | xargs -0 -I{} find {} -maxdepth 0 -type f -size +1024k 2>/dev/null); \
	if [ -n "$$large" ]; then echo "error: files over 1 MiB don't belong in git: $$large" >&2; exit 1; fi
	@echo "check: all good"

format: setup ## rewrites the code in the project's style
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean: ## removes caches and builds; leaves runs/, data/ and the environment
	@rm -rf build dist kernels/build .pytest_cache .mypy_cache .ruff_cache *.egg-info kernels/*.egg-info
	@find gr kernels launch benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
