"""`benchmark.py` from its command line: what it counts, what it refuses, how it prints."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import tracemalloc
from collections import Counter
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import answers
import benchmark
import common
import runs
import scores


def line(id=0, text="#### 18", gold="#### 18", **more):
    return {"id": id, "question": f"question {id}", "model_output": text, "ground_truth_answer": gold, **more}


@pytest.fixture
def write(tmp_path):
    """Write rows, or raw text, to a file and give its path as text."""

    def write(rows, name="run.jsonl"):
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def score(capsys):
    """Run with --json and give the objects printed."""

    def score(*arguments):
        benchmark.main([*arguments, "--json"])
        return json.loads(capsys.readouterr().out)

    return score


@pytest.fixture
def refuse(capsys):
    """Run what must end in exit code 2, and give the one line on stderr."""

    def refuse(*arguments):
        with pytest.raises(SystemExit) as stop:
            benchmark.main(list(arguments))
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
        return err

    return refuse


def test_the_published_files_come_to_the_published_counts(shared, score):
    names = ("zero_shot_model_outputs", "cot_model_outputs", "few_shot_model_outputs")
    names += ("BF16-thinking_model_outputs_reduced_batch", "Qwen3-GSM8k-SFT-BF16-temp0")
    runs = score(*(str(shared / "published_outputs" / f"{name}.jsonl") for name in names))
    assert [run["n"] for run in runs] == [1319] * 5
    assert [run["correct_published"] for run in runs] == [108, 701, 561, 880, 634]
    assert [run["correct"] for run in runs] == [110, 711, 561, 852, 633]
    assert [run["unfinished"] for run in runs] == [0, 0, 0, 291, 34]
    assert [run["truncated"] for run in runs] == [None] * 5


def test_votes_are_counted_by_exact_value(write, score):
    texts = ["#### -1", "#### -2", "#### -2"]  # Python's hash of -1 is that of -2
    (run,) = score(write([line(0, text, "#### -1", sample=k) for k, text in enumerate(texts)]))
    assert (run["majority_at"], run["ties"]) == ([100, 100, 0], 0)
    texts = ["#### 0.33333", "#### 0.33334", "#### 0.33334"]  # both meet 1/3 within 1e-4
    (run,) = score(write([line(0, text, "#### 1/3", sample=k) for k, text in enumerate(texts)]))
    assert run["majority_at"] == [100, 100, 100]


@pytest.mark.parametrize("number", [18, -1, -2, 2**62, 2**64 + 1, -(2**63), Fraction(1, 3), Fraction(36, 2)])
def test_a_vote_is_one_for_the_exact_number(number):
    others = {}
    votes = {scores.as_vote(other, others) for other in (number, number + 1, number + Fraction(1, 7), None)}
    assert len(votes) == 4
    assert scores.as_vote(Fraction(number), others) == scores.as_vote(number, others)


def test_questions_are_told_apart_by_exact_id(write, score):
    (run,) = score(write([line(id) | {"question": "the same"} for id in (-1, -2, "-1")]))
    assert run["questions"] == 3


def test_texts_that_ran_on_are_counted_and_told(write, score, capsys):
    path = write([line(0, "#### 18\n\nQuestion: Tom has 5.\nAnswer: #### 5"), line(1)])
    (run,) = score(path)
    assert (run["correct"], run["ran_on"]) == (2, 1)
    benchmark.main([path])
    out = capsys.readouterr().out
    assert "ran on" in out.splitlines()[0] and "in 1 of 2 texts the model went on" in out
    benchmark.main([write([line(0)])])
    assert "ran on" not in capsys.readouterr().out


def test_a_cut_text_is_not_said_to_lack_only_the_format(write, score, capsys):
    cut = "The total is 20 - 2 = 18 dollars, for 2 of the 20 go. So"
    path = write([line(0, "#### 18\n" + cut, finish_reason="length"), line(1, cut.replace("2 of", "18 of"))])
    (run,) = score(path)
    assert (run["correct"], run["no_answer"], run["no_answer_right"]) == (1, 1, 0)
    benchmark.main([path])
    assert "format" not in capsys.readouterr().out


def test_the_lenient_figure_stands_beside_the_strict_one(write, score, capsys):
    texts = ["#### 18", "The answer is 18.", "The answer is 1.", "So"]
    rows = [line(i, text, finish_reason="stop") for i, text in enumerate(texts)]
    path = write([*rows, line(4, "#### 18\n\nSo", finish_reason="length")])
    (run,) = score(path)
    assert (run["correct"], run["correct_lenient"], run["no_answer_right"]) == (2, 2, 1)
    assert run["accuracy_lenient"] == 40
    assert run["interval_lenient"] == run["interval"]
    benchmark.main([path])
    header, row = capsys.readouterr().out.splitlines()[:2]
    assert header.split("  ")[0] == "file" and "lenient %" in header
    assert row.count("40.00 [11.76, 76.93]") == 2  # strict and lenient; the published rule has 60


def test_several_samples_widen_the_lenient_interval_too(write, score):
    (run,) = score(write([line(i, "The answer is 18." if i < 5 else "", sample=s) for i in range(10) for s in (0, 1)]))
    low, high = run["interval_lenient"]
    assert (run["correct"], run["correct_lenient"]) == (0, 10)
    assert low < 20 and high > 80


def test_every_line_is_counted_once_by_status(write, score):
    texts = ["#### 18", "#### 1", "<think>18", "18", "#### 4 and 6", "#### 18####"]
    (run,) = score(write([line(i, text, output_tokens=10) for i, text in enumerate(texts)]))
    statuses = {key: run[key] for key in ("correct", "wrong", "unfinished", "no_answer", "ambiguous")}
    assert statuses == {"correct": 2, "wrong": 1, "unfinished": 1, "no_answer": 1, "ambiguous": 1}
    assert (run["n"], run["correct_published"], run["no_answer_right"]) == (6, 3, 1)
    assert (run["accuracy"], run["output_tokens_mean"]) == (pytest.approx(100 * 2 / 6), 10)


def test_cut_at_the_limit_is_counted_only_where_every_line_says_how_it_ended(write, score):
    rows = [line(0, finish_reason="length"), line(1, finish_reason="stop")]
    assert score(write(rows))[0]["truncated"] == 1
    assert score(write([*rows, line(2)]))[0]["truncated"] is None


def test_a_file_that_says_nothing_was_prefilled_where_half_of_it_closes_a_thought(write, score):
    closed, bare = line(0, "a</think>#### 18"), line(1, "#### 18")
    half = write([closed, bare])
    assert score(half)[0]["unfinished"] == 1
    assert score(half, "--thinking", "no")[0]["unfinished"] == 0
    assert score(write([closed, bare, line(2)]))[0]["unfinished"] == 0
    assert score(write([closed, line(1, thinking_open=False)]))[0]["unfinished"] == 0
    assert score(write([line(0, "<think>#### 18")]), "--thinking", "no")[0]["correct"] == 1
    assert score(write([bare]), "--thinking", "yes")[0]["unfinished"] == 1


def test_one_sample_a_question_has_wilsons_interval(write, score):
    (run,) = score(write([line(i, "#### 18" if i < 8 else "") for i in range(10)]))
    assert run["interval"] == pytest.approx([49.0162, 94.3318], abs=1e-4)  # Wilson (1927) for 8 of 10


def test_no_share_lies_outside_its_interval():
    for n in range(1, 60):
        for right in {0, 1, n // 2, n}:
            run = scores.Run((Path("a.jsonl"),), "a", n, Counter(lines=n, right=right), 0, False, None)
            low, high = scores.accuracy_interval(run, "right")
            assert 0 <= low <= scores.percent(right, n) <= high <= 100, (right, n)


def test_several_samples_have_an_interval_clustered_by_question(write, score):
    # Two questions, each all right or all wrong: the samples say no more than the questions do.
    rows = [line(q, "#### 18" if q % 2 else "", sample=s) for q in range(100) for s in range(4)]
    low, high = score(write(rows))[0]["interval"]
    assert (low, high) == pytest.approx((50 - 9.97, 50 + 9.97), abs=0.01)  # t of 99 degrees, 1.984 * 0.5 / sqrt(99)


def test_order_of_lines_does_not_matter(write, score):
    rows = [line(q, f"#### {17 + (q + s) % 3}", sample=s) for q in range(5) for s in range(3)]
    runs = [score(write(some))[0] for some in (rows, rows[::-1])]
    assert runs[0] == runs[1]
    assert runs[0]["questions"] == 5


def test_pass_at_k_is_the_unbiased_estimate(write, score):
    right = [0, 1, 3]
    rows = [line(q, "#### 18" if s < right[q] else "", sample=s) for q in range(3) for s in range(4)]
    (run,) = score(write(rows))
    expected = [100 * sum(1 - comb(4 - c, k) / comb(4, k) for c in right) / 3 for k in (1, 2, 3, 4)]
    assert run["pass_at"] == pytest.approx(expected)
    assert run["pass_at"][0] == pytest.approx(run["accuracy"])


@pytest.mark.parametrize(
    ("answers", "majority", "ties"),
    [
        ("18 1 1", [100, 100, 0], 0),  # tied after two: the answer given first wins
        ("1 18 18.0", [0, 0, 100], 0),
        ("1 18 - 18", [0, 0, 0, 100], 0),  # `-`: nothing to read, no vote
        ("1 18", [0, 0], 1),
        ("- -", [0, 0], 0),
    ],
)
def test_the_majority_vote_goes_to_the_answer_given_first_among_the_tied(write, score, answers, majority, ties):
    rows = [line(0, "" if a == "-" else f"#### {a}", sample=s) for s, a in enumerate(answers.split())]
    (run,) = score(write(rows))
    assert (run["majority_at"], run["ties"]) == (majority, ties)


def test_the_interval_of_a_vote_is_the_bootstrap_over_questions(write, score):
    import numpy

    rows = [line(q, "#### 18" if q < 30 else "", sample=s) for q in range(40) for s in range(2)]
    low, high = score(write(rows))[0]["majority_interval"]
    draws = numpy.random.default_rng(0).choice(numpy.arange(40) < 30, (20_000, 40)).mean(1)
    assert (low, high) == pytest.approx(100 * numpy.quantile(draws, [0.025, 0.975]), abs=2.6)


def test_no_published_row_of_that_name_is_told(write, capsys):
    benchmark.main([write([line()]), "--published"])
    assert "--published: no file has the name of a published row: zero_shot_model_outputs, " in capsys.readouterr().err


def test_a_vote_that_is_always_right_is_not_shown_without_doubt(write, score):
    (run,) = score(write([line(q, sample=s) for q in range(4) for s in range(2)]))
    assert run["majority_at"] == [100, 100]
    assert run["majority_interval"] == pytest.approx([51.01, 100], abs=0.01)  # Wilson's, of 4 questions


BAD_LINES = {
    "not JSON": "{",
    "not text": "\\udcff\n",
    "an array": "[]",
    "no model_output": json.dumps({"id": 1, "question": "", "ground_truth_answer": "#### 1"}),
    "id is a list": json.dumps(line([])),
    "id is true": json.dumps(line(True)),
    "model_output is null": json.dumps(line(1, None)),
    "no gold number": json.dumps(line(1, gold="eighteen")),
    "sample below zero": json.dumps(line(1, sample=-1)),
    "sample is text": json.dumps(line(1, sample="0")),
    "thinking_open is a number": json.dumps(line(1, thinking_open=1)),
    "output_tokens too large": json.dumps(line(1, output_tokens=2**40)),
    "id of 5,000 digits": '{"id": ' + "1" * 5000 + "}",
    "deep nesting": "[" * 100_000,
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named_and_never_a_wrong_answer(write, refuse, score, bad):
    path = write(json.dumps(line(0)) + "\n" + BAD_LINES[bad] + "\n" + json.dumps(line(2)) + "\n")
    assert f"{path}:2: " in refuse(path)
    (run,) = score(path, "--skip-bad")
    assert (run["n"], run["correct"], run["skipped"]) == (2, 2, 1)


def test_a_file_without_a_line_to_score_is_refused(write, refuse, tmp_path):
    assert "no line" in refuse(write(""))
    assert "no line" in refuse(write("{\n"), "--skip-bad")
    assert "cannot be read" in refuse(str(tmp_path / "none.jsonl"))
    assert "not a plain file" in refuse(str(tmp_path))


def test_a_pipe_is_refused_before_it_is_read(refuse, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a plain file" in refuse(str(tmp_path / "pipe"))


rows_of_anything = st.dictionaries(
    st.sampled_from([*line(), "sample", "thinking_open", "finish_reason", "output_tokens"]),
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=9)
    | st.just("#### 1")
    | st.lists(st.none(), max_size=1),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.binary(max_size=40) | rows_of_anything.map(lambda row: json.dumps(row).encode()), max_size=5))
def test_any_bytes_are_scored_or_refused_in_one_line(tmp_path, lines):
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    for flags in ([], ["--skip-bad"]):
        try:
            benchmark.main([str(path), *flags])
        except SystemExit as stop:
            assert stop.code == 2


def test_a_line_that_stands_twice_is_refused(write, refuse):
    assert "repeat" in refuse(write([line(0), line(1), line(1)]))


@pytest.mark.parametrize("flags", [[], ["--nonsense", "x"], ["x", "--thinking", "maybe"]])
def test_a_wrong_flag_is_one_line(refuse, flags):
    assert refuse(*flags).startswith("benchmark.py: error: ")


def test_the_table_names_files_counts_and_intervals(write, capsys):
    benchmark.main([write([line(0), line(1, "The answer is 18.")], name="cot.jsonl")])
    header, row, _, note = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["file", "lines"]
    assert row.split()[:8] == ["cot", "2", "50.00", "[9.45,", "90.55]", "100.00", "[34.24,", "100.00]"]
    assert note.startswith("cot: 1 of the 1 without an answer")


def test_a_reader_that_stops_early_sees_no_traceback(write):
    command = f"{shlex.quote(sys.executable)} benchmark.py {shlex.quote(write(right_where(1, 3)))} --wrong 2 | true"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stderr == ""


def test_what_could_steer_a_terminal_is_printed_escaped():
    assert common.printable("a\x1b[31m\x07\x9b\ud800\u202eé\n−") == "a\\x1b[31m\\x07\\x9b\\ud800\\u202eé\n−"


def test_twelve_files_are_scored_without_a_slow_import(shared):
    files = sorted((shared / "published_outputs").glob("*.jsonl"))
    command = [sys.executable, "-X", "importtime", "benchmark.py", *map(str, (files * 3)[:12])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.count("[") == 36
    for module in ("torch", "transformers", "scipy", "numpy", "matplotlib", "jinja2"):
        assert f" {module}\n" not in result.stderr


def right_where(count, of, start=0):
    return [line(q, "#### 18" if start <= q < start + count else "#### 1") for q in range(of)]


def test_a_file_in_order_is_read_as_a_stream(write, score):
    path = write([line(id, "9 " * 500) for id in range(2_000)])
    tracemalloc.start()
    score(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000  # bytes, of a file of 2 million


@pytest.mark.parametrize("samples", [1, 4])
def test_votes_and_comparisons_keep_little_of_a_line(write, samples):
    import scipy.stats  # noqa: F401 - imported by the first comparison, and counted with its memory

    rows = [line(id, f"#### {id}", sample=s) for id in range(4_000 // samples) for s in range(samples)]
    files = [write(rows, name) for name in ("a.jsonl", "b.jsonl")]
    tracemalloc.start()
    runs = [scores.score_run(Path(path), keep=True) for path in files]
    scores.compare_runs(runs)
    if samples > 1:
        scores.count_votes(runs[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / (2 * len(rows)) < 150  # bytes a line


def test_a_comparison_is_paired_and_exact(write, score):
    # The published LoRA claim: 44.65 against 43.21 %, 154 against 135 discordant pairs of 1,319.
    a = write(right_where(435 + 154, 1319), "a.jsonl")
    b = write([line(q, "#### 18" if q < 435 or 589 <= q < 589 + 135 else "#### 1") for q in range(1319)], "b.jsonl")
    (pair,) = score(a, b, "--compare")[0]["compared"]
    assert (pair["first_only"], pair["second_only"], pair["test"]) == (154, 135, "exact McNemar")
    assert pair["p"] == pytest.approx(0.29, abs=0.005)
    assert pair["difference"] == pytest.approx(100 * (154 - 135) / 1319)
    low, high = pair["interval"]
    assert low < 0 < pair["difference"] < high


def test_holms_correction_multiplies_the_smallest_p_most(write, score):
    files = [write(right_where(count, 40), f"{count}.jsonl") for count in (10, 17, 30)]
    pairs = [pair for run in score(*files, "--compare") for pair in run.get("compared", [])]
    pairs.sort(key=lambda pair: pair["p"])
    expected = [3 * pairs[0]["p"], 2 * pairs[1]["p"], pairs[2]["p"]]
    assert [pair["p_holm"] for pair in pairs] == pytest.approx(expected)


def test_samples_of_a_question_are_compared_as_one_cluster(write, score):
    def several(right, name):
        return write([line(q, "#### 18" if q < right else "", sample=s) for q in range(10) for s in range(50)], name)

    (pair,) = score(several(6, "a.jsonl"), several(5, "b.jsonl"), "--compare")[0]["compared"]
    assert (pair["first_only"], pair["second_only"], pair["test"]) == (1, 0, "paired t-test")
    assert pair["p"] == pytest.approx(0.343, abs=0.001)  # t = 1 with 9 degrees of freedom


def test_equal_runs_show_no_difference(write, capsys):
    files = [write(right_where(3, 9), name) for name in ("a.jsonl", "b.jsonl")]
    benchmark.main([*files, "--compare"])
    out = capsys.readouterr().out
    assert "+0.00 [+0.00, +0.00]" in out
    assert "no difference shown between a and b (exact McNemar, p = 1)" in out


def test_many_pairs_alike_are_counted_and_not_listed(write, capsys):
    benchmark.main([*(write([line()], f"{name}.jsonl") for name in "abcd"), "--compare"])
    printed = capsys.readouterr().out
    assert printed.count("no difference shown") == 3 and "so it is for 3 more of the 6 pairs" in printed


def test_files_are_compared_on_the_questions_that_both_hold_and_say_how_many(write, score, refuse, capsys):
    a = write([line(q, "#### 18" if q < 2 else "#### 1") for q in range(4)], "a.jsonl")
    texts = [("question  2 ", "#### 18"), ("question 3", "#### 1"), ("question 9", "#### 18")]
    b = write([line(id, text) | {"question": question} for id, (question, text) in enumerate(texts)], "b.jsonl")
    (pair,) = score(a, b, "--compare")[0]["compared"]
    assert (pair["questions"], pair["left_out"], pair["first_only"], pair["second_only"]) == (2, 3, 0, 1)
    assert (pair["accuracies"], pair["difference"]) == ([0, 50], -50)
    benchmark.main([a, b, "--compare"])
    assert "a and b are compared on the 2 questions that both hold; 3 stand in one alone" in capsys.readouterr().out
    assert "no question in common" in refuse(a, write([line(9)], "c.jsonl"), "--compare")
    assert "two files" in refuse(a, "--compare")


def test_a_comparison_of_files_with_other_golds_says_so(write, capsys):
    files = [
        write([line(0, gold=gold), line(1)], f"{name}.jsonl") for name, gold in (("a", "#### 18"), ("b", "#### 7"))
    ]
    benchmark.main([*files, "--compare"])
    assert "a and b were scored against other answers for 1 questions: pass --gold" in capsys.readouterr().out


@pytest.fixture
def published_row(write, tmp_path, score):
    """Score a file that bears a published name, beside a run record with these changes."""
    known = json.loads(scores.PUBLISHED_FILE.read_text())

    def published_row(right, segment=(), name="cot_model_outputs", **changes):
        decides = known["rows"][name]["protocol"] | {"dataset_sha256": known["dataset_sha256"]} | changes
        record = {"decides": decides, "segments": [{"model": "Qwen/Qwen3-0.6B"} | dict(segment)]}
        (tmp_path / f"{name}.run.json").write_text(json.dumps(record))
        (run,) = score(write(right_where(right, 100), f"{name}.jsonl"), "--published")
        return run["published"]

    return published_row


def test_a_published_figure_is_set_beside_the_interval(published_row):
    assert published_row(54) == {
        "accuracy": 54.13,
        "source": "readme",
        "inside": True,
        "protocol": "same protocol, our wording",
    }
    assert not published_row(80)["inside"]


def test_another_protocol_is_named_and_gets_no_verdict(published_row):
    assert published_row(54, max_new_tokens=64)["inside"] is None
    assert published_row(54, max_new_tokens=64)["protocol"] == "other protocol: max_new_tokens 64, not 512"
    assert published_row(54, {"model": "demo/model"})["protocol"] == "other protocol: model model, not Qwen3-0.6B"
    assert published_row(54, {"model": "some/banana-7B"})["inside"] is None
    assert published_row(54, dataset_sha256="")["protocol"] == "other questions"


TUNED = "Qwen3-GSM8k-SFT-BF16-temp0"


def test_a_fine_tuned_row_wants_the_published_checkpoint_or_its_training(published_row):
    training = json.loads(scores.PUBLISHED_FILE.read_text())["rows"][TUNED]["training"]
    name = training["name"]
    decides = {key: value for key, value in training.items() if key != "name"}
    whole = {"max_steps": None, "completions": None, "strip_annotations": False}
    trained = {"decides": decides | whole, "segments": [{"model": "Qwen/Qwen3-0.6B"}]}

    def protocol(model, training=None, **changes):
        return published_row(48, {"model": model, "training": training}, TUNED, **changes)["protocol"]

    same = "same protocol, our wording"
    assert protocol(f"{scores.PUBLISHER}/{name}") == same
    assert protocol("outputs/own", trained) == same
    assert protocol("some/banana-7B") == f"other protocol: model banana-7B without a training record, not {name}"
    assert protocol(f"somebody/{name}").startswith("other protocol: model")
    assert protocol(f"{scores.PUBLISHER}/{name}", dtype="fp32") == "other protocol: dtype fp32, not bf16"
    for changed in ({"epochs": 1}, {"dtype": "fp32"}, {"max_steps": 100}, {"rank": 4}, {"completions": "own.jsonl"}):
        other = {"decides": trained["decides"] | changed, "segments": trained["segments"]}
        assert protocol("outputs/own", other).startswith(f"other protocol: training: {next(iter(changed))} ")
    banana = trained | {"segments": [{"model": "some/banana-7B"}]}
    assert protocol("outputs/own", banana) == "other protocol: training: model banana-7B, not Qwen3-0.6B"


def test_a_record_of_answers_tells_how_their_model_was_trained(tmp_path):
    assert runs.training_of(str(tmp_path)) is None
    record = {"decides": {"rank": 4}, "segments": [{"model": "Qwen/Qwen3-0.6B", "seconds": 3}], "result": {}}
    (tmp_path / "train.run.json").write_text(json.dumps(record))
    trained = runs.training_of(str(tmp_path))
    assert trained == {"decides": {"rank": 4}, "segments": [{"model": "Qwen/Qwen3-0.6B"}]}


def test_a_row_of_the_model_as_released_is_not_that_of_one_fine_tuned(published_row):
    tuned = {"model": "outputs/Qwen3-0.6B", "training": {"decides": {}, "segments": [{}]}}
    assert published_row(54, tuned)["protocol"] == "other protocol: model Qwen3-0.6B is fine-tuned"


def test_the_published_figures_are_those_of_the_gsm8k_test_split(shared):
    from data import hash_questions, load_questions

    known = json.loads(scores.PUBLISHED_FILE.read_text())
    assert known["dataset_sha256"] == hash_questions(load_questions(str(shared / "gsm8k"), "test"))


def test_figures_that_would_mislead_carry_a_line_in_plain_words(shared, capsys):
    names = ("BF16-thinking_model_outputs_reduced_batch", "zero_shot_model_outputs", "cot_model_outputs")
    benchmark.main([str(shared / "published_outputs" / f"{name}.jsonl") for name in names])
    out = capsys.readouterr().out
    assert (
        "22 % of the answers never finished (the published rule counts 26 of them right); of those that did, 83 %"
        in out
    )
    assert "43 % of the right answers worked the problem out after `####`: this is not a direct answer" in out
    assert "131 answers were right but not in the asked format" in out


def test_markdown_is_a_table_with_the_cells_of_the_text(write, capsys):
    path = write(right_where(1, 2), "a|b.jsonl")
    benchmark.main([path, "--markdown"])
    _, ruler, row = capsys.readouterr().out.splitlines()
    assert ruler == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    interval = "50.00 [9.45, 90.55]"
    assert row == f"| a\\|b | 2 | {interval} | {interval} | {interval} | 0 | - | 0 | 0 |"


def test_wrong_answers_are_shown_without_their_control_characters(write, capsys):
    benchmark.main([write([line(0), line(1, "\x1b[2Jso\n#### 7"), line(2, "")]), "--wrong", "1"])
    shown = capsys.readouterr().out.split("--- ")
    assert shown[1:] == ["run, id 1, sample 0: read 7, gold 18\nquestion 1\n\\x1b[2Jso\n#### 7\n"]


@pytest.fixture
def train_run(write, tmp_path):
    """A run with a record and a data set; question 3 is a test question."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_text(json.dumps({"question": "question 3", "answer": "#### 18"}))

    def train_run(rows, split="train"):
        record = {"decides": {"split": split}, "segments": [{"dataset": str(data)}]}
        (tmp_path / "train.run.json").write_text(json.dumps(record))
        return write(rows, "train.jsonl")

    return train_run


def test_the_shortest_distinct_right_completions_are_kept(train_run, tmp_path, capsys):
    texts = ["so, 9+9=18\n#### 18", "18\n#### 18", "18\n#### 18", "#### 18 eggs", "#### 7"]
    rows = [line(1, text, sample=sample, mode="cot") for sample, text in enumerate(texts)]
    out = tmp_path / "right.jsonl"
    benchmark.main([train_run([*rows, line(0, "#### 1")]), "--keep-correct", str(out), "--keep-most", "2"])
    kept = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["model_output"] for row in kept] == ["18\n#### 18", "#### 18 eggs"]
    assert kept[0] == line(1, "18\n#### 18", mode="cot", sample=1, thinking_open=None, system_prompt=None)
    assert "2 right completions of 1 questions" in capsys.readouterr().err


def test_completions_that_the_model_did_not_end_by_itself_are_not_kept(train_run, tmp_path):
    ends = {"finish_reason": "length"}, {"forced": True}, {"finish_reason": "stop", "forced": False}
    ran_on = line(0, "#### 18\n\nQuestion: Tom has 5.\nAnswer: #### 5", sample=1)
    out = tmp_path / "right.jsonl"
    benchmark.main([train_run([*(line(id, **end) for id, end in enumerate(ends)), ran_on]), "--keep-correct", str(out)])
    assert [json.loads(text)["id"] for text in out.read_text().splitlines()] == [2]


def test_test_answers_are_never_kept_to_train_on(train_run, write, tmp_path):
    keep = ["--keep-correct", str(tmp_path / "right.jsonl"), "--json"]

    def refused(path):
        with pytest.raises(common.UserError) as error:
            options = benchmark.parse([path, *keep])
            run = scores.score_run(options.files[0])
            benchmark.keep_correct([run], answers.FORMAT, options.keep_correct, options.keep_most)
        return str(error.value)

    assert "holds questions of the test split" in refused(train_run([line(1), line(3)]))
    assert "no run record beside it says --split train" in refused(train_run([line(1)], "test"))
    assert "no run record beside it says --split train" in refused(write([line(1)], "no-record.jsonl"))
    assert not (tmp_path / "right.jsonl").exists()


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("more", [{}, {"output_tokens": 9}])
def test_the_picture_is_drawn_with_and_without_token_counts_and_votes(write, tmp_path, more, samples):
    picture = tmp_path / "runs.png"
    rows = [row | more | {"sample": sample} for row in right_where(1, 3) for sample in range(samples)]
    benchmark.main(
        [write(rows, "$x_$.jsonl"), write(rows, "cot_model_outputs.jsonl"), "--published", "--plot", str(picture)]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags",
    [["--plot", "none/x.png"], ["--plot", "x.pdf"], ["--html", "x.txt"], ["--wrong", "-1"], ["--wrong", "1", "--json"]],
)
def test_a_flag_that_cannot_be_kept_is_refused_before_scoring(refuse, flags):
    assert flags[0] in refuse("no-such-file.jsonl", *flags)


def seed_files(write, *texts):
    return [
        write([line(i, text) for i, text in enumerate(seed)], f"sft-seed{number}.jsonl")
        for number, seed in enumerate(texts, 1)
    ]


def test_seeds_are_pooled_as_samples_of_their_questions(write, score, capsys):
    files = seed_files(write, ["#### 18", "#### 1"], ["#### 18", "#### 18"], ["#### 2", "#### 18"])
    base = write([line(0, "#### 18"), line(1, "#### 1")], "base.jsonl")
    pooled, other = score(*files, base, "--pool-seeds", "--compare")
    as_samples = [
        line(i, text, sample=sample) for sample, pair in enumerate(["AB", "AA", "BA"]) for i, text in enumerate(pair)
    ]
    as_samples = [row | {"model_output": {"A": "#### 18", "B": "#### 1"}[row["model_output"]]} for row in as_samples]
    (same,) = score(write(as_samples, "same.jsonl"))
    assert (pooled["n"], pooled["questions"], pooled["paths"]) == (6, 2, files)
    assert pooled["interval"] == pytest.approx(same["interval"]) and pooled["accuracy"] == same["accuracy"]
    assert other["n"] == 2 and pooled["compared"][0]["test"] == "paired t-test"
    benchmark.main([*files, "--pool-seeds"])
    printed = capsys.readouterr().out
    assert "sft  " in printed and "3 seeds (50.00, 100.00, 50.00)" in printed and "pass@" not in printed


def test_pooled_seeds_have_an_interval_over_seeds_and_no_claim_without_it(write, score, capsys):
    def seeds(name, *rights):
        return [write(right_where(right, 200), f"{name}-seed{seed}.jsonl") for seed, right in enumerate(rights)]

    base, steady, erratic = write(right_where(60, 200), "base.jsonl"), (98, 100, 102), (60, 100, 140)
    for rights, shown in ((steady, True), (erratic, False)):
        files = seeds("sft", *rights)
        first, pooled = score(base, *files, "--pool-seeds", "--compare")
        (pair,) = first["compared"]
        half = 4.3027 * (rights[1] - rights[0]) / 2 / 3**0.5  # t of 2 degrees; a standard deviation of one step
        assert pair["interval_seeds"] == pytest.approx([-20 - half, -20 + half], abs=1e-3)
        assert pooled["interval_seeds"] == pytest.approx([50 - half, 50 + half], abs=1e-3)
        assert pair["p_holm"] < 0.001
        benchmark.main([base, *files, "--pool-seeds", "--compare"])
        assert ("no difference shown between base and sft over seeds" in capsys.readouterr().out) is not shown
    welch = score(*seeds("a", *steady), *seeds("b", *erratic), "--pool-seeds", "--compare")[0]["compared"][0]
    assert welch["interval_seeds"] == pytest.approx([-49.0, 49.0], abs=1)  # t of 2.04 degrees over both spreads


def test_an_interval_over_seeds_stays_a_share(write, score):
    few, most = [write(right_where(right, 20), f"few-seed{right}.jsonl") for right in (0, 1)], []
    most += [write(right_where(20 - right, 20), f"most-seed{right}.jsonl") for right in (0, 1)]
    low, high = score(*few, *most, "--pool-seeds")
    assert low["interval_seeds"][0] == 0 and high["interval_seeds"][1] == 100


def test_seeds_of_other_questions_are_not_pooled(write, refuse):
    files = seed_files(write, ["#### 18"], ["#### 18", "#### 18"])
    assert "hold other questions" in refuse(*files, "--pool-seeds")


def test_seeds_of_one_name_in_two_folders_are_pooled_by_folder(write, score, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    names = ("a/sft-seed1", "a/sft-seed2", "b/sft-seed1")  # b lacks a seed
    first, second = score(*(write([line(0), line(1)], f"{name}.jsonl") for name in names), "--pool-seeds")
    assert [Path(path).parent.name for path in first["paths"]] == ["a", "a"]
    assert (second["path"], second["n"]) == (str(tmp_path / "b/sft-seed1.jsonl"), 2)


def test_commands_and_wall_times_come_from_the_run_records(write, capsys, tmp_path):
    path = write([line()], "a.jsonl")
    segments = [{"seconds": 1.5, "command": "python inference.py --mode cot"}, {"seconds": 2.25}]
    (tmp_path / "a.run.json").write_text(json.dumps({"decides": {}, "segments": segments}))
    benchmark.main([path, write([line()], "b.jsonl"), "--commands"])
    with_record, without = capsys.readouterr().out.splitlines()[1:3]
    assert re.search(r" 3\.8  python inference.py --mode cot$", with_record) and re.search(r"-  -$", without)


def test_the_picture_draws_accuracy_against_thinking_budget(write, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, errorbar = [], Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda axis, x, *more, **kw: drawn.append(x) or errorbar(axis, x, *more, **kw)
    )
    files = []
    for mode, budget in (("a", 64), ("a", 256), ("b", 64), ("a", 128)):
        name = f"{mode}-{budget}"
        files.append(write([line(forced=True), line(1, forced=False)], f"{name}.jsonl"))
        record = {"decides": {"mode": mode, "think_budget": budget, "max_new_tokens": budget + 512}, "segments": [{}]}
        (tmp_path / f"{name}.run.json").write_text(json.dumps(record))
    benchmark.main([*files, "--plot", str(tmp_path / "a.png")])
    assert (64, 128, 256) in drawn and (64,) in drawn and (tmp_path / "a.png").stat().st_size > 10_000


def test_a_compressed_file_is_read_as_it_was(write, score, refuse, tmp_path):
    plain = write([line(), line(1, "#### 1")])
    compressed = tmp_path / "run.jsonl.gz"
    compressed.write_bytes(gzip.compress((tmp_path / "run.jsonl").read_bytes()))
    assert {key: value for key, value in score(str(compressed))[0].items() if key != "path"} == {
        key: value for key, value in score(plain)[0].items() if key != "path"
    }
    for damaged in (compressed.read_bytes()[:-12], b"no gzip", compressed.read_bytes()[:30] + b"x" * 40):
        compressed.write_bytes(damaged)
        assert "run.jsonl.gz: cannot be read" in refuse(str(compressed))


HARNESS = ROOT / "tests" / "samples_gsm8k.jsonl"  # --log_samples of lm-eval 0.4.13: 2 documents, 2 filters, 2 repeats


def test_a_file_of_eleuthers_harness_is_read_as_it_is(write, score, capsys, tmp_path):
    (run,) = score(str(HARNESS))
    assert (run["n"], run["questions"], run["correct"], run["ambiguous"]) == (4, 2, 4, 0)
    documents = [json.loads(text) for text in HARNESS.read_text().splitlines()]
    own = [
        {"id": 7 + doc["doc_id"], "question": doc["doc"]["question"], "model_output": "#### 18"}
        | {"ground_truth_answer": doc["doc"]["answer"]}
        for doc in documents[:2]
    ]
    (pair,) = score(str(HARNESS), write(own), "--compare")[0]["compared"]
    assert (pair["questions"], pair["left_out"], pair["other_golds"], pair["first_only"]) == (2, 0, 0, 1)
    page = tmp_path / "page.html"
    benchmark.main([str(HARNESS), "--html", str(page), "--wrong", "1"])
    assert "Question: Janet" in page.read_text() and "<dd>greedy</dd>" in page.read_text()


def test_a_harness_file_of_two_filters_holds_each_answer_once(write, score, shared):
    """The published texts as the harness logs them come to the published counts."""
    path = shared / "published_outputs" / "cot_model_outputs.jsonl"
    published = [json.loads(text) for text in path.read_text().splitlines()]
    lines = [
        {"doc_id": row["id"], "doc": {"question": row["question"]}, "target": row["ground_truth_answer"]}
        | {"resps": [[row["model_output"]]], "filtered_resps": ["18"], "filter": name}
        for name in ("strict-match", "flexible-extract")
        for row in published
    ]
    (run,) = score(write(lines))
    assert (run["n"], run["questions"], run["correct_published"]) == (1319, 1319, 701)


def harness_line(**changes):
    line = {
        "doc_id": 0,
        "doc": {"question": "q", "result": 7},
        "target": "18",
        "resps": [["#### 18"]],
        "filter": "none",
    }
    return line | changes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"doc": "q"}, "'doc' must be an object, this is str"),
        ({"doc": {"problem": "q"}}, "lacks the key 'question'"),
        ({"resps": [[["-1.5", "False"]], [["-2.5", "True"]]]}, "log the samples of a generate_until task"),
        ({"resps": "18"}, "log the samples of a generate_until task"),
        ({"resps": [[18.5, None]]}, "'model_output' must be text, this is NoneType"),
        ({"target": "['a']"}, "is no number"),
    ],
)
def test_a_harness_line_that_holds_no_answers_is_named(write, refuse, changes, told):
    assert told in refuse(write([harness_line(**changes)]))


def test_a_harness_document_is_scored_against_the_column_that_is_named(write, score):
    path = write([harness_line()])
    assert score(path)[0]["correct"] == 1
    assert score(path, "--answer-column", "result")[0]["wrong"] == 1


def test_files_of_other_key_names_are_read_and_lines_of_one_question_are_its_samples(write, score, refuse):
    rows = [{"problem": f"q{i}", "solution": 18, "generation": f"#### {17 + i % 2}"} for i in (1, 2, 1)]
    columns = ["--question-column", "problem", "--answer-column", "solution", "--output-column", "generation"]
    (run,) = score(write(rows), *columns)
    assert (run["n"], run["questions"], run["correct"], run["pass_at"]) == (3, 2, 2, [50])
    refused = refuse(write(rows), *columns[:4])
    assert "lacks the key 'model_output'" in refused and "name the right one with --output-column" in refused


@pytest.fixture
def dataset(tmp_path):
    """A data set of two questions, of which the second has another answer; both are of one template."""
    path = tmp_path / "data.jsonl"
    rows = [
        {"question": "question  0", "answer": "#### 18", "template": "eggs"},
        {"question": "question 1", "answer": "#### 7", "template": "eggs"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_other_golds_are_matched_by_text_and_what_has_none_is_left_out_and_counted(
    write, score, refuse, capsys, dataset
):
    path = write([line(0), line(1), line(2)])
    (run,) = score(path, "--gold", dataset)
    assert (run["n"], run["correct"], run["wrong"], run["no_gold"]) == (2, 1, 1, 1)
    benchmark.main([path, write([line(1)], "b.jsonl"), "--gold", dataset, "--wrong", "5", "--compare"])
    printed = capsys.readouterr().out
    assert "run: 1 line is left out: not a question of --gold" in printed
    assert printed.count("read 18, gold 7") == 2
    assert "--gold holds none of its 1 questions" in refuse(write([line(9)]), "--gold", dataset)
    assert "--gold none.jsonl" in refuse(path, "--gold", "./none.jsonl").replace("./", "")


def test_questions_of_one_template_count_as_one_cluster(write, score, refuse, capsys, dataset):
    """45 templates of the demo: the standard error of cot is 2.83 points, not 1.57."""
    cot, few_shot = (str(ROOT / "results" / "demo" / f"{mode}.jsonl") for mode in ("cot", "few_shot"))
    cluster = ["--cluster", "template", "--cluster-from", str(ROOT / "demo" / "problems")]
    first, _ = score(cot, few_shot, *cluster, "--compare")
    assert first["clusters"] == 45
    t, error = 2.0154, 2.83  # t of 44 degrees
    assert first["interval"] == pytest.approx([73.25 - t * error, 73.25 + t * error], abs=0.02)
    (pair,) = first["compared"]
    assert pair["test"] == "clustered t-test" and pair["interval"] == pytest.approx([-0.88, 3.88], abs=0.01)
    (plain,) = score(cot)
    assert plain["interval"] == pytest.approx([70.08, 76.20], abs=0.01)
    own_key = write([line(q, template=f"t{q % 3}") for q in range(9)])
    assert score(own_key, "--cluster", "template")[0]["clusters"] == 3
    assert "lacks the key 'template' of --cluster; --cluster-from" in refuse(write([line()]), "--cluster", "template")
    assert "--cluster KEY" in refuse(cot, "--cluster-from", dataset)
    no_such_key = refuse(cot, "--cluster", "kind", "--cluster-from", dataset)
    assert "--cluster-from: " in no_such_key and "lacks the column 'kind'" in no_such_key
    assert "--question-column" not in no_such_key


def test_clustered_errors_are_those_of_a_sum_over_clusters(write, score):
    """By hand: three clusters, of 4, 4 and 2 questions with 4, 2 and 0 right, mean 0.6."""
    clusters, rights = "aaaabbbbcc", [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    rows = [line(q, "#### 18" if right else "", group=clusters[q]) for q, right in enumerate(rights)]
    (run,) = score(write(rows), "--cluster", "group")
    error = (3 / 2 * (1.6**2 + 0.4**2 + 1.2**2)) ** 0.5 / 10
    assert run["interval"] == pytest.approx([0, 100], abs=1e-9) and 4.3027 * error > 0.6  # t of 2 degrees, cut at 0
    mean, found, count = scores.clustered_mean(scores.bits(bytearray(rights)), list(map(ord, clusters)))
    assert (mean, found, count) == (pytest.approx(0.6), pytest.approx(error), 3)
    (all_right,) = score(write([line(q, group=str(q % 5)) for q in range(50)]), "--cluster", "group")
    assert all_right["interval"] == pytest.approx([56.55, 100], abs=0.01)  # Wilson's for 5 of 5


def test_sums_go_in_the_same_order_in_every_process():
    """Else a difference of an eighth of a point is printed as +0.12 by one process and +0.13 by the next."""
    assert scores.hash_text("question 0") == 4594773267571962213
    assert scores.hash_text("-1") != scores.hash_text("-2")


def test_a_vote_has_an_interval_over_clusters(write, score):
    rows = [line(q, "#### 18" if q < 20 else "", sample=s, group=q // 10) for q in range(40) for s in range(2)]
    (run,) = score(write(rows), "--cluster", "group")
    assert run["majority_interval"] == pytest.approx([0, 100])  # four clusters, all right or all wrong
    assert run["majority_at"] == [50, 50]


def test_a_line_break_in_a_command_makes_no_row_and_markup_in_a_name_no_html(write, capsys, tmp_path):
    path = write([line()], "a ![x](y) <img src=x>.jsonl")
    command = "python inference.py --system-prompt 'x\nforged  1  100.00'\n| b | 1 |"
    record = {"decides": {}, "segments": [{"command": command}]}
    (tmp_path / "a ![x](y) <img src=x>.run.json").write_text(json.dumps(record))
    benchmark.main([path, "--commands"])
    assert len(capsys.readouterr().out.splitlines()) == 2
    benchmark.main([path, write([line(text="")], "b*.jsonl"), "--commands", "--markdown", "--compare"])
    lines = capsys.readouterr().out.splitlines()
    assert [len(re.split(r"(?<!\\)\|", text)) for text in lines[:4]] == [13] * 4
    assert not re.search(r"(?<!\\)[<>!*]", "".join(lines)) and "x\\\\nforged" in lines[2]


def test_a_code_block_is_not_left_by_the_backticks_in_it():
    assert common.code_block("a\n```\n# b") == "````\na\n```\n# b\n````"
    assert common.code_block("a") == "```\na\n```"


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw a picture and give its figure, laid out."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)

    def drawn(*arguments):
        benchmark.main([*arguments, "--plot", str(tmp_path / "x.png")])
        figures[-1].canvas.draw()
        return figures[-1]

    return drawn


def texts_of(figure):
    from matplotlib.text import Text

    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def test_a_picture_names_model_and_data_and_draws_accuracy_from_0_to_100(drawn, write, tmp_path):
    path = write([line(0), line(1, "#### 1")])
    record = {"decides": {}, "segments": [{"model": "/home/me/Qwen3-0.6B", "dataset": "openai/gsm8k"}]}
    (tmp_path / "run.run.json").write_text(json.dumps(record))
    figure = drawn(path)
    assert figure._suptitle.get_text() == "Qwen3-0.6B on openai/gsm8k"
    accuracies, statuses = figure.axes
    assert accuracies.get_xlim() == statuses.get_xlim() == (0, 100)
    assert [text.get_text() for text in statuses.get_legend().get_texts()] == ["right", "wrong"]


def test_a_picture_draws_the_vote_of_several_samples_and_paired_differences(drawn, write):
    rows = [line(q, "#### 18" if s < 2 or q == 0 else f"#### {s}", sample=s) for q in range(4) for s in range(4)]
    first = write([line(q, "#### 1") for q in range(4)], "base.jsonl")
    figure = drawn(first, write(rows, "maj4.jsonl"), "--compare")
    told = [text.get_text() for text in texts_of(figure)]
    assert "100.0  maj@4" in told and "62.5  mean of 4" in told
    assert "maj4 − base" in told and any(text.startswith("+62.5 [+") for text in told)


def test_no_two_texts_of_a_picture_overlap(drawn):
    """Runs that come to about the same, as the demo's recipes do."""
    folder = ROOT / "results" / "demo" / "model"
    names = ["thinking-4096", *(f"thinking-budget-{n}" for n in (32, 64, 128, 256)), "maj8", "base-prefill-1024"]
    names += [f"{recipe}-seed{seed}" for recipe in ("sft-without-annotations", "lora-r4") for seed in (1, 2)]
    figure = drawn(*(str(folder / f"{name}.jsonl.gz") for name in names), "--compare", "--pool-seeds")
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
    width, height = figure.canvas.get_width_height()
    for place, (text, box) in enumerate(boxes):
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, text
        for other, other_box in boxes[place + 1 :]:
            assert not box.overlaps(other_box), (text, other)


def test_the_published_rule_shows_a_dash_where_references_are_bare_numbers(write, score, capsys):
    bare = [
        line(0) | {"ground_truth_answer": "18"},
        line(1, text="#### 2.0107e-6") | {"ground_truth_answer": "2.01e-06"},
    ]
    path = write(bare)
    (run,) = score(path)
    assert run["accuracy_published"] is run["interval_published"] is run["correct_published"] is None
    benchmark.main([path, write(bare, "b.jsonl"), "--compare"])
    out = capsys.readouterr().out
    table, comparison = out.split("\n\n")[:2]
    assert all(" – " in row for row in table.splitlines()[1:]) and " – " in comparison.splitlines()[1]
    assert "2 references have no `####`" in out


def test_prompts_that_were_too_long_are_counted_and_wrong(write, score, capsys):
    path = write([line(0), line(1, text="") | {"finish_reason": "prompt_too_long"}])
    (run,) = score(path)
    assert (run["prompt_too_long"], run["accuracy"]) == (1, 50)
    benchmark.main([path])
    assert "1 prompt was too long for the model; an empty answer counts as wrong" in capsys.readouterr().out
