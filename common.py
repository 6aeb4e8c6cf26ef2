"""What the scripts share: prompts, data, model loading, generation, scoring, file formats.

Each fact lives here once. One prompt builder serves inference and training; one scorer serves
`benchmark.py` and the evaluation inside training; one generation loop serves them all.

The page reads in the order a run happens: errors and flags, prompts, data, model, generation,
scoring, files. torch and transformers are imported inside the functions that use them, so that
`--help` and `benchmark.py` start at once.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# ------------------------------------------------------------------------------------------
# Errors and flags
# ------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend. Its text is one line: the file, line or flag, and the way out."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse that answers a wrong flag with one line on stderr and exit code 2."""

    def error(self, message):
        raise UserError(message)


def command_line(main):
    """Decorate a script's `main(argv=None)`: a UserError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except UserError as error:
            script = Path(sys.modules[main.__module__].__file__ or "").name
            print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None

    return run


# ------------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------------

MODES = ("zero_shot", "cot", "few_shot", "thinking", "chatml_think_prefill")
FEW_SHOT_STYLES = ("prompt", "turns")

# The instruction of each mode is the system message and the question alone is the user message,
# so that all prompts of a run begin alike and generation can compute that beginning once.
ANSWER_LINE = "End with one last line, the final number alone, without units or symbols:\n#### <answer>"
ZERO_SHOT_INSTRUCTION = "Answer the math problem with this one line and nothing else:\n#### <answer>"
COT_INSTRUCTION = "Solve the math problem step by step. " + ANSWER_LINE
FEW_SHOT_INSTRUCTION = COT_INSTRUCTION
THINKING_INSTRUCTION = "Solve the math problem. " + ANSWER_LINE
INSTRUCTIONS = {
    "zero_shot": ZERO_SHOT_INSTRUCTION,
    "cot": COT_INSTRUCTION,
    "few_shot": FEW_SHOT_INSTRUCTION,
    "thinking": THINKING_INSTRUCTION,
    "chatml_think_prefill": THINKING_INSTRUCTION,
}

CHATML_TURN = "<|im_start|>{role}\n{content}<|im_end|>\n"
CHATML_THINK_PREFILL = "<|im_start|>assistant\n<think>\n"

CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")


def strip_annotations(answer):
    """Drop GSM8K's `<<48/2=24>>` calculator annotations, which are markup and not English."""
    return CALCULATOR_ANNOTATION.sub("", answer)


def chatml_think_prefill(question, system_prompt=None):
    """Raw ChatML that ends inside an open thought: what training conditions on, byte for byte.

    Qwen3's own template would add an empty think block or none, so the string is built by hand.
    An empty `system_prompt` leaves the system turn out; None stands for THINKING_INSTRUCTION.
    """
    system = THINKING_INSTRUCTION if system_prompt is None else system_prompt
    turns = [("system", system)] if system else []
    turns.append(("user", question))
    return "".join(CHATML_TURN.format(role=role, content=text) for role, text in turns) + CHATML_THINK_PREFILL


def build_messages(mode, question, examples=(), few_shot_style="prompt", system_prompt=None):
    """The chat messages of one question; `examples` are (question, answer) pairs for few_shot.

    The answers of worked examples lose their `<<...>>`: the model has no calculator to call.
    """
    system = INSTRUCTIONS[mode] if system_prompt is None else system_prompt
    messages = [{"role": "system", "content": system}] if system else []
    examples = [(asked, strip_annotations(answer)) for asked, answer in examples]
    if mode == "few_shot" and few_shot_style == "turns":
        for asked, answer in examples:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    elif mode == "few_shot":
        worked = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in examples)
        question = f"{worked}Question: {question}\nAnswer:"
    return messages + [{"role": "user", "content": question}]


def build_prompt(mode, question, tokenizer, examples=(), few_shot_style="prompt", system_prompt=None):
    """The prompt string of one question, chat template applied.

    Qwen3 thinks unless told not to, so every mode but `thinking` passes `enable_thinking=False`
    (Qwen3 model card, "Switching Between Thinking and Non-Thinking Mode").
    """
    if mode == "chatml_think_prefill":
        return chatml_think_prefill(question, system_prompt)
    messages = build_messages(mode, question, examples, few_shot_style, system_prompt)
    return render_chat(tokenizer, messages, enable_thinking=mode == "thinking")


def render_chat(tokenizer, messages, enable_thinking):
    """Apply the tokenizer's chat template; raises UserError where it has none or refuses."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; "
            "pass an instruction-tuned model or --mode chatml_think_prefill"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
    except Exception as error:  # jinja2 errors, and whatever a template's raise_exception says
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template failed: {error}; where it refuses a "
            "system message, pass --system-prompt ''"
        ) from error


def has_thinking_switch(tokenizer):
    """Whether `enable_thinking` changes what the chat template renders."""
    messages = [{"role": "user", "content": "?"}]
    return render_chat(tokenizer, messages, True) != render_chat(tokenizer, messages, False)


def thinking_is_open(prompt):
    """Whether the prompt ends inside a thought, so that the completion begins in one."""
    return prompt.rstrip().endswith("<think>")


# ------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One problem. `id` is its position in the split; `answer` ends in a line `#### N`."""

    id: int
    question: str
    answer: str


def load_questions(dataset, split):
    """All questions of a split, from a folder with SPLIT.jsonl or from the hub."""
    folder = Path(dataset)
    if folder.is_dir():
        return load_question_file(folder / f"{split}.jsonl")
    if folder.exists() or dataset.startswith((".", "/", "~")):
        raise UserError(f"--dataset {dataset}: not a folder; pass one with train.jsonl and test.jsonl, or a hub id")
    return load_hub_questions(dataset, split)


def load_question_file(path):
    if not path.is_file():
        raise UserError(f"{path}: no such file; --dataset wants a folder with train.jsonl and test.jsonl")
    questions = [
        Question(position, row["question"], row["answer"])
        for position, (_, row) in enumerate(read_jsonl(path, ("question", "answer")))
    ]
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def load_hub_questions(dataset, split):
    import datasets

    # GSM8K on the hub has two configurations, `main` and `socratic`; other data sets have none.
    config = "main" if dataset.split("/")[-1] == "gsm8k" else None
    try:
        rows = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # hub, network and data set errors share no base class
        raise UserError(
            f"--dataset {dataset} ({split}): {first_line(error)}; "
            "without the hub pass a folder with train.jsonl and test.jsonl"
        ) from error
    missing = {"question", "answer"} - set(rows.column_names)
    if missing:
        raise UserError(f"--dataset {dataset} ({split}): no column {sorted(missing)[0]!r}; it has {rows.column_names}")
    return [Question(i, row["question"], row["answer"]) for i, row in enumerate(rows)]


def hash_questions(questions):
    """SHA-256 over questions and answers in order: the identity of a split, wherever it came from."""
    digest = hashlib.sha256()
    for item in questions:
        digest.update(json.dumps([item.question, item.answer]).encode() + b"\n")
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------

PUBLISHED_KEYS = ("id", "question", "model_output", "ground_truth_answer")


def first_line(error):
    """The first line of an exception's text, for messages of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_jsonl(path, required=()):
    """Yield (line number, object) for every line that is not blank.

    A line that is not UTF-8, not JSON, not an object or lacks a required key is a UserError that
    names the file, the line and the key.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_json_line(path, number, line, required)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def parse_json_line(path, number, line, required=()):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON and bad UTF-8 alike
        raise UserError(f"{path}:{number}: not a line of JSON: {first_line(error)}") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: a line must be a JSON object, this is {type(row).__name__}")
    for key in required:
        if key not in row:
            raise UserError(f"{path}:{number}: lacks the key {key!r}; it has {', '.join(map(repr, row)) or 'none'}")
    return row


def write_atomically(path, text):
    """Replace `path` in one step: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
