# `make help` says what there is. Every target sets itself up in .venv.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin

# make demo
DEMO   ?= runs/demo
# make demo, make preprocess: a real dataset in COCO's layout
COCO   ?=
SPLIT  ?= val2017
# make preprocess
OUT       ?= runs/cache/$(SPLIT)
FIT       ?= native
SIZE      ?=
WORKERS   ?= 2
SCHEDULER ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast check format preprocess bench clean

help:  ## Show this.
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## Set up .venv with everything, pinned by constraints.txt.

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,tensorboard]"
	touch $@

demo: install  ## The whole path on made-up scenes, or on COCO=ROOT SPLIT=name: PQ and pictures.
ifeq ($(COCO),)
	$(BIN)/panoptic synth $(DEMO)/scenes --images 4000 --val-images 200 --seed 0
	$(BIN)/panoptic preprocess --coco $(DEMO)/scenes --split train --out $(DEMO)/cache/train \
	    --fit squash --size 64 --workers 2
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	    --dynamo_backend no -m train configs/demo.toml \
	    --set out=$(DEMO)/train --set data.cache=$(DEMO)/cache/train --resume
	@echo "PQ on scenes it trained on:"
	$(BIN)/panoptic evaluate --checkpoint $(DEMO)/train --coco $(DEMO)/scenes --split train \
	    --limit 200 --out $(DEMO)/evaluate/train
	@echo "PQ on held-out scenes:"
	$(BIN)/panoptic evaluate --checkpoint $(DEMO)/train --coco $(DEMO)/scenes --split val \
	    --out $(DEMO)/evaluate/val
	@echo "Truth beside prediction: $(DEMO)/evaluate/val/comparison.png"
	@echo "The report:              $(DEMO)/evaluate/val/report.html"
else
	$(BIN)/panoptic preprocess --coco "$(COCO)" --split "$(SPLIT)" --out "$(DEMO)/$(SPLIT)/cache" \
	    --fit squash --size 96 --workers 2
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	    --dynamo_backend no -m train configs/demo_coco.toml \
	    --set "out=$(DEMO)/$(SPLIT)/train" --set "data.cache=$(DEMO)/$(SPLIT)/cache" --resume
	@echo "PQ on photos it trained on:"
	$(BIN)/panoptic evaluate --checkpoint "$(DEMO)/$(SPLIT)/train" --coco "$(COCO)" --split "$(SPLIT)" \
	    --limit 200 --out "$(DEMO)/$(SPLIT)/evaluate"
	@echo "Truth beside prediction: $(DEMO)/$(SPLIT)/evaluate/comparison.png"
	@echo "The report:              $(DEMO)/$(SPLIT)/evaluate/report.html"
endif

test: install  ## All tests.
	$(BIN)/pytest --numprocesses auto

test-fast: install  ## The tests that take no long run: under a minute on two cores.
	$(BIN)/pytest --numprocesses auto -m "not slow"

check: install  ## Lint, format, types; and that torchvision is nowhere.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/panoptic_cache
	$(BIN)/mypy
	! $(BIN)/pip show --quiet torchvision 2>/dev/null

format: install  ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

preprocess: install  ## Render COCO=ROOT SPLIT=name into OUT [SIZE FIT WORKERS SCHEDULER].
	$(if $(COCO),,$(error give the dataset's root, as COCO=datasets/coco))
	$(BIN)/panoptic preprocess --coco "$(COCO)" --split "$(SPLIT)" --out "$(OUT)" --fit $(FIT) \
	    $(if $(SIZE),--size $(SIZE)) \
	    $(if $(SCHEDULER),--scheduler $(SCHEDULER),--workers $(WORKERS))

bench: install  ## Measure against the obvious way and the floor.
	for part in render load decode score step; do $(BIN)/panoptic bench $$part || exit 1; done

clean:  ## Remove runs/ and caches of tools, not .venv.
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
