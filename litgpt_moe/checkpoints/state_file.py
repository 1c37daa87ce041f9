"""Writing lit_model.pth, its size and SHA-256 computed on the way, and comparing files with their record."""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from litgpt_moe.checkpoints.state import tensors_of
from litgpt_moe.files import sha256_file

_digests: dict[tuple[Path, int, int], str] = {}  # a command verifies the same checkpoint more than once


class HashingFile:
    """A binary file that computes the SHA-256 and counts the bytes written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.flush = file, file.flush
        self.sha256, self.n_bytes = hashlib.sha256(), 0
        self.before: dict[int, Any] = {}  # position of each write -> digest of what lies before it
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write `data`; keep an OSError in `error`, since torch.save turns it into "unexpected pos"."""
        self.before[self.n_bytes] = self.sha256.copy()
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
    entry = {"bytes": file.n_bytes, "sha256": file.sha256.hexdigest()}
    return entry | _weights_entry(state, path, file)


def _weights_entry(state: dict[str, Any], path: Path, file: HashingFile) -> dict[str, Any]:
    """Return {"weights": SHA-256 of the first `head` and last `tail` bytes}; {} if they lie elsewhere.

    torch.save writes the list of all tensors, then their values in that order, then the archive's directory.
    Where the model comes first, who wants the weights need not read the optimizer's state, twice as large.
    """
    if next(iter(state)) != "model":
        return {}
    n_storages = len({tensor.untyped_storage()._cdata for _, tensor in tensors_of(state["model"])})
    with zipfile.ZipFile(path) as archive:
        starts = {entry.filename: entry.header_offset for entry in archive.infolist()}
        tail = file.n_bytes - archive.start_dir
    end = starts.get(f"archive/data/{n_storages}")
    if not n_storages or end not in file.before:
        return {}
    sha256 = file.before[end]
    with path.open("rb") as written:
        written.seek(-tail, os.SEEK_END)
        sha256.update(written.read())
    return {"weights": {"head": end, "tail": tail, "sha256": sha256.hexdigest()}}


def is_as_recorded(path: Path, entry: dict[str, Any], weights_only: bool) -> bool:
    """Return whether a file has the content in its record, or only the part of it that the weights need."""
    weights = entry.get("weights")
    if weights_only and weights and _digests.get(_stamp(path)) != entry["sha256"]:
        return sha256_of_weights(path, weights["head"], weights["tail"]) == weights["sha256"]
    return sha256_of(path) == entry["sha256"]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, computed once as long as its size and time stay the same."""
    if (stamp := _stamp(path)) not in _digests:
        _digests[stamp] = sha256_file(path)
    return _digests[stamp]


def _stamp(path: Path) -> tuple[Path, int, int]:
    stat = path.stat()
    return path, stat.st_size, stat.st_mtime_ns


def sha256_of_weights(path: Path, head: int, tail: int) -> str:
    """Return the SHA-256 of the first `head` and the last `tail` bytes of a file."""
    # large parts: other threads may compute in Python, and keep this one waiting before each
    sha256, part = hashlib.sha256(), memoryview(bytearray(1 << 24))
    with path.open("rb", buffering=0) as file:
        while head and (n := file.readinto(part[: min(head, len(part))])):
            sha256.update(part[:n])
            head -= n
        file.seek(-tail, os.SEEK_END)
        sha256.update(file.read(tail))
    return sha256.hexdigest()
