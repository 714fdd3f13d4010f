PYTHON ?= python3
VENV := .venv

.PHONY: env demo test lint clean

env: $(VENV)/.done

$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: env  ## builds the environment, then runs the embedded example
	$(VENV)/bin/python -m fna_lab attn=fna mask=type2

test: env  ## builds the environment, then runs the tests
	$(VENV)/bin/python -m pytest

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) outputs
