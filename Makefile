# Everything a checkout can do. `make demo` and `make test` need only python3, make and (for the extension) a C++ compiler:
# they create .venv, install what requirements-dev.txt names, build the package, and then run.
#
#   ARGS   passed on to pytest or to the bench command: make test ARGS="-k scale"
#   JOBS   test processes at once, one thread each (default 2)
#   EXAMPLES, SEED   of make fuzz: how many, and which; without SEED others each time

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
JOBS ?= 2
EXAMPLES ?= 50000
ARGS ?=

CSRC := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
TORCH := $(VENV)/.torch.stamp
REQUIREMENTS := $(VENV)/.requirements.stamp
BUILD := $(VENV)/.build.stamp

# The extension needs torch alone, and compiles while the rest of the requirements are installed. Not with several goals:
# `make clean test` must keep its order.
ifneq ($(words $(MAKECMDGOALS)),0)
ifeq ($(words $(MAKECMDGOALS)),1)
MAKEFLAGS += --jobs=2
endif
endif

.DEFAULT_GOAL := help
.PHONY: help demo demo-full test test-all fuzz mutants sanitize audit check bench qualify gen format clean FORCE

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(BUILD) $(REQUIREMENTS) ## speed and proof on real models, within minutes; writes demo-results/
	$(PY) -m bench.demo $(ARGS)

demo-full: $(BUILD) $(REQUIREMENTS) ## the demo with every torch.compile column
	$(PY) -m bench.demo --full $(ARGS)

test: $(BUILD) $(REQUIREMENTS) ## the tests (ARGS="-k name" for some of them)
	@$(call run_tests,-m "not slow")

test-all: $(BUILD) $(REQUIREMENTS) ## the tests and the slow ones: everything that exists
	@$(call run_tests,)

fuzz: $(BUILD) $(REQUIREMENTS) ## random calls against float64, others each time (EXAMPLES=50000, SEED=7 for those of one seed)
	@failed=; \
	$(FUZZ) $(PYTEST) tests/test_fuzz.py $(SEEDED) $(ARGS) || failed=yes; \
	$(FUZZ) TRITON_INTERPRET=1 $(PYTEST) tests/interpret/test_fuzz.py $(SEEDED) $(ARGS) || failed=yes; \
	[ -z "$$failed" ]

audit: $(REQUIREMENTS) ## known vulnerabilities of what requirements-dev.txt names (asks a server)
	@$(PY) -m pip install -qq pip-audit
	$(BIN)/pip-audit --requirement requirements-dev.txt

mutants: $(TORCH) ## CUDA kernels without each of their barriers and shuffles in turn: the emulation must notice
	$(PY) tests/cuda_emu/mutants.py

sanitize: $(TORCH) ## the emulated CUDA kernels under AddressSanitizer and UBSan
	$(PY) tests/cuda_emu/mutants.py sanitize

check: $(REQUIREMENTS) ## lint, format, types, generated files
	@failed=; \
	run() { echo "$$*"; "$$@" || failed="$$failed '$$1'"; }; \
	run $(BIN)/ruff check .; \
	run $(BIN)/ruff format --check .; \
	run $(BIN)/mypy; \
	run $(BIN)/clang-format --dry-run -Werror $(HAND_WRITTEN_CSRC); \
	run $(PY) -m fused_attn._codegen --check; \
	if [ -n "$$failed" ]; then echo "make check: failed:$$failed"; exit 1; fi

bench: $(BUILD) $(REQUIREMENTS) ## time every op against eager, Inductor and x.clone() (python -m bench --help: all there is)
	$(PY) -m bench ops $(ARGS)

qualify: $(BUILD) $(REQUIREMENTS) ## correctness and speed on this machine's GPU, as JSON in bench/results
	$(PY) -m bench qualify --out bench/results $(ARGS)

gen: $(REQUIREMENTS) ## write csrc/ops.gen.h again from the op schemas
	$(PY) -m fused_attn._codegen

format: $(REQUIREMENTS) ## put Python and C++ files into the form that check wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(HAND_WRITTEN_CSRC)

clean: ## remove what was built and cached; .venv and results stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(BUILD)
	rm -f fused_attn/_C*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Not for clang-format: `_codegen --check` compares a generated file exactly.
HAND_WRITTEN_CSRC := $(filter-out %.gen.h,$(CSRC)) $(wildcard tests/cuda_emu/*.cpp tests/cuda_emu/*.h)

# Two processes, because TRITON_INTERPRET must be set before a kernel is defined. Both run even if the first fails. A selection
# (ARGS="-k name") may well leave one of them without tests (pytest's status 5), but not both.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal -p no:benchmark
FUZZ := FUSED_ATTN_FUZZ=$(EXAMPLES)
SEEDED := $(if $(SEED),--hypothesis-seed=$(SEED))
define run_tests
native=0; $(PYTEST) tests --ignore=tests/interpret $(1) $(ARGS) || native=$$?; \
interpreted=0; TRITON_INTERPRET=1 $(PYTEST) tests/interpret $(1) $(ARGS) || interpreted=$$?; \
case "$$native $$interpreted" in "0 0"|"0 5"|"5 0") ;; *) exit 1 ;; esac
endef

# Stamps: what they depend on changed since the last install. A .venv made by hand has none, and gets them quickly.
$(TORCH): requirements-dev.txt pyproject.toml
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch into $(VENV)"
	@$(PY) -m pip install -qq --no-compile --constraint requirements-dev.txt torch ninja packaging setuptools wheel
	@touch $@

$(REQUIREMENTS): $(TORCH)
	@echo "installing requirements-dev.txt into $(VENV) (minutes, the first time)"
	@$(PY) -m pip install -qq --no-compile --requirement requirements-dev.txt
	@touch $@

# The log is where pip writes what setup.py prints: the one line saying what was and wasn't built. Without MAKEFLAGS, in
# which ninja would find the two jobs above and compile one file at a time.
$(BUILD): $(TORCH) setup.py $(CSRC) $(if $(wildcard fused_attn/_C*.so),,FORCE)
	@echo "building fused_attn into $(VENV)"
	@: > $(VENV)/.build.log
	@MAKEFLAGS= PATH="$(abspath $(BIN)):$$PATH" $(PY) -m pip install --quiet --log $(VENV)/.build.log --no-deps --no-build-isolation --editable .
	@sed -nE 's/.*(fused_attn: (built|installed) .*)/\1/p' $(VENV)/.build.log
	@touch $@
