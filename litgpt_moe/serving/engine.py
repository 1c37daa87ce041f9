"""The engine: one model on which several requests alternate, token by token."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any

import torch
from litgpt.model import GPT

from litgpt_moe.balance import layers_of
from litgpt_moe.checkpoints.reader import processor_of
from litgpt_moe.cli import first_line, is_out_of_memory
from litgpt_moe.generation.decode import Diverged, generate, room_for
from litgpt_moe.generation.text import TextDecoder
from litgpt_moe.serving.requests import ApiError, CompletionRequest, Served


class StopText:
    """Pass text on up to the first stop sequence; text that may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.found = False

    def put(self, text: str) -> str:
        """Return the text that is certainly before any stop sequence; "" after one was found."""
        self._held += "" if self.found else text
        ends = [end for stop in self._stops if (end := self._held.find(stop)) >= 0]
        self.found = self.found or bool(ends)
        lengths = range(min(len(self._held), max(map(len, self._stops), default=0)), 0, -1)
        waiting = (n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stops))
        cut = min(ends) if ends else len(self._held) - next(waiting, 0)
        sure, self._held = self._held[:cut], "" if ends else self._held[cut:]
        return sure

    def end(self) -> str:
        """Return the text that was held back."""
        return self._held


def next_with_routing(
    model: GPT, ids: Iterator[int], texts: Sequence[str]
) -> tuple[int | None, list[dict[str, Any]]]:
    """Return the next token and the routing of each token, with these texts, that the model reads for it.

    The routing is, for each layer, the token's experts and the probabilities of all experts in 1/1000.
    """
    records: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        logits_NE, weights_NK, indices_NK = layer.route(inputs[0].flatten(0, 1))
        # the grouped router scores each expert by a sigmoid of its own (DeepSeek-V3, eq. 15)
        probs_NE = logits_NE.sigmoid() if layer.config.n_expert_groups else logits_NE.softmax(dim=-1)
        by_weight_NK = weights_NK.argsort(dim=-1, descending=True)
        records.append((indices_NK.gather(1, by_weight_NK), (probs_NE * 1000).round().int()))

    with ExitStack() as hooks:
        for layer in layers_of(model).values():
            hooks.enter_context(layer.register_forward_pre_hook(record))
        token = next(ids, None)
    experts, probs = [r[0].tolist() for r in records], [r[1].tolist() for r in records]  # by layer, token
    return token, [
        {"text": text, "experts": [e[place] for e in experts], "probs": [p[place] for p in probs]}
        for place, text in enumerate(texts)
    ]


@dataclass
class Piece:
    """The result of one step of a continuation: finished text, and the tokens that the model read for it."""

    text: str
    read: list[dict[str, Any]]
    n_new: int = 0
    finish_reason: str | None = None
    """OpenAI's: stop or length."""
    ending: str | None = None
    """The same in words."""


def continuation(served: Served, request: CompletionRequest, number: int) -> Generator[Piece]:
    """Yield a Piece for each token of the sample `number`; the last one has a finish_reason.

    It runs and is closed in the engine's thread. Closing it frees the memory of the KV cache.
    """
    model, tokenizer, body = served.model, served.tokenizer, request.body
    prompt_ids, context = request.prompts[number // body.n], model.max_seq_length
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(body.seed + number % body.n)
    ids = generate(model, prompt_ids, body.max_tokens, request.sampling, tokenizer.eos_id, generator)
    room = room_for(prompt_ids, body.max_tokens, context)
    full = f"the context of {context:,} tokens is full" if room < body.max_tokens else "max_tokens reached"
    decoder, stop = TextDecoder(processor_of(tokenizer)), StopText(body.stop)
    unread = [decoder.put(token_id) for token_id in prompt_ids]
    echo = "".join(unread) if body.echo else ""
    # the decoder may hold back the prompt's last character until the next token: that is not new text
    whole = "" if body.echo else tokenizer.processor.decode(prompt_ids)
    skip = max(0, len(whole) - sum(map(len, unread)))
    reason = ending = None
    with closing(ids):
        while True:
            if body.routing:
                token, read = next_with_routing(model, ids, unread)
            else:
                token, read = next(ids, None), []
            text, room = "" if token is None else decoder.put(token), room - 1
            unread = [text]
            if token is None:
                reason, ending = "stop", "the story ended"
            elif room == 0:
                reason, ending = "length", full
            text += decoder.end() if reason else ""
            text, skip = text[skip:], max(0, skip - len(text))
            text = stop.put(text) + (stop.end() if reason else "")
            if stop.found:
                reason, ending = "stop", "a stop sequence came"
            piece = Piece(echo + text, read, int(token is not None), reason, ending)
            if reason:
                break
            yield piece
            echo = ""
    yield piece


class Engine:
    """One model on which several requests alternate, token by token, in a thread of the engine's own."""

    RUNNING = 4  # requests at a time
    WAITING = 16  # requests in the queue; more are refused

    def __init__(self, served: Served) -> None:
        self.served = served
        self.is_stopping: Callable[[], bool] = lambda: False  # set by the server; ends running requests
        self.n_waiting, self.n_running = 0, 0
        self._slots = asyncio.Semaphore(self.RUNNING)
        # the executor's queue is first in, first out and holds one step of each request, so they alternate
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
        """Yield (choice, piece) of the request's samples in turn until all have ended, inside `slot`."""
        loop, count = asyncio.get_running_loop(), len(request.prompts) * request.body.n
        live = {number: continuation(self.served, request, number) for number in range(count)}
        try:
            while live:
                for number, choice in list(live.items()):
                    if self.is_stopping():
                        raise ApiError(503, "the server is stopping", code="stopping")
                    piece = await loop.run_in_executor(self._thread, next, choice)
                    if piece.finish_reason:
                        del live[number]
                    yield number, piece
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, Diverged) or is_out_of_memory(error):
                raise ApiError(500, first_line(error)) from None
            raise
        finally:
            # also reached when the client disconnects; `close` is queued behind a step that still runs
            for choice in live.values():
                self._thread.submit(choice.close)
