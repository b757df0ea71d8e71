# Two commands are enough: `make quickstart` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install install-vllm install-agents install-neighbours install-ray quickstart test test-kernels test-slow test-hostile test-peer test-vllm test-agents test-neighbours test-ranks test-ray test-verifiers bench gpu-checks lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/opdkit quickstart --out quickstart $(ARGS)

# Many tests start processes, which start sooner where bytecode is kept.
test: install
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 2 --dist loadfile

# With the arithmetic of other processors, one after another: about eight times as long.
test-kernels: install
	tests/kernels.sh $(ARGS)

# vLLM for a CPU, in an environment of its own; on a GPU `pip install vllm` beside opdkit does.
install-vllm: .venv-vllm/installed

.venv-vllm/installed: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

test-vllm: install-vllm
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -m vllm tests/vllm tests/end_to_end/test_kinds.py

# TextWorld, ScienceWorld and gymnasium, in an environment of their own. ScienceWorld's simulator is a Java program: a Java runtime
# comes from the system's packages, such as `apt-get install default-jre-headless`.
install-agents: .venv-agents/installed

.venv-agents/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-agents
	.venv-agents/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,agents]'
	touch $@

test-agents: install-agents
	OMP_NUM_THREADS=1 .venv-agents/bin/python -m pytest -q -m agents tests/environments

# Tasks of gymnasium with MuJoCo, and stable-baselines3, in an environment of their own.
install-neighbours: .venv-neighbours/installed

.venv-neighbours/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-neighbours
	.venv-neighbours/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,neighbours]'
	touch $@

test-neighbours: install-neighbours
	OMP_NUM_THREADS=1 .venv-neighbours/bin/python -m pytest -q -m neighbours tests/neighbours

# Every method on two and three processes of this machine.
test-ranks: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m ranks tests

# Ray, in an environment of its own: clusters of actors on this machine, some of which are killed.
install-ray: .venv-ray/installed

.venv-ray/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,ray]'
	touch $@

test-ray: install-ray
	OMP_NUM_THREADS=1 .venv-ray/bin/python -m pytest -q -s -m ray tests/run/cluster

# The library verifiers wants other versions than the rest of the project, so it has an environment of its own too.
.venv-verifiers/installed: pyproject.toml
	$(PYTHON) -m venv .venv-verifiers
	.venv-verifiers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 pytest --editable '.[rewards,verifiers]'
	touch $@

test-verifiers: .venv-verifiers/installed
	OMP_NUM_THREADS=1 .venv-verifiers/bin/python -m pytest -q -m verifiers tests/environments/test_verifiers.py

test-slow: install
	$(BIN)/python -m pytest -q -m slow

# Malformed inputs, resumes, pairs of processes, kills, faults, sandbox attempts; prints its figures.
test-hostile: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m hostile tests/hostile $(ARGS)

test-peer: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps trl==1.16.0
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m peer

bench: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps trl==1.16.0
	for name in vs_trl head head_types sampler episodes scaling checkpoints; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# Everything that needs GPUs, in less than 12 minutes on 1 to 8 of them; `ARGS='--small --device cpu'` tries the same code without one.
gpu-checks: install
	$(BIN)/python benchmarks/gpu/all.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-vllm .venv-agents .venv-neighbours .venv-ray .venv-verifiers quickstart build dist *.egg-info
