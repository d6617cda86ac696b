# make demo | make test | make test-gpu | make lint | make help
# CONSTRAINTS=.ci/constraints-py3.11.txt installs exactly these versions, as CI does; without it the newest are installed.
VENV ?= .venv
PYTHON ?= python3
EXTRAS ?= all,dev
JOBS ?= 2
CONSTRAINTS ?=
EXACTLY := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS) --build-constraint $(CONSTRAINTS))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-slow test-gpu lint format constraints audit clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), about three minutes"
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq $(EXACTLY) --editable ".[$(EXTRAS)]"
	@touch $@

install: $(INSTALLED)  ## create .venv and install everything

demo: $(INSTALLED)  ## train a segmenter on real MRI slices (about 4 minutes on 2 cores), label the whole volume, write reports
	$(BIN)/python tools/train.py configs/segmentation/mni152_vig_h_atto.yaml trainer.run_dir=runs/demo trainer.resume=true
	$(BIN)/python tools/mni152_volume.py runs/demo/volume
	$(BIN)/python tools/segment.py runs/demo/volume/mni152_t1.nii.gz runs/demo/volume/mask.nii.gz --checkpoint runs/demo
	$(BIN)/python tools/score.py runs/demo/volume/mask.nii.gz runs/demo/volume/mni152_labels.nii.gz

test: $(INSTALLED) lint  ## check style and types, run every test that needs no GPU; slow ones apart
	$(BIN)/python -m pytest -m "not gpu and not slow" -n $(JOBS) --dist worksteal

test-slow: $(INSTALLED)  ## run the tests that take minutes each
	$(BIN)/python -m pytest -m "slow and not gpu" -n $(JOBS) --dist worksteal

test-gpu: $(INSTALLED)  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED)  ## ruff (style, format) and mypy (types of the public API)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(INSTALLED)  ## write the installed versions to .ci/constraints-pyX.Y.txt, after `make test` has passed
	$(BIN)/python tools/freeze.py

AUDIT := $(VENV)/audit/bin
audit: $(INSTALLED)  ## do the installed packages fit together; have those of CI known vulnerabilities (asks pypi.org)
	$(BIN)/python -m pip check
	@test -x $(AUDIT)/pip-audit || ($(BIN)/python -m venv $(VENV)/audit && $(AUDIT)/python -m pip install -qq pip-audit)
	$(AUDIT)/pip-audit --strict --disable-pip --no-deps $(addprefix --requirement=,$(wildcard .ci/constraints-py*.txt))

clean:  ## remove the virtual environment and build output; runs stay
	rm -rf $(VENV) build dist *.egg-info
