# The first `make test` or `make compat` in a bare clone makes .venv and installs the tested versions;
# every later one starts at once. Arguments travel in ARGS: make test ARGS="-k padding -x"

PYTHON ?= python3
TARGET = .
ARGS =
VENV = .venv
RUN = $(VENV)/bin/python -m
READY = $(VENV)/.ready

MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.PHONY: help setup compat test slow faults gate report bench lint clean

help:
	@echo 'make compat [TARGET=FOLDER]  judge this model, or the fork in FOLDER: table, and entry in MODIFICATIONS_LOG.md'
	@echo 'make gate                    may this be merged: checks, comparison with the merge-base, waivers'
	@echo 'make report [ARGS=--open]    all runs kept here as one page, .compat/report.html'
	@echo 'make test                    the tests (ARGS="-k NAME" picks some)'
	@echo 'make slow                    the tests marked slow'
	@echo 'make faults                  every seeded fault and every harmless refactor, through a lock and a comparison'
	@echo 'make lint                    ruff'
	@echo 'make bench                   time a run, compare with the last time on this machine'
	@echo 'make clean                   remove .venv, .nox and caches; kept runs and timings stay'

setup: $(READY)

# The stamp is written last: a set-up that was interrupted starts again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("nanovlm needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12" % (v[0], v[1]) if v < (3, 11) else 0)'
	@echo 'Setting up $(VENV): once, a few minutes, torch is large.' >&2
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip --disable-pip-version-check install -q -c constraints.txt -e '.[dev]'
	@touch $@

compat: $(READY)
	$(RUN) compat run '$(TARGET)' $(ARGS)

# a file stays in one process, so what its tests share is made once
test: $(READY)
	$(RUN) pytest -n auto --dist loadfile $(ARGS)

# pytest's exit 5, nothing selected, is a failure here on purpose: slow tests exist, and losing them is news.
slow: $(READY)
	$(RUN) pytest -n auto --dist loadfile -m slow $(ARGS)

faults: $(READY)
	$(RUN) pytest tests/faults -m 'slow or not slow' $(ARGS)

gate: $(READY)
	$(RUN) compat gate '$(TARGET)' $(ARGS)

report: $(READY)
	$(RUN) compat report $(ARGS)

bench: $(READY)
	$(RUN) pytest benchmarks --benchmark-autosave --benchmark-compare $(ARGS)

lint: $(READY)
	$(RUN) ruff check . $(ARGS)

clean:
	rm -rf $(VENV) .nox build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
