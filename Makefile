# memserve: `make serve` runs it, `make test` tests it. Everything lives in .venv; nothing is installed twice.
PYTHON ?= python3
# e.g. PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu' for the small CPU build of torch
PIP_ARGS ?=
# options for the server, e.g. ARGS='--port 9000 --prefill 2'
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)

.PHONY: install serve test check chaos gpu-check bench-engine bench-handoff bench-pool bench-load bench-router bench-routing clean

install: $(VENV)/.installed
	@:

serve: install
	@exec $(BIN)/memserve serve $(ARGS)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(ARGS)

# thirty kills and stops of workers under load instead of four; CHAOS_JSON=FILE keeps how long clients waited
chaos: $(VENV)/.installed-dev
	@CHAOS_EVENTS=$${CHAOS_EVENTS:-30} $(BIN)/python -m pytest -s --timeout 900 tests/e2e/test_chaos.py

# everything about GPUs, on the one at hand; a short table comes last
gpu-check: $(VENV)/.installed-dev
	@$(BIN)/python benchmarks/gpu_check.py $(ARGS)

bench-engine: $(VENV)/.installed-dev
	@$(BIN)/python benchmarks/engine.py $(ARGS)

bench-handoff: $(VENV)/.installed
	@$(BIN)/python benchmarks/handoff.py $(ARGS)

bench-pool: $(VENV)/.installed
	@$(BIN)/memserve bench pool $(ARGS)

bench-load: $(VENV)/.installed
	@$(BIN)/python benchmarks/load_generator.py $(ARGS)

bench-router: $(VENV)/.installed
	@$(BIN)/python benchmarks/router.py $(ARGS)

bench-routing: $(VENV)/.installed
	@$(BIN)/python benchmarks/routing.py $(ARGS)

check: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --diff .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memserve needs Python 3.11 or later; try PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "installing memserve into $(VENV) (torch is large: this can take some minutes the first time)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the test and development extras into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@
