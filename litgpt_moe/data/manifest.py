"""manifest.json: what made the shards of a data directory, read by one reader, checked, fingerprinted."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from litgpt_moe.data.settings import SPLITS
from litgpt_moe.files import check_inside, is_outside, read_json, sha256_file

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
RUN_AGAIN = "run prepare_data.py on that folder"


def listed(manifest: dict, kind: str) -> list[dict]:
    """Return the entries of both splits' "text" or "shards"."""
    return [entry for split in SPLITS for entry in manifest["splits"][split][kind]]


def read_manifest(data_dir: Path) -> dict:
    """Return the manifest, after a check that every shard that it lists is there with the right size."""
    path = data_dir / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; {RUN_AGAIN}")
    try:
        manifest = read_json(path)
        version, width = manifest["format_version"], np.dtype(manifest["dtype"]).itemsize
        check_types(manifest)
        sizes = {data_dir / shard["path"]: shard["n_tokens"] * width for shard in listed(manifest, "shards")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise ValueError(f"{path}: damaged; {RUN_AGAIN}") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version}, not {FORMAT_VERSION}; {RUN_AGAIN}")
    for shard, size in sizes.items():
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: listed in {MANIFEST} but not there; {RUN_AGAIN}")
        if is_outside(shard, data_dir):
            raise ValueError(f"{shard}: a link out of its folder; {RUN_AGAIN}")
        if shard.stat().st_size != size:
            raise ValueError(f"{shard}: {shard.stat().st_size} bytes, {MANIFEST} says {size}; {RUN_AGAIN}")
    return manifest


def altered_shards(data_dir: Path, manifest: dict) -> list[str]:
    """Return a sentence for each shard whose content is not what the manifest records, by its SHA-256."""
    width, entries = np.dtype(manifest["dtype"]).itemsize, listed(manifest, "shards")
    total = width * sum(entry["n_tokens"] for entry in entries)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="checking shards", disable=None, delay=1)
    reasons = []
    # threads, for hashlib and reading let others run: 1 GB takes a core 0.6 to 0.9 s
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar as progress:
        found = pool.map(lambda entry: sha256_file(data_dir / entry["path"]), entries)
        for entry, sha256 in zip(entries, found, strict=True):
            progress.update(width * entry["n_tokens"])
            if sha256 != entry["sha256"]:
                reasons.append(f"{data_dir / entry['path']}: altered since it was made; {RUN_AGAIN}")
    return reasons


def check_types(manifest: dict) -> None:
    """TypeError or KeyError if a manifest lacks something or holds another kind of value."""

    def check(mapping: dict, kind: type, *keys: str) -> None:
        wrong = [key for key in keys if type(mapping[key]) is not kind]
        if wrong:
            raise TypeError(f"{wrong[0]} is not {kind.__name__}")

    if manifest["dtype"] not in ("uint16", "uint32"):
        raise TypeError("dtype is neither uint16 nor uint32")
    check(manifest, dict, "tokenizer", "options", "splits")
    check(manifest["tokenizer"], str, "sha256")
    check(manifest["tokenizer"], int, "vocab_size", "bos_id", "eos_id")
    for split in SPLITS:
        check(manifest["splits"][split], int, "n_stories", "n_tokens", "n_bytes")
        check(manifest["splits"][split], int, "n_duplicates", "n_replaced_bytes")
    for entry in [*listed(manifest, "text"), *listed(manifest, "shards")]:
        check(entry, str, "path", "sha256")
        check_inside(entry["path"])
    for entry in listed(manifest, "text"):
        check(entry, int, "size", "mtime_ns")
    for split in SPLITS:
        shards = manifest["splits"][split]["shards"]
        for entry in shards:
            check(entry, int, "n_tokens", "n_stories", "n_bytes")
        if sum(entry["n_tokens"] for entry in shards) != manifest["splits"][split]["n_tokens"]:
            raise ValueError(f"the shards of {split} do not add up to its n_tokens")


def load_manifest(data_dir: Path) -> dict:
    """Return the parsed manifest; whether the files agree with it is for `verify` to say."""
    path = data_dir / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest_fingerprint(manifest)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found; run prepare_data.py on that folder first") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: damaged; run prepare_data.py again to rewrite it") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return manifest


def entries(manifest: dict) -> Iterator[dict]:
    """Yield the manifest's entry of each text and shard, with at least `path` and `sha256`."""
    for split in manifest["splits"].values():
        yield from split.get("text", [])
        yield from split["shards"]


def listed_files(manifest: dict) -> dict[str, str]:
    """Return POSIX path (relative to the data directory) -> SHA-256 of each text and shard listed."""
    return {check_inside(entry["path"]): entry["sha256"] for entry in entries(manifest)}


def manifest_fingerprint(manifest: dict) -> str:
    """Return the fingerprint from the hashes that the manifest records, without reading the data."""
    # Not in it: times, counts and options. Contents imply the counts, and an option that changed no shard
    # made the same data set. The tokenizer is in it because ids mean nothing without it.
    facts = {key: manifest.get(key) for key in ("format_version", "dtype")}
    facts["tokenizer"] = manifest.get("tokenizer", {}).get("sha256")
    facts["files"] = sorted(listed_files(manifest).items())
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def verify(data_dir: Path) -> list[str]:
    """Return a sentence for each text or shard that is missing, new or not as recorded; [] is whole."""
    listed = listed_files(load_manifest(data_dir))
    problems = []
    for path in sorted([*data_dir.glob("train/*.txt"), *data_dir.glob("val/*.txt")]):
        if path.relative_to(data_dir).as_posix() not in listed:
            problems.append(f"{path}: there but not listed in {MANIFEST}")
    for name, expected in tqdm(sorted(listed.items()), "checking", unit="file", delay=1, disable=None):
        path = data_dir / name
        if not path.is_file():
            problems.append(f"{path}: listed in {MANIFEST} but not there")
        elif is_outside(path, data_dir):
            problems.append(f"{path}: a link out of its folder")
        elif sha256_file(path) != expected:
            problems.append(f"{path}: its content is not what {MANIFEST} recorded")
    return problems


def fingerprint(data_dir: Path) -> str:
    """Return the SHA-256 over a data directory's contents, equal on every machine and at every time.

    Every file is read; one that is not as recorded is an error, because then no fingerprint is true.
    """
    if problems := verify(data_dir):
        raise ValueError(f"{problems[0]}; run prepare_data.py again")
    return manifest_fingerprint(load_manifest(data_dir))
