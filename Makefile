# Every target makes .venv from nothing when it is missing. `make help` lists them.
#
#   PYTHON=...    the interpreter that makes .venv (3.11 or newer)
#   PIP_ARGS=...  more options for pip, such as where it finds a CPU build of torch
#   ARGS=...      more options for pytest: make test ARGS="tests/core -k merge"
#   JOBS=...      how many tests run at the same time

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
ARGS ?=
JOBS ?= 2
TORCH := 2.13.0

BIN := .venv/bin
SHAPELY := tests/core tests/nn tests/losses tests/probes tests/decoding
# The environment variables hold packages to the constraints in which pip builds wheels, too.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(BIN)/python -m pip --disable-pip-version-check --quiet
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check lint types floors format docs evidence bench constraints clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: .venv/.dev ## diagnose two real models and write results/*.html
	$(BIN)/attending demo

test: .venv/.dev ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

shapes: .venv/.dev ## run tests with every annotation checked: shapes, dtypes, types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --shapes -m "not slow" $(SHAPELY)

check: lint types floors docs shapes test ## everything that a change has to pass

lint: .venv/.dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev ## mypy --strict on src
	$(BIN)/mypy --strict src

floors: .venv/.dev ## imports point only downward
	$(BIN)/python tools/check_floors.py

format: .venv/.dev ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

evidence: .venv/.dev ## write docs/evidence/index.md from its results
	$(BIN)/python tools/write_evidence.py

bench: .venv/.dev ## run benchmarks/*.py, one after another
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean: ## remove .venv and everything that was built
	rm -rf .venv site dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "attending needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv .venv

.venv/.dev: $(INPUTS) | $(BIN)/python
	@echo "installing into .venv, a few minutes the first time"
	$(PIP) install $(PIP_ARGS) -c constraints.txt -e '.[demo,dev]'
	@touch $@

.venv/.docs: $(INPUTS) .venv/.dev
	$(PIP) install $(PIP_ARGS) -c constraints.txt -e '.[demo,dev,docs]'
	@touch $@

# Asks pip, in an environment of its own and with nothing installed, for the newest version of all
# that the extras need, and writes down the answer. torch stays at $(TORCH) until that line changes.
define PIN
import json, sys
found = [item["metadata"] for item in json.load(sys.stdin)["install"] if not item["is_direct"]]
print("# Every version, those of dependencies of dependencies too, that the checks run with.")
print("# Made by `make constraints` with Python %d.%d on %s; do not edit." % (*sys.version_info[:2], sys.platform))
for item in sorted(found, key=lambda item: item["name"].lower()):
    print(item["name"] + "==" + item["version"].partition("+")[0])
endef
export PIN

constraints: ## pin the newest version of everything in constraints.txt
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	"$(PYTHON)" -m venv "$$scratch/venv"; \
	"$$scratch/venv/bin/pip" install --disable-pip-version-check --quiet $(PIP_ARGS) --dry-run \
		--ignore-installed --report "$$scratch/report.json" \
		torch==$(TORCH) hatchling editables -e '.[all,dev,docs]'; \
	"$(PYTHON)" -c "$$PIN" < "$$scratch/report.json" > "$$scratch/constraints.txt"; \
	mv "$$scratch/constraints.txt" constraints.txt
