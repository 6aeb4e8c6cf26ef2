"""Answer GSM8K questions from GGUF files in all modes, and compare the greedy texts with transformers' own.

Each file is loaded twice: as inference.py loads it, and by transformers' from_pretrained alone. Both
answer the same prompts greedily, ours by this project's generation, the other by transformers' `generate` in
left-padded batches. Where two texts part, the gap of the two highest logits there is held against rounding.
Writes a page of tables, anew after every mode; ends with exit code 1 where rounding does not explain a difference.

    python bench/gguf.py smollm2.gguf qwen.gguf
    python bench/gguf.py qwen.gguf --limit 4 --max-new-tokens 32 --output results/gguf-qwen.md
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # and not this folder: the package gguf has this file's name

import common
from bench.generation import gaps_and_rounding, plain
from common import MODES, UserError, at_least, build_prompt, thinking_is_open, write_atomically
from data import load_questions
from generation import Request, generate, stop_token_ids
from model import encode, find_model, load_model, load_tokenizer, positions, quantization
from reading import score_final

TABLE = """| mode | right | said no number | at the limit | tokens | seconds | generate's | texts that differ | of them beyond rounding |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


@dataclass(frozen=True)
class Outcome:
    """What one mode of one file came to."""

    mode: str
    statuses: list  # of each answer, as the scorer names them
    at_limit: int
    tokens: int
    seconds: float
    plain_seconds: float
    differing: int
    beyond: int


@common.command_line
def main(argv=None):
    args = parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    questions = load_questions(str(args.dataset), "test")[: args.limit]
    examples = [(item.question, item.answer) for item in load_questions(str(args.dataset), "train")[:3]]
    sections, beyond = [], 0
    for path in args.files:
        files = find_model(path)
        tokenizer, ours = load_tokenizer(files), load_model(files, "fp32", torch.device("cpu"))
        reference = load_by_transformers(files)
        heading, rows = describe(files, ours), []
        sections.append("")
        for mode in args.modes:
            outcome = compare(args, mode, ours, reference, tokenizer, questions, examples)
            beyond += outcome.beyond
            rows.append(table_row(outcome))
            print(f"{files.gguf} {rows[-1]}", flush=True)
            sections[-1] = "\n".join([heading, "", TABLE, *rows])
            write_atomically(args.output, page(args, sections))
        del ours, reference
    return int(beyond > 0)


def parse_args(argv):
    parser = common.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE.gguf", help="the models")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default all")
    add("--limit", type=at_least(1), default=16, help="questions (default %(default)s)")
    add("--max-new-tokens", type=at_least(1), default=512, help="of an answer (default %(default)s)")
    add("--threads", type=at_least(1), default=os.cpu_count(), help="CPU threads (default %(default)s)")
    add("--dataset", type=Path, default=Path(os.environ.get("GSM8K_SHARED", ROOT.parent / "shared")) / "gsm8k",
        help="folder with GSM8K's train.jsonl and test.jsonl (default %(default)s)")  # fmt: skip
    add("--output", type=Path, default=ROOT / "results/gguf.md", help="the page to write (default %(default)s)")
    args = parser.parse_args(argv)
    if not args.dataset.is_dir():
        raise UserError(f"--dataset {args.dataset}: no such folder")
    return args


def load_by_transformers(files):
    """The model without any of this project's loading."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        files.folder,
        gguf_file=files.gguf,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()


def compare(args, mode, ours, reference, tokenizer, questions, examples):
    prompts = [build_prompt(mode, item.question, tokenizer, examples) for item in questions]
    ids = [list(tokens) for tokens in encode(tokenizer, prompts)]
    most = [min(args.max_new_tokens, positions(ours) - len(prompt)) for prompt in ids]
    requests = [Request(i, 0, prompt, limit) for i, (prompt, limit) in enumerate(zip(ids, most, strict=True))]
    begun = time.perf_counter()
    done = {one.id: one for one in generate(ours, tokenizer, requests, note=lambda line: None)}
    between = time.perf_counter()
    tokens = {
        "ours": {i: one.token_ids for i, one in done.items()},
        "plain": plain(reference, tokenizer, requests, sorted(stop_token_ids(ours, tokenizer))),
    }
    ended = time.perf_counter()
    differing = [request for request in requests if tokens["ours"][request.id] != tokens["plain"][request.id]]
    gaps, errors = gaps_and_rounding(reference, differing, tokens["ours"], tokens["plain"])
    return Outcome(
        mode=mode,
        statuses=[
            score_final(done[i].text, item.answer, thinking_is_open(prompts[i])) for i, item in enumerate(questions)
        ],
        at_limit=sum(one.finish_reason == "length" for one in done.values()),
        tokens=sum(one.output_tokens for one in done.values()),
        seconds=between - begun,
        plain_seconds=ended - between,
        differing=len(differing),
        beyond=sum(gap > 4 * error for gap, error in zip(gaps, errors, strict=True)),
    )


def describe(files, model):
    digest = files.hashes()[files.gguf]
    return (
        f"## {files.gguf}\n\n{quantization(files)}, {model.num_parameters():,} weights, {positions(model):,} positions, "
        f"SHA-256 {digest[:16]}…"
    )


def table_row(outcome):
    right, no_number = outcome.statuses.count("right"), outcome.statuses.count("no_answer")
    return (
        f"| {outcome.mode} | {right} of {len(outcome.statuses)} | {no_number} | {outcome.at_limit} | {outcome.tokens} | "
        f"{outcome.seconds:.0f} | {outcome.plain_seconds:.0f} | {outcome.differing} | {outcome.beyond} |"
    )


def page(args, sections):
    names = " ".join(Path(path).name for path in args.files)
    flags = f"--limit {args.limit} --max-new-tokens {args.max_new_tokens} --modes {' '.join(args.modes)}"
    short = (
        "With so few tokens most answers are cut before their end: this page is for the texts, not for the scores.\n\n"
    )
    return f"""# GGUF files

`python bench/gguf.py {names} {flags}`, {time.strftime("%Y-%m-%d")}: the first {args.limit} test questions of GSM8K,
greedy, fp32, at most {args.max_new_tokens} new tokens, {args.threads} thread{"s" * (args.threads > 1)} of a CPU.

Each file is loaded as it is, once by this project and once by transformers alone, and both answer the same
prompts: ours with this project's generation, the other with transformers' `generate` in a left-padded batch. A
text that differs is beyond rounding where the two highest logits at the first token that differs are further
apart than four times what fp32 moves a logit there, against fp64.

{short if args.max_new_tokens < 512 else ""}{(chr(10) * 2).join(section for section in sections if section)}
"""


if __name__ == "__main__":
    sys.exit(main())
