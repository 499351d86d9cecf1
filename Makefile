.PHONY: demo test test-gpu memcheck lint clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Everything fetched or built for the demo and the tests stays in the project.
export SQUEEZED_HOME ?= $(CURDIR)/.demo

demo: $(READY)
	$(BIN)/squeeze demo

# Tests are of one thread each.
PROCESSES ?= 2
test: lint $(READY)
	$(BIN)/python -m squeezed.demo.fetch
	TRITON_INTERPRET=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not gpu" -n $(PROCESSES) --dist worksteal

# On a machine with a CUDA device and torch, triton and transformers already installed. Most of the time is compiling:
# with pytest-xdist, `make test-gpu PYTEST_OPTIONS="-n 8"`.
test-gpu:
	$(PYTHON) -m pytest -m gpu $(PYTEST_OPTIONS)

# Every kernel once on small shapes, under the checker of memory accesses that comes with CUDA; JOBS processes at a time.
JOBS ?= 4
memcheck:
	mkdir -p build
	$(PYTHON) -m pytest -m gpu --collect-only tests/ops/test_triton.py tests/test_decode_kernels.py \
		-k "float64_attention_to or recalled or stand_ins_and_eight_bits_equal or merging or appending or products or peak or copy or copied" \
		> build/memcheck.txt
	grep :: build/memcheck.txt | PYTORCH_NO_CUDA_MEMORY_CACHING=1 xargs -d '\n' -P $(JOBS) -n 10 \
		compute-sanitizer --tool memcheck --error-exitcode 9 $(PYTHON) -m pytest -m gpu -x

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
