# make demo | make test | make test-gpu | make lint | make help
VENV ?= .venv
PYTHON ?= python3
EXTRAS ?= all,dev
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-gpu lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), about three minutes"
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --editable ".[$(EXTRAS)]"
	@touch $@

install: $(INSTALLED)  ## create .venv and install everything

demo: $(INSTALLED)  ## train a segmenter on real MRI slices (about 4 minutes on 2 cores), label the whole volume, write reports
	$(BIN)/python tools/train.py configs/segmentation/mni152_vig_h_atto.yaml trainer.run_dir=runs/demo trainer.resume=true
	$(BIN)/python tools/mni152_volume.py runs/demo/volume
	$(BIN)/python tools/segment.py runs/demo/volume/mni152_t1.nii.gz runs/demo/volume/mask.nii.gz --checkpoint runs/demo
	$(BIN)/python tools/score.py runs/demo/volume/mask.nii.gz runs/demo/volume/mni152_labels.nii.gz

test: $(INSTALLED) lint  ## check style and types, run every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" -n $(JOBS)

test-gpu: $(INSTALLED)  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED)  ## ruff (style, format) and mypy (types of the public API)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and build output; runs stay
	rm -rf $(VENV) build dist *.egg-info
