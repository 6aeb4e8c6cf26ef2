# make demo   install, answer the demo's problems in five modes, print and draw the table
# make test   install, lint, test
# make demo-train  fine-tune the demo's model fully and with LoRA, at the published rate and at its own best
# make bench  measure generation against transformers' generate, and training against TRL's defaults
# make demo-model  make the demo's problems, tokenizer and model anew
# make help   what else there is

PYTHON ?= python3
PY = .venv/bin/python
DEMO = --model-id demo/model --dataset demo/problems

.PHONY: help install demo demo-train demo-model test bench record-demo record-demo-train
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

# Two runs at a time, a core each. A finished run is not run again, a killed one goes on.
SWEEP = $(addprefix sweep/full/,1e-6 3e-3 1e-2 3e-2) \
        $(foreach rank,4 32,$(addprefix sweep/lora-r$(rank)/,1e-6 3e-3 1e-2 3e-2))
COMPARED = base $(foreach method,full lora-r4 lora-r32,$(method)/1e-6 $(method)/best)
TRIED = $(foreach run,$(COMPARED),outputs/demo-train/test/$(subst /,_,$(run)).jsonl)
TRAIN = $(DEMO) --max-steps 100 --eval-questions 300 --resume
QUIETLY = >outputs/demo-train/$(subst /,-,$@).log 2>&1 || { cat outputs/demo-train/$(subst /,-,$@).log; exit 1; }
demo-train: export OMP_NUM_THREADS = 1
demo-train: .venv/installed
	mkdir -p outputs/demo-train/test
	$(MAKE) --no-print-directory -j2 $(SWEEP)
	$(PY) -m demo.sweep outputs/demo-train
	$(MAKE) --no-print-directory -j2 $(addprefix try/,$(COMPARED))
	$(PY) benchmark.py $(TRIED) --compare
sweep/full/%:
	$(PY) train.py $(TRAIN) --learning-rate $* --output-dir outputs/demo-train/full/$* $(QUIETLY)
sweep/lora-r4/%:
	$(PY) train_lora.py $(TRAIN) --rank 4 --learning-rate $* --output-dir outputs/demo-train/lora-r4/$* $(QUIETLY)
sweep/lora-r32/%:
	$(PY) train_lora.py $(TRAIN) --rank 32 --learning-rate $* --output-dir outputs/demo-train/lora-r32/$* $(QUIETLY)
try/%: ANSWER = $(PY) inference.py --dataset demo/problems --mode chatml_think_prefill --max-new-tokens 512 --overwrite
try/base:
	$(ANSWER) --model-id demo/model --output outputs/demo-train/test/base.jsonl $(QUIETLY)
try/%:
	$(ANSWER) --model-id outputs/demo-train/$* --output outputs/demo-train/test/$(subst /,_,$*).jsonl $(QUIETLY)

demo-model: .venv/installed
	$(PY) -m demo.make

test: .venv/installed-tests
	.venv/bin/ruff check .
	$(PY) -m pytest -q -rs $(PYTEST_FLAGS) tests

bench: .venv/installed-tests
	$(PY) tests/bench_generation.py
	OMP_NUM_THREADS=1 $(PY) tests/bench_training.py

# What `make demo` gave, kept for the README; a test compares the README's table with it.
record-demo: demo
	mkdir -p results/demo
	cp outputs/demo/*.jsonl outputs/demo/*.run.json outputs/demo/modes.png results/demo/
record-demo-train: demo-train
	$(PY) -m demo.sweep outputs/demo-train >results/demo/training.txt
	$(PY) benchmark.py $(TRIED) --compare >>results/demo/training.txt
