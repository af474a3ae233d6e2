# install | lint | test | demo | bench | docs | checkpoints: the same words here and in CI. Needs Python 3.11+ with pip and a C++ compiler.
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .venv-uv/bin/uv)
BIN := .venv/bin
# SGLang imports 3,000 files in every process: without cached bytecode a server starts twice as slowly.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install lint test demo bench docs checkpoints clean

install: .venv/installed

.venv-uv/bin/uv:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .venv-uv uv

# nvidia-mathdx and cuda-tile are placeholders on PyPI that cannot be installed; nothing we use imports them.
.venv/installed: pyproject.toml requirements/engine.txt requirements/excludes.txt | $(filter .venv-uv/bin/uv,$(UV))
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	$(UV) pip install --quiet --python $(BIN)/python --excludes requirements/excludes.txt \
		--requirements requirements/engine.txt --group dev --group docs --editable .
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/audit.py

# Threads of two processes wait for each other longer than one thread takes. What starts servers runs apart: such a
# process adopts their orphans.
SERVERS := tests/docs tests/engine tests/guides
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile
test: install
	$(PYTEST) $(SERVERS:%=--ignore %)
	$(PYTEST) $(SERVERS)

demo: install
	$(BIN)/python examples/demo.py

bench: install
	$(BIN)/python benchmarks/run.py

docs: install
	$(BIN)/python -m scripts.docs.write
	$(BIN)/mkdocs build --strict --site-dir build/site

checkpoints:
	bash scripts/checkpoints/make.sh

clean:
	rm -rf .venv .venv-* build dist
