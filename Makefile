# Everything runs in .venv, made on first use. PYTHON and TORCH can be given: make test PYTHON=python3.12 TORCH=2.12.0
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
DATASET ?= digits
ROOT ?=
OUT ?= demo_output

# Files of tests at a time, each in a process of its own.
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# Threads that wait leave their core to the other process.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
# Stamps are named after what they hold, so that another torch makes a new installation.
BASE := $(VENV)/.torch-$(TORCH)

.PHONY: demo cora tox21 toxcast qm8 shared mimo test test-sanitized test-scatter lint format bench docs clean

demo: $(VENV)/.demo-$(TORCH)
	$(BIN)/python examples/demo.py --dataset $(DATASET) $(if $(ROOT),--root $(ROOT)) --out $(OUT)

# ROOT holds Cora/raw/ind.cora.*; without it, the graph of the digits.
cora: $(VENV)/.demo-$(TORCH)
	$(BIN)/python examples/cora_tasks.py $(if $(ROOT),--root $(ROOT)) --out $(OUT)/cora_tasks

# ROOT holds tox21/tox21.npz, or gets PyG's MoleculeNet.
tox21: $(VENV)/.demo-$(TORCH)
	$(BIN)/python examples/tox21.py $(if $(ROOT),--root $(ROOT)) --out $(OUT)/tox21

# ROOT holds toxcast/toxcast.npz, or gets PyG's MoleculeNet.
toxcast: $(VENV)/.demo-$(TORCH)
	$(BIN)/python examples/toxcast.py $(if $(ROOT),--root $(ROOT)) --out $(OUT)/toxcast

# ROOT holds qm8/qm8.npz.
qm8: $(VENV)/.demo-$(TORCH)
	$(BIN)/python examples/qm8.py $(if $(ROOT),--root $(ROOT)) --out $(OUT)/qm8

# ROOT holds Cora/raw/ind.cora.*.
shared: $(VENV)/.demo-$(TORCH)
	$(BIN)/python examples/shared_representation.py $(if $(ROOT),--root $(ROOT))

# ROOT holds Cora/raw/ind.cora.* and CiteSeer/raw/ind.citeseer.*.
mimo: $(VENV)/.demo-$(TORCH)
	$(BIN)/python examples/mimo.py $(if $(ROOT),--root $(ROOT))

test: $(VENV)/.test-$(TORCH)
	$(PYTEST)

# Values of the emulated CUDA kernels, in a library with AddressSanitizer and UndefinedBehaviorSanitizer.
test-sanitized: $(VENV)/.test-$(TORCH)
	MTL_TEST_SANITIZED=1 $(BIN)/python -m pytest tests/test_cuda_contract.py -k sanitizers

# Tests in which PyG scatters or aggregates, with torch_scatter installed, which it then uses for that.
SCATTER_TESTS := $(wildcard $(foreach name,adjacency aggregate conv* cora_tasks demo heads loader mimo_example model* qm8 \
  shared_representation tox21 toxcast,tests/test_$(name).py))

test-scatter: $(VENV)/.scatter-$(TORCH)
	$(PYTEST) $(SCATTER_TESTS)

lint: $(VENV)/.lint-$(TORCH)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.lint-$(TORCH)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/.test-$(TORCH)
	$(BIN)/python benchmarks/bench_heads.py
	$(BIN)/python benchmarks/bench_loss.py
	$(BIN)/python benchmarks/bench_balancing.py
	$(BIN)/python benchmarks/bench_group_edges.py
	$(BIN)/python benchmarks/bench_conv.py
	$(BIN)/python benchmarks/bench_routed.py
	$(BIN)/python benchmarks/bench_mlp.py
	$(BIN)/python benchmarks/bench_small.py

# The snippets of README.md and docs/ run as tests.
docs: $(VENV)/.test-$(TORCH)
	$(BIN)/python -m pytest tests/test_docs.py

# torch first and by itself: a plain dependency on it could bring a build for another device.
$(BASE):
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==$(TORCH)
	touch $@

$(VENV)/.demo-$(TORCH): $(BASE) pyproject.toml
	$(PIP) install torch==$(TORCH) -e '.[demo]'
	touch $@

$(VENV)/.test-$(TORCH): $(BASE) pyproject.toml
	$(PIP) install torch==$(TORCH) -e '.[test]'
	touch $@

$(VENV)/.lint-$(TORCH): $(VENV)/.test-$(TORCH)
	$(PIP) install torch==$(TORCH) -e '.[test,lint]'
	touch $@

# torch_scatter comes as sources: two of its libraries at a time, and not optimised, as tests need values alone.
SCATTER_BUILD := FORCE_ONLY_CPU=1 MAX_JOBS=1 DIST_EXTRA_CONFIG=$(CURDIR)/$(VENV)/parallel.cfg CXX=$(CURDIR)/$(VENV)/c++-O0

$(VENV)/.scatter-$(TORCH): $(VENV)/.test-$(TORCH)
	printf '[build_ext]\nparallel = $(JOBS)\n' > $(VENV)/parallel.cfg
	printf '#!/bin/sh\nexec $(CXX) "$$@" -O0\n' > $(VENV)/c++-O0
	chmod +x $(VENV)/c++-O0
	$(SCATTER_BUILD) $(PIP) install --no-build-isolation torch==$(TORCH) -e '.[test,scatter]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output torch_mtl_pyg/_C.*
