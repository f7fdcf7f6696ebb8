# Everything a user or a developer starts. `make help` lists it.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
# One test process for each core, at most four: tests use one thread each, and those of many ranks start four processes of their own.
WORKERS ?= --numprocesses auto --maxprocesses 4 --dist worksteal
export PYTHON

py := $(VENV)/bin/python
inputs := pyproject.toml constraints.txt .ci/install.sh
installed := $(VENV)/.installed
installed_dev := $(VENV)/.installed-dev
installed_types := $(VENV)/.installed-types
tokenizer := runs/quickstart/tokenizer.model

.DEFAULT_GOAL := help
.PHONY: help install train test test-fast lint types format map docs faults clean

help: ## list the targets
	@echo "make TARGET [VENV=.venv] [PYTHON=python3] [TORCH=auto|cpu|cuda] [ARGS=\"overrides of train\"] [PYTEST_ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(installed) ## create the virtual environment and install the pinned packages

train: $(installed) $(tokenizer) ## train a small LLaMA with Natural GaLore on text that is already on this machine
	$(py) -m ngpt.train experiment=quickstart $(ARGS)
	@printf '%s\n' "" \
	  "Continue after Ctrl-C, at the step where it stopped: the same command" \
	  "  $(py) -m ngpt.train experiment=quickstart $(ARGS)" \
	  "" \
	  "Train on your own text (JSON lines with a field \"text\": .jsonl, .json.gz, .json.zst):" \
	  "  $(py) -m data_prep.train_tokenizer --files 'mytext/*.jsonl' --vocab-size 16000 --out mytext/tokenizer.model" \
	  "  $(py) -m ngpt.train model=llama_20m model.vocab_size=16000 data=local_c4 data.train_files='[mytext/*.jsonl]' \\" \
	  "      tokenizer.path=mytext/tokenizer.model trainer.max_steps=2000 trainer.global_batch_size=64 run.name=mytext" \
	  "" \
	  "Train on C4, streamed from the hub (on a GPU, with T5's tokenizer as spiece.model):" \
	  "  $(py) -m ngpt.train experiment=c4_60m_natural_galore tokenizer.path=spiece.model"

test: $(installed_dev) ## run all tests, slow ones last
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(py) -m pytest $(WORKERS) $(PYTEST_ARGS)

test-fast: $(installed_dev) ## run the tests that are not marked slow
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(py) -m pytest -m "not slow" $(WORKERS) $(PYTEST_ARGS)

lint: $(installed_dev) ## check the code with ruff
	$(py) -m ruff check .

types: $(installed_types) ## check the annotations with pyright
	$(py) -m basedpyright

format: $(installed_dev) ## let ruff repair what it can
	$(py) -m ruff check --fix .

docs: map ## write the pages that are made from the code: the map and the configuration
	$(py) -m ngpt.config.reference docs/configuration.md

map: $(installed) ## write docs/map.md from the modules' docstrings
	$(py) docs/make_map.py

faults: $(installed_dev) ## try every fault and bad input, and write docs/faults.md with what was seen
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(py) docs/make_fault_table.py -- $(WORKERS) $(PYTEST_ARGS)

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# The stamps let a second `make` start at once; a changed pin or dependency installs again.
$(installed): $(inputs)
	bash .ci/install.sh $(VENV)
	@touch $@

$(installed_dev): $(inputs)
	bash .ci/install.sh $(VENV) dev
	@touch $@ $(installed)

$(installed_types): $(installed_dev)
	bash .ci/install.sh $(VENV) dev,types
	@touch $@

$(tokenizer): | $(installed)
	$(py) -m data_prep.train_tokenizer --builtin --vocab-size 4096 --out $@
