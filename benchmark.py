"""Score GSM8K completions: three readings of every answer, with intervals.

    python benchmark.py outputs/cot_model_outputs.jsonl outputs/thinking_model_outputs.jsonl
    python benchmark.py FILES --compare --published     # runs as pairs; beside the published figures
    python benchmark.py FILES --plot runs.png --html runs.html --wrong 5
    python benchmark.py FILES --json                    # one object a file, for programs
    python benchmark.py samples_gsm8k_*.jsonl --compare # files of EleutherAI's harness, as they are
    python benchmark.py FILES --gold madrylab/gsm8k-platinum       # the same answers against other references
    python benchmark.py FILES --cluster template --cluster-from demo/problems
    python benchmark.py TRAIN_RUNS --keep-correct right.jsonl      # the model's own right answers, to train on

Reads any JSONL whose lines hold `question`, `model_output` and `ground_truth_answer`, or these under other names;
the further keys that `inference.py` writes are used where they stand. Nothing is loaded but text:
torch is not imported, and a file in the order that `inference.py` writes is read as a stream.

The readings are `score_published`, `score_final` and `read_lenient` in `reading.py`. The first is the rule
behind the published figures; the second takes the answer as a careful reader would, and tells an
answer that never came (unfinished, no answer) from one that is wrong. The third also takes it from other
forms than the asked one, so the gap between the two is a matter of format; it never replaces the second.

Accuracies carry 95 % intervals: Wilson's for one sample a question. Samples of one question are not independent, nor
are questions made from one template: for several samples, and with --cluster, the interval is Student's t with
cluster-robust standard errors, with one degree less than clusters.
"""

import json
import sys
from pathlib import Path

from answers import FORMAT, Format, read_rows, same_text
from common import PUBLISHED_KEYS, ArgumentParser, UserError, command_line, write_atomically
from data import Columns, load_questions, name_other_flag
from pictures import plot
from report import print_wrong, report, summary, write_page
from scores import (
    compare_runs,
    load_published,
    name_runs,
    pool_seeds,
    published_names,
    read_again,
    read_record,
    score_run,
)


@command_line
def main(argv=None):
    options = parse(argv)
    format = file_format(options)
    keep = options.compare or options.pool_seeds
    files = name_runs([score_run(path, format, keep) for path in options.files])
    runs = pool_seeds(files) if options.pool_seeds else files
    published = load_published(runs) if options.published else {}
    if options.published and not published:
        print(f"--published: no file has the name of a published row: {', '.join(published_names())}", file=sys.stderr)
    comparisons = compare_runs(runs) if options.compare else []
    if options.json:
        print(json.dumps([summary(run, published, comparisons) for run in runs], indent=2))
    else:
        report(runs, published, comparisons, options)
    for run in files if options.wrong else ():
        print_wrong(run, format, options.wrong)
    if options.plot:
        plot(runs, published, comparisons, options.plot)
    if options.html:
        write_page(files, published, comparisons, format, options.html)
        print(f"{options.html}: open it in a browser", file=sys.stderr)
    if options.keep_correct:
        keep_correct(files, format, options.keep_correct, options.keep_most)


def parse(argv):
    parser = ArgumentParser(description="Score GSM8K completions: three readings of every answer, with intervals.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSONL files of completions")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON array, an object a file, and no table")
    output.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--compare", action="store_true", help="test every two files as pairs over their questions")
    parser.add_argument("--published", action="store_true", help="set known rows beside their published figures")
    parser.add_argument(
        "--pool-seeds",
        action="store_true",
        help="take files whose names differ in a last -seedN alone for one run, each seed a sample of every question",
    )
    parser.add_argument(
        "--commands", action="store_true", help="add the wall time and the command of each run's record"
    )
    parser.add_argument(
        "--wrong", type=int, default=0, metavar="N", help="print N answers of each file that are not right"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracies and what became of the answers")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write one page for reading the answers")
    parser.add_argument(
        "--keep-correct",
        type=Path,
        metavar="OUT.jsonl",
        help="write the distinct right completions of runs over a train split, to train on",
    )
    parser.add_argument(
        "--keep-most", type=int, default=4, metavar="M", help="with --keep-correct: the M shortest a question (4)"
    )
    parser.add_argument(
        "--thinking",
        choices=("yes", "no"),
        help="whether completions may hold a thought, open from the start; default: as lines and texts say",
    )
    parser.add_argument(
        "--question-column", default=FORMAT.question, metavar="NAME", help="key of the question (default: %(default)s)"
    )
    parser.add_argument(
        "--answer-column",
        default=FORMAT.answer,
        metavar="NAME",
        help="key of the reference answer: a number, or text that ends in `#### N` (default: %(default)s)",
    )
    parser.add_argument(
        "--output-column",
        default=FORMAT.output,
        metavar="NAME",
        help="key of what the model wrote (default: %(default)s); files of EleutherAI's harness need none of the three",
    )
    parser.add_argument(
        "--gold",
        metavar="FILE|HUB_ID",
        help="score against the answers of another data set, matched by the question's text; what has none is left out",
    )
    parser.add_argument(
        "--cluster",
        metavar="KEY",
        help="key of what questions share, such as the template they were made from: intervals and tests count it once",
    )
    parser.add_argument(
        "--cluster-from",
        metavar="DATASET",
        help="data set that holds the --cluster key, for files that lack it; matched by the question's text",
    )
    parser.add_argument("--skip-bad", action="store_true", help="count lines that cannot be read, and score the rest")
    options = parser.parse_args(argv)
    if options.wrong < 0:
        raise UserError(f"--wrong {options.wrong}: pass how many answers to print, 1 or more")
    if options.wrong and options.json:
        raise UserError("--wrong prints text, --json nothing but JSON: pass one of them")
    if options.compare and len(options.files) < 2:
        raise UserError("--compare: pass two files or more")
    read = set()
    for path in options.files if options.compare or options.pool_seeds else ():
        if path.resolve() in read:
            raise UserError(f"{path}: is named twice; --compare and --pool-seeds take each file for a run of its own")
        read.add(path.resolve())
    if options.cluster_from and not options.cluster:
        raise UserError("--cluster-from: pass the key too, with --cluster KEY")
    if options.keep_most < 1:
        raise UserError(f"--keep-most {options.keep_most}: pass how many completions of a question to keep, 1 or more")
    outputs = ("--plot", options.plot, ".png"), ("--html", options.html, ".html")
    for flag, path, ending in (*outputs, ("--keep-correct", options.keep_correct, ".jsonl")):
        if path and (path.suffix.lower() != ending or not path.parent.is_dir() or path.is_dir()):
            raise UserError(f"{flag} {path}: pass a file that ends in {ending}, in a folder that exists")
        if path and path.resolve() in [file.resolve() for file in options.files]:
            raise UserError(f"{flag} {path}: would overwrite a file to score; pass another name")
    return options


def file_format(options):
    """How the files are read: the flags that say so, with what --gold and --cluster-from name."""
    golds, clusters = None, {}
    splits = {(read_record(path) or {"decides": {}})["decides"].get("split") or "test" for path in options.files}
    if options.gold:
        questions = load_other("--gold", options.gold, splits)
        golds = {same_text(question.question): question.answer for question in questions}
    if options.cluster_from:
        questions = load_other("--cluster-from", options.cluster_from, splits, Columns(keep=(options.cluster,)))
        clusters = {same_text(question.question): question.kept[options.cluster] for question in questions}
    return Format(
        options.question_column,
        options.answer_column,
        options.output_column,
        golds,
        options.cluster,
        clusters,
        options.thinking,
        options.skip_bad,
    )


def load_other(flag, dataset, splits, columns=Columns()):
    """The questions of a data set that a flag names, of the splits that the files were made from."""
    try:
        return [question for split in sorted(splits) for question in load_questions(dataset, split, columns=columns)]
    except UserError as error:
        raise name_other_flag(error, flag) from error


def keep_correct(runs, format, path, most):
    """Write the distinct right completions of the runs, of each question the shortest, in the order of ids.

    Only what the model wrote to its end by itself: a completion that was cut would teach it not to stop,
    one whose thought was closed for it to write what closed it, one that ran on to make up questions.
    """
    for run in runs:
        refuse_test_split(run, format)
    right = {}
    for run in runs:
        system_prompt = read_record(run.path)["decides"].get("system_prompt")
        for row, reading, status in read_again(run, format):
            if status == "right" and row.finish_reason != "length" and not row.forced and not reading.ran_on:
                key = str(type(row.id)), row.id, row.question
                right.setdefault(key, {}).setdefault(row.text, (row, system_prompt))
    keys = (*PUBLISHED_KEYS, "mode", "sample", "thinking_open", "system_prompt")
    lines = []
    for _, completions in sorted(right.items()):
        for _, (row, system_prompt) in sorted(completions.items(), key=lambda item: (len(item[0]), item[0]))[:most]:
            values = row.id, row.question, row.text, row.answer, row.mode, row.sample, row.thinking_open, system_prompt
            lines.append(json.dumps(dict(zip(keys, values, strict=True))) + "\n")
    try:
        write_atomically(path, "".join(lines))
    except OSError as error:
        raise UserError(f"--keep-correct {path}: cannot be written: {error.strerror}") from error
    print(f"{path}: {len(lines):,} right completions of {len(right):,} questions", file=sys.stderr)


def refuse_test_split(run, format):
    """Refuse what is not certain to hold no test question: by the run record, and by the questions themselves."""
    record = read_record(run.path)
    if record is None or record["decides"].get("split") != "train":
        raise UserError(
            f"--keep-correct: {run.path}: no run record beside it says --split train; test answers stay out"
        )
    made = record["segments"][-1]
    dataset = str(made.get("dataset"))
    if Path(dataset).is_file():  # it stands for the split that was asked for, and there is no other
        return
    columns = Columns(made.get("question_column") or ["question"], made.get("answer_column") or "answer")
    questions = load_questions(dataset, "test", made.get("dataset_config"), columns)
    test = {question.question.strip() for question in questions}
    if any(row.question.strip() in test for row in read_rows(run.path, format, [])):
        raise UserError(f"--keep-correct: {run.path}: holds questions of the test split of {dataset}")


if __name__ == "__main__":
    main()
