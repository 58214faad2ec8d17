# stocktake: `make demo` shows what it does, `make test` proves it. Both set up their own environment first.
.DELETE_ON_ERROR:
.PHONY: help setup demo test system lint format lock lambda clean

VENV ?= .venv
BIN := $(VENV)/bin
# uv of this machine, or one of our own in .uv
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
export PATH := $(CURDIR)/$(BIN):$(CURDIR)/.uv/bin:$(PATH)
export MLFLOW_EXPERIMENT_NAME ?= stocktake
export MLFLOW_DISABLE_TELEMETRY ?= true
export OMP_WAIT_POLICY ?= PASSIVE

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

.uv/bin/uv: requirements-build.lock
	python3 -m venv .uv
	.uv/bin/pip install --quiet --require-hashes -r requirements-build.lock

$(VENV)/ready: requirements.lock requirements-build.lock pyproject.toml | $(UV)
	test -x $(BIN)/python || $(UV) venv --python 3.11 $(VENV)
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip sync --quiet --compile-bytecode --require-hashes requirements.lock requirements-build.lock
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

setup: $(VENV)/ready ## make the environment in .venv from requirements.lock

demo: setup ## train the ladder of models on synthetic bins and show the leaderboard
	mlflow run . --env-manager=local

test: setup system lint ## lint and run all tests
	python -m pytest --numprocesses 2 --dist loadfile --max-worker-restart 0

system: ## Chromium and Java, which two of the tests need, from Debian's packages where that is possible
	@{ command -v chromium && command -v java; } >/dev/null \
		|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
			&& apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium default-jre-headless; } \
		|| echo "no Chromium or no Java here, and no rights to install them: the tests that need them are skipped"

lint: setup ## ruff, mypy, the import rule
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-cache --verbose | tail -n 6

format: setup ## format the code
	ruff check --fix .
	ruff format .

PIN = $(UV) pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --quiet
lock: $(UV) ## pin every dependency anew, with hashes, for all platforms: development, build, both images
	$(PIN) pyproject.toml --all-extras --group dev --upgrade --output-file requirements.lock
	$(PIN) --group build --upgrade --constraint requirements.lock --output-file requirements-build.lock
	$(PIN) pyproject.toml --extra serving --constraint requirements.lock \
		--output-file deploy/images/serving/requirements.lock
	$(PIN) pyproject.toml --extra training --extra serving --extra aws --extra managed-mlflow \
		--constraint requirements.lock --output-file deploy/images/training/requirements.lock
	$(PIN) --group lambda --constraint requirements.lock --no-emit-package boto3 --no-emit-package botocore \
		--output-file deploy/lambda/requirements.lock
	digest=$$(python3 -c "import hashlib; print(hashlib.sha256(open('requirements.lock','rb').read()).hexdigest()[:16])") \
		&& sed -i.bak "s/sha256 [0-9a-f]*/sha256 $$digest/" conda.yaml && rm conda.yaml.bak

lambda: $(UV) ## the function's package: workspace/lambda.zip
	rm -rf workspace/lambda workspace/lambda.zip
	$(UV) pip install --quiet --no-deps --require-hashes --only-binary :all: --python-platform x86_64-manylinux2014 \
		--python-version 3.13 --target workspace/lambda -r deploy/lambda/requirements.lock
	cp deploy/lambda/*.py workspace/lambda
	find workspace/lambda -name '__pycache__' -prune -exec rm -r {} +
	cd workspace/lambda && python3 -m zipfile -c ../lambda.zip *

clean: ## remove the environment and everything that runs have written
	rm -rf $(VENV) .uv workspace mlruns mlflow.db* .mypy_cache .ruff_cache .pytest_cache .hypothesis
