"""Run this project's experiments, each a command that a person can type, and report what they came to.

    python reproduce.py list                                    # every experiment, its tokens and an estimated time
    python reproduce.py run                                     # all of published, controls, recipes and past
    python reproduce.py run cot_model_outputs recipes           # experiments and groups by name
    python reproduce.py run controls --dry-run                  # show the commands, run nothing
    python reproduce.py report                                  # write results/NAME/README.md and its pictures
    python reproduce.py run real --model-id FILE.gguf --dataset FOLDER --name smollm2

An experiment is one run of inference.py. The training that it needs is run first. A finished experiment is left
alone, a stopped one goes on when the same command is given again, and one whose run record differs from the table
below is made again.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import benchmark
from common import (
    DTYPES,
    ArgumentParser,
    UserError,
    at_least,
    command_line,
    log,
    printable,
    read_json,
    replacing,
    write_atomically,
)
from costs import record_in, show_list
from data import Columns, load_questions
from demo import sweep
from scores import PUBLISHED_FILE, PUBLISHER, SEED

ROOT = Path(__file__).parent


# ---- The table


@dataclass(frozen=True)
class Training:
    """One fine-tuned model. `flags` are those of the script, with underscores."""

    name: str
    flags: dict
    script: str = "train.py"
    learns_from: str | None = None  # an experiment on the train split: trained on its right answers, not on references
    best_of: tuple = ()  # trainings that differ in their rate: demo/sweep.py takes the best of them for this one


@dataclass(frozen=True)
class Experiment:
    """One run of inference.py. `flags` are its own, with underscores; `training` makes its model, else it is the base."""

    name: str
    group: str
    flags: dict
    training: Training | None = None

    @property
    def files(self):
        """The names of the files that it writes: one for each thinking budget, else one."""
        return [f"{self.name}-budget-{budget}" for budget in self.flags.get("think_budget", ())] or [self.name]


@dataclass(frozen=True)
class Sizes:
    """What differs between a real model and the demo's, where all must be small."""

    seeds: tuple = (42,)
    jobs: int = 1
    training: dict = field(default_factory=dict)  # flags of every training
    own_training: dict = field(default_factory=lambda: {"max_steps": 400})  # of training on own right answers
    train_questions: int | None = None  # of the train split, to find own right answers for
    budgets: tuple = (512, 1024, 2048, 4096)
    threads: int | None = None  # of each process
    demo: bool = False  # whether the groups `rates` and `grpo` are there: their rates and steps suit the demo alone


DEMO = "demo/model"
DEMO_SIZES = Sizes(
    seeds=(1, 2, 3),
    jobs=2,
    training={"max_steps": 100, "eval_questions": 200},
    own_training={"learning_rate": 1e-3},
    train_questions=1000,
    budgets=(32, 64, 128, 256),
    demo=True,
    threads=1,  # a model this small gains nothing from a second, and one adds up in the same order every time
)
DEFAULT_GROUPS = ("published", "controls", "recipes", "past")

COT = {"mode": "cot", "max_new_tokens": 512}
PREFILL = {"mode": "chatml_think_prefill", "max_new_tokens": 1024}
SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
THINKING = {"mode": "thinking", **SAMPLED, "max_new_tokens": 4096}


def experiments(sizes):
    """All experiments, in the order in which they are run and reported."""
    return [
        *published_experiments(),
        *control_experiments(),
        *recipe_experiments(sizes),
        *past_experiments(sizes),
        *real_experiments(),
        *(rate_experiments() + grpo_experiments(sizes) if sizes.demo else []),
    ]


def published_experiments():
    """The published rows: their decoding and training, with this project's wording of the prompts."""
    found = []
    for name, row in read_json(PUBLISHED_FILE)["rows"].items():
        flags = {key: value for key, value in row["protocol"].items() if key != "model"}
        training = row.get("training")
        found.append(Experiment(name, "published", flags, training and published_training(**training)))
    return found


def published_training(name, **flags):
    return Training(name, flags, "train_lora.py" if "rank" in flags else "train.py")


def control_experiments():
    """Without them 66.7 against 48.1 compares mode, decoding and token limit at once."""
    trained = {row.training.name: row.training for row in published_experiments() if row.training}
    return [
        Experiment("base-prefill-1024", "controls", PREFILL),
        Experiment("base-prefill-4096", "controls", PREFILL | {"max_new_tokens": 4096}),
        Experiment("thinking-4096", "controls", THINKING | {"num_samples": 4}),
        *(
            Experiment(f"{name}-cot", "controls", COT, trained[f"Qwen3-GSM8k-{name}"])
            for name in ("SFT-FP32-eval-score", "SFT-FP32", "SFT-BF16")
        ),
    ]


def recipe_experiments(sizes):
    """This project's default rates, greedy; each seed is a training."""
    recipes = {
        "sft": ("train.py", {}),
        "lora-r4": ("train_lora.py", {"rank": 4}),
        "lora-r32": ("train_lora.py", {"rank": 32}),
        "sft-without-annotations": ("train.py", {"strip_annotations": True}),
    }
    found = []
    for recipe, (script, flags) in recipes.items():
        for seed in sizes.seeds:
            name = f"{recipe}-seed{seed}"
            found.append(Experiment(name, "recipes", PREFILL, Training(name, flags | {"seed": seed}, script)))
    return found


def past_experiments(sizes):
    """Thinking budgets, votes, and training on own right answers in place of the references."""
    sampled = {key: value for key, value in THINKING.items() if key != "max_new_tokens"}
    found = [
        Experiment("thinking", "past", sampled | {"think_budget": sizes.budgets}),
        Experiment("maj8", "past", THINKING | {"num_samples": 8}),
        Experiment("of-train", "past", train_split(THINKING | {"num_samples": 4}, sizes.train_questions)),
    ]
    for source, learns_from in (("own-answers", "of-train"), ("references", None)):
        for seed in sizes.seeds:
            name = f"{source}-seed{seed}"
            training = Training(name, sizes.own_training | {"seed": seed}, learns_from=learns_from)
            found.append(Experiment(name, "past", THINKING | {"num_samples": 4}, training))
    return found


def train_split(flags, questions):
    return flags | {"split": "train", "limit": questions}


def real_experiments():
    """What is asked of a real model on a machine without a GPU: everything in cot, on the first 660 questions."""
    first = {"limit": 660}
    short = {"mode": "cot", "max_steps": 100, "eval_questions": 100}
    trainings = [
        Training("sft-cot", short),
        Training("lora-r4-cot", short | {"rank": 4}, "train_lora.py"),
        Training("lora-r32-cot", short | {"rank": 32}, "train_lora.py"),
    ]
    own = [
        Training("own-answers-cot", short, learns_from="of-train-cot"),
        Training("references-cot", short),
    ]
    return [
        Experiment("cot", "real", COT | first),
        Experiment("few_shot", "real", COT | {"mode": "few_shot", "few_shot_k": 3} | first),
        Experiment("zero_shot", "real", COT | {"mode": "zero_shot"} | first),
        *(Experiment(training.name, "real", COT | first, training) for training in trainings),
        Experiment("prefill", "real", PREFILL | {"limit": 200}),
        Experiment("cot-4-samples", "real", COT | {"do_sample": True, "num_samples": 4, "limit": 200}),
        Experiment("of-train-cot", "real-own", train_split(COT | {"do_sample": True}, 2000)),
        *(Experiment(training.name, "real-own", COT | first, training) for training in own),
    ]


RATES = {"full": ("3e-3", "1e-2", "3e-2"), "lora-r4": ("1e-2", "3e-2", "5e-2"), "lora-r32": ("5e-3", "1e-2", "3e-2")}
PUBLISHED_RATE = "1e-6"


def rate_experiments():
    """The demo trained at the published rate, and at the best of three others by held-out problems."""
    flags = {"mode": "chatml_think_prefill", "max_new_tokens": 512}
    trainings = {
        method: [rate_training(method, rate) for rate in (PUBLISHED_RATE, *rates)] for method, rates in RATES.items()
    }
    every = tuple(training for method in trainings.values() for training in method)
    found = [Experiment("base", "rates", flags)]
    for method, (published, *_) in trainings.items():
        best = Training(f"rates/{method}/best", {}, best_of=every)
        found.append(Experiment(f"{method}_{PUBLISHED_RATE}", "rates", flags, published))
        found.append(Experiment(f"{method}_best", "rates", flags, best))
    return found


def rate_training(method, rate):
    flags = {"max_steps": 80, "eval_questions": 300, "learning_rate": float(rate)}
    if method == "full":
        return Training(f"rates/{method}/{rate}", flags)
    return Training(f"rates/{method}/{rate}", flags | {"rank": int(method.removeprefix("lora-r"))}, "train_lora.py")


# Chosen by held-out train questions (results/training.md). Sampled as the answers are, the reward is their score.
GRPO = {"mode": "thinking", "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_completion_length": 256,
        "prompts_per_step": 32, "learning_rate": 1e-3, "lr_scheduler": "linear", "max_steps": 700, "eval_steps": 100,
        "eval_questions": 300}  # fmt: skip
# Steps in about the processor time of GRPO's, evaluations included; own answers are sampled in that time too.
EQUAL_TIME = {"own-answers-as-long": 3000, "references-as-long": 3100}


def grpo_experiments(sizes):
    """Reinforcement learning, and for as long training on own right answers and on references."""
    trainings = []
    for seed in sizes.seeds:
        trainings.append(Training(f"grpo-seed{seed}", GRPO | {"seed": seed}, "train_grpo.py"))
        for source, steps in EQUAL_TIME.items():
            learns_from = "of-train" if source.startswith("own") else None
            flags = sizes.own_training | {"max_steps": steps, "seed": seed}
            trainings.append(Training(f"{source}-seed{seed}", flags, learns_from=learns_from))
    return [Experiment(training.name, "grpo", THINKING | {"num_samples": 4}, training) for training in trainings]


# ---- The commands


@dataclass(frozen=True)
class Setup:
    """What every command of one call shares."""

    model: str
    dataset: str
    name: str
    answers: Path  # folder of the answers
    trained: Path  # folder of the trained models
    sizes: Sizes
    limit: int | None = None
    max_steps: int | None = None
    dtype: str | None = None  # of what the table gives none
    checkpoints: str | None = None  # hub user or folder with the published checkpoints, in place of own training

    @property
    def results(self):
        return Path("results") / self.name


@dataclass(frozen=True)
class Step:
    """One command. `needs` are names of steps that must end before it."""

    name: str
    command: tuple  # the script and its arguments
    needs: tuple = ()


@command_line
def main(argv=None):
    args = parse_args(argv)
    setup = read_setup(args)
    table = experiments(setup.sizes)
    chosen = choose(table, args.names)
    if args.action == "list":
        show_list(chosen, setup)
    elif args.action == "report":
        write_report(table, setup)
    elif args.dry_run:
        for step in plan(chosen, table, setup):
            print(as_typed(step))
    else:
        if args.resume:
            restore(chosen, setup)
            chosen = [row for row in chosen if not is_kept(row, table, setup)]
        run_all(plan(chosen, table, setup), args.jobs or setup.sizes.jobs, setup)
    return 0


def parse_args(argv):
    parser = ArgumentParser("reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("action", choices=("list", "run", "report"), help="show the experiments, run them, or report what is there")
    add("names", nargs="*", metavar="NAME|GROUP",
        help=f"experiments and groups, also names without -seedN (default the groups {', '.join(DEFAULT_GROUPS)})")  # fmt: skip
    add("--model-id", default="Qwen/Qwen3-0.6B", help="hub id, folder or .gguf file (default %(default)s)")
    add("--dataset", default="openai/gsm8k", help="hub id or folder with the questions (default %(default)s)")
    add("--name", help="folder under results/ for the report (default after --model-id)")
    add("--out", type=Path, help="folder for answers and trained models (default outputs/NAME)")
    add("--limit", type=at_least(1), help="answer the first LIMIT test questions in every experiment")
    add("--max-steps", type=at_least(1), help="train for so many steps in every training")
    add(
        "--dtype", choices=DTYPES, help="precision of every command for which the table has none (default the scripts')"
    )
    add("--seeds", type=at_least(0), nargs="+", metavar="N", help="a training for each seed where seeds are compared")
    add("--jobs", type=at_least(1, 64), help="commands at once (default 1, for the demo 2)")
    add("--checkpoints", choices=("published",),
        help="published: answer with the published fine-tuned weights, not with models trained here")  # fmt: skip
    add("--resume", action="store_true",
        help="first copy answers from results/NAME to where they are missing, so that a fresh clone goes on from them")  # fmt: skip
    add("--dry-run", action="store_true", help="with run: print the commands and run nothing")
    return parser.parse_intermixed_args(argv)  # so that names may stand behind flags


def read_setup(args):
    sizes = DEMO_SIZES if args.model_id.rstrip("/") == DEMO else Sizes()
    name = args.name or default_name(args.model_id)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"--name {name}: must be a folder under results/")
    out = args.out or Path("outputs") / name
    published = f"-{args.checkpoints}" if args.checkpoints else ""
    return Setup(
        model=args.model_id,
        dataset=args.dataset,
        name=name + published,
        answers=out.with_name(out.name + published),
        trained=out / "train",
        sizes=replace(sizes, seeds=tuple(args.seeds)) if args.seeds else sizes,
        limit=args.limit,
        max_steps=args.max_steps,
        dtype=args.dtype,
        checkpoints=PUBLISHER if args.checkpoints else None,
    )


def default_name(model):
    """The hub id, or the folder where it lies inside this one; of other folders and of files the last name alone."""
    path = Path(model)
    if path.is_absolute() or ".." in path.parts or path.is_file():
        return path.name.removesuffix(".gguf")
    return str(path)


def choose(table, names):
    """The experiments that the names mean, in the order of the table."""
    known = {word for row in table for word in called(row)}
    for name in names:
        if name not in known:
            raise UserError(f"{name}: no such experiment or group; python reproduce.py list shows those of every group")
    return [row for row in table if called(row) & set(names or DEFAULT_GROUPS)]


def called(row):
    """What an experiment can be called: by its name, that of its files, without its seed, and by its group."""
    return {row.name, *row.files, SEED.sub("", row.name), row.group}


def plan(chosen, table, setup):
    """The Steps that the chosen experiments need, each once, in an order that can be run."""
    steps = {}
    for row in chosen:
        for step in experiment_steps(row, table, setup):
            steps.setdefault(step.name, step)
    return list(steps.values())


def experiment_steps(row, table, setup):
    model, before = setup.model, []
    if row.training and setup.checkpoints and row.training.name.startswith("Qwen3-GSM8k-"):
        model = f"{setup.checkpoints}/{row.training.name}"
    elif row.training:
        model = setup.trained / row.training.name
        before = training_steps(row.training, table, setup)
    output = setup.answers / f"{row.name}.jsonl"
    shared = {"overwrite": "changed", "dataset": setup.dataset, "output": output, "model_id": model}
    limit = {} if row.flags.get("split") == "train" else given(limit=setup.limit)
    command = ("inference.py", *arguments(shared | given(dtype=setup.dtype) | row.flags | limit))
    return [*before, Step(row.name, command, tuple(step.name for step in before))]


def training_steps(training, table, setup):
    """What makes a model: its own command last, before it those that make what it learns from."""
    name = f"train/{training.name}"
    if training.best_of:
        before = [step for other in training.best_of for step in training_steps(other, table, setup)]
        command = ("demo/sweep.py", str(setup.trained / "rates"))
        return [*before, Step("best rates", command, tuple(step.name for step in before))]
    shared = {
        "overwrite": "changed",
        "model_id": setup.model,
        "dataset": setup.dataset,
        "output_dir": setup.trained / training.name,
    }
    before, learned = [], {}
    if training.learns_from:
        source = next(row for row in table if row.name == training.learns_from)
        right = setup.answers / f"{source.name}-right.jsonl"
        command = ("benchmark.py", str(setup.answers / f"{source.name}.jsonl"), "--keep-correct", str(right))
        before = [*experiment_steps(source, table, setup), Step(right.stem, command, (source.name,))]
        learned = {"completions": right}
    sizes = setup.sizes.training | given(dtype=setup.dtype)
    flags = shared | sizes | training.flags | learned | given(max_steps=setup.max_steps)
    return [*before, Step(name, (training.script, *arguments(flags)), tuple(step.name for step in before))]


def given(**flags):
    return {name: value for name, value in flags.items() if value is not None}


def arguments(flags):
    """Flags as a command line has them. True stands for a flag alone, None and False for none."""
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [f"{one:g}" if isinstance(one, float) else str(one) for one in listed(value)]
    return words


def listed(value):
    return value if isinstance(value, (list, tuple)) else [value]


def as_typed(step):
    return shlex.join(["python", *step.command])


# ---- Running them


def run_all(steps, jobs, setup):
    """Run the steps, `jobs` at once. The first that fails ends all; what is on disk then is where the next run goes on."""
    environment = os.environ.copy()
    if setup.sizes.threads:
        environment.setdefault("OMP_NUM_THREADS", str(setup.sizes.threads))
    waiting, running, done = list(steps), {}, set()
    setup.answers.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            ready = [step for step in waiting if done.issuperset(step.needs)]
            for step in ready[: jobs - len(running)]:
                waiting.remove(step)
                running[step.name] = start(step, len(steps) - len(waiting), len(steps), jobs, environment, setup)
            time.sleep(0.05)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    check(process, next(step for step in steps if step.name == name), jobs, setup)
                    done.add(name)
    finally:  # after a failure or a signal
        for process in running.values():
            process.terminate()  # the scripts keep what is finished
        for process in running.values():
            process.wait()


def start(step, number, steps, jobs, environment, setup):
    """The step's process, in a session of its own: Ctrl-C reaches this process alone, which then ends the others once."""
    log(f"[{number}/{steps}] {as_typed(step)}")
    script, *words = step.command
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(log_file(step, setup), "wb")) if jobs > 1 else None
        command = [sys.executable, "-u", str(ROOT / script), *words]
        return subprocess.Popen(
            command, stdout=output, stderr=output and subprocess.STDOUT, env=environment, start_new_session=True
        )


def log_file(step, setup):
    return setup.answers / f"{step.name.replace('/', '-')}.log"


def check(process, step, jobs, setup):
    if process.returncode:
        where = f"; {log_file(step, setup)} ends: {last_line(log_file(step, setup))}" if jobs > 1 else ", as said above"
        raise UserError(f"{step.name}: failed with exit code {process.returncode}{where}")


def last_line(path):
    lines = path.read_text(errors="replace").strip().splitlines()
    return printable(lines[-1]) if lines else "nothing"


# ---- From results/NAME back to the folder of answers


def restore(chosen, setup):
    """Copy to the folder of answers what results/NAME holds and it lacks."""
    setup.answers.mkdir(parents=True, exist_ok=True)
    for name in (name for row in chosen for name in row.files):
        finished, begun = setup.answers / f"{name}.jsonl", setup.answers / f"{name}.jsonl.part"
        if finished.exists() or begun.exists():
            continue
        for stem, path in ((name, finished), (f"{name}.part", begun)):
            packed, record = setup.results / f"{stem}.jsonl.gz", setup.results / f"{stem}.run.json"
            if packed.exists() and record.exists():
                write_atomically(setup.answers / f"{name}.run.json", record.read_text(encoding="utf-8"))
                write_atomically(path, gzip.decompress(packed.read_bytes()).decode())
                log(f"{path}: taken from {packed}")


def is_kept(row, table, setup):
    """Whether an experiment is finished by this very command and only its trained model is not here: nothing is to do."""
    output = setup.answers / f"{row.name}.jsonl"
    if row.training is None or (setup.trained / row.training.name).exists() or not output.exists():
        return False
    segments = record_in(setup.answers / f"{row.name}.run.json")["segments"]
    wanted = as_typed(experiment_steps(row, table, setup)[-1])
    made = str(segments[-1].get("command")) if segments else ""
    same = without_folders(made, setup) == without_folders(wanted, setup)
    kept = same and not Path(f"{output}.part").exists()
    if kept:
        log(f"{row.name}: finished, and left alone though its trained model is not here")
    return kept


# ---- The report


HEADINGS = {
    "published": "The published rows",
    "controls": "Controls",
    "recipes": "Better recipes",
    "past": "Past the published accuracy",
    "real": "Prompted, and fine-tuned in cot",
    "real-own": "Trained on own right answers; of-train-cot is their source, on train questions",
    "rates": "Learning rates",
    "grpo": "Reinforcement learning",
}
BASES = {
    "recipes": "base-prefill-1024",
    "past": "thinking-4096",
    "real-own": "cot",
    "grpo": "thinking-4096",
}  # stands beside the group
BEST_PUBLISHED = "BF16-thinking_model_outputs_reduced_batch"
FAMILIES = {
    "prompting": ["zero_shot_model_outputs", "cot_model_outputs", "few_shot_model_outputs", BEST_PUBLISHED],
    "fine-tuning": ["base-prefill-1024", "Qwen3-GSM8k-SFT-FP32-eval-score", "Qwen3-GSM8k-SFT-FP32-temp0",
                    "Qwen3-GSM8k-SFT-BF16-temp0", "Qwen3-GSM8k-LoRA-r4-FP32-eval-score",
                    "Qwen3-GSM8k-LoRA-r32-FP32-eval-score"],
    "fine-tuning-in-cot": ["cot_model_outputs", "SFT-FP32-eval-score-cot", "SFT-FP32-cot", "SFT-BF16-cot"],
    "thinking-or-fine-tuned": [BEST_PUBLISHED, "thinking-4096", "base-prefill-4096", "Qwen3-GSM8k-SFT-BF16-temp0"],
    "recipes": ["base-prefill-1024", "sft", "lora-r4", "lora-r32", "sft-without-annotations"],
    "self": ["thinking-4096", "own-answers", "references"],
    "reinforcement learning": ["thinking-4096", "own-answers", "grpo", *EQUAL_TIME],
    "modes": ["zero_shot", "few_shot", "cot"],
    "trained in cot": ["cot", "sft-cot", "lora-r4-cot", "lora-r32-cot"],
    "own answers in cot": ["cot", "own-answers-cot", "references-cot"],
    "rates": ["base"] + [f"{method}_{rate}" for method in RATES for rate in (PUBLISHED_RATE, "best")],
}  # fmt: skip


def write_report(table, setup):
    """results/NAME: the answers and records of the experiments that are there, a page with their tables, pictures.

    An experiment that is not finished goes by NAME.part. The page takes its place in one step, when it is whole.
    """
    gather(table, setup)
    sections = {group: [row for row in table if row.group == group] for group in HEADINGS}
    parts = [f"# {shown(setup.model)} on {shown(setup.dataset)}, by make reproduce\n"]
    parts += identity(setup)
    for group, heading in HEADINGS.items():
        own = files_there(sections[group], setup)
        if own:
            bases = [row for row in table if row.name == BASES.get(group)]
            parts.append(section(group, heading, [*files_there(bases, setup), *own], setup))
    for family, names in FAMILIES.items():
        rows = [row for name in names for row in table if name in (row.name, SEED.sub("", row.name))]
        finished = [path for path in files_there(rows, setup) if ".part." not in path.name]
        if len({SEED.sub("", path.name.removesuffix(".jsonl.gz")) for path in finished}) > 1:
            name = f"compared-{family.replace(' ', '-')}"
            words = ["--compare", "--pool-seeds", "--markdown", *map(str, finished), *clusters(setup)]
            parts.append(f"\n## Compared: {family}\n\n{with_picture(name, words, setup)}\n![{family}]({name}.png)\n")
    page = setup.results / "README.md"
    write_atomically(page, "".join(parts))
    log(f"{page}: written")


def gather(table, setup):
    """Take over to results/NAME what the folder of answers holds, and the records of trainings."""
    found = []
    for name in (
        name for row in table for name in row.files if row.flags.get("split") != "train" or row.group != "past"
    ):
        finished, begun = setup.answers / f"{name}.jsonl", setup.answers / f"{name}.jsonl.part"
        record = setup.answers / f"{name}.run.json"
        if not record.exists():
            continue
        for stem, path in ((name, finished), (f"{name}.part", begun)):
            if path.exists():
                found += [(f"{stem}.jsonl.gz", path), (f"{stem}.run.json", record)]
            elif stem.endswith(".part") and finished.exists():  # it was not finished at the last report
                for stale in (f"{stem}.jsonl.gz", f"{stem}.run.json"):
                    (setup.results / stale).unlink(missing_ok=True)
    for path in sorted(setup.trained.glob("*/train.run.json")):
        found.append((f"train/{path.parent.name}.run.json", path))
    for path in sorted(setup.trained.glob("rates/*/*e-*/train.run.json")):  # not those of a link to the best
        found.append((f"train/{path.relative_to(setup.trained)}", path))
    for path in sorted(setup.trained.glob("grpo-*/training.png"))[:1]:  # the curves of one seed are enough
        found.append((f"train/{path.parent.name}.png", path))
    if not found and not list(setup.results.glob("*.jsonl.gz")):
        raise UserError(f"{setup.results}: nothing to report yet; python reproduce.py run makes it")
    for name, path in found:
        target = setup.results / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".gz"):
            text = b"".join(line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))
            if not (target.exists() and gzip.decompress(target.read_bytes()) == text):
                with replacing(target) as file:
                    file.write(gzip.compress(text, 9, mtime=0))
        elif name.endswith(".png"):
            with replacing(target) as file:
                file.write(path.read_bytes())
        else:
            write_atomically(target, without_folders(path.read_text(encoding="utf-8"), setup))


def shown(place):
    """A model or data set as it may be told: a path outside this folder by its last name."""
    path = Path(place)
    return path.name if path.is_absolute() or ".." in path.parts else str(place)


def without_folders(record, setup):
    """The text of a run record, in which no folder of this machine stands."""
    for place in (setup.model, setup.dataset):
        record = record.replace(json.dumps(str(place))[1:-1], shown(place))
    return record


def identity(setup):
    """For a model file: its SHA-256, by the first run record that tells it."""
    name = Path(setup.model).name
    if not name.endswith(".gguf"):
        return []
    for path in sorted(setup.results.glob("*.run.json")):
        digest = record_in(path)["decides"].get(f"sha256 of {name}")
        if digest:
            return [f"\n`{name}`: SHA-256 `{digest}`\n"]
    return []


def files_there(rows, setup):
    """The answer files of experiments in results/NAME: the finished one of each name, else the part."""
    found = []
    for name in (name for row in rows for name in row.files):
        paths = [setup.results / f"{stem}.jsonl.gz" for stem in (name, f"{name}.part")]
        found += [path for path in paths if path.exists()][:1]
    return found


def section(group, heading, paths, setup):
    """The table of a group as Markdown, with its picture, and a note for each experiment that is not finished."""
    extra = ["--published"] if group == "published" else []
    words = ["--markdown", "--commands", "--pool-seeds", *map(str, paths), *extra, *clusters(setup)]
    text = with_picture(group, words, setup)
    begun = [path.name.removesuffix(".jsonl.gz") for path in paths if ".part." in path.name]
    notes = "".join(f"\n- {name}: not finished, these are the answers so far\n" for name in begun)
    scores = f"```\n{printed(sweep.show, setup.results / 'train/rates')}```\n\n" if group == "rates" else ""
    drawn = sorted((setup.results / "train").glob("grpo-*.png")) if group == "grpo" else []
    curves = "".join(f"\n![{path.stem}: over its steps](train/{path.name})\n" for path in drawn)
    return f"\n## {heading}\n\n{scores}{text}{notes}\n![{group}]({group}.png)\n{curves}"


def with_picture(name, words, setup):
    """What benchmark.py prints by these words; its picture goes to results/NAME in one step."""
    with tempfile.TemporaryDirectory(dir=setup.results) as folder:
        picture = Path(folder) / f"{name}.png"
        text = printed(benchmark.main, [*words, "--plot", str(picture)])
        os.replace(picture, setup.results / picture.name)
    return text


def clusters(setup):
    """The flags that count questions of one template as one cluster, where the data set tells their templates."""
    if not Path(setup.dataset).exists():
        return []
    with contextlib.suppress(UserError):
        load_questions(setup.dataset, "test", columns=Columns(keep=("template",)))
        return ["--cluster", "template", "--cluster-from", str(setup.dataset)]
    return []


def printed(main, *arguments):
    """What a script prints, run in this process: starting one takes a second, and a report needs ten."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main(*arguments)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
