# Every target does its own set-up; nothing but Python 3.11+ and make is needed.
# Tests run in processes of one thread each: more threads than cores wait for each other. Those of
# faults mostly wait for clocks and disks, so there are more of them, which take work from each other.
PYTHON ?= python3
BIN := .venv/bin
FAULTS ?= faults
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: setup run run-smollm2 test test-fast test-faults test-stack lint bench clean

setup: .venv/.ready
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

run: setup
	$(BIN)/sdft learn examples/quickstart/curriculum.yaml

run-smollm2: setup
	$(BIN)/python examples/smollm2/fetch_model.py
	$(BIN)/sdft learn examples/smollm2/curriculum.yaml

test: setup
	$(PYTEST) -n 2 -m 'not faults and not stack'

test-fast: setup
	$(PYTEST) -n 2 -m 'not slow'

test-faults: setup
	$(PYTEST) -n 3 --dist worksteal -m '$(FAULTS)' tests/faults

test-stack: setup
	$(PYTEST) -n 2 --dist loadfile -m stack

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup
	$(BIN)/python benchmarks/verify_lineage.py
	rm -rf .sdft/bench
	$(BIN)/python benchmarks/retention_sweep.py examples/quickstart/curriculum.yaml .sdft/bench \
		--arms sdft:2e-4 sft:2e-4 --seeds 0
	$(BIN)/python benchmarks/durability.py
	-$(BIN)/python benchmarks/orchestration.py # needs PostgreSQL
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python examples/smollm2/fetch_model.py
	$(BIN)/python benchmarks/peer_loss.py
	$(BIN)/python benchmarks/peer.py --model pocket
	$(BIN)/python benchmarks/peer.py --model smollm2-tools --rounds 1
	$(BIN)/python benchmarks/peer.py --model smollm2 --lora
	$(BIN)/python benchmarks/peer.py --model smollm2

clean:
	rm -rf .venv .sdft
