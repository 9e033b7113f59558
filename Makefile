# `make demo` and `make test` need Python, git and make; each makes its environment first.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2  # pytest processes
RUN := $(VENV)/bin/python

.PHONY: demo test aot lint clean

demo: $(VENV)/ready
	$(RUN) examples/train_digits.py --out out/demo.png

# The second run has eight CPU devices, which have to be asked for before JAX starts.
test: $(VENV)/ready
	$(RUN) -m pytest -n $(WORKERS) tests
	$(RUN) -m pytest -n $(WORKERS) tests/devices
	$(RUN) -m pytest --doctest-modules jax_bn

# Counts memory traffic on an H200 and on TPUs, with their compilers, which need no such device but
# 1.3 GB of packages: in an environment of their own, since JAX looks for a device once they are there.
aot: $(VENV)-aot/ready
	$(VENV)-aot/bin/python -m pytest tests/aot --need-compilers

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

$(VENV)-aot/ready: $(VENV)/ready
	$(PYTHON) -m venv $(VENV)-aot
	$(VENV)-aot/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-aot/bin/python -m pip install --quiet --editable '.[aot]'
	touch $@

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  'jax_bn needs Python 3.11 or later; name one: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv* out dist
