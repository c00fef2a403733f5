# Two commands: `make demo` runs the main job on a small simulated field, `make test` passes the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := demo
MODEL := build/model
PYTEST_ARGS ?=

export PYTHONSAFEPATH := 1

.PHONY: demo test test-avx2 lint types tables model clean
.DEFAULT_GOAL := demo

# torch and torchvision are chosen by one pip call: they must match.
$(INSTALLED): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,simulate,test]'
	touch $@

demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(BIN)/sgclassify simulate --output $(DEMO)/field --seed 7 --size 1024 1024
	$(BIN)/sgclassify run --exposure-list $(DEMO)/field/exposures.txt --output $(DEMO)/output
	$(BIN)/sgclassify evaluate --run $(DEMO)/output --truth $(DEMO)/field/field_00000/truth.parquet --unblended

# With the tests of faults: make test PYTEST_ARGS="-m ''"
# 200 random kills: SGCLASSIFY_KILLS=200 make test PYTEST_ARGS="-m '' tests/end_to_end/test_kills.py"
test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Without AVX-512 and bfloat16, as on most laptops and many servers: the model's tests and one run from end to end.
test-avx2: $(INSTALLED)
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest $(PYTEST_ARGS) \
		tests/model tests/end_to_end/test_run_products.py::test_objects

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows sgclassify.* only where the four folders lie under one of that name.
types: $(INSTALLED)
	mkdir -p build/types/sgclassify
	for part in pipeline stages model simulation; do ln -sfn ../../../$$part build/types/sgclassify/$$part; done
	MYPYPATH=build/types $(BIN)/mypy -p sgclassify.pipeline -p sgclassify.stages -p sgclassify.model -p sgclassify.simulation

tables: $(INSTALLED) ## write the tables of docs/reference.md, and pipeline/default.toml, from the code
	$(BIN)/python docs/tables.py

# The shipped weights: two networks, which answer together. Simulates the data and trains: four hours on two CPU cores.
# Everything goes on where it stopped. To try it on a few fields, in minutes:
#   make model FIELDS=40 SHIFTED=2 MINUTES=2
FIELDS := 1200
SHIFTED := 40
MINUTES := 90
BANDS_MINUTES := $(shell expr $(MINUTES) '*' 2 / 3)
DATA := $(MODEL)/data
model: $(INSTALLED)
	$(BIN)/sgclassify dataset --output $(DATA) --fields $(FIELDS) --shifted $(SHIFTED) --processes $(shell nproc)
	$(BIN)/sgclassify train --resume --data $(DATA) --output $(MODEL)/bands --precision bf16 \
		--max-minutes $(BANDS_MINUTES)
	$(BIN)/sgclassify train --resume --data $(DATA) --output $(MODEL)/out --architecture resnet50 --seed 2 \
		--beside $(MODEL)/bands/model.pt --max-minutes $(MINUTES)
	$(BIN)/sgclassify baselines --data $(DATA) --part validation --prior-star-fraction 0.41 \
		--model $(MODEL)/out/model.pt --model image=$(MODEL)/out/image.pt --model sequence=$(MODEL)/out/sequence.pt \
		--output $(MODEL)/scores.parquet
	$(BIN)/sgclassify evaluate --table $(MODEL)/scores.parquet --edges 15,18,20,22,24,25,26,28

clean:
	rm -rf build $(DEMO) *.egg-info
