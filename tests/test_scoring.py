"""The two readings of an answer: real cases, the published counts, and texts that mean harm."""

import json
import time
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common import UserError
from reading import STATUSES, read_final, read_gold, read_published, score_final, score_published

READ = {
    "#### 18": 18,
    "#### 18.": 18,
    "####8": 8,
    "**#### 42**": 42,
    "#### **42**": 42,
    "#### Answer: 18": 18,
    "##### Final answer: 27": 27,
    "#### <answer>820</answer>": 820,
    "#### <48>": 48,
    "#### -10": -10,
    "#### −10": -10,
    "#### -$10": -10,
    "#### $-3$ degrees Celsius.": -3,
    "#### 1200.00": 1200,
    "#### $75.00": 75,
    "#### 5.9999": Fraction(59999, 10000),
    "#### 80,000": 80000,
    "#### 1{,}000": 1000,
    "#### 1\\,000": 1000,
    "#### 1\u202f000": 1000,
    "#### 1/20": Fraction(1, 20),
    "#### $ \\frac{1}{2} $": Fraction(1, 2),
    "#### 1 1/2": Fraction(3, 2),
    "#### 1\\frac{1}{2}": Fraction(3, 2),
    "#### 2½ cups": Fraction(5, 2),
    "#### 50%": 50,
    "#### 50\\%": 50,
    "#### 2:00 pm": 2,
    "#### 5 m^2": 5,
    "#### 5 \\text{ m}^2": 5,
    "#### 5 m²": 5,
    "#### 90^\\circ": 90,
    "#### 18 (was 20)": 18,
    "#### 18 dollars (20 - 2 = 18)": 18,
    "#### 18 = 18.0": 18,
    "#### 9 + 9 = 18 dollars.": 18,
    "#### 18 = total": 18,
    "#### 66.67 ≈ 67": 67,
    "#### <<3*4=12>>12": 12,
    "#### $ \\boxed{109} $": 109,
    "#### $$\n\\boxed{280}\n$$": 280,
    "####\n\n18": 18,
    "####\n- 18": 18,
    "#### - 18": -18,
    "#### 80,\\!000": 80000,
    "#### \\frac12": Fraction(1, 2),
    "#### 18 km/h": 18,
    "#### (18)": 18,
    "#### \\(18\\)": 18,
    "#### `18`": 18,
    "#### n = 18": 18,
    "#### 100####": 100,
    "#### $100####": 100,
    "98####": 98,
    "25 * 7 = 175 ####": 175,
    "**Final Answer:** 63####": 63,
    "the 3 boys and 4 girls make 7 ####": 7,
    "#### Answer: #### 18": 18,
    "$#### 27$": 27,
    "\\boxed{3600}#### 3600": 3600,
    "#### 5\nNo, wait.\n#### 18": 18,
    "So $\\boxed{12}$, no: $\\boxed{\\frac{7}{2}}$.": Fraction(7, 2),
    "<think>\n#### 4\n</think>\n\n#### 18": 18,
}

AMBIGUOUS = [
    "#### 4x + 3x + 20",
    "#### $ \\boxed{2x} $",
    "#### $ 90x $",
    "#### 4 + $\\frac{3x}{2}$",
    "#### (3/2)x + 4",
    "#### x/2",
    "#### 56k",
    "#### 4 and 6",
    "4 and 6 ####",
    "x + 20 ####",
    "#### 4-6",
    "#### 4–6 hours",
    "#### 4 to 6",
    "#### > 5",
    "#### 1,5",
    "#### 1.2.3",
    "#### 1_000",
    "#### 2x2",
    "#### 2:30",
    "#### 2:1",
    "#### 3 apples for 2 days",
    "#### 12*2.74 + 9*1.87",
    "#### 3 * 3",
    "#### 3 + 3",
    "#### 2^3",
    "#### 1e5",
    "#### 40 * 4 * 21 = ####",
    "#### $ \\frac{32}{3} $ or approximately 10.67 feet.",
    "#### 1/0",
    "#### " + "7" * 5000,
]

NO_ANSWER = ["", "18", "The answer is 18.", "### 18", "#### m^2", "#### none", "\\boxed{x}", "N = 90 $.\n\n####"]


@pytest.mark.parametrize("text", READ)
def test_the_number_on_the_answer_line_is_read_exactly(text):
    assert read_final(text, thinking=False).number == READ[text]


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_what_is_not_one_number_is_ambiguous(text):
    assert read_final(text, thinking=False).status == "ambiguous"


@pytest.mark.parametrize("text", NO_ANSWER)
def test_a_number_outside_the_asked_format_is_no_answer(text):
    assert read_final(text, thinking=False).status == "no_answer"


@pytest.mark.parametrize(
    ("text", "thinking_open", "status"),
    [
        ("<think>\nso 18", False, "unfinished"),
        ("<think>\n#### 18", False, "unfinished"),
        ("#### 18", True, "unfinished"),
        ("so\n</think>\n\n#### 18", True, "right"),
        ("so\n</think>\n\n#### 18", False, "right"),
        ("<think>a</think>#### 18<think>b", False, "unfinished"),
        ("<think>\n#### 18\n</think>", False, "no_answer"),
    ],
)
def test_only_what_follows_a_closed_thought_counts(text, thinking_open, status):
    assert score_final(text, "#### 18", thinking_open) == status


def test_numbers_are_compared_exactly_by_the_final_reading_alone():
    assert score_final("#### 17.99995", "#### 18") == "wrong"
    assert score_published("#### 17.99995", "#### 18")
    assert score_final("#### 6/2", "#### 3") == "right"


def test_the_published_pattern_is_kept_with_its_faults():
    assert read_published("#### 1200.00") == 0
    assert read_published("#### 1/20") == 20
    assert read_published("#### 100####") is None
    assert read_published("no marker, 5 and 1,234") == 1234
    assert read_published("1,234" + "x" * 200) == 1234


def test_the_span_of_a_reading_is_what_was_read():
    text = "9 + 9\n#### 18 eggs\nbye"
    reading = read_final(text, thinking=False)
    assert text[reading.start : reading.end] == " 18 eggs"


REFERENCES = {
    "2 * 1,000 = 2,000\n#### 2,000": 2000,
    "2000": 2000,
    " -51.0 ": -51,
    "1,234.5": Fraction(2469, 2),
    "1/3": Fraction(1, 3),
    "2.0107e-06": Fraction(20107, 10**10),
    "6.1e+16": 61 * 10**15,
    "#### 2.5E-3": Fraction(1, 400),
}


@pytest.mark.parametrize("answer", REFERENCES)
def test_a_reference_is_a_bare_number_or_the_number_after_its_marker(answer):
    assert read_gold(answer) == REFERENCES[answer]


@pytest.mark.parametrize("answer", ["eighteen", "", "####", "#### 4 and 6", "1/0", "nan", "18 19", "9" * 5000])
def test_a_reference_answer_without_a_number_is_an_error_and_not_a_wrong_answer(answer):
    with pytest.raises(UserError, match="####"):
        read_gold(answer)


@pytest.mark.parametrize(
    ("completion", "reference", "status"),
    [
        ("#### 0.33333", "1/3", "right"),
        ("#### 0.333", "1/3", "wrong"),
        ("#### 0.0000020108", "2.0107e-06", "right"),  # less than an absolute 1e-6 away
        ("#### 0.0000040107", "2.0107e-06", "wrong"),
        ("#### 1234567.5", "1234567.25", "right"),
        ("#### 10000001", "10000000", "wrong"),  # an integer is met exactly
        ("#### 51", "51.0", "right"),
    ],
)
def test_a_reference_with_a_fraction_part_is_met_closely_and_an_integer_exactly(completion, reference, status):
    assert score_final(completion, reference) == status


PUBLISHED = {  # by the published rule, by final answer
    "zero_shot_model_outputs": (108, 110),
    "cot_model_outputs": (701, 711),
    "few_shot_model_outputs": (561, 561),
    "BF16-thinking_model_outputs_reduced_batch": (880, 852),
    "Qwen3-GSM8k-SFT-BF16-temp0": (634, 633),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_score_as_published(shared, name):
    with open(shared / "published_outputs" / f"{name}.jsonl") as file:
        rows = [json.loads(line) for line in file]
    prefilled = "SFT" in name
    published = sum(score_published(row["model_output"], row["ground_truth_answer"]) for row in rows)
    final = [score_final(row["model_output"], row["ground_truth_answer"], prefilled) for row in rows]
    assert (published, final.count("right")) == PUBLISHED[name]


@given(
    st.text(alphabet=st.sampled_from("0123456789,.#$\\{}[]()<>/=+-*x^:% \n−½&ab"), max_size=60) | st.text(),
    st.booleans(),
)
@example("####" + "(" * 50, False)
@example("#### \ud800", False)
def test_any_text_gives_a_reading(text, thinking):
    for completion in (text, "####" + text, text + "####", f"\\boxed{{{text}}}"):
        assert score_final(completion, "#### 18", thinking) in STATUSES
        read_published(completion)


@given(st.fractions() | st.integers())
def test_every_exact_number_is_read_back(number):
    assert read_final(f"#### {number}", thinking=False).number == number


HARMFUL = (
    *"0123,.#$\\{}[]()<>/=+-*x^: \n",
    *(
        "1,",
        "1,111,",
        "1 ",
        "1/",
        "1=",
        "#### ",
        "####\n",
        "#### m2\n",
        "#### a\n",
        "\\boxed{",
        "\\frac{1}",
        "<a",
        " (",
        "1 (",
    ),
    *("1.", "a ", "a^", "\\,", "$ ", ",,1", "<think>", "</think>", "𝟙", "½"),
)


def seconds_to_score(piece, size):
    """CPU time to score five completions of this size, the best of three."""
    text, times = piece * (size // len(piece)), []
    for _ in range(3):
        start = time.process_time()
        for completion in (text, "#### 1" + text, text + "#### 1", text + "####", "\\boxed{1" + text):
            score_final(completion, "#### 18")
            score_published(completion, "#### 18")
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("piece", HARMFUL, ids=ascii)
def test_scoring_takes_time_in_proportion_to_the_text(piece):
    assert seconds_to_score(piece, 200_000) / seconds_to_score(piece, 50_000) < 8  # a quadratic reader takes 16 times
