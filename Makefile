# Everything runs in .venv, which the targets make themselves. They need Python >= 3.11 and a package index.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quality bench fix clean help

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/ -/'

demo: .venv/base  ## embed, train, draw the lesson's grid and inspect, on MNIST, offline, in minutes
	$(BIN)/sana embed --config quickstart
	$(BIN)/sana train --config quickstart --resume auto
	$(BIN)/sana sample --checkpoint runs/quickstart --prompts-file configs/prompts/lesson.txt
	$(BIN)/sana inspect runs/quickstart

test: .venv/dev  ## lint, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not quality" -n 2 --dist worksteal

quality: .venv/dev  ## train the quickstart in full and let its judge read the samples
	$(BIN)/pytest -m quality -s

bench: .venv/dev  ## every stage against what a user would run instead, as ratios; a quarter of an hour
	$(BIN)/python benchmarks/bench.py

fix: .venv/dev  ## format, and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; data/ and runs/ stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sana needs Python >= 3.11; say which with: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# torch first and by its exact pin, so that no resolver is tempted by another build
.venv/base: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: .venv/base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
