"""The responses to requests, one JSON object or server-sent events, in the two forms of OpenAI's APIs."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Send

from litgpt_moe.serving.engine import Engine, Piece
from litgpt_moe.serving.requests import UNKNOWN, ApiError, CompletionRequest, error_response

MAX_UNREAD_BYTES = 1 << 24  # of a stream; with the largest routing it has about 9 MB
TOO_SLOW = ApiError(500, f"over {MAX_UNREAD_BYTES:,} bytes of the stream wait to be read; read faster")
DONE = "data: [DONE]\n\n"


class Unread:
    """The events of a stream that its client has still to read.

    Reading slowly makes this longer, and holds up neither the texts nor other requests.
    """

    def __init__(self) -> None:
        self._events: asyncio.Queue[str | None] = asyncio.Queue()
        self.n_bytes = 0

    def put(self, event: str | None) -> None:
        """Add an event, or None at the end of the stream."""
        self._events.put_nowait(event)
        self.n_bytes += len(event or "")

    async def __aiter__(self) -> AsyncGenerator[str]:
        """Yield the events up to the end of the stream."""
        while (event := await self._events.get()) is not None:
            self.n_bytes -= len(event)
            yield event


class CompletionResponse(StreamingResponse):
    """The response to a request to /v1/completions.

    `StreamingResponse` cancels the work, which frees its slot, when the client disconnects.
    """

    ID, WHOLE, PART = "cmpl", "text_completion", "text_completion"

    def __init__(self, engine: Engine, request: CompletionRequest) -> None:
        super().__init__((), headers={"cache-control": "no-store"}, media_type="text/event-stream")
        self._engine, self._request = engine, request
        kind = self.PART if request.body.stream else self.WHOLE
        self._head = {"id": f"{self.ID}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
        self._head |= {"model": engine.served.name, "seed": request.body.seed}

    async def stream_response(self, send: Send) -> None:
        """Send the result, a stream while it is generated."""
        unread = Unread()
        work = asyncio.create_task(self._generate(unread))
        try:
            self.body_iterator = aiter(unread)
            # the first event, which is empty, says that there is a slot: the status is 200
            if await anext(self.body_iterator, None) is not None:
                await super().stream_response(send)
            answer = await work
        finally:
            work.cancel()  # which frees its slots
        if answer:
            start = {"status": answer.status_code, "headers": answer.raw_headers}
            await send({"type": "http.response.start", **start})
            await send({"type": "http.response.body", "body": answer.body})

    async def _generate(self, unread: Unread) -> JSONResponse | None:
        """Generate in slots of the engine: put a stream's events into `unread`, or return the answer."""
        try:
            slots = self._engine.slots(self._request.n_samples)
            async with slots as give_back, aclosing(self._engine.run(self._request, give_back)) as pieces:
                if not self._request.body.stream:
                    return JSONResponse(await self._collect(pieces))
                unread.put("")
                async for part in self._events(pieces):
                    unread.put(part)
                    if unread.n_bytes > MAX_UNREAD_BYTES:
                        unread.put(event(TOO_SLOW.body) + DONE)
                        break
        except ApiError as error:
            return error_response(error)
        finally:
            unread.put(None)
        return None

    async def _events(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
        n_new = 0
        try:
            async for number, piece in pieces:
                n_new += piece.n_new
                if piece.text or piece.read or piece.finish_reason:
                    for choice in self._parts(number, piece):
                        yield event({**self._head, "choices": [choice]})
            if self._request.body.stream_options.include_usage:
                yield event({**self._head, "choices": [], "usage": self._usage(n_new)})
        except ApiError as error:  # the status 200 is sent already
            yield event(error.body)
        except Exception:
            yield event(UNKNOWN.body)
            raise
        yield DONE

    async def _collect(self, pieces: AsyncIterator[tuple[int, Piece]]) -> dict[str, Any]:
        n_new, wholes = 0, {}
        async for number, piece in pieces:
            n_new += piece.n_new
            whole = wholes.setdefault(number, Piece("", []))
            whole.text += piece.text
            whole.read += piece.read
            whole.finish_reason, whole.ending = piece.finish_reason, piece.ending
        choices = [self._whole(number, wholes[number]) for number in sorted(wholes)]
        return {**self._head, "choices": choices, "usage": self._usage(n_new)}

    def _whole(self, number: int, piece: Piece) -> dict[str, Any]:
        choice = _choice(number, {"text": piece.text}, piece)
        return choice | ({"routing": piece.read} if self._request.body.routing else {})

    def _parts(self, number: int, piece: Piece) -> list[dict[str, Any]]:
        """Return the choices of the events that a piece becomes."""
        return [self._whole(number, piece)]

    def _usage(self, n_new: int) -> dict[str, int]:
        n_prompt = sum(map(len, self._request.prompts))
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


class ChatResponse(CompletionResponse):
    """The response to a request to /v1/chat/completions."""

    ID, WHOLE, PART = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, engine: Engine, request: CompletionRequest) -> None:
        super().__init__(engine, request)
        self._begun: set[int] = set()

    def _whole(self, number: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return _choice(number, {"message": message}, piece)

    def _parts(self, number: int, piece: Piece) -> list[dict[str, Any]]:
        deltas = [] if number in self._begun else [{"role": "assistant", "content": ""}]
        self._begun.add(number)
        deltas += [{"content": piece.text}] if piece.text else []
        parts = [_choice(number, {"delta": delta}, Piece("", [])) for delta in deltas]
        # as from OpenAI the reason comes without text: there are clients that stop reading there
        return parts + ([_choice(number, {"delta": {}}, piece)] if piece.finish_reason else [])


def _choice(number: int, content: dict[str, Any], piece: Piece) -> dict[str, Any]:
    choice = {"index": number, **content, "logprobs": None, "finish_reason": piece.finish_reason}
    return choice | ({"ending": piece.ending} if piece.ending else {})


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event of JSON."""
    return f"data: {json.dumps(content)}\n\n"
