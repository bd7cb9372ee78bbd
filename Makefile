# Each command makes .venv and installs what it needs, once; a later call starts at once.
#   make demo [ARGS="--seed 1"]   train, cut, build and compare a network on a small data set, in minutes
#   make test                     all tests, in minutes
#   make coverage                 the same, and which lines they run: less than 90 % is an error
#   make lint                     style, types, and which module may import which
#   make docs                     the site, in build/docs; a warning is an error
#   make bars                     the long checks; their results lie in benchmarks/results

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# NVIDIA containers bring torch or tensorrt: the environment shall see them, and pip shall leave them alone.
HAS_TORCH := import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") or u.find_spec("tensorrt")))
KEEP := ^(torch|torchvision|triton|tensorrt|numpy|nvidia|cuda|pytorch)

.PHONY: demo test coverage lint docs bars
demo: $(INSTALLED)
	$(BIN)/python -m polar_deploy.pipeline --recipe digits $(ARGS)

# The many children that tests start shall not compile this package anew each time, even where the shell asks for that.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

coverage:
	$(MAKE) test ARGS="--cov=polar_deploy $(ARGS)"

lint: $(INSTALLED)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	! test -x $(BIN)/hadolint || $(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/python -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

bars: $(INSTALLED)
	set -e; for bar in $(sort $(wildcard benchmarks/bar_*.py)); do echo "== $$bar"; $(BIN)/python -m benchmarks.$$(basename $$bar .py); done

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) must be Python 3.10 or later: make PYTHON=/path/to/python3.12"; exit 1; }
	@site=; if $(PYTHON) -c '$(HAS_TORCH)'; then site=--system-site-packages; fi; \
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $$site .venv \
	  || { echo "cannot make .venv: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }; \
	{ test -z "$$site" || $(PYTHON) -m pip list --format=freeze | grep -iE '$(KEEP)'; } > .venv/pinned.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c .venv/pinned.txt -e '.[train,ort,dev]'
	@touch $@
