"""Fine-tune all weights of a language model on grade-school math, with TRL's SFTTrainer.

Trains on exactly the prompt that inference.py asks with in the same --mode. Part of the train split is
held out; after every epoch the model answers questions of it, and the checkpoint with the most right
answers is kept. The test split is never read:

    python train.py --output-dir outputs/sft
    python train.py --model-id demo/model --dataset demo/problems --learning-rate 1e-3 --output-dir outputs/demo-sft
    python train.py --mode cot --output-dir outputs/sft-cot
    accelerate launch --multi_gpu --num_processes 2 train.py --output-dir outputs/sft
    python inference.py --model-id outputs/sft --mode chatml_think_prefill

A run that was stopped or killed goes on with the same command and --resume. Two processes on a CPU
need --multi_gpu as well: without it accelerate starts one.
"""

import argparse
import contextlib
import math
import random
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from checkpoints import drop_checkpoints
from common import (
    COMPLETION_STOP,
    MODES,
    ArgumentParser,
    UserError,
    at_least,
    build_prompt,
    choose_template,
    code_block,
    command_line,
    first_line,
    gathered,
    has_date,
    has_token,
    hash_file,
    is_main,
    is_text,
    log,
    part_from_all,
    plain_markdown,
    printable,
    processes,
    read_json,
    read_jsonl,
    strip_annotations,
    thinking_is_open,
    uses_template,
    wait_for_all,
    whole_number,
    write_atomically,
)
from data import Columns, Question, add_data_flags, hash_questions, load_questions, refuse_unscorable
from runs import RECORD, claim_folder, describe_run, locked_folder, peak_memory, read_first_start, write_record

TRAINED_MODES = tuple(name for name, mode in MODES.items() if not mode.few_shot)  # its prompt needs worked examples
# The flags that decide the weights. Of a new one record only what is not its default: runs made before then resume.
DECIDING_FLAGS = (
    "epochs", "max_steps", "learning_rate", "lr_scheduler", "warmup", "batch_size", "dtype", "seed", "eval_size",
    "eval_questions", "patience", "strip_annotations", "rank", "alpha", "dropout", "target_modules", "merge",
)  # fmt: skip
EVAL_QUESTIONS = 500
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")


@command_line
def main(argv=None):
    args = build_parser("train.py", __doc__, learning_rate=2e-5, rate_source="TRL's SFTConfig").parse_args(argv)
    return fine_tune(args, load_full_model)


def fine_tune(args, build_model):
    """The whole job. `build_model(args, files, device)` returns the model; its weights that require gradients are trained."""
    from model import choose_device, find_model, load_tokenizer, positions
    from trainer import (
        AT_ONCE,
        AT_ONCE_ELSEWHERE,
        HeldOut,
        ScoredTrainer,
        build_config,
        choose_pad_token,
        length,
        longest_completion,
        make_savable,
    )

    device = choose_device(args.device)
    check_arguments(args, device)
    files = find_model(args.model_id)
    check_output_dir(args, files)
    tokenizer = load_tokenizer(files)
    columns = Columns(args.question_column, args.answer_column)
    questions = load_questions(args.dataset, "train", args.dataset_config, columns)
    training, held_out = split_questions(args.dataset, questions, args.eval_size, args.seed)
    own = read_completions(args.completions, args.dataset, training + held_out) if args.completions else []
    mode, system_prompt = choose_mode(args.mode, own, tokenizer)
    asked = choose_asking(args, mode, system_prompt, tokenizer)
    ask = partial(build_prompt, mode, tokenizer=tokenizer, **asked)
    end = end_of_turn(mode, tokenizer)
    if own:
        pairs, held_out_pairs = own_pairs(args.completions, own, ask, end.text, training, held_out)
    else:
        clean = strip_annotations if args.strip_annotations else str
        pairs, held_out_pairs = (target_pairs(part, mode, ask, end.text, clean) for part in (training, held_out))
    model = build_model(args, files, device)
    room, embeddings = positions(model), model.get_input_embeddings().num_embeddings
    examples = encode_examples("training", pairs, tokenizer, room, embeddings)
    held_out_examples = encode_examples("held-out", held_out_pairs, tokenizer, room, embeddings)
    if len(examples) < args.batch_size:
        raise UserError(f"--batch-size {args.batch_size}: more than the {len(examples)} examples there are to train on")
    show_examples(examples[:2], tokenizer)
    most = AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE)
    at_once = fit_into_memory(args, model, device, max(map(length, examples)), most)
    products = choose_products(args, model)
    record = run_record(args, files, mode, asked, training, held_out, pairs[0], device, at_once, products)

    def build_trainer(resumed: bool):
        choose_pad_token(model, tokenizer, end.token)
        make_savable(model.generation_config)
        return ScoredTrainer(
            model=model,
            args=build_config(args, len(examples), end.token, device.type == "cpu", resumed),
            processing_class=tokenizer,
            examples=examples,
            held_out=HeldOut(
                examples=held_out_examples,
                questions=held_out[: args.eval_questions],
                ask=ask,
                max_new_tokens=longest_completion(examples),
                stop_texts=COMPLETION_STOP if asked["few_shot_style"] == "completion" else (),
            ),
            at_once=at_once,
            patience=args.patience,
        )

    lesson = "right answers of its own" if own else "reference answers"
    next_command = inference_command(args.output_dir, mode, asked["few_shot_style"], system_prompt)
    return train_in_folder(args, record, build_trainer, ask, lesson, next_command)


def choose_asking(args, mode: str, system_prompt: str | None, tokenizer) -> dict:
    """How `build_prompt` asks: style, system prompt, and the time that a template with a date shows, that of the first start."""
    style = choose_style(mode, tokenizer)
    dated = uses_template(mode, style) and has_date(tokenizer)
    now = read_first_start([args.output_dir / RECORD], args.overwrite) if dated else None
    return {"few_shot_style": style, "system_prompt": system_prompt, "now": now}


def train_in_folder(args, record, build_trainer, ask, lesson: str, next_command: str):
    """Claim --output-dir, train in it or go on there, leave the finished model, and upload it where that is asked for.

    build_trainer(resumed) returns the trainer, a `trainer.Scored`. ask(question) is the prompt that the
    card shows, lesson what it says was learned from, next_command what to run with the finished model.
    """
    from safetensors import SafetensorError

    from linear import products_by
    from trainer import named_save_errors, train

    if args.push_to_hub:  # a refusal comes before the training
        call_hub("create_repo", args.push_to_hub, repo_id=args.push_to_hub, exist_ok=True)
    with locked_folder(args.output_dir):
        # The main process alone looks, for files change while it does.
        finished, checkpoint = gathered(
            claim_folder(args.output_dir, record, args.overwrite, args.resume) if is_main() else None
        )[0]
        if not finished:
            trainer = build_trainer(checkpoint is not None)
            begun = time.perf_counter()
            with named_save_errors(args.output_dir), products_by(record["segments"][-1].get("products"), trainer.model):
                train(trainer, checkpoint)
            spent = {"seconds": round(time.perf_counter() - begun, 3), "peak_memory": peak_memory()}
            record["segments"][-1].update(spent)
            with named_save_errors(args.output_dir, (OSError, RuntimeError, SafetensorError)):
                finish(args, trainer, record, ask, lesson)
            log(f"{args.output_dir}: finished; {next_command}")
            wait_for_all()  # a launcher stops the rest as soon as one process has ended badly
        part_from_all()
    if args.push_to_hub:
        call_hub("upload_folder", args.push_to_hub, repo_id=args.push_to_hub, folder_path=args.output_dir)
    return 0


ALWAYS = (
    "Always so: AdamW and gradients clipped to norm 1 (transformers' defaults), no weight decay (Stanford Alpaca's)."
)


def build_parser(prog, description, learning_rate, rate_source):
    """The flags of training on examples."""
    parser = ArgumentParser(
        prog, description=description, epilog=ALWAYS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shared_flags(parser)
    add = parser.add_argument
    add("--mode", choices=TRAINED_MODES,
        help="prompt to train on, as inference.py asks it (default that of --completions, else chatml_think_prefill, "
        "or cot where the tokenizer lacks ChatML's tokens)")  # fmt: skip
    add("--epochs", type=at_least(1), default=3, help="passes over the training part (default 3: Stanford Alpaca's)")
    add("--learning-rate", type=above_0, default=learning_rate, help=f"peak (default %(default)g: {rate_source})")
    add("--lr-scheduler", choices=SCHEDULERS, default="cosine", help="(default %(default)s: Stanford Alpaca's)")
    add("--warmup", type=from_0, default=0.03,
        help="share of the steps; 1 or more is their number (default %(default)s: Stanford Alpaca's)")  # fmt: skip
    add("--batch-size", type=at_least(1), default=16,
        help="examples a step, over all processes and accumulated parts (default %(default)s: QLoRA's)")  # fmt: skip
    add("--gradient-accumulation", type=at_least(1), default=1,
        help="parts that a process cuts its share of the batch into (default 1)")  # fmt: skip
    add("--strip-annotations", action="store_true", help="train on answers without GSM8K's <<48/2=24>>")
    add("--completions", type=Path, metavar="FILE.jsonl",
        help="train on the model's own right answers, as benchmark.py --keep-correct writes them, not on the references")  # fmt: skip
    return parser


def add_shared_flags(parser: ArgumentParser) -> None:
    """The flags of every training: what is trained, on what data, how it is evaluated, where it goes."""
    add = parser.add_argument
    add("--model-id", default="Qwen/Qwen3-0.6B",
        help="hub id, folder or GGUF file of the model to start from (default %(default)s)")  # fmt: skip
    add_data_flags(parser)
    add("--output-dir", type=Path, required=True, help="folder for the model, its checkpoints, logs and run record")
    add("--max-steps", type=at_least(1), help="stop after so many steps, whatever --epochs says")
    add("--device", help="cpu, cuda, mps or xpu (default the accelerator that is there, else cpu)")
    add("--dtype", choices=("fp32", "bf16"), help="precision of compute (default bf16 on CUDA that has it, else fp32)")
    add("--seed", type=at_least(0), default=42,
        help="of split, order, sampling and adapters (default %(default)s: transformers')")  # fmt: skip
    add("--eval-size", type=at_least(1), default=500, help="train questions to hold out (default %(default)s)")
    add("--eval-questions", type=at_least(0),
        help="held-out questions to answer in every evaluation; their eval_score picks the checkpoint, with 0 "
        f"eval_loss does (default {EVAL_QUESTIONS}, or all of a smaller --eval-size: a standard error of 2.2 points)")  # fmt: skip
    add("--patience", type=at_least(1), help="stop after so many evaluations without a new best (default never)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output-dir, if there is one")
    add("--overwrite", nargs="?", const="always", choices=("always", "changed"),
        help="drop the run that --output-dir holds and begin anew; `changed`: only where it was made by another "
        "command, else --resume")  # fmt: skip
    add("--push-to-hub", metavar="REPO_ID", help="upload the finished folder to the hub")


def number(fits, wanted):
    """An argparse type: a finite number that fits."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wants a number, got {text!r}") from None
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return parse


above_0 = number(lambda value: value > 0, "above 0")


from_0 = number(lambda value: value >= 0, "0 or more")


def check_arguments(args, device):
    """What can be refused before anything is loaded; fills in --dtype and what --overwrite says about --resume."""
    import torch

    from model import choose_dtype

    if args.overwrite == "always" and args.resume:
        raise UserError("--overwrite drops the run that --resume would go on with: pass one of them")
    args.resume = args.resume or args.overwrite == "changed"
    if args.completions and args.strip_annotations:
        raise UserError("--strip-annotations: is for reference answers, and --completions takes others in their place")
    if args.eval_questions is None:
        args.eval_questions = min(EVAL_QUESTIONS, args.eval_size)
    if args.eval_questions > args.eval_size:
        raise UserError(f"--eval-questions {args.eval_questions}: only --eval-size {args.eval_size} are held out")
    parts = processes() * args.gradient_accumulation
    if args.batch_size % parts:
        raise UserError(
            f"--batch-size {args.batch_size}: cannot be cut into {parts} equal parts "
            f"({processes()} processes, --gradient-accumulation {args.gradient_accumulation})"
        )
    if device.index is not None and processes() == 1:
        raise UserError(
            f"--device {args.device}: training takes the kind of device alone, such as {device.type}; "
            f"CUDA_VISIBLE_DEVICES={device.index} picks one GPU"
        )
    if device.type == "cuda" and torch.cuda.device_count() > 1 and processes() == 1:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible to one process; start with accelerate launch, "
            "or make one visible with CUDA_VISIBLE_DEVICES=0"
        )
    if args.dtype is None:
        args.dtype = "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"
    elif args.dtype == "bf16" and not has_bf16(device):
        raise UserError(f"--dtype bf16: {device.type} has no bf16 here; pass --dtype fp32")
    elif device.type == "cpu":
        choose_dtype(args.dtype, device)  # says so where bf16 is the slower one


def has_bf16(device) -> bool:
    """Whether the device computes in bf16 by itself."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" or is_torch_bf16_gpu_available()


def check_output_dir(args, files):
    """--overwrite empties the folder: nothing that the run reads may stand in it."""
    read = {"--model-id": files.folder, "the adapter's base": files.base and files.base.folder,
            "--dataset": Path(args.dataset), "--completions": args.completions}  # fmt: skip
    for name, path in read.items():
        if path and path.exists() and path.resolve().is_relative_to(args.output_dir.resolve()):
            raise UserError(f"--output-dir {args.output_dir}: holds {name} ({path}); pass another folder")


def split_questions(dataset: str, questions: list[Question], eval_size: int, seed: int):
    """(training part, held-out part) of the train split, by seed. A question is never in both."""
    refuse_unscorable(questions, dataset, "train")
    if eval_size >= len(questions):
        raise UserError(f"--eval-size {eval_size}: {dataset} has {len(questions)} train questions; hold out fewer")
    order = random.Random(seed).sample(questions, len(questions))
    held_out, training = order[:eval_size], order[eval_size:]
    held_texts = {question.question for question in held_out}
    kept = [question for question in training if question.question not in held_texts]
    if len(kept) < len(training):
        log(f"{len(training) - len(kept)} training questions dropped: they are held out under another number")
    log(f"{len(questions)} train questions: {len(kept)} to train on, {len(held_out)} held out (seed {seed})")
    return kept, held_out


def choose_mode(mode: str | None, completions: list[dict], tokenizer) -> tuple[str, str | None]:
    """(mode, system prompt) of the prompts to train on: what the completions were sampled with, else what --mode says."""
    if completions:
        sampled = completions[0]["mode"]
        if mode not in (None, sampled):
            raise UserError(f"--mode {mode}: --completions holds answers of mode {sampled}; leave --mode out")
        return sampled, completions[0].get("system_prompt")
    if mode is None and not has_token(tokenizer, "<|im_start|>"):
        log("mode cot: the tokenizer has no <|im_start|>, so chatml_think_prefill cannot be asked")
        return "cot", None
    return mode or "chatml_think_prefill", None


def choose_style(mode: str, tokenizer) -> str:
    """How the question is put, as inference.py's --few-shot-style: in plain text where the model has no template for it."""
    if tokenizer.chat_template or MODES[mode].raw or MODES[mode].thinks:
        return "prompt"
    log("the tokenizer has no chat template: asked in plain text, as --few-shot-style completion does")
    return "completion"


def choose_products(args, model) -> str:
    """Which library multiplies in the model's large layers: "oneDNN" where it pays, else "torch", which chooses itself.

    Their sums round differently. A run that goes on keeps what it began with, whatever would be measured now.
    """
    from linear import onednn_pays

    chosen = "oneDNN" if args.dtype == "fp32" and onednn_pays(model) else "torch"
    with contextlib.suppress(UserError, KeyError, TypeError, IndexError, AttributeError):  # no run, or a damaged record
        if args.resume:
            chosen = read_json(args.output_dir / RECORD)["segments"][0].get("products", "torch")
    return gathered(chosen)[0]


class End(NamedTuple):
    """How a completion ends: the text that closes the turn, and the token that it ends with."""

    text: str
    token: str


def end_of_turn(mode: str, tokenizer) -> End:
    """What the model's template puts behind an answer, up to its first special token; without a template, the end token.

    Raises UserError where there is neither.
    """
    if mode == "chatml_think_prefill":
        return End("<|im_end|>", "<|im_end|>")
    special = {content.content for content in tokenizer.added_tokens_decoder.values() if content.special}
    if tokenizer.chat_template:
        answer = "the answer"
        messages = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": answer}]
        template = choose_template(tokenizer)
        behind = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False).rpartition(answer)[2]
        places = {behind.find(token): token for token in special if token in behind}
        if places:
            first = min(places)
            return End(behind[:first] + places[first], places[first])
    if not tokenizer.eos_token:
        raise UserError(
            f"{tokenizer.name_or_path}: has no token that ends an answer (eos_token in its tokenizer_config.json)"
        )
    return End(tokenizer.eos_token, tokenizer.eos_token)


def own_pairs(path, completions: list[dict], ask, end: str, training: list[Question], held_out: list[Question]):
    """The (prompt, completion) pairs of sampled completions: of the training questions, and of the held-out ones."""
    pairs = []
    for name, part in (("training", training), ("held-out", held_out)):
        texts = {question.question for question in part}
        chosen = [
            (ask(line["question"]), line["model_output"] + end) for line in completions if line["question"] in texts
        ]
        if not chosen:
            raise UserError(f"--completions {path}: holds none of the {len(part)} {name} questions; sample more")
        pairs.append(chosen)
    mode = completions[0]["mode"]
    log(
        f"{len(completions)} completions of mode {mode}: {len(pairs[0])} to train on, {len(pairs[1])} of held-out questions"
    )
    return pairs


def read_completions(path: Path, dataset: str, questions: list[Question]) -> list[dict]:
    """The lines of --completions: all of one mode and system prompt, all of the train split's questions."""
    known = {question.question for question in questions}
    lines, first = [], None
    for number, line in read_jsonl(path, ("question", "model_output", "mode")):
        place, asked = f"--completions {path}:{number}", (line["mode"], line.get("system_prompt"))
        for key in ("question", "model_output"):
            if not isinstance(line[key], str) or not is_text(line[key]):
                raise UserError(f"{place}: {key!r} must be text")
        if line["mode"] not in TRAINED_MODES:
            raise UserError(f"{place}: mode {line['mode']!r}: a prompt of it cannot be built from the question alone")
        if asked != (first or asked):
            raise UserError(f"{place}: another mode or system prompt than on line 1; keep one run's completions a file")
        if line["question"] not in known:
            raise UserError(f"{place}: its question is not of the train split of {dataset}")
        first = asked
        lines.append(line)
    if not lines:
        raise UserError(f"--completions {path}: holds no completion")
    return lines


def target_pairs(questions: list[Question], mode: str, ask, end: str, clean=str) -> list[tuple[str, str]]:
    """(prompt, completion) of every question: what inference asks, and what the model learns to write.

    clean: what is done to a reference answer first, such as `strip_annotations`.
    """
    prompts = [ask(item.question) for item in questions]
    return [
        (prompt, target_completion(clean(item.answer), mode, prompt) + end)
        for prompt, item in zip(prompts, questions, strict=True)
    ]


def target_completion(answer: str, mode: str, prompt: str) -> str:
    """A reference answer as the completion of a prompt: the reasoning, then the line `#### N`.

    The reasoning is a thought where the prompt has opened one, or where the mode is `thinking`; in
    zero_shot there is none.
    """
    reasoning, marker, number = answer.rpartition("####")
    reasoning = "" if mode == "zero_shot" else reasoning.strip()
    final = f"#### {number.strip() if marker else whole_number(number)}"
    if thinking_is_open(prompt):
        opening = "" if prompt[-1].isspace() else "\n"  # behind the tag
        reasoning = f"{reasoning}\n" if reasoning else ""  # two line breaks would merge with that of the prompt
        return f"{opening}{reasoning}</think>\n\n{final}"
    if mode == "thinking":
        return f"<think>\n{reasoning}\n</think>\n\n{final}"
    opening = " " if prompt.endswith("Answer:") else ""  # a plain-text prompt
    return f"{opening}{reasoning}\n{final}" if reasoning else f"{opening}{final}"


def encode_examples(name: str, pairs: list[tuple[str, str]], tokenizer, positions: int, embeddings: int) -> list[dict]:
    """Tokenize (prompt, completion) pairs, prompts as inference does; labels cover the completion alone.

    Dropped, counted and printed: what the model's positions cannot hold, for cutting it would cut the
    answer, and what changes the prompt's tokens, for inference would never see those. Raises UserError
    where nothing is left, or a token's id is beyond the model's embeddings.
    """
    from trainer import IGNORED

    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=False)["input_ids"]
    wholes = tokenizer([prompt + completion for prompt, completion in pairs], add_special_tokens=False)["input_ids"]
    examples, too_long, merged = [], 0, 0
    for prompt, whole in zip(prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt:
            merged += 1
        elif len(whole) > positions:
            too_long += 1
        else:
            examples.append({"input_ids": whole, "labels": [IGNORED] * len(prompt) + whole[len(prompt) :]})
    reasons = {f"longer than the model's {positions} positions": too_long, "prompt and completion merge": merged}
    for reason, count in reasons.items():
        if count:
            log(f"{count} of {len(pairs)} {name} examples dropped: {reason}")
    if not examples:
        raise UserError(f"no {name} example is left of {len(pairs)}")
    largest = max(max(example["input_ids"]) for example in examples)
    if largest >= embeddings:
        raise UserError(
            f"{tokenizer.name_or_path}: the token {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, "
            f"and the model knows {embeddings}; pass the tokenizer that the model was trained with"
        )
    return examples


def show_examples(examples: list[dict], tokenizer) -> None:
    """What is trained and what is not, of the first examples."""
    from trainer import IGNORED

    for number, example in enumerate(examples):
        learned = sum(label != IGNORED for label in example["labels"])
        start = len(example["labels"]) - learned
        log(
            f"--- example {number}: {start} tokens of prompt, not trained\n"
            f"{printable(tokenizer.decode(example['input_ids'][:start]))}\n"
            f"--- example {number}: {learned} tokens of completion, trained\n"
            f"{printable(tokenizer.decode(example['input_ids'][start:]))}\n---"
        )


def run_record(args, files, mode, asked, training, held_out, pair, device, at_once, products):
    """What decides the weights and what describes this run, as inference.py records it."""
    from model import quantization

    decides = {name: getattr(args, name) for name in DECIDING_FLAGS if hasattr(args, name)}
    if mode != "chatml_think_prefill" and not args.completions:  # else it is in none of the records made before
        decides["mode"] = mode
    decides |= {
        "training_sha256": hash_questions(training),
        "held_out_sha256": hash_questions(held_out),
        "prompt": pair[0],
        "completion": pair[1],
        "completions": hash_file(args.completions) if args.completions else None,
    } | {f"sha256 of {name}": value for name, value in files.hashes().items()}
    segment = {
        "model": args.model_id,
        "dataset": args.dataset,
        "mode": mode,
        "command": args.command,
        "processes": processes(),
        "gradient_accumulation": args.gradient_accumulation,
        "at_once": at_once,
        "seconds": None,
    } | describe_run(device)
    if asked["now"]:
        segment["template_time"] = asked["now"].isoformat()
    if products != "torch":
        segment["products"] = products
    if quantization(files):
        segment["quantization"] = quantization(files)
    return {"decides": decides, "segments": [segment], "result": None}


def load_full_model(args, files, device):
    """All weights in fp32, whatever precision computes: in bf16 most steps would round to nothing."""

    from model import load_model

    return load_model(files, "fp32", device).requires_grad_()  # a merged adapter leaves its base frozen


def fit_into_memory(args, model, device, longest: int, most: int) -> int:
    """How many sequences go through the model together, by estimate; UserError where memory is too small for one.

    longest: tokens of the longest sequence. most: how many are enough.
    """
    from model import free_memory

    free = free_memory(device)
    state = training_bytes(args.dtype, model, longest, 0)
    sequence = training_bytes(args.dtype, model, longest, 1) - state
    most = min(most, args.batch_size)
    at_once = next((count for count in range(most, 0, -1) if state + count * sequence <= free), None)
    if at_once is None:
        raise UserError(
            f"training needs about {(state + sequence) / 2**30:.1f} GiB beside the weights, {state / 2**30:.1f} of it for "
            f"gradients and optimizer, and {free / 2**30:.1f} are free; train_lora.py or a smaller model need less"
        )
    if at_once < most:
        log(f"memory is short: {at_once} sequences at once, not {most}, which costs time and changes nothing else")
    log(
        f"memory: about {(state + at_once * sequence) / 2**30:.2f} GiB beside the weights, {free / 2**30:.1f} free; "
        f"{trainable(model):,} of {sum(weight.numel() for weight in model.parameters()):,} weights are trained"
    )
    return at_once


def training_bytes(dtype: str, model, longest: int, at_once: int) -> int:
    """What training holds beside the weights, by estimate: the optimizer, and `at_once` sequences of the longest."""
    state = 12 * trainable(model)  # gradient and AdamW's two moments, in fp32; the weight, 4 more, is loaded already
    if dtype == "bf16":
        state += 2 * trainable(model)  # autocast's copies
    element = 2 if dtype == "bf16" else 4
    fused_head = model.device.type == "cuda"
    return state + at_once * longest * activation_bytes_per_token(model, element, fused_head)


def trainable(model):
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def activation_bytes_per_token(model, element, fused_head):
    """What a token keeps for the backward pass, by counting what the layers of a Llama-like model save.

    A layer: six times the hidden size (both norms twice, two inputs of matrices), query and output twice,
    key and value twice, four times the MLP's width. An adapted matrix: its output once more, for the C library's
    heap keeps the place of what was freed; with dropout the input and its mask too. On top,
    without a fused head, the logits, their softmax and its gradient.
    """
    from torch.nn import Dropout

    config = model.config.get_text_config()
    heads, hidden = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = 6 * hidden + 4 * heads * head + 4 * groups * head + 4 * width
    adapted = 0
    for matrix in (module for module in model.modules() if hasattr(module, "lora_dropout")):
        dropout = any(isinstance(part, Dropout) for part in matrix.lora_dropout.values())
        adapted += matrix.out_features + 2 * dropout * matrix.in_features
    numbers = config.num_hidden_layers * layer + adapted
    return numbers * element + (0 if fused_head else 3 * 4 * config.vocab_size)


def finish(args, trainer, record, ask, lesson: str):
    """The model with its tokenizer, the trainer's state, curves, card and record; then no more checkpoints."""

    from model import merge
    from trainer import evaluations, not_improved

    scored = evaluations(trainer)
    best = scored.get(trainer.state.best_global_step)
    diverged = not math.isfinite([*scored.values()][-1]["eval_loss"])
    if best is None or (diverged and best["step"] == 0):
        raise UserError(
            f"--learning-rate {args.learning_rate:g}: the training diverged before it was of any use; pass a smaller one"
        )
    if getattr(args, "merge", False):
        trainer.model = merge(trainer.model.float())
    elif hasattr(trainer.model, "peft_config") and is_main():  # peft saves none, and the end token stands there
        trainer.model.generation_config.save_pretrained(args.output_dir)
    trainer.save_model()
    trainer.save_state()
    wait_for_all()  # until each has read the best checkpoint
    if not is_main():
        return
    write_atomically(args.output_dir / "README.md", model_card(args, trainer, ask, lesson))
    draw_curves(trainer.state.log_history, trainer.curves, args.output_dir / "training.png")
    record["result"] = best | {"last_step": trainer.state.global_step}
    write_record(args.output_dir, record)
    drop_checkpoints(args.output_dir)
    for line in [*trainer.summary(), *not_improved(trainer)]:
        log(line)


def inference_command(folder: Path, mode: str, style: str, system_prompt: str | None) -> str:
    """The command that asks the finished model what it was trained on."""
    more = ["--few-shot-style", style] if style == "completion" else []
    more += [] if system_prompt is None else ["--system-prompt", system_prompt]
    return shlex.join(["python", "inference.py", "--mode", mode, *more, "--model-id", str(folder)])


def call_hub(method, name, **arguments):
    """One call of the hub's own client; its refusals become one line."""
    from huggingface_hub import HfApi

    if not is_main():
        return
    try:
        getattr(HfApi(), method)(**arguments)
    except Exception as error:  # hub, network and permission errors share no base class
        raise UserError(f"--push-to-hub {name}: {first_line(error)}") from error


def model_card(args, trainer, ask, lesson: str) -> str:
    from trainer import evaluations, not_improved

    best = trainer.state.best_global_step
    rows = []
    for step, row in evaluations(trainer).items():
        score = f"{row['eval_score']:.1f} ± {row['eval_score_stderr']:.1f}" if "eval_score" in row else "-"
        kept = "kept" if step == best else ""
        rows.append(f"| {step} | {row['epoch']:.2f} | {row['eval_loss']:.4f} | {score} | {kept} |")
    method = f"LoRA of rank {args.rank}" if hasattr(args, "rank") else "all weights"
    on_hub = not Path(args.model_id).exists()
    length = f"{args.max_steps} steps" if args.max_steps else f"{args.epochs} epochs"
    library = "peft" if hasattr(args, "rank") and not args.merge else "transformers"
    return "\n".join(
        [
            "---",
            *([f"base_model: {args.model_id}"] if on_hub else []),
            *([f"datasets: [{args.dataset}]"] if not Path(args.dataset).exists() else []),
            f"library_name: {library}",
            "---",
            "",
            f"# {plain_markdown(args.model_id)} fine-tuned on {plain_markdown(args.dataset)}",
            "",
            f"Fine-tuned ({method}) on {lesson}: {length} at most, learning rate {args.learning_rate:g},",
            f"{args.lr_scheduler}, warm-up {args.warmup:g}, batch {args.batch_size}, {args.dtype}, seed {args.seed}. Scores are of {len(trainer.held_out.questions)} questions",
            "held out of the train split, in percent with their standard error; the test split was not read.",
            "",
            "| step | epoch | eval_loss | eval_score | |",
            "| ---: | ---: | ---: | ---: | --- |",
            *rows,
            "",
            *(line for sentence in not_improved(trainer) for line in (sentence, "")),
            *trainer.summary(),
            "It was trained to go on from this prompt:",
            "",
            code_block(ask("QUESTION")),
            "",
        ]
    )


def draw_curves(history: list[dict], curves: tuple, path: Path) -> None:
    """A PNG with a panel for each (label, names in the log) of `curves`, and one for eval_score, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = [entry for entry in history if "eval_score" in entry]
    panels = len(curves) + bool(scored)
    figure, axes = pyplot.subplots(panels, sharex=True, figsize=(8, 3 * panels), layout="constrained", squeeze=False)
    for axis, (label, names) in zip(axes[:, 0], curves, strict=False):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            axis.plot(*zip(*points, strict=True), "o-" if name.startswith("eval") else "-", label=name)
        axis.set_ylabel(label)
        if len(names) > 1:
            axis.legend()
    if scored:
        columns = ([entry[name] for entry in scored] for name in ("step", "eval_score", "eval_score_stderr"))
        axes[-1, 0].errorbar(*columns, fmt="o-", capsize=3)
        axes[-1, 0].set_ylabel("eval_score, % ± standard error")
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
