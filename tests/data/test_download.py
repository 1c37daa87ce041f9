"""Data sets and tokenizers fetched from a hub, here a small one on 127.0.0.1."""

import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.data import make_text, stories_of

from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.tokenizer import TOKENIZER_REPO


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs: HEAD and GET of a file, with ranges."""

    files: dict[str, bytes] = {}  # noqa: RUF012 (set by the fixture)
    ranges: list[str] = []  # noqa: RUF012
    to_break: list[str] = []  # noqa: RUF012 (paths whose first download ends half way)

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def answer(self, send_body: bool) -> None:
        body = self.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        start = 0
        if send_body and (header := self.headers.get("Range")):
            self.ranges.append(header)
            start = int(re.match(r"bytes=(\d+)-", header)[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{len(body)}-{hash(body) & 0xFFFFFF:x}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if send_body and self.path in self.to_break:
            self.to_break.remove(self.path)
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif send_body:
            self.wfile.write(body[start:])

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(settings: PrepareSettings) -> Iterator[tuple[str, type[Hub]]]:
    """A hub on this machine with TinyStories of ours and a tokenizer."""
    data = "/datasets/roneneldan/TinyStories/resolve/main"
    handler = type("Hub", (Hub,), {"ranges": [], "to_break": [f"{data}/TinyStories-train.txt"]})
    handler.files = {
        # 25 MB, since an interrupted download goes on from its last whole 10 MB
        f"{data}/TinyStories-train.txt": (settings.data_dir / "train" / "a.txt").read_bytes() * 660,
        f"{data}/TinyStories-valid.txt": (settings.data_dir / "val" / "b.txt").read_bytes(),
    }
    for path in settings.tokenizer_dir.iterdir():
        handler.files[f"/{TOKENIZER_REPO}/resolve/main/{path.name}"] = path.read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_tinystories_and_its_tokenizer_come_from_the_hub_and_downloads_resume(
    hub: tuple, tmp_path: Path, run_script: object, tiny_tokenizer_dir: Path
) -> None:
    endpoint, handler = hub
    arguments = ("--dataset", "tinystories", "--data_dir", tmp_path / "d", "--tokenizer_dir", tmp_path / "t")
    environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    train = handler.files["/datasets/roneneldan/TinyStories/resolve/main/TinyStories-train.txt"]
    done = run_script("prepare_data.py", *arguments, env=environment)
    if done.returncode:  # whether one run tries again by itself is huggingface_hub's to decide
        assert done.returncode == 1 and "run again to go on" in done.stderr
        done = run_script("prepare_data.py", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    assert handler.ranges == [f"bytes={10 << 20}-"]
    assert (tmp_path / "d/train/TinyStories-train.txt").read_bytes() == train
    assert (tmp_path / "t/tokenizer.json").read_bytes() == (
        tiny_tokenizer_dir / "tokenizer.json"
    ).read_bytes()
    assert stories_of(tmp_path / "d", tmp_path / "t", "train") == make_text(200)
    assert not list((tmp_path / "d").rglob(".download"))
    again = run_script("prepare_data.py", *arguments, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert again.returncode == 0 and "nothing to do" in again.stderr


@pytest.mark.parametrize(
    "environment",
    [{}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}],
    ids=["offline", "refused"],
)
def test_without_the_hub_both_ways_on_are_named(
    settings: PrepareSettings, run_script: object, tmp_path: Path, environment: dict[str, str]
) -> None:
    arguments = ("--data_dir", settings.data_dir, "--tokenizer_dir", tmp_path / "none")
    done = run_script("prepare_data.py", *arguments, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "--tokenizer_dir" in line and "--train_tokenizer" in line
    assert ("(no connection to it)" in line) == bool(environment)  # not what the hub's client makes of it
    assert not (tmp_path / "none").exists()


def test_a_download_that_failed_leaves_no_empty_folder(run_script: object, tmp_path: Path) -> None:
    arguments = ("--dataset", "tinystories", "--data_dir", tmp_path / "new")
    assert run_script("prepare_data.py", *arguments).returncode == 1
    assert not (tmp_path / "new").exists()
