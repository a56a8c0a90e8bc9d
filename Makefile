# Two commands on a fresh machine: `make demo` and `make test`. Both build .venv once and are fast from then on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# By exact version and before all else: of this version a machine's package index may offer a CPU build, and any wish
# left open would bring gigabytes of CUDA libraries to machines without a GPU.
TORCH := torch==2.13.0
# In two processes: half of the time most tests wait for processes of their own. A file stays in one, for its fixtures; the
# longest files come first by their names.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help:  ## show this
	@echo "make demo    pretrain a small ViT with registers on photographs and evaluate it, in 4 to 6 minutes on a CPU"
	@echo "make test    all tests, the linter and the type checker; PYTEST_ARGS='tests/test_config.py -k base' for some"
	@echo "make lint    the linter and the type checker alone"
	@echo "make format  let the formatter write the files"
	@echo "make clean   remove .venv and what tools left behind"
	@echo "PYTHON=python3.12 make ... chooses the interpreter that .venv is made from (3.10 or newer)"

demo: $(VENV)/.demo  ## from photographs to one page: attention maps, losses, scores
	$(BIN)/dinoreg demo

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# A stamp for each set of packages, renewed when what it was made from changes.
$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(VENV)/.torch setup.py constraints.txt
	@echo "installing dinoreg[$*] into $(VENV)"
	@$(PIP) install --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(VENV)/.torch: constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "dinoreg needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
		"Choose another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "making $(VENV) with $(TORCH)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "no virtual environment could be made; Debian and Ubuntu have that in the package python3-venv"; exit 1; }
	@$(PIP) install --upgrade pip
	@$(PIP) install --constraint constraints.txt $(TORCH)
	@touch $@
