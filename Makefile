# make install: the environment alone.  make train: fine-tune the embedded example.  make eval: compare it with its base, merged too.
# make serve: ask it, by an API and a page.  make shop: an assistant that answers from a shop's documents, with sources.
# make test: the tests that this machine can run in minutes; make test-long: the others.
# TESTS="tests/data -k csv" chooses among them; TESTS='-m ""' are all.
# An environment that is active and has all that this project needs is used as it is; else .venv is made. VENV=FOLDER names another.
ifndef VENV
ACTIVE := $(shell python -P -c 'import os, sys; sys.path.append(os.getcwd()); from carelm.environment import ROOT; \
	ROOT == os.getcwd() and print(sys.prefix)' 2>/dev/null)
endif
VENV ?= $(or $(filter-out $(CURDIR)/.venv,$(ACTIVE)),.venv)
PYTHON ?= python3
READY := $(if $(filter $(VENV),$(ACTIVE)),,$(VENV)/.ready)
READY_DEV := $(VENV)/.ready-dev
BASE := $(or $(CARELM_CACHE),$(HOME)/.cache/carelm)/bases/smollm2-135m-instruct/source.json
unexport VENV
comma := ,
# DeepSpeed compiles its CPU Adam (for offload) once and looks for ninja on the path.
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: install train eval serve shop test test-long assistants bench bench-gpu real-base embedder check style

install: $(READY)
	@echo "make: installed; next: $(if $(READY),source $(VENV)/bin/activate$(comma) )make train" >&2

train: $(READY)
	python train/sft.py
	$(if $(READY),@echo "make: for commands of your own: source $(VENV)/bin/activate" >&2)

eval: $(READY)
	python train/merge.py --adapter outputs/demo --output_dir outputs/demo/merged
	python eval/run.py

# The demo's models as an API and a page at http://127.0.0.1:8000; trains them first, where that is not done.
serve: $(READY)
	python -c "import fastapi, uvicorn, prometheus_client, httpx" 2>/dev/null || pip install -e '.[serve]'
	python train/sft.py
	python serve/run.py

# A real base that answers from the demo shop's documents, at http://127.0.0.1:8000: base, embedder and index are made once. Where
# recipes/shop_grounded.yaml has been trained, its result answers.
SHOP = recipes/$(if $(wildcard outputs/shop_grounded/adapter_model.safetensors),shop_grounded,shop_assistant).yaml
shop: real-base $(READY)
	python -c "import fastapi, uvicorn, prometheus_client, httpx, lancedb, sentence_transformers, pypdfium2, docx" 2>/dev/null || \
		pip install -e '.[serve,retrieval]'
	python demo/embedder.py
	python serve/index.py --config $(SHOP)
	python serve/run.py --config $(SHOP)

test: $(READY_DEV)
	python -m pytest $(TESTS)

# The tests that take a minute or more each, most of them every other way to stop a job of a SLURM cluster.
test-long: $(READY_DEV)
	python -m pytest -m long $(TESTS)

# The five assistants in small, on the demo's base and a few invented rows: shows that all of them run. Minutes, offline.
assistants: $(READY)
	python demo/assistants.py

bench: $(READY)
	python benchmarks/methods.py
	python benchmarks/speed.py
	python benchmarks/scoring.py
	python benchmarks/evaluator.py
	python benchmarks/merging.py
	python benchmarks/resumes.py

bench-gpu: $(READY)
	python benchmarks/gpu.py

# A real base, SmolLM2-135M-Instruct, into the cache: once, then offline, and nothing is installed for one that is there.
real-base: $(if $(wildcard $(BASE)),,$(READY))
	@test -f "$(BASE)" || python -c "import gguf" 2>/dev/null || pip install gguf
	@python3 demo/real_base.py

# An embedder, all-MiniLM-L6-v2, into the cache: once, then offline.
embedder: $(READY)
	@python demo/embedder.py

check: $(READY_DEV)
	ruff check .
	ruff format --check .
	! command -v shellcheck >/dev/null || shellcheck -x slurm/*.sh

style: $(READY_DEV)
	ruff check --fix .
	ruff format .

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "make: installing into $(VENV), some minutes; one that has all is used where it is active, or named: VENV=FOLDER" >&2
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -r requirements.txt
	touch $(READY)

$(READY_DEV): $(READY)
	$(VENV)/bin/pip install -e '.[dev]'
	touch $(READY_DEV)
