# Everything runs in .venv; a target installs what it needs, once, and again when pyproject changes.
SHELL := bash -o pipefail
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# Several tests at once, those of a module next to each other: they share servers.
PARALLEL := -n auto --dist worksteal
# Where a test or a training run finds data sets; torchvision downloads them when they are absent.
export DIGITS_DATA ?= data
INPUTS := pyproject.toml requirements-dev.lock proto/pyproject.toml proto/hatch_build.py $(wildcard proto/digits/*/*.proto)

.DEFAULT_GOAL := help
.PHONY: help serve classify test test-all lint format train export bench peers soak fuzz lock audit \
	manifests image image-test cluster-test release clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

COMMA := ,

# Both distributions, editable, and one line for each package that comes: some take minutes.
define install
	@echo "installing digits-client and digits-serving[$(1)] into .venv; $(2)"
	@$(BIN)/pip install --disable-pip-version-check --progress-bar off -c requirements-dev.lock -e ./proto -e '.[$(1)]' \
		| awk '/^ *(Downloading|Using cached|Processing|Installing coll)/ { print substr($$0, 1, 100); fflush() }'
	@touch $@
endef

.venv/serve.stamp: $(INPUTS)
	@$(PYTHON) -m venv .venv
	$(call install,cpu$(COMMA)top,the first time 120 MB to download and 400 MB on disk)

.venv/export.stamp: .venv/serve.stamp
	$(call install,export,the first time PyTorch with CUDA: 6 GB on disk on Linux)

.venv/dev.stamp: .venv/export.stamp
	$(call install,dev,the first time another 700 MB on disk)

.venv/fuzz.stamp: .venv/dev.stamp
	$(call install,fuzz,the first time another 35 MB on disk)

serve: .venv/serve.stamp ## Serve the committed model, or MODELS=models/local/digits; ARGS="--grpc-port 0" passes flags
	@exec $(BIN)/digits serve $(if $(MODELS),--model-repository $(MODELS)) $(ARGS)

classify: .venv/serve.stamp ## Classify IMAGES="a.png b.png" with a running server
	@$(BIN)/digits classify $(IMAGES) $(ARGS)

test: .venv/dev.stamp ## Run the tests, but for those that take long or need more than Python
	$(BIN)/pytest $(PARALLEL) -m "not full" $(ARGS)

test-all: .venv/dev.stamp ## Run every test
	$(BIN)/pytest $(PARALLEL) $(ARGS)

lint: .venv/dev.stamp ## Check style, types and the proto
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint && $(BIN)/buf format -d --exit-code

format: .venv/dev.stamp ## Format the code
	$(BIN)/ruff check --fix-only . && $(BIN)/ruff format . && $(BIN)/buf format -w

train: .venv/export.stamp ## Train on MNIST, or on DATA=folder; writes a run in runs/ (ARCH=, ARGS=)
	$(BIN)/python -m training $(if $(ARCH),--arch $(ARCH)) $(if $(DATA),--data $(DATA)) $(ARGS)

export: .venv/export.stamp ## Prove, judge and write the trained model as the next release in models/local
	$(BIN)/python -m export $(if $(DATA),--data $(DATA)) $(ARGS)

bench: .venv/dev.stamp ## Measure every figure beside its limit (needs h2load; ARGS="latency stream")
	$(BIN)/python -m benchmarks $(ARGS)

peers: .venv/dev.stamp ## Measure mosec beside this server, in an environment of its own
	$(BIN)/python -m benchmarks mosec $(ARGS)

soak: .venv/dev.stamp ## Mixed traffic and reloads for 10 minutes, everything checked (ARGS="--minutes 1 --transport grpcio")
	$(BIN)/python -m tests.soak $(ARGS)

fuzz: .venv/fuzz.stamp ## A million hostile inputs, coverage-guided and over sockets (ARGS="--inputs 100000 --minutes 5")
	$(BIN)/python -m tests.fuzz $(ARGS)

# Universal: the same locks for x86-64 and arm64, and for every Python from 3.11 on.
# What is built from this tree is in none of them.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url \
	--no-emit-package digits-client --no-emit-package digits-serving --custom-compile-command "make lock"
LOCK := $(COMPILE) --generate-hashes

lock: .venv/dev.stamp ## Pin what .venv and the images install (ARGS=--upgrade for newer versions)
	$(COMPILE) --no-annotate pyproject.toml --extra dev -o requirements-dev.lock $(ARGS)
	$(LOCK) pyproject.toml --extra cpu --extra signing --extra otel --extra top -o deploy/requirements-cpu.lock $(ARGS)
	$(LOCK) pyproject.toml --extra gpu --extra signing --extra otel --extra top -o deploy/requirements-cuda.lock $(ARGS)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("proto/pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		| $(LOCK) - -o deploy/requirements-build.lock $(ARGS)

audit: .venv/dev.stamp ## Look the locked packages up in a database of known vulnerabilities
	for lock in deploy/*.lock; do \
		$(BIN)/uvx 'pip-audit~=2.10' --strict --disable-pip --require-hashes -r $$lock || exit 1; done

# checkov has an environment of its own: it pins versions that other tools need newer.
.venv-checkov/stamp:
	$(PYTHON) -m venv .venv-checkov
	.venv-checkov/bin/pip install --quiet --disable-pip-version-check 'checkov>=3.3,<4'
	@touch $@

manifests: .venv/dev.stamp .venv-checkov/stamp ## Render and check everything in deploy/
	$(BIN)/pytest tests/deploy $(ARGS)

image: ## Build the image with docker, podman or buildah (DEVICE=cuda; MODELS=models/local/digits; ARGS="--no-cache")
	MODELS=$(MODELS) deploy/build-image.sh $(or $(DEVICE),cpu) $(ARGS)

# Kubernetes, etcd and kwok, built from Go modules; again only what changed. tests/cluster/programs pins them.
CLUSTER := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/digits-serving/cluster

image-test: .venv/dev.stamp ## Build the image and run it as a pod would: limits, load, drain (needs podman)
	ENGINE=podman deploy/build-image.sh cpu $(ARGS)
	CLUSTER_PROGRAMS=$(CLUSTER) TEST_IMAGE=localhost/digits-serving:$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
		$(BIN)/pytest tests/deploy/test_container*.py

cluster-test: .venv/dev.stamp ## Apply deploy/ to a real control plane, built with Go (the first time long)
	tests/cluster/build.sh $(CLUSTER)
	CLUSTER_PROGRAMS=$(CLUSTER) $(BIN)/pytest tests/cluster $(ARGS)

# The version in service, and where it stands: everywhere but in what other projects' tools write.
OLD = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

release: ## Set the version in every file that names it, and date the changelog (VERSION=0.2.0)
	@echo '$(VERSION)' | grep -qxE '[0-9]+\.[0-9]+\.[0-9]+' \
		|| { echo 'VERSION: expected a number such as 0.2.0, got "$(VERSION)"' >&2; exit 2; }
	git grep -lFw -e '$(OLD)' -- . ':!*.lock' ':!*.mod' ':!*.sum' ':!CHANGELOG.md' ':!tests' ':!models' ':!*/results/*' \
		| xargs sed -i 's/\b$(subst .,\.,$(OLD))\b/$(VERSION)/g'
	sed -i "s/^## .*, unreleased$$/## $(VERSION), $$(date +%F)/" CHANGELOG.md

clean: ## Remove the environment and caches; runs/ and data/ stay
	rm -rf .venv .venv-checkov .venv-peers .fuzz .mypy_cache .pytest_cache .ruff_cache build dist
	rm -f proto/digits/*/*_pb2*.py proto/digits/*/*_pb2*.pyi
