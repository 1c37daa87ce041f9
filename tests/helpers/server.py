"""A server of generate.py in a thread of the test's process, and OpenAI's client for it."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai

import generate
from litgpt_moe.generation.settings import DEFAULT_PROMPT
from litgpt_moe.generation.text import load
from litgpt_moe.serving.app import make_server, open_port
from litgpt_moe.serving.engine import Engine
from litgpt_moe.serving.requests import Served


@dataclass
class Running:
    """A server that runs."""

    engine: Engine
    port: int
    client: openai.OpenAI

    @property
    def name(self) -> str:
        """The model's name."""
        return self.engine.served.name


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Running]:
    """Serve a checkpoint on a free port; the client does not retry."""
    settings, sampling = generate.read_settings(["--serve", "--device=cpu", f"--ckpt_dir={folder}", *flags])
    settings = replace(settings, prompt=DEFAULT_PROMPT)
    with open_port(settings.host, 0) as listener:
        model, tokenizer, decoder = load(settings)
        engine = Engine(Served(model, tokenizer, settings, sampling), decoder)
        server = make_server(engine, settings.host)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield Running(engine, port, client)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(timeout=30)
        assert not thread.is_alive()


def start_server(folder: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """Start `generate.py --serve` as a user does; return the process and the address of its page."""
    command = [sys.executable, generate.__file__, "--serve", f"--ckpt_dir={folder}", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, **pipes)
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("playground "))
    return process, line.split()[1]


def complete(server: Running, prompt: Any = "Tom", routing: bool = False, **options: Any) -> Any:
    """Return the answer to a request by OpenAI's client."""
    extra = {"extra_body": {"routing": True}} if routing else {}
    return server.client.completions.create(model=server.name, prompt=prompt, **options, **extra)


def completion_request(close: bool = False, **body: Any) -> bytes:
    """Return the bytes of a whole request for a completion, after which the connection may `close`."""
    data = json.dumps({"prompt": "Tom", **body}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Connection: close\r\n" * close + b"Content-Length: %d\r\n\r\n" % len(data) + data


def read_all(connection: socket.socket) -> bytes:
    """Return what the server sends until it closes the connection, which may be a reset."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def post(
    server: Running, body: bytes | Iterator[bytes], path: str = "/v1/completions", **headers: str
) -> tuple[int, dict]:
    """Send a request as no well-behaved client would; return the status and the parsed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    names = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request("POST", path, body, names)
    response = connection.getresponse()
    return response.status, json.loads(response.read())
