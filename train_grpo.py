"""Train a language model on grade-school math by reinforcement learning from its own answers (GRPO).

In every step it answers some questions several times. Answers that are right by the final reading are
preferred to wrong ones of the same question; nothing is imitated. Held-out questions of the train split pick the
checkpoint, and the untrained model is one of those they pick from. The test split is never read:

    python train_grpo.py --output-dir outputs/grpo
    python train_grpo.py --model-id demo/model --dataset demo/problems --learning-rate 6e-4 --lr-scheduler linear \\
        --prompts-per-step 32 --temperature 0.6 --top-p 0.95 --top-k 20 --max-steps 40 --output-dir outputs/demo-grpo
    python train_grpo.py --mode cot --rank 32 --learning-rate 1e-5 --output-dir outputs/grpo-lora
    python inference.py --model-id outputs/grpo --mode thinking

The data split, the prompts, the evaluation, the files and --resume are those of train.py.
"""

import argparse
import sys
from functools import cache, partial

from common import (
    COMPLETION_STOP,
    MODES,
    ArgumentParser,
    Decoding,
    UserError,
    at_least,
    build_prompt,
    command_line,
    gathered,
    log,
)
from data import Columns, load_questions
from train import (
    ALWAYS,
    SCHEDULERS,
    TRAINED_MODES,
    above_0,
    add_shared_flags,
    check_arguments,
    check_output_dir,
    choose_asking,
    choose_mode,
    choose_products,
    encode_examples,
    end_of_turn,
    fit_into_memory,
    from_0,
    inference_command,
    load_full_model,
    number,
    run_record,
    split_questions,
    target_pairs,
    train_in_folder,
)
from train_lora import load_with_adapter

DECIDING_FLAGS = (
    "num_generations", "prompts_per_step", "temperature", "top_p", "top_k", "max_completion_length", "beta",
    "loss_type", "format_reward", "eval_steps",
)  # fmt: skip
RATES = {"full": 1e-6, "lora": 1e-5}
COMPLETION_LENGTH = {"plain": 512, "thinking": 1024}


@command_line
def main(argv=None):
    args = parse_args(argv)
    return learn(args)


def build_parser():
    parser = ArgumentParser(
        "train_grpo.py", description=__doc__, epilog=ALWAYS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shared_flags(parser)
    add = parser.add_argument
    config, deepseek = "TRL's GRPOConfig", "DeepSeekMath"
    add("--mode", choices=TRAINED_MODES, default="thinking", help="prompt to train on (default %(default)s)")
    add("--num-generations", type=at_least(2), default=8,
        help=f"completions of a question in a step (default %(default)s: {config})")  # fmt: skip
    add("--prompts-per-step", type=at_least(1), default=8,
        help=f"questions a step (default %(default)s: with 8 completions of each, 64, the group size of {deepseek})")  # fmt: skip
    add("--temperature", type=above_0, default=1.0, help=f"of sampling (default %(default)s: {config})")
    add("--top-p", type=share, default=1.0, help=f"of sampling (default %(default)s: {config})")
    add("--top-k", type=at_least(0), default=0, help=f"of sampling; 0 filters nothing (default %(default)s: {config})")
    add("--max-completion-length", type=at_least(1),
        help=f"most tokens of a completion (default 512: {config}; 1,024 with a thought, the limit of the published runs)")  # fmt: skip
    add("--beta", type=from_0, default=0.0,
        help=f"weight of the KL divergence from the untrained model (default %(default)g: {config})")  # fmt: skip
    add("--loss-type", choices=("dapo", "dr_grpo", "grpo"), default="dapo", help=f"(default %(default)s: {config})")
    add("--format-reward", type=from_0, default=0.0, metavar="W",
        help="added to the reward of 1 for a right answer where the text ends in `#### N`, right or wrong (default 0)")  # fmt: skip
    add("--learning-rate", type=above_0,
        help=f"peak (default 1e-6: {config}, {deepseek}; with --rank 1e-5, for LoRA wants some ten times the full rate)")  # fmt: skip
    add("--lr-scheduler", choices=SCHEDULERS, default="constant", help=f"(default %(default)s: {deepseek}'s)")
    add(
        "--warmup",
        type=from_0,
        default=0.0,
        help=f"share of the steps, or from 1 on their number (default 0: {config})",
    )
    add("--epochs", type=at_least(1), default=1, help="passes over the training part (default %(default)s)")
    add(
        "--eval-steps", type=at_least(1), default=50, help="steps from one evaluation to the next (default %(default)s)"
    )
    add("--rank", type=at_least(1, 1024), help="train LoRA adapters of this rank (default none: all weights)")
    add("--merge", action="store_true", help="with --rank: write the full model, adapters added, and no adapter")
    # What the shared steps of training ask for and what is no choice here.
    parser.set_defaults(completions=None, strip_annotations=False, gradient_accumulation=1)
    return parser


def parse_args(argv):
    args = build_parser().parse_args(argv)
    if args.merge and not args.rank:
        raise UserError("--merge: there is no adapter to merge without --rank")
    if args.eval_questions == 0:
        raise UserError("--eval-questions 0: the held-out score picks the checkpoint; pass 1 or more")
    args.learning_rate = args.learning_rate or RATES["lora" if args.rank else "full"]
    args.max_completion_length = (
        args.max_completion_length or COMPLETION_LENGTH["thinking" if MODES[args.mode].thinks else "plain"]
    )
    args.batch_size = args.prompts_per_step * args.num_generations
    if args.rank:
        args.alpha, args.dropout, args.target_modules = 32, 0.0, "all-linear"  # train_lora.py's defaults
    else:
        del args.rank
    return args


share = number(lambda value: 0 < value <= 1, "above 0 and at most 1")


def learn(args, trainer_class=None):
    """The whole job. trainer_class: a `rollouts.GroupTrainer`, which a control may replace by one of its own."""
    from model import choose_device, encode, find_model, load_tokenizer, positions
    from rollouts import MICRO_BATCH, GroupTrainer, Rollouts, build_config
    from trainer import HeldOut, choose_pad_token, make_savable

    device = choose_device(args.device)
    check_arguments(args, device)
    files = find_model(args.model_id)
    check_output_dir(args, files)
    tokenizer = load_tokenizer(files)
    columns = Columns(args.question_column, args.answer_column)
    every = load_questions(args.dataset, "train", args.dataset_config, columns)
    training, held_out = split_questions(args.dataset, every, args.eval_size, args.seed)
    mode, system_prompt = choose_mode(args.mode, [], tokenizer)
    asked = choose_asking(args, mode, system_prompt, tokenizer)
    ask = cache(partial(build_prompt, mode, tokenizer=tokenizer, **asked))  # each is asked for several times
    end = end_of_turn(mode, tokenizer)
    model = (load_with_adapter if hasattr(args, "rank") else load_full_model)(args, files, device)
    room, embeddings = positions(model), model.get_input_embeddings().num_embeddings
    pairs = target_pairs(held_out, mode, ask, end.text)
    held_out_examples = encode_examples("held-out", pairs, tokenizer, room, embeddings)
    lengths = map(len, encode(tokenizer, [ask(item.question) for item in training]))
    questions = [
        item for item, tokens in zip(training, lengths, strict=True) if tokens + args.max_completion_length <= room
    ]
    if len(questions) < len(training):
        log(f"{len(training) - len(questions)} training questions dropped: longer than the model's {room} positions")
    if len(questions) < args.prompts_per_step:
        raise UserError(
            f"--prompts-per-step {args.prompts_per_step}: more than the {len(questions)} questions to train on"
        )
    longest = max(map(len, encode(tokenizer, [ask(item.question) for item in questions])))
    fitting = fit_into_memory(args, model, device, longest + args.max_completion_length, MICRO_BATCH)
    at_once = min(gathered(fitting))  # processes take a step in equally many parts
    decoding = Decoding(True, args.temperature, args.top_p, args.top_k, args.seed)
    rollouts = Rollouts(
        args.prompts_per_step, args.num_generations, args.max_completion_length, decoding, args.format_reward
    )
    products = choose_products(args, model)
    record = run_record(args, files, mode, asked, training, held_out, pairs[0], device, at_once, products)
    record["decides"] |= {"method": "grpo"} | {name: getattr(args, name) for name in DECIDING_FLAGS}

    def build_trainer(resumed: bool):
        choose_pad_token(model, tokenizer, end.token)
        make_savable(model.generation_config)
        return (trainer_class or GroupTrainer)(
            model=model,
            args=build_config(args, rollouts, len(questions), at_once, device.type == "cpu", resumed),
            processing_class=tokenizer,
            questions=questions,
            ask=ask,
            rollouts=rollouts,
            beta=args.beta,
            held_out=HeldOut(
                examples=held_out_examples,
                questions=held_out[: args.eval_questions],
                ask=ask,
                max_new_tokens=args.max_completion_length,
                stop_texts=COMPLETION_STOP if asked["few_shot_style"] == "completion" else (),
            ),
            at_once=at_once,
            patience=args.patience,
        )

    lesson = "its own completions, rewarded where they are right"
    next_command = inference_command(args.output_dir, mode, asked["few_shot_style"], system_prompt)
    return train_in_folder(args, record, build_trainer, ask, lesson, next_command)


if __name__ == "__main__":
    sys.exit(main())
