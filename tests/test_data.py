"""Questions come from every form in which people hold them, with the reference answers that stand there."""

import csv
import json
from decimal import Decimal

import pytest
from conftest import ROOT

import common
import reading
import train
from data import Columns, hash_questions, load_questions, refuse_unscorable

PROBLEMS = [
    {"question": "1 + 1?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
    {"question": 'A "quoted",\nlong one?', "answer": "#### 1,234"},
    {"question": "Ein Drittel − ½?", "answer": "#### -1/6"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The library `datasets` converts what it reads into a cache; ours must not fill the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_csv(path, records):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets save it
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(records)


def write_parquet(path, records):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


WRITERS = {
    "jsonl": write_jsonl,
    "json": lambda path, records: path.write_text(json.dumps(records, indent=1)),
    "csv": write_csv,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_questions_from_a_folder_and_from_a_file(ending, tmp_path):
    WRITERS[ending](tmp_path / f"test.{ending}", PROBLEMS)
    expected = [(i, item["question"], item["answer"]) for i, item in enumerate(PROBLEMS)]
    for dataset, split in ((tmp_path, "test"), (tmp_path / f"test.{ending}", "train")):  # a file stands for any split
        questions = load_questions(str(dataset), split)
        assert [(item.id, item.question, item.answer) for item in questions] == expected


def test_a_json_file_may_hold_lines(tmp_path):
    write_jsonl(tmp_path / "lines.json", PROBLEMS)
    assert len(load_questions(str(tmp_path / "lines.json"), "test")) == 3


def test_a_folder_in_the_layout_of_the_hub_is_read_with_its_configurations(tmp_path):
    card = "---\nconfigs:\n"
    for name, count in (("main", 3), ("small", 1)):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "test-00000-of-00001.parquet", PROBLEMS[:count])
        card += f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test-*\n"
    (tmp_path / "README.md").write_text(card + "---\n")
    for name, count in (("main", 3), ("small", 1)):
        assert len(load_questions(str(tmp_path), "test", name)) == count
    with pytest.raises(common.UserError, match="main.*small.*--dataset-config"):
        load_questions(str(tmp_path), "test")
    with pytest.raises(common.UserError, match="train"):
        load_questions(str(tmp_path), "train", "main")


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_numbers_are_reference_answers(ending, tmp_path):
    floats = [51.0, 2.0107e-06, -3.25, 6.1e16]
    WRITERS[ending](tmp_path / f"a.{ending}", [{"question": "?", "answer": number} for number in floats])
    questions = load_questions(str(tmp_path / f"a.{ending}"), "test")
    assert [reading.read_gold(item.answer) for item in questions] == [Decimal(str(number)) for number in floats]
    WRITERS[ending](tmp_path / f"b.{ending}", [{"question": "?", "answer": number} for number in (18, 2**60 + 1)])
    answers = [item.answer for item in load_questions(str(tmp_path / f"b.{ending}"), "test")]
    assert answers == ["18", "1152921504606846977"]


def test_svamp_runs_as_it_is(shared):
    columns = Columns(["Body", "Question"], "Answer", ["Type"])
    questions = load_questions(str(shared / "other_datasets/SVAMP.json"), "test", columns=columns)
    refuse_unscorable(questions, "SVAMP.json", "test")
    assert len(questions) == 1000
    assert questions[1].question.endswith("If he had $ 4 at the start How much did the candy bar cost?")
    assert reading.score_final("#### 1", questions[1].answer) == "right" and questions[1].kept == {
        "Type": "Subtraction"
    }
    assert questions[1].answer == "1.0"  # as an example and as a target it ends as an answer should
    assert common.build_messages("few_shot", "?", [("Which?", "1.0")])[-1]["content"].count("Answer: #### 1\n") == 1
    for answer, number in {"1.0": "1", "10": "10", "-3.25": "-3.25", "100.00": "100", " 2.5\n": "2.5"}.items():
        assert train.target_completion(answer, "cot", "Why?") == f"#### {number}"


def test_gsm_hard_runs_as_it_is(shared):
    columns = Columns(["input"], "target")
    questions = load_questions(str(shared / "other_datasets/gsmhardv2.jsonl"), "test", columns=columns)
    refuse_unscorable(questions, "gsmhardv2.jsonl", "test")
    exponents = [item.answer for item in questions if "e" in item.answer]
    assert (len(questions), len(exponents)) == (1319, 26)
    for answer in exponents:
        assert reading.score_final(f"#### {float(answer):.12f}", answer) == "right"


def test_the_identity_of_a_data_set_is_its_questions_and_answers_alone(tmp_path):
    for ending, write in WRITERS.items():
        write(tmp_path / f"a.{ending}", PROBLEMS)
    assert len({hash_questions(load_questions(str(tmp_path / f"a.{ending}"), "test")) for ending in WRITERS}) == 1
    demo = common.read_json(ROOT / "results/demo/cot.run.json")["decides"]["dataset_sha256"]
    assert hash_questions(load_questions(str(ROOT / "demo/problems"), "test")) == demo


GOOD = json.dumps(PROBLEMS[0])
BAD_FILES = {
    "utf16": ("a.jsonl", (GOOD + "\n").encode("utf-16"), "a.jsonl: is UTF-16.*UTF-8"),
    "utf16_csv": ("a.csv", "question,answer\n1,2\n".encode("utf-16"), "a.csv: is UTF-16"),
    "utf16_without_mark": ("a.json", f"[{GOOD}]".encode("utf-16-le"), "a.json: is UTF-16"),
    "latin1_csv": ("a.csv", "question,answer\nzwölf?,12\n".encode("latin-1"), "a.csv: not a CSV file in UTF-8"),
    "csv_line_too_long": ("a.csv", b"question,answer\n1,2\n1,2,3\n", "a.csv:3: has other columns"),
    "csv_without_header": ("a.csv", b"1 + 1?,2\n1,3\n", "'question'.*--question-column"),
    "csv_by_semicolons": ("a.csv", b"question;answer\nOne, and one?;2\n", "a.csv:1: its columns are not .* commas"),
    "csv_by_tabs": ("a.csv", b"question\tanswer\n1 + 1?\t2\n", "a.csv:1: its columns are not .* commas"),
    "csv_column_twice": ("a.csv", b"question,answer,answer\n1 + 1?,2,3\n", "a.csv:1: names the column 'answer' twice"),
    "json_damaged": ("a.json", b"[{", "a.json: not JSON"),
    "json_number": ("a.json", b"7", "must hold a list of objects"),
    "json_of_numbers": ("a.json", b"[7]", "number 0 is int"),
    "parquet_damaged": ("a.parquet", b"PAR1", "a.parquet: not a Parquet file"),
    "answer_true": ("a.jsonl", b'{"question": "?", "answer": true}', "a.jsonl:1: 'answer' must be text"),
    "answer_nan": ("a.jsonl", b'{"question": "?", "answer": NaN}', "a.jsonl:1: 'answer' must be text"),
    "question_a_list": ("a.jsonl", b'{"question": ["?"], "answer": 1}', "a.jsonl:1: 'question' must be text"),
    "unknown_ending": ("a.xlsx", b"PK", "a.xlsx.*ends in .jsonl"),
    "empty": ("a.csv", b"question,answer\n", "holds no questions"),
}


@pytest.mark.parametrize(("name", "content", "told"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_holds_no_questions_is_named_with_its_trouble(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(common.UserError, match=told):
        load_questions(str(tmp_path / name), "test")


def test_a_utf8_mark_does_not_matter(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD, encoding="utf-8-sig")
    assert len(load_questions(str(tmp_path / "a.jsonl"), "test")) == 1
