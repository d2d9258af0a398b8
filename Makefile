SHELL := bash
PYTHON ?= python3
export PYTHON
BIN := .venv/bin
UV_COMPILE := .venv/uv/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate

# Of load in `make soak`.
MINUTES ?= 10
# Histories in `make simulate`.
N ?= 10000
# What changes in `make demo`: copy, rotation, move.
CASE ?= copy

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup system fuse check lint unit project test test-integration test-faults test-e2e slow fleet celery \
	compose-test faults soak simulate demo demo-down bench needed window chart lock docs

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: system .venv/.synced .venv/.mc ## system packages and .venv; the other targets run it, nothing happens the second time

check: setup ## before a commit: lint and the unit tests, side by side; under two minutes
	@$(MAKE) --no-print-directory -j2 -O lint unit

lint: setup ## format, types, layers, shell and compose file
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy && $(BIN)/mypy plugins
	PYTHONPATH=. $(BIN)/lint-imports
	@# One at a time: a second name would be an argument of the first script.
	for script in setup.sh .ci/run; do bash -n "$$script" || exit 1; done
	@# Any key will do where only the file is checked; the settings stay empty.
	@env=$$(mktemp) && trap 'rm -f "$$env"' EXIT && \
	sed -n '/^# Settings/q; s/^\([A-Z0-9_]*\)=.*/\1=lint/p' .env.example >"$$env" && \
	./setup.sh compose --env-file "$$env" config -q && echo "docker-compose.yaml: OK"

unit: setup ## the unit tests: no server, no network; under a minute
	$(BIN)/python -m pytest tests/unit

project: setup ## the DAGs' promises, the docs, the repository itself
	$(BIN)/python -m pytest tests/project

test: fuse lint ## lint, then the unit, integration and e2e tests, and a few of the faults
	@# Three of about the same CPU time, side by side. What each prints comes at its end, in one piece.
	@$(MAKE) --no-print-directory -j3 -O test-integration test-faults test-e2e

test-integration:
	$(BIN)/python -m pytest -m "not slow" tests/integration --ignore=tests/integration/refusals

test-faults:
	$(BIN)/python -m pytest -m "not slow" tests/unit tests/faults

test-e2e:
	$(BIN)/python -m pytest -m "not slow" tests/project tests/simulation tests/integration/refusals tests/e2e

slow: fuse setup ## the tests that `make test` leaves out for their time, but those of `make faults`; half an hour
	@./setup.sh celery
	$(BIN)/python -m pytest -m slow tests/project tests/simulation tests/integration tests/e2e tests/soak

demo: fuse setup ## a whole environment on this machine, and a live volume switched in it; CASE=copy, rotation, move
	$(BIN)/python -m lab.demo --case $(CASE)

demo-down: ## stop what `make demo` left running
	$(BIN)/python -m lab down

fleet: fuse setup ## three volumes moved through Airflow: a canary, then a wave of two
	$(BIN)/python -m pytest tests/e2e/test_fleet.py

celery: fuse setup ## a Celery worker is killed in mid-copy, on PostgreSQL and Redis; five minutes
	@./setup.sh celery
	$(BIN)/python -m pytest tests/e2e/test_celery.py

compose-test: fuse setup ## docker-compose.yaml, run by Docker: log-in, pages, an approved switch, and a worker killed in mid-copy
	@./setup.sh engine
	$(BIN)/python -m pytest tests/compose

faults: fuse setup ## kill, fail and clear every task in turn; ends with a table of what came of it
	$(BIN)/python -m pytest tests/faults

simulate: setup ## runs in a simulated world, with faults that seeds draw; N=10000
	PYTHONPATH=. $(BIN)/python -m tests.simulation --histories $(N)

soak: fuse setup ## move a volume to and fro under load, and read every acknowledged byte back; MINUTES=10
	$(BIN)/python -m lab.soak --minutes $(MINUTES)

system fuse:
	@./setup.sh $@

.venv/.synced: requirements.txt requirements-dev.txt setup.sh | system
	@./setup.sh venv
	@touch $@

.venv/.mc: setup.sh | .venv/.synced
	@./setup.sh mc
	@touch $@

bench: setup ## the copy beside juicefs sync, rclone and mc, into docs/benchmarks.md; about 25 minutes
	$(BIN)/python -m benchmarks.sync

needed: setup ## which blocks a volume of a million slices needs, beside juicefs fsck, into docs/benchmarks.md; about 5 minutes
	$(BIN)/python -m benchmarks.needed --write

window: fuse setup ## measure how long clients take to follow a new setting
	$(BIN)/python -m benchmarks.window

chart: setup ## render deploy/values.yaml with helm; CHART names the chart's folder or archive (apache-airflow/airflow, 1.22.0)
	AIRFLOW_CHART=$(CHART) $(BIN)/python -m pytest tests/project/test_helm.py

docs: setup ## write the tables of params in docs/ from the models, then build docs/ as a site into site/
	$(BIN)/python -m tests.support.param_tables
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs build --strict

lock: setup ## requirements*.in -> requirements*.txt, keeping the pins that still fit
	$(UV_COMPILE) requirements.in -o requirements.txt
	$(UV_COMPILE) requirements-dev.in -o requirements-dev.txt
