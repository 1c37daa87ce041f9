"""manifest.json records what the shards of a data directory were made from: reading, checks, fingerprint."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from litgpt_moe.cli import no_bar
from litgpt_moe.data.forms import FORMS, OLD_FORMS, text_in
from litgpt_moe.data.settings import SPLITS
from litgpt_moe.files import (
    check_inside,
    check_no_links,
    fits,
    is_network_share,
    is_outside,
    read_json,
    sha256_file,
    write_json,
)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
RUN_AGAIN = "run prepare_data.py on that folder"

Manifest = dict[str, Any]  # parsed JSON
# the forms that `files.fits` checks
TEXT_FORM = {"path": str, "sha256": str, "size": 0, "mtime_ns": int}
SHARD_FORM = {"path": str, "sha256": str, "n_tokens": 1, "n_stories": 0, "n_bytes": 0}
SPLIT_FORM = {
    **dict.fromkeys(("n_stories", "n_tokens", "n_bytes", "n_duplicates", "n_replaced_bytes"), 0),
    "text": [TEXT_FORM],
    "shards": [SHARD_FORM],
}
FORM = {
    "format_version": int,
    "dtype": str,
    "tokenizer": {"sha256": str, "vocab_size": 0, "bos_id": 0, "eos_id": 0},
    "options": {},
    "splits": dict.fromkeys(SPLITS, SPLIT_FORM),
}
# of what data of earlier versions do not have
INPUT_FORM = {"n_files": 0, "columns": [str], "skipped_files": {}, "skipped_rows": {}}
MIX_FORM = [{"folder": str, "weight": 0.0, "n_drawn": 0, "n_tokens": 0, "passes": 0.0}]


def listed(manifest: Manifest, kind: str) -> list[dict[str, Any]]:
    """Return the entries of both splits' "text" or "shards"."""
    return [entry for split in SPLITS for entry in manifest["splits"][split][kind]]


def read_files(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the entries of all files of text, those outside of the data directory too."""
    outside = [entry for split in SPLITS for entry in manifest["splits"][split].get("read", ())]
    found = [entry for entry in [*listed(manifest, "text"), *outside] if fits(entry, TEXT_FORM)]
    # the manifest may be a stranger's
    return [entry for entry in found if not is_network_share(entry["path"])]


def text_forms(manifest: Manifest) -> tuple[str, ...]:
    """Return the forms of text that were read in the data directory."""
    recorded = manifest.get("text_forms")
    return tuple(f for f in FORMS if f in recorded) if isinstance(recorded, list) else OLD_FORMS


def listed_files(manifest: Manifest) -> dict[str, str]:
    """Return POSIX path (relative to the data directory) -> SHA-256 of each text and shard listed."""
    return {entry["path"]: entry["sha256"] for kind in ("text", "shards") for entry in listed(manifest, kind)}


def read_manifest(data_dir: Path, check_shards: bool = True) -> Manifest:
    """Return the manifest of a data directory; `check_shards`: each shard must have its recorded size."""
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


def check_own(data_dir: Path) -> None:
    """Raise ValueError if the folder has a manifest.json of another program, which would be overwritten."""
    path, content = data_dir / MANIFEST, None
    if not path.is_file():
        check_no_links(path)  # to read a pipe would wait for ever
        return
    # a damaged one is written again
    with contextlib.suppress(ValueError, OSError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
    if content and not (isinstance(content, dict) and content.keys() & FORM.keys()):
        raise ValueError(
            f"{path}: not a file of prepare_data.py, which writes one of this name; move it away"
        )


def special_tokens(splits: Manifest) -> str | None:
    """Return a sentence on the special tokens that stand in the text itself, None without any."""
    found = Counter[str]()
    for entry in (shard for split in splits.values() for shard in split["shards"]):
        special = entry.get("special")
        if isinstance(special, dict) and all(type(n) is int for n in special.values()):
            found.update(special)
    counts = ", ".join(f"{token!r:.40} {n:,} times" for token, n in found.most_common(5))
    way_out = "where that is not meant, take them out of the text"
    return f"special tokens stand in the text, which get their ids: {counts}; {way_out}" if found else None


def _is_whole(manifest: Manifest) -> bool:
    """Return whether a manifest matches FORM and the tokens of its shards add up to each split's count."""
    if not fits(manifest, FORM) or manifest["dtype"] not in ("uint16", "uint32"):
        return False
    splits = [manifest["splits"][name] for name in SPLITS]
    if not fits(manifest.get("mix", []), MIX_FORM) or not _has_whole_input(manifest):
        return False
    return all(sum(s["n_tokens"] for s in split["shards"]) == split["n_tokens"] for split in splits)


def _has_whole_input(manifest: Manifest) -> bool:
    """Return whether the record of what was read, which data of earlier versions lack, can be shown."""
    if (record := manifest.get("input")) is None:
        return True
    if not fits(record, INPUT_FORM):
        return False
    counts = [*record["skipped_files"].values(), *record["skipped_rows"].values()]
    read = [manifest["splits"][split].get("read", []) for split in SPLITS]  # a W&B artifact has none
    return fits(counts, [0]) and fits(read, [[TEXT_FORM]]) and fits(record.get("links", []), [str])


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
    """Return the manifest after recording the texts' time stamps, so that the next check hashes nothing."""
    manifest = read_manifest(data_dir)
    for entry in read_files(manifest):
        with contextlib.suppress(FileNotFoundError):  # text that was deleted to save space
            entry["mtime_ns"] = (data_dir / entry["path"]).stat().st_mtime_ns
    if manifest != read_manifest(data_dir, check_shards=False):
        write_json(data_dir / MANIFEST, manifest)
    return manifest


def altered_shards(data_dir: Path, manifest: Manifest) -> list[str]:
    """Return a sentence for each shard whose SHA-256 is not the recorded one."""
    shards = {data_dir / entry["path"]: entry["sha256"] for entry in listed(manifest, "shards")}
    return [f"{path}: altered since it was made; {RUN_AGAIN}" for path in _altered(shards)]


def _altered(digests: dict[Path, str]) -> list[Path]:
    """Return the files whose SHA-256 is not the given one."""
    # threads suffice: hashlib and reading release the GIL; one core hashes 1 GB in 0.6 to 0.9 s
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = tqdm(
            pool.map(sha256_file, digests), "checking", len(digests), unit="file", delay=1, disable=no_bar()
        )
        return [path for path, digest in zip(digests, found, strict=True) if digest != digests[path]]


def verify(data_dir: Path) -> list[str]:
    """Return a sentence for each text or shard that is missing, new or not as recorded."""
    manifest = read_manifest(data_dir, check_shards=False)
    listed = listed_files(manifest)
    files = {data_dir / name: digest for name, digest in sorted(listed.items())}
    texts = [path for split in SPLITS for path in text_in(data_dir / split, text_forms(manifest))]
    problems = [f"{path}: there but not listed in {MANIFEST}" for path in texts if path not in files]
    for path in list(files):
        if not path.is_file():
            problems.append(f"{path}: listed in {MANIFEST} but not there")
        elif is_outside(path, data_dir):
            problems.append(f"{path}: a link out of its folder")
        else:
            continue
        del files[path]
    return problems + [f"{path}: its content is not what {MANIFEST} recorded" for path in _altered(files)]


def manifest_fingerprint(manifest: Manifest) -> str:
    """Return a SHA-256 over the recorded digests of a data directory: equal for equal data everywhere."""
    # Time stamps, counts and options are left out: the contents imply the counts, and an option that changed
    # no shard made the same data. The tokenizer is included: it gives the ids their meaning.
    facts = {key: manifest[key] for key in ("format_version", "dtype")}
    facts["tokenizer"] = manifest["tokenizer"]["sha256"]
    facts["files"] = sorted(listed_files(manifest).items())
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
