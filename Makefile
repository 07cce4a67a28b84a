# Everything runs in .venv, which the targets make themselves. They need Python >= 3.11 and a package index.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := pip install --quiet --disable-pip-version-check
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true
TORCH = "$$(grep '^torch==' constraints.txt)"
PYTEST := pytest -m "not quality" -n 2 --dist worksteal

.PHONY: demo test quality bench docs package lowest newest audit pictures fix clean help

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
	$(BIN)/$(PYTEST)

quality: .venv/dev  ## train the quickstart in full and let its judge read the samples
	$(BIN)/pytest -m quality -s

bench: .venv/dev  ## every stage against what a user would run instead, as ratios; a quarter of an hour
	$(BIN)/python benchmarks/bench.py

docs: .venv/dev  ## write docs/configs.md and docs/cli.md from the code
	$(BIN)/python docs/generate.py

package: .venv/dev  ## build the wheel, install it in a fresh environment, and run the commands from there
	rm -rf dist && $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/$(INSTALL) $(TORCH)
	dist/venv/bin/$(INSTALL) -c constraints.txt dist/*.whl
	mkdir dist/empty && cd dist/empty && export HF_HUB_OFFLINE=1 && ../venv/bin/sana sample "4 two 4 six" && \
	  ../venv/bin/sana embed --limit 1000 && ../venv/bin/sana train --set train.steps=60 && \
	  ../venv/bin/sana sample "4 two" --steps 2 && ../venv/bin/sana inspect runs/quickstart --verify

# torch stays as it is pinned: an older one would be another build, of gigabytes
lowest: .venv/bin/python  ## the tests with the oldest libraries that pyproject.toml allows
	$(BIN)/python tests/bounds.py > .venv/lowest.txt
	$(PYTHON) -m venv .venv/lowest
	.venv/lowest/bin/$(INSTALL) $(TORCH)
	.venv/lowest/bin/$(INSTALL) -c .venv/lowest.txt -e '.[dev]'
	.venv/lowest/bin/$(PYTEST)

newest: .venv/bin/python  ## the tests with the newest libraries that the index serves
	$(PYTHON) -m venv .venv/newest
	.venv/newest/bin/$(INSTALL) $(TORCH)
	.venv/newest/bin/$(INSTALL) --upgrade -e '.[dev]' $(TORCH)
	.venv/newest/bin/$(PYTEST)

audit: .venv/dev  ## known vulnerabilities in what is pinned
	$(BIN)/$(INSTALL) pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

pictures: .venv/dev  ## the README's pictures again: grids, accuracy over time, the report (by chromium), what a terminal shows; most of an hour
	$(BIN)/sana sample --checkpoint shipped --prompts-file configs/prompts/lesson.txt --out docs/lesson-grid.png
	$(BIN)/sana sample --checkpoint shipped "0 1 2 3 4 5 6 7 8 9" --out docs/digits.png --trajectory docs/digits.gif
	rm -rf runs/pictures docs/digits.png
	$(BIN)/python benchmarks/quickstart.py --scales 3 --folder runs/pictures --plot docs/quickstart.png
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1120,1665 \
	  --screenshot=docs/report.png "file://$(CURDIR)/runs/pictures/runs/seed-0/report.html"
	$(BIN)/$(INSTALL) pyte
	$(BIN)/python benchmarks/terminal.py docs
	$(BIN)/sana embed --config folder-rgb
	$(BIN)/sana train --config folder-rgb --resume auto
	$(BIN)/sana sample --checkpoint runs/folder-rgb --prompts-file configs/prompts/shapes.txt --out docs/shapes-grid.png

fix: .venv/dev  ## format, and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; data/ and runs/ stay
	rm -rf .venv dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sana needs Python >= 3.11; say which with: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# torch first and by its exact pin, so that no resolver is tempted by another build; what pip would compile on one core is compiled
# on all of them, but for a few files that are written for other Pythons
.venv/base: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/$(INSTALL) --no-compile $(TORCH)
	$(BIN)/$(INSTALL) --no-compile -c constraints.txt -e .
	$(COMPILE)
	touch $@

.venv/dev: .venv/base
	$(BIN)/$(INSTALL) --no-compile -c constraints.txt -e '.[dev]'
	$(COMPILE)
	touch $@
