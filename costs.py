"""What the experiments of reproduce.py cost: the tokens of each, and an estimate of its time."""

import contextlib
import sys
from pathlib import Path

import train
import train_grpo
from common import ArgumentParser, UserError, command_line, is_run_record, printable, read_json
from data import load_questions

# Mean output tokens of an answer by Qwen3-0.6B, counted in the published outputs; thinking at 1,024 tokens at most.
ANSWER_TOKENS = {"zero_shot": 13, "cot": 176, "few_shot": 117, "thinking": 629, "chatml_think_prefill": 153}
# 22 % of those thoughts reached the limit. If thoughts end at a steady rate, such a one goes on for 670 tokens.
BEYOND_1024 = 147
EXAMPLE_TOKENS = 223  # of a GSM8K train question in chatml_think_prefill with its reference answer, counted
# Tokens a second of Qwen3-0.6B's shape in fp32 on two CPU cores, measured: 128 answers at once, and all weights trained
# in steps of 16 (results/speed-detail.md).
DEFAULT_RATES = {"generated": 144, "trained": 56}
GSM8K = {"train": 7473, "test": 1319}


def show_list(chosen, setup):
    """A line an experiment: its state, tokens to generate and to train on, and their time. A training counts once."""
    rates, seen, table, total = measured_rates(setup), set(), [], 0.0
    for row in chosen:
        answers, generated = answer_tokens(row, setup)
        trained = 0
        for training in trainings_of(row):
            if training.name not in seen:
                seen.add(training.name)
                trained += training_tokens(training, setup)
                generated += evaluation_tokens(training, setup)
        seconds = rates and generated / rates["generated"] + trained / rates["trained"]
        total += seconds or 0
        cells = row.name, row.group, state(row, setup), f"{answers:,}", f"{generated:,.0f}", f"{trained:,}"
        table.append((*cells, in_words(seconds) if rates else "-"))
    header = ("experiment", "group", "state", "answers", "tokens", "trained on", "time, about")
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    for line in (header, *table):
        cells = [
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    if not rates:
        print("\nNo time: nothing was measured for this model yet. Run one experiment, then list again.")
        return
    print(f"\n{len(table)} experiments, {len(seen)} trainings, about {in_words(total)} one after another")
    told = f"{rates['generated']:,.0f} tokens/s generated, {rates['trained']:,.0f} tokens/s trained on"
    print(f"Rates: {told}, {rates['source']}. Tokens include the answers by which a training is evaluated.")


def in_words(seconds):
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def trainings_of(row):
    return [] if row.training is None else row.training.best_of or [row.training]


def state(row, setup):
    here = [(setup.answers / f"{name}.jsonl") for name in row.files]
    if all(path.exists() for path in here):
        return "finished"
    if any(path.exists() or Path(f"{path}.part").exists() for path in here):
        return "begun"
    return "in results" if all((setup.results / f"{name}.jsonl.gz").exists() for name in row.files) else "-"


def answer_tokens(row, setup):
    """(answers, tokens to generate) of an experiment. Its own record says how long its answers are, where there is one."""
    split = row.flags.get("split", "test")
    limit = row.flags.get("limit") if split == "train" else setup.limit or row.flags.get("limit")
    answers = min(limit or sys.maxsize, count_questions(setup.dataset, split)) * row.flags.get("num_samples", 1)
    made = sum_records([path for name in row.files for path in records_of(name, setup)])
    budgets = row.flags.get("think_budget", ())
    if made["answers"]:
        return answers * len(row.files), round(answers * len(row.files) * made["output_tokens"] / made["answers"])
    most = row.flags.get("max_new_tokens") or max(budgets)
    mean = ANSWER_TOKENS[row.flags["mode"]]
    mean += BEYOND_1024 if row.flags["mode"] == "thinking" and most > 1024 else 0
    # A smaller budget takes over what the larger one made and adds an answer, at most as long as one of cot.
    return answers * len(row.files), answers * (min(mean, most) + ANSWER_TOKENS["cot"] * max(0, len(budgets) - 1))


def training_flags(training, setup):
    """The flags of a training, with its script's defaults for the others."""
    by_groups = training.script == "train_grpo.py"
    parser = train_grpo.build_parser() if by_groups else train.build_parser(training.script, None, None, None)
    defaults = vars(parser.parse_args(["--output-dir", training.name]))
    flags = defaults | setup.sizes.training | training.flags
    if flags["eval_questions"] is None:
        flags["eval_questions"] = min(train.EVAL_QUESTIONS, flags["eval_size"])
    if by_groups:
        flags["batch_size"] = flags["prompts_per_step"] * flags["num_generations"]
        flags["epochs"] *= flags["num_generations"]  # each question is answered so often
    return flags


def training_tokens(training, setup):
    flags = training_flags(training, setup)
    examples = (count_questions(setup.dataset, "train") - flags["eval_size"]) * flags["epochs"]
    steps = setup.max_steps or flags.get("max_steps")
    return EXAMPLE_TOKENS * (steps * flags["batch_size"] if steps else examples)


def evaluation_tokens(training, setup):
    """Tokens that a training generates: the completions that it learns from where it samples them, and the held-out answers.

    Held-out questions are answered at the start and after every epoch, in reinforcement learning after `eval_steps`.
    """
    flags = training_flags(training, setup)
    answer = ANSWER_TOKENS[flags["mode"] or "chatml_think_prefill"]
    trained = training_tokens(training, setup)
    if training.script == "train_grpo.py":
        sampled = trained // EXAMPLE_TOKENS
        times = 1 + -(-sampled // (flags["batch_size"] * flags["eval_steps"]))
        return (sampled + times * flags["eval_questions"]) * answer
    epoch = (count_questions(setup.dataset, "train") - flags["eval_size"]) * EXAMPLE_TOKENS
    times = 1 + -(-trained // max(1, epoch))
    return times * flags["eval_questions"] * answer


def count_questions(dataset, split):
    return GSM8K[split] if dataset == "openai/gsm8k" else len(load_questions(dataset, split))


def measured_rates(setup):
    """Tokens a second by the run records of this model; by those of Qwen3-0.6B's shape where it is that; else None."""
    made = sum_records([*setup.answers.glob("*.run.json"), *setup.results.glob("*.run.json")])
    if not made["seconds"]:
        return DEFAULT_RATES | {"source": "on two CPU cores"} if Path(setup.model).name == "Qwen3-0.6B" else None
    generated = made["output_tokens"] / made["seconds"]
    tokens, seconds = trained_so_far(setup)
    if seconds:
        return {"generated": generated, "trained": tokens / seconds, "source": "by this model's run records"}
    trained = generated * DEFAULT_RATES["trained"] / DEFAULT_RATES["generated"]
    source = "the first by this model's run records, the second computed from it"
    return {"generated": generated, "trained": trained, "source": source}


def trained_so_far(setup):
    """(tokens trained on, seconds) of the finished trainings by their records. The seconds hold their evaluation too."""
    tokens = seconds = 0
    paths = {path.parent.name: path for path in setup.trained.glob("*/train.run.json")}
    paths |= {path.name.removesuffix(".run.json"): path for path in (setup.results / "train").glob("*.run.json")}
    for record in map(record_in, paths.values()):
        if record.get("result") and record["decides"].get("method") != "grpo":  # whose time goes to sampling too
            tokens += steps_taken(record) * record["decides"]["batch_size"] * EXAMPLE_TOKENS
            seconds += sum(segment.get("seconds") or 0 for segment in record["segments"])
    return tokens, seconds


def steps_taken(record):
    """The last step of a finished training. Records made before name the step that was kept alone."""
    result = record["result"] or {}
    return result.get("last_step", result.get("step", 0))


def record_in(path):
    """A run record, or an empty one where the file holds none."""
    with contextlib.suppress(UserError):
        record = read_json(path)
        if is_run_record(record):
            return record
    return {"segments": [], "decides": {}}


def records_of(name, setup):
    paths = (setup.answers / f"{name}.run.json", setup.results / f"{name}.run.json")
    return [path for path in paths if path.exists()][:1]


def sum_records(paths):
    """Answers, output tokens and seconds over the finished segments of run records."""
    total = dict.fromkeys(("answers", "output_tokens", "seconds"), 0)
    for path in paths:
        for segment in record_in(path)["segments"]:
            if segment.get("seconds") and segment.get("output_tokens"):
                for name in total:
                    total[name] += segment[name]
    return total


@command_line
def main(argv=None):
    """Print what runs cost by their records, as Markdown."""
    parser = ArgumentParser("costs.py", description="Print what runs cost, by their run records, as a Markdown table.")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE.run.json", help="run records of answers and trainings"
    )
    lines = [cost(read_json(path), path) for path in parser.parse_args(argv).files]
    print("| device | model | command | answers or steps | time | tokens/s | peak memory |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for line in lines:
        print("| " + " | ".join(printable(cell).replace("|", "\\|") for cell in line) + " |")


def cost(record, path):
    """The cells of one run: of answers, or of a training, whose record has a result."""
    if not is_run_record(record):
        raise UserError(f"{path}: is no run record; pass files that end in .run.json")
    decides, segments = record["decides"], record["segments"]
    last, seconds = segments[-1], sum(segment.get("seconds") or 0 for segment in segments)
    tokens = sum(segment.get("output_tokens") or 0 for segment in segments)
    if "result" in record:
        rank = f" --rank {decides['rank']}" if decides.get("rank") else ""
        script = "train_grpo.py" if decides.get("method") == "grpo" else "train_lora.py" if rank else "train.py"
        done = f"{steps_taken(record):,} steps of {decides.get('batch_size')}"
        words = f"{script}{rank} --mode {decides.get('mode', 'chatml_think_prefill')}"
    else:
        done = f"{sum(segment.get('answers') or 0 for segment in segments):,}"
        words = f"inference.py --mode {decides.get('mode')}"
    model = Path(str(last.get("model")))
    peaks = [segment.get("peak_memory") or {} for segment in segments]
    memory = {
        kind: max(peak.get(kind, 0) for peak in peaks) for kind in sorted({kind for peak in peaks for kind in peak})
    }
    return [
        f"{last.get('device', 'server')}, {decides.get('dtype')}, threads {last.get('threads')}",
        str(model) if len(model.parts) < 3 else model.name,
        words,
        done,
        in_words(seconds),
        f"{tokens / seconds:,.0f}" if tokens and seconds else "-",
        ", ".join(f"{size / 2**30:.1f} GiB {kind}" for kind, size in memory.items()) or "-",
    ]


if __name__ == "__main__":
    sys.exit(main())
