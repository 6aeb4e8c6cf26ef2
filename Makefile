# make help        show this list
# make install     put Python's packages into .venv
# make demo        install, answer the demo's problems in five modes, print and draw the table, write the page
# make test        install, check the code's form, test
# make quick       check the code's form, and run the tests that need no model larger than the demo's
# make bench       measure generation against transformers' generate, and training against TRL's defaults
# make reproduce   run and report every experiment; MODEL=demo/model DATASET=demo/problems takes the demo
# make record      make anew what results/demo holds of `make demo`
# make demo-model  make the demo's problems, tokenizer and model anew

PYTHON ?= python3
PY = .venv/bin/python
RUFF = .venv/bin/ruff
DEMO = $(PY) inference.py --model-id demo/model --dataset demo/problems
DEMO_FILES = outputs/demo/zero_shot.jsonl outputs/demo/cot.jsonl outputs/demo/few_shot.jsonl \
	outputs/demo/thinking.jsonl outputs/demo/chatml_think_prefill.jsonl
MODEL ?= Qwen/Qwen3-0.6B
DATASET ?= openai/gsm8k
FLAGS ?=
EXPERIMENTS = --model-id $(MODEL) --dataset $(DATASET) $(FLAGS)

.PHONY: help install demo test test-first test-second quick bench reproduce record demo-model
help:
	@sed -n 's/^# make/make/p' Makefile

install: .venv/installed
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	@touch $@
.venv/installed-tests: .venv/installed requirements-optional.txt tests/requirements.txt
	.venv/bin/pip install -q -r tests/requirements.txt
	@touch $@

demo: .venv/installed
	$(DEMO) --mode zero_shot --output outputs/demo/zero_shot.jsonl
	$(DEMO) --mode cot --output outputs/demo/cot.jsonl
	$(DEMO) --mode few_shot --output outputs/demo/few_shot.jsonl
	$(DEMO) --mode thinking --max-new-tokens 512 --output outputs/demo/thinking.jsonl
	$(DEMO) --mode chatml_think_prefill --max-new-tokens 512 --output outputs/demo/chatml_think_prefill.jsonl
	$(PY) benchmark.py $(DEMO_FILES) --cluster template --cluster-from demo/problems --compare \
		--plot outputs/demo/modes.png --html outputs/demo/answers.html

# Tests run in two processes, for each uses one core. A new file of tests goes with the first.
SECOND = $(addprefix tests/,test_training.py test_grpo.py test_models.py test_generation.py test_data.py)
test: .venv/installed-tests
	$(RUFF) check .
	$(RUFF) format --check .
	$(MAKE) --no-print-directory -j2 test-first test-second
quick:
	$(MAKE) --no-print-directory test PYTEST_FLAGS='-m "not slow" $(PYTEST_FLAGS)'
test-first:
	$(PY) -m pytest -q -rs $(PYTEST_FLAGS) tests $(addprefix --ignore=,$(SECOND))
test-second:
	$(PY) -m pytest -q -rs $(PYTEST_FLAGS) $(SECOND)

bench: .venv/installed-tests
	$(PY) bench/generation.py
	OMP_NUM_THREADS=1 $(PY) bench/training.py

reproduce: .venv/installed
	$(PY) reproduce.py run $(EXPERIMENTS)
	$(PY) reproduce.py report $(EXPERIMENTS)

record: demo
	mkdir -p results/demo
	cp $(DEMO_FILES) $(DEMO_FILES:.jsonl=.run.json) outputs/demo/modes.png results/demo/
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1280,900 --virtual-time-budget=4000 \
		--screenshot=results/demo/page.png file://$(CURDIR)/outputs/demo/answers.html
	$(PY) -c 'from PIL import Image; p = "results/demo/page.png"; Image.open(p).convert("RGB").quantize(96).save(p, optimize=True)'

# One thread: a model this small gains nothing from a second, and its sums come out in the same order every time.
demo-model: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m demo.make
