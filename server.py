"""The client of an inference server with the OpenAI completions API.

All requests live in one event loop, which turns while the next answer is waited for. So a stop, or an error that
another try cannot mend, ends all of them at once, however long the server stalls.
"""

import asyncio
import contextlib
import email.utils
import hashlib
import itertools
import math
import os
import re
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common import EARLY_STOP, Decoding, UserError, first_line, log
from generation import Completion, Request, ThinkBudget

REPLY_SECONDS = 600  # for one whole reply
CONNECT_SECONDS = 5
TRIES = 9  # of one request
WAIT_SECONDS = 0.5  # after its first try, twice as long after each other, at most 8
RETRY_AFTER_SECONDS = 30  # the longest wait that a server may ask for
FIRST_SECONDS = 4  # after which a server that cannot be reached, and never was, counts as absent
GRACE_SECONDS = 1  # for answers that are on their way when another one fails for good

TOO_LONG = re.compile("context|too long", re.IGNORECASE)  # in what vLLM, SGLang and llama.cpp say of a long prompt


class Refused(UserError):
    """The server does not take a request of this form."""


@dataclass(frozen=True)
class Form:
    """How requests are written. `extended`: with parameters that vLLM and SGLang add to the API."""

    as_ids: bool  # the prompt goes as token ids, not as text
    extended: bool


FORMS = (Form(True, True), Form(False, True), Form(True, False), Form(False, False))


@dataclass
class Server:
    """A server, and what is known about it."""

    url: str
    model: str
    client: object  # openai.AsyncOpenAI
    tokenizer: object
    decoding: Decoding
    stop: list[str]  # texts that end an answer
    form: Form | None = None
    started: float = field(default_factory=time.monotonic)
    answered: bool = False  # whether it ever sent anything


@dataclass(frozen=True)
class Prompt:
    """One prompt in both forms; `counted`: whether the server must count as many tokens."""

    question: int
    text: str
    ids: list[int]
    counted: bool = True


@dataclass(frozen=True)
class Reply:
    text: str
    token_ids: list[int] | None  # where the server says them
    finish_reason: str
    prompt_tokens: int
    output_tokens: int


def ask_server(
    url: str,
    model: str,
    requests: Sequence[Request],
    prompts: Sequence[str],
    tokenizer,
    decoding: Decoding,
    concurrency: int,
    stop: Sequence[str] = (),
) -> Iterator[Completion]:
    """Yield a Completion for each request as the server gives it, `concurrency` of them at once.

    prompts: the text of each question's prompt, by question id; a request holds the same as token ids.
    The client asks again after 429, 5xx, timeouts, dropped connections and replies that are not whole. Where it
    gives up, the answers that are there within a second are yielded before the UserError.
    """
    if not requests:
        return
    client = connect(url, concurrency)
    server = Server(url, model, client, tokenizer, decoding, [*stop, *end_texts(tokenizer)])
    loop = asyncio.new_event_loop()
    try:
        first = min(requests, key=lambda request: len(request.prompt_ids))  # the server's context holds it first
        loop.run_until_complete(learn_form(server, Prompt(first.id, prompts[first.id], list(first.prompt_ids))))
        waiting, asked = iter(requests), set()
        while True:
            for request in itertools.islice(waiting, concurrency - len(asked)):
                prompt = Prompt(request.id, prompts[request.id], list(request.prompt_ids))
                asked.add(loop.create_task(complete(server, request, prompt)))
            if not asked:
                return
            done, asked = loop.run_until_complete(asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED))
            failed = [task.exception() for task in done if task.exception()]
            if failed and asked:
                late, asked = loop.run_until_complete(asyncio.wait(asked, timeout=GRACE_SECONDS))
                done |= late
            yield from (task.result() for task in done if not task.exception())
            if failed:
                raise failed[0]
    finally:
        close(loop, client)


def connect(url: str, concurrency: int):
    """The client, openai.AsyncOpenAI; UserError where its package or a possible key is missing."""
    try:
        import httpx2 as httpx
        import openai
    except ImportError as error:
        raise UserError("--server: needs the package openai: pip install -r requirements-optional.txt") from error
    key = os.environ.get("OPENAI_API_KEY") or "none"  # servers of one's own want no key, the client wants one
    for place, character in enumerate(key, 1):
        if not "!" <= character <= "~":
            raise UserError(
                f"OPENAI_API_KEY: character {place} of {len(key)} is {character!a}, which no key can hold; copy it anew"
            )
    http = openai.DefaultAsyncHttpxClient(
        limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        timeout=httpx.Timeout(REPLY_SECONDS, connect=CONNECT_SECONDS),
        event_hooks={"response": [refuse_other_host]},
    )
    # The tries are counted here, where it is known what another try can mend.
    return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, http_client=http)


async def refuse_other_host(response):
    """A server must not send prompts and key on to another host, nor on without encryption."""
    if not response.has_redirect_location:
        return
    here = response.request.url
    there = here.join(response.headers["location"])
    if there.host != here.host or (here.scheme == "https" and there.scheme != "https"):
        raise UserError(
            f"--server {here.scheme}://{here.host}: sends the request on to {there.scheme}://{there.host}, which is not "
            "followed; pass that address where it is meant"
        )


def close(loop, client):
    """End what is on its way and close the connections; a server that stalls cannot hold this up."""
    loop.set_exception_handler(lambda *_: None)  # what failed has been told
    with contextlib.suppress(Exception):
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=1))
        loop.run_until_complete(asyncio.wait_for(client.close(), 1))
    loop.close()


def end_texts(tokenizer) -> list[str]:
    """The tokens that end an answer, as texts: a server may know fewer of them than the tokenizer."""
    texts = [tokenizer.eos_token, "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else None]
    return [text for text in dict.fromkeys(texts) if text]


async def learn_form(server: Server, prompt: Prompt):
    """Find the first of FORMS that the server takes, by completions of one token."""
    refusals = []
    for form in FORMS:
        try:
            reply = await ask(server, Prompt(prompt.question, prompt.text, prompt.ids, counted=False), 1, 0, form)
        except Refused as error:
            refusals.append(error)
            continue
        server.form = form
        # Some servers take a list of numbers for a list of prompts: the count tells.
        if reply.prompt_tokens == len(prompt.ids):
            break
    if not server.form:
        raise refusals[0]
    if server.decoding.do_sample and server.decoding.top_k and not server.form.extended:
        raise UserError(f"--server {server.url}: takes no top_k; pass --top-k 0")
    if not server.form.as_ids:
        log(f"note: {server.url} takes no token ids: prompts go as text, and its count of their tokens is compared")


async def complete(server: Server, request: Request, prompt: Prompt) -> Completion:
    """One completion. A thought that is open when its budget is spent is closed, and a second request goes on behind it."""
    budget, most = request.budget, request.max_new_tokens
    try:
        reply = await ask(
            server, prompt, min(most, budget.tokens) if budget else most, request_seed(server.decoding.seed, request)
        )
    except Refused as error:
        if not await is_too_long(server, prompt, error):
            raise
        return Completion(request.id, request.sample, [], "", "prompt_too_long", len(prompt.ids), 0)
    text, used, forced, finish_reason = reply.text, reply.output_tokens, False, reply.finish_reason
    if budget and finish_reason == "length" and budget.tokens <= used < most:
        text, ids, forced = close_thought(server.tokenizer, budget, reply)
        used += len(budget.early_stop) if forced else 0
        behind = Prompt(prompt.question, prompt.text + text, prompt.ids + ids, counted=False)
        rest = await ask(server, behind, most - used, request_seed(server.decoding.seed, request, "behind the thought"))
        text, used, finish_reason = text + rest.text, used + rest.output_tokens, rest.finish_reason
    return Completion(request.id, request.sample, [], text, finish_reason, reply.prompt_tokens, used, forced)


async def is_too_long(server: Server, prompt: Prompt, refusal: Refused) -> bool:
    """Whether the prompt is what the server's context cannot hold: it then refuses a single new token too."""
    if not TOO_LONG.search(str(refusal)):
        return False
    try:
        await ask(server, prompt, 1, 0)
    except Refused:
        log(
            f"note: the prompt of question {prompt.question} is too long for the server; its empty answer counts as wrong"
        )
        return True
    return False


def close_thought(tokenizer, budget: ThinkBudget, reply: Reply) -> tuple[str, list[int], bool]:
    """The text and token ids to go on behind, and whether they close a thought that was open."""
    text, ids = reply.text, reply.token_ids
    if not ids:
        text = text.rstrip("\ufffd")  # half of a character stands for no token
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if (budget.opened or "<think>" in text) and "</think>" not in text:
        return text + EARLY_STOP, [*ids, *budget.early_stop], True
    return text, ids, False


async def ask(server: Server, prompt: Prompt, max_tokens: int, seed: int, form: Form | None = None) -> Reply:
    """The whole reply to one prompt. UserError where no further try can mend what is wrong, or all tries are used."""
    import httpx2 as httpx
    import openai

    form = form or server.form
    body = write_request(server, prompt, max_tokens, seed, form)
    trouble = None
    for attempt in range(TRIES):
        wait = min(8, WAIT_SECONDS * 2**attempt)
        try:
            async with asyncio.timeout(REPLY_SECONDS):
                raw = await server.client.completions.create(**body)
        except openai.APIStatusError as error:
            server.answered = True
            trouble = f"answers {error.status_code} to question {prompt.question}: {first_line(error)}"
            if error.status_code in (400, 422):
                raise Refused(f"--server {server.url}: {trouble}") from error
            if error.status_code not in (408, 409, 429) and error.status_code < 500:
                raise UserError(f"--server {server.url}: {trouble}") from error
            wait = asked_wait(error.response.headers, wait)
        except (openai.OpenAIError, httpx.HTTPError, OSError, ValueError) as error:
            trouble = name_failure(server, prompt, error)
        else:
            server.answered = True
            reply, lack = read_reply(raw, max_tokens)
            if reply:
                refuse_other_count(server, prompt, reply, form)
                return reply
            trouble = f"gives no whole reply to question {prompt.question}: {lack}"
        if attempt + 1 < TRIES:
            await asyncio.sleep(wait)
    raise UserError(f"--server {server.url}: {trouble} ({TRIES} tries)")


def write_request(server: Server, prompt: Prompt, max_tokens: int, seed: int, form: Form) -> dict:
    """The parameters of one request."""
    decoding = server.decoding
    body = {"model": server.model, "prompt": prompt.ids if form.as_ids else prompt.text, "max_tokens": max_tokens}
    body |= {"stop": server.stop} if server.stop else {}
    if decoding.do_sample:
        body |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "seed": seed}
    else:
        body |= {"temperature": 0}
    if form.extended:
        # vLLM compares `stop` with a text that lacks special tokens, and else takes what the model's own
        # generation_config.json says: -1 and 1 filter nothing.
        vocabulary = server.tokenizer.get_vocab()
        ends = [vocabulary[text] for text in end_texts(server.tokenizer) if text in vocabulary]
        body["extra_body"] = {"stop_token_ids": ends, "repetition_penalty": 1.0, "return_token_ids": True}
        body["extra_body"] |= {"top_k": decoding.top_k or -1} if decoding.do_sample else {}
    return body


def asked_wait(headers, otherwise: float) -> float:
    """Seconds until the next try: what Retry-After asks, a number or a date, up to a bound."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(headers["retry-after-ms"]) / 1000 if "retry-after-ms" in headers else float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return otherwise
    return otherwise if math.isnan(seconds) else min(max(seconds, 0), RETRY_AFTER_SECONDS)


def name_failure(server: Server, prompt: Prompt, error: BaseException) -> str:
    """What went wrong on the way to a reply; a UserError where another try is of no use."""
    import httpx2 as httpx

    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    told = next((first_line(each) for each in reversed(chain) if str(each).strip()), type(chain[-1]).__name__)
    for each in chain:
        if isinstance(each, UserError):
            raise each
        if isinstance(each, ssl.SSLError):
            raise UserError(
                f"--server {server.url}: its certificate or encryption is not accepted: {first_line(each)}; name the "
                "authority that signed it in SSL_CERT_FILE, or pass http:// where it has none"
            ) from error
    if any(isinstance(each, TimeoutError | httpx.TimeoutException) for each in chain):
        told = "no whole reply in time"
    unreachable = any(isinstance(each, httpx.ConnectError | httpx.ConnectTimeout) for each in chain)
    if unreachable and not server.answered and time.monotonic() - server.started > FIRST_SECONDS:
        raise UserError(
            f"--server {server.url}: cannot be reached: {told}; is it running, and at this address?"
        ) from error
    if isinstance(error, ValueError):
        return f"gives no whole reply to question {prompt.question}: it is not JSON"
    return f"gives no answer to question {prompt.question}: {told}"


def read_reply(raw, max_tokens: int) -> tuple[Reply | None, str]:
    """The Reply, or None and what it lacks."""
    if isinstance(raw, str):
        return None, "it is not JSON"
    choices, usage = getattr(raw, "choices", None), getattr(raw, "usage", None)
    if not isinstance(choices, list) or len(choices) != 1:
        count = len(choices) if isinstance(choices, list) else "none"
        return None, f"it must hold one choice and holds {count}"
    text, finish_reason = getattr(choices[0], "text", None), getattr(choices[0], "finish_reason", None)
    if not isinstance(text, str):
        return None, "its choice has no text"
    if finish_reason not in ("stop", "length"):
        return None, f"its finish_reason must be stop or length and is {finish_reason!r}"
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    if not all(type(count) is int for count in counts):
        return None, "it has no usage with prompt_tokens and completion_tokens"
    if counts[0] < 1 or not bool(text) <= counts[1] <= max_tokens:
        return None, f"it counts {counts[0]} prompt tokens and {counts[1]} new ones, of at most {max_tokens}"
    ids = getattr(choices[0], "token_ids", None)
    whole = isinstance(ids, list) and len(ids) == counts[1] and all(type(token) is int for token in ids)
    return Reply(text, ids if whole else None, finish_reason, *counts), ""


def refuse_other_count(server: Server, prompt: Prompt, reply: Reply, form: Form):
    """UserError where the server read another prompt than ours: with a second BOS, or by another tokenizer."""
    if prompt.counted and reply.prompt_tokens != len(prompt.ids):
        raise UserError(
            f"--server {server.url}: reads {reply.prompt_tokens} tokens in the prompt of question {prompt.question}, which "
            f"has {len(prompt.ids)}; pass --tokenizer of the model that it serves"
            + ("" if form.as_ids else ", or a server that takes token ids, such as vLLM")
        )


def request_seed(seed: int, request: Request, place: str = "") -> int:
    """31 bits of the SHA-256 of (seed, question id, sample): the server's draws differ by sample and repeat by run."""
    text = f"{seed} {request.id} {request.sample}" + (f" {place}" if place else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
