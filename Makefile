# `make test` and `make demo` set everything up in .venv first; nothing else needs to be installed but Python 3.11 or newer.
PYTHON ?= python3
# What to install for torch, and where from. With TORCH_ARGS="--index-url <an index of CPU wheels>" the CUDA libraries,
# several gigabytes, stay out; by default pip looks where it is set to look.
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
# Options for pytest, e.g. make test TESTS="tests/unit -k spec", and how many processes run tests: a file goes to one of
# them whole, the long ones of tests/integration first. JOBS=0 runs everything in one process.
TESTS ?=
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input

.PHONY: help setup test check coverage docs demo lint format types hooks wheel up up-gpu observability down clean
.DELETE_ON_ERROR:

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24

setup: $(STAMP) ## Make .venv with everything in it

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (the first time takes some minutes)" >&2
	@$(PIP) install $(TORCH_ARGS) "$(TORCH)" numpy
	@$(PIP) install -e ".[dev]"
	@touch $(STAMP)

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

check: lint types ## What to run before every commit: lint, types and the unit tests that train nothing
	$(BIN)/python -m pytest --quiet --numprocesses $(JOBS) --dist loadfile -m "not slow" tests/unit $(TESTS)

coverage: $(STAMP) ## Branches of proto and client that unit and integration tests take
	$(BIN)/python -m pytest --quiet --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder \
		--cov --cov-report=term:skip-covered --cov-report=html:build/coverage \
		tests/unit tests/integration/client tests/integration/ecosystem $(TESTS)

demo: $(STAMP) ## Train a small network alone, nowcast and with Muon, and draw them
	@$(BIN)/nowcast demo

lint: $(STAMP) ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Put the code into its format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: $(STAMP) ## Check types, strictly
	$(BIN)/mypy

hooks: $(STAMP) ## Have git check style and types before each commit
	$(BIN)/pre-commit install

docs: $(STAMP) ## Build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

wheel: $(STAMP) ## Build the distribution into dist/
	$(BIN)/python -m build --wheel

# The newer `docker compose` where there is one, the older `docker-compose` else.
COMPOSE = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

up: ## Build and start the service in a container
	$(COMPOSE) up --build --detach

up-gpu: ## The same on a GPU
	$(COMPOSE) -f docker-compose.yml -f docker-compose.gpu.yml up --build --detach

observability: ## The service with Prometheus and Grafana beside it
	$(COMPOSE) --profile observability up --build --detach

down: ## Stop the containers
	$(COMPOSE) --profile observability --profile train down

clean: ## Remove what was built
	rm -rf .venv build dist
