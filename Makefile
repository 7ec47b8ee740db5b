# Two commands do everything on a machine with python3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# The tests' processes, of one thread each (sooner done than one process of two threads); more cores, more of them.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help install demo test test-slow soak gpu lint format check docs audit clean $(VENV)

help:
	@echo "make demo       install, train Faster R-CNN on the built-in data set, print its AP and where the pictures are"
	@echo "make test       install, run the tests"
	@echo "make test-slow  install, run all tests, the long ones too"
	@echo "make soak       install, kill and break trainings and compare what comes of them with runs left alone"
	@echo "make gpu        install, check the GPU: equality with the CPU, waits, resume, NCCL, speed beside the peers"
	@echo "make check      install, lint and test: what CI runs"
	@echo "make format     let ruff rewrite the sources"
	@echo "make docs       install, build the documentation in site/"
	@echo "make audit      install, ask the advisory databases about the packages in .venv (needs the network)"
	@echo "make clean      remove the virtual environment and caches (runs/ and datasets/ stay)"

install: $(READY)

$(VENV): $(READY)

# The stamp is written last, so an install that was interrupted starts again.
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
