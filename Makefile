.DEFAULT_GOAL := help
.PHONY: help demo demo-all test test-all bench soak check clean

READY := .venv/.ready
# tests start hundreds of processes, which find what they import compiled
unexport PYTHONDONTWRITEBYTECODE

$(READY): setup.cfg pyproject.toml constraints.txt scripts/setup.sh scripts/pythons.sh
	@bash scripts/setup.sh

demo: $(READY) ## the whole project in a few minutes: crops, teacher, cache, students, what they learned
	@.venv/bin/python -m pipelines.demo

demo-all: $(READY) ## the same with a student of each of the seven methods
	@.venv/bin/python -m pipelines.demo --all

test: $(READY) ## the test suite, on all processors
	@.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-all: ## the test suite on each of Python 3.11, 3.12 and 3.13 that is on PATH, or PYTHONS="..."
	@bash scripts/test_all.sh

bench: $(READY) ## every benchmark that fits this machine, into bench-out; about an hour on 2 quiet CPUs
	@.venv/bin/python -m benchmarks --out bench-out

soak: $(READY) ## kills, flipped bits, full disks ...: every case at its full count (docs/reliability.md); hours
	@.venv/bin/python -m pytest -m hypothesis --hypothesis-profile many
	@.venv/bin/python -m pytest tests/soak tests/test_docs.py --full --soak-report soak-out

check: $(READY) ## style, and the types of the public names
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

.PHONY: docs
docs: $(READY) ## the pages of docs/ that are written from the code: map, options, presets
	@.venv/bin/python -m scripts.documents
	@.venv/bin/python -m pipelines.presets > docs/presets.md

clean: ## remove everything that make made
	rm -rf .venv .venv-3.* build demo-out soak-out bench-out *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10
