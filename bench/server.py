"""Compare the answers of running servers with those of the model loaded here.

Greedy texts must be the local ones, with and without a thinking budget. Sampled ones are the server's own draws: a
second run must repeat them, and the samples of a question must differ. Start each server with the same weights, under
the name that --model-id says, then

    python bench/server.py --server vLLM=http://localhost:8000 --output results/servers.md

The CPU build of vLLM 0.32 crashes on a request with a seed whose prompt it reads in parts ("CPU Generator does not use
offset"): start it with --max-num-batched-tokens 32768.

Ends with exit code 1 where a server reads another prompt than the local run, or most of its greedy texts differ.
"""

import argparse
import contextlib
import io
import os
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import inference

GREEDY = {
    "cot": ("--mode", "cot", "--max-new-tokens", "96"),
    "chatml_think_prefill": ("--mode", "chatml_think_prefill", "--max-new-tokens", "96"),
    "chatml_think_prefill, budget 24": (
        "--mode",
        "chatml_think_prefill",
        "--think-budget",
        "24",
        "--max-new-tokens",
        "96",
    ),
    "thinking, budget 24": ("--mode", "thinking", "--no-do-sample", "--think-budget", "24", "--max-new-tokens", "96"),
}
SAMPLED = {
    "thinking, 4 samples": ("--mode", "thinking", "--num-samples", "4", "--max-new-tokens", "96"),
    "thinking, 4 samples, budget 24, --top-k 0": (
        "--mode", "thinking", "--num-samples", "4", "--top-k", "0", "--think-budget", "24", "--max-new-tokens", "96",
    ),
}  # fmt: skip


@common.command_line
def main(argv=None):
    args = parse_args(argv)
    apart, rows = 0, []
    for name, url in args.server:
        server = ("--server", url)
        for label, flags in GREEDY.items():
            cells, far = compare_greedy(run(args, flags, "--dtype", "fp32"), run(args, flags, *server))
            add_row(args, rows, f"| {name} | {label} | greedy | {cells} |")
            apart += far
        for label, flags in SAMPLED.items():
            try:
                cells = compare_sampled(run(args, flags, *server), run(args, flags, *server))
            except common.UserError as error:  # not every server takes top_k
                cells = f"refused: {str(error).rpartition('/v1: ')[2]} | - | - | -"
            add_row(args, rows, f"| {name} | {label} | sampled | {cells} |")
    return int(apart > 0)


def parse_args(argv):
    parser = common.ArgumentParser(
        "bench/server.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--server",
        nargs="+",
        required=True,
        type=name_and_url,
        metavar="NAME=URL",
        help="a name for the page, and the address",
    )
    add(
        "--model-id",
        default="demo/model",
        help="folder of the weights, and their name on the servers (default %(default)s)",
    )
    add("--dataset", default="demo/problems", help="folder with test.jsonl (default %(default)s)")
    add("--limit", type=common.at_least(2), default=16, help="questions (default %(default)s)")
    add("--output", type=Path, help="page to write (default none; it is printed too)")
    return parser.parse_args(argv)


def name_and_url(text):
    name, _, url = text.partition("=")
    if not name or not url:
        raise argparse.ArgumentTypeError(f"must be NAME=URL, such as vLLM=http://localhost:8000, got {text!r}")
    return name, inference.server_url(url)


def run(args, flags, *where) -> list[dict]:
    """The answers of inference.py with these flags, by question and sample; UserError where it refuses."""
    fixed = ["--model-id", args.model_id, "--dataset", args.dataset, "--limit", str(args.limit)]
    told = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "answers.jsonl")
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
                inference.main([*fixed, *flags, *where, "--output", str(path)])
        except SystemExit as error:
            lines = [line for line in told.getvalue().splitlines() if ": error: " in line]
            raise common.UserError(lines[-1].partition(": error: ")[2] if lines else told.getvalue()[-500:]) from error
        return [answer for _, answer in common.read_jsonl(path)]


def compare_greedy(local: list[dict], served: list[dict]) -> tuple[str, bool]:
    """The row's cells, and whether the server reads or writes something else than the local run."""
    pairs = list(zip(local, served, strict=True))
    same = {
        key: sum(one[key] == other[key] for one, other in pairs)
        for key in ("model_output", "prompt_tokens", "output_tokens", "finish_reason")
    }
    closed = (
        ""
        if "forced" not in local[0]
        else f"; {sum(a['forced'] for a in local)} and {sum(a['forced'] for a in served)} closed"
    )
    parted = [(one, other) for one, other in pairs if one["model_output"] != other["model_output"]]
    where = "; ".join(
        f"question {one['id']} parts after {len(os.path.commonprefix([one['model_output'], other['model_output']]))} characters"
        for one, other in parted[:3]
    )
    cells = (
        f"{same['model_output']} of {len(pairs)} texts as here{closed}",
        f"{same['prompt_tokens']} of {len(pairs)}",
        f"{same['output_tokens']} of {len(pairs)}",
        where or "-",
    )
    return " | ".join(cells), same["prompt_tokens"] < len(pairs) or 2 * same["model_output"] < len(pairs)


def compare_sampled(first: list[dict], second: list[dict]) -> str:
    pairs = list(zip(first, second, strict=True))
    again = sum(one["model_output"] == other["model_output"] for one, other in pairs)
    prompts = sum(one["prompt_tokens"] == other["prompt_tokens"] for one, other in pairs)
    lengths = sum(one["output_tokens"] == other["output_tokens"] for one, other in pairs)
    distinct = len({(one["id"], one["model_output"]) for one in first})
    return " | ".join(
        (
            f"{again} of {len(pairs)} texts the same in a second run; {distinct} distinct",
            f"{prompts} of {len(pairs)}",
            f"{lengths} of {len(pairs)}",
            "-",
        )
    )


def add_row(args, rows: list[str], row: str):
    """Print the row, and write the page with all there are: a stop keeps them."""
    rows.append(row)
    print(row, flush=True)
    if args.output:
        common.write_atomically(args.output, write_page(args, rows))


def write_page(args, lines: list[str]) -> str:
    return "\n".join(
        [
            "# Answers of servers beside those of the model loaded here",
            "",
            "Made by",
            "",
            f"    {args.command}",
            "",
            f"{args.limit} questions of {args.dataset}, {args.model_id} in fp32, {os.cpu_count()} cores of {platform.machine()}, without",
            "a GPU. Greedy rows compare a server with the local run. Sampled rows compare two runs of the server, whose draws",
            "are its own.",
            "",
            "| server | run | decoding | texts | same prompt tokens | same output tokens | where texts part |",
            "| --- | --- | --- | --- | ---: | ---: | --- |",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
