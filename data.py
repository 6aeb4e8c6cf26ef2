"""Questions from folders, files and the hub."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from common import UserError, first_line, is_text, read_jsonl


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
        as_question(position, row, f"{path}:{number}")
        for position, (number, row) in enumerate(read_jsonl(path, ("question", "answer")))
    ]
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def as_question(position, row, place):
    """The Question that a row holds; a UserError names its place where a text is none."""
    for key in ("question", "answer"):
        if not isinstance(row[key], str):
            raise UserError(f"{place}: {key!r} must be text, this is {type(row[key]).__name__}")
        if not is_text(row[key]):
            raise UserError(f"{place}: {key!r} holds half of a surrogate pair, which is no text")
    return Question(position, row["question"], row["answer"])


def load_hub_questions(dataset, split):
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # the error below says it all; without this each retry prints a line

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
        raise UserError(f"--dataset {dataset} ({split}): no column {min(missing)!r}; it has {rows.column_names}")
    return [as_question(i, row, f"--dataset {dataset} ({split}), row {i}") for i, row in enumerate(rows)]


def hash_questions(questions):
    """SHA-256 over questions and answers in order: the identity of a split, wherever it came from."""
    digest = hashlib.sha256()
    for item in questions:
        digest.update(json.dumps([item.question, item.answer]).encode() + b"\n")
    return digest.hexdigest()
