"""The two readings of an answer: real cases, the published counts, and texts that mean harm."""

import json
import time
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common import UserError
from reading import (
    STATUSES,
    opens_thought,
    read_final,
    read_gold,
    read_lenient,
    read_published,
    score_final,
    score_published,
)

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
    # signs
    "#### negative 5": -5,
    "#### minus 5": -5,
    "#### The change is minus $5": -5,
    "#### \\-5": -5,
    "#### -(5)": -5,
    "#### —5": -5,
    "#### -£5": -5,
    "#### The change is -**5**": -5,
    "negative 5 ####": -5,
    "So $-\\boxed{5}$.": -5,
    "- \\boxed{5}": 5,  # a bullet, as in the next two
    "- 18 ####": 18,
    "#### Answer\n- 18": 18,
    "-18 ####": -18,
    "#### Total - 18": 18,
    "#### 18 — the total": 18,
    "#### 18 - a dozen eggs": 18,
    "#### $5/hour": 5,
    "#### 5/h": 5,
    # boxes
    "\\boxed{12} no: \\boxed{\\mathbf{\\text{18}}}": 18,
    "\\boxed{{{18}}}": 18,
    "\\boxed{\\frac{\\text{7}}{\\mathbf{2}}}": Fraction(7, 2),
    "\\fbox{18}": 18,
    "#### 12\nNo, wait: \\boxed{18}": 18,
    "#### \\cfrac{1}{2}": Fraction(1, 2),
    # headings
    "#### Step 1: Add\n5 + 3 = 8\n\\boxed{18}": 18,
    "#### 1. Find the cost\n5\n\\boxed{18}": 18,
    "#### 8. So she has 8 eggs.": 8,
    "#### Note: 1 day \\boxed{18}": 18,
    "#### 18\n#### Check\n16 - 7 = 9": 18,
    "#### Final Answer:\n\n$18": 18,
    "#### Profit\n18": 18,
    "#### Day 5": 5,
    "#### Tip: $5": 5,
    "#### Check amount: 50": 50,
    "#### Calculated total: 18": 18,
    "#### Working hours: 40": 40,
    "#### 5) dollars": 5,
    "#### Answer\n> 18": 18,
    "18 ####</s>": 18,
    "18 ####<|im_end|>": 18,
    "#### 5 hundredths": 5,
    "#### 36 (3 dozen)": 36,
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
    "#### x - 8",
    "#### x -8",
    "x -8 ####",
    "#### 20 - x",
    "#### 20-x",
    "#### x - (56/7)",
    "#### x minus 8",
    "#### eggs minus 8",
    "#### 116/x",
    "#### \\frac{116}{x}",
    "#### 8 * t",
    "#### x·8",
    "#### x = 8 or x = -8",
    "#### a = 5, b = 7",
    "#### \\theta - 8",
    "#### \\log 8",
    "#### 4 \\* 4",
    "#### 2 million",
    "#### 2 \\text{ million}",
    "#### 2 (million)",
    "2 million ####",
    "#### 2 M",
    "#### 2 k",
    "#### 7.5 dozen",
]

NO_ANSWER = [
    "\\boxed{12} no: \\boxed{1",
    "\\boxed{18}. \\boxed{}",
    "#### 5\nso \\boxed{18}. \\boxed{}",
    "#### Step 1: 5 + 3 = 8",
    "#### Step 2: 3 * 6 = 18\n\nThe answer is 18.",
    "#### Note: 1 day",
    "#### Verification: 3 * 6 = 18",
    "#### Profit\n16 - 7 = 9",
    "",
    "18",
    "The answer is 18.",
    "### 18",
    "#### m^2",
    "#### none",
    "\\boxed{x}",
    "N = 90 $.\n\n####",
]


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
        ("<think>a</think> The <think> tag. #### 18", False, "right"),
        ("The `<think>` tag. #### 18", False, "right"),
        ("<think>a</think>#### 18. The </think> tag.", False, "right"),
        ("Well.\n<think>\n#### 4\n</think>\n#### 18", False, "right"),
        ("<think>a</think>#### 4\n</think>\n#### 18", False, "right"),
    ],
)
def test_only_what_follows_a_closed_thought_counts(text, thinking_open, status):
    assert score_final(text, "#### 18", thinking_open) == status


NEXT = [  # how the next problem begins
    "\n\nQuestion: Tom has 5.\nAnswer: #### 5",
    "\n\n**Question 2:** Tom has 5.\n#### 5",
    "\n### Problem 2\nTom has 5.\n\\boxed{5}",
    "\nProblem 2. Tom has 5.\n#### 5",
    "\nQ: Tom has 5.\nA: #### 5",
    "\nuser\nTom has 5.\nassistant\n#### 5",
    "\nHuman: Tom has 5.\n#### 5",
    "\n### Instruction:\nTom has 5.\n#### 5",
    "<|im_end|>\n<|im_start|>user\nTom has 5.<|im_end|>\n<|im_start|>assistant\n#### 5",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n#### 4\n</think>\n#### 5",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n#### 5",
    " [INST] Tom has 5. [/INST] #### 5",
]


@pytest.mark.parametrize("after", NEXT)
@pytest.mark.parametrize("answer", ["#### 18", "18 ####", "\\boxed{18}"])
def test_where_a_problem_of_its_own_follows_the_answer_before_it_counts(answer, after):
    reading = read_final(answer + after, opens_thought(after))
    assert (reading.number, reading.ran_on) == (18, True)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Question: Tom has 5.\nAnswer: #### 18", 18),  # the question told again, nothing answered before it
        ("#### 18<|im_end|>", 18),
        ("#### 18\n\nA problem: eggs. No question is left.", 18),
        ("Question: 2\n\nNo number here.\n\nQuestion: 3\n#### 18", 18),
    ],
)
def test_a_text_that_only_ends_has_not_run_on(text, number):
    reading = read_final(text, thinking=False)
    assert (reading.number, reading.ran_on) == (number, False)


LENIENT = {
    "#### 18": 18,
    "So \\boxed{18}, in short: \\boxed{7}\n\nFinal answer: 3": 7,  # the forms count in the order of the docstring
    "Final answer: 18": 18,
    "### Final Answer\n\n**18**": 18,
    "The final answer is:\n\\[\n18\n\\]": 18,
    "Final answer: 18. The answer is 5.": 18,
    "The answer is 18.": 18,
    "The answer is 2.25.": Fraction(9, 4),
    "The answer is 4. So, there are 4 cows in 1 of the 3 stalls.": 4,
    "The answer is 4 hours * 80 mph = 320 miles.\n\nSo, John spent 4 hours": 320,
    "So, the answer is $0.": 0,
    "The answer is negative 5.": -5,
    "The answer is $\\frac{1}{2}$.": Fraction(1, 2),
    "ANSWER: 18": 18,
    "**Answer:** 18 eggs": 18,
    "Thus <answer>18</answer>": 18,
    "She makes **$18** every day.": 18,
    "She makes 18 dollars:\n\n$18": 18,
    "Thus\n- 18": 18,
    "There are 3 boys. So she has 18 eggs.": 18,
    "There are 3 boys.\nShe makes 9 * 2 = 18 dollars.": 18,
    "**Therefore**, the total is \\(90 + (40 - 90) = 140\\).": 140,
    "In total, he has 400 on Saturday and 400 on Sunday.": 400,
    "50%": 50,
    "#### 4x\nThe answer is 18.": 18,
    "<think>The answer is 5.</think>The answer is 18.": 18,
    "The answer is 18.\n\nQuestion: Tom has 5.\nThe answer is 5.": 18,
}

NOT_EVEN_LENIENT = {
    "x = 18": "no_answer",
    "She has 18 eggs.": "no_answer",
    "So she has 18 eggs. Then": "no_answer",
    "She makes 9 * 2 = 18 dollars": "no_answer",
    "So she has 18 eggs": "no_answer",  # where nothing tells how the text ended, a sentence without its end is cut
    "So 3 boys have 18 eggs.": "ambiguous",
    "The answer is not 5.": "no_answer",
    "To find the final answer, we add 5 to it.": "no_answer",
    "Answer: She had 5 apples.\nThen she ate 2.": "no_answer",
    "I add **5** and 3 to get 8.": "no_answer",
    "**Step 4: Do it.**": "no_answer",
    "<think>The answer is 5.</think> So": "no_answer",
    "<think>The answer is 5.": "unfinished",
    "The answer is x - 8.": "ambiguous",
    "The answer is 2 million.": "ambiguous",
}


@pytest.mark.parametrize("text", LENIENT)
def test_the_lenient_reading_takes_what_a_reader_accepts(text):
    assert read_lenient(text, opens_thought(text)).number == LENIENT[text]


@pytest.mark.parametrize("text", NOT_EVEN_LENIENT)
def test_the_lenient_reading_takes_no_number_that_is_not_given_as_the_answer(text):
    assert read_lenient(text, opens_thought(text)).status == NOT_EVEN_LENIENT[text]


@pytest.mark.parametrize("text", LENIENT)
def test_a_cut_text_is_unfinished_to_the_lenient_reading(text):
    reading = read_lenient(text, opens_thought(text), cut=True)
    assert reading.status == ("read" if reading.ran_on else "unfinished")
    assert reading.ran_on == ("Question" in text)  # there the answer is whole, and another problem was cut


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
        read_lenient(completion, thinking)
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
    *(
        "\\boxed{1} ",
        "\nQ: #### 1",
        "\nQuestion",
        "<|im_end|>",
        "\n#### Step 1",
        "minus 1 ",
        "-(1",
        "-**",
        "\\text{",
        "> ",
    ),
    *("Final answer: ", "The answer is 1. ", "<answer>1", "**1** ", "\n1"),
)


def seconds_to_score(piece, size):
    """CPU time to score five completions of this size, the best of three."""
    text, times = piece * (size // len(piece)), []
    for _ in range(3):
        start = time.process_time()
        for completion in (text, "#### 1" + text, text + "#### 1", text + "####", "\\boxed{1" + text):
            thinking = opens_thought(completion)
            read_lenient(completion, thinking, final=read_final(completion, thinking))
            score_published(completion, "#### 18")
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("piece", HARMFUL, ids=ascii)
def test_scoring_takes_time_in_proportion_to_the_text(piece):
    assert seconds_to_score(piece, 120_000) / seconds_to_score(piece, 30_000) < 8  # a quadratic reader takes 16 times
