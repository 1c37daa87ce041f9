"""Minimal pairs: a sentence and one like it that breaks a rule of grammar, from BLiMP's files.

BLiMP (Warstadt et al. 2020, arxiv.org/abs/1912.00582) has 67 paradigms of 1,000 pairs. Each row of a file has
`sentence_good` and `sentence_bad`; `UID` names the paradigm (else the file does), `linguistics_term` the
phenomenon and `field` the field of linguistics. Other sets of that form are read as well.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt_moe.data.hub_dataset import fetch_subsets
from litgpt_moe.quality.settings import HUB

REPO, HUB_FOLDER = "nyu-mll/blimp", Path("data/blimp")
MAX_FILE_BYTES = 64 << 20  # BLiMP's largest has 0.6 MB
MAX_FILES = 1_000
WAY_OUT = "name BLiMP's zip or a folder of its .jsonl files, or hub"
# 12 phenomena are in the paper (table 2), where the two paradigms of "s-selection" are argument structure;
# one file of the data writes the field "syntax/semantics"
RENAMED = {"s-selection": "argument_structure", "syntax/semantics": "syntax_semantics"}


@dataclass
class Paradigm:
    """The pairs about one rule."""

    name: str
    branch: str = "other"
    """The field of linguistics."""
    phenomenon: str = "other"
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """(good, bad)"""


def read_paradigms(place: Path) -> tuple[list[Paradigm], dict[str, Any]]:
    """Return the paradigms in a zip or folder, or of the hub, by name, and what identifies the files."""
    if place == HUB:
        paths = fetch_subsets(REPO, HUB_FOLDER)
        files = ((path.name, path.read_bytes()) for path in paths)
    elif place.is_dir():
        files = _files_of_folder(place)
    elif place.is_file():
        files = _files_of_zip(place)
    else:
        raise FileNotFoundError(f"{place}: no such file or folder of minimal pairs; {WAY_OUT}")
    found: dict[str, Paradigm] = {}
    digests = []
    for name, content in files:
        digests.append(hashlib.sha256(content).hexdigest())
        rows = _parquet_rows if name.endswith(".parquet") else _json_rows
        for where, row in rows(f"{place}: {name}", content):
            _add(found, Path(name).name.split(".")[0], where, row)
    if not found:
        raise ValueError(f"{place}: holds no minimal pairs; {WAY_OUT}")
    # of the sorted digests: the same files have the same one in a zip and in a folder
    sha256 = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
    return [found[name] for name in sorted(found)], {"path": str(place), "sha256": sha256}


def _files_of_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file of pairs in a folder, or in `data` in it, as the zip unpacks."""
    for pattern in ("*.jsonl", "data/*.jsonl", "*.parquet", "data/*.parquet"):
        # macOS leaves files such as ._adjunct_island.jsonl
        if paths := [path for path in sorted(folder.glob(pattern)) if not path.name.startswith(".")]:
            _check_sizes(folder, [path.stat().st_size for path in paths])
            yield from ((path.name, path.read_bytes()) for path in paths if path.is_file())
            return


def _files_of_zip(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each .jsonl file in a zip archive; nothing is unpacked to the disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".jsonl")]
            entries = [e for e in entries if not e.filename.rpartition("/")[2].startswith(".")]
            _check_sizes(path, [entry.file_size for entry in entries])
            for entry in entries:
                yield entry.filename, archive.read(entry)
    # RuntimeError: it asks for a password, or was packed by a method that Python does not know
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{path}: not a zip that can be read ({error}); {WAY_OUT}") from None


def _check_sizes(place: Path, sizes: list[int]) -> None:
    if len(sizes) > MAX_FILES or max(sizes, default=0) > MAX_FILE_BYTES:
        limits = f"{MAX_FILES:,} of up to {MAX_FILE_BYTES >> 20} MB are read"
        raise ValueError(f"{place}: {len(sizes):,} files, the largest of {max(sizes):,} bytes; {limits}")


def _json_rows(place: str, content: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            where = f"{place}:{number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"{where}: not JSON; replace the file") from None


def _parquet_rows(place: str, content: bytes) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet  # not at the top: 40 MB, which only pairs from the hub need

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{place}: not a Parquet file ({reason}); delete it and run again") from None
    for number, row in enumerate(rows, start=1):
        yield f"{place}: row {number}", row


def _add(found: dict[str, Paradigm], file_name: str, where: str, row: Any) -> None:
    """Add a row's pair to its paradigm."""
    texts = [row.get(key) if isinstance(row, dict) else None for key in ("sentence_good", "sentence_bad")]
    good, bad = (text.strip() if isinstance(text, str) else "" for text in texts)
    if not (good and bad):
        raise ValueError(f"{where}: no sentence_good and sentence_bad in it; {WAY_OUT}")
    name = _label(row.get("UID")) or file_name
    if name not in found:
        branch, phenomenon = (_label(row.get(key)) or "other" for key in ("field", "linguistics_term"))
        found[name] = Paradigm(name, branch, phenomenon)
    found[name].pairs.append((good, bad))


def _label(value: Any) -> str:
    label = value.strip()[:80] if isinstance(value, str) else ""
    return RENAMED.get(label, label)
