"""Measure generation against the plain way, transformers' generate in left-padded batches of 32, and against vLLM.

All answer the same prompt ids with the same weights, limits and end tokens, greedily, by turns and several
times; the tokens are compared. Prints a table, and as its last line one JSON object. Ends with
exit code 1 where two texts part at a gap of the two highest logits that rounding does not explain.

    python bench/generation.py                                   # demo model, all its test problems
    python bench/generation.py --model-id FILE.gguf --peer vllm --peer-python vllm/bin/python   # a real model
    python bench/generation.py --shape qwen3-0.6b --dtype bf16   # random weights, real questions
    python bench/generation.py --shape qwen3-0.6b --dtype bf16 --limit 1319 --modes cot thinking --library  # on a GPU

With --model-id the questions are GSM8K's. With --shape they and the tokenizer are real, the weights random, and
each answer is as long as the published cot answer of its question, or the thinking answer for the thinking mode.

Timed is a turn, from the token ids of all prompts to those of all answers, and for ours to their texts too. Loading
the model and tokenizing are in no one's time. vLLM runs in a process of its own (bench/vllm_peer.py), which starts
and compiles before the first turn, and waits between its turns. How long it took to start, and what its
processes used of the processor while others had their turn, is printed. It computes on as many cores as the others;
VLLM_CPU_OMP_THREADS_BIND, where it is set, says which (auto: its own choice).
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of bench/, whose gguf.py would hide the package

import common
import data
import generation
import threads
from bench.peers import peer
from model import choose_device, find_model, free_memory, load_model, load_tokenizer, positions

TITLES = {"plain": "the plain way", "library": "continuous batching", "vllm": "vLLM"}
PLAIN_BATCH = 32
SETTLE = 1.5, 0.6  # seconds before a turn: threads of the turn before spin for up to a second, then ours may look
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
    requests = {mode: build_requests(args, mode, model, tokenizer) for mode in args.modes}
    ways = (
        {"ours": ours}
        | ({} if args.without_plain else {"plain": plain})
        | ({"library": library} if args.library else {})
    )
    with vllm_started(args, model, requests) if args.peer else contextlib.nullcontext({}) as vllm:
        results = {mode: compare(args, mode, model, tokenizer, requests[mode], ways | vllm) for mode in args.modes}
    if args.shape:
        rate = matrix_product_rate(model.dtype, device)
        for mode, result in results.items():
            share = result["tokens_per_second"] * 2 * model.num_parameters() / rate
            result |= {"matrix_product_gflops": round(rate / 1e9), "share_of_matrix_products": round(share, 3)}
            print(f"{mode}: {share:.1%} of the {rate / 1e9:.0f} GFLOP/s that matrix products reach here")
    elif not args.model_id:
        results["first_answer_seconds"] = time_to_first_answer(args)
        print(f"from start to the first answer on disk: {results['first_answer_seconds']} s")
    print(json.dumps(results))
    return int(any(results[mode]["parted_beyond_rounding"] for mode in args.modes))


def parse_args(argv):
    parser = common.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model-id", help="model folder or GGUF file, asked GSM8K's questions (default: demo/model)")
    model.add_argument("--shape", choices=["qwen3-0.6b"], help="random weights of this shape")
    positive = common.at_least(1)
    parser.add_argument(
        "--modes", nargs="+", choices=common.MODES, help=f"default {' '.join(MODES)} of the demo, else cot"
    )
    parser.add_argument("--limit", type=positive, help="questions (default all 800 of the demo, else 16)")
    parser.add_argument("--max-new-tokens", type=positive, help="most new tokens an answer (default the mode's)")
    parser.add_argument("--repeats", type=positive, help="rounds (default 3 with the demo, else 1)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="CPU threads (default %(default)s)")
    parser.add_argument("--library", action="store_true", help="measure transformers' continuous batching too")
    parser.add_argument(
        "--without-plain",
        action="store_true",
        help="leave the plain way out, which takes several times as long as ours",
    )
    parser.add_argument("--peer", choices=["vllm"], help="measure vLLM too")
    parser.add_argument("--peer-python", help="the Python of the environment that has vLLM (with --peer)")
    parser.add_argument(
        "--enforce-eager", action="store_true", help="vLLM does not compile: it starts sooner, and is slower"
    )
    parser.add_argument("--dtype", choices=common.DTYPES, default="fp32", help="default %(default)s")
    parser.add_argument("--shared", type=Path, default=os.environ.get("GSM8K_SHARED", ROOT.parent / "shared"),
                        help="folder with gsm8k/, and with qwen3_tokenizer/ and published_outputs/ for --shape")  # fmt: skip
    args = parser.parse_args(argv)
    args.real = bool(args.shape or args.model_id)
    args.modes = args.modes or (["cot"] if args.real else MODES)
    args.limit = args.limit or (16 if args.real else None)
    args.repeats = args.repeats or (1 if args.real else 3)
    if args.real and not Path(args.shared, "gsm8k").is_dir():
        raise common.UserError(f"--shared {args.shared}: no gsm8k/ in it, whose questions are wanted")
    if bool(args.peer) != bool(args.peer_python):
        raise common.UserError("--peer and --peer-python go together: vLLM has an environment of its own")
    if args.enforce_eager and not args.peer:
        raise common.UserError("--enforce-eager: is for vLLM; pass --peer vllm too")
    if args.shape and args.max_new_tokens:
        raise common.UserError("--max-new-tokens: with --shape answers are as long as the published ones; leave it out")
    return args


def load(args, device):
    """(tokenizer, model): those of a model on disk, or the real tokenizer with random weights of the real shape."""
    import torch
    import transformers

    if not args.shape:
        files = find_model(args.model_id or str(ROOT / "demo/model"))
        return load_tokenizer(files), load_model(files, args.dtype, device)
    torch.manual_seed(0)
    dtype = getattr(torch, common.DTYPES[args.dtype])
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**QWEN3_06B), dtype=dtype)
    return transformers.AutoTokenizer.from_pretrained(args.shared / "qwen3_tokenizer"), model.eval().to(device)


def compare(args, mode, model, tokenizer, requests, ways):
    """Time all ways by turns; returns medians, ratios and how many texts differ."""
    stop_ids = [] if args.shape else sorted(generation.stop_token_ids(model, tokenizer))
    seconds, tokens = {name: [] for name in ways}, {}
    for _ in range(args.repeats):
        for name, way in ways.items():
            settle()
            begun = time.perf_counter()
            tokens[name] = way(model, tokenizer, requests, stop_ids)
            seconds[name].append(time.perf_counter() - begun)
    produced = {name: sum(map(len, answers.values())) for name, answers in tokens.items()}
    rates = {name: produced[name] / statistics.median(times) for name, times in seconds.items()}
    others = [name for name in ways if name != "ours"]
    ratios = {name: round(rates["ours"] / rates[name], 2) for name in others}
    told = "".join(f", {ratio:.2f} times {TITLES[name]}" for name, ratio in ratios.items())
    print(f"\n{mode}: {len(requests)} questions, {produced['ours']} output tokens{told}")
    for name, times in seconds.items():
        print(f"  {name:7} median {statistics.median(times):7.2f} s ({min(times):.2f} to {max(times):.2f}), "
              f"{rates[name]:7.0f} tokens/s, {produced[name]} tokens")  # fmt: skip
    differences = {name: compare_texts(model, requests, tokens["ours"], tokens[name], name) for name in others}
    result = {"rows": len(requests), "tokens_per_second": round(rates["ours"]), "output_tokens": produced["ours"]}
    for name in others:
        result[name] = {"ratio": ratios[name], "tokens_per_second": round(rates[name])} | differences[name]
    return result | {"parted_beyond_rounding": sum(found["parted_beyond_rounding"] for found in differences.values())}


def settle():
    """Let the turn before end, and let the next one see a machine at rest when it chooses its number of threads."""
    time.sleep(SETTLE[0])
    threads.last_look = threads.usage()
    time.sleep(SETTLE[1])


def compare_texts(model, requests, ours, theirs, name):
    """How many texts differ from another way's, and whether rounding explains it where they part."""
    differing = [request for request in requests if ours[request.id] != theirs[request.id]]
    gaps, errors = gaps_and_rounding(model, differing, ours, theirs)
    # Each way's two logits may be off by the rounding there.
    beyond = sum(gap > 4 * error for gap, error in zip(gaps, errors, strict=True))
    print(f"  texts that differ from those of {TITLES[name]}: {len(differing)}")
    if gaps:
        print(f"    where they part the two highest logits are {max(gaps):.2g} apart at most; there rounding alone moves "
              f"a logit by {min(errors):.2g} to {max(errors):.2g}; at {beyond} the gap is wider than that explains")  # fmt: skip
    return {
        "rows_that_differ": len(differing),
        "parted_beyond_rounding": beyond,
        "widest_gap": max(gaps, default=None),
        "rounding_there": [min(errors), max(errors)] if errors else None,
    }


def build_requests(args, mode, model, tokenizer):
    folder = str(args.shared / "gsm8k") if args.real else str(ROOT / "demo/problems")
    questions = data.load_questions(folder, "test")[: args.limit]
    examples = [(item.question, item.answer) for item in data.load_questions(folder, "train")[:3]]
    prompts = [common.build_prompt(mode, item.question, tokenizer, examples) for item in questions]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    if args.shape:
        path = args.shared / "published_outputs" / f"{PUBLISHED_LENGTHS.get(mode, PUBLISHED_LENGTHS['cot'])}.jsonl"
        outputs = [row["model_output"] for _, row in common.read_jsonl(path)][: args.limit]
        limits = [max(1, len(tokens)) for tokens in tokenizer(outputs, add_special_tokens=False)["input_ids"]]
    else:
        most, room = args.max_new_tokens or common.MODES[mode].max_new_tokens, positions(model)
        limits = [min(most, room - len(prompt)) for prompt in ids]
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


@contextlib.contextmanager
def vllm_started(args, model, requests):
    """Yields {"vllm": a way as the others}, once vLLM has started with this model's weights."""
    import torch

    longest = max(len(one.prompt_ids) + one.max_new_tokens for asked in requests.values() for one in asked)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+") as log:
        model.save_pretrained(folder)
        command = [
            args.peer_python, str(ROOT / "bench/vllm_peer.py"), folder,
            "--dtype", common.DTYPES[args.dtype], "--max-model-len", str(longest),
            # A third of the free memory is for its keys and values. Ours then takes half of the rest.
            "--kv-cache-memory-bytes", str(free_memory(torch.device("cpu")) // 3),
            *(["--enforce-eager"] if args.enforce_eager else []),
        ]  # fmt: skip
        # By itself vLLM leaves one core to its scheduler: of two it would compute on one.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: args.threads]))
        environment = {"VLLM_CPU_OMP_THREADS_BIND": cores} | os.environ
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        with peer(command, log, f"--peer-python {args.peer_python}", environment) as process:
            told = process.started
            print(f"vLLM {told['version']}, cores {environment['VLLM_CPU_OMP_THREADS_BIND']}, "
                  f"started in {told['seconds']:.0f} s, which are not counted", flush=True)  # fmt: skip

            def vllm(model, tokenizer, requests, stop_ids):
                answer = process.ask({
                    "prompts": [[*one.prompt_ids] for one in requests],
                    "max_new_tokens": [one.max_new_tokens for one in requests],
                    "stop_token_ids": stop_ids,
                })  # fmt: skip
                return {one.id: ids for one, ids in zip(requests, answer["token_ids"], strict=True)}

            yield {"vllm": vllm}
            print(f"vLLM used {process.idle:.1f} s of processor time in {process.rested:.0f} s between its turns")


def gaps_and_rounding(model, requests, ours, theirs):
    """For each request, after the tokens that both ways agree on: the gap of the two highest logits, and the
    largest difference of a logit between this precision and a finer one, the weights being the same."""
    import copy

    import torch

    finer = torch.float64 if model.dtype == torch.float32 else torch.float32
    finer = copy.deepcopy(model).to(finer) if requests else None
    gaps, errors = [], []
    for request in requests:
        agreed = len(os.path.commonprefix([ours[request.id], theirs[request.id]]))
        ids = torch.tensor([[*request.prompt_ids, *ours[request.id][:agreed]]], device=model.device)
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
