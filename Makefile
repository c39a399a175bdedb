# `make demo` and `make test` set up all they need in .venv.
PYTHON ?= python3
PY = .venv/bin/python

demo: .venv/demo
	$(PY) paper.py table3 fig1 fig2 --config tiny --out out/demo

test: .venv/dev
	$(PY) -m pytest -q tests

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy *.py

.venv/demo: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt matplotlib
	touch $@

.venv/dev: requirements.txt requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ .venv/demo

.PHONY: demo test lint
