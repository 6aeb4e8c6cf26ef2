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
import math
import random
import sys
import time
import warnings
from pathlib import Path

from common import (
    MODES,
    ArgumentParser,
    UserError,
    at_least,
    build_prompt,
    chatml_think_prefill,
    command_line,
    first_line,
    gathered,
    hash_file,
    is_main,
    is_text,
    log,
    part_from_all,
    printable,
    processes,
    read_jsonl,
    strip_annotations,
    wait_for_all,
    write_atomically,
)
from data import hash_questions, load_questions
from reading import read_gold
from runs import claim_folder, describe_run, drop_checkpoints, locked, write_record

SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")


@command_line
def main(argv=None):
    args = build_parser("train.py", __doc__, learning_rate=2e-5, rate_source="TRL's SFTConfig").parse_args(argv)
    return fine_tune(args, load_full_model)


def fine_tune(args, build_model):
    """The whole job. `build_model(args, files, device)` returns the model and what of it is trained."""

    from model import choose_device, find_model, load_tokenizer
    from trainer import build_config, build_trainer, train

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


def build_parser(prog, description, learning_rate, rate_source):
    fixed = "Always so: AdamW and gradients clipped to norm 1 (transformers' defaults), no weight decay (Stanford Alpaca's)."
    parser = ArgumentParser(
        prog, description=description, epilog=fixed, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model-id",
        default="Qwen/Qwen3-0.6B",
        help="hub id or folder of the model to start from (default %(default)s)",
    )
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
    add(
        "--seed", type=at_least(0), default=42, help="of split, order and adapters (default %(default)s: transformers')"
    )
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
        pairs.append(
            [(ask(row["question"]), f"{row['model_output']}<|im_end|>") for row in lines if row["question"] in texts]
        )
        if not pairs[-1]:
            raise UserError(
                f"--completions {args.completions}: holds none of the {len(part)} {name} questions; sample more"
            )
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

    from trainer import IGNORED

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

    from model import positions

    most = positions(model)
    rows, held_out_rows = (
        encode_rows(name, pairs, tokenizer, most) for name, pairs in (("training", training), ("held-out", held_out))
    )
    if len(rows) < args.batch_size:
        raise UserError(f"--batch-size {args.batch_size}: more than the {len(rows)} examples there are to train on")
    return rows, held_out_rows


def show_examples(rows, tokenizer):
    """What is trained and what is not, of the first rows."""

    from trainer import IGNORED, len_ids

    for number, row in enumerate(rows):
        learned = sum(label != IGNORED for label in row["labels"])
        start = len_ids(row) - learned
        log(
            f"--- example {number}: {start} tokens of prompt, not trained\n"
            f"{printable(tokenizer.decode(row['input_ids'][:start]))}\n"
            f"--- example {number}: {learned} tokens of completion, trained\n"
            f"{printable(tokenizer.decode(row['input_ids'][start:]))}\n---"
        )


def run_record(args, files, training, held_out, pair, device, parts):
    """What decides the weights and what describes this run, as inference.py records it."""
    described = (
        "model_id",
        "dataset",
        "output_dir",
        "gradient_accumulation",
        "resume",
        "overwrite",
        "push_to_hub",
        "command",
    )
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


def load_full_model(args, files, device):
    """All weights in fp32, whatever precision computes: in bf16 most steps would round to nothing."""

    from model import load_model

    return load_model(files, "fp32", device).requires_grad_()  # a merged adapter leaves its base frozen


def fit_into_memory(args, model, device, rows):
    """How many parts a process must cut its share of a batch into, by estimate; UserError where no cut is enough."""

    from model import free_memory
    from trainer import len_ids

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


def finish(args, trainer, record):
    """The model with its tokenizer, the trainer's state, curves, card and record; then no more checkpoints."""

    from model import merge
    from trainer import NOT_IMPROVED, evaluations, improved

    best = evaluations(trainer).get(trainer.state.best_global_step)
    if best is None:
        raise UserError(
            f"--learning-rate {args.learning_rate:g}: the training diverged before it was of any use; pass a smaller one"
        )
    if getattr(args, "merge", False):
        trainer.model = merge(trainer.model.float())
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


def model_card(args, trainer):
    from trainer import NOT_IMPROVED, evaluations, improved

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
