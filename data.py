"""Questions from folders, files and the hub."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from common import UserError, first_line, is_text, looks_like_path, read_jsonl, refuse_utf16
from reading import read_gold

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Columns:
    """Where a data set holds what. Several question columns are joined by a space; `keep` goes into the answer lines."""

    question: Sequence[str] = ("question",)
    answer: str = "answer"
    keep: Sequence[str] = ()


@dataclass(frozen=True)
class Question:
    """One problem. `id` is its position in the split; `answer` ends in a line `#### N` or is a bare number."""

    id: int
    question: str
    answer: str
    kept: dict = field(default_factory=dict)  # the columns that --keep-columns names, by name


def add_data_flags(parser) -> None:
    """The flags that say which questions a script reads, and where they stand in the data."""
    add = parser.add_argument
    add("--dataset", default="openai/gsm8k",
        help=f"hub id, folder with a file for each split (test.jsonl), or one file; {', '.join(ENDINGS)} (default %(default)s)")  # fmt: skip
    add("--dataset-config", metavar="NAME", help="configuration of a hub data set (default for gsm8k: main)")
    add("--question-column", nargs="+", default=["question"], metavar="NAME",
        help="columns that hold the question, joined by a space (default question)")  # fmt: skip
    add("--answer-column", default="answer", metavar="NAME",
        help="column of the reference answer: a number, or text that ends in #### and a number (default %(default)s)")  # fmt: skip


def load_questions(dataset: str, split: str, config: str | None = None, columns: Columns = Columns()) -> list[Question]:
    """All questions of a split, from a folder, a file (which stands for any split) or the hub.

    Raises UserError where there is no such data or a line is not a question; it names the file and the line.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        return load_question_file(path, columns)
    if path.is_dir():
        files = [path / f"{split}{ending}" for ending in ENDINGS if (path / f"{split}{ending}").is_file()]
        if files:
            return load_question_file(files[0], columns)
        if not any(file.name.endswith(ENDINGS) for file in path.rglob("*")):
            raise UserError(f"{path}/{split}.jsonl: no such file; --dataset wants a folder with a file for each split")
        dataset = str(path)
    elif looks_like_path(dataset):
        raise UserError(f"--dataset {dataset}: no such file or folder; pass one, or a hub id")
    return load_hub_questions(dataset, split, config, columns)


def load_question_file(path: Path, columns: Columns = Columns()) -> list[Question]:
    """The questions of one file, read by the ending of its name."""
    readers = {".jsonl": read_lines, ".gz": read_lines, ".json": read_array, ".csv": read_csv, ".parquet": read_parquet}
    if not path.name.endswith(ENDINGS):
        raise UserError(f"--dataset {path}: the name of a data file ends in {', '.join(ENDINGS)}")
    records = readers[path.suffix](path)
    questions = [as_question(i, place, record, columns) for i, (place, record) in enumerate(records)]
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, object) for each line of a JSONL file; the place is for error messages."""
    for number, record in read_jsonl(path):
        yield f"{path}:{number}", record


def read_array(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, object) for each object of a JSON array; a file of JSON lines may have this name too."""
    content = read_bytes(path)
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        if not content.lstrip().startswith(b"{"):
            raise UserError(f"{path}: not JSON: {first_line(error)}") from error
        yield from read_lines(path)
        return
    records = records if isinstance(records, list) else [records]
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}: must hold a list of objects; number {position} is {type(record).__name__}")
        yield f"{path}, number {position}", record


def read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, columns by name) for each line of a CSV file whose first line names the columns. All values are text."""
    try:
        reader = csv.DictReader(io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        names = reader.fieldnames or ()
        if len(names) == 1 and any(mark in names[0] for mark in ";\t"):  # commas inside texts would tear those lines
            raise UserError(f"{path}:1: its columns are not separated by commas; save it with commas")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{path}:1: names the column {name!r} twice; give each its own name")
        for record in reader:
            if None in record or None in record.values():
                raise UserError(f"{path}:{reader.line_num}: has other columns than the first line")
            yield f"{path}:{reader.line_num}", record
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8: {first_line(error)}") from error


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        records = datasets.load_dataset("parquet", data_files={"train": str(path)}, split="train")
    except OSError as error:  # of the file, or of the folder where the library keeps what it has read
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    except Exception as error:  # a damaged file raises whatever its parser raises
        raise UserError(f"{path}: not a Parquet file: {first_line(error.__cause__ or error)}") from error
    for position, record in enumerate(records):
        yield f"{path}, number {position}", record


def read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    refuse_utf16(path, content)
    return content


def as_question(position: int, place: str, record: dict, columns: Columns) -> Question:
    """The Question that a record holds; a UserError names its place where it holds none."""
    for key in (*columns.question, columns.answer, *columns.keep):
        if key not in record:
            flags = "--keep-columns" if key in columns.keep else "--question-column and --answer-column"
            raise UserError(
                f"{place}: lacks the column {key!r}; it has {', '.join(map(repr, record)) or 'none'}: name the right ones "
                f"with {flags}"
            )
    for key in columns.question:
        refuse_other_than_text(place, key, record[key])
    question = " ".join(record[key] for key in columns.question)
    if not question.strip():
        raise UserError(f"{place}: {' and '.join(map(repr, columns.question))}: holds no question, only white space")
    answer = record[columns.answer]
    if type(answer) is int or (isinstance(answer, (float, Decimal)) and math.isfinite(answer)):
        answer = str(answer)
    refuse_other_than_text(place, columns.answer, answer)
    kept = {key: record[key] for key in columns.keep}
    try:
        json.dumps(kept, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: --keep-columns: cannot be written as JSON: {first_line(error)}") from error
    return Question(position, question, answer, kept)


def refuse_other_than_text(place: str, key: str, value: object) -> None:
    if not isinstance(value, str):
        raise UserError(f"{place}: {key!r} must be text, this is {type(value).__name__}")
    if not is_text(value):
        raise UserError(f"{place}: {key!r} holds half of a surrogate pair, which is no text")


def load_hub_questions(dataset: str, split: str, config: str | None, columns: Columns) -> list[Question]:
    """Questions from the hub, or from a folder that has the layout of a data set there."""
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # the error below says it all; without this each retry prints a line
    datasets.disable_progress_bars()
    # GSM8K on the hub has two configurations, `main` and `socratic`; other data sets mostly have one.
    if config is None and dataset.split("/")[-1] == "gsm8k" and not Path(dataset).is_dir():
        config = "main"
    try:
        records = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # hub, network and data set errors share no base class
        told = " ".join(str(error).split("\n")[:2]) or type(error).__name__
        if "config" in told.lower():
            raise UserError(f"--dataset {dataset}: {told}: pass one with --dataset-config") from error
        if Path(dataset).is_dir():
            raise UserError(f"{dataset}/{split}.jsonl: no such file, nor another of this split: {told}") from error
        raise UserError(f"--dataset {dataset} ({split}): {told}; without the hub pass a folder or a file") from error
    wanted = {*columns.question, columns.answer, *columns.keep}
    if wanted <= {*records.column_names}:  # the others may hold pictures, which would be decoded
        records = records.select_columns([*wanted])
    return [
        as_question(i, f"--dataset {dataset} ({split}), row {i}", record, columns) for i, record in enumerate(records)
    ]


def refuse_unscorable(questions: Iterable[Question], dataset: str, split: str) -> None:
    """UserError for the first question whose reference answer holds no number to score against."""
    for question in questions:
        try:
            read_gold(question.answer)
        except UserError as error:
            raise UserError(
                f"--dataset {dataset}, {split} question {question.id}: {error}: name the right column with "
                "--answer-column, or mend the data"
            ) from error


def name_other_flag(error: UserError, flag: str) -> UserError:
    """The error of reading data that another flag than --dataset names, whose columns no flag names."""
    told = str(error).replace("--dataset", flag).partition(": name the right ")[0]
    return UserError(told if told.startswith(flag) else f"{flag}: {told}")


def hash_questions(questions: Iterable[Question]) -> str:
    """SHA-256 over questions and answers in order: the identity of a split, wherever it came from."""
    digest = hashlib.sha256()
    for item in questions:
        digest.update(json.dumps([item.question, item.answer]).encode() + b"\n")
    return digest.hexdigest()
