"""The client of an inference server with the OpenAI completions API."""

import hashlib
import itertools
import os
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from common import UserError, first_line
from generation import Completion

SERVER_TIMEOUT = 600  # seconds, of one try
SERVER_RETRIES = 8  # of one request, waiting twice as long after each, at most 8 seconds


def ask_server(args, requests, prompts):
    """Yield a Completion for each request as the server gives it, --concurrency of them at once.

    The client asks again after 429, 5xx, timeouts and dropped connections. Where it gives up, the answers
    that are still on their way are yielded before the UserError.
    """
    try:
        import openai
    except ImportError as error:
        raise UserError("--server: wants the package openai: pip install openai") from error
    client = openai.OpenAI(
        base_url=args.server,
        api_key=os.environ.get("OPENAI_API_KEY") or "none",  # servers of one's own want no key, the client wants one
        max_retries=SERVER_RETRIES,
        timeout=SERVER_TIMEOUT,
    )
    pool, waiting, asked, failure = ThreadPoolExecutor(args.concurrency), iter(requests), set(), None
    try:
        while True:
            if not failure:
                for request in itertools.islice(waiting, 2 * args.concurrency - len(asked)):
                    asked.add(pool.submit(ask_once, client, args, request, prompts[request.id]))
            if not asked:
                break
            done, asked = wait(asked, return_when=FIRST_COMPLETED)
            for future in done:
                if future.exception() is None:
                    yield future.result()
                elif not failure:
                    failure = future.exception()
                    asked = {other for other in asked if not other.cancel()}
        if failure:
            raise failure
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        client.close()


def ask_once(client, args, request, prompt):
    """One completion. A reply that is not whole is asked for again."""
    import openai

    sampling = {"temperature": 0}
    if args.do_sample:
        sampling = {"temperature": args.decoding.temperature, "top_p": args.decoding.top_p}
        sampling["seed"] = request_seed(args.seed, request)
        if args.decoding.top_k:  # no part of the API, yet most servers know it; with 0 it is left to them
            sampling["extra_body"] = {"top_k": args.decoding.top_k}
    for attempt in range(SERVER_RETRIES + 1):
        try:
            reply = client.completions.create(
                model=args.model_id, prompt=prompt, max_tokens=request.max_new_tokens, **sampling
            )
        except openai.APIError as error:
            told = f"answers {error.status_code}" if isinstance(error, openai.APIStatusError) else "gives no answer"
            raise UserError(f"--server {args.server}: {told} to question {request.id}: {first_line(error)}") from error
        except ValueError:  # not JSON
            reply = None
        if is_whole(reply):
            choice = reply.choices[0]
            counts = reply.usage.prompt_tokens, reply.usage.completion_tokens
            return Completion(request.id, request.sample, [], choice.text, choice.finish_reason, *counts)
        time.sleep(min(8, 0.5 * 2**attempt))
    raise UserError(
        f"--server {args.server}: its replies to question {request.id} lack text, finish_reason or usage; "
        "it wants the OpenAI completions API"
    )


def is_whole(reply):
    try:
        choice, usage = reply.choices[0], reply.usage
        counts = usage.prompt_tokens, usage.completion_tokens
    except (AttributeError, IndexError, TypeError):
        return False
    shaped = isinstance(choice.text, str) and all(isinstance(count, int) for count in counts)
    return shaped and choice.finish_reason in ("stop", "length")


def request_seed(seed, request):
    """31 bits of the SHA-256 of (seed, question id, sample): the server's draws differ by sample and repeat by run."""
    digest = hashlib.sha256(f"{seed} {request.id} {request.sample}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1
