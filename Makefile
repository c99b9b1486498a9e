# `make quickstart` and `make test` are all a fresh machine needs; README.md shows what they run, for machines without make.
PYTHON ?= python3
RUN = runs/quickstart
# The extra of pyproject.toml that lets JAX see this machine's accelerator: [gpu], [tpu] or nothing.
ACCELERATOR ?= $(shell if command -v nvidia-smi >/dev/null; then echo '[gpu]'; elif ls /dev/accel0 /dev/vfio/0 >/dev/null 2>&1; then echo '[tpu]'; fi)

# As many tests at a time as there are cores, but not too many for the memory; a test file stays in one process.
PYTEST = .venv/bin/python -m pytest -n auto --maxprocesses=8 --dist loadfile

.PHONY: quickstart test test-rest test-all docs

quickstart: .venv/installed
	.venv/bin/sedd train --config=configs/quickstart.py --workdir=$(RUN)
	.venv/bin/sedd eval --workdir=$(RUN)
	.venv/bin/sedd sample --workdir=$(RUN) --num_samples=2
	.venv/bin/sedd sample --workdir=$(RUN) --template='The {5} method returns {8} object.' --num_samples=2
	@echo
	@echo "The run is in $(RUN): look at loss.png and samples/. Next:"
	@echo "  .venv/bin/sedd sample --workdir=$(RUN) --prefix='Return ' --watch"
	@echo "  .venv/bin/sedd train --config=configs/quickstart.py --workdir=$(RUN) --config.training.num_steps=5000"
	@echo "  .venv/bin/sedd train --help"

test: .venv/installed-test
	$(PYTEST)

# What `make test` leaves out: many kills and processes, compilations for TPUs, job schedulers, browsers, more cases.
test-rest: .venv/installed-test-all
	$(PYTEST) -m slow

# Two runs, because XLA optimises more in the second.
test-all: .venv/installed-test-all
	$(PYTEST)
	$(PYTEST) -m slow

# The documentation site, in site/.
docs: .venv/installed-docs
	.venv/bin/python docs/site/build.py site
	@echo "Open site/index.html"

.venv/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -e '.$(ACCELERATOR)'
	touch $@

.venv/installed-test: .venv/installed
	.venv/bin/python -m pip install --quiet -e '.[test]'
	touch $@

.venv/installed-test-all: .venv/installed-test
	.venv/bin/python -m pip install --quiet -e '.[test-all]'
	touch $@

.venv/installed-docs: .venv/installed
	.venv/bin/python -m pip install --quiet -e '.[docs]'
	touch $@
