# Two commands on a fresh machine: `make demo [NAME=小明]` and `make test`.
PYTHON ?= python3
NAME ?= 小明
TORCH_INDEX ?=
PIP := .venv/bin/python -m pip install --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	touch $@

.PHONY: demo test test-slow test-gpu lint
demo: .venv/.installed
	.venv/bin/tnl demo --name '$(NAME)'

test: .venv/.dev
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.dev
	.venv/bin/python -m pytest -m slow --timeout=1800 -n 2 --dist loadfile

test-gpu: .venv/.dev
	.venv/bin/python -m pytest -m gpu

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
