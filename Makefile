# make demo  sets up and answers a question about a picture; make test  sets up and passes the tests; make lint
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# For development and CI; users bring their own torch. torchvision, which the tests need, may replace it by its own match.
TORCH ?= torch==2.13.0
BUNDLE := out/tiny

.PHONY: demo test lint format bundle clean

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(READY)

$(BUNDLE)/trio.json: $(READY) $(wildcard export/tiny/*)
	$(BIN)/trio-export tiny --out $(BUNDLE) --dtype float32 --max-text 64 --max-new-tokens 16 --force

bundle: $(BUNDLE)/trio.json

demo: $(BUNDLE)/trio.json
	$(BIN)/python examples/demo.py --bundle $(BUNDLE) --out out

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf out/typed && $(BIN)/python -m pip install --quiet --no-deps --target out/typed .
	MYPYPATH=out/typed $(BIN)/mypy --explicit-package-bases -p trio_edge

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out build dist
