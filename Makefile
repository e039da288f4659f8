# make demo     everything once, from nothing: set-up, data, training on two ranks, evaluation, export, search
# make test     set-up and the tests            make lint    format, lint and types
# make test-long  the campaigns too             make bench   reading, dynamic ids, checkpoints, as ratios
# make test-cluster  on Slurm and several hosts, which it makes on this machine; as root, where .ci/run says what to install
# make install  set-up alone; DEVICE=cuda on a GPU machine
.DEFAULT_GOAL := help
.PHONY: help install torch demo test test-long test-cluster bench lint format clean

PYTHON ?= python3
DEVICE ?= cpu
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
STAMP  := $(VENV)/installed-$(DEVICE)
TORCH_STAMP := $(VENV)/torch-$(DEVICE)
# What pyproject.toml calls extras. Those of who works on the code unless given; an image has none: make install EXTRAS=
EXTRAS ?= [dev]

# These three fit together; any other pair dies on import. torchrec comes without its dependencies, because it asks for the
# CUDA build of FBGEMM, which would overwrite the CPU build.
TORCH      := torch==2.13.0
TORCHREC   := torchrec==1.8.0
FBGEMM_cpu := fbgemm-gpu-cpu==1.8.0
FBGEMM_cuda := fbgemm-gpu==1.8.0
# Where pip looks for torch, if not where it always looks: the CPU build is 200 MB, the default one on Linux several GB.
TORCH_INDEX ?=

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(STAMP)

# The large part, alone: a layer of an image.
torch: $(TORCH_STAMP)

$(TORCH_STAMP): Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "triptych needs Python 3.10 or newer; give one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -n "$(FBGEMM_$(DEVICE))" || { echo "DEVICE=$(DEVICE): use cpu or cuda" >&2; exit 1; }
	@echo "setting up $(VENV) for $(DEVICE) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) uninstall -q -y fbgemm-gpu fbgemm-gpu-cpu 2>/dev/null
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install -q --no-deps $(TORCHREC) $(FBGEMM_$(DEVICE))
	@rm -f $(VENV)/torch-*
	@touch $@

$(STAMP): $(TORCH_STAMP) pyproject.toml
	$(PIP) install -q --no-warn-conflicts -e '.$(EXTRAS)'
	$(BIN)/triptych --help > /dev/null
	@rm -f $(VENV)/installed-*
	@touch $@

demo: install
	$(BIN)/triptych demo --run runs/demo

# Processes that run tests, a file at a time. Each may start three ranks, of half a gigabyte.
TEST_JOBS ?= 2

test: install
	$(BIN)/python -m pytest -m "not long" --ignore=tests/cluster -n $(TEST_JOBS) --dist loadfile

test-long: install
	TRIPTYCH_TEST_RANKS=spawn $(BIN)/python -m pytest

test-cluster: install
	$(BIN)/python -m pytest -m "not long" tests/cluster

bench: install
	$(BIN)/python -m tests.benchmarks.reading
	$(BIN)/python -m tests.benchmarks.dynamic
	$(BIN)/python -m tests.benchmarks.checkpoints

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p .mypy_cache/as && ln -sfn ../.. .mypy_cache/as/triptych
	cd .mypy_cache/as && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p triptych.datasets -p triptych.embeddings -p triptych.mmoe -p triptych.launch

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
