# Every target does its own set-up. Needs Python 3.11 or newer with venv, g++, git and make; `make test` also needs
# Debian's prometheus and doctest-dev, which it installs where it may (root), or names.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE_BUILD := build/native-tests
TORCH ?= torch==2.13.0
NATIVE_SOURCES := $(shell find native -name '*.cc' -o -name '*.h' -o -name '*.inc' -o -name 'CMakeLists.txt' -o -name '*.cmake')
PROTO_SOURCES := $(wildcard proto/kt_expert_proto/v1/*.proto)
DEMO_FLAGS ?=
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Bochs and a kernel, built once from Debian's packages and named after what went in.
EMULATOR_CACHE ?= build/emulator

.PHONY: setup demo test check format native-test mca sanitize hostile-inputs fuzz emulated simulate soak neighbours python-test versions bench clean system-packages

setup: $(STAMP)

# A CPU build of torch comes first: left to the dependencies, pip would fetch gigabytes of CUDA libraries.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" || $(BIN)/python -m pip install --quiet torch
	touch $@

$(STAMP): pyproject.toml $(NATIVE_SOURCES) $(PROTO_SOURCES) | $(VENV)/.torch
	$(BIN)/python deploy/requirements.py build dev > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: $(STAMP)
	$(BIN)/python deploy/demo/run.py $(DEMO_FLAGS)

test: check native-test mca sanitize hostile-inputs emulated simulate soak python-test versions
	$(MAKE) demo DEMO_FLAGS="--out build/demo-small --base-steps 40 --steps 6"

check: $(STAMP)
	ruff format --check .
	ruff check .
	clang-format --dry-run --Werror $$(git ls-files 'native/*.cc' 'native/*.h')
	mypy

format: $(STAMP)
	ruff format .
	ruff check --fix .
	clang-format -i $$(git ls-files 'native/*.cc' 'native/*.h')

system-packages:
	sh .ci/system-packages

native-test: $(STAMP) system-packages
	cmake -S native -B $(NATIVE_BUILD) -G Ninja -DKT_EXPERT_BUILD_MODULE=OFF -DKT_EXPERT_BUILD_TESTS=ON > /dev/null
	cmake --build $(NATIVE_BUILD)
	ctest --test-dir $(NATIVE_BUILD) --output-on-failure --no-tests=error

# Inner loops beside their bounds: llvm-mca for vectors, an account of the instructions for tiles.
mca: native-test
	PYTHONPATH=native $(BIN)/python -m analysis $(NATIVE_BUILD)

# Memory errors and undefined behaviour, then data races. The long comparisons of values use threads as the others do: a third of
# the time of the second run, for nothing that it looks for.
LONG_COMPARISONS := every weight format meets*,nor do they where there are several*
sanitize: $(STAMP) system-packages
	for kinds in address,undefined thread; do \
	  cmake -S native -B build/native-$$kinds -G Ninja -DKT_EXPERT_BUILD_MODULE=OFF -DKT_EXPERT_BUILD_TESTS=ON \
	    -DKT_EXPERT_SANITIZE=$$kinds > /dev/null && cmake --build build/native-$$kinds && \
	  exclude=; [ $$kinds = thread ] && exclude="--test-case-exclude=$(LONG_COMPARISONS)"; \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 build/native-$$kinds/tests/kt_expert_native_tests $${exclude:+"$$exclude"} \
	    || exit 1; \
	done

# INPUTS hostile inputs to what parses bytes and computes with them, as a checkpoint and a trainer could send them, under the
# sanitizers: half from one seed, half from another.
INPUTS ?= 500000
HOSTILE_INPUTS := build/native-address,undefined/tests/kt_expert_hostile_inputs
hostile-inputs: sanitize
	export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1; half=$$(($(INPUTS) / 2)); \
	$(HOSTILE_INPUTS) $$half 1 & first=$$!; $(HOSTILE_INPUTS) $$half 2 && wait $$first

# Coverage-guided fuzzing of what parses bytes, for FUZZ_SECONDS; needs Debian's clang-19.
FUZZ_SECONDS ?= 60
fuzz: $(STAMP)
	cmake -S native -B build/native-fuzz -G Ninja -DCMAKE_CXX_COMPILER=clang++-19 -DKT_EXPERT_BUILD_MODULE=OFF \
	  -DKT_EXPERT_BUILD_FUZZER=ON -DKT_EXPERT_SANITIZE=address,undefined > /dev/null
	cmake --build build/native-fuzz
	mkdir -p build/fuzz-corpus
	build/native-fuzz/kt_expert_weights_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=4096 build/fuzz-corpus

# The same binary on this CPU and, for instruction sets it lacks, on an emulated one.
emulated: native-test
	PYTHONPATH=tests $(BIN)/python -m emulated $(NATIVE_BUILD)/tests/kt_expert_native_tests $(EMULATOR_CACHE)

# Trainers and server under SEEDS random schedules of faults, in virtual time, from seed FIRST on; and faults planted into the
# product that must be found. A seed that fails prints how to play it again.
SEEDS ?= 12000
FIRST ?= 1
simulate: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m simulation $(SEEDS) $(FIRST)

# Trainers that cancel and vanish, for MINUTES; the server's memory, descriptors and threads must not grow.
MINUTES ?= 3
soak: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m soak $(MINUTES)

# A trainer's throughput beside hostile and stalled clients, and how soon a busy server answers.
neighbours: $(STAMP)
	mkdir -p build
	PYTHONPATH=tests $(BIN)/python -m neighbours build/neighbours.json
	cat build/neighbours.json

python-test: $(STAMP) system-packages
	$(BIN)/python -m pytest

# What trainers do, with older transformers and PEFT.
versions: $(STAMP)
	sh .ci/versions.sh "$(TORCH)"

bench: $(STAMP)
	kt-expert bench kernels --json build/bench.json

clean:
	rm -rf build
