# Two commands need nothing but Python, a C++ compiler and make:
#   make ask     answer a question about the shipped clip
#   make test    everything CI runs
# Both create the virtual environment VENV if it is not there and reuse it if it is.

PYTHON  ?= python3.11
VENV    ?= .venv
THREADS ?= 2

BIN    := $(VENV)/bin
# Without bytecode of files that are never imported.
PIP    := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check \
          -c constraints.txt
# Stamps live in the checkout, one per environment, so that a fresh clone installs itself into
# an environment that is already there. An editable install rebuilds only for these files:
STAMP  := build/stamps/$(subst /,_,$(abspath $(VENV)))
CSRC   := $(shell find csrc -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
INPUTS := pyproject.toml setup.py constraints.txt kernels/__init__.py \
          $(shell find csrc -type f -not -path 'csrc/tests/*' -not -path 'csrc/examples/*')

LINTED := vtts_rt kernels bench tests setup.py
STAGES := check test-python
NATIVE := test-sanitizers
LONG   := test-csrc fuzz test-slow

.PHONY: help setup setup-dev ask test test-long check format test-csrc test-sanitizers fuzz \
  test-python test-slow bench report clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   make/make/p' Makefile
	@echo "make test-long   the slow proofs, which CI leaves out"
	@echo "make check   lint, format check, types        make format  rewrite to the format"
	@echo "make fuzz    FUZZ_SECONDS=60 of the C interface, sanitized"
	@echo "make bench   measure on the CPU (hours), write tables"
	@echo "make clean   remove build products (not VENV)  VENV=DIR     another environment"

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: an installed torch that fits is kept, whatever its build (CPU or CUDA).
$(STAMP).base: $(VENV)/pyvenv.cfg $(INPUTS)
	$(PIP) torch
	$(PIP) "setuptools>=77" "pybind11>=2.13" "cmake>=3.26" "ninja>=1.11"
	$(PIP) --no-build-isolation -e .
	@mkdir -p $(@D) && touch $@

# torchvision, without its dependencies, is a peer that tests compare with; the package never
# imports it.
$(STAMP).dev: $(STAMP).base
	$(PIP) --no-build-isolation -e ".[test,lint,triton,dali]"
	$(PIP) --no-deps torchvision==0.28.0
	@mkdir -p $(@D) && touch $@

setup: $(STAMP).base
setup-dev: $(STAMP).dev

define ASK
import json, shlex, subprocess, sys
assets = "vtts_rt/assets/"
clip = json.load(open(assets + "clip.json"))
options = [word for text in clip["options"] for word in ("--option", text)]
command = [sys.argv[1], "ask", assets + "clip.mp4", clip["question"], *options]
print("$$", shlex.join(command), flush=True)
status = subprocess.run(command).returncode
print("the clip's label is", clip["answer"], file=sys.stderr)
sys.exit(status)
endef
export ASK

ask: $(STAMP).base
	@$(BIN)/python -c "$$ASK" $(BIN)/vtts-rt

# Every stage runs even if an earlier one failed, so that one run reports everything. Native stages run
# beside the others, which leave a core to them, and are reported at the end.
define RUN
for stage in $(1); do \
    echo "== $$stage"; began=$$(date +%s); \
    $(MAKE) --no-print-directory $$stage || failed="$$failed $$stage"; \
    echo "== $$stage: $$(($$(date +%s) - began)) s"; \
  done
endef

test:
	@began=$$(date +%s); $(MAKE) --no-print-directory setup-dev || exit 1; \
	echo "== setup: $$(($$(date +%s) - began)) s"; failed=; mkdir -p build; \
	( $(call RUN,$(NATIVE)); [ -z "$$failed" ] ) > build/native.log 2>&1 & native=$$!; \
	$(call RUN,$(STAGES)); \
	wait $$native || failed="$$failed $(NATIVE)"; cat build/native.log; \
	if [ -n "$$failed" ]; then echo "== failed:$$failed"; exit 1; fi

# What takes too long for every commit: run it before a release and after changes to what it proves.
test-long: $(STAMP).dev
	@failed=; $(call RUN,$(LONG)); \
	if [ -n "$$failed" ]; then echo "== failed:$$failed"; exit 1; fi

check: $(STAMP).dev
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(STAMP).dev
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(CSRC)

# The native code's tests: unsanitized from the objects that setup.py made.
define CTEST
	@mkdir -p $(1) && $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -S csrc -B $(1) $(2) > $(1)/log || { cat $(1)/log; exit 1; }; \
	$(BIN)/cmake --build $(1) --parallel $(THREADS) && \
	  $(BIN)/ctest --test-dir $(1) --output-on-failure $(3)
endef

test-csrc: $(STAMP).dev
	$(call CTEST,build/native,-DVTTS_PYTHON=OFF -DVTTS_TESTS=ON)

# The same tests, of the emulated kernels a part, under AddressSanitizer and UBSan, and 2 s of the
# fuzz target.
test-sanitizers: export VTTS_TEST_BRIEF = 1
test-sanitizers: $(STAMP).dev
	$(call CTEST,build/sanitizers,-DVTTS_SANITIZE=ON -DVTTS_FUZZ_SECONDS=2 -DVTTS_FUZZ_SEED=0)

# The fuzz target for FUZZ_SECONDS; a failure leaves its input in
# build/sanitizers/fuzz-last-input.
FUZZ_SECONDS ?= 60
fuzz: export VTTS_FUZZ_KEEP = 1
fuzz: $(STAMP).dev
	$(call CTEST,build/sanitizers,-DVTTS_SANITIZE=ON -DVTTS_FUZZ_SECONDS=$(FUZZ_SECONDS) \
	  -DVTTS_FUZZ_SEED=$(shell date +%s),-R fuzz --timeout 100000)

# The oldest Triton that is supported, to compile the kernels with beside the installed one.
build/triton-3.6/triton: $(STAMP).dev
	$(PIP) --no-deps --upgrade --target $(@D) "triton==3.6.*"

# A process a core and one thread in each: the models of tests are too small to share out.
PYTEST := OMP_NUM_THREADS=1 VTTS_RT_OTHER_TRITON=$(abspath build/triton-3.6) \
          $(BIN)/pytest -n $(THREADS) --dist loadfile -p no:benchmark

test-python: $(STAMP).dev
	$(PYTEST) -m "not slow"

test-slow: $(STAMP).dev build/triton-3.6/triton
	$(PYTEST) -m slow

# dashscope is a package that carries the ranks of Qwen's tokenizer; nothing of it is imported.
# decord and OpenCV are peers of the decoders; torchcodec joins where it loads.
bench: FILED := --result-dir bench/results
bench: $(STAMP).dev
	$(PIP) --no-deps dashscope decord opencv-python-headless
	$(BIN)/python bench/bench_patchify.py
	$(BIN)/python bench/bench_phases.py $(FILED)
	$(BIN)/python bench/bench_quantization.py
	$(BIN)/python bench/bench_tree_step.py $(FILED)
	$(BIN)/python bench/bench_errors.py $(FILED)
	$(BIN)/vtts-rt bench rounds $(FILED) --dtype float32,bfloat16
	$(BIN)/vtts-rt bench rounds $(FILED) --rounds 5 --strategy append
	$(BIN)/vtts-rt bench rounds $(FILED) --peer none --ablations --strategy append --repeats 3
	$(BIN)/vtts-rt bench serve $(FILED) --one-video 0
	$(BIN)/vtts-rt bench serve $(FILED) --max-concurrency none --strategy append,official
	$(BIN)/python bench/bench_soak.py $(FILED)
	$(BIN)/vtts-rt bench decode $(FILED)
	$(BIN)/python bench/bench_feed.py $(FILED)
	$(BIN)/python bench/bench_open.py
	$(BIN)/python bench/bench_agreement.py
	$(BIN)/python bench/bench_decode.py
	$(BIN)/python bench/bench_strategies.py
	$(BIN)/python bench/bench_needle.py
	$(BIN)/vtts-rt report

report: $(STAMP).base
	$(BIN)/vtts-rt report

clean:
	rm -rf build dist *.egg-info vtts_rt/_build_info.py .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find vtts_rt kernels bench tests -name __pycache__ -prune -exec rm -rf {} +
	rm -rf vtts_rt/*.so vtts_rt/include vtts_rt/lib vtts_rt/share
