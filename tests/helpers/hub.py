"""A small Hugging Face hub on 127.0.0.1, with as much of its interface as a download needs."""

import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

COMMIT = "0" * 40
LISTING = re.compile(r"/api/(models|datasets)/(.+)/revision/main")


class Hub(http.server.BaseHTTPRequestHandler):
    """HEAD and GET of a file, with ranges, and the list of a model's files."""

    files: dict[str, bytes] = {}  # noqa: RUF012 (set by the fixture)
    listed: list[str] = []  # noqa: RUF012 (paths in the list beside those in `files`)
    asked: list[str] = []  # noqa: RUF012 (what was fetched)
    card: dict[str, object] = {}  # noqa: RUF012 (what the answer on a repository says beside its files)
    ranges: list[str] = []  # noqa: RUF012
    to_break: list[str] = []  # noqa: RUF012 (paths whose first download ends half way)

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def answer(self, send_body: bool) -> None:
        path = self.path.replace(f"/resolve/{COMMIT}/", "/resolve/main/")
        body = self.listing(*match.groups()) if (match := LISTING.match(path)) else self.files.get(path)
        if body is None:
            self.send_response(404)
            repository = path.partition("/resolve/")[0]
            if any(name.startswith(f"{repository}/resolve/") for name in self.files):
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        if send_body:
            self.asked.append(path)
        if send_body and (header := self.headers.get("Range")):
            self.ranges.append(header)
            start = int(header.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{len(body)}-{hash(body) & 0xFFFFFF:x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if send_body and path in self.to_break:
            self.to_break.remove(path)
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif send_body:
            self.wfile.write(body[start:])

    def listing(self, kind: str, repository: str) -> bytes | None:
        """Return the answer on a model or a data set, None if there is none of that name."""
        prefix = f"/{'datasets/' if kind == 'datasets' else ''}{repository}/resolve/main/"
        names = [path.removeprefix(prefix) for path in [*self.files, *self.listed] if path.startswith(prefix)]
        siblings = [{"rfilename": name} for name in dict.fromkeys(names)]
        return (
            json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings, **self.card}).encode()
            if names
            else None
        )

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[tuple[str, type[Hub]]]:
    """Yield the address of a hub that has `files`, by path, and its handler, whose lists may be changed."""
    lists = {"card": {}, "listed": [], "asked": [], "ranges": [], "to_break": []}
    handler = type("FilledHub", (Hub,), {"files": dict(files), **lists})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
