"""How an answer is read from a completion, and held against the reference: three readings.

`read_published` is the rule behind the published figures. `read_final` takes the final answer as a careful reader
would. `read_lenient` also takes it from other forms than the asked one. Here is text alone: nothing is loaded and
nothing is written.
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
    "ambiguous". `start` and `end` bound the characters that it was read from; what stands before `begin` is thought.
    `ran_on`: after the answer the text goes on with a problem or a turn of its own, which is left out.
    """

    status: str
    number: int | Fraction | None = None
    start: int = 0
    end: int = 0
    begin: int = 0
    ran_on: bool = False


def read_final(text: str, thinking: bool) -> Reading:
    """The final answer of a completion, as a careful reader takes it; `thinking`: a thought was opened.

    Only text after the last thought counts; a thought that never closed is unfinished. There the answer stands after
    the last `####` whose line, or the next line, holds it (a heading such as `#### Step 1` holds none); else before
    a `####` that ends its line and the text (`98####`). A `\\boxed{}` counts where it stands after all of these.
    Where a problem or turn of the model's own follows the answer, the text ends there.
    `read_line` says how the line itself is read. Never raises, and takes time in proportion to the text.
    """
    return read_first(text, thinking, read_asked)


def read_lenient(text: str, thinking: bool, cut: bool = False, final: Reading | None = None) -> Reading:
    """The answer that a reader accepts who does not insist on `####`; never in place of `read_final`.

    What `read_final` reads counts first. Then, in this order: the last box; `Final answer: 18`; `The answer is 18.`;
    a line `ANSWER: 18`; `<answer>18</answer>`; the last number where it is bold; a last line that is a number; a whole
    last sentence that concludes (`So she has 18 eggs.`) or computes (`She makes 9 * 2 = 18 dollars.`), for small
    models mostly end so where they miss the form.
    `cut`: the text ran into the token limit. Then it is unfinished, unless only a problem of its own was cut.
    `final`: what `read_final` reads, where that is known already.
    """
    final = final or read_final(text, thinking)
    reading = final if final.status in ("read", "unfinished") else read_first(text, thinking, read_any)
    return Reading("unfinished", begin=reading.begin) if cut and not reading.ran_on else reading


def read_first(text: str, thinking: bool, read) -> Reading:
    """What `read(text, begin, stop)` finds in the first stretch of text that holds an answer, up to the next problem."""
    spans, open_thought = outside_thoughts(text, thinking)
    for begin, end in spans:
        start = begin
        for boundary in [*(found.start() for found in NEXT_PROBLEM.finditer(text, begin, end)), end]:
            last = boundary == end
            reading = read(text, start, boundary)
            if not last and reading.status in ("read", "ambiguous"):
                goes_on = WORD.search(TEMPLATE_TOKEN.sub("", text[boundary:])) is not None
                return reading._replace(begin=begin, ran_on=goes_on)
            start = boundary
    if open_thought:
        return Reading("unfinished", begin=len(text))
    return reading._replace(begin=begin)


def opens_thought(text: str) -> bool:
    """Whether a thought is opened in the text: at the start of it or of a line, or as a token inside a line.

    In the middle of a sentence, after a space, `<think>` is only spoken of.
    """
    return "<think>" in text and THOUGHT_OPENS.search(text) is not None


def outside_thoughts(text: str, thinking: bool) -> tuple[list[tuple[int, int]], bool]:
    """Spans of the text outside thoughts, and whether the last thought never closed.

    What stands before a `</think>` is thought, also where no thought was seen to open.
    """
    opened = THOUGHT_OPENS.search(text) if thinking and "<think>" in text else None
    close = text.find("</think>")
    spans, at, inside = [], 0, thinking and (not opened or 0 <= close < opened.start())
    while True:
        if inside:
            close = text.find("</think>", at)
            if close < 0:
                return spans, True
            at = close + len("</think>")
            opened = THOUGHT_OPENS.search(text, at)
        end = opened.start() if opened else len(text)
        for closed in THOUGHT_CLOSES.finditer(text, at, end):
            spans, at = [], closed.end()
        spans.append((at, end))
        if not opened:
            return spans, False
        at, inside = opened.end(), True


def read_asked(text: str, begin: int, stop: int) -> Reading:
    """The answer in text[begin:stop] in one of the forms that are asked for: `####` or a box."""
    reading, end = read_marked(text, begin, stop)
    box = last_box(text, end, stop)
    if not box:
        return reading
    return (box[0] < box[1] and read_span(text, *box)) or Reading("no_answer")


def read_any(text: str, begin: int, stop: int) -> Reading:
    """The answer in text[begin:stop] in a form that is asked for, else in one that a reader accepts."""
    asked = read_asked(text, begin, stop)
    if asked.status == "read":
        return asked
    found = [asked] if asked.status == "ambiguous" else []
    for start, end in accepted_spans(text, begin, stop):
        reading = read_span(text, start, end)
        if reading and reading.status == "read":
            return reading
        found += [reading] if reading else []
    return found[0] if found else asked


def accepted_spans(text: str, begin: int, stop: int):
    """Spans that may hold the answer by the forms of `read_lenient`, in their order."""
    box = last_box(text, begin, stop)
    if box and box[0] < box[1]:
        yield box
    for form in (FINAL_ANSWER, THE_ANSWER):
        limit = stop
        for found in reversed(list(form.finditer(text, begin, stop))):
            end = SENTENCE_END.search(text, found.end(), limit)
            end = end.start() if end else limit
            limit = found.start()
            if DIGIT.search(text, found.end(), end):
                yield found.end(), end
                break
    for form in (ANSWER_LABEL, ANSWER_TAG, BOLD):
        *_, last = [None, *form.finditer(text, begin, stop)]
        last_words = form is ANSWER_TAG or (last and not DIGIT.search(text, last.end(), stop))
        if last and last_words and not HEADING.match(text, *last.span(1)):
            yield last.span(1)
    words = text[begin:stop].rstrip(NO_WORDS)
    start = begin + words.rfind("\n") + 1
    start = BULLET.match(text, start, begin + len(words)).end()
    if BARE_LINE.fullmatch(text, start, begin + len(words)):
        yield start, begin + len(words)
    sentence = last_sentence(text, begin, stop)
    if sentence and (CONCLUDES.match(text, *sentence) or text.find("=", *sentence) >= 0):
        yield sentence


def last_sentence(text: str, begin: int, stop: int) -> tuple[int, int] | None:
    """The span of the last sentence of text[begin:stop]; None where it is not whole, or long."""
    near = max(begin, stop - LONGEST_SENTENCE)
    end = near + len(text[near:stop].rstrip(" \t\r\n*_$"))
    if text[near:end][-1:] not in (".", "!"):
        return None
    *_, before = [None, *SENTENCE_END.finditer(text, near, end - 1)]
    if before:
        return before.end(), end
    return (begin, end) if near == begin else None


def read_marked(text: str, begin: int, stop: int) -> tuple[Reading, int]:
    """The answer by the last `####` that holds one, and where what stands after it begins."""
    markers = (
        [found.span() for found in MARKER.finditer(text, begin, stop)] if text.find("####", begin, stop) >= 0 else []
    )
    end = trailing = stop
    for marker, after in reversed(markers):
        for start, line_end in answer_lines(text, after, end):
            reading = read_span(text, start, line_end)
            if reading:
                return reading, line_end
        if trailing == end and not WORD.search(TEMPLATE_TOKEN.sub("", text[after:end])):
            trailing = marker
        end = marker

    if trailing < stop:
        line = max(begin, text.rfind("\n", begin, trailing) + 1)
        reading = read_span(text, BULLET.match(text, line, trailing).end(), trailing, before_marker=True)
        if reading:
            return reading, trailing
    return Reading("no_answer"), begin


def answer_lines(text: str, after: int, stop: int):
    """Spans of the lines that may hold the answer of a `####`: its own, and the next one with words.

    A heading has none. Under a title that does not name the answer the next line counts only as a bare number.
    """
    if not DIGIT.search(text, after, stop):
        return
    newline = text.find("\n", after, stop)
    own_end = stop if newline < 0 else newline
    if HEADING.match(text, after, own_end):
        return
    yield after, own_end
    word = WORD.search(text, own_end, stop)
    if word:
        end = text.find("\n", word.start(), stop)
        end = stop if end < 0 else end
        start = max(own_end, text.rfind("\n", own_end, word.start()) + 1)
        start = BULLET.match(text, start, word.start()).end()
        titled = WORD.search(text, after, own_end) and not NAMES_ANSWER.search(text, after, own_end)
        if not HEADING.match(text, start, end) and (not titled or PLAIN.fullmatch(text, start, end)):
            yield start, end


def read_span(text, start, end, before_marker=False):
    """The Reading of text[start:end], or None where no number stands there."""
    number = read_line(text[start:end], before_marker)
    if number is None:
        return None
    return Reading("ambiguous" if number is AMBIGUOUS else "read", None if number is AMBIGUOUS else number, start, end)


def last_box(text: str, begin: int, stop: int) -> tuple[int, int] | None:
    """The span inside the last box of text[begin:stop], with a sign before it; an empty one where it is cut."""
    boxes = [found.span() for found in BOX.finditer(text, begin, stop)] if text.find("box", begin, stop) >= 0 else []
    if not boxes:
        return None
    start, end = boxes[-1]
    close = closing_brace(text, end, stop)
    if close is None:
        return stop, stop
    sign = NEGATED.search(text[max(begin, start - 3) : start])
    return start - len(sign[0]) if sign else end, close


def closing_brace(text: str, begin: int, stop: int) -> int | None:
    """Where the brace that was opened before `begin` is closed; None where it is not."""
    depth = 1
    for brace in BRACE.finditer(text, begin, stop):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return brace.start()
    return None


AMBIGUOUS = object()
LONGEST_ANSWER = 1_000  # characters; what is longer is a loop or a listing, not one number
MARKER = re.compile(r"#{4,}")
DIGIT = re.compile("[0-9０-９¼-¾⅐-⅞]")
WORD = re.compile(r"[^\W_]")
BULLET = re.compile(r"[ \t]*(?:>[ \t]*)*(?:[-*•][ \t]+)?")
BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
NEGATED = re.compile(r"(?<![\w.)%\]])[-−–—]\$?\Z")
THOUGHT_OPENS = re.compile(r"(?:^[ \t>]{0,99}|(?<=[^\s`'\"(\[{<*]))<think>", re.MULTILINE)
THOUGHT_CLOSES = re.compile(r"(?<![`'\"(])(?:(?<!\S )</think>|</think>(?! [a-z]))")  # not: The </think> tag
TEMPLATE_TOKEN = re.compile(
    r"<[|｜][^<>|｜\n]{1,40}[|｜]>|</s>|<(?:bos|eos|start_of_turn|end_of_turn)>|\[/?INST\]"  # <|im_end|> and its kind
)
NEXT_PROBLEM = re.compile(
    rf"""^[ \t>*_\#]{{0,20}}(?:
             (?:(?:next|new|another)[ ])?(?:question|problem|exercise|example|问题|题目)
                 [ \t]*\#?[0-9]{{0,4}}[ \t]*[*_]{{0,3}}(?:[:：]|[ \t]*$|(?<=[0-9])[.)])
           | q[ \t]?[0-9]{{0,4}}[ \t]*[*_]{{0,3}}[:：)]
           | (?:user|human|student|instruction|system|assistant)[ \t]*[*_]{{0,3}}(?:[:：]|[ \t]*$)
           | (?<=\#)[ \t]*(?:input|response|output)[ \t]*:
         )
      | {TEMPLATE_TOKEN.pattern}
    """,
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
# What a `####` line begins with where it is a heading of the working and not the answer.
HEADING = re.compile(
    r"""[ \t*_]*(?:
            (?:step|part|phase|stage|method|option|approach|case|example|exercise|question|problem)
                [ \t]*\(?(?:[0-9]+|[A-Z]|[ivx]+)\b
          | (?:day|week|month|year|person|group|scenario)[ \t]*[0-9]+[ \t*_]*:
          | (?:note|verif\w+|confirm\w*|expla(?:in|nation)\w*|calculat(?:e|ions?|ing)|comput(?:e|ations?|ing)|reason\w*
               |breakdown|remark|understand\w*|analys\w+|assum\w+|solv(?:e|ing)|summary[ ]of|let(?:'s|[ ]us)?|identify
               |determine|find|define|checking|set[ ]up)\b
          | (?:check|given|work(?:ings?)?|details?|hint|tip|proof|method|approach|example|question|problem|information)
                [ \t*_]*(?:[:：][ \t*_]*(?![ \t*_$0-9])|\n|\Z)            # Check: is it so; not Tip: $5
          | [1-9][.)][ \t]+[ \t*_]*(?-i:[A-Z])(?![^\n]*\.[ \t*_]*(?:\n|\Z))   # 1. Find the cost; no sentence
        )""",
    re.VERBOSE | re.IGNORECASE,
)
IS = r"[\s*_]*(?:is|was|are|be|comes[ ]to|equals|[:：=])(?![A-Za-z]|\s+not\b)(?:[\s*_:$]|\\[\[(])*"
FINAL_ANSWER = re.compile(rf"\bfinal\s+answer(?:{IS}|[\s*_]*(?=[-$£€0-9])|[ \t*_]*\n\s*)", re.IGNORECASE)
THE_ANSWER = re.compile(rf"(?<!\bif )\bthe\s+(?:correct\s+)?answer{IS}", re.IGNORECASE)
ANSWER_LABEL = re.compile(
    r"^[\s*_#>]{0,20}(?:ans|answer)[ \t*_]*(?:[:：=]|\n)[\s*_]*([^\n]{1,80})$", re.IGNORECASE | re.MULTILINE
)
ANSWER_TAG = re.compile(r"<answer>([^<]{0,300})</answer>", re.IGNORECASE)
BOLD = re.compile(r"(?:\*\*|__)([^*_\n]{1,200})(?:\*\*|__)")
SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)|\n|\*\*(?=\s|\Z)")
LONGEST_SENTENCE = 500  # characters
CONCLUDES = re.compile(
    r"[\s*_>-]*(?:so|thus|therefore|hence|in total|in all|altogether|together|overall|in conclusion|this means|as a result)\b",
    re.IGNORECASE,
)
NO_WORDS = " \t\r\n.$*_`\\])>"
BARE_LINE = re.compile(r"[\s$£€¥*_`\\()\[\]{},.%/0-9½¼¾−-]{1,60}")
NAMES_ANSWER = re.compile(r"\b(?:ans|answer|result|final|conclusion|total|therefore|thus|hence|so)\b", re.IGNORECASE)
NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+"
PLAIN = re.compile(rf"[ \t\r$*]*(-?)({NUMBER})[ \t\r$*.]*")


# A number, a fraction or a mixed number. No part of a word (`m2`), nor of what stands before (`1.2.3`).
VALUE = re.compile(
    rf"(?<![A-Za-z_0-9])(?<![0-9][.,])(?P<sign>(?<![\w.)%\]])[-+])?"
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/))?(?P<top>{NUMBER})(?:\s*/\s*(?P<bottom>{NUMBER}))?"
)


# With every value replaced by `#` or `-#`: what makes one or more of them something else than the answer.
EXPRESSION = re.compile(
    r"""\#\)?\s*[-+*×÷·^:/]+[-(\s]*\#          # 4 + 6, 4-6, 2:30, 1/2/3
      | [A-Za-z)]\s*[+×÷·^/]\s*\#               # x / 2, 3 apples + 4
      | [A-Za-z)](?:\*|\s\*\s)\#               # x*2
      | (?<![^\W\d_])[^\W\d_](?:_?[0-9])?\s*-[-(\s]*\#        # x - 8, x_1 - 8
      | \bminus\b                              # eggs minus 8
      | \#\s*[+×÷·^]\s*[A-Za-z(]                # 4 + x
      | \#\)?\s*-[(\s]*(?:[b-zB-HJ-Z](?![A-Za-z'])|[aI](?![\w']|\s+[A-Za-z]))   # 20 - x; not 20 - a dozen
      | \#\)?\s*/[(\s]*(?![hsdmwLlgy])[A-Za-z](?![A-Za-z'])  # 116/x; 5/h is a rate
      | \#(?:\*|\s\*\s)\(*(?![aI]\s)[A-Za-z](?![A-Za-z'])    # 4*t
      | \#\)?[ *]*[xyznπ](?![A-Za-z'])         # 4x, 4 x
      | \#(?![mglshdcptwLCFVW])[A-Za-z](?![A-Za-z])  # 4b; 4m and 4h are units, 4k may be 4,000
      | \#\)?[\s*(-]*(?:(?i:hundred|thousand|[mbtr]+illion|dozen|lakh|crore|mil|mn|bn)s?|[kKMBT])(?![A-Za-z'])
      | \#\(                                   # 4(3)
      | \#[.,:_]\s?[0-9]                       # 1.2.3, 1,5, 1_000
      | [<>≤≥≠±√]                              # a range, a root or another function
    """,
    re.VERBOSE,
)
MAGNITUDE = re.compile(r"hundreds?\b|thousands?\b|illions?\b|dozens?\b", re.IGNORECASE)
NEXT_EQUATION = re.compile(r"(?:[,;]|\bor\b|\band\b)\s*(?:or\s+|and\s+)?[A-Za-z]\s*\Z")  # 8 or x (= -8)
JOINED = re.compile(r"(?:[-+*×÷·^/]|[0-9]\s*:|\b(?:and|or|to))\s*\Z")
ANNOTATIONS_AND_TAGS = re.compile(r"<<[^<>]*>>|</?([^<>]*)>")
REMARK = re.compile(r"(?<=[\w%.])(?:\s+[(\[]|[(\[](?=[A-Za-z]{2}))[^()\[\]]*(?:[)\]]|$)")
CLOCK = re.compile(r"(?<![0-9:.,])([0-9]{1,2}):00(?![0-9:])")
LEADING_MINUS = re.compile(r"(?:^|(?<=[:(]))\s*-\s+(?=[(0-9.])")
MINUS_WORD = re.compile(r"(?<![-\w])negative\s+(?=[(0-9.])|(?:^|(?<=[:(]))\s*minus\s+(?=[(0-9.])", re.IGNORECASE)
MINUS_AFTER = re.compile(r"(\b(?:is|be|was|of|to|equals|answer)\s+)minus\s+(?=[(0-9.])", re.IGNORECASE)
MINUS_BRACKET = re.compile(rf"(?<![\w.)%\]])-\s*\(\s*({NUMBER})\s*\)")
MINUS_MARKUP = re.compile(r"(?<![\w.)%\]])-[*_$€£¥₹`{]+(?=[0-9.])")
VARIABLE_BEFORE = re.compile(r"(?<![^\W\d_])[^\W\d_]\s*\Z")
UNIT_EXPONENT = re.compile(r"(?<=[A-Za-z])\s*\^\s*[-+]?[0-9]+")
LATEX_FRACTION = re.compile(r"\\(?:[cdts]|nice)?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
LATEX_FONT = re.compile(r"\\(?:text|math|operator)[a-z]*\s*\{([^{}]*)\}")
LATEX_THOUSANDS = re.compile(r"(?<=[0-9]),?(?:\\[,;:! ]|\{,\})(?=[0-9]{3}(?![0-9]))")
LATEX_COMMAND = re.compile(r"\\([A-Za-z]+|.?)")
LATEX_SYMBOLS = {
    **dict.fromkeys(("times", "cdot", "bullet", "ast", "star", "*"), "×"),
    **dict.fromkeys(("approx", "to", "rightarrow", "Rightarrow", "implies", "equiv"), "="),
    **dict.fromkeys(("lt", "le", "leq", "gt", "ge", "geq"), "<"),
    **dict.fromkeys(("ne", "neq"), "≠"),
    **dict.fromkeys(("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega", "sigma", "rho"), "x"),
    **dict.fromkeys(("log", "ln", "exp", "sin", "cos", "tan", "mod", "bmod", "pmod", "lfloor", "lceil", "sqrt"), "√"),
    **dict.fromkeys(("over", "/"), "/"),
    **dict.fromkeys(("pm", "mp"), "±"),
    **{character: character for character in "%$-+"},
    "div": "÷",
    "pi": "π",
}
TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("−‐‑‒–—―﹣－", "-"),
        **dict.fromkeys("≈→⇒＝", "="),
        **dict.fromkeys("\u2009\u202f\u00a0", "\\,"),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        **{fraction: f" {normalize('NFKC', fraction).replace('⁄', '/')}" for fraction in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"},
        **{power: f"^{normalize('NFKC', power)}" for power in "²³"},
        **dict(zip("，．％⋅∙∕⁄（）：∗✕✖", ",.%··//():×××", strict=True)),
    }
)
MARKS = ((">=", "≥"), ("<=", "≤"), ("!=", "≠"), ("=>", "="), ("->", "="), ("**", " "), ("__", " "))
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
    sides = clean_line(line).split("=")
    if any(DIGIT.search(side) and NEXT_EQUATION.search(side) for side in sides[:-1]):
        return AMBIGUOUS
    for side in reversed(sides):
        if not DIGIT.search(side):
            continue
        if len(side) > LONGEST_ANSWER:
            return AMBIGUOUS
        number = read_side(side, before_marker)
        if number is not None:
            return number
    return None


def read_side(side, before_marker):
    side = MINUS_AFTER.sub(r"\1-", MINUS_WORD.sub(" -", side))
    side = MINUS_BRACKET.sub(r"-\1", LEADING_MINUS.sub("-", CLOCK.sub(r"\1", side)))
    found = list(VALUE.finditer(side))
    if not found:
        return None
    if before_marker and not side[found[-1].end() :].strip(" .*"):
        before, sign = side[: found[-1].start()], found[-1]["sign"]
        joined = JOINED.search(before) or (sign == "-" and VARIABLE_BEFORE.search(before))
        return AMBIGUOUS if joined else exact(*found[-1].group("sign", "top", "bottom", "whole"))
    if EXPRESSION.search(VALUE.sub(lambda value: "-#" if value["sign"] == "-" else "#", side)):
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
        for _ in range(3 if "frac" in line else 0):  # a fraction's parts may stand in fonts, and those in fonts
            line = LATEX_FONT.sub(r" \1 ", line)
        line = LATEX_FRACTION.sub(r" \1\2/\3\4 ", LATEX_THOUSANDS.sub("", line))
        line = LATEX_COMMAND.sub(lambda command: LATEX_SYMBOLS.get(command[1], " "), line)
        line = line.replace("^ ", " ")
    line = MINUS_MARKUP.sub("-", line)
    for mark, meaning in MARKS:
        line = line.replace(mark, meaning)
    line = UNIT_EXPONENT.sub("", line.translate(MARKUP))
    first = DIGIT.search(line)
    for _ in range(3 if first and ("(" in line or "[" in line) else 0):  # a remark may hold a remark
        line = REMARK.sub(lambda remark: " " if is_aside(remark, first.start()) else remark[0], line)
    return line


def is_aside(remark: re.Match, first_digit: int) -> bool:
    """Whether a bracket only comments on a number before it; `2 (million)` is another number."""
    return remark.start() > first_digit and not (MAGNITUDE.search(remark[0]) and not DIGIT.search(remark[0]))


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
            f"the reference answer is no number and does not end in '#### <number>': {ground_truth_answer[-40:]!a}"
        )
    return int(number) if number.denominator == 1 else number


def score_final(model_output, ground_truth_answer, thinking_open=False):
    """One of STATUSES for a completion. `thinking_open`: the prompt ended inside `<think>`."""
    reading = read_final(model_output, thinking_open or opens_thought(model_output))
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
