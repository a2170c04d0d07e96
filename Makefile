# The targets that people and CI call. `make` alone lists them; nothing but python3, make and git is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# protoc finds its plug-in on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup check test demo bench bench-rivals bench-worker bench-round load load-growth soak picture rank-collapse theorem proto docs compose-test clean fuzz kills hunt flips histories

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## make .venv with everything that is needed here (again only after a change of the pins)

# torch comes first and pinned: a loose requirement would let pip look at several builds of gigabytes each.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed. Name one: make setup PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Making $(VENV) and installing into it (some minutes the first time)."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --upgrade pip
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) --editable '.[science,quantized,evaluation,tracking]' --group dev
	@touch $@

check: setup  ## formatting, lint, types, generated code, import table, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_wire.py tests/test_generated_code.py tests/test_docs.py
	$(BIN)/python docs/generate.py --check

test: setup  ## every test that needs no GPU and no Docker
	$(BIN)/python -m pytest

demo: setup  ## a real federation of five workers on this machine, about two minutes
	$(BIN)/raflora demo

fuzz: setup  ## hostile uploads and requests: make fuzz SEED=1 MUTANTS=1000000 REQUESTS=20000, or SEED=1 REPLAY=4711
	PYTHONPATH=tests:proto $(BIN)/python -m faults.fuzz_codec --seed $(or $(SEED),1) --mutants $(or $(MUTANTS),100000) $(if $(REPLAY),--replay $(REPLAY))
	$(if $(REPLAY),,PYTHONPATH=tests:proto $(BIN)/python -m faults.fuzz_requests --seed $(or $(SEED),1) --requests $(or $(REQUESTS),5000))

kills: setup  ## kill -9 at seeded steps, compared with an undisturbed run: make kills SEED=7 KILLS=1000
	PYTHONPATH=tests:proto $(BIN)/python -m faults.command --seed $(or $(SEED),7) --kills $(or $(KILLS),1000) --format $(or $(FORMAT),table)

flips: setup  ## one flipped byte of a dead coordinator's disk at a time: make flips SEED=7 TRIALS=1000
	PYTHONPATH=.:tests:proto $(BIN)/python -m faults.flip_bytes --seed $(or $(SEED),7) --trials $(or $(TRIALS),1000)

histories: setup  ## other histories than CI's, and more of them, against the models: make histories SEED=1 EXAMPLES=2000
	RAFLORA_TEST_HISTORIES=$(or $(EXAMPLES),2000) $(BIN)/python -m pytest -q --hypothesis-seed=$(or $(SEED),1) \
	  tests/scenarios/test_random_histories.py tests/scenarios/test_random_evaluations.py

hunt: setup  ## how many seeded kills find each planted bug: make hunt SEED=99
	PYTHONPATH=tests:proto $(BIN)/python -m faults.hunt --seed $(or $(SEED),99)

# The BLAS of both sides gets one thread: a ratio of two threads' work says little on a machine that does other things.
bench: setup  ## aggregation, transfer and rounds, ours and rivals' in turn, under fifteen minutes: make bench ONLY=rounds:empty
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(if $(ONLY),--only $(ONLY)) $(BENCH)

bench-rivals: setup  ## only make .venv-rivals, in which Flower, NVIDIA FLARE and chorus are measured (`make bench` does it, too)
	$(BIN)/python -m benchmarks.rivals

bench-worker: setup  ## a worker's training step against a bare PEFT loop, on the CPU, about a minute
	$(BIN)/python -m benchmarks.worker_step

bench-round: setup  ## what of a federated round is not training, on the CPU, about a minute
	$(BIN)/python -m benchmarks.worker_round

load: setup  ## many and large clients against a real coordinator: memory, handles, patience (Linux, about ten minutes)
	$(BIN)/python -m benchmarks.load.uploads
	$(BIN)/python -m benchmarks.load.stalled
	$(BIN)/python -m benchmarks.load.idle

load-growth: setup  ## how a round's cost grows with clients, ranks and modules, about ten minutes (Linux)
	$(BIN)/python -m benchmarks.load.growth

soak: setup  ## a federation with seeded trouble that must not grow: make soak MINUTES=60 SEED=1
	mkdir -p runs
	$(BIN)/python -m benchmarks.load.soak --minutes $(or $(MINUTES),60) --seed $(or $(SEED),1) --figure runs/soak.png

picture: setup  ## draw the README's picture anew from the last demo's results
	$(BIN)/python -m benchmarks.collapse_picture runs/demo/results.json docs/images/energy.png

rank-collapse: setup  ## BANKING77 with 40 clients, about five minutes: make rank-collapse RAFLORA_DATA=/folder/with/banking77
	$(BIN)/raflora compare rank-collapse $(if $(RAFLORA_DATA),--data $(RAFLORA_DATA))

theorem: setup  ## theorem 4.4 of the paper, measured, about two minutes
	$(BIN)/python -m benchmarks.theorem --figure docs/images/theorem.png

proto: setup  ## generate the protobuf code anew after a change of a .proto file
	$(BIN)/python proto/generate.py

docs: setup  ## write the generated pages of docs/ anew
	$(BIN)/python docs/generate.py

compose-test:  ## build the images and run a federation of containers (needs Docker)
	tests/compose/run.sh

clean:  ## remove .venv, .venv-rivals, caches and what runs left behind
	rm -rf $(VENV) .venv-rivals .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
