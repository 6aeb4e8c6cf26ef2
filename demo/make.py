"""Makes the demo: word problems, a tokenizer and a small Qwen3 model trained to solve them.

    python -m demo.make

The problems come from demo/templates.py and a seed. The model learns from an endless stream of them,
asked in every mode exactly as common.py asks; no pair of template and numbers in that stream stands
in the train, validation or test problems. All choices were made on the validation problems. Two
checkpoints come out: demo/model, from SHIPPED_STEP, which fine-tuning can still improve, and the
finished one in outputs/demo-finished. Their figures go into demo/README.md.
"""

import copy
import itertools
import json
import random
import re
import zlib
from dataclasses import dataclass
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

from common import (
    MODES,
    build_prompt,
    strip_annotations,
    thinking_is_open,
    write_atomically,
)
from demo.templates import TEMPLATES, draw_problem
from generation import Request, generate
from reading import score_final
from scores import wilson

DEMO = Path(__file__).parent
FINISHED = DEMO.parent / "outputs" / "demo-finished"
SEED = 0


def main():
    problems = {split: make_split(split) for split in SPLIT_SIZES}
    write_problems(problems)
    tokenizer = make_tokenizer(problems["train"])
    finished = make_model(tokenizer)
    shipped = train(finished, draw_batches(problems["train"], tokenizer))
    save_model(shipped, tokenizer, DEMO / "model")
    save_model(finished, tokenizer, FINISHED)
    scores = score_checkpoints({"shipped": shipped, "finished": finished}, tokenizer, problems)
    write_card(scores, shipped, tokenizer, problems)


# ------------------------------------------------------------------------------------------
# Problems
# ------------------------------------------------------------------------------------------

SPLIT_SIZES = {"train": 3000, "validation": 500, "test": 800}


def split_of(problem):
    """The split of a problem: a function of its template and numbers, so no pair is in two splits."""
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


def write_problems(problems):
    (DEMO / "problems").mkdir(exist_ok=True)
    for split in ("train", "test"):
        write_atomically(DEMO / "problems" / f"{split}.jsonl", problem_lines(problems[split]))


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
# Rows of each kind in a hundred: the five modes, bare sums, and questions to copy.
SHARES = {
    "zero_shot": 12,
    "cot": 32,
    "few_shot": 10,
    "thinking": 18,
    "chatml_think_prefill": 18,
    "drill": 8,
    "echo": 6,
}


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
    """A thought is longer than a worked answer: it restates the question and takes hard sums apart."""
    asked = re.search(r"[^.]*\?", question).group().strip()
    *steps, last_line = answer.split("\n")
    lines = [asked, *map(take_apart, steps), f"So the answer is {last_line.removeprefix('#### ')}."]
    return "\n".join(lines)


def take_apart(step):
    """A step's sum by way of easier ones: `8*17=8*10+8*7=80+56=136`."""
    expression = ANNOTATION.search(step)[1]
    step = strip_annotations(step)
    match [int(number) for number in re.findall(r"\d+", expression)]:
        case a, b, c if "+" in expression:
            way = f"{a + b}+{c}"
        case a, 75, 100:
            way = f"{a}/4*3={a // 4}*3"
        case a, percent, 100:
            way = f"{a}/{100 // percent}"
        case a, b if "*" in expression and max(a, b) > 12 and max(a, b) % 10:
            small, large = sorted((a, b))
            tens, units = large - large % 10, large % 10
            way = f"{small}*{tens}+{small}*{units}={small * tens}+{small * units}"
        case a, b if "+" in expression and min(a, b) > 10 and min(a, b) % 10:
            small, large = sorted((a, b))
            tens, units = small - small % 10, small % 10
            way = f"{large}+{tens}+{units}={large + tens}+{units}"
        case a, b if "-" in expression and b > 10 and b % 10:
            tens, units = b - b % 10, b % 10
            way = f"{a}-{tens}-{units}={a - tens}-{units}"
        case _:
            return step
    return step.replace(f"{expression}=", f"{expression}={way}=")


def draw_row(problems, shots, tokenizer, rng):
    """One training row: pieces of text, each with whether the model learns to write it."""
    mode = rng.choices(list(SHARES), SHARES.values())[0]
    if mode == "drill":
        return [piece for problem in itertools.islice(problems, 12) for piece in drill(problem)]
    problem = next(problems)
    if mode == "zero_shot" and rng.random() < 0.5:  # one step can be done in the head, five cannot
        problem = next(p for p in problems if p.answer.count("<<") == 1)
    if mode == "echo":  # copying names and numbers out of the question is the first thing to learn
        return [(problem.question + "\n", False), (problem.question + "\n", True)]
    if mode != "few_shot":
        return [(build_prompt(mode, problem.question, tokenizer), False), (completion(mode, problem), True)]
    count, style = rng.randint(1, 4), rng.choice(("prompt", "turns"))
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
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
        texts += [*(mode.instruction for mode in MODES.values()), "system", "user", "assistant", "Question: Answer:"]
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
STEPS = 10_000
# Late enough to solve most problems, early enough to leave something to learn.
SHIPPED_STEP = 3_000
TOKENS_A_STEP = 2048
AVERAGED_STEPS = 200
MATRIX_RATE, OTHER_RATE = 0.03, 5e-3
WARM_UP, DECAY = 50, 0.4


def make_model(tokenizer):
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=224,
        num_hidden_layers=4,
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
    """Endless batches of rows of like length, about TOKENS_A_STEP tokens each: ids, and which to learn."""
    rng = random.Random(f"{SEED} stream")
    problems = draw_problems("stream", rng)
    while True:
        rows = [encode_row(draw_row(problems, shots, tokenizer, rng), tokenizer) for _ in range(1024)]
        rows.sort(key=len)
        batches = [[]]
        for row in rows:  # ascending, so the newest row is the width of its batch
            if batches[-1] and (len(batches[-1]) + 1) * len(row) > TOKENS_A_STEP:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        for batch in batches:
            padded = [row + [(tokenizer.pad_token_id, False)] * (len(batch[-1]) - len(row)) for row in batch]
            yield torch.tensor(padded).unbind(-1)


def encode_row(pieces, tokenizer):
    """[(token id, whether the model learns to write it)]; pieces are tokenized apart, as inference does."""
    return [(token, learn) for text, learn in pieces for token in tokenizer.encode(text, add_special_tokens=False)]


def train(model, batches):
    """Muon on the matrices, AdamW on the rest. Trains `model` to the end; returns the shipped checkpoint.

    That one is a running average: at a constant learning rate single steps are too noisy to stop at.
    """
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate) for optimizer in optimizers]
    shipped = copy.deepcopy(model)
    progress = tqdm(range(1, STEPS + 1), desc="training", unit="step", mininterval=5)
    for step in progress:
        ids, learn = next(batches)
        loss = completion_loss(model, ids, learn.bool())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step <= SHIPPED_STEP:
            with torch.no_grad():
                torch._foreach_lerp_(list(shipped.parameters()), list(model.parameters()), 1 / AVERAGED_STEPS)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return shipped


def learning_rate(step):
    """A share of the full rate: warm-up, constant, then linear decay to zero over the last part."""
    return min((step + 1) / WARM_UP, 1.0, (STEPS - step) / (DECAY * STEPS))


def completion_loss(model, ids, learn):
    """Cross-entropy of the tokens to learn; only their positions pass through the vocabulary matrix."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][learn[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][learn[:, 1:]])


def save_model(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------

MOST_TOKENS = 512
ROWS = [(mode, "prompt") for mode in MODES]
ROWS.insert(list(MODES).index("few_shot") + 1, ("few_shot", "turns"))


@dataclass(frozen=True)
class Score:
    """One mode of one checkpoint on one split: per problem, whether it was right and how long it was."""

    right: list
    steps: list
    lengths: list


def score_checkpoints(checkpoints, tokenizer, problems):
    """{(checkpoint, split, mode, style): Score}, each printed as it comes."""
    shots = [(shot.question, shot.answer) for shot in problems["train"][:3]]
    scores = {}
    for (name, model), split, (mode, style) in itertools.product(checkpoints.items(), ("validation", "test"), ROWS):
        score = score_mode(model, tokenizer, problems[split], mode, style, shots)
        scores[name, split, mode, style] = score
        print(f"{name:8} {split:10} {mode:20} {style:6} {accuracy(score)}", flush=True)
    return scores


def score_mode(model, tokenizer, problems, mode, style, shots):
    """Greedy answers to all problems, read as benchmark.py reads them."""
    examples = shots if mode == "few_shot" else ()
    prompts = [build_prompt(mode, problem.question, tokenizer, examples, style) for problem in problems]
    requests = [Request(i, 0, tokenizer.encode(prompt), MOST_TOKENS) for i, prompt in enumerate(prompts)]
    answers = sorted(generate(model, tokenizer, requests, note=lambda line: None), key=lambda answer: answer.id)
    outcomes = [
        score_final(answer.text, problem.answer, thinking_is_open(prompt))
        for answer, problem, prompt in zip(answers, problems, prompts, strict=True)
    ]
    return Score(
        right=[outcome == "right" for outcome in outcomes],
        steps=[problem.answer.count("<<") for problem in problems],
        lengths=[answer.output_tokens for answer in answers],
    )


def accuracy(score):
    low, high = wilson(sum(score.right), len(score.right))
    return f"{100 * sum(score.right) / len(score.right):.1f} % ({low:.1f} to {high:.1f})"


def accuracy_by_steps(score):
    """The accuracy on the problems of 1, 2, 3, 4 and 5 steps."""
    for steps in range(1, 6):
        right = [right for right, count in zip(score.right, score.steps, strict=True) if count == steps]
        yield f"{100 * sum(right) / len(right):.0f} %"


CARD = """\
# The demo: word problems and a small model

Written by `python -m demo.make`, figures included.

`model/` has Qwen3's architecture and {parameters:,} parameters, and `problems/` holds word problems that
were written for it. They show the whole pipeline at work in minutes on two cores, and nothing else: the
model knows the {templates} templates of [templates.py](templates.py) and nothing of the real GSM8K, and no
figure here says anything about a real model.

## Problems

{train:,} train and {test:,} test problems in GSM8K's format, of 1 to 5 steps, with results from 2 to 300.
Each line also holds the `template` and the `numbers` that it was made from. A hash of these two decides
the split, so no pair stands in two splits. The {validation:,} validation problems, made from the same
seed and kept in no file, served for every choice; the test problems were scored once.

Always giving the most common answer of train would be right in {guess:.1f} % of the test problems.

## Model

Qwen3 with {layers} layers of width {width}, {heads} attention heads and {kv_heads} key/value heads of
size {head_size}, tied embeddings, fp32. Its tokenizer is a byte-level BPE of {vocabulary:,} tokens with
Qwen's rule for cutting text, single digits, and Qwen3's chat and think tokens. It was trained for {steps:,}
steps of about {tokens:,} tokens, with Muon on the matrices and AdamW on the rest, on an endless stream of problems. Of 100 rows
{shares}
(drill: bare sums; echo: a question to copy; half of the zero_shot rows have one step). Of train.jsonl it
has seen the first four problems, the worked examples of few_shot.

`model/` is the checkpoint of step {shipped_step:,}, averaged over about its last {averaged} steps: good
enough to show every mode, with something left for fine-tuning to learn. That step was fixed on the validation
problems before any fine-tuning was tried. The finished model goes to `outputs/demo-finished`.

Its thoughts differ from its worked answers: they restate the question and take the hard sums apart
(`8*17=8*10+8*7=80+56=136`). It writes no `<<...>>` before it is fine-tuned on some.

## Accuracy

Greedy, at most {most_tokens} new tokens, final answer as `benchmark.py` reads it, 95 % intervals.

| mode | shipped, validation | shipped, test | finished, validation | finished, test |
| --- | --- | --- | --- | --- |
{accuracies}

On the test problems by number of steps:

| mode | checkpoint | 1 | 2 | 3 | 4 | 5 |
| --- | --- | --- | --- | --- | --- | --- |
{by_steps}

Output tokens of the shipped model on the test problems:

| mode | mean | 90 % below | most |
| --- | --- | --- | --- |
{lengths}
"""


def write_card(scores, model, tokenizer, problems):
    """The README of the demo: what it is, and every figure of this run."""
    answers = {split: [problem.answer.split()[-1] for problem in problems[split]] for split in problems}
    common_answer = max(answers["train"], key=answers["train"].count)
    config, labels = model.config, {row: row[0] + (" as turns" if row[1] == "turns" else "") for row in ROWS}
    columns = list(itertools.product(("shipped", "finished"), ("validation", "test")))
    accuracies = [[labels[row], *(accuracy(scores[*column, *row]) for column in columns)] for row in ROWS]
    by_steps = [
        [labels[row], name, *accuracy_by_steps(scores[name, "test", *row])]
        for row in ROWS
        for name in ("shipped", "finished")
    ]
    lengths = []
    for row in ROWS:
        ordered = sorted(scores["shipped", "test", *row].lengths)
        lengths.append(
            [labels[row], f"{sum(ordered) / len(ordered):.0f}", ordered[len(ordered) * 9 // 10], ordered[-1]]
        )
    card = CARD.format(
        parameters=model.num_parameters(),
        templates=len(TEMPLATES),
        guess=100 * answers["test"].count(common_answer) / len(answers["test"]),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        vocabulary=len(tokenizer),
        steps=STEPS,
        tokens=TOKENS_A_STEP,
        shares=", ".join(f"{share} are {kind}" for kind, share in SHARES.items()),
        shipped_step=SHIPPED_STEP,
        averaged=AVERAGED_STEPS,
        most_tokens=MOST_TOKENS,
        accuracies=table(accuracies),
        by_steps=table(by_steps),
        lengths=table(lengths),
        **SPLIT_SIZES,
    )
    write_atomically(DEMO / "README.md", card)
    print(card)


def table(rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


if __name__ == "__main__":
    main()
