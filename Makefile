# Two commands do everything on a machine with python3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Test processes, of one thread each: faster than one process of two threads. Raise it on a machine with more cores.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help install demo test test-slow soak gpu lint format check docs audit clean $(VENV)

help:
	@echo "make install    create .venv with the package and everything the tests need"
	@echo "make demo       install, train Faster R-CNN on synthetic images, print its AP and the report's path"
	@echo "make test       install, run the tests"
	@echo "make test-slow  install, run all tests, including the long ones"
	@echo "make soak       install, kill and damage trainings, compare the results with undisturbed runs"
	@echo "make gpu        install, check the GPU: equality with the CPU, waits, resume, NCCL, speed beside its peers"
	@echo "make check      install, lint and test: what CI runs"
	@echo "make format     install, let ruff rewrite the sources"
	@echo "make docs       install, build the documentation in site/"
	@echo "make audit      install, look the packages in .venv up in the advisory databases (needs the network)"
	@echo "make clean      remove the virtual environment and caches; runs/ and datasets/ stay"

install: $(READY)

$(VENV): $(READY)

# The stamp is written last, so that an interrupted install starts again.
$(READY): setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "resbackbone needs Python 3.10 or newer; choose one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[all,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python tools/train_coco.py

test: $(READY)
	$(PYTEST)

test-slow: $(READY)
	$(PYTEST) -m 'slow or not slow'

soak: $(READY)
	$(BIN)/python tools/soak.py

gpu: $(READY)
	$(BIN)/python tools/gpu_check.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

audit: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet pip-audit
	$(BIN)/python -m pip_audit --skip-editable

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build site *.egg-info
