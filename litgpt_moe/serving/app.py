"""The web application: the page, OpenAI's /v1/models and /v1/completions, and the server that runs it.

The parameters beyond OpenAI's are top_k, min_p, repetition_penalty, and `"routing": true`, with which each
choice lists the tokens that the model has read: `[{"text", "experts": by layer, "probs": by layer, in
1/1000}]`.
"""

import asyncio
import errno
import ipaddress
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from litgpt_moe.balance import layers_of
from litgpt_moe.cli import note
from litgpt_moe.generation.settings import GenerateSettings, Sampling
from litgpt_moe.generation.text import encode_prompt, load
from litgpt_moe.serving.connections import Connection
from litgpt_moe.serving.engine import Engine, Piece
from litgpt_moe.serving.requests import (
    UNKNOWN,
    ApiError,
    CompletionRequest,
    Served,
    error_response,
    read_body,
    read_request,
)

PAGE = Path(__file__).with_name("playground.html")
# only the page's inline script and style and requests to this server are allowed
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class CompletionResponse(StreamingResponse):
    """The response to a request: server-sent events, or one JSON object.

    `StreamingResponse` cancels the work, which frees its slot, when the client disconnects.
    """

    def __init__(self, engine: Engine, request: CompletionRequest) -> None:
        super().__init__((), headers={"cache-control": "no-store"}, media_type="text/event-stream")
        self._engine, self._request = engine, request
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
        self._head |= {"created": int(time.time()), "model": engine.served.name, "seed": request.body.seed}

    async def stream_response(self, send: Send) -> None:
        """Generate in a slot of the engine, and send the result."""
        try:
            slots = self._engine.slots(self._request.n_samples)
            async with slots, aclosing(self._engine.run(self._request)) as pieces:
                if self._request.body.stream:
                    self.body_iterator = self._events(pieces)
                    await super().stream_response(send)
                    return
                answer = JSONResponse(await self._collect(pieces))
        except ApiError as error:
            answer = error_response(error)
        await send(
            {"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers}
        )
        await send({"type": "http.response.body", "body": answer.body})

    async def _events(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
        n_new = 0
        try:
            async for number, piece in pieces:
                n_new += piece.n_new
                if piece.text or piece.read or piece.finish_reason:
                    yield event({**self._head, "choices": [self._choice(number, piece)]})
            if self._request.body.stream_options.include_usage:
                yield event({**self._head, "choices": [], "usage": self._usage(n_new)})
        except ApiError as error:  # the status 200 is sent already
            yield event(error.body)
        except Exception:
            yield event(UNKNOWN.body)
            raise
        yield "data: [DONE]\n\n"

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
        choice |= {"ending": piece.ending} if piece.ending else {}
        return choice | ({"routing": piece.read} if self._request.body.routing else {})

    def _usage(self, n_new: int) -> dict[str, int]:
        n_prompt = sum(map(len, self._request.prompts))
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event of JSON."""
    return f"data: {json.dumps(content)}\n\n"


def describe_model(served: Served) -> dict[str, Any]:
    """Return the entry of /v1/models: OpenAI's keys, and the defaults and sizes that the page shows."""
    layers = list(layers_of(served.model))
    config, settings, context = served.model.config, served.settings, served.model.max_seq_length
    routing = {name: getattr(config, name) for name in ("n_expert", "n_expert_per_token")}
    routing |= {"layers": layers, "scores": "sigmoid" if config.n_expert_groups else "softmax"}
    defaults = {name: getattr(settings, name) for name in ("prompt", "num_samples", "seed")}
    defaults |= {"max_tokens": min(settings.max_tokens, context), **asdict(served.sampling)}
    entry = {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": "litgpt-moe"}
    entry |= {"max_model_len": context, "defaults": defaults, "folder": str(settings.ckpt_dir)}
    return entry | {"routing": routing if layers else None}


def own_hosts(host: str) -> list[str]:
    """Return the host names and addresses that requests may name, as patterns for starlette.

    Other names are refused because a foreign page can let its own name point to this machine and then read
    the responses (DNS rebinding). Every IPv4 address is accepted: addresses cannot be rebound, and behind NAT
    the machine does not know all of its own. No name ends in a number (WHATWG URL, section 3.5).
    """
    addresses = [a.address.partition("%")[0] for nic in psutil.net_if_addrs().values() for a in nic]
    six = [f"[{address}]" for address in (*addresses, "::1") if address.count(":") > 1]
    names = ["localhost", socket.gethostname(), f"[{host}]" if ":" in host else host]
    return [*names, *six, *(f"*.{number}" for number in range(256))]


def make_app(engine: Engine, host: str) -> Starlette:
    """Return the web application: the page, /v1/models and /v1/completions."""
    page = HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": PAGE_POLICY})
    entry = describe_model(engine.served)
    models = JSONResponse({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) != engine.served.name:
            raise ApiError(404, f"no model {name!r:.80} is here", "model", "model_not_found")
        return JSONResponse(entry)

    async def completions(request: Request) -> Response:
        body = await read_body(request)
        # in a thread: tokenizing the largest prompt takes up to a second
        return CompletionResponse(engine, await asyncio.to_thread(read_request, body, engine.served))

    routes = [
        Route("/", page, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
    handlers = dict.fromkeys((ApiError, HTTPException, ClientDisconnect, Exception), refuse)
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=own_hosts(host), www_redirect=False)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


async def refuse(_: Request, error: Exception) -> Response:
    """Return the answer to a request that raised `error`."""
    if isinstance(error, HTTPException):
        has = "this server has /, /v1/models and /v1/completions"
        response = error_response(ApiError(error.status_code, f"{error.detail}: {has}"))
        response.headers.update(error.headers or {})  # 405 names the methods that are allowed
        return response
    return error_response(error if isinstance(error, ApiError) else UNKNOWN)


def make_server(engine: Engine, host: str) -> uvicorn.Server:
    """Return the server; when it stops, it ends the requests that its engine is working on."""
    options: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_level": "error", "access_log": False}
    options |= {"proxy_headers": False, "server_header": False}
    options |= {"http": Connection, "timeout_graceful_shutdown": 3}
    server = uvicorn.Server(uvicorn.Config(make_app(engine, host), **options))
    engine.is_stopping = lambda: server.should_exit  # a story in progress would delay the shutdown
    return server


def open_port(host: str, port: int) -> socket.socket:
    """Return a listening socket. OSError says in one sentence why the port cannot be opened."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
        raise OSError(f"port {port} on {host} {reason}; choose another by --port or --host") from None


def serve(settings: GenerateSettings, sampling: Sampling, prompt: str) -> None:
    """Serve the checkpoint until Ctrl-C; ValueError or OSError if it cannot be served."""
    with open_port(settings.host, settings.port) as listener:
        model, tokenizer, decoder = load(settings)
        encode_prompt(model, tokenizer, prompt, settings.max_tokens)  # raises if the prompt is too long
        served = Served(model, tokenizer, replace(settings, prompt=prompt, prompt_file=None), sampling)
        server = make_server(Engine(served, decoder), settings.host)
        address, port, *_ = listener.getsockname()
        where = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{port}"
        note(f"playground {where}\nOpenAI API {where}/v1, model {served.name}")
        if not ipaddress.ip_address(address).is_loopback:
            name = f"its address or {socket.gethostname()}"
            note(f"anyone who can reach this machine, by {name}, can use the server: there is no password")
        note("Ctrl-C stops it")
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has stopped
            server.run(sockets=[listener])
