# make demo: collect play, train Dreamer 4 in four phases, score it, write the report. make test: all checks.
# Both set themselves up in .venv; they need Python 3.11 or newer, make and git.
PYTHON ?= $(firstword $(foreach v,python3.12 python3.11 python3.13 python3,$(shell command -v $(v) 2>/dev/null)))
BIN := .venv/bin
GAME ?= breakout
RUN := runs/demo-$(GAME)
DATA := datasets/demo-$(GAME)

.PHONY: demo test lint format clean

demo: .venv/ready
	@$(BIN)/reverie doctor
	@test -e $(DATA)/manifest.json || $(BIN)/reverie collect --env minatar/$(GAME) --kind mixed --frames 200e3 \
	  --ppo-frames 200e3 --out $(DATA)
	@$(BIN)/reverie train dreamer4_demo --env minatar/$(GAME) --data $(DATA) --out $(RUN)

test: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

format: .venv/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .jax_cache build dist
