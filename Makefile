# make demo       install, generate the demo corpus, train three tasks on two processes
# make test       install, then ruff, mypy and the tests but for the long ones: 14 minutes on two cores with other work on them
# make test-rest  the long ones: every engine with every setting, every launch file, jobs on a SLURM cluster: 12 more
# make test-all   both
# make setup      the install alone; does nothing the second time

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-rest test-all lint clean

setup: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/mtl-dist corpus data/demo
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu_2proc.yaml \
		-m mtl_dist train configs/demo.yaml distributed.processes=2 --overwrite

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not long"

test-rest: setup
	$(BIN)/python -m pytest -m long

test-all: test test-rest

clean:
	rm -rf .venv data/demo runs/demo
