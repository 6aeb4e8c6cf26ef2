"""Measure generation on a CPU beside other processes, by how OpenMP's threads wait for one another.

Threads that spin at a barrier waste the time that a thread without a core needs. Each setting answers the same
questions with inference.py, by turns: alone, beside a process that never rests, and in two runs at once, whose
tokens/s are added. Prints a Markdown table.

    python bench/threads.py                                        # the demo's model
    python bench/threads.py --model-id FILE.gguf --dataset FOLDER --limit 32 --max-new-tokens 64
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import ArgumentParser, UserError, at_least, command_line

UNSET = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SETTINGS = {
    "as it comes": {},
    "OpenMP's own waiting": {"GOMP_SPINCOUNT": "300000"},
    "spins 100,000": {"GOMP_SPINCOUNT": "100000"},
    "spins 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spins 1,000": {"GOMP_SPINCOUNT": "1000"},
    "passive waiting": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = "while True: pass"
PLACES = ("alone", "beside a busy process", "two runs at once")


@command_line
def main(argv=None):
    args = parse_args(argv)
    names = args.settings or list(SETTINGS)
    rates = {(name, place): [] for name in names for place in PLACES}
    for _ in range(args.rounds):
        for (name, place), measured in rates.items():
            measured.append(tokens_per_second(args, SETTINGS[name], place))
            print(f"{name}, {place}: {measured[-1]:.0f}", file=sys.stderr)
    print(f"| tokens/s, {args.model_id}, {os.cpu_count()} cores | {' | '.join(PLACES)} |")
    print("| --- |" + " ---: |" * len(PLACES))
    for name in names:
        cells = (f"{statistics.median(rates[name, place]):.0f}" for place in PLACES)
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


def parse_args(argv):
    parser = ArgumentParser("threads.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-id", default="demo/model", help="folder or GGUF file (default %(default)s)")
    add("--dataset", default="demo/problems", help="folder with test.jsonl (default %(default)s)")
    add("--mode", default="cot", help="prompting mode (default %(default)s)")
    add("--limit", type=at_least(1), default=200, help="questions (default %(default)s)")
    add("--max-new-tokens", type=at_least(1), default=128, help="most new tokens an answer (default %(default)s)")
    add("--rounds", type=at_least(1), default=2, help="how often each is measured (default %(default)s)")
    add("--settings", nargs="+", choices=SETTINGS, help="the ways of waiting to measure (default all)")
    return parser.parse_args(argv)


def tokens_per_second(args, setting: dict, place: str) -> float:
    """Output tokens a second of all runs by their records, which count from the first prompt to the last answer."""
    environment = {key: value for key, value in os.environ.items() if key not in UNSET} | setting
    flags = {
        "--model-id": args.model_id, "--dataset": args.dataset, "--mode": args.mode, "--limit": args.limit,
        "--max-new-tokens": args.max_new_tokens, "--dtype": "fp32",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "inference.py"), *(str(part) for pair in flags.items() for part in pair)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    busy = subprocess.Popen([sys.executable, "-c", BUSY]) if place == "beside a busy process" else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder) / f"{number}.jsonl" for number in range(2 if place == "two runs at once" else 1)]
            started = [subprocess.Popen([*command, "--output", one], env=environment, **silent) for one in outputs]
            codes = [process.wait() for process in started]
            if any(codes):
                raise UserError(f"inference.py ended with exit code {max(codes)}: {' '.join(command)}")
            segments = [json.loads(one.with_suffix(".run.json").read_text())["segments"][-1] for one in outputs]
            return sum(segment["output_tokens"] / segment["seconds"] for segment in segments)
    finally:
        if busy:
            busy.kill()
            busy.wait()


if __name__ == "__main__":
    sys.exit(main())
