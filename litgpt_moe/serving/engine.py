"""The engine: one model that several requests take turns on, token by token."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from litgpt.model import GPT

from litgpt_moe.balance import layers_of
from litgpt_moe.generation.decode import Diverged, generate, room_for
from litgpt_moe.generation.text import TextDecoder
from litgpt_moe.serving.errors import ApiError
from litgpt_moe.serving.requests import CompletionRequest, Served


class StopText:
    """Text in, text out up to the first of the stop sequences; what may be the beginning of one is held."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.found = False

    def put(self, text: str) -> str:
        """Return the text that certainly comes before any stop sequence; nothing once one was found."""
        self._held += "" if self.found else text
        ends = [end for stop in self._stops if (end := self._held.find(stop)) >= 0]
        self.found = self.found or bool(ends)
        lengths = range(min(len(self._held), max(map(len, self._stops), default=0)), 0, -1)
        waiting = (n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stops))
        cut = min(ends) if ends else len(self._held) - next(waiting, 0)
        sure, self._held = self._held[:cut], "" if ends else self._held[cut:]
        return sure

    def end(self) -> str:
        """Return what was held."""
        held, self._held = self._held, ""
        return held


class RouterWatch:
    """Records what a model's routers say of each token that it reads, between `start` and `stop`."""

    def __init__(self, model: GPT) -> None:
        self.layers = layers_of(model)
        self._records: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        for layer in self.layers.values():
            layer.register_forward_pre_hook(self._record)

    def _record(self, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if self._records is not None:
            logits_NE, weights_NK, indices_NK = layer.route(inputs[0].flatten(0, 1))
            # the grouped router scores each expert by a sigmoid of its own (DeepSeek-V3, eq. 15)
            grouped = layer.config.n_expert_groups
            probs_NE = logits_NE.sigmoid() if grouped else logits_NE.softmax(dim=-1)
            by_weight_NK = weights_NK.argsort(dim=-1, descending=True)
            self._records.append((probs_NE, indices_NK.gather(1, by_weight_NK)))

    def start(self) -> None:
        """Record from here on."""
        self._records = []

    def stop(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Return for each token read (their texts) its experts and all probabilities in 1/1000, by layer."""
        records, self._records = self._records or [], None
        experts = [indices_NK.tolist() for _, indices_NK in records]  # by layer, token
        probs = [(probs_NE * 1000).round().int().tolist() for probs_NE, _ in records]
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
    finish_reason: str | None = None
    """OpenAI's: stop or length."""
    ending: str | None = None
    """The same in words."""


class Continuation:
    """One sample in progress; `step` and `close` are called from the engine's thread."""

    def __init__(self, served: Served, watch: RouterWatch, request: CompletionRequest, number: int) -> None:
        model, tokenizer = served.model, served.tokenizer
        prompt_ids = request.prompts[number // request.n]
        generator = torch.Generator(model.lm_head.weight.device)
        generator.manual_seed(request.seed + number % request.n)
        self._ids = generate(
            model, prompt_ids, request.max_tokens, request.sampling, tokenizer.eos_id, generator
        )
        self._context = served.context
        self._room = room_for(prompt_ids, request.max_tokens, served.context)
        self._is_cut_short = self._room < request.max_tokens
        self._watch = watch if request.routing else None
        self._decoder, self._stop = TextDecoder(tokenizer.processor), StopText(request.stop)
        self._unread = [self._decoder.put(token_id) for token_id in prompt_ids]
        self._echo = "".join(self._unread) if request.echo else ""
        # the decoder may keep the prompt's last character back until the next token: that is no new text
        whole = 0 if request.echo else len(tokenizer.processor.decode(prompt_ids))
        self._skip = max(0, whole - sum(map(len, self._unread)))

    def step(self) -> Piece:
        """Return what the next token brings; the last piece has a finish_reason."""
        token, read = self._next()
        text, reason, ending = "", None, None
        if token is not None:
            self._room -= 1
            text = self._decoder.put(token)
            self._unread.append(text)
        if token is None:
            reason, ending = "stop", "the story ended"
        elif self._room == 0:
            full = f"the context of {self._context:,} tokens is full"
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

    def _next(self) -> tuple[int | None, list[dict[str, Any]]]:
        """Return the next token, None at the end, and the routing of the tokens that were read for it."""
        texts, self._unread = self._unread, []
        if self._watch is None:
            return next(self._ids, None), []
        self._watch.start()
        token = next(self._ids, None)
        return token, self._watch.stop(texts)

    def close(self) -> None:
        """Free the memory of the KV cache."""
        self._ids.close()


class Engine:
    """One model that several requests take turns on, token by token, in one thread of its own."""

    RUNNING = 4  # requests at a time
    WAITING = 16  # requests in the queue; more are refused

    def __init__(self, served: Served) -> None:
        self.served, self.created = served, int(time.time())
        self.watch = RouterWatch(served.model)
        self.closing = False  # set when the server stops: requests that run end with an error
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

    async def run(self, request: CompletionRequest) -> AsyncGenerator[tuple[int, Piece]]:
        """Yield (choice, piece) of the request's samples in turn, until all have ended. Needs a slot."""
        loop, count = asyncio.get_running_loop(), len(request.prompts) * request.n
        live = {number: Continuation(self.served, self.watch, request, number) for number in range(count)}
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
        finally:
            # reached when the client disconnects, too; a step that runs then ends before `close` is called
            for continuation in live.values():
                self._thread.submit(continuation.close)
