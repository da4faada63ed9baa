# One command each, from a fresh clone with nothing but Python, gcc and make; `make help` lists them.
# The environment in .venv is made on demand and again whenever pyproject.toml or constraints.txt changes.

PYTHON ?= python3
ARGS ?=
BENCH ?= moe_vs_dense

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := train,docs,test
QUIET := --quiet --disable-pip-version-check
# Executes each Triton launch on the CPU: an access out of bounds, a race or a read of unwritten memory fails the test.
TEST_KERNELS := $(BIN)/python -m ttsem.sanitize pytest tests/kernels -m gpu

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-fast test-kernels lint format types docs bench constraints clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'ARGS="..." is passed on to the script or to pytest; PYTHON=python3.12 picks the interpreter of .venv.'

train: $(STAMP) ## train the example language model; ARGS="run.name=mine data.path=corpus/"
	$(BIN)/python examples/train_lm.py $(ARGS)

test: $(STAMP) ## all tests, the Triton kernels' on the CPU included; ARGS="-k balance"
	@mkdir -p build
	@# Side by side: the first waits for other processes half of the time.
	@$(TEST_KERNELS) > build/test-kernels.log 2>&1 & kernels=$$!; \
		$(BIN)/python -m pytest -n auto --dist worksteal --durations=15 $(ARGS); library=$$?; \
		wait $$kernels; kernels=$$?; cat build/test-kernels.log; exit $$((library | kernels))

test-fast: $(STAMP) ## the tests that take less than about ten seconds each
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

test-kernels: $(STAMP) ## the Triton kernels' tests, executed on the CPU
	$(TEST_KERNELS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP) ## ruff: put right what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP) ## mypy
	$(BIN)/mypy

docs: $(STAMP) ## build docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

bench: $(STAMP) ## run a benchmark; BENCH=moe_vs_dense ARGS="..."
	$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

clean: ## remove builds and caches; .venv and runs/ stay
	rm -rf build dist docs/_build .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# $(call install,venv,constraints). setuptools goes in first and builds without isolation, so that its pin holds for
# builds too. ttsem declares Python >= 3.12 but runs on 3.11 with the torch and Triton pinned here: hence its two flags.
define install
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip $(QUIET) install --upgrade -c $(2) setuptools
$(1)/bin/python -m pip $(QUIET) install -c $(2) --no-build-isolation -e '.[$(EXTRAS)]'
$(1)/bin/python -m pip $(QUIET) install -c $(2) --no-deps --ignore-requires-python ttsem
endef

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is too old, moe needs Python 3.11: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo 'Making the environment in $(VENV); the first time takes minutes ...'
	$(call install,$(VENV),constraints.txt)
	@touch $@

# Keeps the head of the file, which is written by hand, and asks for the newest of everything else.
constraints: ## renew the pins in constraints.txt; read the difference before you commit it
	rm -rf build/constraints && mkdir -p build/constraints
	sed '/^# ---/q' constraints.txt > build/constraints/head.txt
	$(call install,build/constraints/venv,build/constraints/head.txt)
	build/constraints/venv/bin/python -m pip freeze --all --exclude-editable --exclude pip \
		$$(sed -n 's/^\([a-z].*\)==.*/--exclude \1/p' build/constraints/head.txt) \
		| grep -v '^nvidia-\|^cuda-' > build/constraints/pins.txt
	cat build/constraints/head.txt build/constraints/pins.txt > constraints.txt
