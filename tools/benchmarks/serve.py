"""Load-test generate.py --serve: 1, 4 and 16 clients at once, each with one request after another.

Run: uv run python tools/benchmarks/serve.py --ckpt_dir checkpoints/final      (2 min on 2 CPU cores)

The server is a process of its own. Every client streams, from prompts of different lengths.
It prints tokens/s over all clients and the time to a request's first token: median and worst. "Joining" is
that time for a request that comes while the clients before it are at work.
"""

import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_moe.cli import WorkFailed, run_command, run_script
from litgpt_moe.files import write_json
from tools.benchmarks.machine import ROOT, machine, parse, recorded

CLIENTS = (1, 4, 16)
BEGINNINGS = ("Once upon a time", "One day, a little dog named Max", "The sun was warm. " * 6, "Lily said:")


@dataclass(frozen=True)
class ServeBenchmark:
    """What is served, and how long the clients ask."""

    ckpt_dir: Path = Path("checkpoints")
    """Checkpoint directory, or an out_dir."""
    max_tokens: int = 64
    """New tokens of a request."""
    seconds: int = 20
    """Seconds for each number of clients."""
    engine: str = "auto"
    """Engine of generate.py."""
    out: Path | None = None
    """JSON file for the figures (default: none is written)."""


@dataclass
class Answer:
    """What a client saw of one request."""

    n_tokens: int
    first_s: float
    was_joining: bool


def ask(port: int, number: int, max_tokens: int, was_joining: bool) -> Answer:
    """Send one streaming request and read it to its end; an end-of-story token is not waited for."""
    body = {"prompt": BEGINNINGS[number % len(BEGINNINGS)], "max_tokens": max_tokens, "seed": number}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    started, first_s, n_tokens = time.perf_counter(), 0.0, 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise WorkFailed(f"the server answered {response.status}: {response.read()[:200]!r}")
    for line in response:
        if line.startswith(b"data: {"):
            first_s = first_s or time.perf_counter() - started
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise WorkFailed(f"the server says {chunk['error']['message']}")
            n_tokens = (chunk.get("usage") or {}).get("completion_tokens", n_tokens)
    connection.close()
    return Answer(n_tokens, first_s, was_joining)


def measure(port: int, n_clients: int, settings: ServeBenchmark) -> dict[str, float]:
    """Return the figures of `n_clients` that ask for some seconds."""
    answers: list[Answer] = []
    end, begun = time.perf_counter() + settings.seconds, threading.Barrier(n_clients)

    def client(index: int) -> None:
        begun.wait()
        for turn in range(10**6):
            if time.perf_counter() > end:
                return
            answers.append(ask(port, index + n_clients * turn, settings.max_tokens, turn > 0))

    started = time.perf_counter()
    with ThreadPoolExecutor(n_clients) as clients:
        list(clients.map(client, range(n_clients)))
    seconds = time.perf_counter() - started
    joining = [a.first_s for a in answers if a.was_joining] or [a.first_s for a in answers]
    return {
        "tokens_per_s": sum(a.n_tokens for a in answers) / seconds,
        "requests": len(answers),
        "joining_median_s": statistics.median(joining),
        "joining_worst_s": max(joining),
    }


def run(settings: ServeBenchmark) -> None:
    """Start the server, print a line for each number of clients, and write the JSON if it has a name."""
    words = [sys.executable, ROOT / "generate.py", "--serve", "--port=0", f"--ckpt_dir={settings.ckpt_dir}"]
    command = [str(word) for word in [*words, f"--engine={settings.engine}"]]
    report: dict[str, Any] = {"settings": recorded(settings), "machine": machine(), "clients": {}}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            told = ""
            while (line := server.stderr.readline()) and "Ctrl-C" not in line:
                told += line
            if not (found := re.search(r"playground http://[^:]+:(\d+)", told)):
                raise WorkFailed(f"the server does not start: {told.strip()}")
            ask(port := int(found[1]), 0, 8, was_joining=False)  # warms up
            for n_clients in CLIENTS:
                figures = report["clients"][n_clients] = measure(port, n_clients, settings)
                median, worst = 1000 * figures["joining_median_s"], 1000 * figures["joining_worst_s"]
                first = f"{median:.0f} ms (worst {worst:.0f})"
                print(
                    f"{n_clients:3} clients {figures['tokens_per_s']:8.1f} tokens/s, first after {first}",
                    flush=True,
                )
        finally:
            server.terminate()
    if settings.out:
        write_json(settings.out, report)


def main(argv: list[str] | None = None) -> int:
    """Return 0, 1 when the server fails, 2 for bad settings."""
    settings = parse(__doc__, ServeBenchmark, argv)
    return run_command(lambda: run(settings))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
