# make demo   install, answer the demo's problems in five modes, print and draw the table
# make test   install, lint, test
# make reproduce  every published row, its controls and better recipes: MODEL=demo/model DATASET=demo/problems for the demo
# make self-train  the demo learns from its own right answers, beside plain fine-tuning
# make demo-train  fine-tune the demo's model fully and with LoRA, at the published rate and at its own best
# make bench  measure generation against transformers' generate, and training against TRL's defaults
# make demo-model  make the demo's problems, tokenizer and model anew
# make help   what else there is

PYTHON ?= python3
PY = .venv/bin/python
DEMO = --model-id demo/model --dataset demo/problems

.SECONDARY:
.PHONY: help install demo demo-train demo-model test bench record-demo record-demo-train reproduce report self-train
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
        $(addprefix sweep/lora-r4/,1e-6 1e-2 3e-2 5e-2) $(addprefix sweep/lora-r32/,1e-6 5e-3 1e-2 3e-2)
COMPARED = base $(foreach method,full lora-r4 lora-r32,$(method)/1e-6 $(method)/best)
TRIED = $(foreach run,$(COMPARED),outputs/demo-train/test/$(subst /,_,$(run)).jsonl)
BRIEFLY = $(DEMO) --max-steps 80 --eval-questions 300 --resume
QUIETLY = >outputs/demo-train/$(subst /,-,$@).log 2>&1 || { cat outputs/demo-train/$(subst /,-,$@).log; exit 1; }
demo-train: export OMP_NUM_THREADS = 1
demo-train: .venv/installed
	mkdir -p outputs/demo-train/test
	$(MAKE) --no-print-directory -j2 $(SWEEP)
	$(PY) -m demo.sweep outputs/demo-train
	$(MAKE) --no-print-directory -j2 $(addprefix try/,$(COMPARED))
	$(PY) benchmark.py $(TRIED) --compare
sweep/full/%:
	$(PY) train.py $(BRIEFLY) --learning-rate $* --output-dir outputs/demo-train/full/$* $(QUIETLY)
sweep/lora-r4/%:
	$(PY) train_lora.py $(BRIEFLY) --rank 4 --learning-rate $* --output-dir outputs/demo-train/lora-r4/$* $(QUIETLY)
sweep/lora-r32/%:
	$(PY) train_lora.py $(BRIEFLY) --rank 32 --learning-rate $* --output-dir outputs/demo-train/lora-r32/$* $(QUIETLY)
try/%: ANSWER = $(PY) inference.py --dataset demo/problems --mode chatml_think_prefill --max-new-tokens 512 --overwrite
try/base:
	$(ANSWER) --model-id demo/model --output outputs/demo-train/test/base.jsonl $(QUIETLY)
try/%:
	$(ANSWER) --model-id outputs/demo-train/$* --output outputs/demo-train/test/$(subst /,_,$*).jsonl $(QUIETLY)

# ---- Reproduction: `make row/NAME` runs one row, `make rows/GROUP` a group, `make -n reproduce` shows all commands.
# A row is run on where it stopped, left alone where it is finished, and made again where its record differs.

MODEL ?= Qwen/Qwen3-0.6B
DATASET ?= openai/gsm8k
HUB ?= AnirudhCheruvu
NAME = $(patsubst /%,%,$(subst ..,up,$(MODEL)))
OUT ?= outputs/$(NAME)$(CHECKPOINTS:%=-%)
RESULTS ?= results/$(NAME)$(CHECKPOINTS:%=-%)
TRAINED ?= outputs/$(NAME)/train
ifeq ($(MODEL),demo/model)
# At the demo's size: short trainings over three seeds, two processes of one thread each.
JOBS ?= 2
SEEDS ?= 1 2 3
STEPS ?= 100
SELF = --learning-rate 1e-3 --max-steps $(STEPS)
EVAL ?= --eval-questions 200
TRAIN_LIMIT ?= 1000
BUDGETS ?= 32 64 128 256
SMALL = OMP_NUM_THREADS=1
else
JOBS ?= 1
SEEDS ?= 42
SELF = --max-steps 400
BUDGETS ?= 512 1024 2048 4096
endif

ASK = $(PY) inference.py --overwrite changed --dataset $(DATASET) $(LIMIT:%=--limit %) --output $(OUT)/$(@F).jsonl
BASE = $(ASK) --model-id $(MODEL)
PREFILL = --mode chatml_think_prefill --max-new-tokens 1024
SAMPLED = --do-sample --temperature 0.6 --top-p 0.95 --top-k 20
THINKING = --mode thinking $(SAMPLED) --max-new-tokens 4096
TRAIN = train.py --overwrite changed --model-id $(MODEL) --dataset $(DATASET) --output-dir $(TRAINED)/$(@F) $(STEPS:%=--max-steps %) $(EVAL)
FULL = $(PY) $(TRAIN)
LORA = $(PY) $(TRAIN:train.py%=train_lora.py%)
OLD = --epochs 6 --learning-rate 1e-6 --lr-scheduler cosine --batch-size 12 --patience 2
OLD_LORA = $(OLD) --alpha 16 --dropout 0.05 --target-modules q_proj,v_proj --dtype fp32

# The published rows: their decoding and training, this project's wording.
PUBLISHED_ROWS = zero_shot_model_outputs cot_model_outputs few_shot_model_outputs Updated_few_shot_model_outputs \
	thinking_model_outputs_reduced_batch BF16-thinking_model_outputs_reduced_batch Qwen3-GSM8k-SFT-FP32-eval-score \
	Qwen3-GSM8k-SFT-FP32-temp0 Qwen3-GSM8k-SFT-FP32-temp06 Qwen3-GSM8k-SFT-BF16-temp0 \
	Qwen3-GSM8k-LoRA-r4-FP32-eval-score Qwen3-GSM8k-LoRA-r32-FP32-eval-score
row/zero_shot_model_outputs: ; $(BASE) --mode zero_shot --max-new-tokens 512
row/cot_model_outputs: ; $(BASE) --mode cot --max-new-tokens 512
row/few_shot_model_outputs: ; $(BASE) --mode few_shot --few-shot-k 3 --max-new-tokens 512
row/Updated_few_shot_model_outputs: ; $(BASE) --mode few_shot --few-shot-k 3 --few-shot-style turns --max-new-tokens 512
row/thinking_model_outputs_reduced_batch: ; $(BASE) --mode thinking $(SAMPLED) --max-new-tokens 1024 --dtype fp32
row/BF16-thinking_model_outputs_reduced_batch: ; $(BASE) --mode thinking $(SAMPLED) --max-new-tokens 1024 --dtype bf16
row/Qwen3-GSM8k-SFT-FP32-eval-score: train/Qwen3-GSM8k-SFT-FP32-eval-score
	$(ASK) --model-id $(WEIGHTS)/Qwen3-GSM8k-SFT-FP32-eval-score $(PREFILL) --dtype fp32
row/Qwen3-GSM8k-SFT-FP32-temp0: train/Qwen3-GSM8k-SFT-FP32
	$(ASK) --model-id $(WEIGHTS)/Qwen3-GSM8k-SFT-FP32 $(PREFILL) --dtype fp32
row/Qwen3-GSM8k-SFT-FP32-temp06: train/Qwen3-GSM8k-SFT-FP32
	$(ASK) --model-id $(WEIGHTS)/Qwen3-GSM8k-SFT-FP32 $(PREFILL) $(SAMPLED) --max-new-tokens 2048 --dtype fp32
row/Qwen3-GSM8k-SFT-BF16-temp0: train/Qwen3-GSM8k-SFT-BF16
	$(ASK) --model-id $(WEIGHTS)/Qwen3-GSM8k-SFT-BF16 $(PREFILL) --dtype bf16
row/Qwen3-GSM8k-LoRA-r4-FP32-eval-score: train/Qwen3-GSM8k-LoRA-r4-FP32-eval-score
	$(ASK) --model-id $(WEIGHTS)/Qwen3-GSM8k-LoRA-r4-FP32-eval-score $(PREFILL) --dtype fp32
row/Qwen3-GSM8k-LoRA-r32-FP32-eval-score: train/Qwen3-GSM8k-LoRA-r32-FP32-eval-score
	$(ASK) --model-id $(WEIGHTS)/Qwen3-GSM8k-LoRA-r32-FP32-eval-score $(PREFILL) --dtype fp32

# Where their weights come from: own training, or with CHECKPOINTS=published the hub.
ifeq ($(CHECKPOINTS),published)
WEIGHTS = $(HUB)
train/Qwen3-GSM8k-%: ; @:
else
WEIGHTS = $(TRAINED)
train/Qwen3-GSM8k-SFT-FP32-eval-score: ; $(FULL) $(OLD) --dtype fp32
train/Qwen3-GSM8k-SFT-FP32: ; $(FULL) $(OLD) --dtype fp32 --eval-questions 0
train/Qwen3-GSM8k-SFT-BF16: ; $(FULL) $(OLD) --dtype bf16 --eval-questions 0
train/Qwen3-GSM8k-LoRA-r4-FP32-eval-score: ; $(LORA) $(OLD_LORA) --rank 4
train/Qwen3-GSM8k-LoRA-r32-FP32-eval-score: ; $(LORA) $(OLD_LORA) --rank 32
endif

# Controls: without them 66.7 against 48.1 compares mode, decoding and token limit at once.
CONTROL_ROWS = base-prefill-1024 base-prefill-4096 thinking-4096 SFT-FP32-eval-score-cot SFT-FP32-cot SFT-BF16-cot
row/base-prefill-1024: ; $(BASE) $(PREFILL)
row/base-prefill-4096: ; $(BASE) $(PREFILL) --max-new-tokens 4096
row/thinking-4096: ; $(BASE) $(THINKING) --num-samples 4
row/SFT-%-cot: train/Qwen3-GSM8k-SFT-%
	$(ASK) --model-id $(WEIGHTS)/Qwen3-GSM8k-SFT-$* --mode cot --max-new-tokens 512

# Better recipes: this project's default rates, greedy, each seed a training.
RECIPES = sft lora-r4 lora-r32 sft-without-annotations
RECIPE_ROWS = $(foreach recipe,$(RECIPES),$(SEEDS:%=$(recipe)-seed%))
row/%: train/% ; $(ASK) --model-id $(TRAINED)/$* $(PREFILL)
train/sft-seed%: ; $(FULL) --seed $*
train/sft-without-annotations-seed%: ; $(FULL) --strip-annotations --seed $*
train/lora-r4-seed%: ; $(LORA) --rank 4 --seed $*
train/lora-r32-seed%: ; $(LORA) --rank 32 --seed $*

# Past the published accuracy: thinking budgets, votes, and training on own right answers instead of the references.
PAST_ROWS = $(BUDGETS:%=thinking-budget-%) maj8 $(SELF_ROWS)
SELF_ROWS = $(foreach data,own-answers references,$(SEEDS:%=$(data)-seed%))
row/thinking: ; $(BASE) --mode thinking $(SAMPLED) --think-budget $(BUDGETS)
row/thinking-budget-%: row/thinking ; @:
row/maj8: ; $(BASE) $(THINKING) --num-samples 8
row/own-answers-seed%: train/own-answers-seed% ; $(ASK) --model-id $(TRAINED)/$(@F) $(THINKING) --num-samples 4
row/references-seed%: train/references-seed% ; $(ASK) --model-id $(TRAINED)/$(@F) $(THINKING) --num-samples 4
train/own-answers-seed%: keep ; $(FULL) $(SELF) --completions $(OUT)/right.jsonl --seed $*
train/references-seed%: ; $(FULL) $(SELF) --seed $*
keep: row/of-train ; $(PY) benchmark.py $(OUT)/of-train.jsonl --keep-correct $(OUT)/right.jsonl
row/of-train: LIMIT = $(TRAIN_LIMIT)
row/of-train: ; $(BASE) --split train $(THINKING) --num-samples 4

ROWS = $(PUBLISHED_ROWS) $(CONTROL_ROWS) $(RECIPE_ROWS) $(PAST_ROWS)
rows/published: $(PUBLISHED_ROWS:%=row/%)
rows/controls: $(CONTROL_ROWS:%=row/%)
rows/recipes: $(RECIPE_ROWS:%=row/%)
rows/past: $(PAST_ROWS:%=row/%)
rows/self: $(SELF_ROWS:%=row/%)
reproduce: .venv/installed
	$(SMALL) $(MAKE) --no-print-directory -j$(JOBS) $(ROWS:%=row/%)
	$(MAKE) --no-print-directory report
self-train: .venv/installed
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 MODEL=demo/model DATASET=demo/problems row/thinking-4096 rows/self
	$(MAKE) --no-print-directory MODEL=demo/model DATASET=demo/problems compare/self

# The comparisons that carry the claims, each a family of paired tests.
COMPARE = $(PY) benchmark.py --compare --pool-seeds --markdown $(COMPARED_$(1):%=$(OUT)/%.jsonl)
COMPARED_prompting = zero_shot_model_outputs cot_model_outputs few_shot_model_outputs $(BEST_PUBLISHED)
COMPARED_fine-tuning = base-prefill-1024 $(filter Qwen3-GSM8k%-temp0 Qwen3-GSM8k%-eval-score,$(PUBLISHED_ROWS))
COMPARED_fine-tuning-in-cot = cot_model_outputs $(filter SFT-%,$(CONTROL_ROWS))
COMPARED_thinking-or-fine-tuned = $(BEST_PUBLISHED) thinking-4096 base-prefill-4096 Qwen3-GSM8k-SFT-BF16-temp0
COMPARED_recipes = base-prefill-1024 $(RECIPE_ROWS)
COMPARED_self = thinking-4096 $(SELF_ROWS)
BEST_PUBLISHED = BF16-thinking_model_outputs_reduced_batch
compare/%: ; @$(call COMPARE,$*)

# What the rows came to, for reading: results/MODEL/README.md, its pictures, and every row's answers beside it.
PAGE = $(RESULTS)/README.md
TABLE = $(PY) benchmark.py --markdown --commands --pool-seeds $(1:%=$(OUT)/%.jsonl) --plot $(RESULTS)/$(2).png $(3) >>$(PAGE)
HEADING = printf '\n\043\043 %s\n\n' "$(1)" >>$(PAGE)
FAMILY = $(call HEADING,Compared: $(1)) && $(call COMPARE,$(1)) >>$(PAGE)
PICTURE = printf '\n![%s](%s.png)\n' "$(1)" $(1) >>$(PAGE)
report:
	mkdir -p $(RESULTS)/train
	for row in $(ROWS); do gzip -9nc $(OUT)/$$row.jsonl >$(RESULTS)/$$row.jsonl.gz && cp $(OUT)/$$row.run.json $(RESULTS)/ || exit; done
	for run in $(TRAINED)/*/train.run.json; do cp $$run $(RESULTS)/train/$$(basename $$(dirname $$run)).run.json; done
	printf '\043 %s\n' "$(MODEL) on $(DATASET), by make reproduce" >$(PAGE)
	$(call HEADING,The published rows)
	$(call TABLE,$(PUBLISHED_ROWS),published,--published)
	$(call PICTURE,published)
	$(call HEADING,Controls)
	$(call TABLE,$(CONTROL_ROWS),controls)
	$(call PICTURE,controls)
	$(call HEADING,Better recipes)
	$(call TABLE,base-prefill-1024 $(RECIPE_ROWS),recipes)
	$(call PICTURE,recipes)
	$(call HEADING,Past the published accuracy)
	$(call TABLE,thinking-4096 $(PAST_ROWS),past)
	$(call PICTURE,past)
	$(call FAMILY,prompting)
	$(call FAMILY,fine-tuning)
	$(call FAMILY,fine-tuning-in-cot)
	$(call FAMILY,thinking-or-fine-tuned)
	$(call FAMILY,recipes)
	$(call FAMILY,self)

# One thread: a model this small gains nothing from a second, and its sums come out in the same order every time.
demo-model: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m demo.make

test: .venv/installed-tests
	.venv/bin/ruff check .
	$(PY) -m pytest -q -rs $(PYTEST_FLAGS) tests

bench: .venv/installed-tests
	$(PY) bench/generation.py
	OMP_NUM_THREADS=1 $(PY) bench/training.py

# What `make demo` gave, kept for the README; a test compares the README's table with it.
record-demo: demo
	mkdir -p results/demo
	cp outputs/demo/*.jsonl outputs/demo/*.run.json outputs/demo/modes.png results/demo/
record-demo-train: demo-train
	$(PY) -m demo.sweep outputs/demo-train >results/demo/training.txt
	$(PY) benchmark.py $(TRIED) --compare >>results/demo/training.txt
