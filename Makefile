# The commands to remember: install, demo, test, test-slow, lint, bench, faults.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# optional dependencies to install, from pyproject.toml
EXTRAS ?= dev
# class folders of your own photographs; empty: the photographs inside the scikit-image wheel
DATA ?=
# faults: folders of images to begin the damaged ones from
CORPUS ?=

.PHONY: install demo test test-slow lint bench bench-peers faults gpu

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	# opencv-python needs the desktop's libGL; where a bare machine has none, the same code without windows
	$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	  $(BIN)/python -m pip uninstall --yes opencv-python && \
	  $(BIN)/python -m pip install --constraint constraints.txt opencv-python-headless; }
	touch $@

demo: install
	$(BIN)/python tools/demo.py $(if $(DATA),'$(DATA)')

# every function, mostly in this process: a few minutes on two cores
test: install
	$(BIN)/python -m pytest -q -m 'not slow'

# whole trainings, builds, nodes and faults, in processes of their own
test-slow: install
	$(BIN)/python -m pytest -q -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: install
	$(BIN)/python tools/benchmark.py $(if $(DATA),'$(DATA)')

# other loaders beside ours, in an environment of their own; what does not install is named and left out
bench-peers: install
	$(PYTHON) -m venv .venv-peers
	grep -v '^#' tools/bench/peers.txt | while read -r package; do \
	  .venv-peers/bin/python -m pip install --quiet "$$package" || echo "$$package is not installed"; done
	$(BIN)/python tools/benchmark.py $(if $(DATA),'$(DATA)') --stage peers

faults: install
	PYTHONPATH=tests $(BIN)/python -m faults $(foreach folder,$(CORPUS),--corpus '$(folder)')

# on a machine with a GPU: its tests, then a short benchmark whose JSON and table can be pasted into an issue
gpu: install
	$(BIN)/python -m pytest -q -m gpu -rs
	$(BIN)/python tools/benchmark.py --rounds 1 $(foreach stage,lrn step load train ranks,--stage $(stage)) \
	  --json gpu.json $(if $(DATA),'$(DATA)')
