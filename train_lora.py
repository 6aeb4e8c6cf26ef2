"""Fine-tune low-rank adapters (LoRA) of a language model on grade-school math.

The same job as train.py with the same prompts, evaluation and files; only the model differs: its own
weights stay as they are, small matrices beside them are trained.

    python train_lora.py --output-dir outputs/lora
    python train_lora.py --rank 4 --alpha 16 --dropout 0.05 --target-modules q_proj,v_proj --output-dir outputs/lora-r4
    python inference.py --model-id outputs/lora --mode chatml_think_prefill

The output is the adapter, which inference.py takes beside its base; --merge writes a full model instead.
"""

import sys
from pathlib import Path

from common import UserError, at_least, command_line
from train import above_0, build_parser, fine_tune, from_0


@command_line
def main(argv=None):
    return fine_tune(parse_args(argv), load_with_adapter)


def parse_args(argv):
    parser = build_parser(
        "train_lora.py", __doc__, learning_rate=2e-4, rate_source="QLoRA's; LoRA wants some ten times the full rate"
    )
    add = parser.add_argument
    regret = "Thinking Machines, LoRA Without Regret"
    add(
        "--rank",
        type=at_least(1, 1024),
        default=32,
        help="of the adapters, at most 1024 (default %(default)s: the larger of the two published)",
    )
    add("--alpha", type=above_0, default=32, help=f"their scale is alpha/rank (default 32 whatever the rank: {regret})")
    add("--dropout", type=from_0, default=0.0, help="of the adapters' input (default 0: peft's)")
    add("--target-modules", default="all-linear",
        help=f"names of linear layers, by commas, or all-linear (default all-linear: {regret})")  # fmt: skip
    add("--merge", action="store_true", help="write the full model, adapters added, and no adapter")
    args = parser.parse_args(argv)
    if args.dropout >= 1:
        raise UserError(f"--dropout {args.dropout}: must be below 1")
    return args


def load_with_adapter(args, files, device):
    """The base, frozen, in the precision that computes, and adapters in fp32."""

    import torch
    from peft import LoraConfig, get_peft_model

    from model import load_model

    if files.base:
        raise UserError(f"--model-id {args.model_id}: is an adapter itself; pass its base, or merge it first")
    model = load_model(files, args.dtype, device)
    torch.manual_seed(args.seed)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules=choose_modules(args.target_modules, model),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    # A path as typed would be looked for in whatever folder the adapter is used.
    here = Path(args.model_id).expanduser()
    model.peft_config["default"].base_model_name_or_path = str(here.resolve()) if here.exists() else args.model_id
    return model


def choose_modules(names, model):
    """all-linear, or the named layers; UserError for a name that no linear layer has."""
    import torch

    if names == "all-linear":
        return names
    head = model.get_output_embeddings()
    there = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in there:
            has = ", ".join(sorted(there))
            raise UserError(f"--target-modules {names}: the model has no linear layer {name!r}; it has {has}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
