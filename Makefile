# make install | demo | test | test-all | faults | bench | lint | docs | sanitize | package-test | clean
#   QUICK=1      a demo of under two minutes, without the claim about learning
#   ARGS="..."   passed on, as in: make test ARGS="-k knn"; make bench ARGS="--only knn*"
#   PYTHON=...   makes .venv (3.11 or newer)
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt .ci/install $(shell find csrc -type f)

.PHONY: install demo test test-all faults bench lint docs sanitize package-test clean
install: $(INSTALLED)

$(INSTALLED): $(SOURCES)
	PYTHON=$(PYTHON) .ci/install .venv
	@touch $@

demo: install
	$(BIN)/apv-fast demo $(if $(QUICK),--quick) $(ARGS)

# A process a core; those that are done take over from others.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# Every test but those marked thorough or slow: each op on each backend that can run here (Triton's kernels interpreted
# and CUDA's emulated, at the sizes that show most), the agent, data, environments, runs, commands and the benchmarks.
test: install
	$(PYTEST) $(ARGS)

# What `make test` leaves out for its time (marked thorough: most dtypes and sizes in Triton's interpreter, compilation
# for GPUs, whole updates there, more ways to crash), then the tests of the ops under other instruction sets and random
# numbers (python -m tests.matrix). Not what is marked slow: many minutes, or the network.
test-all: install
	$(PYTEST) --dist loadfile -m "thorough and not slow" $(ARGS)
	$(BIN)/python -m tests.matrix -- -n auto --maxprocesses 8 --dist worksteal $(ARGS)

# Plants faults one at a time and shows which test notices each; ARGS="--cpp" also those that rebuild the C++ extension.
faults: install
	$(BIN)/python -m tests.faults $(ARGS)

bench: install
	$(BIN)/python -m bench $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into build/site; its search wants a server: python -m http.server -d build/site. A warning is an error.
DOCS_INSTALLED := .venv/docs-installed
docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

$(DOCS_INSTALLED): $(INSTALLED) .ci/install-docs
	.ci/install-docs .venv
	@touch $@

# The C++ code on the CPU in AddressSanitizer and UBSan: the tests of its ops, on every instruction set.
sanitize: install
	@command -v cmake > /dev/null || $(BIN)/python -m pip install -q -c constraints.txt cmake
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.sanitize $(ARGS)

# Builds the sdist and wheels and installs them in clean environments: minutes, and the network.
package-test: install
	$(BIN)/python -m pytest -m slow tests/test_packaging.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info apv_fast/*.so .pytest_cache .mypy_cache .ruff_cache
