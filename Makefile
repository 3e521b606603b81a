# make demo: collect play, train Dreamer 4 in four phases, score it, write the report. make test: lint, types, tests.
# make doom: fetch Freedoom and an engine, render people's demos, learn a world model of them; under an hour.
# make test-extras: external packages, and what another Python or JAX could break, on Python 3.12 with the newest JAX
#   in .venv-extras; whatever cannot be installed is said and skipped.
# make probes: every agent that plays learns a world whose best policy is known; the code of README.md and
#   docs/EXTENDING.md runs as it stands; commands are killed, run again and end as if nothing had been.
# make faults: kills, damaged files and odd command lines, each followed by a command; twenty to forty minutes.
# make page: the page of reverie play, in headless Chromium, on the run that make demo left.
# make docs: the plots and tables of the documentation, from results/*.json.
# make results [BUDGET=9m] [ONLY='dreamer_v3_small/*'] [DEVICE=cpu]: run the experiments that are not recorded yet.
# All set themselves up in .venv; they need Python 3.11 or newer, make and git.
PYTHON ?= $(shell for v in python3 python3.12 python3.11 python3.13; do \
  $$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$v && break; done)
PYTHON312 ?= $(shell for v in python3.12 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python3 python3; do \
  $$v -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$v && break; done)
BIN := .venv/bin
EXTRAS := atari,attention,crafter,dmc,gymnasium,lpips,tensorboard,video,wandb
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15
GAME ?= breakout
RUN := runs/demo-$(GAME)
DATA := datasets/demo-$(GAME)

.PHONY: demo doom test test-extras probes faults page results docs lint format clean

demo: .venv/ready
	@$(BIN)/reverie doctor
	@test -e $(DATA)/manifest.json || $(BIN)/reverie collect --env minatar/$(GAME) --kind mixed --frames 200e3 --out $(DATA)
	@$(BIN)/reverie train dreamer4_demo --env minatar/$(GAME) --data $(DATA) --out $(RUN)
	@$(BIN)/reverie train bc_demo --env minatar/$(GAME) --data $(DATA) --out $(RUN)-bc --add-to $(RUN)
	@echo 'play in its dream:  $(BIN)/reverie play $(RUN)'

doom: .venv/ready
	@$(BIN)/python -m pip install --quiet --editable '.[video,lpips]'
	@$(BIN)/python examples/doom/fetch.py --into .doom/packages
	@$(BIN)/python examples/doom/render.py --packages .doom/packages --out .doom/clips
	@$(BIN)/python examples/doom/mirror.py .doom/clips
	@test -e datasets/doom/manifest.json || $(BIN)/reverie data import video .doom/clips --out datasets/doom \
	  --size 64x64 --fit stretch --holdout MAP10 --name doom
	@$(BIN)/reverie train dreamer4_image --data datasets/doom --out runs/doom
	@$(BIN)/python examples/doom/measure.py runs/doom
	@echo 'walk in its dream:  $(BIN)/reverie play runs/doom'

test: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python $(PYTEST) -m 'not (probe or docs or whole or page)'

test-extras:
	@test -n "$(PYTHON312)" || echo 'test-extras: skipped, no Python 3.12 found; set PYTHON312=/path/to/python3.12' >&2
	@test -z "$(PYTHON312)" || $(MAKE) --no-print-directory .venv-extras/ready
	@test -z "$(PYTHON312)" || WANDB_MODE=offline .venv-extras/bin/python $(PYTEST) -rs -m 'external or compat'

probes: .venv/ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations=15 -m 'probe or docs or whole'

faults: .venv/ready-dev
	$(BIN)/python benchmarks/faults.py --results results/bench/faults.json

page: .venv/ready-dev
	@test -e $(RUN)/config.json || { echo 'error: no run in $(RUN); make it with: make demo' >&2; exit 2; }
	REVERIE_DEMO_RUN=$(RUN) $(BIN)/python -m pytest -m page tests/serve

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

# gymnax asks for JAX below 0.12; its test runs with 0.12 too.
.venv-extras/ready: pyproject.toml
	$(PYTHON312) -m venv .venv-extras
	.venv-extras/bin/python -m pip install --quiet --upgrade pip
	.venv-extras/bin/python -m pip install --quiet --editable '.[dev,$(EXTRAS)]' || \
	  for extra in dev $$(echo $(EXTRAS) | tr , ' '); do \
	  .venv-extras/bin/python -m pip install --quiet --editable ".[$$extra]" || \
	  echo "test-extras: the extra $$extra cannot be installed; its tests are skipped" >&2; done
	.venv-extras/bin/python -m pip install --quiet --no-deps 'gymnax>=1.0.1' seaborn || \
	  echo 'test-extras: the extra gymnax cannot be installed; its tests are skipped' >&2
	.venv-extras/bin/python -m pip list --format freeze | grep -iE '^(jax|jaxlib|flax|tokamax|numpy)=='
	@touch $@

clean:
	rm -rf .venv .venv-extras .jax_cache build dist
