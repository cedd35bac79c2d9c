# `make` lists the targets. PYTHON chooses the interpreter of the virtual environment: make setup PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
LOGS := .bam/logs

.DEFAULT_GOAL := help
.PHONY: help setup cluster-up cluster-down cluster-status demo test test-fast soak check ceph clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## make .venv with everything in it (minutes the first time, nothing the second)
	@:

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) --version 2>&1 | head -1`: name another with PYTHON=..."; exit 1; }
	@mkdir -p $(LOGS)
	@echo "installing into .venv (log: $(LOGS)/setup.log)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv > $(LOGS)/setup.log 2>&1 || \
		{ tail -5 $(LOGS)/setup.log; echo "error: no virtual environment could be made (Debian: apt install python3-venv)"; exit 1; }
	@$(BIN)/pip install --disable-pip-version-check -e '.[dev]' > $(LOGS)/setup.log 2>&1 || \
		{ tail -15 $(LOGS)/setup.log; echo "error: pip failed, the whole log is $(LOGS)/setup.log"; exit 1; }
	@touch $@

cluster-up: setup ## start the local cluster: an S3 server, a Ray head, three worker nodes
	@$(BIN)/python -m cluster.local up

cluster-down: setup ## stop it; its data stays in .bam/s3
	@$(BIN)/python -m cluster.local down

cluster-status: setup ## show its processes
	@$(BIN)/python -m cluster.local status

demo: cluster-up ## branch, upcycle and mix a small model on the local cluster (minutes on two cores)
	@. .bam/env && $(BIN)/bam run recipes/demo.yaml

test: setup ## all tests, those with Ray clusters and servers too
	@$(BIN)/pytest -n auto -m 'not slow'
	@$(BIN)/pytest -m slow

test-fast: setup ## the tests that need no server and no cluster
	@$(BIN)/pytest -n auto -m 'not slow'

soak: setup ## faults at random over a local cluster for ten minutes (BAM_SOAK_SECONDS, BAM_SOAK_SEED)
	@$(BIN)/python -m tests.support.faults.soak

check: setup ## format, lint, types, directions of imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy -p bam_ray -p cluster
	@$(BIN)/lint-imports

ceph: ## install a Ceph S3 gateway for the tests to use as well (Debian or Ubuntu, as root)
	@mkdir -p $(LOGS)
	@{ apt-get -qq update && apt-get -qq install -y --no-install-recommends radosgw ceph-mon ceph-osd; } > $(LOGS)/ceph.log 2>&1 || \
		{ tail -5 $(LOGS)/ceph.log; echo "error: apt-get failed, the whole log is $(LOGS)/ceph.log"; exit 1; }
	@ceph-mon --version

clean: ## remove caches and build products; .venv, .bam/s3 and a running cluster stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .bam/cache
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
