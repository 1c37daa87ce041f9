"""A file of the Hugging Face hub read where it lies, by ranges: what is not asked for is not fetched."""

import io
import time
from typing import Any, BinaryIO

from litgpt_moe.cli import first_line
from litgpt_moe.data.forms import OnHub

LOG_IN = "check the name; to one that is private or gated log in with: uv run hf auth login"
GO_ON = "run again to go on where it stopped, or set HF_ENDPOINT to a mirror"
RANGE_BYTES = 4 << 20  # fetched at once
PAUSES_S = (0, 1, 2, 4, 8)  # before each try of a request
MAY_CHANGE = (206, 429, 500, 502, 503, 504)  # answers after which a later try may succeed


class RangeFile(io.RawIOBase):
    """A file of the hub opened for reading at any place; each read is a request."""

    def __init__(self, file: OnHub) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place and return it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` and return the number of bytes, 0 at the end."""
        stop = min(self._at + len(buffer), self._file.size)
        if stop <= self._at:
            return 0
        data = fetch(self._file, self._at, stop)
        buffer[: len(data)] = data
        self._at = stop
        return len(data)


def open_on_hub(file: OnHub) -> BinaryIO:
    """Return the file opened for reading at any place."""
    return io.BufferedReader(RangeFile(file), RANGE_BYTES)  # type: ignore[arg-type]


def fetch(file: OnHub, start: int, stop: int) -> bytes:
    """Return the bytes from `start` up to `stop`; ConnectionError with the way out if the hub does not."""
    import httpx  # not at the top: each worker process, which fetches nothing, would need 15 MB more
    from huggingface_hub import constants, get_session, get_token, hf_hub_url  # likewise

    url = hf_hub_url(file.repo, file.path, repo_type="dataset", revision=file.revision)
    # "identity": the range is one of the file, not of what a server packs for the way
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    headers |= {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    options: dict[str, Any] = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    reason, way_out = "", GO_ON
    for pause_s in PAUSES_S:
        time.sleep(pause_s)
        try:
            with get_session().stream("GET", url, **options) as answer:
                data = answer.read() if answer.status_code == 206 else b""  # else it may be the whole file
        except (httpx.HTTPError, OSError, RuntimeError) as error:  # no connection, or one that broke off
            reason = first_line(error)
            continue
        if len(data) == stop - start:
            return data
        reason = f"status {answer.status_code}, {len(data):,} bytes for {stop - start:,}"
        way_out = LOG_IN if answer.status_code in (401, 403) else way_out
        if answer.status_code not in MAY_CHANGE:
            break
    what = f"{file.path} of {file.repo} could not be read from {constants.ENDPOINT} ({reason})"
    raise ConnectionError(f"{what}; {way_out}")
