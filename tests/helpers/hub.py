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
    gone: list[str] = []  # noqa: RUF012 (paths of `files` that are listed but not to be had)
    sent: list[tuple[str, int, int]] = []  # noqa: RUF012 (path, and the bytes from where to where)
    asked: list[str] = []  # noqa: RUF012 (what was fetched)
    token: str = ""  # of the user who may see anything, "" for all
    card: dict[str, object] = {}  # noqa: RUF012 (what the answer on a repository says beside its files)
    ranges: list[str] = []  # noqa: RUF012
    to_break: list[str] = []  # noqa: RUF012 (paths of which one answer ends half way)

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def answer(self, send_body: bool) -> None:
        path = self.path.replace(f"/resolve/{COMMIT}/", "/resolve/main/")
        body = self.listing(*match.groups()) if (match := LISTING.match(path)) else self.files.get(path)
        if self.token and self.headers.get("Authorization") != f"Bearer {self.token}":
            body = None
        if body is None or path in self.gone:
            self.send_response(404)
            repository = path.partition("/resolve/")[0]
            if any(name.startswith(f"{repository}/resolve/") for name in self.files):
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, stop, header = 0, len(body), self.headers.get("Range") if send_body else None
        if send_body:
            self.asked.append(path)
        if header:
            self.ranges.append(header)
            first, _, last = header.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or stop) + 1, stop)
        self.send_response(206 if header else 200)
        self.send_header("ETag", f'"{len(body)}-{hash(body) & 0xFFFFFF:x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(stop - start))
        if header:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
        self.end_headers()
        if send_body and path in self.to_break:
            self.to_break.remove(path)
            stop = start + (stop - start) // 2
            self.close_connection = True
        if send_body:
            self.sent.append((path, start, stop))
            self.wfile.write(body[start:stop])

    def listing(self, kind: str, repository: str) -> bytes | None:
        """Return the answer on a model or a data set, None if there is none of that name."""
        prefix = f"/{'datasets/' if kind == 'datasets' else ''}{repository}/resolve/main/"
        names = [path.removeprefix(prefix) for path in self.files if path.startswith(prefix)]
        siblings = [
            {"rfilename": name, "size": len(self.files[prefix + name]), "blobId": name} for name in names
        ]
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
    lists = {"card": {}, "gone": [], "sent": [], "asked": [], "ranges": [], "to_break": []}
    handler = type("FilledHub", (Hub,), {"files": dict(files), **lists})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
