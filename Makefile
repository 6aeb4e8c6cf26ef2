# make demo   install, answer the demo's problems in five modes, print and draw the table
# make test   install, lint, test
# make bench  measure generation against transformers' generate
# make demo-model  make the demo's problems, tokenizer and model anew
# make help   what else there is

PYTHON ?= python3
PY = .venv/bin/python
DEMO = --model-id demo/model --dataset demo/problems

.PHONY: help install demo demo-model test bench record-demo
help:
	@sed -n 's/^# make/make/p' Makefile

install: .venv/installed
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	@touch $@
.venv/installed-tests: .venv/installed tests/requirements.txt
	.venv/bin/pip install -q -r tests/requirements.txt
	@touch $@

demo: .venv/installed
	$(PY) inference.py $(DEMO) --mode zero_shot --output outputs/demo/zero_shot.jsonl
	$(PY) inference.py $(DEMO) --mode cot --output outputs/demo/cot.jsonl
	$(PY) inference.py $(DEMO) --mode few_shot --output outputs/demo/few_shot.jsonl
	$(PY) inference.py $(DEMO) --mode thinking --max-new-tokens 512 --output outputs/demo/thinking.jsonl
	$(PY) inference.py $(DEMO) --mode chatml_think_prefill --max-new-tokens 512 --output outputs/demo/chatml_think_prefill.jsonl
	$(PY) benchmark.py $(patsubst %,outputs/demo/%.jsonl,zero_shot cot few_shot thinking chatml_think_prefill) --plot outputs/demo/modes.png

demo-model: .venv/installed
	$(PY) -m demo.make

test: .venv/installed-tests
	.venv/bin/ruff check .
	$(PY) -m pytest -q -rs $(PYTEST_FLAGS) tests

bench: .venv/installed-tests
	$(PY) tests/bench_generation.py

# What `make demo` gave, kept for the README; a test compares the README's table with it.
record-demo: demo
	mkdir -p results/demo
	cp outputs/demo/*.jsonl outputs/demo/*.run.json outputs/demo/modes.png results/demo/
