"""Answer token ids with vLLM, for bench/generation.py; this runs in vLLM's own environment.

One JSON object a line. The first on stdout is {"version": …, "seconds": …}: vLLM has started, in so many seconds.
Then each line on stdin is one turn, {"prompts": [[id, …], …], "max_new_tokens": [n, …], "stop_token_ids": [id, …]},
and is answered by one line on stdout, {"token_ids": [[id, …], …]}: the new tokens of each prompt, greedy, the end
token included. It ends with its input. What vLLM itself prints goes to stderr.

    vllm/bin/python bench/vllm_peer.py MODEL_FOLDER --dtype float32 --max-model-len 1024
"""

import argparse
import json
import os
import sys
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="model folder, as save_pretrained writes it")
    parser.add_argument("--dtype", required=True, help="as torch names it")
    parser.add_argument("--max-model-len", type=int, required=True, help="most tokens of a prompt and its answer")
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="for keys and values (default vLLM's choice)")
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and its processes log to stdout
    begun = time.perf_counter()
    import vllm

    model = vllm.LLM(
        args.folder,
        skip_tokenizer_init=True,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        enforce_eager=args.enforce_eager,
    )
    print(json.dumps({"version": vllm.__version__, "seconds": time.perf_counter() - begun}), file=answers, flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        model.reset_prefix_cache()  # else a second turn would find all its prompts read
        prompts = [{"prompt_token_ids": ids} for ids in turn["prompts"]]
        settings = [
            vllm.SamplingParams(
                temperature=0,
                max_tokens=most,
                stop_token_ids=turn["stop_token_ids"],
                ignore_eos=True,  # the model's own end tokens are among the others
                detokenize=False,
            )
            for most in turn["max_new_tokens"]
        ]
        outputs = model.generate(prompts, settings, use_tqdm=False)
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"token_ids": ids}), file=answers, flush=True)


if __name__ == "__main__":  # vLLM's processes import this file again
    main()
