"""Continue a text with a trained checkpoint, word by word as the model finds them.

Run: uv run python generate.py --prompt "Once upon a time"
(10 s to import and load, then about 60 tokens/s with MoE-200M on one CPU core)

Standard output carries the text alone: prompt and continuation; with --num_samples above 1 a line
`<|endoftext|>` stands between the texts, as prepare_data.py reads them. Everything else goes to stderr.

`generate.py --serve` opens a playground at http://127.0.0.1:8000 (one page, tools/playground.html, that loads
nothing from elsewhere) and OpenAI's /v1/completions for the clients that speak it; the flags are then what a
request leaves out. The same seed and prompt give the same text here and there. Beside OpenAI's parameters
these are taken: top_k, min_p, repetition_penalty, and `"routing": true`, with which each choice tells the
tokens that the model has read so far: `[{"text", "experts": by layer, "probs": by layer, in 1/1000}]`.
"""

import argparse
import asyncio
import errno
import io
import ipaddress
import json
import math
import os
import queue
import re
import secrets
import select
import socket
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlsplit

from litgpt_moe.cli import FlagParser, hear_ctrl_c, run_script

if TYPE_CHECKING:
    import tokenizers
    import torch
    import uvicorn
    from litgpt.model import GPT
    from litgpt.tokenizer import Tokenizer
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse

DEFAULT_PROMPT = "Once upon a time"
SEPARATOR = "<|endoftext|>"
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
REPLACEMENT = "\ufffd"  # what decoders show for bytes that are no (or not yet a whole) character
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
PAGE = Path(__file__).parent / "tools" / "playground.html"
# the page's own script and style, requests to this server, and nothing else
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MAX_BODY_BYTES = 1 << 18  # of a request; a context of 1,024 tokens is about 5,000
MAX_CHOICES = 8  # samples of one request, over all its prompts; each has a KV cache of its own
PATIENCE_S = 30  # for a request to arrive and for a client to read


def setting(default: float, text: str) -> Any:  # Any: a field stands where its value's type is declared
    """Return a dataclass field that carries the text of its `--help`."""
    return field(default=default, metadata={"help": f"{text} (default {default})"})


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the values are checked when it is made."""

    temperature: float = setting(0.8, "divides the logits: below 1 safer, above 1 wilder, 0 = greedy")
    top_k: int = setting(50, "draw from this many likeliest tokens, 0 = off")
    top_p: float = setting(1.0, "draw from the fewest likeliest tokens with this much probability, 1.0 = off")
    min_p: float = setting(0.0, "drop tokens below this fraction of the likeliest one's probability, 0 = off")
    repetition_penalty: float = setting(
        1.0, "make tokens that occurred less likely, 1.2 is strong, 1.0 = off"
    )

    def __post_init__(self) -> None:
        rules = [
            (
                "temperature",
                self.temperature == 0 or 1e-3 <= self.temperature < math.inf,
                "0 (greedy) or 0.001 or more",
            ),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 1e-12 <= self.top_p <= 1, "above 0 and up to 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e30, "0.001 (1 = off) to 1e30"),
        ]
        problems = [f"{name} is {getattr(self, name)}; choose {rule}" for name, ok, rule in rules if not ok]
        if problems:
            raise ValueError("\n".join(problems))


# --- from logits to a token ---------------------------------------------------------------------------------


def candidates(
    logits: "torch.Tensor", sampling: Sampling, seen: "torch.Tensor | None" = None
) -> "tuple[torch.Tensor, torch.Tensor | None]":
    """Return the tokens' relative probabilities and the ids they belong to (None: id i is at place i).

    Applied in this order: repetition penalty (CTRL, section 4.1, arxiv.org/abs/1909.05858; negative logits
    are multiplied, as Hugging Face does), temperature, top_k, top_p (nucleus, arxiv.org/abs/1904.09751),
    min_p (arxiv.org/abs/2407.01082). `logits` is (V,), `seen` is (V,), true for tokens that occurred.
    """
    scores, ids = logits.float(), None
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        scores = scores.where(~seen, (scores / penalty).where(scores > 0, scores * penalty))
    if sampling.temperature == 0:
        return scores.new_ones(1), scores.argmax(dim=-1, keepdim=True)
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.size(0):
        scores, ids = scores.topk(sampling.top_k)
    probs = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        if ids is None:
            probs, ids = _likeliest(probs, sampling.top_p)
        # a token stays while those before it fall short of top_p: the first always does
        probs = probs.where(probs.cumsum(-1) - probs < sampling.top_p, 0.0)
    if sampling.min_p > 0:
        probs = probs.where(probs >= sampling.min_p * probs.max(), 0.0)
    return probs, ids


def _likeliest(probs: "torch.Tensor", mass: float) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the likeliest tokens' probabilities, falling, that sum to `mass` or more, and their ids."""
    # the first 1,024 nearly always have it, and sorting all 32,000 words costs more than twice as much
    values, ids = probs.topk(min(1024, probs.size(0)))
    return (values, ids) if values.sum() >= mass else probs.sort(descending=True)


def sample(
    logits: "torch.Tensor",
    sampling: Sampling,
    generator: "torch.Generator | None" = None,
    seen: "torch.Tensor | None" = None,
) -> int:
    """Return the id of the next token, drawn from `logits` (V,) by `sampling`."""
    import torch

    probs, ids = candidates(logits, sampling, seen)
    place = torch.multinomial(probs, 1, generator=generator) if probs.numel() > 1 else 0
    return int(place if ids is None else ids[place])


# --- from tokens to more tokens -----------------------------------------------------------------------------


class Diverged(ValueError):
    """The model computes no numbers."""

    def __init__(self) -> None:
        way_out = "use an earlier checkpoint (or --precision 32-true, if it was 16-true)"
        super().__init__(f"the model's logits are NaN; {way_out}")


def room_for(prompt_ids: Sequence[int], max_tokens: int, block_size: int) -> int:
    """Return how many of `max_tokens` new tokens fit; ValueError when the prompt leaves no room at all."""
    if not prompt_ids:
        raise ValueError("the prompt holds no token and this tokenizer has no BOS; give a --prompt with text")
    if len(prompt_ids) >= block_size:
        raise ValueError(
            f"the prompt has {len(prompt_ids):,} tokens but the model's block_size is {block_size:,}; "
            f"shorten it to {block_size - 1:,} tokens or fewer"
        )
    return min(max_tokens, block_size - len(prompt_ids))


def generate(
    model: "GPT",
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    eos_id: int | None = None,
    generator: "torch.Generator | None" = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` new token ids, stopping before `eos_id` and when the context is full.

    Several such iterators can take turns on one model: each brings its own KV cache to its steps.
    """
    import torch

    sampling = sampling or Sampling()
    count = room_for(prompt_ids, max_tokens, model.max_seq_length)
    weight = model.lm_head.weight
    device, ids = weight.device, torch.tensor([list(prompt_ids)], device=weight.device)
    position = torch.arange(ids.size(1), device=device)
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(model.config.padded_vocab_size, dtype=torch.bool, device=device)
    try:
        model.set_kv_cache(1, max_seq_length=ids.size(1) + count, device=device, dtype=weight.dtype)
        attentions = [block.attn for block in model.transformer.h]
        mask, caches = model.mask_cache, [attention.kv_cache for attention in attentions]
        for end in range(ids.size(1), ids.size(1) + count):
            model.mask_cache = mask
            for attention, cache in zip(attentions, caches, strict=True):
                attention.kv_cache = cache
            # entered for each token: a generator that waits inside it would switch its caller's mode too
            with torch.inference_mode():
                if seen is not None:
                    seen[ids] = True
                # the last row alone is wanted, and `end` lets attention skip the empty part of the cache
                logits = model(ids, position, input_pos_maxp1=end)[0, -1]
                if logits.isnan().any():
                    raise Diverged
                token = sample(logits, sampling, generator, seen)
            if token == eos_id:
                return
            yield token
            ids, position = torch.tensor([[token]], device=device), position[-1:] + 1
    finally:
        model.clear_kv_cache()


def lay_out_for_decoding(model: "GPT") -> None:
    """Reorder the weights in memory for one-token steps on a CPU; shapes, values and names stay.

    A step is bound by reading the weights. As (in, out) in memory MKL reads them at 17 to 26 GB/s on an AMD
    EPYC core, as (out, in) at 10 (torch 2.10, tools/benchmark_generate.py).
    """
    import torch

    from moe_layers import moe_layers

    for layer in moe_layers(model).values():
        layer.pack_for_decoding()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.is_contiguous():
            module.weight.data = module.weight.data.t().contiguous().t()


# --- from tokens to text ------------------------------------------------------------------------------------


class TextDecoder:
    """Token ids in, finished text out; the pieces joined are the tokenizer's decoding of the whole.

    Not `tokenizers.decoders.DecodeStream`: as of tokenizers 0.23 it raises "Invalid prefix" when bytes that
    follow a finished emoji turn out invalid (the whole run of byte pieces is then shown as U+FFFD), and it
    keeps back an unfinished character for ever. Constant work per token: only a short window is decoded.
    """

    CONTEXT = 4  # tokens kept before the new ones: a character has at most four bytes
    LONGEST = 16  # a window this long is cut although its end looks unfinished: it is text of U+FFFD

    def __init__(self, tokenizer: "tokenizers.Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that are out already

    def put(self, token_id: int) -> str:
        """Return the text that this token finished, perhaps none."""
        piece = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if piece is None:  # never shown, and no first token either (whose leading space is stripped)
            return ""
        self._window.append(token_id)
        if BYTE_PIECE.fullmatch(piece):
            return ""  # one invalid byte spoils its whole run, so the run's text is known at its end
        text = self._tokenizer.decode(self._window)
        stable = text.removesuffix(REPLACEMENT)
        new, self._shown = stable[self._shown :], len(stable)
        if stable == text or len(self._window) > self.LONGEST:
            self._window = self._window[-self.CONTEXT :]
            self._shown = len(self._tokenizer.decode(self._window).removesuffix(REPLACEMENT))
        return new

    def end(self) -> str:
        """Return what was kept back; bytes that never became a character are U+FFFD."""
        new = self._tokenizer.decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return new


class AsyncTokenStreamer:
    """Write tokens as text from a thread of its own, so that the model never waits for the terminal.

    Use it as a context manager: leaving it, by Ctrl-C too, writes what is queued and kept back. An error of
    the thread (a closed pipe, a full disk) is raised by the next `put` or `end`.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", out: TextIO | None = None) -> None:
        self._decoder = TextDecoder(tokenizer)
        self._out = sys.stdout if out is None else out
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="token-streamer", daemon=True)
        self._thread.start()

    def put(self, token_id: int) -> None:
        """Queue one token; raises what went wrong with those before it."""
        self._raise_error()
        self._queue.put(token_id)

    def end(self) -> None:
        """Write everything that is left and wait until it is out; further calls do nothing."""
        self._queue.put(None)
        self._thread.join()
        self._raise_error()

    def __enter__(self) -> "AsyncTokenStreamer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with (
            suppress(OSError) if kind else nullcontext()
        ):  # the error that brought us here is the one to tell
            self.end()

    def _run(self) -> None:
        try:
            while (token_id := self._queue.get()) is not None:
                self._write(self._decoder.put(token_id))
            self._write(self._decoder.end())
        except Exception as error:  # handed to the main thread, whatever it is
            self._error = error

    def _write(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


# --- serving: the engine ------------------------------------------------------------------------------------


class ApiError(Exception):
    """What a client is told, in OpenAI's form: an HTTP status, a sentence, and the parameter it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


UNKNOWN = ApiError(500, "an error in the server, whose log tells more")


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request to /v1/completions: the samples of prompt p are choices p*n to p*n + n - 1."""

    prompts: list[list[int]]
    sampling: Sampling
    max_tokens: int
    n: int
    seed: int  # of each prompt's first sample; the next ones have the next seeds
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    echo: bool
    routing: bool


class StopText:
    """Text in, text out up to the first of the stop sequences; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.found = False

    def put(self, text: str) -> str:
        """Return what is sure to stand before any stop sequence; nothing once one was found."""
        self._held += "" if self.found else text
        ends = [end for stop in self._stops if (end := self._held.find(stop)) >= 0]
        self.found = self.found or bool(ends)
        lengths = range(min(len(self._held), max(map(len, self._stops), default=0)), 0, -1)
        waiting = (n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stops))
        cut = min(ends) if ends else len(self._held) - next(waiting, 0)
        sure, self._held = self._held[:cut], "" if ends else self._held[cut:]
        return sure

    def end(self) -> str:
        """Return what waited."""
        held, self._held = self._held, ""
        return held


class RouterWatch:
    """Notes what a model's routers say of each token that it reads, between `start` and `stop`."""

    def __init__(self, model: "GPT") -> None:
        from moe_layers import moe_layers

        self.layers = moe_layers(model)
        self._notes: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        for layer in self.layers.values():
            layer.register_forward_pre_hook(self._note)

    def _note(self, layer: Any, inputs: "tuple[torch.Tensor, ...]") -> None:
        if self._notes is not None:
            logits_NE, weights_NK, indices_NK = layer._route(inputs[0].flatten(0, 1))
            # the grouped router's scores are sigmoids, each for itself (DeepSeek-V3, eq. 15)
            grouped = layer.config.n_expert_groups
            probs_NE = logits_NE.sigmoid() if grouped else logits_NE.softmax(dim=-1)
            by_weight_NK = weights_NK.argsort(dim=-1, descending=True)
            self._notes.append((probs_NE, indices_NK.gather(1, by_weight_NK)))

    def start(self) -> None:
        """Note from here on."""
        self._notes = []

    def stop(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Return for each token read (their texts) its experts and all probabilities in 1/1000, by layer."""
        notes, self._notes = self._notes or [], None
        experts = [indices_NK.tolist() for _, indices_NK in notes]  # by layer, token
        probs = [(probs_NE * 1000).round().int().tolist() for probs_NE, _ in notes]
        return [
            {"text": text, "experts": [e[place] for e in experts], "probs": [p[place] for p in probs]}
            for place, text in enumerate(texts)
        ]


@dataclass
class Piece:
    """What one step of a continuation brings: finished text, and the tokens that the model read for it."""

    text: str
    read: list[dict[str, Any]]
    n_new: int = 0
    finish_reason: str | None = None  # OpenAI's: stop or length
    ending: str | None = None  # the same in words


class Continuation:
    """One sample in progress; `step` and `close` are called from the engine's thread."""

    def __init__(self, engine: "Engine", request: CompletionRequest, number: int) -> None:
        import torch

        model, tokenizer = engine.model, engine.tokenizer
        prompt_ids = request.prompts[number // request.n]
        generator = torch.Generator(model.lm_head.weight.device).manual_seed(
            request.seed + number % request.n
        )
        self._ids = generate(
            model, prompt_ids, request.max_tokens, request.sampling, tokenizer.eos_id, generator
        )
        self._room = room_for(prompt_ids, request.max_tokens, model.max_seq_length)
        self._is_cut_short = self._room < request.max_tokens
        self._engine, self._request = engine, request
        self._decoder, self._stop = TextDecoder(tokenizer.processor), StopText(request.stop)
        self._unread = [self._decoder.put(token_id) for token_id in prompt_ids]
        self._echo = "".join(self._unread) if request.echo else ""
        # the decoder may keep the prompt's last character back until the next token: that is no new text
        whole = 0 if request.echo else len(tokenizer.processor.decode(prompt_ids))
        self._skip = max(0, whole - sum(map(len, self._unread)))

    def step(self) -> Piece:
        """Return what the next token brings; the last piece has a finish_reason."""
        watch, routing = self._engine.watch, self._request.routing
        if routing:
            watch.start()
        token = next(self._ids, None)
        read = watch.stop(self._unread) if routing else []
        self._unread, reason, ending = [], None, None
        text = ""
        if token is not None:
            self._room -= 1
            text = self._decoder.put(token)
            self._unread.append(text)
        if token is None:
            reason, ending = "stop", "the story ended"
        elif self._room == 0:
            full = f"the context of {self._engine.model.max_seq_length:,} tokens is full"
            reason, ending = "length", full if self._is_cut_short else "max_tokens reached"
        if reason:
            text += self._decoder.end()
        text, self._skip = text[self._skip :], max(0, self._skip - len(text))
        text = self._stop.put(text) + (self._stop.end() if reason else "")
        if self._stop.found:
            reason, ending = "stop", "a stop sequence came"
        if reason:
            self.close()
        text, self._echo = self._echo + text, ""
        return Piece(text, read, int(token is not None), reason, ending)

    def close(self) -> None:
        """Give the memory of the KV cache back."""
        self._ids.close()


class Engine:
    """One model that several requests take turns on, token by token, in one thread of its own."""

    RUNNING = 4  # requests at a time
    WAITING = 16  # requests in the queue; more are refused

    def __init__(self, model: "GPT", tokenizer: "Tokenizer", args: argparse.Namespace) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.name, self.created = model.config.name or "model", int(time.time())
        self.watch = RouterWatch(model)
        self.closing = False  # set when the server stops: what runs ends
        self.n_waiting, self.n_running = 0, 0
        self._slots = asyncio.Semaphore(self.RUNNING)
        # first come, first served: each request has one step in the queue, so they alternate
        self._thread = ThreadPoolExecutor(1, "model")

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a slot and hold it. Raises ApiError when too many wait already."""
        if self._slots.locked() and self.n_waiting >= self.WAITING:
            raise ApiError(503, f"{self.WAITING} requests wait already; try again later", code="overloaded")
        self.n_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.n_waiting -= 1
        self.n_running += 1
        try:
            yield
        finally:
            self.n_running -= 1
            self._slots.release()

    async def run(self, request: CompletionRequest) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (choice, piece) of the request's samples in turn, until all have ended. Needs a slot."""
        import torch

        loop, count = asyncio.get_running_loop(), len(request.prompts) * request.n
        live = {number: Continuation(self, request, number) for number in range(count)}
        try:
            while live:
                for number, continuation in list(live.items()):
                    if self.closing:
                        raise ApiError(503, "the server is stopping", code="stopping")
                    piece = await loop.run_in_executor(self._thread, continuation.step)
                    if piece.finish_reason:
                        del live[number]
                    yield number, piece
        except (Diverged, torch.OutOfMemoryError) as error:
            raise ApiError(500, str(error)) from None
        finally:  # reached when the client goes away, too; a step under way ends before
            for continuation in live.values():
                self._thread.submit(continuation.close)


# --- serving: requests --------------------------------------------------------------------------------------

JSON_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "an object"}
# value that changes nothing -> accepted; any other is refused
WITHOUT_EFFECT = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}


def read_request(body: Any, engine: Engine) -> CompletionRequest:
    """Return the checked request; what it leaves out is as on the server's command line. Raises ApiError."""
    if not isinstance(body, dict):
        raise ApiError(400, "the request must be a JSON object")
    rest, args = dict(body), engine.args
    if (model := _take(rest, "model", str, engine.name)) != engine.name:
        message = f"no model {model!r:.80} is here; this server has {engine.name!r}"
        raise ApiError(404, message, "model", "model_not_found")
    _take(rest, "user", str, "")  # only tells OpenAI who asks
    for name, values in WITHOUT_EFFECT.items():
        if (value := rest.pop(name, None)) not in values:
            raise ApiError(400, f"{name} is {value!r:.80}, which is not supported; leave it out", name)
    sampling = {o.name: _take(rest, o.name, o.type, getattr(args, o.name)) for o in fields(Sampling)}
    options = _take(rest, "stream_options", dict, {})
    wanted = {
        "max_tokens": _max_tokens(rest, engine),
        "n": _take(rest, "n", int, args.num_samples, 1, MAX_CHOICES),
        "seed": _take(rest, "seed", int, args.seed, 0, 2**63 - 1),
        "stop": _stops(rest.pop("stop", None)),
        "stream": _take(rest, "stream", bool, False),
        "include_usage": _take(options, "include_usage", bool, False),
        "echo": _take(rest, "echo", bool, False),
        "routing": _take(rest, "routing", bool, False),
    }
    prompts = _prompts(rest.pop("prompt", None), engine, wanted["max_tokens"])
    if len(prompts) * wanted["n"] > MAX_CHOICES:
        problem = f"{len(prompts)} prompts times n {wanted['n']} is over {MAX_CHOICES}; ask for fewer at once"
        raise ApiError(400, problem, "n")
    if unknown := [*rest, *options]:
        name = ascii(unknown[0])[1:-1][:80]  # half a surrogate pair cannot be sent back
        raise ApiError(400, f"unknown parameter {name}; leave it out", name)
    if wanted["seed"] is None:
        wanted["seed"] = secrets.randbits(32)
    try:
        return CompletionRequest(prompts=prompts, sampling=Sampling(**sampling), **wanted)
    except ValueError as error:
        raise ApiError(400, str(error), str(error).split()[0]) from None


def _take(
    body: dict, name: str, kind: Any, default: Any, low: float = -math.inf, high: float = math.inf
) -> Any:
    """Take `name` out of `body`; return its value (null: the default). ApiError if it is of another kind."""
    value = body.pop(name, None)
    if value is None:
        return default
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        raise ApiError(400, f"{name} is {value!r:.80}; it must be {JSON_KINDS[kind]}", name)
    if kind is int and not low <= value <= high:
        upper = "or more" if high == math.inf else f"to {high}"
        raise ApiError(400, f"{name} is {value!r:.80}; choose {low} {upper}", name)
    return value


def _max_tokens(body: dict, engine: Engine) -> int:
    """Take `max_tokens` out of `body` and return it. ApiError, as from OpenAI, if the context holds fewer.

    Up to there it is an upper bound: clients send 256 or so unasked, and a story may end before. One that
    fills the context ends with finish_reason `length`, and `ending` says so.
    """
    context = engine.model.max_seq_length
    wanted = _take(body, "max_tokens", int, min(engine.args.max_tokens, context), 1)
    if wanted > context:
        told = f"max_tokens is {wanted!r:.80}, but the model's context holds {context} tokens with the prompt"
        raise ApiError(400, f"{told}; ask for {context} or fewer", "max_tokens", "invalid_value")
    return wanted


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    is_good = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= 100 for s in stops)
    if not is_good or len(stops) > 4:
        raise ApiError(400, "stop must be one to four texts of 1 to 100 characters", "stop")
    return tuple(stops)


def _prompts(value: Any, engine: Engine, max_tokens: int) -> list[list[int]]:
    """Return the token ids of each prompt: a text or a list of texts."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ApiError(400, "prompt must be a text or a list of texts", "prompt")
    if len(texts) > MAX_CHOICES:
        raise ApiError(400, f"{len(texts)} prompts are too many; give {MAX_CHOICES} at most", "prompt")
    try:
        "".join(texts).encode()
        return [encode_prompt(engine.model, engine.tokenizer, text, max_tokens) for text in texts]
    except UnicodeEncodeError:
        raise ApiError(
            400, "the prompt holds half a surrogate pair, which is no character", "prompt"
        ) from None
    except ValueError as error:
        raise ApiError(400, str(error), "prompt", "context_length_exceeded") from None


async def read_body(request: "Request") -> Any:
    """Return the request's JSON. Raises ApiError when it is none, too large or does not arrive."""
    # any page may send text or a form to any address; for JSON a browser asks the server first, which refuses
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the request as Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the request has over {MAX_BODY_BYTES:,} bytes; send less")
        return json.loads(body)
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {PATIENCE_S} s") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not readable JSON ({error})") from None


# --- serving: answers ---------------------------------------------------------------------------------------


class CompletionResponse:
    """The answer to a request, as an ASGI application: whole, or as server-sent events.

    A client that goes away, or reads nothing for `PATIENCE_S`, ends the work and frees the slot at once.
    """

    def __init__(self, engine: Engine, request: CompletionRequest) -> None:
        self._engine, self._request = engine, request
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
        self._head = {**head, "created": int(time.time()), "model": engine.name, "seed": request.seed}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from anyio import create_task_group

        async with create_task_group() as group:

            async def end_when_the_client_goes() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(end_when_the_client_goes)
            await self._answer(scope, receive, send)
            group.cancel_scope.cancel()

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        async def patient_send(message: Any) -> None:
            async with asyncio.timeout(PATIENCE_S):
                await send(message)

        with suppress(TimeoutError):  # uvicorn then closes the connection
            try:
                async with self._engine.slot(), aclosing(self._engine.run(self._request)) as pieces:
                    if self._request.stream:
                        await self._stream(pieces, patient_send)
                        return
                    answer = JSONResponse(await self._collect(pieces))
            except ApiError as error:
                answer = error_response(error)
            await answer(scope, receive, patient_send)

    async def _stream(self, pieces: AsyncIterator[tuple[int, Piece]], send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(data: str) -> None:
            await send(
                {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
            )

        n_new = 0
        try:
            async for number, piece in pieces:
                n_new += piece.n_new
                if piece.text or piece.read or piece.finish_reason:
                    choice = self._choice(number, piece)
                    await event(json.dumps({**self._head, "choices": [choice]}))
            if self._request.include_usage:
                await event(json.dumps({**self._head, "choices": [], "usage": self._usage(n_new)}))
        except TimeoutError:
            raise
        except Exception as error:  # the status is out already; what is no ApiError goes to the log, too
            await event(json.dumps((error if isinstance(error, ApiError) else UNKNOWN).body))
            if not isinstance(error, ApiError):
                raise
        await event("[DONE]")
        await send({"type": "http.response.body", "body": b""})

    async def _collect(self, pieces: AsyncIterator[tuple[int, Piece]]) -> dict[str, Any]:
        n_new, wholes = 0, {}
        async for number, piece in pieces:
            n_new += piece.n_new
            whole = wholes.setdefault(number, Piece("", []))
            whole.text += piece.text
            whole.read += piece.read
            whole.finish_reason, whole.ending = piece.finish_reason, piece.ending
        choices = [self._choice(number, wholes[number]) for number in sorted(wholes)]
        return {**self._head, "choices": choices, "usage": self._usage(n_new)}

    def _choice(self, number: int, piece: Piece) -> dict[str, Any]:
        choice = {"index": number, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}
        extra = {"ending": piece.ending} if piece.ending else {}
        return {**choice, **extra, **({"routing": piece.read} if self._request.routing else {})}

    def _usage(self, n_new: int) -> dict[str, int]:
        n_prompt = sum(map(len, self._request.prompts))
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def error_response(error: ApiError) -> "JSONResponse":
    """Return the error as OpenAI's clients read it."""
    from starlette.responses import JSONResponse

    headers = {"retry-after": "5"} if error.status == 503 else None
    return JSONResponse(error.body, error.status, headers)


class OwnHostOnly:
    """Refuse requests by a name that is not this machine's.

    A page elsewhere can make its own name point to 127.0.0.1 and then read the answers (DNS rebinding); an
    address is nobody's name.
    """

    def __init__(self, app: Any, names: set[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if scope["type"] == "http" and not self._is_own(host):
            told = (
                f"the host {host!r:.80} is not this server's; use its address, or start it with --host NAME"
            )
            await error_response(ApiError(403, told))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self._names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def describe_model(engine: Engine) -> dict[str, Any]:
    """Return /v1/models' entry: OpenAI's keys, and what the page needs to know."""
    config, layers = engine.model.config, engine.watch.layers
    entry = {"id": engine.name, "object": "model", "created": engine.created, "owned_by": "litgpt-moe"}
    routing = {
        "layers": list(layers),
        "n_expert": config.n_expert,
        "n_expert_per_token": config.n_expert_per_token,
        "scores": "sigmoid" if config.n_expert_groups else "softmax",
    }
    names = ["prompt", "max_tokens", "num_samples", "seed", *(option.name for option in fields(Sampling))]
    defaults = {name: getattr(engine.args, name) for name in names}
    context = engine.model.max_seq_length
    defaults["max_tokens"] = min(defaults["max_tokens"], context)  # what a request leaves out
    more = {"max_model_len": context, "defaults": defaults, "folder": str(engine.args.ckpt_dir)}
    return {**entry, **more, "routing": routing if layers else None}


def make_app(engine: Engine, names: set[str]) -> "Starlette":
    """Return the web application: the page, /v1/models and /v1/completions."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    page = PAGE.read_text(encoding="utf-8")

    async def index(_: Request) -> Response:
        return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY})

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [describe_model(engine)]})

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) != engine.name:
            raise ApiError(404, f"no model {name!r:.80} is here", "model", "model_not_found")
        return JSONResponse(describe_model(engine))

    async def completions(request: Request) -> CompletionResponse:
        return CompletionResponse(engine, read_request(await read_body(request), engine))

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            has = "this server has /, /v1/models and /v1/completions"
            response = error_response(ApiError(error.status_code, f"{error.detail}: {has}"))
            response.headers.update(error.headers or {})  # 405 names the methods that are allowed
            return response
        return error_response(error if isinstance(error, ApiError) else UNKNOWN)

    routes = [
        Route("/", index),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
    handlers = dict.fromkeys((ApiError, HTTPException, ClientDisconnect, Exception), refuse)
    middleware = [Middleware(OwnHostOnly, names=names)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def open_port(host: str, port: int) -> socket.socket:
    """Return a listening socket; OSError with one sentence where there is none to be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
        raise OSError(f"port {port} on {host} {reason}; choose another by --port or --host") from None


def make_server(engine: Engine, host: str) -> "uvicorn.Server":
    """Return the server; `run(sockets=[...])` serves until Ctrl-C."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, *args: Any) -> None:
            engine.closing = True  # a story under way would keep the server waiting
            super().handle_exit(*args)

    app = make_app(engine, {"localhost", host.lower(), socket.gethostname().lower()})
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=100,
        timeout_graceful_shutdown=3,
    )
    return Server(config)


def serve(args: argparse.Namespace, prompt: str) -> None:
    """Serve the checkpoint until Ctrl-C. ValueError and OSError tell why it cannot be."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--serve needs {error.name}; install it with: uv sync --extra serve") from None
    with open_port(args.host, args.port) as listener:
        model, tokenizer = load(args)
        encode_prompt(model, tokenizer, prompt, args.max_tokens)
        args.prompt = prompt  # the page begins with it
        engine = Engine(model, tokenizer, args)
        server = make_server(engine, args.host)
        address, port, *_ = listener.getsockname()
        where = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{port}"
        print(f"playground {where}\nOpenAI API {where}/v1, model {engine.name}", file=sys.stderr)
        if not ipaddress.ip_address(address).is_loopback:
            print("whoever reaches this machine can use it: there is no password", file=sys.stderr)
        print("Ctrl-C stops it", file=sys.stderr)
        with suppress(KeyboardInterrupt):  # uvicorn raises it anew after it has stopped
            server.run(sockets=[listener])


# --- the command line ---------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags, hyphens and underscores alike; an unknown one ends with status 2."""
    parser = FlagParser(
        description="Continue a text with a trained checkpoint.",
        usage="%(prog)s [--prompt TEXT | --prompt_file FILE] [--serve] [options]",
        epilog="stdout carries prompt and continuation, a line <|endoftext|> between samples.",
    )
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    default = f"default: what is piped in, else {DEFAULT_PROMPT!r}"
    source.add_argument("--prompt", metavar="TEXT", help=f"text to continue, - = standard input ({default})")
    source.add_argument("--prompt_file", metavar="FILE", type=Path, help="UTF-8 text to continue")
    where = "checkpoint, or the folder of its final/ or step-*/"
    add("--ckpt_dir", type=Path, default=Path("checkpoints"), help=f"{where} (default %(default)s)")
    add("--max_tokens", type=int, default=200, help="new tokens at most (default %(default)s)")
    for option in fields(Sampling):
        add(f"--{option.name}", type=option.type, default=option.default, help=option.metadata["help"])
    add("--num_samples", type=int, default=1, help="texts to write (default %(default)s)")
    add("--seed", type=int, help="0 or more, repeats a run (default: a fresh one, told on stderr)")
    add("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    add(
        "--precision",
        default="auto",
        help="auto (bf16-true on CUDA, else 32-true), 32-true, bf16-true, 16-true",
    )
    add("--serve", action="store_true", help="open a playground and OpenAI's /v1/completions instead")
    add("--host", default="127.0.0.1", help="--serve's address, 0.0.0.0 = everybody's (default %(default)s)")
    add("--port", type=int, default=8000, help="--serve's port, 0 = any free one (default %(default)s)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> Sampling:
    """Return the sampling settings; ValueError tells every value that is out of range."""
    rules = [
        ("max_tokens", args.max_tokens >= 1, "1 or more"),
        ("num_samples", args.num_samples >= 1, "1 or more"),
        ("seed", args.seed is None or 0 <= args.seed < 2**63, "0 or more"),
        ("port", 0 <= args.port < 2**16, "0 (any free one) to 65535"),
    ]
    if args.serve:
        rules.append(("num_samples", args.num_samples <= MAX_CHOICES, f"{MAX_CHOICES} or fewer with --serve"))
    problems = [f"{name} is {getattr(args, name)}; choose {rule}" for name, ok, rule in rules if not ok]
    try:
        sampling = Sampling(**{option.name: getattr(args, option.name) for option in fields(Sampling)})
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return sampling


def read_prompt(args: argparse.Namespace) -> str:
    """Return the text to continue: --prompt, --prompt_file, standard input, or the default."""
    if args.prompt_file is not None:
        try:
            return _utf8(args.prompt_file.read_bytes(), str(args.prompt_file))
        except OSError as error:
            reason = f"--prompt_file is {args.prompt_file}: {error.strerror}"
            raise ValueError(f"{reason}; name a UTF-8 text file that can be read") from None
    if args.prompt == "-" or (args.prompt is None and not args.serve and _is_piped_in()):
        text = _utf8(sys.stdin.buffer.read(), "standard input")
        return text or (DEFAULT_PROMPT if args.prompt is None else "")
    return DEFAULT_PROMPT if args.prompt is None else _utf8(os.fsencode(args.prompt), "--prompt")


def _utf8(data: bytes, place: str) -> str:
    try:  # a file's last line break is the editor's, not the author's
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 at byte {error.start:,}; save it as UTF-8") from None


def _is_piped_in() -> bool:
    """Return whether standard input is a file, or a pipe with content (an idle one would block for ever)."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no standard input, or a closed or replaced one
        return False
    if stat.S_ISFIFO(mode) and os.name == "posix":  # Windows cannot wait on a pipe; --prompt - reads it
        return bool(select.select([sys.stdin], [], [], 0.5)[0])
    return stat.S_ISREG(mode)


def load(args: argparse.Namespace) -> "tuple[GPT, Tokenizer]":
    """Return the checkpoint's model and its tokenizer."""
    from moe_layers import find_checkpoint, load_model, pick_device, verify_checkpoint

    device, dtype = pick_device(args.device, args.precision)
    folder = find_checkpoint(args.ckpt_dir)
    verify_checkpoint(folder)
    tokenizer = read_tokenizer(folder)
    print(f"checkpoint {folder} on {device} in {str(dtype).removeprefix('torch.')}", file=sys.stderr)
    model = load_model(folder, device, dtype)
    if device.type == "cpu":
        lay_out_for_decoding(model)
    return model, tokenizer


def encode_prompt(model: "GPT", tokenizer: "Tokenizer", prompt: str, max_tokens: int) -> list[int]:
    """Return the prompt's token ids; ValueError when there is none, no room or the tokenizer is another's."""
    prompt_ids = tokenizer.encode(prompt).tolist()
    room_for(prompt_ids, max_tokens, model.max_seq_length)
    if max(prompt_ids) >= model.config.padded_vocab_size:
        size = f"token {max(prompt_ids):,}, the model knows {model.config.padded_vocab_size:,}"
        raise ValueError(f"the tokenizer is not the model's ({size}); copy the right one into the checkpoint")
    return prompt_ids


def read_tokenizer(folder: Path) -> "Tokenizer":
    """Return the checkpoint's tokenizer; one sentence when it is missing or damaged."""
    from litgpt.tokenizer import Tokenizer

    way_out = "copy in the files of the tokenizer it was trained with"
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json; {way_out}")
    try:
        return Tokenizer(folder)
    except Exception as error:  # tokenizers raises plain Exception, LitGPT KeyError and others
        raise ValueError(f"{folder}: its tokenizer files cannot be read ({error}); {way_out}") from error


def write_sample(
    model: "GPT",
    tokenizer: "Tokenizer",
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    generator: "torch.Generator | None" = None,
) -> int:
    """Write prompt and continuation to stdout as they come; return the number of new tokens."""
    started, first_s, count = time.perf_counter(), 0.0, 0
    new_ids = generate(model, prompt_ids, max_tokens, sampling, tokenizer.eos_id, generator)
    try:
        with AsyncTokenStreamer(tokenizer.processor) as streamer:
            for token_id in prompt_ids:
                streamer.put(token_id)
            for token_id in new_ids:
                count += 1
                first_s = first_s or time.perf_counter() - started
                streamer.put(token_id)
        print(flush=True)
    finally:  # told after Ctrl-C, too
        seconds = time.perf_counter() - started
        rate = f"{count / seconds:.1f} tokens/s, the first after {first_s:.2f} s"
        print(f"{count} new tokens in {seconds:.1f} s, {rate}", file=sys.stderr)
    if count < max_tokens and len(prompt_ids) + count == model.max_seq_length:
        print(f"stopped: the context of {model.max_seq_length:,} tokens is full", file=sys.stderr)
    return count


def write_samples(args: argparse.Namespace, sampling: Sampling, loaded: tuple) -> None:
    """Write the samples that the flags ask for, one after the other, each from the next seed."""
    import torch

    model, tokenizer, prompt_ids = loaded
    generator = torch.Generator(model.lm_head.weight.device)
    seed = generator.seed() % 2**32 if args.seed is None else args.seed
    for number in range(args.num_samples):
        if number:
            print(SEPARATOR, flush=True)
        generator.manual_seed(seed + number)  # so that each can be had alone, and all side by side
        if sampling.temperature > 0:
            print(f"seed {seed + number}", file=sys.stderr)
        write_sample(model, tokenizer, prompt_ids, args.max_tokens, sampling, generator)


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad settings or input, 130 after Ctrl-C."""
    args = parse_args(argv)
    try:
        hear_ctrl_c()
        sampling, prompt = check_args(args), read_prompt(args)
        if args.serve:
            serve(args, prompt)
            return 0
        model, tokenizer = load(args)
        loaded = model, tokenizer, encode_prompt(model, tokenizer, prompt, args.max_tokens)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # a Windows console's own encoding lacks most characters
    try:
        write_samples(args, sampling, loaded)
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        return _output_failed(error)
    return 0


def _output_failed(error: OSError) -> int:
    """Return 0 where the reader has seen enough (`| head`) and 1 where the text could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
    if error.errno in (errno.EPIPE, errno.EINVAL):  # Windows says EINVAL for a closed pipe
        return 0
    print(f"error: the text could not be written ({error}); free space or write elsewhere", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(run_script(main))
