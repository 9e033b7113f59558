# `make demo` and `make test` need Python, git and make; each makes its environment first.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2  # pytest processes
LONG ?=  # anything: the tests that take long as well, as in the gate
RUN := $(VENV)/bin/python
TEST := $(RUN) -m pytest -n $(WORKERS)
CHOSEN := $(if $(strip $(LONG)),,-m "not long")

.PHONY: demo test fuzz coverage aot peers kill mutants notebooks notebooks-write docs lint audit \
  clean

demo: $(VENV)/ready
	$(RUN) examples/train_digits.py --out out/demo.png

# The second run has eight CPU devices, which have to be asked for before JAX starts.
test: $(VENV)/ready
	$(TEST) $(CHOSEN) tests
	$(TEST) $(CHOSEN) tests/devices
	$(TEST) $(CHOSEN) tests/kernels
	$(RUN) -m pytest --doctest-modules jax_bn

# Draws a thousand examples for each property, where `make test` draws eight; FUZZ_POOL=1 other calls.
fuzz: $(VENV)/ready
	HYPOTHESIS_PROFILE=long $(RUN) -m pytest --hypothesis-show-statistics tests/test_properties*.py
	HYPOTHESIS_PROFILE=long $(RUN) -m pytest --hypothesis-show-statistics \
	  tests/devices/test_properties.py

# Which lines and branches of jax_bn all the tests together miss; fails below the bound in
# pyproject.toml.
coverage: $(VENV)/ready
	$(RUN) -m coverage erase
	$(RUN) -m coverage run -m pytest -n $(WORKERS) tests
	$(RUN) -m coverage run -m pytest -n $(WORKERS) tests/devices
	$(RUN) -m coverage run -m pytest -n $(WORKERS) tests/kernels
	$(RUN) -m coverage combine --quiet
	$(RUN) -m coverage report

# Counts memory traffic on an H200 and on TPUs, with their compilers, which need no such device but
# 1.3 GB of packages: in an environment of their own, since JAX looks for a device once they are there.
aot: $(VENV)-aot/ready
	$(VENV)-aot/bin/python -m pytest -n $(WORKERS) --dist loadgroup tests/aot --need-compilers

# Trains and converts beside PyTorch, Haiku, Equinox and published models. `make test` skips these.
PEERS := $(VENV)-peers/bin/python
peers: $(VENV)-peers/ready
	$(PEERS) -m pytest -n $(WORKERS) tests/test_torch.py tests/test_replace_found.py
	$(PEERS) -m pytest tests/test_examples.py -k frameworks

# Kills each training example twenty times at random moments, and compares with a run left alone.
kill: $(VENV)/ready
	$(RUN) examples/kill_and_resume.py --example gan_r1
	$(RUN) examples/kill_and_resume.py --example train_resnet

# Changes a copy of the rules and the stages in one place at a time, and lists the changes that no test
# notices. Goes on where it was interrupted; `rm -r out/mutants` begins anew. See tests/mutants.md.
MUTANTS := out/mutants
IN_MUTANTS := cd $(MUTANTS) && PATH="$(abspath $(VENV)-mutants/bin):$$PATH"
mutants: export JAX_COMPILATION_CACHE_DIR := $(abspath $(MUTANTS)/compiled)
mutants: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
mutants: $(MUTANTS)/session.sqlite
	$(IN_MUTANTS) cosmic-ray exec tests/mutants.toml session.sqlite
	$(IN_MUTANTS) cr-report --surviving-only --show-diff session.sqlite

$(MUTANTS)/session.sqlite: $(VENV)-mutants/ready
	rm -rf $(MUTANTS) && mkdir -p $(MUTANTS)
	cp -r jax_bn tests benchmarks examples pyproject.toml $(MUTANTS)
	$(IN_MUTANTS) cosmic-ray baseline tests/mutants.toml
	$(IN_MUTANTS) cosmic-ray init tests/mutants.toml new.sqlite
	$(IN_MUTANTS) cr-filter-operators new.sqlite tests/mutants.toml
	mv $(MUTANTS)/new.sqlite $@

# Runs the notebooks from clean kernels: fails if a cell does or warns, or prints what is not committed.
DOCS := $(VENV)-docs/bin/python
notebooks: $(VENV)-docs/ready
	$(DOCS) notebooks/execute.py

# Puts the new outputs into them; with PyTorch, which is in one of the pictures.
notebooks-write: $(VENV)-docs/ready
	$(DOCS) -m pip install --quiet --retries 1 torch==2.13.0+cpu \
	  --extra-index-url https://download.pytorch.org/whl/cpu
	$(DOCS) notebooks/execute.py --write

# Builds the site in out/site, where warnings are errors, and checks it: in Chromium too, if the
# machine has one, else those checks are skipped and pytest says so.
docs: $(VENV)-docs/ready
	rm -rf out/site out/doctrees
	$(DOCS) -m sphinx -W --keep-going --quiet -d out/doctrees docs out/site
	$(DOCS) -m pytest -q -n $(WORKERS) tests/site

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

# Known vulnerabilities of what is installed for development; needs the network. The version is given
# since .ci/audit.py reaches into it.
audit: $(VENV)/ready
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit==2.10.1
	$(RUN) -m pip freeze --exclude-editable >$(VENV)-audit/frozen.txt
	$(VENV)-audit/bin/python .ci/audit.py --requirement $(VENV)-audit/frozen.txt --no-deps --disable-pip --strict

$(VENV)-aot/ready: $(VENV)/ready
	$(PYTHON) -m venv $(VENV)-aot
	$(VENV)-aot/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-aot/bin/python -m pip install --quiet --editable '.[aot]'
	touch $@

$(VENV)-docs/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(DOCS) -m pip install --quiet --upgrade pip
	$(DOCS) -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)-mutants/ready: $(VENV)/ready
	$(PYTHON) -m venv $(VENV)-mutants
	$(VENV)-mutants/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-mutants/bin/python -m pip install --quiet --editable '.[mutants]'
	touch $@

$(VENV)-peers/ready: $(VENV)/ready
	$(PYTHON) -m venv $(VENV)-peers
	$(PEERS) -m pip install --quiet --upgrade pip
	$(PEERS) -m pip install --quiet --editable '.[peers]'
	$(PEERS) -m pip install --quiet --retries 1 torch==2.13.0+cpu \
	  --extra-index-url https://download.pytorch.org/whl/cpu
	$(PEERS) -c 'import equinox, haiku, jax_resnet, torch'
	touch $@

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  'jax_bn needs Python 3.11 or later; name one: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv* out dist docs/notebooks docs/results
