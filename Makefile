# make demo: a scaling for a real model, found and tested in minutes (make demo MODEL=gemma3-270m, a folder, a hub id).
# make test: everything CI checks.
# make test-oldest: the same on the oldest torch and transformers allowed, in a venv of its own.
# make bench: what an answer, a gradient and a search cost, and how soon two models gain: minutes to so many points.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
BIN := .venv/bin
EXTRAS := clients,cluster,hub,rivals,test,tune
# one line of output per step, even when a terminal is attached to make
RUN := $(BIN)/papermill --log-output --no-progress-bar

# two workers with one thread each: more torch threads would wait for each other
WORKERS ?= 2
PROFILE ?= cpu
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
OLDEST := torch==2.9.0 transformers==5.20.0

.PHONY: demo reproduce test test-oldest bench lint model gemma texts clean

demo: $(if $(MODEL),.venv/installed,texts)
	@mkdir -p build
	$(RUN) notebooks/00_find_a_scaling.ipynb build/demo.ipynb -f notebooks/profiles/demo/00.yaml $(if $(MODEL),-p model '$(MODEL)')
	@$(BIN)/python tools/first_screen.py build/demo.ipynb
	@$(BIN)/jupyter nbconvert --log-level WARN --to html --template page --TemplateExporter.extra_template_basedirs=tools build/demo.ipynb
	@$(BIN)/python tools/reproduce.py build/demo.ipynb
	@echo "page:        $(CURDIR)/build/demo.html"

test: lint texts
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(PYTEST_OPTIONS)

test-oldest: texts
	$(PYTHON) -m venv --clear build/oldest
	grep -vE '^(torch|transformers)==' constraints.txt > build/oldest/constraints.txt
	build/oldest/bin/pip install --quiet --disable-pip-version-check $(OLDEST) \
		--constraint build/oldest/constraints.txt --editable '.[$(EXTRAS)]'
	OMP_NUM_THREADS=1 build/oldest/bin/python $(PYTEST)

# all notebooks with papermill into build/runs: make reproduce PROFILE=smoke
reproduce: .venv/installed
	$(BIN)/python tools/reproduce.py --profile $(PROFILE)

bench: model gemma
	$(BIN)/python tools/benchmark.py
	$(BIN)/python tools/benchmark.py --prices
	$(BIN)/python tools/record.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the embedded model, fetched and converted into the cache once
model: .venv/installed
	@$(BIN)/python -c "from lrs_utils import load_lm; print(load_lm())"

# the second real model, which its tests need (239 MB to fetch, 1.1 GB in the cache)
gemma: .venv/installed
	@$(BIN)/python -c "from lrs_utils import load_lm; print(load_lm('gemma3-270m'))"

# the model, and 8 MB of books and facts, fetched once, so that tests need no network
texts: .venv/installed
	@$(BIN)/python -c "from lrs_utils import load_lm, tasks; \
		print(load_lm()); [tasks.long_texts(t) for t in ('shakespeare', 'factbook')]"

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info < (3, 14), sys.version" \
		|| { echo "Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv \
		|| { rm -rf .venv; echo "on Debian: apt-get install python3-venv, then make again"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf .venv build
