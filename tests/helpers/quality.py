"""What the tests of evaluate.py's scores beside the loss share: minimal pairs, and a judge on 127.0.0.1."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import SENTENCES


def rows_of_pairs() -> dict[str, list[dict[str, str]]]:
    """Three paradigms of two phenomena, by the name of the file: the bad sentence has two words exchanged."""
    rows: dict[str, list[dict[str, str]]] = {}
    for name, term, first in (("orders", "order", 0), ("colours", "s-selection", 2), ("ends", "order", 5)):
        rows[name] = []
        for sentence in SENTENCES:
            words = sentence.split()
            words[first], words[first + 2] = words[first + 2], words[first]
            labels = {
                "field": "syntax/semantics",
                "linguistics_term": term,
                "UID": name,
            }
            rows[name].append({"sentence_good": sentence, "sentence_bad": " ".join(words), **labels})
    return rows


def write_pairs(folder: Path, rows: dict[str, list[dict[str, str]]] | None = None) -> Path:
    """Write each paradigm as a .jsonl file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in (rows or rows_of_pairs()).items():
        text = "".join(json.dumps(row) + "\n" for row in each)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


GOOD_ANSWER = 'Fine. {"grammar": 8, "creativity": 6, "consistency": 7, "plot": 5}'


@dataclass
class AskedJudge:
    """A server with one model, and what it was asked."""

    url: str = ""
    answer: Callable[[int], Any] = lambda number: GOOD_ANSWER
    """From the number of the request, from 0, to the text of the answer, or (status, headers, body)."""
    models: list[str] = field(default_factory=lambda: ["small-judge"])
    delay_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextlib.contextmanager
def judging(**changes: Any) -> Iterator[AskedJudge]:
    """Serve OpenAI's /v1/models and /v1/chat/completions on a free port."""
    asked = AskedJudge(**changes)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(200, {}, json.dumps({"data": [{"id": name} for name in asked.models]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.keys.append(self.headers.get("Authorization"))
            asked.bodies.append(body)
            time.sleep(asked.delay_s)
            answer = asked.answer(len(asked.bodies) - 1)
            if isinstance(answer, tuple):
                self.send(*answer)
            else:
                self.send(200, {}, json.dumps({"choices": [{"message": {"content": answer}}]}))

        def send(self, status: int, headers: dict[str, str], text: str) -> None:
            with contextlib.suppress(OSError):  # a client that did not wait
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
