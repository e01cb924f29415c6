# Each target does what a reader could type: see README.md.
PYTHON ?= $(shell command -v python3.11 >/dev/null && echo python3.11 || echo python3)
RUN = .venv/bin/python -m

.PHONY: quickstart test bench lint format

quickstart: .venv/installed
	$(RUN) suites.run quickstart --methods base,full,lora,spiel

test: lint
	$(RUN) pytest -n 2 --dist worksteal

bench: .venv/installed
	$(RUN) pytest tests/benchmarks -s --benchmark-json=results/benchmarks.json

lint: .venv/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: .venv/installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) pip install -c constraints.txt -e ".[test]"
	touch $@
