# `make` lists the targets. PYTHON chooses the interpreter of the virtual environment: make setup PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
LOGS := .bam/logs
LOCKS := requirements/torch.txt requirements/development.txt

# Installed by torch's CUDA wheels alone, so they are left out of the lock files (requirements/README.md)
WITH_TORCH := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
	nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
	nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
COMPILE := uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --constraint requirements/torch.txt $(WITH_TORCH:%=--no-emit-package %)

.DEFAULT_GOAL := help
.PHONY: help setup lock cluster-up cluster-down cluster-status demo test test-fast soak bench check format docs ceph browser clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## create .venv from the lock files (minutes the first time, nothing the second)
	@:

.venv/.installed: pyproject.toml $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) --version 2>&1 | head -1`: name another with PYTHON=..."; exit 1; }
	@mkdir -p $(LOGS)
	@echo "installing into .venv (log: $(LOGS)/setup.log)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv > $(LOGS)/setup.log 2>&1 || \
		{ tail -5 $(LOGS)/setup.log; echo "error: the virtual environment could not be created (Debian: apt install python3-venv)"; exit 1; }
	@{ $(BIN)/pip install --no-deps --require-hashes -r requirements/development.txt && \
		$(BIN)/pip install -r requirements/torch.txt && \
		$(BIN)/pip install --no-deps --no-build-isolation -e .; } > $(LOGS)/setup.log 2>&1 || \
		{ tail -15 $(LOGS)/setup.log; echo "error: pip failed, the whole log is $(LOGS)/setup.log"; exit 1; }
	@touch $@

lock: setup ## write the lock files from pyproject.toml (newest releases: make lock UPGRADE=--upgrade)
	@$(BIN)/$(COMPILE) $(UPGRADE) --extra dev --output-file requirements/development.txt
	@$(BIN)/$(COMPILE) --no-annotate --extra demo --extra moin --extra structured --constraint requirements/development.txt \
		--output-file requirements/image.txt

cluster-up: setup ## start the local cluster: an S3 server, a Ray head, three worker nodes
	@$(BIN)/python -m cluster.local up

cluster-down: setup ## stop the local cluster; its data stays in .bam/s3
	@$(BIN)/python -m cluster.local down

cluster-status: setup ## show the processes of the local cluster
	@$(BIN)/python -m cluster.local status

demo: cluster-up ## branch, upcycle and mix a small model on the local cluster (about 20 minutes on two cores)
	@. .bam/env && $(BIN)/bam run recipes/demo.yaml

test: setup ## run all tests, including those that start Ray clusters and servers
	@$(BIN)/pytest -n auto -m 'not slow'
	@$(BIN)/pytest -m slow

test-fast: setup ## run the tests that need no server and no cluster
	@$(BIN)/pytest -n auto -m 'not slow'

soak: setup ## inject random faults into a local cluster for ten minutes (BAM_SOAK_SECONDS, BAM_SOAK_SEED)
	@$(BIN)/python -m tests.support.faults.soak

bench: setup ## list the benchmarks, or run one: make bench NAME=controller_step ARGS=--help
ifdef NAME
	@$(BIN)/python -m benchmarks.$(NAME) $(ARGS)
else
	@for file in benchmarks/*.py; do case $$file in */__init__.py|*/measure.py|*/peers.py|*/gpu_*.py|*/host_memory_rank.py) ;; *) \
		printf "  make bench NAME=%-20s %s\n" "`basename $$file .py`" "`sed -n '1s/^\"*\([^\"]*\).*/\1/p' $$file`";; esac; done
endif

check: setup ## check format, lint, spelling, types and the directions of imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/codespell
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## format the code and apply the safe fixes of the linter
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

docs: setup ## build the documentation site into .bam/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "written: .bam/site/index.html"

ceph: ## install a Ceph S3 gateway for the tests to use as well (Debian or Ubuntu, as root)
	@mkdir -p $(LOGS)
	@{ apt-get -qq update && apt-get -qq install -y --no-install-recommends radosgw ceph-mon ceph-osd; } > $(LOGS)/ceph.log 2>&1 || \
		{ tail -5 $(LOGS)/ceph.log; echo "error: apt-get failed, the whole log is $(LOGS)/ceph.log"; exit 1; }
	@ceph-mon --version

browser: ## install Chromium for the tests of the page (Debian, as root)
	@mkdir -p $(LOGS)
	@{ apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } > $(LOGS)/browser.log 2>&1 || \
		{ tail -5 $(LOGS)/browser.log; echo "error: apt-get failed, the whole log is $(LOGS)/browser.log"; exit 1; }
	@chromium --version

clean: ## remove caches and build products, but not .venv, .bam/s3 or a running cluster
	@rm -rf build dist .bam/site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .bam/cache
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
