# Two commands: `make demo` and `make test`. Both set up .venv first, once; neither needs more than Python 3.11 and PyPI.
# `make test-zoo` prunes real timm families as well, and makes them elastic, at random weights; it takes minutes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What the tests run on. `rtx` is TensorRT-RTX, a wheel under NVIDIA's licence: leave it out if you do not accept that,
# and its tests are skipped with a message.
EXTRAS ?= cpu,openvino,rtx,dev

.PHONY: demo test test-zoo lint types clean

demo: $(READY)
	$(BIN)/slim demo

test: lint types
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-zoo: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m zoo tests/zoo

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

# uv does in seconds what pip does in minutes, but pip is enough.
$(READY): pyproject.toml setup.py
	@echo "TensorRT-RTX (extra rtx) comes under NVIDIA's licence; EXTRAS=cpu,openvino,dev leaves it out."
	@echo "Setting up $(VENV): torch, timm and the rest are about 5 GB, which takes a few minutes, once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if command -v uv >/dev/null; then \
		uv pip install --python $(BIN)/python --editable '.[$(EXTRAS)]'; \
	else \
		$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$(EXTRAS)]'; \
	fi
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info runs
