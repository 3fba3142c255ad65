# Everything a newcomer needs is `make run` and `make test`. Each installs into .venv first; a second call starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install run test lint bench docs wheel oldest clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch torchvision
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[recipes,report,test,lint]'
	touch $(STAMP)

run: $(STAMP)  ## train a small language model with DiLoCo and with DDP, side by side
	$(BIN)/python -m recipes.demo

# Whole files go to one of two processes: many start processes of their own, so more would not be faster.
PARALLEL ?= -n 2 --dist loadfile

test: $(STAMP)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# LINK_TOOL: a program that starts ranks behind links of a given speed; without it only the unlimited case runs.
LINK_TOOL ?= $(wildcard ../shared/tools/slownet)

bench: $(STAMP)  ## step times and bytes beside DDP's, also behind 100 and 20 Mbit/s; gossip from 4 to 16 ranks; compressors, PowerSGD, budgets
	$(BIN)/python -m benchmarks.step_time $(if $(LINK_TOOL),--link-tool $(LINK_TOOL))
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gossip_scaling
	$(BIN)/python -m benchmarks.compressors --sizes 1000000 --seconds 0.1
	$(BIN)/python -m benchmarks.powersgd
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.budgets --steps 60 --every 20

docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

wheel: $(STAMP)  ## build the wheel, install it in an environment of its own, import it and run the README's blocks
	rm -rf build dist .venv-wheel
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q -c constraints.txt torch torchvision
	.venv-wheel/bin/python -m pip install -q -c constraints.txt "$$(ls dist/*.whl)[test]"
	cd dist && ../.venv-wheel/bin/python -m pytest -q -p no:cacheprovider -c ../pyproject.toml ../tests/test_readme.py

oldest: ## the suite on the oldest versions that pyproject.toml claims
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e '.[recipes,report,test]'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(PARALLEL)

clean:
	rm -rf $(VENV) .venv-wheel .venv-oldest build dist site runs
