.PHONY: demo test test-gpu lint clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Everything fetched or built for the demo and the tests stays in the project.
export SQUEEZED_HOME ?= $(CURDIR)/.demo

demo: $(READY)
	$(BIN)/squeeze demo

test: lint $(READY)
	$(BIN)/python -m squeezed.demo.fetch
	TRITON_INTERPRET=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not gpu"

# On a machine with a CUDA device and torch, triton and transformers already installed.
test-gpu:
	$(PYTHON) -m pytest -m gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[evaluation]" --group dev
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
