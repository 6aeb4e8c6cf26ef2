"""Measure generation against the plain way: transformers' generate in left-padded batches of 32.

Both answer the same questions with the same weights and threads, greedily, in turn and several
times in one process; the texts are compared. Prints a table, and as its last line one JSON object. Ends with
exit code 1 where two texts part at a gap of the two highest logits that rounding does not explain.

    python bench/generation.py                                   # demo model, all its test problems
    python bench/generation.py --shape qwen3-0.6b --dtype bf16   # random weights, real questions
    python bench/generation.py --shape qwen3-0.6b --dtype bf16 --limit 1319 --modes cot thinking --library  # on a GPU

With --shape the weights are random, the questions and the tokenizer real, and each answer is as
long as the published cot answer of its question, or the thinking answer for the thinking mode.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import data
import generation
from model import choose_device, find_model, load_model, load_tokenizer

PLAIN_BATCH = 32
MODES = ("cot", "thinking", "few_shot", "zero_shot")
QWEN3_06B = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
PUBLISHED_LENGTHS = {"cot": "cot_model_outputs", "thinking": "BF16-thinking_model_outputs_reduced_batch"}


@common.command_line
def main(argv=None):
    args = parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    device = choose_device(None)
    tokenizer, model = load(args, device)
    print(f"{args.threads} threads, {args.dtype}, {device}, {model.num_parameters() / 1e6:.2f} M parameters")
    results = {mode: compare(args, mode, model, tokenizer) for mode in args.modes}
    if args.shape:
        rate = matrix_product_rate(model.dtype, device)
        for mode, result in results.items():
            share = result["tokens_per_second"] * 2 * model.num_parameters() / rate
            result |= {"matrix_product_gflops": round(rate / 1e9), "share_of_matrix_products": round(share, 3)}
            print(f"{mode}: {share:.1%} of the {rate / 1e9:.0f} GFLOP/s that matrix products reach here")
    else:
        results["first_answer_seconds"] = time_to_first_answer(args)
        print(f"from start to the first answer on disk: {results['first_answer_seconds']} s")
    print(json.dumps(results))
    return int(any(results[mode]["parted_beyond_rounding"] for mode in args.modes))


def parse_args(argv):
    parser = common.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["qwen3-0.6b"], help="random weights of this shape (default: demo/model)")
    parser.add_argument("--modes", nargs="+", choices=common.MODES, help=f"default {' '.join(MODES)}; with --shape cot")
    parser.add_argument("--limit", type=int, help="questions (default all 800 of the demo; with --shape 16)")
    parser.add_argument("--repeats", type=int, help="rounds (default 3; with --shape 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default %(default)s)")
    parser.add_argument("--library", action="store_true", help="measure transformers' continuous batching too")
    parser.add_argument("--dtype", choices=common.DTYPES, default="fp32", help="default %(default)s")
    parser.add_argument("--shared", type=Path, default=os.environ.get("GSM8K_SHARED", ROOT.parent / "shared"),
                        help="folder with gsm8k/, qwen3_tokenizer/ and published_outputs/, for --shape")  # fmt: skip
    args = parser.parse_args(argv)
    args.modes = args.modes or (["cot"] if args.shape else MODES)
    args.limit = args.limit or (16 if args.shape else None)
    args.repeats = args.repeats or (1 if args.shape else 3)
    if args.shape and not Path(args.shared, "gsm8k").is_dir():
        raise common.UserError(f"--shared {args.shared}: no gsm8k/ in it; --shape wants the real questions")
    return args


def load(args, device):
    """(tokenizer, model): the demo's, or the real tokenizer with random weights of the real shape."""
    import torch
    import transformers

    if not args.shape:
        files = find_model(str(ROOT / "demo/model"))
        return load_tokenizer(files), load_model(files, args.dtype, device)
    torch.manual_seed(0)
    dtype = getattr(torch, common.DTYPES[args.dtype])
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**QWEN3_06B), dtype=dtype)
    return transformers.AutoTokenizer.from_pretrained(args.shared / "qwen3_tokenizer"), model.eval().to(device)


def compare(args, mode, model, tokenizer):
    """Time both ways in turn; returns medians, their ratio and how many texts differ."""
    requests = build_requests(args, mode, model, tokenizer)
    stop_ids = [] if args.shape else sorted(generation.stop_token_ids(model, tokenizer))
    ways = {"ours": ours, "plain": plain} | ({"library": library} if args.library else {})
    seconds, tokens = {name: [] for name in ways}, {}
    for _ in range(args.repeats):
        for name, way in ways.items():
            begun = time.perf_counter()
            tokens[name] = way(model, tokenizer, requests, stop_ids)
            seconds[name].append(time.perf_counter() - begun)
    produced = sum(map(len, tokens["ours"].values()))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    differing = [request for request in requests if tokens["ours"][request.id] != tokens["plain"][request.id]]
    gaps, errors = gaps_and_rounding(model, differing, tokens)
    # Each way's two logits may be off by the rounding there.
    beyond = sum(gap > 4 * error for gap, error in zip(gaps, errors, strict=True))
    ratio = medians["plain"] / medians["ours"]
    print(f"\n{mode}: {len(requests)} questions, {produced} output tokens, {ratio:.2f} times the plain way")
    for name, times in seconds.items():
        print(f"  {name:5} median {medians[name]:7.2f} s ({min(times):.2f} to {max(times):.2f}), "
              f"{produced / medians[name]:7.0f} tokens/s")  # fmt: skip
    print(f"  rows that differ: {len(differing)}")
    if gaps:
        print(f"  where they part the two highest logits are {max(gaps):.2g} apart at most; there rounding alone moves "
              f"a logit by {min(errors):.2g} to {max(errors):.2g}; at {beyond} the gap is wider than that explains")  # fmt: skip
    library_figures = {"library_tokens_per_second": round(produced / medians["library"])} if args.library else {}
    return library_figures | {
        "ratio": round(ratio, 2),
        "tokens_per_second": round(produced / medians["ours"]),
        "plain_tokens_per_second": round(produced / medians["plain"]),
        "rows": len(requests),
        "rows_that_differ": len(differing),
        "parted_beyond_rounding": beyond,
        "widest_gap": max(gaps, default=None),
        "rounding_there": [min(errors), max(errors)] if errors else None,
    }


def build_requests(args, mode, model, tokenizer):
    folder = str(args.shared / "gsm8k") if args.shape else str(ROOT / "demo/problems")
    questions = data.load_questions(folder, "test")[: args.limit]
    examples = [(item.question, item.answer) for item in data.load_questions(folder, "train")[:3]]
    prompts = [common.build_prompt(mode, item.question, tokenizer, examples) for item in questions]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    if args.shape:
        path = args.shared / "published_outputs" / f"{PUBLISHED_LENGTHS.get(mode, PUBLISHED_LENGTHS['cot'])}.jsonl"
        outputs = [row["model_output"] for _, row in common.read_jsonl(path)][: args.limit]
        limits = [max(1, len(tokens)) for tokens in tokenizer(outputs, add_special_tokens=False)["input_ids"]]
    else:
        positions = model.config.max_position_embeddings
        limits = [min(common.MODES[mode].max_new_tokens, positions - len(prompt)) for prompt in ids]
    return [generation.Request(i, 0, *pair) for i, pair in enumerate(zip(ids, limits, strict=True))]


def ours(model, tokenizer, requests, stop_ids):
    if not stop_ids:  # random weights: only the limits end a row
        tokenizer, model.generation_config.eos_token_id = without_end(tokenizer), None
    done = generation.generate(model, tokenizer, requests, note=lambda line: print(line, file=sys.stderr))
    return {completion.id: completion.token_ids for completion in done}


def without_end(tokenizer):
    import copy

    tokenizer = copy.copy(tokenizer)
    tokenizer.eos_token = None
    tokenizer.get_vocab = dict
    return tokenizer


def plain(model, tokenizer, requests, stop_ids):
    """Batches of 32 in dataset order, padded left, each as long as its longest answer."""
    import torch

    result = {}
    for begin in range(0, len(requests), PLAIN_BATCH):
        batch = requests[begin : begin + PLAIN_BATCH]
        width = max(len(request.prompt_ids) for request in batch)
        pad = [width - len(request.prompt_ids) for request in batch]
        ids = torch.tensor([[0] * p + r.prompt_ids for p, r in zip(pad, batch, strict=True)], device=model.device)
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in pad], device=model.device)
        limits = torch.tensor([request.max_new_tokens for request in batch], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=0,
                eos_token_id=stop_ids or None, max_new_tokens=int(limits.max()),
                stopping_criteria=[lambda ids, _, width=width, limits=limits: ids.shape[1] - width >= limits],
            )  # fmt: skip
        for request, row in zip(batch, out[:, width:].tolist(), strict=True):
            row = row[: request.max_new_tokens]
            end = next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))
            result[request.id] = row[:end]
    return result


def library(model, tokenizer, requests, stop_ids):
    """transformers' continuous batching (what `generate_batch` does), with its own choices, a limit for each request."""
    from transformers import GenerationConfig

    attention, result = model.config._attn_implementation, {}
    longest = max(request.max_new_tokens for request in requests)
    config = GenerationConfig(do_sample=False, eos_token_id=stop_ids or -1, pad_token_id=0, max_new_tokens=longest)
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        for request in requests:
            manager.add_request([*request.prompt_ids], str(request.id), request.max_new_tokens)
        while len(result) < len(requests):
            done = manager.get_result(timeout=1)
            if done and done.is_finished():
                result[int(done.request_id)] = done.generated_tokens
            elif not done and not manager.is_running():
                raise RuntimeError("continuous batching stopped before the last answer")
    model.set_attn_implementation(attention)
    return result


def gaps_and_rounding(model, requests, tokens):
    """For each request, after the tokens that both ways agree on: the gap of the two highest logits, and the
    largest difference of a logit between this precision and a finer one, the weights being the same."""
    import copy

    import torch

    finer = torch.float64 if model.dtype == torch.float32 else torch.float32
    finer = copy.deepcopy(model).to(finer) if requests else None
    gaps, errors = [], []
    for request in requests:
        agreed = len(os.path.commonprefix([tokens["ours"][request.id], tokens["plain"][request.id]]))
        ids = torch.tensor([request.prompt_ids + tokens["ours"][request.id][:agreed]], device=model.device)
        with torch.inference_mode():
            logits, exact = (way(ids, logits_to_keep=1).logits[0, -1].double() for way in (model, finer))
        first, second = logits.topk(2).values.tolist()
        gaps.append(first - second)
        errors.append((logits - exact).abs().max().item())
    return gaps, errors


def matrix_product_rate(dtype, device):
    """Floating-point operations a second of a large matrix product, the best of five."""
    import torch

    a = torch.randn(2048, 2048, device=device).to(dtype)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - begun)
    return 2 * 2048**3 / min(times)


def time_to_first_answer(args):
    """Seconds from starting inference.py on the demo until its first answer is on disk."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "cot.jsonl.part")
        command = [sys.executable, "inference.py", "--model-id", "demo/model", "--dataset", "demo/problems",
                   "--output", str(part.with_suffix(""))]  # fmt: skip
        begun = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        seconds = time.perf_counter() - begun
        process.kill()
        process.wait()
    return round(seconds, 1)


if __name__ == "__main__":
    sys.exit(main())
