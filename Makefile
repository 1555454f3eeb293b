# Needs git, make and Python >= 3.11; everything else goes into .venv.
STUDY ?= cpu
PYTHON := $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help study test
help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*##  */make \1	/p' Makefile

study: .venv/.done  ## run params/cpu.yaml into results/cpu/, or another with STUDY=smoke; repeat to resume
	.venv/bin/python -m asym run params/$(STUDY).yaml

test: export ASYM_PROGRESS = off
test: .venv/.done  ## lint, unit tests, and all notebooks at their default parameters
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/python -m pytest -n 2
	ASYM_RUNS=$$(mktemp -d) .venv/bin/python -m pytest --nbval-lax notebooks/

.venv/.done: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with ensurepip found; install it, or: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -c constraints.txt -e .[test]
	touch $@
