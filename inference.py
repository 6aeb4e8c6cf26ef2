"""Answer grade-school math problems with a language model, in one of five prompting modes.

Writes one JSON line for each answer, and beside the file a run record that says how the answers were made:

    python inference.py --mode cot --limit 100
    python inference.py --model-id demo/model --dataset demo/problems --mode thinking
    python benchmark.py outputs/cot_model_outputs.jsonl
    accelerate launch --num_processes 8 inference.py --mode cot     # a share of the questions each
    python inference.py --server http://localhost:8000 --model-id Qwen/Qwen3-0.6B --mode cot

Every answer is on disk the moment it is finished. The same command goes on where a stopped run
ended, and does nothing when all answers are there.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from common import (
    COMPLETION_STOP,
    DTYPES,
    EARLY_STOP,
    FEW_SHOT_STYLES,
    MODES,
    ArgumentParser,
    Decoding,
    UserError,
    at_least,
    build_prompt,
    command_line,
    has_date,
    has_system_turn,
    has_thinking_switch,
    has_token,
    is_main,
    log,
    part_from_all,
    printable,
    processes,
    rank,
    read_json,
    read_jsonl,
    thinking_is_open,
    uses_template,
    write_atomically,
)
from data import (
    Columns,
    Question,
    add_data_flags,
    hash_questions,
    load_question_file,
    load_questions,
    name_other_flag,
    refuse_unscorable,
)
from runs import RunOutput, describe_run, read_first_start, training_of

THINKING_MODES = tuple(name for name, mode in MODES.items() if mode.thinks)
ANSWER_TOKENS = (
    512  # what --think-budget leaves for the early stop and the answer: the limit of modes without a thought
)
ANSWER_KEYS = (
    "id", "question", "model_output", "ground_truth_answer", "mode", "sample", "thinking_open", "finish_reason",
    "prompt_tokens", "output_tokens", "forced",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One file of answers. A command with several thinking budgets writes one for each."""

    output: Path
    max_new_tokens: int
    think_budget: int | None


@command_line
def main(argv=None):
    args = parse_args(argv)  # before torch is imported, so that --help and wrong flags answer at once

    from model import choose_device, choose_dtype, find_model, find_tokenizer, load_model, load_tokenizer

    if args.server:
        files = find_tokenizer(args.tokenizer or args.model_id, "--tokenizer" if args.tokenizer else "--model-id")
    else:
        files = find_model(args.model_id, args.base_model)
    columns = Columns(args.question_column, args.answer_column, args.keep_columns)
    questions = load_questions(args.dataset, args.split, args.dataset_config, columns)
    pool, shown = load_examples(args, questions)
    tokenizer = load_tokenizer(files)
    runs = split_budgets(args.mode, args.output, args.max_new_tokens, args.think_budget)
    template = check_template(args.mode, args.few_shot_style, args.system_prompt, tokenizer)
    dated = uses_template(args.mode, args.few_shot_style) and has_date(tokenizer)
    now = read_first_start([RunOutput(run.output).record_path for run in runs], args.overwrite) if dated else None
    asked = questions[: args.limit]
    prompts = build_prompts(args.mode, asked, pool, shown, args.few_shot_style, args.system_prompt, tokenizer, now)
    if args.print_prompts:
        return print_prompts(prompts[: args.print_prompts], tokenizer)
    refuse_unscorable(asked, args.dataset, args.split)
    device = None if args.server else choose_device(args.device)
    dtype = None if args.server else choose_dtype(args.dtype, device)
    identity = identify(questions, pool if args.few_shot_file else (), files, tokenizer_alone=bool(args.server))
    described = describe_command(args, files, now)
    closings = [closing_tokens(run, tokenizer, args.model_id) if run.think_budget else None for run in runs]
    load = functools.cache(lambda: None if args.server else load_model(files, dtype, device))
    before_drop = functools.partial(check_server, args, prompts, tokenizer) if args.server else load
    made = {}
    for run, closing in zip(runs, closings, strict=True):
        decides = what_decides(args, run, template, prompts[0], shown, dtype) | identity
        output = RunOutput(run.output)
        record = {"decides": decides, "segments": [described | describe_run(device)]}
        with output.opened(record, args.overwrite, before_drop):
            missing = list_missing(len(prompts), args.num_samples, output)
            if missing or output.part_size():  # the latter: stopped between the last answer and the end
                there = len(prompts) * args.num_samples - len(missing)
                counted = f"{run.output}: {there} answers are there, {len(missing)} to go"
                log(counted if there else f"writing {run.output}")
                model = load()
                share = own_share(missing, len(prompts), args.num_samples)
                requests, too_long = build_requests(run, prompts, share, tokenizer, model, args.model_id, closing)
                settled, requests = build_on(made, requests)
                choices = output.record["segments"][-1].setdefault("choices", []) if is_main() else []
                generated = start_generating(args, model, tokenizer, requests, prompts, choices)
                completions = itertools.chain(too_long, settled, generated)
                write_answers(args.mode, args.num_samples, run, completions, len(share), asked, prompts, output, made)
            else:
                log(f"{run.output}: finished already, {len(output.answers.places)} answers; --overwrite makes it again")
        if args.save_txt and is_main():
            save_txt(run.output)
    part_from_all()
    return 0


def parse_args(argv):
    parser = ArgumentParser("inference.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model-id",
        default="Qwen/Qwen3-0.6B",
        help="hub id or folder of a model or LoRA adapter, or a GGUF file (default %(default)s)",
    )
    add(
        "--base-model",
        help="of an adapter: hub id, folder or GGUF file of its base (default what its adapter_config.json names)",
    )
    add_data_flags(parser)
    add("--keep-columns", nargs="+", default=[], metavar="NAME",
        help="copy these columns of the data set into each answer line")  # fmt: skip
    add("--split", default="test", help="split to answer (default %(default)s)")
    add("--limit", type=at_least(1), help="answer the first LIMIT questions (default all)")
    add("--mode", choices=MODES, default="cot", help="prompting mode (default %(default)s)")
    add("--few-shot-k", type=at_least(1),
        help="worked examples of few_shot (default 3, the first of the train split; with --few-shot-file all of it)")  # fmt: skip
    add("--few-shot-style", choices=FEW_SHOT_STYLES,
        help="examples inside one prompt, as chat turns, or `completion`: plain text without a chat template, for base "
        "models, which serves zero_shot and cot too (default prompt)")  # fmt: skip
    add("--few-shot-file", type=Path, metavar="FILE.jsonl",
        help="worked examples of your own, with the keys question and answer (default the train split)")  # fmt: skip
    add("--system-prompt", help="replaces the mode's instruction; '' leaves it out")
    add("--batch-size", type=batch_size, default="auto",
        help="most answers to generate at once; auto sizes it from free memory (default)")  # fmt: skip
    add("--max-new-tokens", type=at_least(1),
        help="most new tokens of an answer (default 512; thinking modes 4096; with --think-budget N, N + 512)")  # fmt: skip
    add("--stop", nargs="*", metavar="TEXT",
        help="end an answer before any of these texts (default none; for --few-shot-style completion "
        f"{' '.join(COMPLETION_STOP)}; --stop alone for none there)")  # fmt: skip
    add("--think-budget", type=at_least(1), nargs="+", metavar="N",
        help="close a thought that is still open after N new tokens; several budgets write a file each, NAME-budget-N.jsonl, "
        "and cost little more than the largest (default no budget)")  # fmt: skip
    add("--do-sample", action=argparse.BooleanOptionalAction,
        help="sample, or be greedy (default: only thinking samples)")  # fmt: skip
    add("--temperature", type=float, help="of sampling (default 0.6 for thinking modes, else 0.7: Qwen3's model card)")
    add("--top-p", type=float, help="of sampling (default 0.95 for thinking modes, else 0.8: Qwen3's model card)")
    add("--top-k", type=int, help="of sampling (default 20: Qwen3's model card)")
    add("--seed", type=at_least(0), default=42, help="of sampling (default %(default)s)")
    add("--num-samples", type=at_least(1, 10_000), default=1,
        help="answers to each question, when sampling (default %(default)s)")  # fmt: skip
    add("--dtype", choices=DTYPES, help="precision of weights and compute (default bf16 on CUDA, else fp32)")
    add("--device", help="torch device, such as cuda:1 (default the accelerator that is there, else cpu)")
    add("--server", type=server_url, metavar="URL",
        help="ask a server with the OpenAI completions API (vLLM, SGLang, transformers serve) instead of loading the model; "
        "--model-id is its name there; a key comes from OPENAI_API_KEY")  # fmt: skip
    add("--tokenizer",
        help="with --server: hub id or folder whose chat template renders the prompts (default --model-id)")  # fmt: skip
    add("--concurrency", type=at_least(1, 4096), help="with --server: requests at once (default 32)")
    add("--output", type=Path, help="JSONL to write (default outputs/MODE_model_outputs.jsonl)")
    add("--overwrite", nargs="?", const="always", choices=("always", "changed"),
        help="drop what --output holds and begin anew; `changed`: only where another command made it")  # fmt: skip
    add("--save-txt", action="store_true", help="also write the answers as readable text beside the JSONL")
    add("--print-prompts", type=at_least(1), metavar="N", help="show the first N prompts with their token ids and stop")
    args = parser.parse_args(argv)
    refuse_contradictions(args)
    fill_defaults(args)
    return args


def batch_size(text):
    return text if text == "auto" else at_least(1)(text)


def server_url(text):
    """The address of a server, with the path of its API."""
    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number or beyond 65535, or half a bracket
        whole = False
    if not whole:
        got = "" if "@" in text or "?" in text else f", got {text!r}"  # which may hold a key
        raise argparse.ArgumentTypeError(f"must be an address such as http://localhost:8000{got}")
    if parts.username or parts.password or parts.query:  # the address is printed and recorded
        raise argparse.ArgumentTypeError("holds a key or a query; pass the address alone, and a key in OPENAI_API_KEY")
    return text.rstrip("/").removesuffix("/v1") + "/v1"


def refuse_contradictions(args):
    """UserError for a flag that does nothing beside the others."""
    mode = MODES[args.mode]
    if args.server:
        local = {"--dtype": args.dtype, "--device": args.device, "--base-model": args.base_model}
        local["--batch-size"] = None if args.batch_size == "auto" else args.batch_size
        for flag, value in local.items():
            if value is not None:
                raise UserError(f"{flag}: cannot be combined with --server, which loads no model here")
    for flag, value in () if args.server else (("--tokenizer", args.tokenizer), ("--concurrency", args.concurrency)):
        if value is not None:
            raise UserError(f"{flag}: needs --server")
    few_shot = {"--few-shot-k": args.few_shot_k, "--few-shot-file": args.few_shot_file}
    few_shot["--few-shot-style"] = None if args.few_shot_style == "completion" else args.few_shot_style
    for flag, value in () if mode.few_shot else few_shot.items():
        if value is not None:
            raise UserError(f"{flag}: needs --mode few_shot, this is --mode {args.mode}")
    if args.few_shot_style == "completion" and mode.thinks:
        raise UserError(f"--few-shot-style completion: cannot be combined with --mode {args.mode}, which thinks")
    if args.think_budget and not mode.thinks:
        raise UserError(f"--think-budget: needs --mode {' or '.join(THINKING_MODES)}, this is --mode {args.mode}")
    if args.stop and not all(args.stop):
        raise UserError(
            "--stop '': an empty text would end every answer at once; pass a text, or --stop alone for none"
        )
    for name in args.keep_columns:
        if name in ANSWER_KEYS:
            raise UserError(f"--keep-columns {name}: the answer lines have a key of this name already")
    if args.output and args.output.suffix != ".jsonl":
        raise UserError(f"--output {args.output}: must be a name that ends in .jsonl")


def fill_defaults(args):
    """The defaults that depend on the mode, and `decoding`: a Decoding made of the sampling flags."""
    mode = MODES[args.mode]
    args.concurrency = args.concurrency or 32
    args.few_shot_style = args.few_shot_style or "prompt"
    if args.stop is None:
        args.stop = COMPLETION_STOP if args.few_shot_style == "completion" else ()
    if args.do_sample is None:
        args.do_sample = mode.sampled
    given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.do_sample:
        defaults = {"temperature": mode.temperature, "top_p": mode.top_p, "top_k": mode.top_k}
        args.decoding = Decoding(do_sample=True, seed=args.seed, **(defaults | given))
        return
    greedy = f"decoding is greedy (--mode {args.mode}): add --do-sample"
    for name in given:
        raise UserError(f"--{name.replace('_', '-')}: does nothing where {greedy}")
    if args.num_samples > 1:
        raise UserError(f"--num-samples {args.num_samples}: all samples would be equal where {greedy}")
    args.decoding = Decoding()
    if args.mode == "thinking":
        log("note: greedy thinking; Qwen3's model card warns that it can fall into endless loops")


def split_budgets(
    mode: str, output: Path | None, max_new_tokens: int | None, budgets: Sequence[int] | None
) -> list[Run]:
    """The runs of a command: one, or one for each thinking budget, the largest first, for the others build on it."""
    path = output or Path("outputs") / f"{mode}_model_outputs.jsonl"
    if not budgets:
        return [Run(path, max_new_tokens or MODES[mode].max_new_tokens, None)]
    runs = []
    for budget in sorted(set(budgets), reverse=True):
        alone = output is not None and len(set(budgets)) == 1
        own = path if alone else path.with_name(f"{path.stem}-budget-{budget}.jsonl")
        runs.append(Run(own, max_new_tokens or budget + ANSWER_TOKENS, budget))
    return runs


def load_examples(args, questions: Sequence[Question]) -> tuple[Sequence[Question], int | None]:
    """The questions that few_shot takes its worked examples from, and how many of them a prompt shows."""
    if not MODES[args.mode].few_shot:
        return [], None
    source, own = f"the train split of {args.dataset}", 0
    if args.few_shot_file:
        source = str(args.few_shot_file)
        try:
            pool = load_question_file(args.few_shot_file)
            refuse_unscorable(pool, source, "worked")
        except UserError as error:
            raise name_other_flag(error, "--few-shot-file") from error
    elif args.split == "train":
        pool, own = questions, 1  # a question is no example of itself
    elif Path(args.dataset).is_file():
        raise UserError(
            f"--mode few_shot: --dataset {args.dataset} is one file, so there is no train split to take worked examples "
            "from; pass them with --few-shot-file"
        )
    else:
        columns = Columns(args.question_column, args.answer_column)
        try:
            pool = load_questions(args.dataset, "train", args.dataset_config, columns)
        except UserError as error:
            raise UserError(f"{error}; or pass worked examples with --few-shot-file") from error
    count = args.few_shot_k or (len(pool) if args.few_shot_file else 3)
    if count > len(pool) - own:
        raise UserError(f"--few-shot-k {count}: {source} has {len(pool)} questions")
    if not args.few_shot_file:
        refuse_unscorable(pool[: count + own], args.dataset, "train")
    return pool, count


def check_template(mode: str, few_shot_style: str, system_prompt: str | None, tokenizer) -> dict:
    """How the tokenizer takes the prompts, for the run record; what is unusual is noted.

    thinking_switch: whether `enable_thinking` changes the prompt, None where no chat template is used.
    """
    facts = {"thinking_switch": None}
    if uses_template(mode, few_shot_style):
        facts["thinking_switch"] = has_thinking_switch(tokenizer)
        if not facts["thinking_switch"]:
            log("note: this model's chat template has no thinking switch; the run record says so")
        if system_prompt != "" and not has_system_turn(tokenizer):
            facts["instruction"] = "before the question"
            log("note: this model's chat template has no system turn; the instruction stands before the question")
    elif MODES[mode].raw and not has_token(tokenizer, "<think>"):
        facts["think_tag"] = "plain text"
        log("note: this model's tokenizer has no <think> token; the prompt holds the tag as plain text")
    return facts


def build_prompts(
    mode: str,
    questions: Sequence[Question],
    pool: Sequence[Question],
    count: int | None,
    few_shot_style: str,
    system_prompt: str | None,
    tokenizer,
    now: datetime.datetime | None,
) -> list[str]:
    """The prompt of every question, with the first `count` questions of the pool as examples, but never itself.

    Special tokens inside a question are left as they are, and noted: the model reads them as markup.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    marked = [item.id for item in questions if any(token in item.question for token in special)]
    if marked:
        log(
            f"note: {len(marked)} questions hold special tokens, which the model reads as markup; first question {marked[0]}"
        )
    prompts = []
    for item in questions:
        others = (other for other in pool if other.question != item.question)
        shown = [(other.question, other.answer) for other in itertools.islice(others, count)] if count else []
        prompts.append(build_prompt(mode, item.question, tokenizer, shown, few_shot_style, system_prompt, now))
    return prompts


def print_prompts(prompts, tokenizer):
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        print(f"--- prompt {number}, {len(ids)} tokens\n{printable(prompt)}\n--- token ids\n{ids}")
    return 0


def what_decides(args, run: Run, template: dict, prompt: str, shown: int | None, dtype: str | None) -> dict:
    """What decides the answers, less the questions and the model's files: a run with other values cannot go on from them.

    Keys that runs of earlier versions do not have stand here only where they are not at their default.
    """
    sampling = args.decoding if args.do_sample else None
    completion = args.few_shot_style == "completion"
    decides = {
        "split": args.split,
        "mode": args.mode,
        "few_shot_k": shown,
        "few_shot_style": args.few_shot_style if shown or completion else None,
        "prompt": prompt,
        "system_prompt": args.system_prompt,
        "max_new_tokens": run.max_new_tokens,
        "think_budget": run.think_budget,
        "early_stop": EARLY_STOP if run.think_budget else None,
        "do_sample": args.do_sample,
        "temperature": sampling and sampling.temperature,
        "top_p": sampling and sampling.top_p,
        "top_k": sampling and sampling.top_k,
        "seed": sampling and sampling.seed,
        "dtype": dtype,
        "model_on_server": args.model_id if args.server else None,
    }
    further = {"stop": list(args.stop), "keep_columns": args.keep_columns}
    return decides | template | {name: value for name, value in further.items() if value}


def describe_command(args, files, template_time: datetime.datetime | None) -> dict:
    """What describes a run without deciding its answers."""
    from model import quantization

    described = {
        "model": args.model_id,
        "dataset": args.dataset,
        "limit": args.limit,
        "num_samples": args.num_samples,
        "batch_size": args.batch_size,
        "command": args.command,
        "processes": processes(),
        "server": args.server,
    }
    further = {
        "base_model": args.base_model,
        "quantization": None if args.server else quantization(files),
        "training": None if args.server else training_of(args.model_id),
        "dataset_config": args.dataset_config,
        "question_column": args.question_column if args.question_column != ["question"] else None,
        "answer_column": args.answer_column if args.answer_column != "answer" else None,
        "few_shot_file": args.few_shot_file and str(args.few_shot_file),
        "template_time": template_time and template_time.isoformat(),
        "generation_config_ignored": None if args.server else ignored_settings(files.base or files),
    }
    return described | {name: value for name, value in further.items() if value}


# What a generation config can ask for that changes which token comes next, with the values that change nothing.
# Decoding here follows the command's flags alone.
OTHER_DECODING = {
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "num_beams": (1,), "penalty_alpha": (), "dola_layers": (),
    "guidance_scale": (1.0,), "min_length": (0,), "min_new_tokens": (0,), "bad_words_ids": (), "sequence_bias": (),
    "suppress_tokens": (), "begin_suppress_tokens": (), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "typical_p": (1.0,), "min_p": (0,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "top_h": (), "stop_strings": (), "watermarking_config": (),
}  # fmt: skip


def ignored_settings(files) -> dict:
    """The settings of a model's generation config that are not applied here; a GGUF file has none."""
    path = files.folder / "generation_config.json"
    config = read_json(path) if path.is_file() and not files.gguf else {}
    ignored = {}
    for name, neutral in OTHER_DECODING.items():
        if config.get(name) and config[name] not in neutral:
            ignored[name] = config[name]
    if ignored:
        told = ", ".join(f"{name} {value}" for name, value in ignored.items())
        log(f"note: {path} asks for {told}, which is not applied; the run record says so")
    return ignored


def identify(questions, examples, files, tokenizer_alone: bool) -> dict:
    """What decides the answers of what is read: hashes of the questions, of examples of one's own, of the model's files."""
    from model import TOKENIZER_FILES

    hashes = files.hashes(TOKENIZER_FILES) if tokenizer_alone else files.hashes()
    identity = {"dataset_sha256": hash_questions(questions)}
    if examples:
        identity["few_shot_file_sha256"] = hash_questions(examples)
    return identity | {f"sha256 of {name}": value for name, value in hashes.items()}


def list_missing(questions: int, num_samples: int, output: RunOutput) -> list[tuple[int, int]]:
    """The (question, sample) pairs that have no answer on disk."""
    pairs = itertools.product(range(questions), range(num_samples))
    return [pair for pair in pairs if pair not in output.answers.places]


def own_share(missing, questions: int, num_samples: int):
    """What of the missing pairs is this process's: by number, so that all agree whatever each has read.

    The samples of a question stay together, for they begin alike. Few questions could not be shared out evenly.
    """
    few = questions < 8 * processes()
    return [(i, sample) for i, sample in missing if (i * num_samples + sample if few else i) % processes() == rank()]


def build_requests(run: Run, prompts: Sequence[str], wanted, tokenizer, model, model_id: str, closing: Callable | None):
    """(requests, completions) for the wanted (question, sample) pairs; `model` is None where a server has it.

    closing: what `closing_tokens` returns, where the run has a thinking budget.

    The completions are of prompts that the model's positions cannot hold: empty, and finished as
    `prompt_too_long`. Where the positions cut the limit of an answer, its thought gives way, so that the
    room to answer is the same for all.
    """
    from generation import Completion, Request
    from model import encode, positions

    ids = encode(tokenizer, prompts)
    most = positions(model) if model else sys.maxsize  # a server knows its positions itself
    if model:
        refuse_other_vocabulary(max(map(max, ids)), model, model_id)
    limits = [min(run.max_new_tokens, most - len(prompt)) for prompt in ids]
    requests, too_long = [], []
    for i, sample in wanted:
        lost = run.max_new_tokens - limits[i]
        if limits[i] < 1 or (closing and lost > run.think_budget):
            too_long.append(Completion(i, sample, [], "", "prompt_too_long", len(ids[i]), 0))
            continue
        budget = closing and closing(run.think_budget - lost, opened=thinking_is_open(prompts[i]))
        requests.append(Request(i, sample, ids[i], limits[i], budget))
    if too_long:
        log(
            f"note: {len({done.id for done in too_long})} prompts leave no room to answer in the model's {most} positions; "
            f"their answers are empty and count as wrong; first question {too_long[0].id}"
        )
    touched = sum(request.max_new_tokens < run.max_new_tokens for request in requests)
    if touched:
        log(f"max_new_tokens cut for {touched} of {len(wanted)} answers: the model has {most} positions")
    return requests, too_long


def refuse_other_vocabulary(largest, model, model_id):
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise UserError(
            f"--model-id {model_id}: its tokenizer gives token {largest}, its weights know {vocabulary} tokens: "
            "the tokenizer of another model"
        )


def closing_tokens(run: Run, tokenizer, model_id: str) -> Callable:
    """A function (tokens, opened) that makes the ThinkBudget of a prompt; UserError where none can be kept."""
    from generation import ThinkBudget

    tags = [tokenizer.get_vocab().get(tag) for tag in ("<think>", "</think>")]
    if None in tags:
        raise UserError(f"--think-budget: the tokenizer of {model_id} has no token </think>, which closes a thought")
    early_stop = tokenizer(EARLY_STOP, add_special_tokens=False)["input_ids"]
    if run.max_new_tokens - run.think_budget <= len(early_stop):
        raise UserError(
            f"--max-new-tokens {run.max_new_tokens}: leaves no room to answer beside a thought of {run.think_budget} tokens "
            f"and the {len(early_stop)} that close it; pass another --think-budget or --max-new-tokens"
        )
    return lambda tokens, opened: ThinkBudget(tokens, early_stop, *tags, opened=opened)


def build_on(made, requests):
    """(completions, requests): what a larger budget's completions settle, and what is left to generate.

    made: completions by (question, sample). Up to its budget a thought is the same whatever the budget. One
    that needed no closing here is taken as it is; of the others the tokens up to the budget are.
    """
    settled, left = [], []
    for request in requests:
        done, budget = made.get((request.id, request.sample)), request.budget
        if done and budget.closed(done.token_ids):
            begun = (*done.token_ids[: budget.tokens], *budget.early_stop)
            left.append(dataclasses.replace(request, begun=begun))
        elif done and len(done.token_ids) <= request.max_new_tokens:
            settled.append(done)
        else:
            left.append(request)
    return settled, left


def check_server(args, prompts: Sequence[str], tokenizer):
    """UserError where the server does not answer a prompt. Asked before earlier answers are dropped."""
    from generation import Request
    from server import ask_server

    shortest = min(prompts, key=len)
    request = Request(0, 0, tokenizer(shortest, add_special_tokens=False)["input_ids"], 1)
    list(ask_server(args.server, args.model_id, [request], [shortest], tokenizer, args.decoding, 1))


def start_generating(args, model, tokenizer, requests, prompts, choices: list[str]) -> Iterator:
    """The Completions of all requests as they end, by the model here or by the server.

    choices: gets a line for each automatic choice, such as the batch size, for the run record.
    """
    from tqdm import tqdm

    from generation import generate
    from server import ask_server

    if args.server:
        return ask_server(
            args.server, args.model_id, requests, prompts, tokenizer, args.decoding, args.concurrency, args.stop
        )

    def note(line: str):
        choices.append(line)
        if is_main():
            tqdm.write(line)

    return generate(model, tokenizer, requests, args.decoding, args.batch_size, note, stop_texts=args.stop)


def write_answers(
    mode: str, num_samples: int, run: Run, completions, to_go: int, questions, prompts, output: RunOutput, made: dict
):
    """Append each answer as it ends, then finish the file. A stop keeps what is there.

    to_go: how many completions there will be. made: gets the completions that a smaller budget builds on.
    """
    from tqdm import tqdm

    begun, before = time.perf_counter(), output.answers.totals["output_tokens"]
    output.write_record()
    try:
        share = f"process 1 of {processes()}" if processes() > 1 else None
        with tqdm(desc=share, total=to_go, unit="question", smoothing=0.1, disable=not is_main()) as bar:
            for done in completions:
                output.append(answer_line(mode, questions[done.id], prompts[done.id], done, run.think_budget))
                if run.think_budget and done.token_ids:  # a server gives text alone
                    made[done.id, done.sample] = done
                rate = (output.answers.totals["output_tokens"] - before) / (time.perf_counter() - begun)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                bar.update()
        finish(run.output, len(prompts), num_samples, output)
    except BaseException:
        with contextlib.suppress(UserError):  # the first error is the one to tell
            output.write_record(seconds=round(time.perf_counter() - begun, 3))
        raise
    output.write_record(seconds=round(time.perf_counter() - begun, 3))
    if is_main():
        report(run.output, output.record["segments"][-1])


def finish(path: Path, questions: int, num_samples: int, output: RunOutput):
    """In the main process: all answers, those of the other processes too, into the one file."""
    if not is_main():
        return
    if processes() > 1:
        log("waiting for the other processes")
        output.gather()
        missing = list_missing(questions, num_samples, output)
        if missing:
            raise UserError(f"{path}: another process has stopped, {len(missing)} answers are missing; start it again")
    output.finish()


def answer_line(mode: str, question: Question, prompt: str, done, think_budget: int | None) -> dict:
    """One line of the JSONL. Other tools read the first four keys, in this order."""
    line = {
        "id": done.id,
        "question": question.question,
        "model_output": done.text,
        "ground_truth_answer": question.answer,
        "mode": mode,
        "sample": done.sample,
        "thinking_open": thinking_is_open(prompt),
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.prompt_tokens,
        "output_tokens": done.output_tokens,
    }
    return line | ({"forced": done.forced} if think_budget else {}) | question.kept


def report(path: Path, segment: dict):
    seconds = segment["seconds"]
    print(
        f"{segment['answers']} answers in {seconds:.1f} s ({segment['answers'] / seconds:.2f} a second), "
        f"{segment['prompt_tokens']} prompt tokens, {segment['output_tokens']} output tokens "
        f"({segment['output_tokens'] / seconds:.0f} a second), {segment['hit_limit']} hit the token limit\n"
        f"{path}: score it with python benchmark.py {path}"
    )


def save_txt(path: Path):
    """The answers as readable text, NAME.txt, which may be shown on a terminal."""
    pages = [
        f"===== question {line['id']}, sample {line['sample']}\n{line['question']}\n"
        f"----- answer\n{line['model_output']}\n----- reference\n{line['ground_truth_answer']}\n"
        for _, line in read_jsonl(path)
    ]
    write_atomically(path.with_suffix(".txt"), printable("\n".join(pages)))


if __name__ == "__main__":
    sys.exit(main())
