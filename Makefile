# make demo      a simulated tissue, reconstructed, scored and shown
# make test      lint and types, then every test and every notebook
# make lab       the notebooks in JupyterLab
# make lint      ruff (ruff.toml) and mypy (mypy.ini); make types: mypy alone
# make export    the package from the notebooks; make export-check: is it what they export?
# make readme    README.md and the pages of results from the numbers on file
# make coverage  which lines the tests reach; ARGS="tests/test_core.py" for some of them
# make docs      the notebooks as a website in _docs/; make docs-check: opened in a browser too
# make clean     all that can be made again
# Everything lives in .venv; a second call installs nothing.
SHELL  := /bin/bash
VENV   := .venv
BIN    := $(VENV)/bin
RECIPE := settings.ini setup.py constraints.txt
STAMP  := $(VENV)/.installed-$(shell cat $(RECIPE) | cksum | cut -d' ' -f1)
# the first interpreter between 3.10 and 3.12; override with  make PYTHON=/path/to/python3.11 demo
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	"$$p" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# the tensors are small: one thread is fastest, and two threads that wait for a busy core are very slow
export OMP_NUM_THREADS ?= 1
export PYTHONHASHSEED  ?= 0

.PHONY: help install demo test lab lint types coverage export export-check readme docs docs-check clean

help:
	@grep -E '^# (make|Everything)' Makefile | sed 's/^# //'

install: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10-3.12 on PATH. Remedy: install one, or name it: make PYTHON=/path/to/python3.11 demo" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv/ensurepip. Remedy: install the python3-venv package of your system, or name another interpreter with PYTHON=" >&2; exit 1; }
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(VENV)"
	@echo "installing into $(VENV) (a few minutes, once)"
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' \
		|| { echo "make: the installation failed. Remedy: check the package index and the free disk space (about 3 GB), then call make again" >&2; exit 1; }
	@rm -f "$(VENV)"/.installed-* && touch "$@"

demo: $(STAMP)
	@$(BIN)/gears demo --out demo

# two processes; a file of tests stays in one, so that its fixtures and trained models are made once; the longest first (tests/conftest.py)
WORKERS ?= 2
# freed memory is used again and not given back: the tensors are small and many, and a tenth of the time of a training went there (glibc only);
# byte code is kept, or each of the many new processes compiles the package again
test: export MALLOC_TRIM_THRESHOLD_ ?= 4000000000
test: export MALLOC_MMAP_THRESHOLD_ ?= 33554432
test: export MALLOC_TOP_PAD_ ?= 67108864
test: $(STAMP) lint
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -o faulthandler_timeout=300 tests

lab: $(STAMP)
	@$(BIN)/jupyter lab --notebook-dir=nbs

lint: $(STAMP) types
	@$(BIN)/ruff check --quiet nbs tests gears_nb setup.py

types: $(STAMP)
	@$(BIN)/mypy --no-error-summary

ARGS ?= tests
coverage: $(STAMP)
	@mkdir -p .coverage && rm -f .coverage/*
	@$(BIN)/coverage run -m pytest -q $(ARGS); status=$$?; $(BIN)/coverage combine --quiet && $(BIN)/coverage report && exit $$status

export: $(STAMP)
	@$(BIN)/nbdev_export
	@$(BIN)/python -m gears_nb.core.scripts > /dev/null

# the package must be exactly what the notebooks export
export-check: $(STAMP)
	@$(BIN)/python -m pytest -q tests/test_notebooks.py -k "export or living or scripts"

readme: $(STAMP)
	@$(BIN)/python -m gears_nb.runs.readme

docs: $(STAMP)
	@$(BIN)/python -m gears_nb.runs.site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet && echo "_docs/index.html"
	@$(BIN)/python -m gears_nb.runs.site_check $(CHECK)

# the same, and the important pages in Chromium: failed requests, search, bytes, contrast
docs-check: CHECK := --browser
docs-check: docs

clean:
	rm -rf runs demo _proc _docs .gears build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache .coverage .cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
