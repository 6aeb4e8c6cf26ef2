"""Fill the README's tables with what their commands print.

    python bench/readme.py

A table stands between `<!-- COMMAND -->` and `<!-- end -->`. COMMAND is one that a person can type in this folder,
with `*` and `{a,b}` as a shell reads them, or a name of MADE_HERE.
"""

import contextlib
import glob
import io
import re
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import benchmark
import costs
import reproduce
from common import UserError, command_line, read_json, read_jsonl, write_atomically
from reading import score_final

BLOCK = re.compile(r"(<!-- (?!end )([^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
SCRIPTS = {"benchmark.py": benchmark.main, "costs.py": costs.main, "reproduce.py": reproduce.main}


@command_line
def main(argv=None):
    if sys.argv[1:] if argv is None else argv:
        raise UserError("takes no arguments")
    page = ROOT / "README.md"
    write_atomically(page, filled(page.read_text()))


def filled(text):
    """The text with every table made anew."""
    with contextlib.chdir(ROOT):
        return BLOCK.sub(lambda block: f"{block[1]}{made(block[2])}\n{block[3]}", text)


def made(command):
    """What stands in the block of a command."""
    if command in MADE_HERE:
        return MADE_HERE[command]().strip()
    python, script, *words = (word for typed in shlex.split(command) for word in expanded(typed))
    if python != "python" or script not in SCRIPTS:
        raise UserError(f"README.md: <!-- {command} -->: must be python and one of {', '.join(SCRIPTS)}")
    return printed(SCRIPTS[script], words)


def expanded(word):
    """The words for which a word stands in a shell: {a,b} and the files that match *."""
    braces = re.search(r"\{([^{}]*)\}", word)
    if braces:
        parts = (word[: braces.start()] + part + word[braces.end() :] for part in braces[1].split(","))
        return [whole for part in parts for whole in expanded(part)]
    return sorted(glob.glob(word)) if "*" in word else [word]


def printed(main, words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main(words)
    return text.getvalue().strip()


def published():
    """The rows of results/published.json."""
    lines = ["| run | mode | published % | from its file % |", "| --- | --- | ---: | ---: |"]
    for name, row in read_json(ROOT / "results/published.json")["rows"].items():
        cells = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("published", "file"))
        lines.append(f"| `{name}` | {row['protocol']['mode']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scoring():
    """The first table of results/scoring.md."""
    return re.search(r"^\|.*?(?=\n\n)", (ROOT / "results/scoring.md").read_text(), re.DOTALL | re.MULTILINE)[0]


def estimate():
    """The end of `python reproduce.py list` where nothing has been run yet."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        text = printed(reproduce.main, ["list"])
    return "```\n" + text.partition("\n\n")[2] + "\n```"


def example():
    """The demo's first right cot answer of three steps, with its question."""
    for _, line in read_jsonl(ROOT / "results/demo/cot.jsonl"):
        answer = line["model_output"]
        if answer.count("\n") == 3 and score_final(answer, line["ground_truth_answer"]) == "right":
            return f"```\nQuestion: {line['question']}\n\n{answer}\n```"
    raise UserError("results/demo/cot.jsonl: holds no such answer")


def real():
    """For every model in results/ a table with a row for each experiment of the group real."""
    tables = []
    for folder in sorted((ROOT / "results").glob("*/")):
        paths = [folder / f"{row.name}.jsonl.gz" for row in reproduce.real_experiments() if row.group == "real"]
        files = [str(path.relative_to(ROOT)) for path in paths if path.exists()]
        if files:
            tables.append(f"`{folder.name}`\n\n{printed(benchmark.main, [*files, '--markdown'])}")
    return "\n\n".join(tables) or "None has been run yet."


MADE_HERE = {"real": real, "published": published, "scoring": scoring, "estimate": estimate, "example": example}

if __name__ == "__main__":
    sys.exit(main())
