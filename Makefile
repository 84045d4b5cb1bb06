# The manual of this checkout: `make help`. Works from anywhere with `make -C <checkout>`.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# The interpreter that the environment is made with.
PYTHON ?= python3

# Without bytecode every start parses torch anew: 23 s instead of 9 s for the imports of one step.
unexport PYTHONDONTWRITEBYTECODE
# The lock says what is installed, the machine says which Python: uv shall not fetch another one.
export UV_PYTHON_DOWNLOADS := never
# A mirror set up for pip serves uv as well.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

# Tests stay off the network; two at a time want one core each.
TEST := HF_HUB_OFFLINE=1 $(PY) -m pytest
TEST_WORKERS ?= 2
PARALLEL := OMP_NUM_THREADS=1
CHECKED := $(wildcard latentac components pipelines tests)
LOCK := compile -q --universal --fork-strategy fewest --generate-hashes --python-version 3.11 \
	--no-emit-index-url --no-emit-find-links --no-header

.PHONY: help install run serve test test-fast lint format compile minio lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 } /^#:/ { print "      " substr($$0, 4) }' Makefile

install: $(STAMP) ## make .venv from the lock (every other target does so by itself)

$(STAMP): requirements/dev.lock requirements/runtime.in requirements/installer.lock pyproject.toml
	@bash requirements/install.sh $(VENV) '$(PYTHON)'
	touch $@

run: install ## the whole pipeline: train, evaluate, steer, gate, serve
#: RECIPE=shapes-unet SEED=0 SET="train.num_iterations=8 ..." CONFIG=file.yaml OUTPUT=runs STORE=file://... RESUME=<run>
	@LATENTAC_OWNERS=$$PPID $(PY) -m pipelines run \
		$(if $(RECIPE),--recipe '$(RECIPE)') $(if $(SEED),--seed '$(SEED)') $(if $(CONFIG),--config '$(CONFIG)') \
		$(foreach assignment,$(SET),--set '$(assignment)') \
		$(if $(OUTPUT),--output '$(OUTPUT)') $(if $(STORE),--store '$(STORE)') $(if $(RESUME),--resume '$(RESUME)')

serve: install ## serve what a run deployed, until Ctrl-C; without RUN the newest
#: RUN=<run> PORT=8080 OUTPUT=runs STORE=file://...
	@run='$(RUN)'
	[[ -n $$run ]] || run=$$(ls -t $(or $(OUTPUT),runs)/*/summary.json 2>/dev/null | head -n 1 | xargs -r dirname | xargs -r basename || true)
	[[ -n $$run ]] || { echo "make serve: no finished run in $(or $(OUTPUT),runs)/. Do 'make run' first, or name one: make serve RUN=<run>" >&2; exit 2; }
	$(VENV)/bin/latentac serve --run "$$run" $(if $(PORT),--port '$(PORT)') \
		$(if $(OUTPUT),--output '$(OUTPUT)') $(if $(STORE),--store '$(STORE)')

test: install minio ## every test (at most 15 minutes on two cores)
#: TEST_WORKERS=2 ARGS="-k ratio"
	@status=0
	$(PARALLEL) $(TEST) -m "not slow and not cluster" -n $(TEST_WORKERS) $(ARGS) || status=$$?
	$(TEST) -m "slow and not cluster" $(ARGS) || status=$$?
	exit $$status

test-fast: install ## the fast tier (at most 3 minutes)
	@$(PARALLEL) $(TEST) -m "not slow and not cluster" -n $(TEST_WORKERS) $(ARGS)

lint: install ## ruff, mypy, and the house's own rules: floors, sizes, addresses, documentation
	@status=0
	$(VENV)/bin/ruff check . || status=$$?
	$(VENV)/bin/ruff format --check . || status=$$?
	$(VENV)/bin/mypy $(CHECKED) || status=$$?
	$(TEST) -q --durations=0 --durations-min=5 tests/test_house.py || status=$$?
	exit $$status

format: install ## sort imports, fix what can be fixed, format
	@$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

compile: install ## write the pipeline's golden YAML anew, and say what changed
	@$(PY) -m pipelines compile
	git --no-pager diff --stat -- pipelines

minio: install ## a MinIO server for the tests: MINIO_BIN, or the one on PATH, or built once into the cache
	@$(PY) -m tests.minio build

lock: install ## resolve requirements/*.in anew; versions move only where a pin in them moved
#: UPGRADE=1 lets everything that is not pinned there move
	@uv=$$(bash requirements/install.sh --uv '$(PYTHON)')
	$$uv pip $(LOCK) $(if $(UPGRADE),--upgrade) requirements/dev.in -o requirements/dev.lock
	$$uv pip $(LOCK) $(if $(UPGRADE),--upgrade) requirements/installer.in -o requirements/installer.lock

clean: ## remove the environment and all caches; runs/ stays
	@rm -rf $(VENV) .installer build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find latentac components pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
