# `make` explains itself. Everything here is safe to run twice.

SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin

# Without its cache of compiled files every run of pytest and of the command compiles all modules again.
unexport PYTHONDONTWRITEBYTECODE

# Tests that need no server and little time. Their databases are small enough for memory.
QUICK := -m "not server and not slow" --numprocesses=logical --dist=loadgroup --no-header -q
QUICK_TMPDIR := $(firstword $(wildcard /dev/shm) $(TMPDIR) /tmp)

# All tests, on more processes than there are cores: many of them wait for a clock or a disk.
ALL := --numprocesses=auto --dist=loadgroup

##@ Try it
.PHONY: demo
demo: ## The whole thing on this machine: a mail server, sample mailboxes, an archive. ARGS="--help" for more
	@tools/setup runtime
	@$(BIN)/archiver demo $(ARGS)

##@ Work on it
.PHONY: setup
setup: ## Make .venv what requirements.lock says. PYTHON=python3.12 chooses the interpreter
	@tools/setup

.PHONY: quick quick-tests
quick: setup ## In under a minute: style, types, layers, and the tests that need no server
	@$(MAKE) --jobs=2 --keep-going quick-tests lint-code lint-format lint-imports lint-prose lint-types

quick-tests: setup
	@TMPDIR=$(QUICK_TMPDIR) $(BIN)/python -m pytest $(QUICK)

.PHONY: test
test: setup ## Run the tests against real servers, where there are any. ARGS="tests/unit -k listing" for fewer
	@tools/servers
	@$(BIN)/python -m pytest $(or $(ARGS),$(ALL)) $(REPORT)

.PHONY: bench
bench: setup ## Measure beside mpop, getmail6, fetchmail, s5cmd into docs/performance. WHAT="a e" for some rows
	@tests/bench/install
	@$(BIN)/python -m tests.bench $(if $(QUICK),--quick) $(WHAT)

.PHONY: lint lint-code lint-format lint-types lint-imports lint-chart lint-prose
lint: lint-code lint-format lint-types lint-imports lint-chart lint-prose ## Everything a machine can judge: style, types, layers, the chart, the English

lint-code: setup
	@$(BIN)/ruff check

lint-format: setup
	@$(BIN)/ruff format --check

lint-types: setup
	@$(BIN)/mypy && $(BIN)/mypy tools/prose.py

lint-imports: setup
	@$(BIN)/lint-imports

lint-chart: setup
	@helm=$$($(BIN)/python -m tests.harness.helm) && for values in helm/archiver/ci/*-values.yaml; do \
	     "$$helm" lint --strict --quiet --values "$$values" helm/archiver || exit; done

lint-prose: setup
	@$(BIN)/python tools/prose.py

.PHONY: format
format: setup ## Let ruff lay out the code and fix what it can
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

##@ Look after it
.PHONY: lock
lock: ## Pin what pyproject.toml asks for. UPGRADE=1 moves every pin to its newest version
	@tools/lock

.PHONY: clean
clean: ## Remove what make made, .venv too. An archive that you made (./archive) stays
	@rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find archiver alembic tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help:
	@echo "archiver: every message of many POP3 mailboxes, byte for byte, in a bucket, and proof of it."
	@awk 'BEGIN { FS = ":.*## " } \
	     /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	     /^[a-z-]+:.*## / { printf "  make %-6s  %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "New here? make demo, then README.md. Then docs/ for how it works and make test for proof."
