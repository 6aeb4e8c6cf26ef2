"""What the scripts share: errors, flags, modes and their prompts, JSON and atomic files.

Where the other subjects are:

    data.py         questions from folders, files and the hub
    model.py        a model's files: find, load, merge; device, dtype, memory
    generation.py   requests and completions; the scheduler, the engine and its KV cache
    sampling.py     the next token from logits: greedy or drawn
    graphs.py       decode steps captured as CUDA graphs; linear.py the faster of two products on a CPU;
                    threads.py their number, by what other programs leave free
    server.py       the client of a completions server
    runs.py         a run's files and record: locking, --overwrite, --resume
    reading.py      how an answer is read and graded
    answers.py      files of answers, line by line
    scores.py       scored files: intervals, votes, comparison, published figures
    report.py       tables, notes, the page; pictures.py the pictures
    trainer.py      the trainers: loss, order of the examples, evaluation, signals; checkpoints.py their checkpoints
    rollouts.py     the answers that train_grpo.py learns from
    reproduce.py    the experiments, one command for all; costs.py what they cost

This module imports neither torch nor transformers, so that `--help` and `benchmark.py` start at once.
"""

import argparse
import codecs
import contextlib
import ctypes
import datetime
import functools
import gc
import gzip
import hashlib
import json
import math
import os
import re
import secrets
import shlex
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend. Its text is one line: the file, line or flag, and the way out."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse that answers a wrong flag with one line on stderr and exit code 2, and knows --traceback."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_argument(TRACEBACK, action="store_true", help="show where an error came from, before its line")

    def error(self, message):
        raise UserError(message)

    def parse_args(self, argv=None):
        """The flags, and as `command` the whole command, for the run record."""
        argv = sys.argv[1:] if argv is None else argv
        for text in argv:
            if not is_text(text):
                raise UserError(f"argument {text!a}: is not UTF-8 text")
        args = super().parse_args(argv)
        del args.traceback  # `command_line` looks for it, so that an error in parsing is shown too
        args.command = shlex.join(["python", self.prog, *argv])
        return args


def at_least(least, most=2**31 - 1):
    """An argparse type: a whole number, `least` or more, and within what arrays and seeds take."""

    def integer(text):
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wants a whole number, got {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {text}")
        if number > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return number

    return integer


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where it arrives, so that it cleans up as Ctrl-C does; libraries let both through."""


TRACEBACK = "--traceback"
BURST_SECONDS = 1.0  # signals within this time of the first are one request to stop


def heed_stops(act):
    """Call `act(number)` on SIGINT and SIGTERM; returns a function that puts the caller's handlers back.

    Launchers and terminals send several within milliseconds. One that arrives within a second of the last one heeded
    is the same request, so that it does not break into the clean-up that the first began.
    """
    if threading.current_thread() is not threading.main_thread():  # no other can set handlers
        return lambda: None
    heeded = -math.inf

    def handle(number, _):
        nonlocal heeded
        if time.monotonic() - heeded >= BURST_SECONDS:
            heeded = time.monotonic()
            act(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    return restore


def stop(number):
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def collecting_later():
    """Import large packages in it: what they make stays, and looking for garbage among it takes a fifth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def command_line(main):
    """Decorate a script's `main(argv=None)`, so that it ends with an exit code and one line on stderr.

    A UserError, and whatever the operating system refuses: code 2. Any other error: code 1 and its kind.
    Ctrl-C: 130. SIGTERM: 143. A traceback is shown with --traceback, or where GSM8K_TRACEBACK is set.
    """

    @functools.wraps(main)
    def run(argv=None):
        open_streams()
        restore = heed_stops(stop)
        try:
            line, code = end(main, argv)
        except Terminated:
            line, code = "terminated", 143
        except KeyboardInterrupt:
            line, code = "interrupted", 130
        finally:
            if main.__module__ != "__main__":  # else the rest of a burst may arrive while Python shuts down
                restore()
        if line is None:
            return code
        print(printable(line), file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk there: Python would try once more at exit, with a traceback
            silence(sys.stdout)
        raise SystemExit(code)

    return run


def end(main, argv):
    """Run `main` to its end, or to an error: (the line to end with or None, the exit code)."""
    script = Path(sys.modules[main.__module__].__file__ or "").name
    try:
        check_launch()
        code = main(argv)
        sys.stdout.flush()
        return None, code
    except BrokenPipeError:  # whoever reads our output, `head` for one, has seen enough
        silence(sys.stdout)
        raise SystemExit(141) from None
    except (UserError, OSError) as error:
        show_traceback(argv)
        return f"{script}: error: {' '.join(str(error).split())}", 2
    except Exception as error:  # noqa: BLE001 - whatever nobody foresaw
        shown = show_traceback(argv)
        where = "" if shown else f"; {TRACEBACK} shows where it came from"
        return f"{script}: unexpected {type(error).__name__}: {first_line(error)}{where}", 1


def show_traceback(argv):
    """Print the traceback of the present error where it is asked for; returns whether it is."""
    flags = sys.argv[1:] if argv is None else argv
    asked = any(len(flag) > 3 and TRACEBACK.startswith(flag) for flag in flags)  # argparse takes flags cut short
    if asked or os.environ.get("GSM8K_TRACEBACK"):
        traceback.print_exc()
        return True
    return False


def open_streams():
    """Give print somewhere to write where the caller closed stdout or stderr, and let no character stop it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the lowest free number is the closed one: no other file gets it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process
        elif hasattr(stream, "reconfigure"):  # a console of one code page has not every character
            stream.reconfigure(errors="backslashreplace")


def silence(stream):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_launch():
    """UserError where the environment does not say which of how many processes this is."""
    numbers = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0}
    for name, default in numbers.items():
        text = os.environ.get(name, str(default))
        if not text.isdecimal() or (name.endswith("SIZE") and int(text) < 1):
            raise UserError(f"{name}={text}: the launcher sets a number of processes there; {START_MANY}")
        numbers[name] = int(text)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        told = f"is {numbers['WORLD_SIZE']}" if "WORLD_SIZE" in os.environ else "is not set"
        raise UserError(f"RANK={numbers['RANK']}, and WORLD_SIZE {told}; {START_MANY}")


START_MANY = "start several processes with accelerate launch, or unset it for one"


def log(line):
    """Print a note at once, in the main process; stderr is for errors and progress bars."""
    if is_main():
        print(line, flush=True)


def processes():
    """How many processes share the work; their launcher says it through the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank():
    """The number of this process among them."""
    return int(os.environ.get("RANK", "0"))


def is_main():
    """Whether this process is the one that prints and writes what all share."""
    return rank() == 0


def wait_for_all():
    """Return when every process has come here."""
    if processes() > 1:
        from torch import distributed

        try:
            if not distributed.is_initialized():
                distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # a run's, not a step's
            distributed.barrier()
        except ValueError as error:  # RANK or MASTER_ADDR is not there
            raise UserError(f"{first_line(error)}; {START_MANY}") from error
        except RuntimeError as error:
            raise UserError("another process has stopped, and says why") from error


def part_from_all():
    """Close the connection to the other processes: left open, it can abort the interpreter at its end."""
    if processes() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def printable(text):
    """Text for the terminal: whatever could steer it, or cannot be encoded, is escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def one_line(text):
    """Text for a cell of a table: printable, and a line break is escaped, for it would begin another line."""
    return printable(text).replace("\n", "\\n")


MARKDOWN = re.compile(r"[\\`*\[\]<>&!|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def plain_markdown(text):
    """Text on one line of Markdown that shows as it is: no HTML, link, image, code or emphasis comes of it."""
    return MARKDOWN.sub(r"\\\g<0>", one_line(text))


def code_block(text):
    """Text as a code block of Markdown, fenced by more backticks than the text holds in a row."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def is_text(text):
    """Whether a string can be written as UTF-8: half of a surrogate pair, legal in JSON, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Mode:
    """What a prompting mode is: how it asks, and the defaults of its flags."""

    instruction: str
    max_new_tokens: int = 512
    thinks: bool = False  # the answer begins with a thought
    raw: bool = False  # ChatML built here, in place of the model's chat template
    few_shot: bool = False  # shows worked examples
    sampled: bool = False  # samples by default, else decodes greedily
    # Sampling as Qwen3's model card, "Best Practices", advises it: these are for prompts without thinking.
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20


# The instruction of each mode is the system message and the question alone is the user message,
# so that all prompts of a run begin alike and generation can compute that beginning once.
ANSWER_LINE = "End with one last line, the final number alone, without units or symbols:\n#### <answer>"
COT_INSTRUCTION = "Solve the math problem step by step. " + ANSWER_LINE
THINKING = Mode("Solve the math problem. " + ANSWER_LINE, max_new_tokens=4096, thinks=True, temperature=0.6, top_p=0.95)
MODES = {
    "zero_shot": Mode("Answer the math problem with this one line and nothing else:\n#### <answer>"),
    "cot": Mode(COT_INSTRUCTION),
    "few_shot": Mode(COT_INSTRUCTION, few_shot=True),
    "thinking": replace(THINKING, sampled=True),
    "chatml_think_prefill": replace(THINKING, raw=True),
}
FEW_SHOT_STYLES = ("prompt", "turns", "completion")
COMPLETION_STOP = ("Question:",)  # where a base model has answered and goes on with a question of its own
CHATML_TURN = "<|im_start|>{role}\n{content}<|im_end|>\n"
CHATML_THINK_PREFILL = "<|im_start|>assistant\n<think>\n"
CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")


def strip_annotations(answer: str) -> str:
    """Drop GSM8K's `<<48/2=24>>` calculator annotations, which are markup and not English."""
    return CALCULATOR_ANNOTATION.sub("", answer)


def build_prompt(
    mode: str,
    question: str,
    tokenizer,
    examples: Sequence[tuple[str, str]] = (),
    few_shot_style: str = "prompt",
    system_prompt: str | None = None,
    now: datetime.datetime | None = None,
) -> str:
    """The prompt of one question as text, special tokens included: encode it with add_special_tokens=False.

    examples: worked (question, answer) pairs for few_shot. few_shot_style: one of FEW_SHOT_STYLES; `completion`
    is plain text for base models and serves zero_shot and cot too. system_prompt: replaces the mode's instruction,
    "" leaves it out. now: the time that a chat template with today's date prints; default the present.

    Qwen3 thinks unless told not to, so every mode but `thinking` passes `enable_thinking=False`
    (Qwen3 model card, "Switching Between Thinking and Non-Thinking Mode"). Raises UserError where the tokenizer
    cannot render the mode, and where the template leaves out a part of what is asked.
    """
    if MODES[mode].raw:
        if not has_token(tokenizer, "<|im_start|>"):
            raise UserError(
                f"--mode {mode}: the tokenizer of {tokenizer.name_or_path} has no <|im_start|>, so it would read ChatML "
                "as plain characters; pass --mode cot, or --few-shot-style completion for a base model"
            )
        return chatml_think_prefill(question, system_prompt)
    if few_shot_style == "completion":
        bos = tokenizer.bos_token if tokenizer.bos_token != "<|im_start|>" else None  # which opens a turn of ChatML
        return completion_prompt(mode, question, bos or "", examples, system_prompt)
    messages = build_messages(mode, question, examples, few_shot_style, system_prompt)
    if messages[0]["role"] == "system" and not has_system_turn(tokenizer):
        instruction, first, *others = messages
        messages = [first | {"content": f"{instruction['content']}\n\n{first['content']}"}, *others]
    prompt = render_chat(tokenizer, messages, MODES[mode].thinks, now)
    for message in messages:
        if message["content"].strip() not in prompt:
            raise UserError(
                f"{tokenizer.name_or_path}: the chat template leaves out or changes the text of the {message['role']} "
                f"message ({message['content'][:40]!a}...); repair the template, or pass another --mode"
            )
    return prompt


def chatml_think_prefill(question: str, system_prompt: str | None = None) -> str:
    """Raw ChatML that ends inside an open thought: what training conditions on, byte for byte.

    Qwen3's own template would add an empty think block or none, so the string is built by hand.
    An empty `system_prompt` leaves the system turn out; None stands for the mode's instruction.
    """
    system = MODES["chatml_think_prefill"].instruction if system_prompt is None else system_prompt
    turns = [("system", system)] if system else []
    turns.append(("user", question))
    return "".join(CHATML_TURN.format(role=role, content=text) for role, text in turns) + CHATML_THINK_PREFILL


def completion_prompt(mode, question, bos, examples, system_prompt):
    """Plain text that a base model goes on with. Worked examples show the form, so no instruction goes before them."""
    default = "" if examples else MODES[mode].instruction
    instruction = default if system_prompt is None else system_prompt
    return bos + (f"{instruction}\n\n" if instruction else "") + questions_and_answers(question, examples)


def questions_and_answers(question, examples):
    """Worked examples and the question in one text that ends where the answer begins."""
    worked = "".join(f"Question: {asked}\nAnswer: {worked_answer(answer)}\n\n" for asked, answer in examples)
    return f"{worked}Question: {question}\nAnswer:"


def worked_answer(answer):
    """An answer as examples show it: in the asked form, and without `<<...>>`, for the model has no calculator."""
    return strip_annotations(answer) if "####" in answer else f"#### {whole_number(answer)}"


def whole_number(number: str) -> str:
    """A bare number as an answer should end: 17 where a data set of floats has 17.0."""
    return re.sub(r"(?<=\d)\.0+$", "", number.strip())


def build_messages(
    mode: str,
    question: str,
    examples: Sequence[tuple[str, str]] = (),
    few_shot_style: str = "prompt",
    system_prompt: str | None = None,
) -> list[dict[str, str]]:
    """The chat messages of one question; `examples` are (question, answer) pairs for few_shot."""
    system = MODES[mode].instruction if system_prompt is None else system_prompt
    messages = [{"role": "system", "content": system}] if system else []
    if MODES[mode].few_shot and few_shot_style == "turns":
        for asked, answer in examples:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": worked_answer(answer)})
    elif MODES[mode].few_shot:
        question = questions_and_answers(question, examples)
    return messages + [{"role": "user", "content": question}]


def render_chat(tokenizer, messages, enable_thinking, now=None):
    """Apply the tokenizer's chat template; raises UserError where it has none or refuses."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; pass an instruction-tuned model, or for a "
            "base model --mode few_shot --few-shot-style completion"
        )
    template = choose_template(tokenizer)
    if now:
        template = STRFTIME_NOW.sub(lambda call: json.dumps(now.strftime(call[2])), template)
    try:
        with time_limit(TEMPLATE_SECONDS):
            return tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=enable_thinking,
            )
    except TakesTooLong:
        told = f"the chat template takes more than {TEMPLATE_SECONDS} seconds for one prompt; mend or replace its loops"
        raise UserError(f"{tokenizer.name_or_path}: {told}") from None
    except Exception as error:  # jinja2 errors, and whatever a template's raise_exception says
        raise UserError(f"{tokenizer.name_or_path}: the chat template failed: {error}") from error


TEMPLATE_SECONDS = 10


class TakesTooLong(Exception):
    """Raised in a thread whose time limit has passed."""


@contextlib.contextmanager
def time_limit(seconds: float):
    """Raise TakesTooLong in this thread after so many seconds, between two steps of Python code; on every system.

    It is raised again every so many seconds until the block is left. Python ignores an exception that arrives in a
    destructor or in a callback of the garbage collector.
    """
    thread, lock, ended = ctypes.c_ulong(threading.get_ident()), threading.Lock(), threading.Event()
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def watch():
        while not ended.wait(seconds):
            with lock:
                if not ended.is_set():
                    raise_in(thread, ctypes.py_object(TakesTooLong))

    def end():
        with lock:
            ended.set()
            raise_in(thread, None)  # takes back what was not raised yet

    threading.Thread(target=watch, name="time limit", daemon=True).start()
    try:
        yield
    finally:
        try:
            end()
        except TakesTooLong:  # it arrived just now, and the next one is far away
            end()


STRFTIME_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def choose_template(tokenizer):
    """The text of the chat template; of several the default one."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has {len(templates)} chat templates ({', '.join(sorted(templates))}) "
            "and none is the default; save the one to use as chat_template.jinja in the model's folder"
        )
    return tokenizer.get_chat_template()


def has_system_turn(tokenizer) -> bool:
    """Whether the chat template shows a system message; some drop it, some refuse it."""
    instruction, question = "Answer in one word.", {"role": "user", "content": "?"}
    try:
        return instruction in render_chat(tokenizer, [{"role": "system", "content": instruction}, question], False)
    except UserError:
        render_chat(tokenizer, [question], False)  # raises where something else is wrong with the template
        return False


def has_thinking_switch(tokenizer) -> bool:
    """Whether `enable_thinking` changes what the chat template renders."""
    messages = [{"role": "user", "content": "?"}]
    return render_chat(tokenizer, messages, True) != render_chat(tokenizer, messages, False)


def has_date(tokenizer) -> bool:
    """Whether the chat template prints today's date or the time."""
    return "strftime_now" in choose_template(tokenizer)


def has_token(tokenizer, text: str) -> bool:
    """Whether a text is one token of the vocabulary."""
    return tokenizer.convert_tokens_to_ids(text) not in (None, tokenizer.unk_token_id)


def uses_template(mode: str, few_shot_style: str) -> bool:
    """Whether the prompts of a mode are rendered by the model's chat template."""
    return not MODES[mode].raw and few_shot_style != "completion"


def thinking_is_open(prompt: str) -> bool:
    """Whether the prompt ends inside a thought, so that the completion begins in one."""
    return prompt.rstrip().endswith("<think>")


# What closes a thought that has used up its budget (Qwen3 Technical Report, 2025, section 4.3).
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: greedy unless `do_sample`. `top_k` 0 and `top_p` 1 filter nothing."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"--temperature {self.temperature}: must be above 0 and finite; for greedy pass --no-do-sample"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1 (1 filters nothing)")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must be 0 (filters nothing) or more")


PUBLISHED_KEYS = ("id", "question", "model_output", "ground_truth_answer")


def looks_like_path(name: str) -> bool:
    """Whether a name that is not there must be a path, for no hub id looks so: `./x`, `/x`, `~/x`, `C:\\x`, `x\\y`."""
    return name.startswith((".", "/", "~")) or "\\" in name or re.match("[A-Za-z]:", name) is not None


def first_line(error):
    """The first line of an exception's text, with the next where it ends in a colon, for messages of one line."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


def read_jsonl(
    path: Path | str, required: Sequence[str] = (), bad: list[int] | None = None
) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object) for every line that is not blank; a name that ends in .gz is decompressed.

    A line that is not UTF-8, not JSON, not an object or lacks a required key is a UserError that
    names the file, the line and the key; given a list `bad`, its number goes there instead.
    """
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    refuse_utf16(path, line)
                if not line.strip():
                    continue
                try:
                    record = parse_json_line(path, number, line, required)
                except UserError:
                    if bad is None:
                        raise
                    bad.append(number)
                    continue
                yield number, record
    except (OSError, EOFError, zlib.error) as error:  # the latter two: a damaged .gz
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from error


def refuse_utf16(path: Path | str, content: bytes) -> None:
    """UserError where a file begins as UTF-16 does, which Windows tools write."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\0", b"\0{", b"[\0", b"\0[")):
        raise UserError(f"{path}: is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 {path} > NEW_FILE)")


def parse_json_line(path, number, line, required=()):
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON and bad UTF-8 alike
        raise UserError(f"{path}:{number}: not a line of JSON: {first_line(error)}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}:{number}: a line must be a JSON object, this is {type(record).__name__}")
    for key in required:
        if key not in record:
            raise UserError(f"{path}:{number}: lacks the key {key!r}; it has {', '.join(map(repr, record)) or 'none'}")
    return record


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes `path`'s place in one step: a reader sees the old one or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def follow_umask(path):
    """Give a file the permissions that the user's umask asks for; safetensors writes for the owner alone."""
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def write_atomically(path, text):
    with replacing(path) as file:
        file.write(text.encode())


def read_json(path):
    """The JSON object in a file; a UserError names the file."""
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


def is_run_record(value):
    """Whether an object from a file has the shape of a run record."""
    segments = value.get("segments")
    shaped = isinstance(segments, list) and segments and all(isinstance(segment, dict) for segment in segments)
    return bool(shaped) and isinstance(value.get("decides"), dict)


def hash_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def gathered(value):
    """The values of all processes, in every process."""
    if processes() == 1:
        return [value]
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    try:
        PartialState(
            cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(seconds=1800)
        )  # transformers' ddp_timeout
        return gather_object([value])
    except RuntimeError as error:
        raise UserError("another process has stopped, and says why") from error
