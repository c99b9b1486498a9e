# `make quickstart` and `make test` are all a fresh machine needs; without make, type what they run.
PYTHON ?= python3

.PHONY: quickstart test

quickstart: .venv/installed
	.venv/bin/python launch/quickstart.py

test: .venv/installed-test
	.venv/bin/python -m pytest

.venv/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -e .
	touch $@

.venv/installed-test: .venv/installed
	.venv/bin/python -m pip install --quiet -e '.[test]'
	touch $@
