# make demo: collect play, train Dreamer 4 in four phases, score it, write the report. make test: lint, types, tests.
# make probes: every agent that plays learns a world whose best policy is known.
# make page: the page of reverie play, in headless Chromium, on the run that make demo left.
# make docs: the plots and tables of the documentation, from results/*.json.
# make results [BUDGET=9m] [ONLY='dreamer_v3_small/*'] [DEVICE=cpu]: run the experiments that are not recorded yet.
# All set themselves up in .venv; they need Python 3.11 or newer, make and git.
PYTHON ?= $(shell for v in python3 python3.12 python3.11 python3.13; do \
  $$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$v && break; done)
BIN := .venv/bin
GAME ?= breakout
RUN := runs/demo-$(GAME)
DATA := datasets/demo-$(GAME)

.PHONY: demo test probes page results docs lint format clean

demo: .venv/ready
	@$(BIN)/reverie doctor
	@test -e $(DATA)/manifest.json || $(BIN)/reverie collect --env minatar/$(GAME) --kind mixed --frames 200e3 --out $(DATA)
	@$(BIN)/reverie train dreamer4_demo --env minatar/$(GAME) --data $(DATA) --out $(RUN)
	@$(BIN)/reverie train bc_demo --env minatar/$(GAME) --data $(DATA) --out $(RUN)-bc --add-to $(RUN)
	@echo 'play in its dream:  $(BIN)/reverie play $(RUN)'

test: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 --ignore tests/test_probes_online.py

probes: .venv/ready-dev
	$(BIN)/python -m pytest -n 2 --durations=15 tests/test_probes_online.py

page: .venv/ready-dev
	@test -e $(RUN)/config.json || { echo 'error: no run in $(RUN); make it with: make demo' >&2; exit 2; }
	REVERIE_DEMO_RUN=$(RUN) $(BIN)/python -m pytest tests/serve/test_page.py

results: .venv/ready
	@$(BIN)/python results/run.py $(if $(BUDGET),--budget $(BUDGET)) $(if $(ONLY),--only '$(ONLY)') $(if $(DEVICE),--device $(DEVICE))

docs: .venv/ready-dev
	$(BIN)/python results/plot.py
	$(BIN)/python results/tables.py

format: .venv/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo 'error: no Python 3.11 or newer found; set PYTHON=/path/to/python3' >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .jax_cache build dist
