"""Makes the demo: word problems, a tokenizer and a small Qwen3 model trained to solve them.

    python -m demo.make

The problems come from demo/templates.py and a seed. The model learns from an endless stream of them,
asked in every mode exactly as common.py asks; the problems of train.jsonl and test.jsonl and those of
the validation split are never in that stream. Everything is a function of the constants below.
"""

import copy
import itertools
import json
import random
import re
import zlib
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common import FEW_SHOT_STYLES, INSTRUCTIONS, build_prompt, strip_annotations
from demo.templates import TEMPLATES, draw_problem

DEMO = Path(__file__).parent
SEED = 0

# ------------------------------------------------------------------------------------------
# Problems
# ------------------------------------------------------------------------------------------

SPLIT_SIZES = {"train": 3000, "validation": 500, "test": 800}


def split_of(problem):
    """The split a problem belongs to. It follows from template and numbers, so no pair is in two splits."""
    percent = zlib.crc32(repr((problem.template, problem.numbers)).encode()) % 100
    return "stream" if percent < 60 else "train" if percent < 80 else "validation" if percent < 88 else "test"


def draw_problems(split, rng):
    """Endless problems of one split, every template as often as any other."""
    while True:
        problem = draw_problem(rng.choice(TEMPLATES), rng)
        if split_of(problem) == split:
            yield problem


def make_split(split):
    """The problems of a split, no question twice."""
    problems = draw_problems(split, random.Random(f"{SEED} {split}"))
    chosen = {}
    while len(chosen) < SPLIT_SIZES[split]:
        problem = next(problems)
        chosen.setdefault(problem.question, problem)
    return list(chosen.values())


def problem_lines(problems):
    """A problem file: `question` and `answer` as in GSM8K, then what they were made from."""
    return "".join(
        json.dumps({"question": p.question, "answer": p.answer, "template": p.template, "numbers": p.numbers}) + "\n"
        for p in problems
    )


# ------------------------------------------------------------------------------------------
# What the model learns to write
# ------------------------------------------------------------------------------------------

ANNOTATION = re.compile(r"<<(.+?)=(\d+)>>")
SHARES = {"zero_shot": 12, "cot": 32, "few_shot": 10, "thinking": 18, "chatml_think_prefill": 18, "drill": 8, "echo": 8}


def completion(mode, problem):
    """The text the model should answer with in a mode."""
    reasoning, last_line = strip_annotations(problem.answer).rsplit("\n", 1)
    if mode == "zero_shot":
        return last_line + "<|im_end|>"
    if mode in ("cot", "few_shot"):
        return f"{reasoning}\n{last_line}<|im_end|>"
    opening = "<think>\n" if mode == "thinking" else ""
    return f"{opening}{thought(problem.question, problem.answer)}\n</think>\n\n{last_line}<|im_end|>"


def thought(question, answer):
    """A thought is longer than a worked answer: it restates the question and splits up the hard sums."""
    lines = [re.search(r"[^.]*\?", question).group().strip()]
    *steps, last_line = answer.split("\n")
    for step in steps:
        expression, result = ANNOTATION.search(step).groups()
        working = split_up(expression, int(result))
        if working:
            lines.append(f"{expression}: {working}.")
        lines.append(strip_annotations(step))
    return "\n".join([*lines, f"So the answer is {last_line.removeprefix('#### ')}."])


def split_up(expression, result):
    """A hard sum as easier ones, `17*8` as `8*10=80, 8*7=56, 80+56=136`; None for an easy one."""
    operands = [int(number) for number in re.findall(r"\d+", expression)]
    if len(operands) == 3 and "+" in expression:
        a, b, c = operands
        return f"{a}+{b}={a + b}, {a + b}+{c}={result}"
    if len(operands) == 3:  # a percentage, a*b/100
        a, percent, _ = operands
        if percent == 75:
            return f"{a}/4={a // 4}, 3*{a // 4}={result}"
        return f"{a}/{100 // percent}={result}"
    a, b = operands
    small, large = sorted(operands)
    if "/" in expression:
        return f"{b}*{result}={a}" if b > 2 else None
    if "*" in expression:
        tens, units = large - large % 10, large % 10
        if large < 13 or not units:
            return None
        return f"{small}*{tens}={small * tens}, {small}*{units}={small * units}, {small * tens}+{small * units}={result}"
    part = b if "-" in expression else small
    tens, units = part - part % 10, part % 10
    if not tens or not units:
        return None
    if "-" in expression:
        return f"{a}-{tens}={a - tens}, {a - tens}-{units}={result}"
    return f"{large}+{tens}={large + tens}, {large + tens}+{units}={result}"


def draw_row(problems, shots, tokenizer, rng):
    """One training row: pieces of text, each with whether the model learns to write it."""
    mode = rng.choices(list(SHARES), SHARES.values())[0]
    if mode == "drill":
        return [piece for problem in itertools.islice(problems, 12) for piece in drill(problem)]
    problem = next(problems)
    if mode == "echo":  # copying names and numbers out of the question is the first thing to learn
        return [(problem.question + "\n", False), (problem.question + "\n", True)]
    if mode != "few_shot":
        return [(build_prompt(mode, problem.question, tokenizer), False), (completion(mode, problem), True)]
    count, style = rng.randint(1, 4), rng.choice(FEW_SHOT_STYLES)
    # Half of the rows show the examples that inference shows, the first ones of the train split.
    examples = shots[:count] if rng.random() < 0.5 else list(itertools.islice(problems, count))
    pairs = [(example.question, example.answer) for example in examples]
    rest, pieces = build_prompt("few_shot", problem.question, tokenizer, pairs, style), []
    for _, answer in pairs:  # the worked answers are as good to learn from as the last one
        answer = strip_annotations(answer)
        answer = f" {answer}" if style == "prompt" else f"{answer}<|im_end|>"
        before, rest = rest.split(answer, 1)
        pieces += [(before, False), (answer, True)]
    return [*pieces, (rest, False), (completion("few_shot", problem), True)]


def drill(problem):
    """The bare sums of a problem, `17*8=136`: most of what is hard to learn is the arithmetic."""
    for expression, result in ANNOTATION.findall(problem.answer):
        yield f"{expression}=", False
        yield f"{result}\n", True


# ------------------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------------------

VOCABULARY = 1000
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
# Qwen's rule for cutting text before the merges; every digit stands alone.
QWEN_PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def make_tokenizer(problems):
    """Byte-level BPE without Qwen's NFC normalizer, so that any text decodes to exactly itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS) - len(THINK_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = []
    for problem in problems:
        texts += [*INSTRUCTIONS.values(), "system", "user", "assistant", "Question: Answer:"]
        texts += [problem.question, completion("cot", problem), completion("thinking", problem)]
    # The added tokens are cut out of the text, as they are once they exist.
    marks = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS + THINK_TOKENS))
    tokenizer.train_from_iterator([part for text in texts for part in marks.split(text)], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


# ------------------------------------------------------------------------------------------
# Model and training
# ------------------------------------------------------------------------------------------

POSITIONS = 2048
STEPS = 9000
SHIPPED_STEP = 3000
TOKENS_A_STEP = 2048
MATRIX_RATE, OTHER_RATE = 0.03, 5e-3
WARM_UP, DECAY = 50, 0.4


def make_model(tokenizer):
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(  # Qwen3's own sampling values
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def draw_batches(shots, tokenizer):
    """Endless batches of rows of like length, about TOKENS_A_STEP tokens each: (ids, whether to learn it)."""
    rng = random.Random(f"{SEED} stream")
    problems = draw_problems("stream", rng)
    while True:
        rows = [encode_row(draw_row(problems, shots, tokenizer, rng), tokenizer) for _ in range(1024)]
        rows.sort(key=len)
        batches, width = [], 0
        for row in rows:
            width = len(row)
            if not batches or (len(batches[-1]) + 1) * width > TOKENS_A_STEP:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        for batch in batches:
            width = max(map(len, batch))
            yield torch.tensor([row + [(tokenizer.pad_token_id, False)] * (width - len(row)) for row in batch]).unbind(-1)


def encode_row(pieces, tokenizer):
    """[(token id, whether the model learns to write it)]; pieces are tokenized apart, as inference does."""
    return [
        (token, learn)
        for text, learn in pieces
        for token in tokenizer.encode(text, add_special_tokens=False)
    ]


def train(model, batches):
    """Muon on the matrices, AdamW on the rest; returns the weights of SHIPPED_STEP, averaged, beside the last."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate) for optimizer in optimizers]
    average = copy.deepcopy(model)
    progress = tqdm(range(1, STEPS + 1), desc="training", unit="step", mininterval=5)
    for step in progress:
        ids, learn = next(batches)
        loss = completion_loss(model, ids, learn.bool())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step <= SHIPPED_STEP:
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.02)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return average


def learning_rate(step):
    """Warm-up, constant, then linear decay to zero over the last part."""
    return min((step + 1) / WARM_UP, 1.0, (STEPS - step) / (DECAY * STEPS))


def completion_loss(model, ids, learn):
    """Cross-entropy of the tokens to learn; only their positions pass through the vocabulary matrix."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][learn[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][learn[:, 1:]])


def main():
    torch.manual_seed(SEED)
    (DEMO / "problems").mkdir(exist_ok=True)
    problems = {split: make_split(split) for split in SPLIT_SIZES}
    for split in ("train", "test"):
        (DEMO / "problems" / f"{split}.jsonl").write_text(problem_lines(problems[split]), encoding="utf-8")
    tokenizer = make_tokenizer(problems["train"])
    model = make_model(tokenizer)
    shipped = train(model, draw_batches(problems["train"], tokenizer))
    shipped.save_pretrained(DEMO / "model")
    tokenizer.save_pretrained(DEMO / "model")


if __name__ == "__main__":
    main()
