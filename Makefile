# On a new machine, run for example `make demo` or `make test`. Each target except help and
# clean first sets up the virtual environment .venv, unless it is up to date.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak lint docs bench help clean

help:  ## Print this list of targets
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/ready  ## Make photographs, build a store and train AlexNet; takes a few minutes
	@$(BIN)/python -m tools.demo

test: .venv/ready  ## Run the tests in three processes; warnings are errors
	@$(BIN)/python -m pytest -n 3

soak: .venv/ready  ## Run the long tests, which kill hundreds of processes; takes about half an hour
	@$(BIN)/python -m pytest -m soak

lint: .venv/ready  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready  ## Build the documentation site in site/; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@$(BIN)/python -m tools.docs.check_site site

bench: .venv/ready  ## Measure the build, the stream, the training step and replicas, and compare with other programs
	$(BIN)/python -m tools.bench.build --rounds 3
	$(BIN)/python -m tools.bench.stream
	$(BIN)/python -m tools.bench.train
	$(BIN)/python -m tools.bench.replicas

clean:  ## Remove the folders .venv, demo and site
	rm -rf .venv demo site

.venv/ready: pyproject.toml constraints.txt $(wildcard */*/kernels.c */*/*.h) tools/compile_native.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed; this is " + sys.version.split()[0] + ". Name a later Python: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cuda13,figures,dev,docs]'
	@touch $@
