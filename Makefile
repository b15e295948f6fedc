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
# In as many processes as there are cores, up to 4. Each has two threads, more than there are cores:
# threads that wait must sleep. On two busy cores the tests of benchmarks took 319 s of which most was
# spinning, and 86 s so.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n auto --maxprocesses 4 --dist worksteal

# One pair of stamps for each environment: its packages, and the extension built for it.
STAMP := build/stamp$(subst /,-,$(abspath $(VENV)))
SOURCES := setup.py build_backend.py CMakeLists.txt $(shell find cmake csrc -type f -not -name '*.pyc')
KERNELS := $(shell find cmake csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD := CMAKE_ARGS="-DBUILD_TESTING=ON $(CMAKE_ARGS)" $(PY) setup.py --quiet build_ext --inplace

.PHONY: help train test sanitize bench accuracy paper readme lint format registers wheel clean FORCE
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

train: $(STAMP).built ## train one network by DFA and by backprop
	@$(PY) -m examples.training.train $(ARGS)

test: $(STAMP).built ## kernel tests, every test with the kernels, then what differs without
	@$(BUILD)
	@test ! -d build/cmake || $(VENV)/bin/ctest --test-dir build/cmake --output-on-failure
	$(PYTEST) $(ARGS)
	FASTDFA_DISABLE_EXTENSION=1 $(PYTEST) -m "kernels and not slow" $(ARGS)

# The sanitized libraries are beside a copy of the Python files, and the normal build stays as it is.
# Python itself is not sanitized: the runtime has to be there before it, and before libstdc++.
sanitize: export UBSAN_OPTIONS = halt_on_error=1:print_stacktrace=1
sanitize: export ASAN_OPTIONS = detect_leaks=0
sanitize: $(STAMP).packages ## kernel tests and those of the ops under sanitizers: memory, undefined, threads
	@for kind in address,undefined thread; do build=build/$${kind%,*}; \
	$(VENV)/bin/cmake -S . -B $$build -G Ninja --log-level=NOTICE -DFASTDFA_SANITIZE=$$kind \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DPython_EXECUTABLE=$(abspath $(PY)) \
	  -DFASTDFA_CUDA=OFF && \
	$(VENV)/bin/cmake --build $$build && \
	$(VENV)/bin/ctest --test-dir $$build --output-on-failure || exit 1; done
	@rm -rf build/address/python && mkdir build/address/python && cp -r fastdfa build/address/python
	@rm -f build/address/python/fastdfa/*.so
	@$(VENV)/bin/cmake --install build/address --prefix build/address/python/fastdfa
	OMP_WAIT_POLICY=passive PYTHONPATH=build/address/python \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" \
	  $(PY) -m pytest -q -n 0 --capture=sys -o pythonpath="build/address/python tests" tests/ops $(ARGS)

bench: $(STAMP).built ## time and memory: of a step, its growth, kinds of networks; each kernel
	$(PY) -m benchmarks.speed.step $(ARGS)
	$(PY) -m benchmarks.speed.growth $(ARGS)
	$(PY) -m benchmarks.speed.kinds $(ARGS)
	$(PY) -m benchmarks.speed.recipe $(ARGS)
	$(PY) -m benchmarks.speed.memory $(ARGS)
	$(PY) -m benchmarks.speed.kernels $(ARGS)
	$(PY) -m benchmarks.speed.one_core $(ARGS)
	$(PY) -m benchmarks.speed.low_precision steps $(ARGS)
	$(PY) -m benchmarks.speed.low_precision float16 $(ARGS)

accuracy: $(STAMP).built ## seconds to an accuracy, by DFA and by backprop: ARGS="--data DIR"
	$(PY) -m benchmarks.accuracy.time_to_accuracy mnist $(ARGS)
	$(PY) -m benchmarks.accuracy.time_to_accuracy cifar10 $(ARGS)

paper: $(STAMP).built ## the experiments of arXiv 1906.04554, for hours; ARGS="--data DIR --quick"
	@$(PY) -m benchmarks.paper $(ARGS)

readme: $(STAMP).packages ## the figures of README.md and docs/, from benchmarks/results
	$(PY) -m benchmarks.harness.readme

lint: $(STAMP).packages ## formatters, linters, types and imports, at pinned versions; figures in docs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run --Werror $(KERNELS)
	$(PY) -m benchmarks.harness.readme --check

format: $(STAMP).packages ## put what lint asks for in place
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(KERNELS)

registers: $(STAMP).built ## what each CUDA kernel uses; an error where a hot one spills registers
	@$(BUILD)
	@$(PY) cmake/built.py registers build/cmake

.PHONY: gpu
gpu: ## on a machine with a CUDA GPU: build, test, sanitize, measure; ARGS="build test"
	@$(PYTHON) -m benchmarks.harness.gpu $(ARGS)

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
