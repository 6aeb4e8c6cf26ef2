"""What training costs: this project's way against the plain one, by turns in one process.

    python bench/training.py                      # both CPU cases, three seeds; writes results/training.md
    python bench/training.py --case small --seeds 1 --output /dev/null
    python bench/training.py --model-id SmolLM2-135M-Instruct.Q4_1.gguf --steps 2 --batch-size 16

Plain is TRL's SFTTrainer as it comes: batches in the data's order, padded to the longest, activation
checkpointing on. Ours is what train.py builds. Both see the same rows, start from the same weights and
use the same optimizer, schedule and batch size; timed is the training alone, without evaluation or files. With
a CUDA device the case `gpu` runs instead: Qwen3-0.6B's shape, random weights, in bf16, full and LoRA. With
--model-id a few steps of a real model run in cot, full and LoRA, and the peak memory beside the weights is measured.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # in place of bench/, whose gguf.py would hide the package

import train
import train_lora
from common import build_prompt, log, write_atomically
from data import load_questions
from linear import products_by
from model import find_model, keep_freed_memory, load_model, load_tokenizer, positions
from trainer import AT_ONCE, AT_ONCE_ELSEWHERE, HeldOut, ScoredTrainer, build_config, choose_pad_token, length

ROOT = Path(__file__).resolve().parent.parent
DEMO = str(ROOT / "demo/model")
SHARED = Path(os.environ.get("GSM8K_SHARED") or ROOT.parent / "shared")
BATCH = 12
PEAK_FLOPS = 989e12  # an H200's in bf16, without sparsity: its data sheet
# What is tried on the way from plain to what train.py does. Grouping by length is as fast and learns less: ours leaves
# the batches as they are drawn, and cuts them into parts of like length instead.
STEPS = ("plain", "checkpointing off", "grouped by length", "ours")
WORSE = "padding-free"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="run this one alone (repeatable)")
    parser.add_argument("--seeds", type=int, default=3)
    on_gpu = torch.cuda.is_available()
    page = ROOT / "results" / ("training-gpu.md" if on_gpu else "training.md")
    parser.add_argument("--output", type=Path, default=page, help="the page to write (default %(default)s)")
    parser.add_argument("--model-id", help="measure a few steps of this model instead of the cases")
    parser.add_argument("--steps", type=int, default=3, help="with --model-id (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=BATCH, help="with --model-id (default %(default)s)")
    parser.add_argument(
        "--ways", nargs="+", choices=("plain", "ours"), default=["plain", "ours"], help="with --model-id"
    )
    args = parser.parse_args()
    if args.model_id:
        return measure_model(args.model_id, args.steps, args.batch_size, args.ways)
    cases = args.case or (["gpu"] if on_gpu else ["demo", "small"])
    measured = [measure(name, seed, way) for name in cases for seed in range(args.seeds) for way in ways(name, seed)]
    text = report(measured)
    print(text)
    if args.output != Path("/dev/null"):
        write_atomically(args.output, text)


def ways(case, seed):
    """Every seed runs the two that are compared; the first also what lies between them, and what did not pay."""
    if case == "gpu":
        return [(way, method) for method in ("full", "lora") for way in ("plain", "ours")]
    return [(way, "full") for way in ((*STEPS, WORSE) if seed == 0 else ("plain", "ours"))]


# ------------------------------------------------------------------------------------------
# Cases: a model, its tokenizer, rows to train on and rows held out
# ------------------------------------------------------------------------------------------


def demo_case():
    questions = load_questions(str(ROOT / "demo/problems"), "train")
    return load_model(find_model(DEMO), "fp32", "cpu"), DEMO, questions[:2500], questions[2500:], 1e-3


def small_case():
    """About 2.5 M parameters, the demo's vocabulary, 192 real training examples."""
    questions = load_questions(str(SHARED / "gsm8k"), "train")
    model = random_model(
        vocab_size=1000, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=2048,
    )  # fmt: skip
    return model, DEMO, questions[:192], questions[192:320], 3e-3


def gpu_case():
    questions = load_questions(str(SHARED / "gsm8k"), "train")
    model = random_model(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
    )  # fmt: skip
    return model.cuda(), str(SHARED / "qwen3_tokenizer"), questions[: 200 * BATCH], questions[-200:], 2e-5


CASES = {"demo": demo_case, "small": small_case, "gpu": gpu_case}


def random_model(**shape):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6, **shape))


# ------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------


def measure(case, seed, way):
    name, method = way
    model, tokenizer, training, held_out, rate = CASES[case]()
    tokenizer = load_tokenizer(find_model(tokenizer)) if tokenizer == DEMO else gpu_tokenizer(tokenizer)
    rows, held_out_rows = (encode(part, tokenizer) for part in (training, held_out))
    if method == "lora":
        model = with_adapter(model)
    trainer = build(name, model, tokenizer, rows, held_out_rows, rate, seed)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    # On a CPU its own seconds count, not the clock's: other work on the machine does not change them.
    clock = time.perf_counter if on_gpu else time.process_time
    begun = clock()
    trainer.train()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = clock() - begun
    judge = build("ours", trainer.model, tokenizer, rows, held_out_rows, rate, seed)
    judge.model.eval()
    loss, tokens = judge.sum_losses(0, 1)
    seen = sum(map(length, rows))
    result = {
        "case": case, "way": name, "method": method, "seed": seed, "seconds": seconds, "examples": len(rows),
        "tokens": seen, "loss": loss / tokens, "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "threads": torch.get_num_threads(), "parameters": sum(weight.numel() for weight in model.parameters()),
    }  # fmt: skip
    if on_gpu:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["share_of_peak"] = (6 if method == "full" else 4) * result["parameters"] * seen / seconds / PEAK_FLOPS
    log(json.dumps(result))
    return result


def encode(questions, tokenizer):
    ask = partial(build_prompt, "chatml_think_prefill", tokenizer=tokenizer)
    pairs = train.target_pairs(questions, "chatml_think_prefill", ask, "<|im_end|>")
    return train.encode_examples("training", pairs, tokenizer, 2048, len(tokenizer))


def gpu_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def with_adapter(model):
    from peft import LoraConfig, get_peft_model

    args = train_lora.parse_args(["--output-dir", "unused"])
    modules = train_lora.choose_modules(args.target_modules, model)
    config = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=modules, task_type="CAUSAL_LM")
    return get_peft_model(model.bfloat16(), config)


def build(way, model, tokenizer, rows, held_out_rows, rate, seed, batch_size=BATCH):
    """A trainer for one epoch that goes the given way and writes nothing."""
    from datasets import Dataset
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy
    from trl import SFTTrainer

    flags = {"output-dir": tempfile.mkdtemp(), "batch-size": batch_size, "epochs": 1, "seed": seed, "eval-questions": 0}
    args = train.build_parser("", "", rate, "").parse_args([f"--{flag}={value}" for flag, value in flags.items()])
    args.dtype = "bf16" if model.device.type == "cuda" else "fp32"
    config = build_config(args, len(rows), "<|im_end|>", model.device.type == "cpu")
    config.eval_strategy = IntervalStrategy.NO
    config.save_strategy = SaveStrategy.NO
    config.eval_on_start = config.load_best_model_at_end = False
    config.report_to, config.disable_tqdm, config.logging_steps = [], True, 1000
    if way == "ours":
        choose_pad_token(model, tokenizer, "<|im_end|>")
        held_out = HeldOut(held_out_rows, [], str, 512)
        at_once = AT_ONCE.get(model.device.type, AT_ONCE_ELSEWHERE)
        return ScoredTrainer(
            model=model, args=config, processing_class=tokenizer, examples=rows, held_out=held_out, at_once=at_once
        )
    config.gradient_checkpointing = config.activation_checkpointing = way == "plain"
    config.train_sampling_strategy = "sequential"
    config.padding_free = way == WORSE
    order = grouped_order([length(row) for row in rows], seed)
    methods = {"_get_train_sampler": lambda self, dataset=None: order} if way in ("grouped by length", WORSE) else {}
    return type("Plain", (SFTTrainer,), methods)(
        model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows)
    )


def grouped_order(lengths, seed):
    """Whole batches of rows of like length, the batches shuffled: rows are sorted within stretches of 50 batches."""
    draw = random.Random(seed)
    order = draw.sample(range(len(lengths)), len(lengths) - len(lengths) % BATCH)
    batches = []
    for start in range(0, len(order), 50 * BATCH):
        stretch = sorted(order[start : start + 50 * BATCH], key=lambda i: -lengths[i])
        batches += [stretch[i : i + BATCH] for i in range(0, len(stretch), BATCH)]
    draw.shuffle(batches)
    return [i for batch in batches for i in batch]


def measure_model(model_id, steps, batch_size, ways):
    """Seconds a step, of all cores and by the clock, and peak memory beside the weights, as a Markdown table on stdout."""
    print(f"{steps} steps of {batch_size} in fp32, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
    print("| trained | way | processor seconds a step | by the clock | tokens/s | peak memory, GiB | estimated, GiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for method in ("full", "lora"):
        for way in ways:
            # A process for each: in a heap that another training has used the next one takes more.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(measure_steps, (model_id, method, way, steps, batch_size)), flush=True)


def measure_steps(model_id, method, way, steps, batch_size):
    """One line of measure_model's table."""
    from transformers import PrinterCallback

    flags = ["--model-id", model_id, "--output-dir", tempfile.mkdtemp(), "--dtype", "fp32"]
    parser = train.build_parser("", "", 2e-5, "")
    args = parser.parse_args(flags) if method == "full" else train_lora.parse_args(flags)
    tokenizer = load_tokenizer(find_model(model_id))
    questions = load_questions(str(SHARED / "gsm8k"), "train")[: steps * batch_size]
    pairs = train.target_pairs(
        questions, "cot", partial(build_prompt, "cot", tokenizer=tokenizer), train.end_of_turn("cot", tokenizer).text
    )
    load = train.load_full_model if method == "full" else train_lora.load_with_adapter
    model = load(args, find_model(model_id), torch.device("cpu"))
    examples = train.encode_examples("training", pairs, tokenizer, positions(model), len(tokenizer))
    trainer = build(way, model, tokenizer, examples, examples[:1], 2e-5, 0, batch_size)
    trainer.remove_callback(PrinterCallback)
    estimate = ""
    if way == "ours":
        keep_freed_memory()  # as the evaluation at the start of a training does
        estimated = train.training_bytes(args.dtype, model, max(map(length, examples)), AT_ONCE_ELSEWHERE)
        estimate = f"{estimated / 2**30:.2f}"
    held = reset_peak()
    begun, clock = time.process_time(), time.perf_counter()
    with products_by(train.choose_products(args, model) if way == "ours" else "torch", model):
        trainer.train()
    seconds, elapsed = (time.process_time() - begun) / steps, (time.perf_counter() - clock) / steps
    tokens = sum(map(length, examples)) / steps / elapsed
    return f"| {method} | {way} | {seconds:.1f} | {elapsed:.1f} | {tokens:.0f} | {(peak() - held) / 2**30:.2f} | {estimate} |"


def reset_peak():
    """Begin a new peak of this process's memory (Linux with glibc alone); returns what it holds now, in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would hide what is taken from here on
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak():
    """The most memory that this process has held since `reset_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


# ------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------

TITLES = {
    "demo": "The demo's model and problems",
    "small": "2.5 M parameters, 192 real GSM8K examples",
    "gpu": "Qwen3-0.6B's shape, random weights, real GSM8K examples",
}


def report(measured):
    """The Markdown of results/training.md, every figure from these runs."""
    lines = [
        "# What training costs",
        "",
        "One epoch, this project's way (`ours`) against TRL's SFTTrainer as it comes (`plain`): same rows, same start,",
        f"same optimizer and schedule, batches of {BATCH}. Every line is the mean over its seeds and stands against plain's",
        "mean over the same seeds; held-out loss is per token; on a CPU the seconds are those that the process computed.",
        "Made by `OMP_NUM_THREADS=1 python bench/training.py`.",
    ]
    for case in dict.fromkeys(run["case"] for run in measured):
        for method in dict.fromkeys(run["method"] for run in measured if run["case"] == case):
            lines += table([run for run in measured if (run["case"], run["method"]) == (case, method)])
    return "\n".join(lines) + "\n"


def table(runs):
    first = runs[0]
    per_example = first["tokens"] / first["examples"]
    lines = [
        "",
        f"## {TITLES[first['case']]}{', LoRA' if first['method'] == 'lora' else ''}",
        "",
        f"{first['parameters']:,} parameters, {first['examples']:,} examples of {per_example:.0f} tokens,",
        f"on {first['device']} with {first['threads']} thread(s), torch {torch.__version__}.",
        "",
        "| way | seeds | seconds | examples/s | tokens/s | times plain | held-out loss | against plain |"
        + (" peak memory | share of peak |" if "peak_gib" in first else ""),
        "| --- " + "| ---: " * (9 if "peak_gib" in first else 7) + "|",
    ]
    plain = average(runs, "plain")
    for way in dict.fromkeys(run["way"] for run in runs):
        mean = average(runs, way)
        same = average([run for run in runs if run["seed"] in mean["seeds"]], "plain")  # the same seeds' plain
        line = (
            f"| {way} | {len(mean['seeds'])} | {mean['seconds']:.1f} | {mean['examples'] / mean['seconds']:.1f} "
            f"| {mean['tokens'] / mean['seconds']:.0f} | {same['seconds'] / mean['seconds']:.2f} | {mean['loss']:.4f} "
            f"| {100 * (mean['loss'] / same['loss'] - 1):+.2f} % |"
        )
        if "peak_gib" in plain:
            line += f" {mean['peak_gib']:.1f} GiB | {100 * mean['share_of_peak']:.0f} % |"
        lines.append(line)
    return lines


def average(runs, way):
    """The means of a way's figures over its seeds."""
    chosen = [run for run in runs if run["way"] == way]
    figures = [key for key, value in chosen[0].items() if isinstance(value, float | int) and key != "seed"]
    means = {key: statistics.mean(run[key] for run in chosen) for key in figures}
    return means | {"seeds": {run["seed"] for run in chosen}}


if __name__ == "__main__":
    main()
