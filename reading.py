"""How an answer is read from a completion, and held against the reference: two readings.

`read_published` is the rule behind the published figures. `read_final` takes the final answer as a careful reader
would. Here is text alone: nothing is loaded and nothing is written.
"""

import re
from fractions import Fraction
from typing import NamedTuple
from unicodedata import normalize

from common import UserError

STATUSES = ("right", "wrong", "unfinished", "no_answer", "ambiguous")
PUBLISHED_NUMBER = re.compile(r"[-+]?\d{1,3}(?:,\d{3})*\.?\d*|\.\d+")
PUBLISHED_CUT = re.compile(r"[^\d,.+-]")
PUBLISHED_TOLERANCE = 1e-4


def read_published(text):
    """The published reading: the last number after the last `####`, as a float; None without one.

    Where there is no `####` the last number of the whole text counts, thought or not. The pattern
    is the published one, warts and all: of `1200.00` it reads `.00`.
    """
    return last_number(text.rpartition("####")[2])


def last_number(text):
    # A number holds none of the characters at a cut, so the last 100 characters mostly tell.
    cut = PUBLISHED_CUT.search(text, max(0, len(text) - 100))
    numbers = (cut and PUBLISHED_NUMBER.findall(text, cut.start())) or PUBLISHED_NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def score_published(model_output, ground_truth_answer):
    """Whether the published reading of both texts is equal within 1e-4."""
    read, gold = read_published(model_output), read_published(ground_truth_answer)
    return read is not None and gold is not None and abs(read - gold) < PUBLISHED_TOLERANCE


class Reading(NamedTuple):
    """What a careful reader takes from a completion.

    `status` is "read" (then `number` is an exact int or Fraction), "unfinished", "no_answer" or
    "ambiguous". `start` and `end` bound the characters that it was read from.
    """

    status: str
    number: int | Fraction | None = None
    start: int = 0
    end: int = 0


def read_final(text, thinking):
    """The final answer of a completion, as a careful reader takes it; `thinking`: a thought was opened.

    Only the text after the last `</think>` counts; a thought that never closed is unfinished. There
    the answer stands after the last `####` whose line, or the next line with words in it, holds a
    number; else before a `####` that ends its line and the text (`98####`); else in the last
    `\\boxed{}`. `read_line` says how the line itself is read. Never raises, and takes time in
    proportion to the text.
    """
    close = text.rfind("</think>")
    begin = 0 if close < 0 else close + len("</think>")
    if thinking and (close < 0 or text.find("<think>", begin) >= 0):
        return Reading("unfinished")

    markers = [found.span() for found in MARKER.finditer(text, begin)] if "####" in text else []
    stop = trailing = len(text)
    for marker, after in reversed(markers):
        for start, end in answer_lines(text, after, stop):
            reading = read_span(text, start, end)
            if reading:
                return reading
        if trailing == stop and not WORD.search(text, after, stop):
            trailing = marker
        stop = marker

    if trailing < len(text):
        line = max(begin, text.rfind("\n", begin, trailing) + 1)
        reading = read_span(text, line, trailing, before_marker=True)
        if reading:
            return reading
    boxes = [found.span(1) for found in BOXED.finditer(text, begin)] if "boxed" in text else []
    return (boxes and read_span(text, *boxes[-1])) or Reading("no_answer")


def answer_lines(text, after, stop):
    """Spans of the two lines that may hold the answer of a `####`: its own, and the next with words."""
    if not DIGIT.search(text, after, stop):
        return
    newline = text.find("\n", after, stop)
    if newline < 0:
        yield after, stop
        return
    yield after, newline
    word = WORD.search(text, newline, stop)
    if word:
        end = text.find("\n", word.start(), stop)
        start = text.rfind("\n", 0, word.start()) + 1
        bullet = BULLET.match(text, start, word.start())
        yield bullet.end() if bullet else start, stop if end < 0 else end


def read_span(text, start, end, before_marker=False):
    """The Reading of text[start:end], or None where no number stands there."""
    number = read_line(text[start:end], before_marker)
    if number is None:
        return None
    return Reading("ambiguous" if number is AMBIGUOUS else "read", None if number is AMBIGUOUS else number, start, end)


AMBIGUOUS = object()
LONGEST_ANSWER = 1_000  # characters; what is longer is a loop or a listing, not one number
MARKER = re.compile(r"#{4,}")
DIGIT = re.compile("[0-9０-９¼-¾⅐-⅞]")
WORD = re.compile(r"[^\W_]")
BULLET = re.compile(r"[ \t]*[-*•][ \t]+")
BOXED = re.compile(r"\\boxed\s{0,9}\{([^{}]{0,200}(?:\{[^{}]{0,200}\}[^{}]{0,200}){0,9})\}")
NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+"
PLAIN = re.compile(rf"[ \t\r$*]*(-?)({NUMBER})[ \t\r$*.]*")


# A number, a fraction or a mixed number. No part of a word (`m2`), nor of what stands before (`1.2.3`).
VALUE = re.compile(
    rf"(?<![A-Za-z_0-9])(?<![0-9][.,])(?P<sign>(?<![\w.)%\]])[-+])?"
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/))?(?P<top>{NUMBER})(?:\s*/\s*(?P<bottom>{NUMBER}))?"
)


# With every value replaced by `#`: what makes one or more of them something else than the answer.
EXPRESSION = re.compile(
    r"""\#\)?\s*[-+*×÷·^:/]+[-(\s]*\#          # 4 + 6, 4-6, 2:30, 1/2/3
      | [A-Za-z)]\s*[+×÷^/]\s*\#               # x / 2, 3 apples + 4
      | [A-Za-z)](?:\*|\s\*\s)\#               # x*2
      | \#\s*[+×÷^]\s*[A-Za-z(]                # 4 + x
      | \#\)?[ *]*[xyznπ](?![A-Za-z'])         # 4x, 4 x
      | \#(?![mglshdcptwLCFVW])[A-Za-z](?![A-Za-z])  # 4b; 4m and 4h are units, 4k may be 4,000
      | \#\(                                   # 4(3)
      | \#[.,:_]\s?[0-9]                       # 1.2.3, 1,5, 1_000
      | [<>≤≥≠±√]                              # a range or a root
    """,
    re.VERBOSE,
)
JOINED = re.compile(r"(?:[-+*×÷·^/]|[0-9]\s*:|\b(?:and|or|to))\s*\Z")
ANNOTATIONS_AND_TAGS = re.compile(r"<<[^<>]*>>|</?([^<>]*)>")
REMARK = re.compile(r"(?<=[\w%.])(?:\s+[(\[]|[(\[](?=[A-Za-z]{2}))[^()\[\]]*(?:[)\]]|$)")
CLOCK = re.compile(r"(?<![0-9:.,])([0-9]{1,2}):00(?![0-9:])")
LEADING_MINUS = re.compile(r"(?:^|(?<=[:(]))\s*-\s+(?=[0-9.])")
UNIT_EXPONENT = re.compile(r"(?<=[A-Za-z])\s*\^\s*[-+]?[0-9]+")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
LATEX_THOUSANDS = re.compile(r"(?<=[0-9]),?(?:\\[,;:! ]|\{,\})(?=[0-9]{3}(?![0-9]))")
LATEX_COMMAND = re.compile(r"\\([A-Za-z]+|.?)")
LATEX_SYMBOLS = {
    **dict.fromkeys(("times", "cdot"), "×"),
    **dict.fromkeys(("approx", "to", "rightarrow", "Rightarrow", "implies", "equiv"), "="),
    **dict.fromkeys(("lt", "le", "leq", "gt", "ge", "geq"), "<"),
    **dict.fromkeys(("ne", "neq"), "≠"),
    "div": "÷",
    "pm": "±",
    "sqrt": "√",
    "pi": "π",
    "%": "%",
    "$": "$",
}
TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("−‒–﹣－", "-"),
        **dict.fromkeys("≈→⇒＝", "="),
        **dict.fromkeys("\u2009\u202f\u00a0", "\\,"),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        **{fraction: f" {normalize('NFKC', fraction).replace('⁄', '/')}" for fraction in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"},
        **{power: f"^{normalize('NFKC', power)}" for power in "²³"},
        **dict(zip("，．％⋅∙∕⁄", ",.%··//", strict=True)),
    }
)
MARKS = ((">=", "≥"), ("<=", "≤"), ("!=", "≠"), ("=>", "="), ("->", "="), ("-$", "-"), ("**", " "), ("__", " "))
MARKUP = str.maketrans(dict.fromkeys("$€£¥₹`#{}", " "))


def read_line(line, before_marker=False):
    """The one number of an answer line: an int or Fraction, AMBIGUOUS, or None where there is none.

    Markdown, LaTeX, currency signs, units and thousands commas are dropped, and a bracket after the
    number (`18 (was 20)`). Of an equation the last side that holds a number counts. A number, a
    fraction, a mixed number and a full hour are read; 50 % is 50; the same number twice is one
    number. A variable, an expression, a range, or two different numbers are ambiguous.
    With `before_marker` the line ends where a `####` follows, and the number right there is meant.
    """
    plain = len(line) < 60 and PLAIN.fullmatch(line)
    if plain:
        return exact(plain[1], plain[2])
    for side in reversed(clean_line(line).split("=")):
        if not DIGIT.search(side):
            continue
        if len(side) > LONGEST_ANSWER:
            return AMBIGUOUS
        number = read_side(side, before_marker)
        if number is not None:
            return number
    return None


def read_side(side, before_marker):
    side = LEADING_MINUS.sub("-", CLOCK.sub(r"\1", side))
    found = list(VALUE.finditer(side))
    if not found:
        return None
    if before_marker and not side[found[-1].end() :].strip(" .*"):
        before = side[: found[-1].start()]
        return AMBIGUOUS if JOINED.search(before) else exact(*found[-1].group("sign", "top", "bottom", "whole"))
    if EXPRESSION.search(VALUE.sub("#", side)):
        return AMBIGUOUS
    numbers = {exact(*value.group("sign", "top", "bottom", "whole")) for value in found}
    return numbers.pop() if len(numbers) == 1 else AMBIGUOUS


def clean_line(line):
    """The line without markup: what is left is words, numbers and operators, `=` for every arrow."""
    if "<" in line:
        line = ANNOTATIONS_AND_TAGS.sub(r" \1 ", line)
    if not line.isascii():
        line = line.translate(TYPOGRAPHY)
    if "\\" in line or "{" in line:
        line = LATEX_FRACTION.sub(r" \1\2/\3\4 ", LATEX_THOUSANDS.sub("", line))
        line = LATEX_COMMAND.sub(lambda command: LATEX_SYMBOLS.get(command[1], " "), line)
        line = line.replace("^ ", " ")
    for mark, meaning in MARKS:
        line = line.replace(mark, meaning)
    line = UNIT_EXPONENT.sub("", line.translate(MARKUP))
    first = DIGIT.search(line)
    for _ in range(3 if first and ("(" in line or "[" in line) else 0):  # a remark may hold a remark
        line = REMARK.sub(lambda remark: " " if remark.start() > first.start() else remark[0], line)
    return line


def exact(sign, top, bottom=None, whole=None):
    """The value as an int or Fraction; AMBIGUOUS for `1/0` and for `3 5/2`, which is no mixed number."""
    number = exact_decimal(top)
    if bottom:
        divisor = exact_decimal(bottom)
        if not divisor or (whole and number >= divisor):
            return AMBIGUOUS
        number = Fraction(number) / divisor + int(whole or 0)
    return -number if sign == "-" else number


def exact_decimal(digits):
    whole, _, part = digits.replace(",", "").partition(".")
    part = part.rstrip("0")
    return Fraction(int(whole + part), 10 ** len(part)) if part else int(whole or 0)


BARE_NUMBER = re.compile(rf"\s*([-+]?)({NUMBER})\.?(?:[eE]([-+]?[0-9]{{1,3}})|\s*/\s*({NUMBER}))?\s*")


def read_gold(ground_truth_answer: str) -> int | Fraction:
    """The exact number of a reference answer: after its last `####`, or all of it where it is a bare number.

    Exponents (`2.0107e-06`) are read too: data sets that store floats print them. Raises UserError for any other text.
    """
    _, marker, tail = ground_truth_answer.rpartition("####")
    bare = len(tail) <= LONGEST_ANSWER and BARE_NUMBER.fullmatch(tail)
    if bare:
        sign, top, exponent, bottom = bare.groups()
        number = exact(sign, top, bottom)
        if exponent:
            number *= Fraction(10) ** int(exponent)
    else:
        number = read_line(tail) if marker else None
    if number is None or number is AMBIGUOUS:
        raise UserError(
            f"ground_truth_answer is no number and does not end in '#### <number>': {ground_truth_answer[-40:]!a}"
        )
    return int(number) if number.denominator == 1 else number


def score_final(model_output, ground_truth_answer, thinking_open=False):
    """One of STATUSES for a completion. `thinking_open`: the prompt ended inside `<think>`."""
    reading = read_final(model_output, thinking_open or "<think>" in model_output)
    return grade(reading, read_gold(ground_truth_answer))


def grade(reading: Reading, gold: int | Fraction) -> str:
    """A Reading held against the exact reference number, as one of STATUSES."""
    if reading.status != "read":
        return reading.status
    return "right" if meets(reading.number, gold) else "wrong"


def meets(number: int | Fraction, gold: int | Fraction) -> bool:
    """Whether a number is the reference: an integer exactly, another within a relative 1e-4 or an absolute 1e-6.

    Data sets round such references, so a right answer often has other digits at its end.
    """
    if gold.denominator == 1:
        return number == gold
    return abs(number - gold) <= max(abs(gold) / 10**4, Fraction(1, 10**6))
