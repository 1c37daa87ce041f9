"""The engine: one model on which the samples of several requests advance together, a token in each step."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from litgpt_moe.checkpoints.reader import processor_of
from litgpt_moe.cli import first_line, is_out_of_memory
from litgpt_moe.generation.decode import Advance, Batch, Continuation, Diverged, room_for
from litgpt_moe.generation.decoder import Decoder, Routing
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


class Choice(Continuation):
    """One sample of a request, and the text that has come of it."""

    def __init__(
        self,
        served: Served,
        request: CompletionRequest,
        number: int,
        pieces: "asyncio.Queue[tuple[Choice, Piece | Exception]]",
    ) -> None:
        """Make the request's sample `number`; `pieces` is the queue of all its samples."""
        tokenizer, body, context = served.tokenizer, request.body, served.model.max_seq_length
        prompt_ids = request.prompts[number // body.n]
        generator = torch.Generator(served.model.lm_head.weight.device)
        generator.manual_seed(body.seed + number % body.n)
        room = room_for(prompt_ids, body.max_tokens, context)
        super().__init__(prompt_ids, room, request.sampling, tokenizer.eos_id, generator, body.routing)
        self.number, self.pieces, self.is_wanted = number, pieces, True
        self._full = f"the context of {context:,} tokens is full"
        self._full = self._full if room < body.max_tokens else "max_tokens reached"
        self._decoder, self._stop = TextDecoder(processor_of(tokenizer)), StopText(body.stop)
        self._texts = [self._decoder.put(token_id) for token_id in prompt_ids]  # of tokens not yet read
        self._echo = "".join(self._texts) if body.echo else ""
        # the decoder may hold back the prompt's last character until the next token: that is not new text
        whole = "" if body.echo else tokenizer.processor.decode(prompt_ids)
        self._skip = max(0, len(whole) - sum(map(len, self._texts)))

    def put(self, advance: Advance) -> Piece:
        """Return what a step has brought; the last Piece has a finish_reason."""
        read = self._read(advance.routing) if self.wants_routing else []
        if self.unread and advance.token is None:
            return Piece("", read)  # a part of a long prompt
        reason = ending = None
        text = "" if advance.token is None else self._decoder.put(advance.token)
        self._texts = [text]
        if advance.token is None:
            reason, ending = "stop", "the story ended"
        elif self.has_ended:
            reason, ending = "length", self._full
        text += self._decoder.end() if reason else ""
        text, self._skip = text[self._skip :], max(0, self._skip - len(text))
        text = self._stop.put(text) + (self._stop.end() if reason else "")
        if self._stop.found:
            reason, ending = "stop", "a stop sequence came"
        text, self._echo = self._echo + text, ""
        return Piece(text, read, int(advance.token is not None), reason, ending)

    def _read(self, routing: list[Routing]) -> list[dict[str, Any]]:
        """Return, for each token read, its text, each layer's experts, and all probabilities in 1/1000."""
        count = len(routing[0].experts) if routing else len(self._texts)
        texts, self._texts = self._texts[:count], self._texts[count:]
        experts = [layer.experts.tolist() for layer in routing]
        probs = [(layer.probs * 1000).round().int().tolist() for layer in routing]
        return [
            {"text": text, "experts": [e[place] for e in experts], "probs": [p[place] for p in probs]}
            for place, text in enumerate(texts)
        ]


class Engine:
    """One model on which the samples of all requests advance together, in a thread of the engine's own."""

    RUNNING = 16  # samples at a time
    WAITING = 16  # requests in the queue; more are refused

    def __init__(self, served: Served, decoder: Decoder) -> None:
        self.served = served
        self.is_stopping: Callable[[], bool] = lambda: False  # set by the server; ends running requests
        self.n_waiting, self.n_running = 0, 0
        self._slots, self._turn = asyncio.Semaphore(self.RUNNING), asyncio.Lock()
        # the batch is changed in the thread alone
        self.batch, self._thread = Batch(decoder), ThreadPoolExecutor(1, "model")
        self._joining: deque[Choice] = deque()
        self._work: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def slots(self, n_samples: int) -> AsyncIterator[Callable[[], None]]:
        """Wait for a slot for each sample, and hold them; the function that it yields gives one back early.

        Raises ApiError when too many requests wait.
        """
        if self.n_waiting >= self.WAITING:
            raise ApiError(503, f"{self.WAITING} requests wait already; try again later", code="overloaded")
        n_held = 0

        def give_back() -> None:
            nonlocal n_held
            n_held -= 1
            self._slots.release()

        try:
            self.n_waiting += 1
            try:
                async with self._turn:  # in turn: small requests do not overtake a large one for ever
                    for _ in range(n_samples):
                        await self._slots.acquire()
                        n_held += 1
            finally:
                self.n_waiting -= 1
            self.n_running += 1
            try:
                yield give_back
            finally:
                self.n_running -= 1
        finally:
            while n_held:
                give_back()

    async def run(
        self, request: CompletionRequest, give_back: Callable[[], None]
    ) -> AsyncGenerator[tuple[int, Piece]]:
        """Yield (choice, piece) as the request's samples advance, until all have ended, inside `slots`.

        At the end of each sample its slot is given back.
        """
        pieces: asyncio.Queue[tuple[Choice, Piece | Exception]] = asyncio.Queue()
        numbers = range(request.n_samples)
        # in a thread: to decode eight long prompts takes half a second
        choices = await asyncio.to_thread(lambda: [Choice(self.served, request, n, pieces) for n in numbers])
        self._joining.extend(choices)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._advance())
        try:
            n_live = len(choices)
            while n_live:
                choice, piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece.finish_reason:
                    n_live -= 1
                    give_back()
                yield choice.number, piece
        finally:
            # also reached when the client disconnects; the next step frees the memory
            for choice in choices:
                choice.is_wanted = False

    async def _advance(self) -> None:
        """Advance the batch as long as there is one, and hand out what comes."""
        loop = asyncio.get_running_loop()
        while self._joining or self.batch.members:
            for choice, piece in await loop.run_in_executor(self._thread, self._step):
                choice.pieces.put_nowait((choice, piece))

    def _step(self) -> list[tuple[Choice, Piece | Exception]]:
        """Let members leave and join, and advance all. An error is all members', but for a lack of memory."""
        members: list[Any] = [*self.batch.members]
        refused: list[tuple[Choice, Piece | Exception]] = []
        try:
            for choice in [choice for choice in members if not choice.is_wanted]:
                self.batch.leave(choice)
            if self.is_stopping():
                raise ApiError(503, "the server is stopping", code="stopping")
            while self._joining:
                members.append(self._joining.popleft())
                if members[-1].is_wanted and (error := self._no_memory_for(members[-1])):
                    refused.append((members.pop(), error))
            advances: Any = self._advances(refused)
            return refused + [(advance.member, self._piece_of(advance)) for advance in advances]
        except BaseException as error:  # noqa: BLE001  the requests raise it
            while self._joining:  # one at a time: meanwhile `run` may add others
                members.append(self._joining.popleft())
            for choice in members:
                # a GPU that failed may fail again
                with suppress(RuntimeError):
                    self.batch.leave(choice)
            return refused + [(choice, as_api_error(error)) for choice in members]

    def _advances(self, refused: list[tuple[Choice, Piece | Exception]]) -> list[Advance]:
        """Advance all; where the memory does not suffice, the newest leave and the others go on."""
        while True:
            try:
                return self.batch.step()
            except (RuntimeError, MemoryError) as error:
                if len(self.batch.members) < 2 or not is_out_of_memory(error):
                    raise
                newest: Any = self.batch.members[-1]
                self.batch.leave(newest)
                refused.append((newest, as_api_error(error)))

    def _no_memory_for(self, choice: Choice) -> Exception | None:
        """Let a sample join; return the error if there is no memory for it, and the others go on."""
        try:
            self.batch.join(choice)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return as_api_error(error)
        return None

    def _piece_of(self, advance: Advance) -> Piece | Exception:
        choice: Any = advance.member
        try:
            piece = as_api_error(advance.error) if advance.error else choice.put(advance)
        # of the tokenizer perhaps, on this text alone; a panic of its library is no Exception
        except BaseException as error:  # noqa: BLE001
            piece = as_api_error(error)
        if isinstance(piece, Exception) or piece.finish_reason:
            self.batch.leave(choice)
        return piece


def as_api_error(error: BaseException) -> Exception:
    """Return an ApiError for what a client may know, and other errors as they are."""
    is_known = isinstance(error, Diverged) or is_out_of_memory(error)
    if is_known:
        return ApiError(500, first_line(error))
    return error if isinstance(error, Exception) else RuntimeError(first_line(error))
