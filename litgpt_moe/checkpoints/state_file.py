"""Writing lit_model.pth, whose size and SHA-256 are computed on the way."""

import hashlib
import os
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch


class HashingFile:
    """A binary file that computes the SHA-256 and counts the bytes written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.flush = file, file.flush
        self.sha256, self.n_bytes = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write `data`; keep an OSError in `error`, since torch.save turns it into "unexpected pos"."""
        self.sha256.update(data)
        self.n_bytes += memoryview(data).nbytes
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def write_state(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write `state` to `path`, flushed to the disk; return its entry for checkpoint.json."""
    with path.open("wb") as raw:
        file = HashingFile(raw)
        try:
            # torch.save calls only write and flush
            torch.save(state, cast(IO[bytes], file))
        except RuntimeError as error:
            raise file.error or error from None
        raw.flush()
        os.fsync(raw.fileno())
    return {"bytes": file.n_bytes, "sha256": file.sha256.hexdigest()}
