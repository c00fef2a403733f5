# `make demo` runs the main job on a small simulated field, `make test` passes the tests, `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := demo
MODEL := build/model
LOWEST := build/lowest
PYTEST_ARGS ?=
# Test processes. Each takes whole files, so that what the tests of a file share is made once. 0 is for the debugger.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
# What takes no torch and no processes; the marker leaves out the few slow ones.
FAST := tests/stages $(addprefix tests/pipeline/test_,config.py exposure_list.py outdir.py plan.py progress.py sample.py)
# The versions of an installation that has passed. The newest that pyproject.toml allows: make CONSTRAINTS= TARGET
CONSTRAINTS ?= constraints.txt

export PYTHONSAFEPATH := 1

.PHONY: demo test test-fast test-avx2 test-lowest coverage lint types tables docs constraints model bench clean help
.DEFAULT_GOAL := demo

# torch and torchvision are chosen by one pip call: they must match.
$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) \
		--editable '.[train,simulate,test,docs,dev]'
	touch $@

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | sort | expand -t 14

demo: $(INSTALLED) ## simulate a seven-band field, run the main job on it, compare with the truth
	rm -rf $(DEMO)
	$(BIN)/sgclassify simulate --output $(DEMO)/field --seed 7 --size 1024 1024
	$(BIN)/sgclassify run --exposure-list $(DEMO)/field/exposures.txt --output $(DEMO)/output
	$(BIN)/sgclassify evaluate --run $(DEMO)/output --truth $(DEMO)/field/field_00000/truth.parquet --unblended

# With the thorough tests and those of faults, as .ci/run does: make test PYTEST_ARGS="-m ''"
# 200 random kills: SGCLASSIFY_KILLS=200 make test PYTEST_ARGS="-m '' tests/end_to_end/test_kills.py"
test: $(INSTALLED) ## run the tests, in five minutes; PYTEST_ARGS="-m ''" adds the long ones
	$(PYTEST) $(PYTEST_ARGS)

# While you work. Single tests go from one process to the other here: no file shares anything that takes long.
test-fast: $(INSTALLED) ## run the tests of the stages and of what else takes half a minute
	$(PYTEST) --dist worksteal -m "not slow and not faults and not thorough" $(PYTEST_ARGS) $(FAST)

coverage: $(INSTALLED) ## run the tests and say which share of the code they run; the pages are in build/coverage
	$(PYTEST) --cov --cov-report term:skip-covered --cov-report html:build/coverage $(PYTEST_ARGS)

# AVX2 only, without bfloat16, as on most laptops and many servers.
test-avx2: $(INSTALLED) ## run the model's tests and one run as on a processor without AVX-512
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) $(PYTEST_ARGS) \
		tests/model tests/end_to_end/test_run_products.py::test_objects

# In an environment of its own (6 GB), which stays for the next call. Old releases use what newer ones of their own
# dependencies deprecate, so these warnings are no errors here.
test-lowest: ## run the tests on the lowest versions of all direct dependencies
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip compile --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
		--extra train --extra simulate --extra test pyproject.toml --output-file build/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --requirements build/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --no-deps --editable .
	$(LOWEST)/bin/python -m pytest -W ignore::DeprecationWarning $(PYTEST_ARGS) \
		tests/stages tests/pipeline tests/model tests/simulation tests/end_to_end/test_run_products.py

lint: $(INSTALLED) ## check style and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows sgclassify.* only where the four folders lie under one of that name.
types: $(INSTALLED) ## check types with mypy
	mkdir -p build/types/sgclassify
	for part in pipeline stages model simulation; do ln -sfn ../../../$$part build/types/sgclassify/$$part; done
	MYPYPATH=build/types $(BIN)/mypy -p sgclassify.pipeline -p sgclassify.stages -p sgclassify.model -p sgclassify.simulation
	MYPYPATH=build/types:benchmarks $(BIN)/mypy -p performance

tables: $(INSTALLED) ## write the tables of docs/reference.md, and pipeline/default.toml, from the code
	$(BIN)/python docs/tables.py

docs: $(INSTALLED) ## build the documentation into build/docs; a warning is an error
	rm -rf build/docs docs/api
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --jobs auto --doctree-dir build/doctrees docs build/docs

constraints: $(INSTALLED) ## write the versions in .venv to constraints.txt, after the tests have passed
	$(BIN)/python -m pip freeze --exclude-editable | sed '/ @ /d' > constraints.txt

# The shipped weights: two networks, which answer together. Simulates the data and trains: four hours on two CPU cores.
# Everything goes on where it stopped. To try it on a few fields, in minutes:
#   make model FIELDS=40 SHIFTED=2 MINUTES=2
FIELDS := 1200
SHIFTED := 40
MINUTES := 90
BANDS_MINUTES := $(shell expr $(MINUTES) '*' 2 / 3)
DATA := $(MODEL)/data
model: $(INSTALLED) ## make the training data and train the shipped weights: four hours on two cores
	$(BIN)/sgclassify dataset --output $(DATA) --fields $(FIELDS) --shifted $(SHIFTED) --processes $(shell nproc)
	$(BIN)/sgclassify train --resume --data $(DATA) --output $(MODEL)/bands --precision bf16 \
		--max-minutes $(BANDS_MINUTES)
	$(BIN)/sgclassify train --resume --data $(DATA) --output $(MODEL)/out --architecture resnet50 --seed 2 \
		--beside $(MODEL)/bands/model.pt --max-minutes $(MINUTES)
	$(BIN)/sgclassify baselines --data $(DATA) --part validation --prior-star-fraction 0.41 \
		--model $(MODEL)/out/model.pt --model image=$(MODEL)/out/image.pt --model sequence=$(MODEL)/out/sequence.pt \
		--output $(MODEL)/scores.parquet
	$(BIN)/sgclassify evaluate --table $(MODEL)/scores.parquet --edges 15,18,20,22,24,25,26,28

# Other commands: make bench BENCH="run --quick", or BENCH="run --repeat 3 stages naive", or BENCH="survey"
BENCH ?= run --against
bench: $(INSTALLED) ## measure what a run costs, in turns with an older commit: hours; BENCH="run --quick" tries it
	$(BIN)/python benchmarks/bench.py $(BENCH)

clean: ## remove what was built
	rm -rf build docs/api $(DEMO) *.egg-info
