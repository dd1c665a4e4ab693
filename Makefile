# make demo: a search on a real model, in minutes.   make test: everything CI checks.
# make bench: what an answer and a search cost, against decoding each answer anew and the machine's limit.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
BIN := .venv/bin
# one line of output a step, also when a terminal is attached to make
RUN := $(BIN)/papermill --log-output --no-progress-bar

.PHONY: demo test bench lint model clean

demo: model
	@mkdir -p build
	$(RUN) notebooks/06_ga_search.ipynb build/demo.ipynb -p profile demo
	@$(BIN)/python -m lrs_utils.reproduce build/demo.ipynb

test: lint model
	$(BIN)/python -m pytest

bench: model
	$(BIN)/python -m lrs_utils.benchmark

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the embedded model, fetched and converted into the cache once
model: .venv/installed
	@$(BIN)/python -c "from lrs_utils import load_lm; print(load_lm())"

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info < (3, 14), sys.version" \
		|| { echo "Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv \
		|| { rm -rf .venv; echo "on Debian: apt-get install python3-venv, then make again"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cluster,hub,rivals,test,tune]'
	@touch $@

clean:
	rm -rf .venv build
