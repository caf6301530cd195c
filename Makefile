# Two commands matter on a fresh machine: `make demo` and `make test`. Each sets up what it needs.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak lint docs bench help clean

help:  ## Say what can be made
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/ready  ## Photographs in, a trained AlexNet out, in a few minutes
	@$(BIN)/python -m tools.demo

test: .venv/ready  ## Every test, in two processes, with warnings as errors
	@$(BIN)/python -m pytest -n 2 --dist worksteal

soak: .venv/ready  ## The long tests: hundreds of kills, ten minutes
	@$(BIN)/python -m pytest -m soak

lint: .venv/ready  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready  ## The documentation site, in site/; any warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@$(BIN)/python -m tools.docs.check_site site

bench: .venv/ready  ## Build, stream and training step beside their peers and bounds
	$(BIN)/python -m tools.bench.build --rounds 3
	$(BIN)/python -m tools.bench.stream
	$(BIN)/python -m tools.bench.train

clean:  ## Remove the environment, the demo and the site
	rm -rf .venv demo site

.venv/ready: pyproject.toml constraints.txt $(wildcard */*/kernels.c) tools/compile_native.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed; this is " + sys.version.split()[0] + ". Name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cuda13,figures,dev,docs]'
	@touch $@
