# The manual of this checkout: `make help`. Works from anywhere with `make -C <checkout>`.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DOCS := build/docs-venv
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

# Tests stay off the network. Three at a time on two cores: many of them wait for processes and servers that they start.
TEST := HF_HUB_OFFLINE=1 $(PY) -m pytest
TEST_WORKERS ?= 3
PARALLEL := OMP_NUM_THREADS=1
CHECKED := $(wildcard latentac images helm benchmarks tools docs tests)
LOCK := compile -q --universal --fork-strategy fewest --generate-hashes --python-version 3.11 \
	--no-emit-index-url --no-emit-find-links --no-header
# Those of the environment; requirements/optimizers.in says why not `optimizers`.
EXTRAS := all nsfw

# `--name value` where VARIABLE says something. Make hands what it was called with to the shell as environment, so the
# value comes whole, with its spaces and quotes; SET is taken apart by latentac.config.fields.split.
option = $(if $($(1)),--$(2) "$$$(1)")
PLACE_OPTIONS = $(call option,OUTPUT,output) $(call option,STORE,store)
RUN_OPTIONS = $(call option,RECIPE,recipe) $(call option,SEED,seed) $(call option,CONFIG,config) $(call option,SET,set) \
	$(call option,PROJECT,project) $(call option,PACKAGE,package) $(PLACE_OPTIONS) $(call option,RESUME,resume)
EVIDENCE_OPTIONS = $(call option,ONLY,only) $(call option,RECIPE,recipe) $(call option,MINUTES,budget-minutes) \
	$(call option,WORKERS,workers) $(if $(ANEW),--anew)

.PHONY: help install run run-containers serve test test-wheel test-fast lint format compile minio images sbom release-images chart reference
.PHONY: crds node-build node-up node-down node-shell test-cluster e2e evidence evidence-quick bench-critic bench-steering bench-serving bench-scoring
.PHONY: bench-scaling bench-gpu bench-against chaos chaos-store fuzz docs lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 } /^#:/ { print "      " substr($$0, 4) }' Makefile

install: $(STAMP) ## create .venv from the lock (the other targets do this if needed)

$(STAMP): requirements/dev.lock requirements/optimizers.lock requirements/installer.lock pyproject.toml
	@bash requirements/install.sh $(VENV) '$(PYTHON)'
	touch $@

run: install ## the whole pipeline: train, evaluate, steer, gate, serve
#: RECIPE=shapes-unet SEED=0 SET="train.num_iterations=8 rewards=[{use: ...}]" CONFIG=file.yaml PACKAGE=folder PROJECT=name
#: OUTPUT=runs STORE=file://... RESUME=<run>
	@LATENTAC_OWNERS=$$PPID $(VENV)/bin/latentac run $(RUN_OPTIONS)

run-containers: install ## as run, but each step in its container and artifacts in MinIO (needs make images)
#: as make run, and STORE=s3://bucket/prefix with its endpoint and credentials in the environment; DOCKER_HOST
	@LATENTAC_OWNERS=$$PPID $(VENV)/bin/latentac run --containers $(RUN_OPTIONS)

serve: install ## serve a model until Ctrl-C: the last one deployed, or that of a run
#: RUN=<run>, or PROJECT=<project, for its model in production>; PORT=8080 OUTPUT=runs STORE=file://...
	@$(VENV)/bin/latentac serve $(call option,RUN,run) $(call option,PROJECT,project) $(call option,PORT,port) $(PLACE_OPTIONS)

test: install minio ## all tests (more than an hour on two cores)
#: TEST_WORKERS=3 ARGS="-k ratio"
	@status=0
	$(PARALLEL) $(TEST) -m "not slow and not cluster" -n $(TEST_WORKERS) $(ARGS) || status=$$?
	$(PARALLEL) $(TEST) -m "slow and not cluster" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS) || status=$$?
	exit $$status

test-wheel: install ## a small run from the wheel, with the oldest and with the newest allowed versions
	@bash requirements/test-wheel.sh '$(PYTHON)'

test-fast: install ## the fast tests (up to 18 minutes on two busy cores)
	@$(PARALLEL) $(TEST) -m "not slow and not cluster" -n $(TEST_WORKERS) $(ARGS)

lint: install ## ruff, mypy, and the rules of this repository (layers, sizes, addresses, documents)
	@status=0
	$(VENV)/bin/ruff check . || status=$$?
	$(VENV)/bin/ruff format --check . || status=$$?
	$(VENV)/bin/mypy $(CHECKED) || status=$$?
	$(TEST) -q --durations=0 --durations-min=5 tests/test_house.py || status=$$?
	exit $$status

format: install ## sort imports, fix what can be fixed, format
	@$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

compile: install ## write the compiled pipeline, and print what changed
	@$(PY) -m latentac.pipelines compile
	git --no-pager diff --stat -- pipelines

minio: install ## get a MinIO server for the tests: MINIO_BIN, the one on PATH, or one built into the cache
	@$(PY) -m tools.minio build

images: install ## build the images with docker (without BASE, the base image is built here, as root)
#: IMAGES="train serve" BASE=<image with Python> PREFIX=latentac TAG=dev TORCH_BACKEND=cpu TORCH_IMAGE=<image>
	@$(PY) -m images.build $(IMAGES) $(call option,BASE,base) $(call option,PREFIX,prefix) $(call option,TAG,tag)

sbom: install ## write a CycloneDX bill of materials for each image into build/sbom/
#: IMAGES="train serve" PREFIX=latentac TAG=dev
	@$(PY) -m images.sbom $(IMAGES) $(call option,PREFIX,prefix) $(call option,TAG,tag)

release-images: install ## push the images of this commit, sign them, attest contents and provenance, verify (cosign)
#: PREFIX=registry.example.com/ml/latentac TAG=0.1.0 IMAGES="train serve" BUILDER=<address> TLOG=no
#: COSIGN_KEY=<file> (COSIGN_PASSWORD in the environment), or in a CI with identity tokens IDENTITY=... ISSUER=...
	@$(PY) -m images.publish $(IMAGES) $(call option,PREFIX,prefix) $(call option,TAG,tag) $(call option,COSIGN_KEY,key) \
		$(call option,IDENTITY,identity) $(call option,ISSUER,issuer) $(call option,TLOG,log) $(call option,BUILDER,builder)

chart: install ## write the chart's README from template and values, and print what changed
	@$(PY) helm/readme.py
	git --no-pager diff --stat -- helm

reference: install ## write docs/configuration.md from the classes, and print what changed
	@$(PY) -c 'from pathlib import Path; from latentac.runs.reference import fields_markdown as f; Path("docs/configuration.md").write_text(f())'
	git --no-pager diff --stat -- docs

crds: install ## fetch the CRDs of Volcano, KServe, Argo and the Gateway API for the tests into the cache (seconds)
	@$(PY) -m tools.manifests

node-build: install ## build the programs of the test node into the cache (half an hour on two cores)
	@$(PY) -m tools.binaries

node-up: install ## start a Kubernetes node for tests in the background (as root); prints what to export
#: with the CRDs of make crds, and over them those of the folder in LATENTAC_CRDS
	@$(PY) -m tests.cluster.node up

node-down: install ## stop the node; the cache keeps its images
	@$(PY) -m tests.cluster.node down

node-shell: install ## open a shell with KUBECONFIG, kubectl, helm and helm3 of the node
	@$(PY) -m tests.cluster.node shell

test-cluster: install ## the cluster tests (as root), on the node of node-up or on a new one
#: ARGS="-k node"
	@$(TEST) -m cluster $(ARGS)

e2e: install ## test chart, pipeline, endpoint and report on the cluster of KUBECONFIG (with KFP, Volcano, KServe)
#: NAMESPACE=<exists> VALUES="a.yaml b.yaml" RELEASE=latentac KFP_HOST=http://... MINUTES=60 KEEP=1; more in tests/cluster/e2e.py
	@$(PY) -m tests.cluster.e2e

evidence: install ## all benchmark experiments (hours; can be stopped and continued)
#: ONLY="main ablations hacking critic" RECIPE=shapes-unet MINUTES=120 WORKERS=2 ANEW=1; writes benchmarks/results
	@$(PARALLEL) $(PY) -m benchmarks.evidence run $(EVIDENCE_OPTIONS)

evidence-quick: install ## a small version of evidence (20 minutes on two cores), into build/evidence-quick
#: as make evidence
	@$(PARALLEL) $(PY) -m benchmarks.evidence run --quick $(EVIDENCE_OPTIONS)

bench-critic: install ## time of the critic: iterations of DDPO and of ours alternate in one process
#: RECIPE=shapes-unet PAIRS=12
	@$(PARALLEL) $(PY) -m benchmarks.critic_cost $(call option,RECIPE,recipe) $(call option,PAIRS,pairs)

bench-steering: install ## reward against network evaluations for every steering method, and their time
#: RECIPE=shapes-unet RUN=runs/<trained run; by default it trains one> PROMPTS=384; can be stopped and continued
	@$(PARALLEL) $(PY) -m benchmarks.steering $(call option,RECIPE,recipe) $(call option,RUN,run) $(call option,PROMPTS,prompts)

bench-serving: install ## the endpoint: throughput with and without batching, HTTP overhead, probes under load
#: RECIPE=shapes-unet ROUNDS=6
	@$(PARALLEL) $(PY) -m benchmarks.serving $(call option,RECIPE,recipe) $(call option,ROUNDS,rounds)

bench-scoring: install ## rollouts and scoring at the same time, with a reward of 50 ms per image in a pool (3 minutes)
#: RECIPE=shapes-unet PROCESSES=2 ITERATIONS=6
	@$(PARALLEL) $(PY) -m benchmarks.scoring $(call option,RECIPE,recipe) $(call option,PROCESSES,processes) \
		$(call option,ITERATIONS,iterations)

bench-scaling: install ## two workers on two cores against one on one core; then predictions for many GPUs (minutes)
#: RECIPE=shapes-unet ROUNDS=6
	@$(PARALLEL) $(PY) -m benchmarks.scaling $(call option,RECIPE,recipe) $(call option,ROUNDS,rounds)

bench-gpu: install ## SD1.5 and SD3.5-M sizes on one GPU beside the field's plain loop (8 minutes; without a GPU a dry run)
#: MODELS="sd15 sd35m" BUDGET=450 SET="backbone.compile=blocks" DRY=1
	@$(PARALLEL) $(PY) -m benchmarks.gpu $(call option,MODELS,models) $(call option,BUDGET,seconds) $(call option,SET,set) \
		$(if $(DRY),--dry-run)

bench-against: install minio ## throughput of endpoint and store: this version against an earlier commit (minutes)
#: COMMIT=966fe4c ROUNDS=12; the commit needs the same dependencies
	@$(PARALLEL) $(PY) -m benchmarks.against $(or $(COMMIT),HEAD~1) $(call option,ROUNDS,rounds)

chaos: install minio ## inject 50 faults into training jobs; measure losses, recovery, and the result (40 minutes)
#: FAULTS=50 SEED=0
	@$(PARALLEL) $(PY) -m benchmarks.training_chaos $(call option,FAULTS,faults) $(call option,SEED,seed)

chaos-store: install minio ## inject 50 faults into a store; count visible partial artifacts and late answers (minutes)
#: FAULTS=50 SEED=0
	@$(PY) -m benchmarks.chaos $(call option,FAULTS,faults) $(call option,SEED,seed)

fuzz: install ## fuzz the endpoint: requests from its OpenAPI document, numbers, headers, connections (minutes)
#: EXAMPLES=1200 for each operation; SEED=0
	@$(PARALLEL) LATENTAC_FUZZ_EXAMPLES=$(or $(EXAMPLES),1200) LATENTAC_FUZZ_SEED=$(or $(SEED),0) \
		$(TEST) -s -m fuzz tests/latentac/serving $(ARGS)

docs: $(DOCS)/.installed ## build the documentation site in build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

$(DOCS)/.installed: requirements/docs.lock requirements/installer.lock
	@uv=$$(bash requirements/install.sh --uv '$(PYTHON)')
	$$uv venv -q --clear --python '$(PYTHON)' $(DOCS)
	$$uv pip sync -q --python $(DOCS) --require-hashes requirements/docs.lock
	touch $@

lock: install ## update the locks from pyproject.toml and requirements/*.in; versions change only if they must
#: UPGRADE=1 updates every version that is not pinned
	@uv=$$(bash requirements/install.sh --uv '$(PYTHON)')
	$$uv pip $(LOCK) $(if $(UPGRADE),--upgrade) --override requirements/overrides.in $(EXTRAS:%=--extra %) \
		pyproject.toml requirements/dev.in -o requirements/dev.lock
	$$uv pip $(LOCK) $(if $(UPGRADE),--upgrade) requirements/installer.in -o requirements/installer.lock
	$$uv pip $(LOCK) $(if $(UPGRADE),--upgrade) -c requirements/dev.lock requirements/docs.in -o requirements/docs.lock
	$$uv pip $(LOCK) $(if $(UPGRADE),--upgrade) --no-deps requirements/optimizers.in -o requirements/optimizers.lock
	for name in tools sbom torch train serve pipeline kfp; do
		options=(-c ../dev.lock $(if $(UPGRADE),--upgrade))
		[[ $$name != kfp ]] || options+=(--no-deps)
		$$uv --directory requirements/images pip $(LOCK) "$${options[@]}" $$name.in -o $$name.lock
	done

clean: ## remove the environment and all caches, but not runs/
	@rm -rf $(VENV) .installer build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find latentac components pipelines benchmarks tools tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
