# make demo | test | bench | lint | clean, on a fresh machine: each makes .venv first when there is none, and again
# installs what pyproject.toml or the constraints say whenever one of them changed.
#
#   CONSTRAINTS=        on a GPU machine: let pip choose a torch with CUDA and the Triton that belongs to it
#   VENV=elsewhere      another place for the environment
#   PYTHON=python3.12   another Python to build it with
#   ARGS="-k dropout"   more arguments for pytest (test), the demo or fastpeft bench (bench: ARGS=--quick)

VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
OLD_TRITON := 3.6.0
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
INPUTS := pyproject.toml $(CONSTRAINTS)

# The first of these that runs and is new enough: a name on PATH may be a shim with nothing behind it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: demo test bench lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.bench
	@$(BIN)/fastpeft demo $(ARGS)

# Two processes, one thread each: the kernels' interpreter and the tiny models gain nothing from more.
test: $(VENV)/.test $(VENV)/triton-3.6
	@echo "==> tests"
	@OMP_NUM_THREADS=1 FASTPEFT_TRITON_36=$(abspath $(VENV)/triton-3.6) \
	  $(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 $(ARGS)

bench: $(VENV)/.bench
	@$(BIN)/fastpeft bench --output bench-out $(ARGS)

lint: $(VENV)/.test
	@echo "==> ruff, mypy"
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet --diff . && $(BIN)/mypy

clean:
	rm -rf $(VENV) build demo-out bench-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "==> environment in $(VENV), from $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make an environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# What the demo and the benches need: plots, and reference PEFT to compare with.
$(VENV)/.bench: $(INPUTS) | $(BIN)/python
	@echo "==> installing fastpeft (a minute or two)"
	@$(PIP_INSTALL) -e '.[bench]'
	@touch $@

$(VENV)/.test: $(INPUTS) | $(BIN)/python
	@echo "==> installing fastpeft with what its tests need (a minute or two)"
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.bench

# The Triton of the GPU machines we aim at; kept aside, for the compile tests alone.
$(VENV)/triton-3.6: | $(BIN)/python
	@echo "==> Triton $(OLD_TRITON), aside, for the compile tests"
	@rm -rf $@.part
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $@.part triton==$(OLD_TRITON)
	@mv $@.part $@
