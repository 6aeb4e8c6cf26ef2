"""Fine-tune all weights of a language model on grade-school math, with TRL's SFTTrainer.

Trains on exactly the prompt that `inference.py --mode chatml_think_prefill` asks with. Part of the
train split is held out; after every epoch the model answers questions of it, and the checkpoint with
the most right answers is the one that is kept. The test split is never read:

    python train.py --output-dir outputs/sft
    python train.py --model-id demo/model --dataset demo/problems --learning-rate 1e-3 --output-dir outputs/demo-sft
    accelerate launch --multi_gpu --num_processes 2 train.py --output-dir outputs/sft
    python inference.py --model-id outputs/sft --mode chatml_think_prefill

A run that was stopped or killed goes on with the same command and --resume. Two processes on a CPU
need --multi_gpu as well: without it accelerate starts one.
"""

import argparse
import contextlib
import datetime
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from common import (
    MODES,
    ArgumentParser,
    Decoding,
    Request,
    Terminated,
    UserError,
    at_least,
    build_prompt,
    chatml_think_prefill,
    choose_device,
    command_line,
    compare_records,
    describe_run,
    find_model,
    first_line,
    free_memory,
    generate,
    hash_file,
    hash_questions,
    is_main,
    is_text,
    load_model,
    load_questions,
    load_tokenizer,
    log,
    part_from_all,
    positions,
    printable,
    processes,
    read_gold,
    read_json,
    read_jsonl,
    score_final,
    strip_annotations,
    thinking_is_open,
    wait_for_all,
    write_atomically,
)

RECORD = "train.run.json"
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
EVAL_MAX_NEW_TOKENS = 512  # the longest reference completion of GSM8K's train split has 456 tokens; more where rows are longer
PART_ROWS = {"cpu": 3, "cuda": 8}  # of a batch that go through the model at once
IGNORED = -100  # the label of a token that is not trained, as torch's cross_entropy has it


@command_line
def main(argv=None):
    args = build_parser("train.py", __doc__, learning_rate=2e-5, rate_source="TRL's SFTConfig").parse_args(argv)
    return fine_tune(args, load_full_model)


def fine_tune(args, build_model):
    """The whole job. `build_model(args, files, device)` returns the model and what of it is trained."""
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.*")  # TRL 1.16 and peft still use the old name
    check_arguments(args)
    files = find_model(args.model_id)
    check_output_dir(args, files)
    tokenizer = load_tokenizer(files)
    training, held_out = split_questions(args, load_questions(args.dataset, "train"))
    ask, *pairs = choose_pairs(args, tokenizer, training, held_out)
    device = choose_device(None)
    model = build_model(args, files, device)
    rows, held_out_rows = encode_parts(args, model, tokenizer, *pairs)
    show_examples(rows[:2], tokenizer)
    parts = fit_into_memory(args, model, device, rows)
    record = run_record(args, files, training, held_out, pairs[0][0], device, parts)
    if args.push_to_hub:  # a refusal comes before the training
        call_hub("create_repo", args.push_to_hub, repo_id=args.push_to_hub, exist_ok=True)
    with locked(args.output_dir):
        # The main process alone looks, for files change while it does.
        finished, checkpoint = gathered(claim_folder(args, record) if is_main() else None)[0]
        if not finished:
            config = build_config(args, parts, len(rows), checkpoint)
            trainer = build_trainer(args, config, model, tokenizer, rows, held_out_rows, held_out, ask)
            begun = time.perf_counter()
            train(trainer, checkpoint)
            record["segments"][-1]["seconds"] = round(time.perf_counter() - begun, 3)
            finish(args, trainer, record)
            wait_for_all()  # a launcher stops the rest as soon as one process has ended badly
        part_from_all()
        if args.push_to_hub:
            call_hub("upload_folder", args.push_to_hub, repo_id=args.push_to_hub, folder_path=args.output_dir)
    return 0


# ------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------


def build_parser(prog, description, learning_rate, rate_source):
    fixed = "Always so: AdamW and gradients clipped to norm 1 (transformers' defaults), no weight decay (Stanford Alpaca's)."
    parser = ArgumentParser(prog, description=description, epilog=fixed, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-id", default="Qwen/Qwen3-0.6B", help="hub id or folder of the model to start from (default %(default)s)")
    add("--dataset", default="openai/gsm8k", help="hub id, or folder with train.jsonl (default %(default)s)")
    add("--output-dir", type=Path, required=True, help="folder for the model, its checkpoints, logs and run record")
    add("--epochs", type=at_least(1), default=3, help="passes over the training part (default 3: Stanford Alpaca's)")
    add("--max-steps", type=at_least(1), help="stop after so many steps, whatever --epochs says")
    add("--learning-rate", type=above_0, default=learning_rate, help=f"peak (default %(default)g: {rate_source})")
    add("--lr-scheduler", choices=SCHEDULERS, default="cosine", help="(default %(default)s: Stanford Alpaca's)")
    add("--warmup", type=from_0, default=0.03,
        help="share of the steps, or from 1 on their number (default %(default)s: Stanford Alpaca's)")  # fmt: skip
    add("--batch-size", type=at_least(1), default=16,
        help="examples a step, over all processes and accumulated parts (default %(default)s: QLoRA's)")  # fmt: skip
    add("--gradient-accumulation", type=at_least(1), default=1,
        help="parts that a process cuts its share of the batch into (default 1, more where memory is short)")  # fmt: skip
    add("--dtype", choices=("fp32", "bf16"), help="precision of compute (default bf16 on CUDA that has it, else fp32)")
    add("--seed", type=at_least(0), default=42, help="of split, order and adapters (default %(default)s: transformers')")
    add("--eval-size", type=at_least(1), default=500, help="train questions to hold out (default %(default)s)")
    add("--eval-questions", type=at_least(0), default=500,
        help="held-out questions to answer after every epoch; their eval_score picks the checkpoint, with 0 "
        "eval_loss does (default %(default)s: a standard error of 2.2 points)")  # fmt: skip
    add("--patience", type=at_least(1), help="stop after so many evaluations without a new best (default never)")
    add("--strip-annotations", action="store_true", help="train on answers without GSM8K's <<48/2=24>>")
    add("--completions", type=Path, metavar="FILE.jsonl",
        help="train on the model's own right answers, as benchmark.py --keep-correct writes them, not on the references")  # fmt: skip
    add("--resume", action="store_true", help="go on from the last checkpoint in --output-dir, if there is one")
    add("--overwrite", nargs="?", const="always", choices=("always", "changed"),
        help="drop the run that --output-dir holds and begin anew; `changed`: only where it was made by another "
        "command, else --resume")  # fmt: skip
    add("--push-to-hub", metavar="REPO_ID", help="upload the finished folder to the hub")
    return parser


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


def check_arguments(args):
    """What can be refused before anything is loaded."""
    import torch

    if args.overwrite == "always" and args.resume:
        raise UserError("--overwrite drops the run that --resume would go on with: pass one of them")
    args.resume = args.resume or args.overwrite == "changed"
    if args.completions and args.strip_annotations:
        raise UserError("--strip-annotations: is for reference answers, and --completions takes others in their place")
    if args.eval_questions > args.eval_size:
        raise UserError(f"--eval-questions {args.eval_questions}: only --eval-size {args.eval_size} are held out")
    parts = processes() * args.gradient_accumulation
    if args.batch_size % parts:
        raise UserError(
            f"--batch-size {args.batch_size}: cannot be cut into {parts} equal parts "
            f"({processes()} processes, --gradient-accumulation {args.gradient_accumulation})"
        )
    if torch.cuda.device_count() > 1 and processes() == 1:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible to one process; start with accelerate launch, "
            "or make one visible with CUDA_VISIBLE_DEVICES=0"
        )
    cuda = torch.cuda.is_available()
    if args.dtype is None:
        args.dtype = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    elif args.dtype == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--dtype bf16: this GPU has no bf16; pass --dtype fp32")


def check_output_dir(args, files):
    """--overwrite empties the folder: nothing that the run reads may stand in it."""
    read = {"--model-id": files.folder, "the adapter's base": files.base and files.base.folder,
            "--dataset": Path(args.dataset), "--completions": args.completions}  # fmt: skip
    for name, path in read.items():
        if path and path.exists() and path.resolve().is_relative_to(args.output_dir.resolve()):
            raise UserError(f"--output-dir {args.output_dir}: holds {name} ({path}); pass another folder")


# ------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------


def split_questions(args, questions):
    """(training part, held-out part) of the train split, by seed. A question is never in both."""
    for question in questions:
        try:
            read_gold(question.answer)
        except UserError as error:
            raise UserError(f"{args.dataset}, train question {question.id}: {error}") from error
    if args.eval_size >= len(questions):
        raise UserError(f"--eval-size {args.eval_size}: {args.dataset} has {len(questions)} train questions")
    order = random.Random(args.seed).sample(questions, len(questions))
    held_out, training = order[: args.eval_size], order[args.eval_size :]
    held_texts = {question.question for question in held_out}
    kept = [question for question in training if question.question not in held_texts]
    if len(kept) < len(training):
        log(f"{len(training) - len(kept)} training questions dropped: they are held out under another number")
    log(f"{len(questions)} train questions: {len(kept)} to train on, {len(held_out)} held out (seed {args.seed})")
    return kept, held_out


def choose_pairs(args, tokenizer, training, held_out):
    """How a question is asked, and the (prompt, completion) pairs to train and to evaluate on."""
    if not args.completions:
        return chatml_think_prefill, *(target_pairs(part, args.strip_annotations) for part in (training, held_out))
    lines = read_completions(args, {question.question for question in training + held_out})
    mode, system_prompt = lines[0]["mode"], lines[0].get("system_prompt")

    def ask(question):
        return build_prompt(mode, question, tokenizer, system_prompt=system_prompt)

    pairs = []
    for name, part in (("training", training), ("held-out", held_out)):
        texts = {question.question for question in part}
        pairs.append([(ask(row["question"]), f"{row['model_output']}<|im_end|>") for row in lines if row["question"] in texts])
        if not pairs[-1]:
            raise UserError(f"--completions {args.completions}: holds none of the {len(part)} {name} questions; sample more")
    log(f"{len(lines)} completions of mode {mode}: {len(pairs[0])} to train on, {len(pairs[1])} of held-out questions")
    return ask, *pairs


def read_completions(args, known):
    """The lines of --completions: all of one mode and system prompt, all of the train split's questions."""
    lines, first = [], None
    for number, row in read_jsonl(args.completions, ("question", "model_output", "mode")):
        place, asked = f"--completions {args.completions}:{number}", (row["mode"], row.get("system_prompt"))
        for key in ("question", "model_output"):
            if not isinstance(row[key], str) or not is_text(row[key]):
                raise UserError(f"{place}: {key!r} must be text")
        if row["mode"] not in MODES or row["mode"] == "few_shot":
            raise UserError(f"{place}: mode {row['mode']!r}: a prompt of it cannot be built from the question alone")
        if asked != (first or asked):
            raise UserError(f"{place}: another mode or system prompt than on line 1; keep one run's completions a file")
        if row["question"] not in known:
            raise UserError(f"{place}: its question is not of the train split of {args.dataset}")
        first = asked
        lines.append(row)
    if not lines:
        raise UserError(f"--completions {args.completions}: holds no completion")
    return lines


def target_pairs(questions, without_annotations=False):
    """(prompt, completion) of every question: what inference asks, and what the model learns to write."""
    clean = strip_annotations if without_annotations else str
    return [(chatml_think_prefill(item.question), target_completion(clean(item.answer))) for item in questions]


def target_completion(answer):
    """A reference answer as the end of an open thought: the reasoning, `</think>`, the final line."""
    reasoning, _, number = answer.rpartition("####")
    return f"{reasoning.strip()}\n</think>\n\n#### {number.strip()}<|im_end|>"


def encode_rows(name, pairs, tokenizer, most):
    """Tokenize (prompt, completion) pairs, prompts as inference does; labels cover the completion alone.

    Dropped, counted and printed: what the model's positions cannot hold, for cutting it would cut
    the answer, and what would be other tokens as one text, for inference would never see those.
    """
    if "<|im_end|>" not in tokenizer.get_vocab():
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no <|im_end|>, which ends every ChatML answer")
    prompts, completions = zip(*pairs, strict=True)
    texts = list(prompts), list(completions), [prompt + completion for prompt, completion in pairs]
    encoded = [tokenizer(batch, add_special_tokens=False)["input_ids"] for batch in texts]
    rows, too_long, merged = [], 0, 0
    for prompt, completion, whole in zip(*encoded, strict=True):
        if prompt + completion != whole:
            merged += 1
        elif len(whole) > most:
            too_long += 1
        else:
            rows.append({"input_ids": whole, "labels": [IGNORED] * len(prompt) + completion})
    reasons = {f"longer than the model's {most} positions": too_long, "prompt and completion merge": merged}
    for reason, count in reasons.items():
        if count:
            log(f"{count} of {len(pairs)} {name} examples dropped: {reason}")
    if not rows:
        raise UserError(f"no {name} example is left of {len(pairs)}")
    return rows


def encode_parts(args, model, tokenizer, training, held_out):
    """The rows of pairs to train on and the rows to evaluate on, as many as the model's positions can hold."""
    most = positions(model)
    rows, held_out_rows = (
        encode_rows(name, pairs, tokenizer, most) for name, pairs in (("training", training), ("held-out", held_out))
    )
    if len(rows) < args.batch_size:
        raise UserError(f"--batch-size {args.batch_size}: more than the {len(rows)} examples there are to train on")
    return rows, held_out_rows


def len_ids(row):
    return len(row["input_ids"])


def show_examples(rows, tokenizer):
    """What is trained and what is not, of the first rows."""
    for number, row in enumerate(rows):
        learned = sum(label != IGNORED for label in row["labels"])
        start = len_ids(row) - learned
        log(
            f"--- example {number}: {start} tokens of prompt, not trained\n"
            f"{printable(tokenizer.decode(row['input_ids'][:start]))}\n"
            f"--- example {number}: {learned} tokens of completion, trained\n"
            f"{printable(tokenizer.decode(row['input_ids'][start:]))}\n---"
        )


def epoch_order(examples, batch_size, seed, epoch):
    """The rows of an epoch in order, shuffled.

    A function of its arguments alone, so that a resumed run and any number of processes see the same
    batches. The rest that fills no batch, other rows in every epoch, is left out.
    """
    return random.Random(f"{seed} {epoch}").sample(range(examples), examples - examples % batch_size)


# ------------------------------------------------------------------------------------------
# Output folder
# ------------------------------------------------------------------------------------------


def run_record(args, files, training, held_out, pair, device, parts):
    """What decides the weights and what describes this run, as inference.py records it."""
    described = ("model_id", "dataset", "output_dir", "gradient_accumulation", "resume", "overwrite", "push_to_hub", "command")
    decides = {name: value for name, value in vars(args).items() if name not in described}
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
        "command": args.command,
        "processes": processes(),
        "gradient_accumulation": parts,
        "seconds": None,
    } | describe_run(device)
    return {"decides": decides, "segments": [segment], "result": None}


@contextlib.contextmanager
def locked(folder):
    """The folder, made where there is none, held against a second run of it; the main process holds it for all."""
    if not is_main():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            told = "another process trains in it; wait for it or pass another folder"
            raise UserError(f"--output-dir {folder}: {told}") from error
        yield
    finally:
        os.close(handle)


def gathered(value):
    """The values of all processes, in every process."""
    if processes() == 1:
        return [value]
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    try:
        PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(seconds=1800))  # transformers' ddp_timeout
        return gather_object([value])
    except RuntimeError as error:
        raise UserError("another process has stopped, and says why") from error


def claim_folder(args, record):
    """Make the folder this run's own: (whether it is finished, the checkpoint to go on from). UserError where it holds another."""
    folder, path = args.output_dir, args.output_dir / RECORD
    try:
        if path.exists():
            drop_or_go_on(args, path, record)
        held = sorted(entry.name for entry in folder.iterdir())
        if held and not path.exists():
            raise UserError(f"--output-dir {folder}: holds {held[0]!r} and no {RECORD}; pass an empty folder")
        if path.exists() and read_json(path)["result"]:
            log(f"{folder}: finished already")
            drop_checkpoints(folder)  # which a kill may have left
            return True, None
        write_record(args, record)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written: {error.strerror}") from error
    return False, last_checkpoint(folder) if args.resume else None


def drop_or_go_on(args, path, record):
    """Take over the segments of the run in the folder, or empty it, as --resume and --overwrite say."""
    try:
        if args.overwrite != "always":
            if not args.resume:
                raise UserError(f"--output-dir {args.output_dir}: holds another run; pass --resume, --overwrite or another folder")
            old = read_json(path)
            compare_records(path, old, record, "pass the same flags, --overwrite, or another --output-dir")
            record["segments"] = old["segments"] + record["segments"]
            return
    except UserError as error:
        if args.overwrite != "changed":
            raise
        log(f"made again: {str(error).partition(';')[0]}")
    for entry in args.output_dir.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def write_record(args, record):
    write_atomically(args.output_dir / RECORD, json.dumps(record, indent=2) + "\n")


def checkpoints(folder):
    """The checkpoint folders, the newest last."""
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def drop_checkpoints(folder):
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)


def last_checkpoint(folder):
    """The newest whole checkpoint, or None. The trainer's state is written last: without it, a kill cut it short."""
    for checkpoint in reversed(checkpoints(folder)):
        with contextlib.suppress(UserError):
            step = read_json(checkpoint / "trainer_state.json")["global_step"]
            log(f"going on after step {step}, from {checkpoint}")
            return checkpoint
    log(f"{folder}: no checkpoint yet, beginning anew")
    return None


# ------------------------------------------------------------------------------------------
# Model and memory
# ------------------------------------------------------------------------------------------


def load_full_model(args, files, device):
    """All weights in fp32, whatever precision computes: in bf16 most steps would round to nothing."""
    return load_model(files, "fp32", device).requires_grad_()  # a merged adapter leaves its base frozen


def fit_into_memory(args, model, device, rows):
    """How many parts a process must cut its share of a batch into, by estimate; UserError where no cut is enough."""
    free = free_memory(device)
    state = 12 * trainable(model)  # gradient and AdamW's two moments, in fp32; the weight, 4 more, is loaded already
    element = 2 if args.dtype == "bf16" else 4
    row = max(map(len_ids, rows)) * activation_bytes_per_token(model, element, fused_head=device.type == "cuda")
    share = args.batch_size // processes()
    possible = [parts for parts in range(args.gradient_accumulation, share + 1) if share % parts == 0]
    parts = next((parts for parts in possible if state + share // parts * row <= free), None)
    if parts is None:
        raise UserError(
            f"training needs about {(state + row) / 2**30:.1f} GiB beside the weights, {state / 2**30:.1f} of it for "
            f"gradients and optimizer, and {free / 2**30:.1f} are free; train_lora.py or a smaller model need less"
        )
    parts = max(gathered(parts))  # free memory differs, and all must cut alike
    if parts > args.gradient_accumulation:
        log(f"memory is short: a batch goes in {parts} parts, which costs time and changes nothing else")
    log(
        f"memory: about {(state + share // parts * row) / 2**30:.2f} GiB beside the weights, {free / 2**30:.1f} free; "
        f"{trainable(model):,} of {sum(weight.numel() for weight in model.parameters()):,} weights are trained"
    )
    return parts


def trainable(model):
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def activation_bytes_per_token(model, element, fused_head):
    """What a token keeps for the backward pass, by counting what the layers of a Llama-like model save.

    A layer: six times the hidden size (both norms twice, two inputs of matrices), query and output twice,
    key and value twice, four times the MLP's width. On top, without a fused head, the logits, their
    softmax and its gradient.
    """
    config = model.config.get_text_config()
    heads, hidden = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = 6 * hidden + 4 * heads * head + 4 * groups * head + 4 * width
    return config.num_hidden_layers * layer * element + (0 if fused_head else 3 * 4 * config.vocab_size)


# ------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------


def build_config(args, parts, examples, checkpoint=None):
    import torch
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    size = args.batch_size // processes() // parts
    steps = args.max_steps or args.epochs * (examples // args.batch_size)
    metric = "eval_score" if args.eval_questions else "eval_loss"
    return SFTConfig(
        output_dir=str(args.output_dir),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler,
        warmup_steps=args.warmup,
        weight_decay=0.0,  # Stanford Alpaca's
        max_grad_norm=1.0,  # transformers' default, here because the results depend on it
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=parts,
        gradient_checkpointing=False,  # TRL turns it on: less memory, a third more time
        bf16=args.dtype == "bf16",
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,  # all are used; looking for others costs time
        dataloader_pin_memory=cuda,
        seed=args.seed,
        max_length=None,  # TRL's 1,024 would cut the end of a row, which is the answer
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="epoch",
        eval_on_start=not checkpoint,
        save_strategy="epoch",
        save_total_limit=1,  # the best one stays beside the last
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=metric == "eval_score",
        logging_steps=min(10, max(1, steps // 100)),
        disable_tqdm=not is_main(),
        report_to="tensorboard",
    )


def build_trainer(args, config, model, tokenizer, rows, held_out_rows, held_out, ask):
    from datasets import Dataset
    from trl import SFTTrainer

    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or "<|im_end|>"  # of no effect: it is neither seen nor trained
    trainer = type("Trainer", (Scoring, SFTTrainer), {})(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(sorted(held_out_rows, key=len_ids)),
    )
    trainer.order = EpochOrder(trainer, len(rows), args.batch_size, args.seed)
    trainer.patience = args.patience
    trainer.questions, trainer.ask = held_out[: args.eval_questions], ask
    trainer.most_new_tokens = max(EVAL_MAX_NEW_TOKENS, *(sum(label != IGNORED for label in row["labels"]) for row in rows))
    return trainer


@dataclass
class EpochOrder:
    """A sampler that asks `epoch_order` for the epoch the trainer is in."""

    trainer: object
    examples: int
    batch_size: int
    seed: int

    def __len__(self):
        return self.examples - self.examples % self.batch_size

    def __iter__(self):
        epoch = self.trainer.state.global_step * self.batch_size // len(self)
        return iter(epoch_order(self.examples, self.batch_size, self.seed, epoch))


class Scoring:
    """What is ours in the trainer. Mixed into SFTTrainer where it is built, for its import takes seconds."""

    stop_signal = None
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole batch

    def _send_telemetry(self):
        """TRL would report the run to its makers."""

    def _get_train_sampler(self, dataset=None):
        return self.order

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over all trained tokens of the batch, its parts and processes together.

        Processes average their gradients, so each counts its sum as often as there are processes.
        """
        return self.summed_loss(model, inputs) * (self.accelerator.num_processes / num_items_in_batch)

    def summed_loss(self, model, inputs):
        """Cross-entropy summed over the completions' tokens, of a few rows of like length at a time.

        Each part is cut to its own longest row, so that little is spent on padding and the batch stays
        as it was drawn: batches of like lengths cost the demo a fifth more held-out loss.
        """
        import torch

        ids, labels = inputs["input_ids"], inputs["labels"]
        columns = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        ends = ((labels != IGNORED) * columns).amax(dim=1)
        parts = ends.argsort().split(PART_ROWS[labels.device.type])
        return sum(self.part_loss(model, ids[rows, : ends[rows].max()], labels[rows, : ends[rows].max()]) for rows in parts)

    def part_loss(self, model, ids, labels):
        """No attention mask: padding stands right of every real token, where causal attention never
        looks, and without a mask half of the attention need not be computed. TRL's fused head saves
        memory on a GPU; on a CPU it computes all logits twice, prompts included, where those from the
        first completion on are enough.
        """
        from torch.nn.functional import cross_entropy

        if labels.is_cuda:
            return self.fused_loss(model, ids, labels)
        first = int((labels != IGNORED).any(dim=0).nonzero()[0])
        kept = labels.shape[1] - first + 1
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[:, :-1]
        logits, labels = logits.flatten(0, 1).float(), labels[:, first:].flatten()
        return cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def fused_loss(self, model, ids, labels):
        return -model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum()

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """eval_loss over the tokens of all held-out rows, eval_score over the questions, shared out by process.

        What this returns reaches the logs, the choice of the best checkpoint and patience alike.
        """
        import torch
        from transformers.trainer_utils import EvalLoopOutput

        self.model.eval()
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes

        def over_all(*sums):
            return self.accelerator.reduce(torch.tensor(sums, dtype=torch.float64).to(self.args.device)).tolist()

        loss, tokens = over_all(*self.sum_losses(rank, ranks))
        right, asked = 0, len(self.questions)
        if math.isfinite(loss):  # else the training has diverged, and there is nothing to ask
            right, asked = over_all(*self.count_right(rank, ranks))
        metrics = {f"{metric_key_prefix}_loss": loss / tokens}
        line = f"step {self.state.global_step}: eval_loss {loss / tokens:.4f}"
        if asked:
            share = right / asked
            stderr = 100 * math.sqrt(share * (1 - share) / asked)
            metrics |= {f"{metric_key_prefix}_score": 100 * share, f"{metric_key_prefix}_score_stderr": stderr}
            line += f", eval_score {100 * share:.1f} % (standard error {stderr:.1f}, {right:.0f} of {asked:.0f})"
        if is_main():
            from tqdm import tqdm

            tqdm.write(line)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))

    def sum_losses(self, rank, ranks):
        """(summed loss, trained tokens) of this process's share of the held-out rows."""
        import torch

        rows, size = self.eval_dataset[rank::ranks], self.args.per_device_eval_batch_size
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        loss = tokens = 0.0
        with torch.no_grad(), self.accelerator.autocast():
            for start in range(0, len(rows), size):
                inputs = self._prepare_inputs(self.data_collator(rows[start : start + size]))
                loss += self.summed_loss(self.model, inputs).item()
                tokens += (inputs["labels"] != IGNORED).sum().item()
        return loss, tokens

    def count_right(self, rank, ranks):
        """(right answers, questions asked) of this process's share, greedy, asked and read as inference.py does."""
        from tqdm import tqdm

        questions = self.questions[rank::ranks]
        if not questions:
            return 0, 0
        tokenizer, model = self.processing_class, self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        texts = [self.ask(item.question) for item in questions]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        room = positions(model)
        requests = [
            Request(i, 0, prompt, min(self.most_new_tokens, room - len(prompt)))
            for i, prompt in enumerate(prompts)
            if len(prompt) < room
        ]
        # One autocast around all steps: it then casts every weight once, not once a token.
        with self.accelerator.autocast():
            done = generate(model, tokenizer, requests, Decoding(), note=lambda line: None)
            bar = tqdm(done, "eval_score", len(requests), unit="question", leave=False, disable=not is_main())
            right = sum(
                score_final(item.text, questions[item.id].answer, thinking_is_open(texts[item.id])) == "right" for item in bar
            )
        return right, len(questions)

    def _determine_best_metric(self, metrics, trial):
        """Of equal scores the lower loss is the better checkpoint; patience asks for a better score."""
        if not math.isfinite(metrics["eval_loss"]):
            log("eval_loss is not a number: the training has diverged and stops")
            self.control.should_training_stop = True
            return False
        history = [row for row in self.state.log_history if "eval_loss" in row and row["step"]]
        name = self.args.metric_for_best_model
        sign = 1 if self.args.greater_is_better else -1
        scores = [sign * row[name] for row in history]
        if self.patience and len(scores) - 1 - scores.index(max(scores)) >= self.patience:
            log(f"no better {name} in {self.patience} evaluations: stopping")
            self.control.should_training_stop = True
        best = [row["eval_loss"] for row in history if row["step"] == self.state.best_global_step]
        if metrics[name] == self.state.best_metric and metrics["eval_loss"] < best[0]:
            self.state.best_metric = None  # makes way for its equal
        return super()._determine_best_metric(metrics, trial)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """After each step, and each epoch. A signal that arrived meanwhile saves and stops.

        The last step of an epoch is saved with the epoch, after its evaluation.
        """
        ends_epoch = self.state.global_step * self.order.batch_size % len(self.order) == 0
        if self.stop_asked() and not (ends_epoch or self.state.global_step == self.state.max_steps):
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.stop_asked():
            log(f"stopped after step {self.state.global_step} and saved; the same command with --resume goes on")
            raise Terminated if self.stop_signal == signal.SIGTERM else KeyboardInterrupt

    def stop_asked(self):
        """Whether a signal reached any process: all must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        import torch

        flag = torch.tensor(int(self.stop_signal is not None), device=self.args.device)
        return bool(self.accelerator.reduce(flag).item())

    def _save(self, output_dir=None, state_dict=None):
        """Without training_args.bin: it is a pickle, and loading one can run code."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, *args, **kwargs):
        """TRL's knows no scores: `finish` writes ours."""


def train(trainer, checkpoint):
    """Train to the end, or on from a checkpoint; afterwards the trainer holds the best model."""
    from transformers import TrainerState

    if checkpoint:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        control = state.stateful_callbacks["TrainerControl"]["args"]
        if state.global_step >= state.max_steps or control["should_training_stop"]:
            trainer.state = state  # killed after its last step; the folder may have another name since
            if state.best_global_step:
                state.best_model_checkpoint = str(checkpoint.parent / f"checkpoint-{state.best_global_step}")
                trainer._load_best_model()
            return
    with stopping_on_signals(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


@contextlib.contextmanager
def stopping_on_signals(trainer):
    """SIGINT and SIGTERM are noted and heeded after the step; a second one acts at once."""

    def ask(number, _):
        trainer.stop_signal = number
        log("stopping after this step or evaluation; once more stops at once, back to the last checkpoint")
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


# ------------------------------------------------------------------------------------------
# What is left behind
# ------------------------------------------------------------------------------------------


def finish(args, trainer, record):
    """The model with its tokenizer, the trainer's state, curves, card and record; then no more checkpoints."""
    best = evaluations(trainer).get(trainer.state.best_global_step)
    if best is None:
        raise UserError(f"--learning-rate {args.learning_rate:g}: the training diverged before it was of any use; pass a smaller one")
    if getattr(args, "merge", False):
        trainer.model = trainer.model.float().merge_and_unload()
    trainer.save_model()
    trainer.save_state()
    wait_for_all()  # until each has read the best checkpoint
    if not is_main():
        return
    write_atomically(args.output_dir / "README.md", model_card(args, trainer))
    draw_curves(trainer.state.log_history, args.output_dir / "training.png")
    record["result"] = best
    write_record(args, record)
    drop_checkpoints(args.output_dir)
    if not improved(trainer):
        log(NOT_IMPROVED)
    log(f"{args.output_dir}: finished; python inference.py --mode chatml_think_prefill --model-id {args.output_dir}")


def call_hub(method, name, **arguments):
    """One call of the hub's own client; its refusals become one line."""
    from huggingface_hub import HfApi

    if not is_main():
        return
    try:
        getattr(HfApi(), method)(**arguments)
    except Exception as error:  # hub, network and permission errors share no base class
        raise UserError(f"--push-to-hub {name}: {first_line(error)}") from error


def evaluations(trainer):
    """The evaluations by step."""
    return {row["step"]: row for row in trainer.state.log_history if "eval_loss" in row}


NOT_IMPROVED = "No evaluation was better than that of the untrained model, at step 0, which is no candidate."


def improved(trainer):
    """Whether the checkpoint that is kept beats the model that the training began with."""
    scored, name = evaluations(trainer), trainer.args.metric_for_best_model
    sign = 1 if trainer.args.greater_is_better else -1
    return 0 not in scored or sign * scored[trainer.state.best_global_step][name] > sign * scored[0][name]


def model_card(args, trainer):
    best = trainer.state.best_global_step
    rows = []
    for step, row in evaluations(trainer).items():
        score = f"{row['eval_score']:.1f} ± {row['eval_score_stderr']:.1f}" if "eval_score" in row else "-"
        kept = "kept" if step == best else ""
        rows.append(f"| {step} | {row['epoch']:.2f} | {row['eval_loss']:.4f} | {score} | {kept} |")
    method = f"LoRA of rank {args.rank}" if hasattr(args, "rank") else "all weights"
    targets = "right answers of its own" if args.completions else "reference answers"
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
            f"# {args.model_id} fine-tuned on {args.dataset}",
            "",
            f"Fine-tuned ({method}) on {targets}: {length} at most, learning rate {args.learning_rate:g},",
            f"{args.lr_scheduler}, warm-up {args.warmup:g}, batch {args.batch_size}, {args.dtype}, seed {args.seed}. Scores are of {len(trainer.questions)} questions",
            "held out of the train split, in percent with their standard error; the test split was not read.",
            "",
            "| step | epoch | eval_loss | eval_score | |",
            "| ---: | ---: | ---: | ---: | --- |",
            *rows,
            "",
            *([] if improved(trainer) else [NOT_IMPROVED, ""]),
            "It was trained to go on from this prompt:",
            "",
            "```",
            trainer.ask("QUESTION"),
            "```",
            "",
        ]
    )


def draw_curves(history, path):
    """A PNG with the loss, trained and held out, over the steps, and eval_score below it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = [row for row in history if "eval_score" in row]
    figure, axes = pyplot.subplots(1 + bool(scored), sharex=True, figsize=(8, 6), layout="constrained", squeeze=False)
    for name, mark in (("loss", "-"), ("eval_loss", "o-")):
        rows = [row for row in history if name in row]
        axes[0, 0].plot([row["step"] for row in rows], [row[name] for row in rows], mark, label=name)
    axes[0, 0].set_ylabel("loss a token")
    axes[0, 0].legend()
    if scored:
        columns = ([row[name] for row in scored] for name in ("step", "eval_score", "eval_score_stderr"))
        axes[1, 0].errorbar(*columns, fmt="o-", capsize=3)
        axes[1, 0].set_ylabel("eval_score, % ± standard error")
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
