# The commands to remember: install, demo, test, test-slow, lint, bench, faults, gpu.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# the CUDA that torch is built for (docs/gpu.md), at first cuda13, later the one that is installed
STACK ?= $(or $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*))),cuda13)
# optional dependencies to install, from pyproject.toml
EXTRAS ?= dev
# class folders of your own photographs; empty: the photographs in the scikit-image wheel
DATA ?=
# faults: folders of images that the damaged images are made from
CORPUS ?=

.PHONY: install demo test test-slow lint bench bench-peers faults gpu

# the pins and the oldest NVIDIA driver of each stack
PINS_cuda12 = grep -vE '^(torch|torchvision|triton)==' constraints.txt | cat - constraints-cuda12.txt
PINS_cuda13 = cat constraints.txt
DRIVER_cuda12 = 525
DRIVER_cuda13 = 580
ifeq ($(DRIVER_$(STACK)),)
$(error STACK is $(STACK): use cuda12 or cuda13)
endif

# one line if the driver is too old for the stack; without a driver nothing
define CHECK_DRIVER
@driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1); \
case $${driver%%.*} in ''|*[!0-9]*) exit ;; esac; \
if [ $${driver%%.*} -lt $(DRIVER_cuda12) ]; then remedy="update the driver"; \
elif [ $${driver%%.*} -lt $(DRIVER_$(STACK)) ]; then remedy="type 'make install STACK=cuda12'"; \
else exit 0; fi; \
echo "NVIDIA driver $$driver is too old for the stack $(STACK), which needs $(DRIVER_$(STACK)) or later: $$remedy" >&2
endef

install: $(VENV)/.installed-$(STACK)
	$(CHECK_DRIVER)

$(VENV)/.installed-$(STACK): pyproject.toml constraints.txt constraints-cuda12.txt
	$(CHECK_DRIVER)
	$(PYTHON) -m venv $(VENV)
	$(PINS_$(STACK)) > $(VENV)/pins.txt
	$(BIN)/python -m pip install --constraint $(VENV)/pins.txt --editable '.[$(EXTRAS)]'
	# opencv-python needs libGL; without it, install the same code without windows
	$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	  $(BIN)/python -m pip uninstall --yes opencv-python && \
	  $(BIN)/python -m pip install --constraint $(VENV)/pins.txt opencv-python-headless; }
	rm -f $(VENV)/.installed-*
	touch $@

demo: install
	$(BIN)/python tools/demo.py $(if $(DATA),'$(DATA)')

# tests that run mostly in one process: a few minutes on two cores
test: install
	$(BIN)/python -m pytest -q -m 'not slow'

# trainings, builds, nodes and faults in processes of their own
test-slow: install
	$(BIN)/python -m pytest -q -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: install
	$(BIN)/python tools/benchmark.py $(if $(DATA),'$(DATA)')

# other loaders and writers beside ours, in an environment of their own; names packages that do not install
bench-peers: install
	$(PYTHON) -m venv .venv-peers
	grep -v '^#' tools/bench/peers.txt | while read -r package; do \
	  .venv-peers/bin/python -m pip install --quiet "$$package" || echo "$$package is not installed"; done
	$(BIN)/python tools/benchmark.py $(if $(DATA),'$(DATA)') --stage peers

faults: install
	PYTHONPATH=tests $(BIN)/python -m faults $(foreach folder,$(CORPUS),--corpus '$(folder)')

# on a machine with a GPU: its tests, then a short benchmark; ends with one block that can be pasted into an issue
gpu: install
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('torch finds no GPU: see docs/gpu.md')"
	@mkdir -p build
	$(BIN)/python -m pytest -q -m gpu -rfE --tb=short > build/gpu-tests.txt 2>&1; failed=$$?; cat build/gpu-tests.txt; \
	$(BIN)/python tools/benchmark.py $(if $(DATA),'$(DATA)') --rounds 1 --json build/gpu.json \
	  $(foreach stage,lrn step layers load train ranks,--stage $(stage)) --issue build/gpu-tests.txt && exit $$failed
