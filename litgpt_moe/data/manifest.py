"""manifest.json, which says what made the shards of a data directory: its one reader, checks, fingerprint."""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from litgpt_moe.data.settings import SPLITS
from litgpt_moe.files import check_inside, fits, is_outside, read_json, sha256_file, write_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
RUN_AGAIN = "run prepare_data.py on that folder"

Manifest = dict[str, Any]  # parsed JSON
# what `files.fits` asks of it
SHARD_FORM = {"path": str, "sha256": str, "n_tokens": 0, "n_stories": 0, "n_bytes": 0}
SPLIT_FORM = {
    **dict.fromkeys(("n_stories", "n_tokens", "n_bytes", "n_duplicates", "n_replaced_bytes"), 0),
    "text": [{"path": str, "sha256": str, "size": 0, "mtime_ns": int}],
    "shards": [SHARD_FORM],
}
FORM = {
    "format_version": int,
    "dtype": str,
    "tokenizer": {"sha256": str, "vocab_size": 0, "bos_id": 0, "eos_id": 0},
    "options": {},
    "splits": dict.fromkeys(SPLITS, SPLIT_FORM),
}


def listed(manifest: Manifest, kind: str) -> list[dict[str, Any]]:
    """Return the entries of both splits' "text" or "shards"."""
    return [entry for split in SPLITS for entry in manifest["splits"][split][kind]]


def listed_files(manifest: Manifest) -> dict[str, str]:
    """Return POSIX path (relative to the data directory) -> SHA-256 of each text and shard listed."""
    return {entry["path"]: entry["sha256"] for kind in ("text", "shards") for entry in listed(manifest, kind)}


def read_manifest(data_dir: Path, check_shards: bool = True) -> Manifest:
    """Return the manifest of a data directory; `check_shards`: each must be there in its recorded size."""
    path = data_dir / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; {RUN_AGAIN}")
    manifest: Manifest = {}
    with contextlib.suppress(ValueError, OSError):
        manifest = read_json(path)
    if not _is_whole(manifest):
        raise ValueError(f"{path}: damaged; {RUN_AGAIN}")
    if (version := manifest["format_version"]) != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version}, not {FORMAT_VERSION}; {RUN_AGAIN}")
    try:
        for name in listed_files(manifest):
            check_inside(name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {RUN_AGAIN}") from None
    if check_shards:
        _check_sizes(data_dir, manifest)
    return manifest


def _is_whole(manifest: Manifest) -> bool:
    """Return whether a manifest has its form, and a number of tokens that its shards add up to."""
    if not fits(manifest, FORM) or manifest["dtype"] not in ("uint16", "uint32"):
        return False
    splits = [manifest["splits"][name] for name in SPLITS]
    return all(sum(s["n_tokens"] for s in split["shards"]) == split["n_tokens"] for split in splits)


def _check_sizes(data_dir: Path, manifest: Manifest) -> None:
    width = np.dtype(manifest["dtype"]).itemsize
    for entry in listed(manifest, "shards"):
        shard, size = data_dir / entry["path"], entry["n_tokens"] * width
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: listed in {MANIFEST} but not there; {RUN_AGAIN}")
        if is_outside(shard, data_dir):
            raise ValueError(f"{shard}: a link out of its folder; {RUN_AGAIN}")
        if (n_bytes := shard.stat().st_size) != size:
            raise ValueError(f"{shard}: {n_bytes} bytes, {MANIFEST} says {size}; {RUN_AGAIN}")


def record_times(data_dir: Path) -> Manifest:
    """Return the manifest, after recording new time stamps of texts, so that they are hashed only once."""
    manifest = read_manifest(data_dir)
    before = [entry["mtime_ns"] for entry in listed(manifest, "text")]
    for entry in listed(manifest, "text"):
        entry["mtime_ns"] = (data_dir / entry["path"]).stat().st_mtime_ns
    if before != [entry["mtime_ns"] for entry in listed(manifest, "text")]:
        write_json(data_dir / MANIFEST, manifest)
    return manifest


def altered_shards(data_dir: Path, manifest: Manifest) -> list[str]:
    """Return a sentence for each shard whose content is not what the manifest records, by its SHA-256."""
    width, entries = np.dtype(manifest["dtype"]).itemsize, listed(manifest, "shards")
    total = width * sum(entry["n_tokens"] for entry in entries)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="checking shards", disable=None, delay=1)
    reasons = []
    # threads are enough: hashlib and reading release the GIL; one core hashes 1 GB in 0.6 to 0.9 s
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar as progress:
        found = pool.map(lambda entry: sha256_file(data_dir / entry["path"]), entries)
        for entry, sha256 in zip(entries, found, strict=True):
            progress.update(width * entry["n_tokens"])
            if sha256 != entry["sha256"]:
                reasons.append(f"{data_dir / entry['path']}: altered since it was made; {RUN_AGAIN}")
    return reasons


def verify(data_dir: Path) -> list[str]:
    """Return a sentence for each text or shard that is missing, new or not as recorded; [] if all agree."""
    files = listed_files(read_manifest(data_dir, check_shards=False))
    texts = sorted([*data_dir.glob("train/*.txt"), *data_dir.glob("val/*.txt")])
    new = [path for path in texts if path.relative_to(data_dir).as_posix() not in files]
    problems = [f"{path}: there but not listed in {MANIFEST}" for path in new]
    for name, expected in tqdm(sorted(files.items()), "checking", unit="file", delay=1, disable=None):
        path = data_dir / name
        if not path.is_file():
            problems.append(f"{path}: listed in {MANIFEST} but not there")
        elif is_outside(path, data_dir):
            problems.append(f"{path}: a link out of its folder")
        elif sha256_file(path) != expected:
            problems.append(f"{path}: its content is not what {MANIFEST} recorded")
    return problems


def manifest_fingerprint(manifest: Manifest) -> str:
    """Return the fingerprint from the hashes that the manifest records, without reading the data."""
    # Not in it: times, counts and options. Contents imply the counts, and an option that changed no shard
    # made the same data set. The tokenizer is in it because ids mean nothing without it.
    facts = {key: manifest[key] for key in ("format_version", "dtype")}
    facts["tokenizer"] = manifest["tokenizer"]["sha256"]
    facts["files"] = sorted(listed_files(manifest).items())
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def fingerprint(data_dir: Path) -> str:
    """Return the SHA-256 over a data directory's contents, equal everywhere; ValueError if one is damaged."""
    if problems := verify(data_dir):
        raise ValueError(f"{problems[0]}; run prepare_data.py again")
    return manifest_fingerprint(read_manifest(data_dir, check_shards=False))
