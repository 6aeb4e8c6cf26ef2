"""What the scripts share: prompts, data, model loading, generation, scoring, file formats.

Each fact lives here once. One prompt builder serves inference and training; one scorer serves
`benchmark.py` and the evaluation inside training; one generation loop serves them all.

The page reads in the order a run happens: errors and flags, prompts, data, model, choosing
tokens, generation, scoring, files. torch and transformers are imported inside the functions that use them, so that
`--help` and `benchmark.py` start at once.
"""

import argparse
import contextlib
import datetime
import fcntl
import functools
import glob
import gzip
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
import zlib
from array import array
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

# ------------------------------------------------------------------------------------------
# Errors and flags
# ------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend. Its text is one line: the file, line or flag, and the way out."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse that answers a wrong flag with one line on stderr and exit code 2."""

    def error(self, message):
        raise UserError(message)

    def parse_args(self, argv=None):
        """The flags, and as `command` the whole command, for the run record."""
        argv = sys.argv[1:] if argv is None else argv
        for text in argv:
            if not is_text(text):
                raise UserError(f"argument {text!a}: is not UTF-8 text")
        args = super().parse_args(argv)
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


class Terminated(BaseException):
    """SIGTERM, raised where it arrives, so that it cleans up as Ctrl-C does."""


def command_line(main):
    """Decorate a script's `main(argv=None)`.

    A UserError, and whatever the operating system refuses, becomes one line on stderr and exit
    code 2; Ctrl-C exits with 130, SIGTERM with 143.
    """

    def terminate(*_):
        raise Terminated

    @functools.wraps(main)
    def run(argv=None):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # whoever reads our output, `head` for one, has seen enough
            silence(sys.stdout)
            raise SystemExit(141) from None
        except (UserError, OSError) as error:
            script = Path(sys.modules[main.__module__].__file__ or "").name
            line, code = f"{script}: error: {' '.join(str(error).split())}", 2
        except KeyboardInterrupt:
            line, code = "interrupted", 130
        except Terminated:
            line, code = "terminated", 143
        print(printable(line), file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk there: Python would try once more at exit, with a traceback
            silence(sys.stdout)
        raise SystemExit(code)

    return run


def silence(stream):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
                distributed.init_process_group("gloo")
            distributed.barrier()
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


def is_text(text):
    """Whether a string can be written as UTF-8: half of a surrogate pair, legal in JSON, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


# What closes a thought that has used up its budget (Qwen3 Technical Report, 2025, section 4.3).
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)


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


# ------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# What decides a model's output; only these are downloaded and hashed. No pickled weights: loading
# them can run code, so safetensors alone are read.
TOKENIZER_FILES = (
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
)  # fmt: skip
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    *TOKENIZER_FILES,
)  # fmt: skip

CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder on disk. For a LoRA adapter, `base` is the model that its config names."""

    name: str
    folder: Path
    base: "ModelFiles | None"

    def hashes(self, patterns=MODEL_FILES):
        """SHA-256 by file name, the base's under `base/`."""
        found = sorted({path for pattern in patterns for path in self.folder.glob(pattern)})
        own = {path.name: hash_file(path) for path in found}
        return own | {f"base/{name}": value for name, value in (self.base.hashes() if self.base else {}).items()}


def find_model(model_id, as_base=False):
    """The files of a model given by folder or hub id (then downloaded, or taken from the cache).

    What transformers would pass over in silence is refused here: a damaged generation config, a
    weight index that names files of another kind, an attention function fetched from the hub.
    """
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        if folder.exists() or model_id.startswith((".", "/", "~")):
            raise UserError(f"--model-id {model_id}: not a model folder; pass a folder with config.json, or a hub id")
        folder = download_model(model_id)
    if (folder / "adapter_config.json").is_file():
        if as_base:
            raise UserError(f"{model_id}: the base of an adapter, yet an adapter itself: merge it into its own base first")
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise UserError(f"{folder}/adapter_config.json: names no base model (base_model_name_or_path)")
        return ModelFiles(model_id, folder, find_model(base, as_base=True))
    if not (folder / "config.json").is_file():
        raise UserError(f"--model-id {model_id}: not a model folder: no config.json or adapter_config.json in it")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"--model-id {model_id}: no *.safetensors in it; other weight files can run code and are not "
            "read: save the model again with save_pretrained"
        )
    for index in folder.glob("*.safetensors.index.json"):
        for shard in set(read_json(index).get("weight_map", {}).values()):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise UserError(f"{index}: names {shard!r}; weights are read from *.safetensors beside it alone")
    configs = {name: read_json(folder / name) for name in CONFIG_FILES if (folder / name).is_file()}
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(configs["config.json"].get(key)):
            raise UserError(f"{folder}/config.json: {key} names code on the hub, which is not run: remove it")
    return ModelFiles(model_id, folder, None)


def find_tokenizer(name):
    """The files of a tokenizer alone, by folder or hub id: a server has the weights."""
    folder = Path(name).expanduser()
    return ModelFiles(name, folder if folder.is_dir() else download_model(name, TOKENIZER_FILES), None)


def download_model(model_id, patterns=MODEL_FILES):
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(snapshot_download(model_id, allow_patterns=list(patterns), ignore_patterns="*/*"))
    except Exception as error:  # hub, network and name errors share no base class
        raise UserError(
            f"--model-id {model_id}: neither a folder here nor to be had from the hub ({first_line(error)}); "
            "without the hub pass a model folder, such as demo/model"
        ) from error


def load_tokenizer(files):
    from transformers import AutoTokenizer

    has_own = any(files.folder.glob("tokenizer*"))
    folder = files.folder if has_own or not files.base else files.base.folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its parser raises
        raise UserError(f"--model-id {files.name}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if not tokenizer("0")["input_ids"]:  # without its files transformers makes one that knows no text
        raise UserError(f"--model-id {files.name}: its tokenizer knows no digits; are its files there?")
    return tokenizer


def encode(tokenizer, texts):
    """The token ids of each text, an array each, a thousand texts at a time: lists of a million would fill the memory."""
    ids = []
    for start in range(0, len(texts), 1000):
        batch = tokenizer(texts[start : start + 1000], add_special_tokens=False, return_attention_mask=False)
        ids += [array("i", tokens) for tokens in batch["input_ids"]]
    return ids


def load_model(files, dtype, device):
    """The causal model on the device, an adapter merged into its base, in evaluation mode.

    An adapter is merged in fp32 and rounded once: added to bf16 weights most of it would be lost.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    final = getattr(torch, DTYPES[dtype])
    try:
        refuse_too_large(files.base or files, 4 if files.base else final.itemsize, device)
        model, report = AutoModelForCausalLM.from_pretrained(
            (files.base or files).folder,
            dtype=torch.float32 if files.base else final,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they come with the report, by name
            output_loading_info=True,
        )
        if files.base:
            model = merge_adapter(model, files)
            for weight in model.parameters():  # no buffers: rounded, rope's frequencies turn too far with every position
                weight.data = weight.data.to(final)
        model = model.to(device).eval()
    except UserError:
        raise
    except Exception as error:  # damaged or unfit files raise whatever their parser raises
        raise UserError(f"--model-id {files.name}: cannot be loaded: {first_line(error)}") from error
    for trouble in ("missing_keys", "mismatched_keys"):
        if report[trouble]:
            raise UserError(f"--model-id {files.name}: {trouble.replace('_', ' ')} in its weights: {min(report[trouble])}")
    return model


def refuse_too_large(files, element, device):
    """Before weights are loaded: a process that outgrows a machine's memory is killed without a word."""
    from safetensors import safe_open

    weights, folder = 0, files.folder
    index = next(folder.glob("*.safetensors.index.json"), None)
    names = set(read_json(index)["weight_map"].values()) if index else {path.name for path in folder.glob("*.safetensors")}
    for name in names:
        with safe_open(folder / name, "pt") as file:
            weights += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    free = free_memory(device)
    if weights * element > free:
        raise UserError(
            f"--model-id {files.name}: its {weights:,} weights take {weights * element / 2**30:.3g} GiB, "
            f"and {free / 2**30:.3g} are free on {device}; a 16-bit --dtype or a smaller model need less"
        )


def positions(model):
    """How many positions a model has; without a limit, more than anyone asks for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def merge_adapter(model, files):
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = files.folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"--model-id {files.name}: no adapter_model.safetensors in it; other weight files are not read")
    with warnings.catch_warnings(action="ignore"):  # of missing keys too, which the check below names
        adapted = PeftModel.from_pretrained(model, files.folder)
    with safe_open(weights, "pt") as file:
        missing = get_peft_model_state_dict(adapted).keys() - set(file.keys())
    if missing:  # peft leaves them as they begin, without effect
        raise UserError(f"{weights}: missing keys that its config asks for: {min(missing)}")
    return adapted.merge_and_unload()


def choose_device(device, note=log):
    """The named device, or CUDA where there is one."""
    import torch

    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}" if processes() > 1 else "cuda"
        note(f"device {device}: {torch.cuda.get_device_name(device)}")
    elif device is None:
        device = "cpu"
        note(f"device {device}: no CUDA device here")
    try:
        torch.zeros(1, device=device).item()  # read back, which a device without memory cannot
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used here: {first_line(error)}") from error
    return torch.device(device)


def choose_dtype(dtype, device, note=log):
    """The named precision, or bf16 on CUDA and fp32 elsewhere."""
    if dtype is None:
        dtype = "bf16" if device.type == "cuda" else "fp32"
        reason = "half the memory traffic of fp32" if dtype == "bf16" else "exact, and CPUs are slow in bf16"
        note(f"dtype {dtype}: the default on {device.type}, {reason}")
    return dtype


# ------------------------------------------------------------------------------------------
# Choosing tokens
# ------------------------------------------------------------------------------------------

SAMPLED_LOGITS = 2**26  # at once, for ranking and noise take some 50 bytes for each


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
            raise UserError(f"--temperature {self.temperature}: must be above 0 and finite; for greedy pass --no-do-sample")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1 (1 filters nothing)")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must be 0 (filters nothing) or more")


def choose_tokens(logits, rows, decoding):
    """The next token of each row, as a list; the lowest id among equals."""
    import torch

    with torch.inference_mode():
        highest = logits.max(dim=-1)  # NaN where a row holds one
        if highest.values.isnan().any():
            row = rows[highest.values.isnan().int().argmax()]
            raise UserError(
                f"question {row.request.id}: the model's logits are not numbers (NaN) after {len(row.tokens)} tokens; "
                "its weights are damaged or overflow: try --dtype fp32"
            )
        if not decoding.do_sample:
            return highest.indices.tolist()
        counters = [(row.request.id, row.request.sample, len(row.tokens)) for row in rows]
        counters = torch.tensor(counters, device=logits.device)
        some = max(1, SAMPLED_LOGITS // logits.shape[1])
        parts = zip(logits.split(some), counters.split(some), strict=True)
        return torch.cat([sample_tokens(*part, decoding) for part in parts]).tolist()


def sample_tokens(logits, counters, decoding):
    """Draw one token a row, (rows,), from logits (rows, vocabulary) and counters (rows, 3).

    Temperature, top-k and top-p as transformers applies them, in this order; of equal logits the
    lower token id ranks first (bf16 logits tie often). Among the kept tokens the largest of
    log-probability plus Gumbel noise wins, which draws from their softmax (Gumbel-max). The noise
    is a hash of (seed, question id, sample, step, token id), so that a draw depends on nothing else.
    """
    import torch

    scores = logits.float() + 0.0  # -0.0 becomes 0.0, so that equal numbers have equal bits
    size = scores.shape[-1]
    if decoding.top_k or decoding.top_p < 1:
        tokens = highest_tokens(scores, min(decoding.top_k or size, size))
    else:  # all are kept, in whatever order
        tokens = torch.arange(size, device=logits.device).expand(len(logits), -1)
    scaled = scores.gather(-1, tokens).double() / decoding.temperature
    if decoding.top_p < 1:
        probabilities = scaled.softmax(dim=-1)
        dropped = probabilities.cumsum(dim=-1) - probabilities >= decoding.top_p
        most = tokens.shape[-1] - int(dropped.sum(dim=-1).min())
        tokens, scaled = tokens[:, :most], scaled.masked_fill(dropped, -math.inf)[:, :most]
    seed = torch.tensor(decoding.seed, device=logits.device)
    random_bits = counter_hash(seed, *counters[:, :, None].unbind(dim=1), tokens)
    # 52 bits and a half: exact in fp64, never 0 and never 1.
    uniform = (logical_shift(random_bits, 12).double() + 0.5) * 2.0**-52
    best = (scaled - torch.log(-torch.log(uniform))).argmax(dim=-1, keepdim=True)
    return tokens.gather(-1, best)[:, 0]


def highest_tokens(scores, count):
    """The token ids of each row's `count` highest scores, highest first, of equal ones the lower id first."""
    import torch

    size = scores.shape[-1]
    if count < size:  # all that could be among them, with every token that equals the last
        least = scores.topk(count).values[:, -1:]
        scores, tokens = scores.topk(int((scores >= least).sum(dim=-1).max()))
    else:
        tokens = torch.arange(size, device=scores.device)
    # Floats ordered as integers, the token id below them.
    bits = scores.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    return size - 1 - ((ordered | (size - 1 - tokens)).topk(count).values & 0xFFFFFFFF)


def counter_hash(*counters):
    """A 64-bit hash of integer tensors that broadcast: SplitMix64's finalizer, chained.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014. int64
    wraps around, so that it serves as uint64.
    """
    state = 0
    for counter in counters:
        state = (counter ^ state) - 0x61C8864680B583EB  # the golden ratio's odd fraction, as int64
        state = (state ^ logical_shift(state, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
        state = (state ^ logical_shift(state, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        state = state ^ logical_shift(state, 31)
    return state


def logical_shift(number, bits):
    """Shift right and fill with zeros, which int64's own shift does not."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)


# ------------------------------------------------------------------------------------------
# Generation: a rolling, left-padded batch
#
# Rows of like length come in together, as a cohort: they share one buffer of key/value columns a
# layer, and the newest token of every row stands in the same column, so that one slice assignment
# writes a step in place. A row that ends leaves at once: the cohort's last row moves into its slot.
# When enough slots and memory are free, waiting prompts are prefilled as the next cohort; where
# there are too many, two that waste the least merge. A cohort whose columns are used up is copied into new
# ones, without the columns in which no row stands. All cohorts take a step in one forward pass,
# and attend one after the other. The beginning that all prompts share is computed once and kept
# apart: every row attends to it, none holds a copy. On CUDA a step whose cohorts are those of the
# last one is captured as a graph and replayed: what changes between such steps is in tensors.
# ------------------------------------------------------------------------------------------

MOST_SLOTS = 2048  # what --batch-size auto takes where memory allows more
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}  # of one pass; on a CPU the activations stay in its caches
PREFILL_PAIRS = 2**22  # of one pass, of a token that attends and one that is attended to: their scores take memory
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.8}  # of what is free; activations and logits need the rest
SPARE_COLUMNS = 24  # beyond those in use, and an eighth of these
MOST_COHORTS = 4  # each costs calls in every step
FEW_ROWS = 32  # of which one cohort is made whatever their lengths: further ones would cost more than they save
ROW_STEP = {"cpu": 1, "cuda": 64}  # to which a cohort's rows are rounded up where steps are captured, for one graph to serve many
LIKE = 0.75  # of the length of a cohort's longest row its others have at least so much, as it begins


@dataclass(frozen=True)
class ThinkBudget:
    """A thought still open after `tokens` new tokens is closed: `early_stop` follows, token by token."""

    tokens: int
    early_stop: list  # the ids of EARLY_STOP
    think: int  # the ids of the tags
    close: int
    opened: bool  # whether the prompt ends inside a thought; else the model must open one

    def forced(self, tokens):
        """The token that must follow these new ones, or None where the model chooses."""
        place = len(tokens) - self.tokens
        return self.early_stop[place] if 0 <= place < len(self.early_stop) and self.overruns(tokens) else None

    def overruns(self, tokens):
        """Whether the thought in these new tokens is still open when the budget is spent."""
        thought = tokens[: self.tokens]
        return (self.opened or self.think in thought) and self.close not in thought

    def closed(self, tokens):
        """Whether these new tokens go on behind a thought that the budget closed."""
        return len(tokens) > self.tokens and self.overruns(tokens)


@dataclass(frozen=True)
class Request:
    """One completion to make, named by question id and sample number; `begun` are tokens it has already."""

    id: int
    sample: int
    prompt_ids: list  # or any sequence
    max_new_tokens: int
    budget: ThinkBudget | None = None
    begun: tuple = ()


@dataclass(frozen=True)
class Completion:
    """One finished completion. `token_ids` ends in the end token where there is one."""

    id: int
    sample: int
    token_ids: list
    text: str
    finish_reason: str  # "stop" at an end token, "length" at the request's limit
    prompt_tokens: int
    output_tokens: int
    forced: bool = False  # the thought was closed because its budget was spent


@dataclass(eq=False)
class Row:
    """A request on its way: its tokens so far."""

    request: Request
    tokens: list

    def __len__(self):
        return len(self.request.prompt_ids) + len(self.tokens)


def generate(model, tokenizer, requests, decoding=Decoding(), batch_size="auto", note=log):
    """Complete every request; yield each Completion as it ends, in the order they end.

    Up to rounding, greedy text depends on the prompt alone and sampled text on the prompt and
    (seed, id, sample): not on batch size, order, refill or a restart. The model's attention is
    replaced while the generator lives: do not call the model between two completions.

    batch_size: "auto" or the most rows at once. note: gets a line for each automatic choice.
    Raises UserError for a model whose attention cannot be replaced, for NaN logits, and where
    memory is too small for one row.
    """
    if not requests:
        return
    stop_ids, hidden_ids = stop_token_ids(model, tokenizer), hidden_token_ids(tokenizer)
    cache = RollingCache()
    with borrowed(model, cache), named_out_of_memory():
        for row in RollingBatch(model, cache, requests, decoding, stop_ids, batch_size, note).run():
            yield Completion(
                id=row.request.id,
                sample=row.request.sample,
                token_ids=row.tokens,
                text=tokenizer.decode([token for token in row.tokens if token not in hidden_ids]),
                finish_reason="stop" if row.tokens[-1] in stop_ids else "length",
                prompt_tokens=len(row.request.prompt_ids),
                output_tokens=len(row.tokens),
                forced=row.request.budget is not None and row.request.budget.closed(row.tokens),
            )


def stop_token_ids(model, tokenizer):
    """Every end id of the model's generation config and of the tokenizer, and ChatML's end of turn."""
    configured = model.generation_config.eos_token_id
    ids = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return (ids | {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")}) - {None}


def hidden_token_ids(tokenizer):
    """Special tokens, which are no part of the text. The think tags always are."""
    added = tokenizer.added_tokens_decoder.items()
    return {i for i, token in added if token.special and token.content not in ("<think>", "</think>")}


@contextlib.contextmanager
def named_out_of_memory():
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory, and one row at a time is the least: {first_line(error)}; free some, or ask for fewer new tokens"
        ) from error


@contextlib.contextmanager
def borrowed(model, cache):
    """The model in evaluation mode with the cache's attention; both are put back at the end."""
    from transformers import AttentionInterface

    training, attention, name = model.training, model.config._attn_implementation, f"rolling_{id(model)}"
    AttentionInterface.register(name, cache.attend)
    try:
        model.eval()
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise unfit(model)
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
        cache.clear()


@dataclass(eq=False)
class Cohort:
    """Rows in slots 0, 1, … of one buffer a layer, the newest token of each in column `width - 1`."""

    rows: list
    slots: int
    columns: int
    width: int
    buffers: dict  # layer → [keys, values], each (slots, groups, columns, dim)


class RollingBatch:
    """The live rows, cohort by cohort, and the waiting ones."""

    def __init__(self, model, cache, requests, decoding, stop_ids, batch_size, note):
        self.model, self.cache, self.decoding = model, cache, decoding
        self.stop_ids, self.note = stop_ids, note
        self.kind = "cuda" if model.device.type == "cuda" else "cpu"
        self.captured_parts, self.unchecked = None, 2
        self.cohorts, self.waiting, self.ended = [], [], []
        self.finished = self.produced = 0
        self.longest_answer = max(request.max_new_tokens for request in requests)
        self.read_prefix(shared_beginning([request.prompt_ids for request in requests]))
        check_fit(model, cache, max(len(request.prompt_ids) + request.max_new_tokens for request in requests))
        self.open = {Row(request, [*request.begun]) for request in requests}  # live or waiting
        self.wait(self.open)
        self.choose_slots(batch_size)

    def run(self):
        """Yield the rows that end, until none is left."""
        while self.open:
            try:
                if not self.admit():
                    self.step()
            except RuntimeError as error:
                if self.slots == 1 or not is_out_of_memory(error):
                    raise
                self.restart_with_half()
            self.let_go([cohort for cohort in self.cohorts if not cohort.rows])
            ended, self.ended = self.ended, []
            yield from ended

    def read_prefix(self, ids):
        """Compute the tokens that all prompts share, once. Without any, one is read all the same: it shows the cache's sizes."""
        self.prefix = 0
        try:
            self.forward([[*ids] or [0]], [max(1, len(ids))], [(None, slice(1), slice(1))])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise unfit(self.model, error) from error
        self.prefix, self.token_bytes = len(ids), self.cache.end_prefix(len(ids))

    def wait(self, rows):
        """Rows wait longest first, taken from the list's end: those that come together are of like length."""
        self.waiting = sorted([*self.waiting, *rows], key=lambda row: (len(row), -row.request.id, -row.request.sample))

    def choose_slots(self, batch_size):
        free = free_memory(self.model.device)
        self.budget = int(free * MEMORY_SHARE[self.kind] / self.token_bytes)  # in columns of one row
        self.slots = min(MOST_SLOTS if batch_size == "auto" else batch_size, len(self.waiting))
        fits = max(1, self.budget // self.typical())
        reason = "one for each request" if self.slots == len(self.waiting) else "the most that pays"
        if fits < self.slots:
            reason = f"what fits into memory at first, and up to {self.slots} where answers turn out short"
        memory = f"about {self.typical()} columns of {self.token_bytes / 1024:.1f} KiB a row, {free / 2**30:.1f} GiB free"
        if batch_size == "auto" or fits < self.slots:
            self.note(f"batch size {min(fits, self.slots)}: {reason} ({memory})")

    def own(self, row):
        """The columns that a row takes: its tokens behind the shared beginning."""
        return len(row) - self.prefix

    def typical(self):
        """The columns that the longest waiting row takes halfway through its answer.

        How long answers are is not known before: their limit stands for it until 32 have ended, then
        all tokens by the number of ended answers, which counts those that go on as well.
        """
        answer = self.longest_answer
        if self.finished >= 32:
            answer = min(answer, self.produced // self.finished)
        own = self.own(self.waiting[-1])
        return own + spare(own) + answer // 2

    def room(self):
        """How many rows to admit now: none, unless they are an eighth of the batch, for few prompts read at a time cost more."""
        if not self.waiting:
            return 0
        live = sum(len(cohort.rows) for cohort in self.cohorts)
        # Rows grow: with half as much again for the older ones few are ever sent back to wait.
        typical = self.typical()
        taken = sum(max(c.slots * c.columns, len(c.rows) * max(c.columns * 3 // 2, typical)) for c in self.cohorts)
        room = min(self.slots - live, (self.budget - taken) // typical, len(self.waiting))
        return room if room >= min(len(self.waiting), (live + room) // 8 + 1) else int(not live)

    def admit(self):
        """Where there is room prefill the longest waiting rows of about one length as a new cohort, some at a time; else False."""
        if len(self.cohorts) >= MOST_COHORTS and self.room():
            self.merge()
        room = self.room()
        if not room:
            return False
        self.captured_parts = self.graph = None
        width = self.own(self.waiting[-1])
        alike = sum(self.own(row) >= LIKE * width for row in self.waiting[-room:])
        rows = [self.waiting.pop() for _ in range(max(alike, min(room, FEW_ROWS)))]
        cohort = self.cache.pack([], len(rows), spare(width) + width, width)
        self.cohorts.append(cohort)
        while rows:
            width = self.own(rows[0])
            most = max(1, min(PREFILL_TOKENS[self.kind] // width, PREFILL_PAIRS // (width * (self.prefix + width))))
            new, rows, begin = rows[:most], rows[most:], len(cohort.rows)
            cohort.rows += new
            tokens = [[*row.request.prompt_ids[self.prefix :], *row.tokens] for row in new]
            part = cohort, slice(begin, begin + len(new)), slice(len(new))
            self.extend(new, self.forward(tokens, [self.own(row) for row in new], [part]))
        return True

    def step(self):
        """One more token for every live row."""
        full = [cohort for cohort in self.cohorts if cohort.width == cohort.columns]
        few = len(self.open) - len(self.waiting) <= FEW_ROWS
        for cohorts in [self.cohorts] if full and few else [[cohort] for cohort in full]:
            self.repack(cohorts)
        rows, parts, live, row_step = [], [], [], ROW_STEP[self.kind]
        for cohort in self.cohorts:
            cohort.width += 1
            count = min(cohort.slots, math.ceil(len(cohort.rows) / row_step) * row_step)
            parts.append((cohort, slice(count), slice(len(rows), len(rows) + count)))
            live += range(len(rows), len(rows) + len(cohort.rows))
            rows += cohort.rows + cohort.rows[-1:] * (count - len(cohort.rows))  # the last again, in slots that nobody reads
        logits = self.forward([row.tokens[-1:] for row in rows], [self.own(row) for row in rows], parts, step=True)
        if len(live) < len(rows):
            rows, logits = [rows[i] for i in live], logits[live]
        self.extend(rows, logits)

    def forward(self, tokens, own, parts, step=False):
        """Logits (rows, vocabulary) after each row's new `tokens`, with which it takes `own` columns; parts: see RollingCache.aim."""
        import torch

        device, width = self.model.device, max(map(len, tokens))
        ids = [[0] * (width - len(row)) + row for row in tokens]
        positions = [[*range(self.prefix + columns - width, self.prefix + columns)] for columns in own]
        newest = [cohort.width - 1 if cohort else 0 for cohort, *_ in parts]
        with torch.inference_mode():
            inputs = torch.tensor([ids, positions], device=device)
            if step and ROW_STEP[self.kind] > 1:
                return self.replay(parts, inputs, torch.tensor(newest, device=device))
            return self.read(parts, inputs, newest, step)

    def read(self, parts, inputs, newest, step):
        ids, positions = inputs
        return self.model(
            input_ids=ids,
            attention_mask=self.cache.aim(parts, newest, positions, self.prefix, over_buffers=step),
            position_ids=positions.clamp(min=self.prefix),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def replay(self, parts, *inputs):
        """A step on CUDA: captured where the last one had the same parts, then launched at once instead of kernel by kernel."""
        if parts != self.captured_parts:
            self.captured_parts, self.inputs, self.graph = parts, inputs, None
            return self.read(parts, *inputs, step=True)
        for held, new in zip(self.inputs, inputs, strict=True):
            held.copy_(new)
        try:
            self.graph = self.graph or capture(lambda: self.read(parts, *self.inputs, step=True), self.model.device)
            logits = self.graph()
            if self.unchecked:  # a second time, with other inputs than it was captured with
                self.unchecked -= 1
                refuse_other_logits(logits, self.read(parts, *inputs, step=True))
            return logits
        except RuntimeError as error:
            self.note(f"steps are not captured as CUDA graphs, which is slower: {first_line(error)}")
            ROW_STEP[self.kind], self.captured_parts, self.graph = 1, None, None  # not tried again by this process
        return self.read(parts, *inputs, step=True)

    def extend(self, rows, logits):
        """Append the chosen token to each row; rows that end with it leave."""
        for row, token in zip(rows, choose_tokens(logits, rows, self.decoding), strict=True):
            forced = row.request.budget and row.request.budget.forced(row.tokens)
            row.tokens.append(token if forced is None else forced)
        ended = {row for row in rows if row.tokens[-1] in self.stop_ids or len(row.tokens) >= row.request.max_new_tokens}
        self.ended += [row for row in rows if row in ended]
        self.open -= ended
        self.produced += len(rows)
        self.finished += len(ended)
        for cohort in self.cohorts if ended else ():
            self.remove(cohort, ended)

    def remove(self, cohort, leaving):
        """Free the slots of rows that leave: rows from the end move into them."""
        keep = [slot for slot, row in enumerate(cohort.rows) if row not in leaving]
        holes = [slot for slot, row in enumerate(cohort.rows[: len(keep)]) if row in leaving]
        moved = keep[len(keep) - len(holes) :]
        self.cache.copy_slots(cohort, moved, holes)
        for source, hole in zip(moved, holes, strict=True):
            cohort.rows[hole] = cohort.rows[source]
        del cohort.rows[len(keep) :]

    def merge(self):
        """Of the cohorts that stand side by side by width, the two whose union has the fewest dead columns become one."""
        self.cohorts.sort(key=lambda cohort: cohort.width)
        pairs = zip(self.cohorts, self.cohorts[1:], strict=False)
        self.repack(min(pairs, key=lambda pair: len(pair[0].rows) * (pair[1].width - pair[0].width)))

    def repack(self, cohorts):
        """Into one cohort, without dead columns and with some to spare. Rows that memory cannot hold wait again, the shortest first."""
        self.captured_parts = self.graph = None
        rows = sorted((row for cohort in cohorts for row in cohort.rows), key=self.own)
        width = self.own(rows[-1]) - 1  # the newest token is not stored yet
        columns = width + spare(width)
        others = [cohort for cohort in self.cohorts if cohort not in cohorts]
        fitting = (self.budget - sum(cohort.slots * cohort.columns for cohort in others)) // columns
        short = rows[: max(0, len(rows) - max(1, fitting))]
        for cohort in cohorts if short else ():
            self.remove(cohort, set(short))
        self.cohorts = [*others, self.cache.pack(cohorts, len(rows) - len(short), columns, width)]
        self.wait(short)

    def restart_with_half(self):
        """Out of memory: half the rows that were tried. All that are not done wait again and keep their tokens."""
        self.slots = max(1, min(self.slots, len(self.open) - len(self.waiting)) // 2)
        self.let_go(self.cohorts)
        self.waiting = []
        self.wait(self.open)
        self.note(f"out of memory: going on with batch size {self.slots}, nothing lost")

    def let_go(self, cohorts):
        self.cohorts = [cohort for cohort in self.cohorts if cohort not in cohorts]
        for cohort in cohorts:
            cohort.buffers.clear()  # others may hold on to the cohort


class RollingCache:
    """Keys and values of all cohorts, and the attention over them.

    Serves as the model's cache and as its attention function. Until `end_prefix`, what the model
    writes is the prefix; afterwards it goes into the cohorts that `aim` names.
    """

    def __init__(self):
        self.prefix, self.attended, self.windows = {}, set(), set()

    def aim(self, parts, newest, positions, prefix, over_buffers):
        """Before a forward pass: where its rows stand, as parts (cohort, slice of its slots, slice of the rows).

        newest: the column of the last new token, a number for each part, or one tensor in a step that is
        captured. positions: of the new tokens, (rows, new). over_buffers: whether these attend to what
        the cohorts hold, or to one another alone. Returns what to give the model as its mask.
        """
        import torch

        self.parts, self.newest = parts, newest if isinstance(newest, list) else newest.split(1)
        self.positions, self.shared, self.over_buffers, self.masks = positions, prefix, over_buffers, {}
        rows, new = positions.shape
        self.given = torch.zeros((rows, 1, new, new), device=positions.device)  # so that it makes none; attend has its own
        return self.given

    def update(self, keys, values, layer, *args, **kwargs):
        """Called by each layer: store the new tokens."""
        self.updated = keys, values
        for (cohort, slots, own), newest in zip(self.parts, self.newest, strict=True):
            if cohort is None:
                self.prefix[layer] = keys[0], values[0]
                continue
            columns = slice(newest + 1 - keys.shape[2], newest + 1) if isinstance(newest, int) else newest
            for buffer, new in zip(cohort.buffers[layer], (keys, values), strict=True):
                buffer[slots, :, columns] = new[own]
        return keys, values

    def attend(self, module, query, keys, values, attention_mask, scaling=None, sliding_window=None, softcap=None, **kwargs):
        """Attention of queries (rows, heads, new, dim) over prefix and cohorts, as (rows, new, heads, dim).

        The heads of a group are folded into the query length, so that keys and values are never
        repeated; over the prefix, all rows are one matrix product.
        """
        import torch

        refuse_other_attention(self, module, keys, values, attention_mask, kwargs)
        self.windows.add(sliding_window)
        layer, shared = module.layer_idx, self.shared
        self.attended.add(layer)
        rows, heads, new, dim = query.shape
        groups = keys.shape[1]
        folded = heads // groups * new
        query = (query * (dim**-0.5 if scaling is None else scaling)).reshape(rows, groups, folded, dim)
        result = query.new_empty(rows, groups, folded, values.shape[3])
        if shared:
            shared_keys, shared_values = self.prefix[layer]
            by_group = scores_of(query.transpose(0, 1).reshape(1, groups, rows * folded, dim), shared_keys[None])[0]
            over_prefix = by_group.view(groups, rows, folded, shared).transpose(0, 1)
        for number, (cohort, slots, own) in enumerate(self.parts):
            window = [buffer[slots] for buffer in cohort.buffers[layer]] if self.over_buffers else (keys, values)
            scores = scores_of(query[own], window[0])
            if shared:
                scores = torch.cat([over_prefix[own], scores], dim=-1)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores.unflatten(2, (-1, new)).add_(self.mask(number, sliding_window, scores.dtype))
            precision = torch.promote_types(scores.dtype, torch.float32)
            weights = torch.softmax(scores, dim=-1, dtype=precision).to(query.dtype)
            result[own] = weights[..., shared:] @ window[1]
            if shared:
                over_prefix[own] = weights[..., :shared]
        if shared:
            from_prefix = by_group.to(query.dtype) @ shared_values
            result += from_prefix.view(groups, rows, folded, -1).transpose(0, 1)
        return result.reshape(rows, heads, new, -1).transpose(1, 2).contiguous(), None

    def mask(self, number, sliding_window, dtype):
        """0 where a new token sees a key, -inf where not: (rows, 1, 1, new, keys), made once a pass for all layers."""
        import torch

        key = number, sliding_window
        if key not in self.masks:
            cohort, _, own = self.parts[number]
            keys = new = self.positions[own]
            if self.over_buffers:
                keys = new[:, -1:] + torch.arange(cohort.columns, device=new.device) - self.newest[number]
            keys = keys.masked_fill(keys < self.shared, 2**40)  # padding, further on than any token looks
            keys = torch.cat([torch.arange(self.shared, device=new.device).expand(len(new), -1), keys], dim=1)
            # A padding token counts as the row's first: it sees something, and so never turns into NaN.
            distance = new.clamp(min=self.shared)[:, :, None] - keys[:, None]
            visible = distance >= 0
            if sliding_window is not None:
                visible &= distance < sliding_window
            mask = torch.zeros(visible.shape, dtype=dtype, device=new.device).masked_fill_(~visible, -math.inf)
            self.masks[key] = mask[:, None, None]
        return self.masks[key]

    def end_prefix(self, length):
        """Keep so many tokens of what was read; returns the bytes that one takes in all layers."""
        self.prefix = {layer: (k[:, :length], v[:, :length]) for layer, (k, v) in self.prefix.items()}
        return sum(t.shape[0] * t.shape[2] * t.element_size() for pair in self.prefix.values() for t in pair)

    def pack(self, cohorts, slots, columns, width):
        """A cohort with the live columns of others, taken over a layer at a time, so that little memory is held twice."""
        new = Cohort([row for cohort in cohorts for row in cohort.rows], slots, columns, width, {})
        for layer, pair in self.prefix.items():
            # Zeros and not uninitialized memory: a weight of 0 times a stray NaN would be NaN.
            new.buffers[layer] = [t.new_zeros(slots, t.shape[0], columns, t.shape[2]) for t in pair]
            begin = 0
            for cohort in cohorts:
                rows, live = len(cohort.rows), min(width, cohort.width)
                for target, source in zip(new.buffers[layer], cohort.buffers.pop(layer), strict=True):
                    target[begin : begin + rows, :, width - live : width] = source[:rows, :, cohort.width - live : cohort.width]
                begin += rows
        return new

    def copy_slots(self, cohort, sources, targets):
        import torch

        if targets:
            device = self.positions.device
            sources, targets = (torch.tensor(slots, device=device) for slots in (sources, targets))  # once for all buffers
            for pair in cohort.buffers.values():
                for buffer in pair:
                    buffer[targets, :, : cohort.width] = buffer[sources, :, : cohort.width]

    def get_seq_length(self, layer=0):
        return 0  # positions are always given

    def clear(self):
        vars(self).clear()


def capture(work, device):
    """A function that launches all kernels of `work` at once, as a CUDA graph; each call overwrites the result of the last."""
    import torch

    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.stream(torch.cuda.current_stream(device))  # put back at the end, which a failed capture does not do
    with torch.cuda.device(device), here, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()

    def replay():
        graph.replay()
        return result

    return replay


def refuse_other_logits(logits, expected):
    import torch

    if not torch.allclose(logits, expected, rtol=2**-5, atol=2**-3):  # far beyond rounding, far below another token's
        raise RuntimeError("a replayed step gives other logits")


def spare(width):
    """Columns beyond those in use: each costs a little in every step, and when they are used up all rows are copied."""
    return SPARE_COLUMNS + width // 8


def scores_of(query, keys):
    """query (a, b, m, dim) times keys (a, b, n, dim), as (a, b, m, n); of 16-bit numbers in fp32 on CUDA.

    Rounded to 16 bits before the softmax, scores lose what fused attention keeps.
    """
    import torch

    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled("cuda"):
        return query @ keys.transpose(2, 3)
    products = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
    return products.unflatten(0, query.shape[:2])


def check_fit(model, cache, longest):
    """UserError for a model whose next token depends on more than keys, values and the positions given."""
    import inspect

    config = model.config.get_text_config()
    sliding = getattr(config, "sliding_window", None)
    if (
        cache.attended != set(range(config.num_hidden_layers))  # other layers carry a state of their own
        or cache.attended != set(cache.prefix)
        or "position_ids" not in inspect.signature(type(model).forward).parameters
        or getattr(config, "attention_chunk_size", None)
        or (sliding and sliding < longest and cache.windows == {None})  # it is in a mask that we do not see
    ):
        raise unfit(model)


def refuse_other_attention(cache, module, keys, values, attention_mask, options):
    """UserError for a layer that does more than attend over what it stored, with the mask it was given."""
    unknown = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    if keys is not cache.updated[0] or values is not cache.updated[1]:
        unknown.append("keys and values other than the stored ones")
    if attention_mask is not cache.given:
        unknown.append("a mask of its own")
    if not getattr(module, "is_causal", True):
        unknown.append("a look ahead")
    if unknown:
        raise UserError(f"{type(module).__name__}: attention with {unknown[0]} is not supported; pass another model")


def unfit(model, error=None):
    reason = f" ({first_line(error)})" if error else ""
    return UserError(
        f"{type(model).__name__}: cannot be run here: its layers do not all attend over keys and values, at the positions "
        f"given, through transformers' AttentionInterface{reason}; pass a model of another architecture"
    )


def shared_beginning(prompts):
    """The token ids that all prompts begin with; every prompt keeps at least one token of its own."""
    first, last = min(prompts), max(prompts)  # what these two share, all between them share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(same, *(len(prompt) - 1 for prompt in prompts))]


def free_memory(device):
    """Bytes that are free on the device: its own memory on CUDA, the machine's elsewhere."""
    import psutil
    import torch

    if device.type != "cuda":  # all processes on the machine share it
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.cuda.empty_cache()  # what torch keeps for itself is free too
    return torch.cuda.mem_get_info(device)[0]


def is_out_of_memory(error):
    import torch

    told = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told)


# ------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------

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


def read_gold(ground_truth_answer):
    """The exact number after the last `####` of a reference answer; raises UserError without one."""
    _, marker, tail = ground_truth_answer.rpartition("####")
    number = read_line(tail) if marker else None
    if number is None or number is AMBIGUOUS:
        raise UserError(f"ground_truth_answer does not end in '#### <number>': {ground_truth_answer[-40:]!a}")
    return number


def score_final(model_output, ground_truth_answer, thinking_open=False):
    """One of STATUSES for a completion. `thinking_open`: the prompt ended inside `<think>`."""
    reading = read_final(model_output, thinking_open or "<think>" in model_output)
    return grade(reading, read_gold(ground_truth_answer))


def grade(reading, gold):
    """A Reading held against the exact reference number, as one of STATUSES."""
    if reading.status != "read":
        return reading.status
    return "right" if reading.number == gold else "wrong"


# ------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------

PUBLISHED_KEYS = ("id", "question", "model_output", "ground_truth_answer")


def first_line(error):
    """The first line of an exception's text, with the next where it ends in a colon, for messages of one line."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


def read_jsonl(path, required=(), bad=None):
    """Yield (line number, object) for every line that is not blank; a name that ends in .gz is decompressed.

    A line that is not UTF-8, not JSON, not an object or lacks a required key is a UserError that
    names the file, the line and the key; given a list `bad`, its number goes there instead.
    """
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = parse_json_line(path, number, line, required)
                except UserError:
                    if bad is None:
                        raise
                    bad.append(number)
                    continue
                yield number, row
    except (OSError, EOFError, zlib.error) as error:  # the latter two: a damaged .gz
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from error


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


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes `path`'s place in one step: a reader sees the old one or the new one."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


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


class RunOutput:
    """A run's files: NAME.jsonl when it is finished, NAME.jsonl.part until then, NAME.run.json.

    Every answer is appended to the part file the moment it is there. A second start reads which
    answers exist, drops a torn last line and asks for the rest; `finish` sorts all by (id, sample)
    and puts NAME.jsonl in place in one step. The part file is locked while its process lives.

    Of several processes each has a part file of its own (NAME.jsonl.part-1 is that of the second); the main
    process waits for the others' locks at the end and takes in what they wrote, as it does at a start with
    what any number of killed processes left.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.main_part = Path(f"{path}.part")
        self.part_path = self.main_part if is_main() else Path(f"{path}.part-{rank()}")
        self.record_path = self.path.with_suffix(".run.json")
        self.places = {}  # (id, sample) -> (file, offset) of its line
        self.totals = dict.fromkeys(("answers", "prompt_tokens", "output_tokens", "hit_limit"), 0)

    @contextlib.contextmanager
    def opened(self, record, overwrite=None):
        """Lock, compare with the run record on disk, find what is done; release at the end.

        overwrite: "always" drops what is there, "changed" what a run that decides differently made.
        Raises UserError where another process writes, where without `overwrite` the record on disk
        was made by a run that decides differently, or where a file cannot be written.
        """
        with self.named_errors():
            if self.path.is_dir():
                raise UserError(f"--output {self.path}: is a folder; pass a file")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.part = open(self.part_path, "a+b", buffering=0)  # noqa: SIM115 - closed below
        try:
            self.lock(self.part)
            if is_main():
                segments = self.prepare(record, overwrite)
            wait_for_all()
            self.index(self.path)
            self.index(self.main_part)
            if is_main():
                self.record = record | {"segments": self.complete(segments) + record["segments"]}
            try:
                yield self
            except BaseException as error:
                if self.places or not isinstance(error, UserError):
                    log(f"{self.path}: stopped, {len(self.places)} answers are on disk; the same command goes on from there")
                raise
        finally:
            if self.part_path.exists() and not self.part_size():
                self.part_path.unlink()
            self.part.close()

    def prepare(self, record, overwrite):
        """Leave nothing of killed processes but whole answers in the one part file; returns the earlier segments."""
        peers = {f"{self.main_part.name}-{other}" for other in range(1, processes())}
        self.last_answer = max(path.stat().st_mtime for path in (self.part_path, *self.other_parts()))
        for name in (self.path.name, self.record_path.name):  # of a process killed while it wrote one
            for stray in self.path.parent.glob(f".{glob.escape(name)}.*.tmp"):
                stray.unlink()
        segments = self.earlier_segments(record, overwrite)
        self.repair_part()
        for path in self.other_parts():
            with open(path, "r+b") as other:
                if path.name not in peers:  # else it is open, and waits for us
                    self.lock(other)
                self.take_in(other)
            if path.name not in peers:
                path.unlink()
        return segments

    def other_parts(self):
        return sorted(self.path.parent.glob(f"{glob.escape(self.main_part.name)}-*"))

    def take_in(self, other):
        """Move the whole lines of another process's part file to our own."""
        for line in other:
            if line.endswith(b"\n"):
                self.write(line)
        other.truncate(0)

    def gather(self):
        """In the main process: wait until the others have ended, and take in what they wrote."""
        for number in range(1, processes()):
            path = Path(f"{self.main_part}-{number}")
            with contextlib.suppress(FileNotFoundError), open(path, "r+b") as other:  # none where it had nothing to do
                fcntl.flock(other, fcntl.LOCK_EX)
                self.take_in(other)
                path.unlink(missing_ok=True)
        self.index(self.part_path)

    def part_size(self):
        """Bytes of answers that no finished file holds yet."""
        return os.fstat(self.part.fileno()).st_size

    @contextlib.contextmanager
    def named_errors(self):
        try:
            yield
        except OSError as error:
            way_out = "make room there, then start the same command again" if self.places else "pass another --output"
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; {way_out}") from error

    def lock(self, part):
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{self.path}: another process is writing it; wait for it or pass another --output") from error

    def earlier_segments(self, new, overwrite):
        """The segments of the run record on disk, which must decide as the new one does."""
        try:
            if overwrite == "always":
                self.drop()
            elif self.record_path.exists():
                old = read_json(self.record_path)
                compare_records(self.record_path, old, new)
                note_changes(old["segments"][-1], new["segments"][-1])
                return old["segments"]
            elif self.path.exists() or self.part_size() or any(path.stat().st_size for path in self.other_parts()):
                raise UserError(
                    f"{self.path}: exists without its run record {self.record_path.name}; "
                    "pass --overwrite or another --output"
                )
        except UserError as error:
            if overwrite != "changed":
                raise
            log(f"made again: {str(error).partition(';')[0]}")
            self.drop()
        return []

    def drop(self):
        for path in (self.part_path, *self.other_parts()):
            os.truncate(path, 0)
        self.path.unlink(missing_ok=True)
        self.record_path.unlink(missing_ok=True)

    def complete(self, segments):
        """Give a killed segment what it could not write: its answers, and the time of the last one."""
        for segment in segments:
            if segment.get("seconds") is None:
                started = datetime.datetime.fromisoformat(segment["started"]).timestamp()
                segment["seconds"] = round(max(0.0, self.last_answer - started), 3)
                segment.update(self.totals_beyond([other for other in segments if other is not segment]))
        return segments

    def totals_beyond(self, segments):
        """What is on disk less what these segments made."""
        return {name: total - sum(s.get(name, 0) for s in segments) for name, total in self.totals.items()}

    def repair_part(self):
        """Cut off a last line that was torn when its process died."""
        size = self.part_size()
        with open(self.part_path, "rb") as file:
            whole = sum(len(line) for line in file if line.endswith(b"\n"))
        if whole < size:
            log(f"{self.part_path}: dropped a torn last line of {size - whole} bytes")
            self.part.truncate(whole)

    def index(self, path):
        if path.exists():
            offset = 0
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):  # the main process is writing it
                        break
                    row = parse_json_line(path, number, line, ("id", "sample", "finish_reason", "prompt_tokens", "output_tokens"))
                    self.count(row, path, offset)
                    offset += len(line)

    def count(self, row, path, offset):
        if (row["id"], row["sample"]) not in self.places:
            self.totals["answers"] += 1
            self.totals["hit_limit"] += row["finish_reason"] == "length"
            for name in ("prompt_tokens", "output_tokens"):
                self.totals[name] += row[name]
        self.places[row["id"], row["sample"]] = path, offset

    def write_record(self, seconds=None):
        """Write the run record; `seconds` is how long the present segment has taken."""
        if not is_main():
            return
        *earlier, segment = self.record["segments"]
        segment.update(self.totals_beyond(earlier), seconds=seconds)
        with self.named_errors():
            write_atomically(self.record_path, json.dumps(self.record, indent=2) + "\n")

    def append(self, row):
        """Put one answer on disk. It is there when this returns, whatever happens to the process."""
        if not os.fstat(self.part.fileno()).st_nlink:
            self.put_back()
        offset = self.part.seek(0, os.SEEK_END)
        self.write(json.dumps(row).encode() + b"\n")
        self.count(row, self.part_path, offset)

    def write(self, line):
        line = memoryview(line)
        with self.named_errors():
            while line:
                line = line[self.part.write(line) :]

    def put_back(self):
        """The output folder was removed: the open file still holds the answers, write them again."""
        with self.named_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.part.seek(0)
            self.part_path.write_bytes(self.part.read())
        self.write_record()
        raise UserError(
            f"{self.path.parent}: was removed while the run wrote to it; {len(self.places)} answers are "
            f"back in {self.part_path}: the same command goes on from there"
        )

    def finish(self):
        """Sort all answers into NAME.jsonl and drop the part file; the main process does."""
        with self.named_errors(), contextlib.ExitStack() as stack:
            sources = {p: stack.enter_context(open(p, "rb")) for p in {place[0] for place in self.places.values()}}
            with replacing(self.path) as file:
                for _, (source, offset) in sorted(self.places.items()):
                    sources[source].seek(offset)
                    file.write(sources[source].readline())
            self.part.truncate(0)


def compare_records(path, old, new, way_out="pass --overwrite to drop it, or another --output"):
    """UserError where two runs of one output would mix: it names the field, both values and the way out."""
    if not is_run_record(old):
        raise UserError(f"{path}: is no run record; {way_out}")
    before, now = old["decides"], new["decides"]
    for key in [*now, *(before.keys() - now.keys())]:
        if before.get(key) != now.get(key):
            raise UserError(
                f"{path}: was made with {key} = {shorten(before.get(key))}, this run has "
                f"{shorten(now.get(key))}; {way_out}"
            )


def is_run_record(value):
    """Whether an object from a file has the shape of a run record."""
    segments = value.get("segments")
    shaped = isinstance(segments, list) and segments and all(isinstance(segment, dict) for segment in segments)
    return bool(shaped) and isinstance(value.get("decides"), dict)


def note_changes(old, new):
    """Note what describes the run and is no longer so: it decides nothing, up to rounding."""
    changed = [key for key in new if key not in ("started", "command") and new[key] != old.get(key)]
    if changed:
        values = (f"{key} {shorten(new[key])}, was {shorten(old.get(key))}" for key in changed)
        log("note: other than before: " + "; ".join(values))


def shorten(value, most=80):
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def hash_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_run(device=None):
    """What describes a run without deciding its output: versions, commit, start, and the device where there is one."""
    import platform
    from importlib.metadata import version

    described = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers")},
        "commit": project_commit(),
    }
    if device is not None:
        import torch

        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        described |= {"device": f"{device.type}: {name}", "threads": torch.get_num_threads()}
    return described


def project_commit():
    """This project's git commit, `-dirty` where files differ from it, None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
