# Everything from a fresh clone: needs make, Python 3.10 or later with venv, and a C++ compiler.
#
#   make train ARGS="--dataset mnist --data DIR"
#   make train PYTHON=python3.12             the interpreter that makes .venv
#   make train VENV=$VIRTUAL_ENV             an environment of yours: what it lacks is installed
#   make train TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#                                            where no PyTorch is installed yet: which one to take
#   make train FASTDFA_PURE_PYTHON=1         no compiler: plain PyTorch in place of the kernels
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch~=2.13.0
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -qq
# In as many processes as there are cores, up to 4: on two cores in 0.6 of the time.
PYTEST := $(PY) -m pytest -q -n auto --maxprocesses 4 --dist worksteal

# One pair of stamps for each environment: its packages, and the extension built for it.
STAMP := build/stamp$(subst /,-,$(abspath $(VENV)))
SOURCES := setup.py build_backend.py CMakeLists.txt $(shell find cmake csrc -type f -not -name '*.pyc')
KERNELS := $(shell find cmake csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD := CMAKE_ARGS="-DBUILD_TESTING=ON $(CMAKE_ARGS)" $(PY) setup.py --quiet build_ext --inplace

.PHONY: help train test bench accuracy paper readme lint format registers wheel clean FORCE
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

train: $(STAMP).built ## train one network by DFA and by backprop
	@$(PY) benchmarks/train.py $(ARGS)

test: $(STAMP).built ## kernel tests, then every test with the kernels, then without
	@$(BUILD)
	@test ! -d build/cmake || $(VENV)/bin/ctest --test-dir build/cmake --output-on-failure
	$(PYTEST) $(ARGS)
	FASTDFA_DISABLE_EXTENSION=1 $(PYTEST) -m "not slow" $(ARGS)

bench: $(STAMP).built ## time and memory: of a step, its growth, kinds of networks; each kernel
	$(PY) benchmarks/step.py $(ARGS)
	$(PY) benchmarks/growth.py $(ARGS)
	$(PY) benchmarks/step_kinds.py $(ARGS)
	$(PY) benchmarks/recipe.py $(ARGS)
	$(PY) benchmarks/memory.py $(ARGS)
	$(PY) benchmarks/kernels.py $(ARGS)
	$(PY) benchmarks/one_core.py $(ARGS)
	$(PY) benchmarks/low_precision.py steps $(ARGS)
	$(PY) benchmarks/low_precision.py float16 $(ARGS)

accuracy: $(STAMP).built ## seconds to an accuracy, by DFA and by backprop: ARGS="--data DIR"
	$(PY) benchmarks/time_to_accuracy.py mnist $(ARGS)
	$(PY) benchmarks/time_to_accuracy.py cifar10 $(ARGS)

paper: $(STAMP).built ## the experiments of arXiv 1906.04554, for hours; ARGS="--data DIR --quick"
	@$(PY) benchmarks/paper.py $(ARGS)

readme: $(STAMP).packages ## the figures of README.md and docs/, from benchmarks/results
	$(PY) benchmarks/readme.py

lint: $(STAMP).packages ## ruff and clang-format, at pinned versions; figures of README and docs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(KERNELS)
	$(PY) benchmarks/readme.py --check

format: $(STAMP).packages ## put what lint asks for in place
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(KERNELS)

registers: $(STAMP).built ## what each CUDA kernel uses; an error where a hot one spills registers
	@$(BUILD)
	@$(PY) cmake/built.py registers build/cmake

.PHONY: gpu
gpu: ## on a machine with a CUDA GPU: build, test, sanitize, measure; ARGS="build test"
	@$(PYTHON) benchmarks/gpu.py $(ARGS)

# One wheel for each Python and each major version of CUDA: the local version tells them apart.
wheel: $(STAMP).packages ## dist/*.whl for this Python and processor, with CUDA where nvcc is
	@rm -rf build/lib* build/bdist*
	@test "$$FASTDFA_CUDA" = 0 || nvcc=$$($(VENV)/bin/cmake -P cmake/nvcc.cmake); \
	if test "$$nvcc"; then export FASTDFA_CUDA=1 FASTDFA_LOCAL_VERSION=cu$${nvcc%.*}; \
	else export FASTDFA_LOCAL_VERSION=cpu; fi; \
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .
	@$(PY) cmake/built.py wheel dist

clean: ## everything built; environments and results stay
	rm -rf build dist *.egg-info fastdfa/*.so

$(STAMP).packages: pyproject.toml $(if $(wildcard $(PY)),,FORCE)
	@python="$(PY)"; test -x "$$python" || python="$(PYTHON)"; \
	$$python -c "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))" 2>/dev/null || { \
	  echo "fastdfa: $$python is no Python 3.10 or later with its venv module" \
	    "(Debian: apt install python3-venv); name one with PYTHON=..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  echo "Making $(VENV)"; $(PYTHON) -m venv "$(VENV)"; }
	@$(PY) -c "from importlib.metadata import version as v; \
	  exit([*map(int, v('torch').split('.')[:2])] < [2, 10])" 2>/dev/null || { \
	  echo "Installing $(TORCH); this can take minutes"; $(PIP) $(TORCH); }
	@echo "Installing fastdfa and its requirements"
	@FASTDFA_PURE_PYTHON=1 $(PIP) --editable ".[test,dev]"
	@mkdir -p build && touch $@

# pip's editable install above already points here; the extension lands beside the Python files.
$(STAMP).built: $(STAMP).packages $(SOURCES)
	@echo "Compiling"
	@$(BUILD)
	@touch $@
