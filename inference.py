"""Answer grade-school math problems with a language model, in one of five prompting modes.

Writes one JSON line an answer, and a run record beside it that says how they were made:

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
import itertools
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from common import (
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
    has_thinking_switch,
    is_main,
    log,
    part_from_all,
    printable,
    processes,
    rank,
    read_jsonl,
    thinking_is_open,
    write_atomically,
)
from data import hash_questions, load_questions
from runs import RunOutput, describe_run

# Qwen3's model card, "Best Practices": sampling for thinking and for non-thinking prompts.
THINKING_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
PLAIN_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
MAX_NEW_TOKENS = {"zero_shot": 512, "cot": 512, "few_shot": 512, "thinking": 4096, "chatml_think_prefill": 4096}
SAMPLED_MODES = ("thinking",)
THINKING_MODES = ("thinking", "chatml_think_prefill")
ANSWER_TOKENS = (
    512  # what --think-budget leaves for the early stop and the answer: the limit of modes without a thought
)


@command_line
def main(argv=None):
    from model import choose_device, choose_dtype, find_model, find_tokenizer, load_model, load_tokenizer

    args = parse_args(argv)
    if args.server:
        files = find_tokenizer(args.tokenizer or args.model_id, "--tokenizer" if args.tokenizer else "--model-id")
    else:
        files = find_model(args.model_id, args.base_model)
    questions = load_questions(args.dataset, args.split)
    examples = load_examples(args, questions)
    tokenizer = load_tokenizer(files)
    prompts = build_prompts(args, questions, examples, tokenizer)
    if args.print_prompts:
        return print_prompts(prompts[: args.print_prompts], tokenizer)
    device = None if args.server else choose_device(args.device)
    dtype = None if args.server else choose_dtype(args.dtype, device)
    model, made = None, {}
    for run in split_budgets(args):
        record = run_record(run, files, tokenizer, questions, prompts, device, dtype)
        output = RunOutput(run.output)
        with output.opened(record, run.overwrite):
            missing = list_missing(run, prompts, output)
            if missing or output.part_size():  # the latter: stopped between the last answer and the end
                done = len(prompts) * run.num_samples - len(missing)
                log(
                    f"{run.output}: {done} answers are there, {len(missing)} to go" if done else f"writing {run.output}"
                )
                model = model or (None if args.server else load_model(files, dtype, device))
                requests = build_requests(run, prompts, own_share(missing, run.num_samples), tokenizer, model)
                answer(run, model, tokenizer, requests, made, questions, prompts, output)
            else:
                log(f"{run.output}: finished already, {len(output.answers.places)} answers; --overwrite makes it again")
        if run.save_txt and is_main():
            save_txt(run.output)
    part_from_all()
    return 0


def parse_args(argv):
    parser = ArgumentParser("inference.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model-id",
        default="Qwen/Qwen3-0.6B",
        help="hub id or folder of a model or LoRA adapter (default %(default)s)",
    )
    add(
        "--base-model",
        help="of an adapter: hub id, folder or GGUF file of its base (default what its adapter_config.json names)",
    )
    add(
        "--dataset",
        default="openai/gsm8k",
        help="hub id, or folder with train.jsonl and test.jsonl (default %(default)s)",
    )
    add("--split", default="test", help="split to answer (default %(default)s)")
    add("--limit", type=at_least(1), help="answer the first LIMIT questions (default all)")
    add("--mode", choices=MODES, default="cot", help="prompting mode (default %(default)s)")
    add("--few-shot-k", type=at_least(1), help="worked examples of few_shot: the first of the train split (default 3)")
    add(
        "--few-shot-style", choices=FEW_SHOT_STYLES, help="examples inside one prompt or as chat turns (default prompt)"
    )
    add("--system-prompt", help="replaces the mode's instruction; '' leaves the system message out")
    add(
        "--batch-size",
        type=batch_size,
        default="auto",
        help="most rows at once; auto sizes it from free memory (default)",
    )
    add(
        "--max-new-tokens",
        type=at_least(1),
        help="most new tokens an answer (default 512; thinking modes 4096; with --think-budget N, N + 512)",
    )
    add("--think-budget", type=at_least(1), nargs="+", metavar="N",
        help="close a thought that is still open after N new tokens; several budgets write a file each, NAME-budget-N.jsonl, "
        "and cost little more than the largest (default no budget)")  # fmt: skip
    add(
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        help="sample, or be greedy (default: only thinking samples)",
    )
    add("--temperature", type=float, help="of sampling (default 0.6 for thinking modes, else 0.7: Qwen3's model card)")
    add("--top-p", type=float, help="of sampling (default 0.95 for thinking modes, else 0.8: Qwen3's model card)")
    add("--top-k", type=int, help="of sampling (default 20: Qwen3's model card)")
    add("--seed", type=at_least(0), default=42, help="of sampling (default %(default)s)")
    add(
        "--num-samples",
        type=at_least(1, 10_000),
        default=1,
        help="answers a question, when sampling (default %(default)s)",
    )
    add("--dtype", choices=DTYPES, help="precision of weights and compute (default bf16 on CUDA, else fp32)")
    add("--device", help="torch device, such as cuda:1 (default cuda where there is one, else cpu)")
    add("--server", type=server_url, metavar="URL",
        help="ask a server with the OpenAI completions API (vLLM, SGLang, transformers serve) instead of loading the model; "
        "--model-id is its name there; a key comes from OPENAI_API_KEY")  # fmt: skip
    add(
        "--tokenizer",
        help="with --server: hub id or folder whose chat template renders the prompts (default --model-id)",
    )
    add("--concurrency", type=at_least(1, 4096), help="with --server: requests at once (default 32)")
    add("--output", type=Path, help="JSONL to write (default outputs/MODE_model_outputs.jsonl)")
    add("--overwrite", nargs="?", const="always", choices=("always", "changed"),
        help="drop what --output holds and begin anew; `changed`: only where another command made it")  # fmt: skip
    add("--save-txt", action="store_true", help="also write the answers as readable text beside the JSONL")
    add("--print-prompts", type=at_least(1), metavar="N", help="show the first N prompts with their token ids and stop")
    args = parser.parse_args(argv)
    fill_defaults(args)
    return args


def batch_size(text):
    return text if text == "auto" else at_least(1)(text)


def server_url(text):
    """The address of a server, with the path of its API."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"wants an address such as http://localhost:8000, got {text!r}")
    if parts.username or parts.password or parts.query:  # the address is printed and recorded
        raise argparse.ArgumentTypeError("holds a key or a query; pass the address alone, and a key in OPENAI_API_KEY")
    return text.rstrip("/").removesuffix("/v1") + "/v1"


def fill_defaults(args):
    """Defaults that depend on the mode, and refusal of flags that contradict it or each other."""
    local = {"--dtype": args.dtype, "--device": args.device, "--base-model": args.base_model}
    local["--think-budget"] = args.think_budget
    local["--batch-size"] = None if args.batch_size == "auto" else args.batch_size
    for flag, value in (
        local if args.server else {"--tokenizer": args.tokenizer, "--concurrency": args.concurrency}
    ).items():
        if value is not None:
            raise UserError(
                f"{flag}: goes {'with a model that is loaded here, not ' if args.server else ''}with --server"
            )
    args.concurrency = args.concurrency or 32
    if args.mode != "few_shot":
        for flag, value in (("--few-shot-k", args.few_shot_k), ("--few-shot-style", args.few_shot_style)):
            if value is not None:
                raise UserError(f"{flag}: goes with --mode few_shot, not with {args.mode}")
    args.few_shot_k = args.few_shot_k or 3
    args.few_shot_style = args.few_shot_style or "prompt"
    if args.think_budget and args.mode not in THINKING_MODES:
        raise UserError(f"--think-budget: goes with --mode {' or '.join(THINKING_MODES)}, not with {args.mode}")
    args.named = args.output is not None
    args.output = args.output or Path("outputs") / f"{args.mode}_model_outputs.jsonl"
    if args.output.suffix != ".jsonl":
        raise UserError(f"--output {args.output}: wants a name that ends in .jsonl")
    if args.do_sample is None:
        args.do_sample = args.mode in SAMPLED_MODES
    sampling = THINKING_SAMPLING if args.mode in THINKING_MODES else PLAIN_SAMPLING
    given = {name: getattr(args, name) for name in sampling if getattr(args, name) is not None}
    if args.do_sample:
        args.decoding = Decoding(do_sample=True, seed=args.seed, **(sampling | given))
    else:
        greedy = f"decoding is greedy (--mode {args.mode}): add --do-sample"
        for name in given:
            raise UserError(f"--{name.replace('_', '-')}: does nothing where {greedy}")
        if args.num_samples > 1:
            raise UserError(f"--num-samples {args.num_samples}: all samples would be equal where {greedy}")
        args.decoding = Decoding()
        if args.mode == "thinking":
            log("note: greedy thinking; Qwen3's model card warns that it can fall into endless loops")


def split_budgets(args):
    """The runs of a command: one, or one for each thinking budget, the largest first, for the others build on it."""
    if not args.think_budget:
        limit = args.max_new_tokens or MAX_NEW_TOKENS[args.mode]
        return [argparse.Namespace(**vars(args) | {"max_new_tokens": limit})]
    budgets = sorted(set(args.think_budget), reverse=True)
    runs = []
    for budget in budgets:
        output = args.output.with_name(f"{args.output.stem}-budget-{budget}.jsonl")
        own = {
            "think_budget": budget,
            "max_new_tokens": args.max_new_tokens or budget + ANSWER_TOKENS,
            "output": args.output if args.named and len(budgets) == 1 else output,
        }
        runs.append(argparse.Namespace(**vars(args) | own))
    return runs


def load_examples(args, questions):
    """The train questions that few_shot shows, one more than asked in case one is the question itself."""

    if args.mode != "few_shot":
        return []
    train = questions if args.split == "train" else load_questions(args.dataset, "train")
    if args.few_shot_k > len(train) - (args.split == "train"):
        raise UserError(f"--few-shot-k {args.few_shot_k}: the train split of {args.dataset} has {len(train)} questions")
    return train[: args.few_shot_k + 1]


def build_prompts(args, questions, examples, tokenizer):
    """The prompt of every question up to --limit. A question is never shown its own answer.

    Special tokens inside a question are left as they are, and noted: the model reads them as markup.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    marked = [item.id for item in questions[: args.limit] if any(token in item.question for token in special)]
    if marked:
        log(
            f"note: {len(marked)} questions hold special tokens, which the model reads as markup; first question {marked[0]}"
        )
    prompts = []
    for question in questions[: args.limit]:
        others = [item for item in examples if not (args.split == "train" and item.id == question.id)]
        shown = [(item.question, item.answer) for item in others[: args.few_shot_k]]
        prompts.append(
            build_prompt(args.mode, question.question, tokenizer, shown, args.few_shot_style, args.system_prompt)
        )
    return prompts


def print_prompts(prompts, tokenizer):
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        print(f"--- prompt {number}, {len(ids)} tokens\n{printable(prompt)}\n--- token ids\n{ids}")
    return 0


def run_record(args, files, tokenizer, questions, prompts, device, dtype):
    """What decides the output and what describes this run, for NAME.run.json."""

    from model import TOKENIZER_FILES, quantization

    sampling = args.decoding if args.do_sample else None
    few_shot = args.mode == "few_shot"
    switch = None if args.mode == "chatml_think_prefill" else has_thinking_switch(tokenizer)
    if switch is False:
        log("note: this model's chat template has no thinking switch; the run record says so")
    decides = {
        "dataset_sha256": hash_questions(questions),
        "split": args.split,
        "mode": args.mode,
        "few_shot_k": args.few_shot_k if few_shot else None,
        "few_shot_style": args.few_shot_style if few_shot else None,
        "thinking_switch": switch,
        "prompt": prompts[0],
        "system_prompt": args.system_prompt,
        "max_new_tokens": args.max_new_tokens,
        "think_budget": args.think_budget,
        "early_stop": EARLY_STOP if args.think_budget else None,
        "do_sample": args.do_sample,
        "temperature": sampling and sampling.temperature,
        "top_p": sampling and sampling.top_p,
        "top_k": sampling and sampling.top_k,
        "seed": sampling and sampling.seed,
        "dtype": dtype,
        "model_on_server": args.model_id if args.server else None,
    }
    hashes = files.hashes(TOKENIZER_FILES) if args.server else files.hashes()
    decides |= {f"sha256 of {name}": value for name, value in hashes.items()}
    segment = {
        "model": args.model_id,
        "quantization": quantization(files),
        "dataset": args.dataset,
        "limit": args.limit,
        "num_samples": args.num_samples,
        "batch_size": args.batch_size,
        "command": args.command,
        "processes": processes(),
        "server": args.server,
    } | describe_run(device)
    return {"decides": decides, "segments": [segment]}


def list_missing(args, prompts, output):
    """The (question, sample) pairs that have no answer on disk."""
    pairs = ((i, sample) for i in range(len(prompts)) for sample in range(args.num_samples))
    return [pair for pair in pairs if pair not in output.answers.places]


def own_share(missing, num_samples):
    """What of the missing pairs is this process's: by number, so that all agree whatever each has read."""
    return [(i, sample) for i, sample in missing if (i * num_samples + sample) % processes() == rank()]


def build_requests(args, prompts, missing, tokenizer, model):
    """One request for each missing (id, sample); its limit is what the model's positions leave."""

    from generation import Request
    from model import encode, positions

    ids = encode(tokenizer, prompts)
    if args.server:  # it knows its positions itself
        return [Request(i, sample, ids[i], args.max_new_tokens) for i, sample in missing]
    most = positions(model)
    limits = [min(args.max_new_tokens, most - len(prompt)) for prompt in ids]
    for i, limit in enumerate(limits):
        if limit < 1:
            raise UserError(
                f"question {i}: its prompt of {len(ids[i])} tokens does not fit the model's {most} positions"
            )
    largest, vocabulary = max(map(max, ids)), model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise UserError(
            f"--model-id {args.model_id}: its tokenizer gives token {largest}, its weights know {vocabulary} tokens: "
            "the tokenizer of another model"
        )
    touched = sum(limits[i] < args.max_new_tokens for i, _ in missing)
    if touched:
        log(f"max_new_tokens cut for {touched} of {len(missing)} answers: the model has {most} positions")
    budgets = think_budgets(args, prompts, limits, tokenizer)
    return [Request(i, sample, ids[i], limits[i], budgets[i]) for i, sample in missing]


def think_budgets(args, prompts, limits, tokenizer):
    """The ThinkBudget of every prompt, None without --think-budget.

    Where the model's positions cut the limit of an answer, its thought gives way, so that the room to
    answer is the same for all.
    """

    from generation import ThinkBudget

    if not args.think_budget:
        return [None] * len(prompts)
    tags = [tokenizer.get_vocab().get(tag) for tag in ("<think>", "</think>")]
    if None in tags:
        raise UserError(
            f"--think-budget: the tokenizer of {args.model_id} has no token </think>, which closes a thought"
        )
    early_stop = tokenizer(EARLY_STOP, add_special_tokens=False)["input_ids"]
    budgets = []
    for i, prompt in enumerate(prompts):
        tokens = args.think_budget - (args.max_new_tokens - limits[i])
        if tokens < 0 or limits[i] - tokens <= len(early_stop):
            raise UserError(
                f"question {i}: {limits[i]} new tokens at most leave no room to answer beside a thought of "
                f"{args.think_budget} and the {len(early_stop)} that close it; other --think-budget or --max-new-tokens"
            )
        budgets.append(ThinkBudget(tokens, early_stop, *tags, opened=thinking_is_open(prompt)))
    return budgets


def build_on(made, requests):
    """(completions, requests): what a larger budget's completions settle, and what is left to generate.

    Up to its budget a thought is the same whatever the budget. One that needed no closing here is
    taken as it is; of the others the tokens up to the budget are.
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


def answer(args, model, tokenizer, requests, made, questions, prompts, output):
    """Generate and append each answer as it ends. A stop keeps them. `made`: see build_on."""

    from tqdm import tqdm

    from generation import generate
    from server import ask_server

    settled, left = build_on(made, requests)

    begun, before = time.perf_counter(), output.answers.totals["output_tokens"]
    output.write_record()
    try:
        share = f"process 1 of {processes()}" if processes() > 1 else None
        with tqdm(desc=share, total=len(requests), unit="question", smoothing=0.1, disable=not is_main()) as bar:
            note = tqdm.write if is_main() else lambda line: None
            generated = (
                ask_server(args, left, prompts)
                if args.server
                else generate(model, tokenizer, left, args.decoding, args.batch_size, note=note)
            )
            for done in itertools.chain(settled, generated):
                output.append(answer_row(args, done, questions[done.id], prompts[done.id]))
                if args.think_budget:
                    made[done.id, done.sample] = done
                rate = (output.answers.totals["output_tokens"] - before) / (time.perf_counter() - begun)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                bar.update()
        finish(args, prompts, output)
    except BaseException:
        with contextlib.suppress(UserError):  # the first error is the one to tell
            output.write_record(seconds=round(time.perf_counter() - begun, 3))
        raise
    output.write_record(seconds=round(time.perf_counter() - begun, 3))
    if is_main():
        report(args.output, output.record["segments"][-1])


def finish(args, prompts, output):
    """In the main process: all answers, those of the other processes too, into the one file."""
    if not is_main():
        return
    if processes() > 1:
        log("waiting for the other processes")
        output.gather()
        missing = list_missing(args, prompts, output)
        if missing:
            raise UserError(
                f"{args.output}: another process has stopped, {len(missing)} answers are missing; start it again"
            )
    output.finish()


def answer_row(args, done, question, prompt):
    """One line of the JSONL. Other tools read the first four keys, in this order."""
    row = {
        "id": done.id,
        "question": question.question,
        "model_output": done.text,
        "ground_truth_answer": question.answer,
        "mode": args.mode,
        "sample": done.sample,
        "thinking_open": thinking_is_open(prompt),
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.prompt_tokens,
        "output_tokens": done.output_tokens,
    }
    return row | ({"forced": done.forced} if args.think_budget else {})


def report(path, segment):
    seconds = segment["seconds"]
    print(
        f"{segment['answers']} answers in {seconds:.1f} s ({segment['answers'] / seconds:.2f} a second), "
        f"{segment['prompt_tokens']} prompt tokens, {segment['output_tokens']} output tokens "
        f"({segment['output_tokens'] / seconds:.0f} a second), {segment['hit_limit']} hit the token limit\n"
        f"{path}: score it with python benchmark.py {path}"
    )


def save_txt(path):
    """The answers as readable text, NAME.txt, which may be shown on a terminal."""
    pages = [
        f"===== question {row['id']}, sample {row['sample']}\n{row['question']}\n"
        f"----- answer\n{row['model_output']}\n----- reference\n{row['ground_truth_answer']}\n"
        for _, row in read_jsonl(path)
    ]
    write_atomically(path.with_suffix(".txt"), printable("\n".join(pages)))


if __name__ == "__main__":
    sys.exit(main())
