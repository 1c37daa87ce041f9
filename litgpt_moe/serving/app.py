"""The web application: the page, OpenAI's /v1/models and completions, and the server that runs it.

The parameters beyond OpenAI's are top_k, min_p, repetition_penalty, and `"routing": true`, with which each
choice lists the tokens that the model has read: `[{"text", "experts": by layer, "probs": by layer, in
1/1000}]`.
"""

import asyncio
import errno
import ipaddress
import socket
import time
from collections.abc import Callable
from contextlib import suppress
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
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from litgpt_moe.balance import layers_of
from litgpt_moe.cli import note
from litgpt_moe.generation.settings import GenerateSettings, Sampling
from litgpt_moe.generation.text import encode_prompt, load
from litgpt_moe.serving.chat import read_chat_request
from litgpt_moe.serving.connections import Connection
from litgpt_moe.serving.engine import Engine
from litgpt_moe.serving.requests import UNKNOWN, ApiError, Served, error_response, read_body, read_request
from litgpt_moe.serving.responses import ChatResponse, CompletionResponse

PAGE = Path(__file__).with_name("playground.html")
# only the page's inline script and style and requests to this server are allowed
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


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
    """Return the web application: the page, /v1/models and the two kinds of completions."""
    page = HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": PAGE_POLICY})
    entry = describe_model(engine.served)
    models = JSONResponse({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) != engine.served.name:
            raise ApiError(404, f"no model {name!r:.80} is here", "model", "model_not_found")
        return JSONResponse(entry)

    def completions(read: Callable[..., Any], kind: type[CompletionResponse]) -> Callable[..., Any]:
        async def respond(request: Request) -> Response:
            body = await read_body(request)
            # in a thread: tokenizing the largest prompt takes up to a second
            return kind(engine, await asyncio.to_thread(read, body, engine.served))

        return respond

    routes = [
        Route("/", page, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", completions(read_request, CompletionResponse), methods=["POST"]),
        Route("/v1/chat/completions", completions(read_chat_request, ChatResponse), methods=["POST"]),
    ]
    handlers = dict.fromkeys((ApiError, HTTPException, ClientDisconnect, Exception), refuse)
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=own_hosts(host), www_redirect=False)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


async def refuse(_: Request, error: Exception) -> Response:
    """Return the answer to a request that raised `error`."""
    if isinstance(error, HTTPException):
        has = "this server has /, /v1/models, /v1/completions and /v1/chat/completions"
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
