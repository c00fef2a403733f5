# Two commands: `make demo` runs the main job on a small simulated field, `make test` passes the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := demo
MODEL := build/model
PYTEST_ARGS ?=

export PYTHONSAFEPATH := 1

.PHONY: demo test lint types model clean
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

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows sgclassify.* only where the four folders lie under one of that name.
types: $(INSTALLED)
	mkdir -p build/types/sgclassify
	for part in pipeline stages model simulation; do ln -sfn ../../../$$part build/types/sgclassify/$$part; done
	MYPYPATH=build/types $(BIN)/mypy -p sgclassify.pipeline -p sgclassify.stages -p sgclassify.model -p sgclassify.simulation

# Simulates the data and trains: hours on two CPU cores. Both go on where they stopped.
model: $(INSTALLED)
	$(BIN)/sgclassify dataset --output $(MODEL)/data --fields 640 --shifted 40
	$(BIN)/sgclassify train --data $(MODEL)/data --output $(MODEL)/out --max-minutes 90 --resume
	$(BIN)/sgclassify baselines --data $(MODEL)/data --part validation --model $(MODEL)/out/model.pt \
		--model image=$(MODEL)/out/image.pt --model sequence=$(MODEL)/out/sequence.pt --output $(MODEL)/scores.parquet
	$(BIN)/sgclassify evaluate --table $(MODEL)/scores.parquet --edges 15,18,20,22,24,25,26,28

clean:
	rm -rf build $(DEMO) *.egg-info
