# Everything runs in .venv, which the targets create. They need Python >= 3.11 and a package index.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := pip install --quiet --disable-pip-version-check
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true
TORCH = "$$(grep '^torch==' constraints.txt)"
PYTEST := pytest -m "not quality" -n 2 --dist worksteal
FOR ?= 3.12

.PHONY: demo test quality bench gpu pack docs package lowest newest audit pictures fix clean help

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/ -/'

demo: .venv/base  ## embed, train, sample the lesson's grid and inspect: MNIST, offline, minutes
	$(BIN)/sana embed --config quickstart
	$(BIN)/sana train --config quickstart --resume auto
	$(BIN)/sana sample --checkpoint runs/quickstart --prompts-file configs/prompts/lesson.txt
	$(BIN)/sana inspect runs/quickstart

test: .venv/dev  ## lint, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/$(PYTEST)

quality: .venv/dev  ## train the quickstart in full and judge its samples
	$(BIN)/pytest -m quality -s

bench: .venv/dev  ## compare every stage with what a user would run instead; a quarter of an hour
	$(BIN)/python benchmarks/bench.py

gpu:  ## measure on a GPU, in eight minutes; needs Python with PyTorch and CUDA, what `make pack` made, no network
	$(PYTHON) benchmarks/gpu.py

pack: .venv/dev  ## download the libraries that `make gpu` needs beside PyTorch, for Python 3.12 or FOR=3.x
	$(BIN)/python benchmarks/gpu.py --pack dist/gpu --python $(FOR)

docs: .venv/dev  ## write docs/configs.md and docs/cli.md from the code
	$(BIN)/python docs/generate.py

package: .venv/dev  ## build the wheel, install it in a fresh environment, and run the commands there
	rm -rf dist && $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/$(INSTALL) $(TORCH)
	dist/venv/bin/$(INSTALL) -c constraints.txt dist/*.whl
	mkdir dist/empty && cd dist/empty && export HF_HUB_OFFLINE=1 && ../venv/bin/sana sample "4 two 4 six" && \
	  ../venv/bin/sana embed --limit 1000 && ../venv/bin/sana train --set train.steps=60 && \
	  ../venv/bin/sana sample "4 two" --steps 2 && ../venv/bin/sana inspect runs/quickstart --verify

# torch keeps its pin: an older one would be another build of gigabytes
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

audit: .venv/dev  ## known vulnerabilities in the pinned packages
	$(BIN)/$(INSTALL) pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

pictures: .venv/dev  ## make the pictures of the docs: grids, plot, report and page (need chromium), terminal; most of an hour
	$(BIN)/sana sample --checkpoint shipped --prompts-file configs/prompts/lesson.txt --out docs/lesson-grid.png
	$(BIN)/sana sample --checkpoint shipped "0 1 2 3 4 5 6 7 8 9" --out docs/digits.png --trajectory docs/digits.gif
	$(BIN)/sana sample --checkpoint shipped:critters --out docs/critters-table.png --grid \
	  "a round {red,blue,green} monster with {white horns,a yellow crown,pink antennae} and two eyes, smiling, on black"
	$(BIN)/sana sample --checkpoint shipped:critters --prompts-file configs/prompts/critters-seen.txt --out docs/critters-seen.png
	$(BIN)/sana sample --checkpoint shipped:critters --prompts-file configs/prompts/critters-unseen.txt --out docs/critters-unseen.png
	$(BIN)/sana sample --checkpoint shipped:critters-distilled --out docs/fewstep-critters.png --grid \
	  "a round {red,blue,green} monster with {white horns,a yellow crown,pink antennae} and two eyes, smiling, on black"
	$(BIN)/sana sample --checkpoint shipped:quickstart-distilled --prompts-file configs/prompts/lesson.txt --out docs/fewstep-digits.png
	rm -rf runs/pictures docs/digits.png
	$(BIN)/python benchmarks/learning.py --scales 3 --folder runs/pictures --plot docs/quickstart.png
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1120,1665 \
	  --screenshot=docs/report.png "file://$(CURDIR)/runs/pictures/runs/seed-0/report.html"
	$(BIN)/python benchmarks/play.py shipped --screenshot docs/play.png --prompt "2 0 2 6"
	$(BIN)/$(INSTALL) pyte
	$(BIN)/python benchmarks/terminal.py docs
	$(BIN)/sana embed --config folder-rgb
	$(BIN)/sana train --config folder-rgb --resume auto
	$(BIN)/sana sample --checkpoint runs/folder-rgb --prompts-file configs/prompts/shapes.txt --out docs/shapes-grid.png

fix: .venv/dev  ## apply lint fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; data/ and runs/ stay
	rm -rf .venv dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sana needs Python >= 3.11; choose one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# torch first, by its exact pin, so that pip does not choose another build. `COMPILE` uses all cores, where pip uses
# one; its failures are ignored, since a few files are written for other Python versions.
.venv/base: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/$(INSTALL) --no-compile $(TORCH)
	$(BIN)/$(INSTALL) --no-compile -c constraints.txt -e .
	$(COMPILE)
	touch $@

.venv/dev: .venv/base
	$(BIN)/$(INSTALL) --no-compile -c constraints.txt -e '.[dev]'
	$(COMPILE)
	touch $@
