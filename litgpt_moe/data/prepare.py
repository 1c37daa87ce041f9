"""Make the shards of a data directory match its text, tokenizer and options, doing only what is missing."""

import contextlib
import hashlib
import importlib.metadata
from concurrent.futures import BrokenExecutor
from pathlib import Path

from litgpt_moe.cli import note
from litgpt_moe.data.demo_stories import write_demo_corpus
from litgpt_moe.data.download import download_tinystories
from litgpt_moe.data.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    RUN_AGAIN,
    altered_shards,
    listed,
    read_manifest,
)
from litgpt_moe.data.settings import SPLITS, PrepareSettings, check_settings
from litgpt_moe.data.shards import clean, shard_folders, write_splits
from litgpt_moe.data.text import list_text
from litgpt_moe.data.tokenizer import ensure_tokenizer, read_tokenizer
from litgpt_moe.files import FolderLock, read_json, sha256_file, write_json

OPTIONS = ("separator", "on_bad_utf8", "val_fraction")  # what makes other shards of the same text


def prepare(settings: PrepareSettings, wait: bool = False) -> dict:
    """Return the manifest of a data directory whose shards match its text, tokenizer and options.

    Does only what is missing: text (demo, tinystories), tokenizer, stale shards. Raises ValueError for bad
    settings or text, FolderInUse if another process is at it (or waits for that one), OSError for a missing
    folder, a full disk or an unreachable hub; what was there stays.
    """
    check_settings(settings)
    if settings.dataset == "custom":
        list_text(settings.data_dir)  # before a folder is made for a name that was mistyped
    lock = lock_data(settings.data_dir)
    lock.acquire(wait)
    try:
        return _prepare(settings)
    finally:
        for folder in shard_folders(settings.data_dir):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty
        lock.release()


def _prepare(settings: PrepareSettings) -> dict:
    """Do what `prepare` says, alone in the folder."""
    data_dir = settings.data_dir
    if settings.dataset == "demo":
        write_demo_corpus(data_dir, settings.demo_stories, settings.seed, settings.overwrite)
    elif settings.dataset == "tinystories":
        download_tinystories(data_dir)
    text = list_text(data_dir)
    facts = ensure_tokenizer(settings, text["train"])
    options = {name: getattr(settings, name) for name in OPTIONS}
    options |= {"val_fraction": None} if text["val"] else {}
    reasons = stale_reasons(data_dir, settings.tokenizer_dir, options)
    if not reasons:
        note(f"{data_dir}: the shards match text, tokenizer and options; nothing to do")
        return note_times(data_dir)
    if (data_dir / MANIFEST).exists():  # why once is not enough
        for reason in reasons:
            note(f"tokenizing again: {reason.removesuffix(f'; {RUN_AGAIN}')}")
    manifest = {"format_version": FORMAT_VERSION, "dtype": facts.dtype.name, "options": options}
    manifest["code"] = code_version()
    manifest["tokenizer"] = {key: getattr(facts, key) for key in ("sha256", "vocab_size", "bos_id", "eos_id")}
    try:
        manifest["splits"] = write_splits(settings, text, facts)
    except BrokenExecutor as error:
        raise OSError("a worker process was killed (out of memory?); try fewer --workers") from error
    write_json(data_dir / MANIFEST, manifest)
    clean(data_dir, listed(manifest, "shards"))
    return manifest


def lock_data(data_dir: Path) -> FolderLock:
    """Return what keeps a second preparation out of a data directory."""
    return FolderLock(data_dir, "prepare", "prepare_data.py is at work", "wait for it to end, then run again")


def code_version() -> dict[str, str]:
    """Return what identifies the code that makes shards: this file's SHA-256, and the libraries' versions."""
    source = Path(__file__).read_bytes().replace(b"\r\n", b"\n")  # which git may write on Windows
    names = ("litgpt", "tokenizers")
    digest = hashlib.sha256(source).hexdigest()
    return {"prepare_data.py": digest, **{name: importlib.metadata.version(name) for name in names}}


def note_times(data_dir: Path) -> dict:
    """Return the manifest of fresh data; notes new time stamps of equal text, so that it is hashed once."""
    manifest = read_manifest(data_dir)
    texts = {data_dir / entry["path"]: entry for entry in listed(manifest, "text")}
    if touched := [path for path in texts if path.stat().st_mtime_ns != texts[path]["mtime_ns"]]:
        for path in touched:
            texts[path]["mtime_ns"] = path.stat().st_mtime_ns
        write_json(data_dir / MANIFEST, manifest)
    return manifest


def stale_reasons(
    data_dir: Path, tokenizer_dir: Path, options: dict | None = None, contents: bool = True
) -> list[str]:
    """Return why the shards no longer match text, tokenizer, options or format; [] if they do.

    Shards are hashed, unless another process has seen to their `contents`. Of a text, size and time stamp
    decide; it is only hashed if its time stamp alone differs. A directory whose text was removed altogether
    (to save space) is judged by its tokenizer.
    """
    try:
        manifest = read_manifest(data_dir)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    reasons = []
    facts = read_tokenizer(tokenizer_dir)
    if any(
        getattr(facts, key) != manifest["tokenizer"].get(key)
        for key in ("sha256", "vocab_size", "bos_id", "eos_id")
    ):
        reasons.append(f"{tokenizer_dir / 'tokenizer.json'}: not the tokenizer that made the shards")
    for key, value in (options or {}).items():
        if (before := manifest["options"].get(key)) != value:
            reasons.append(f"{key} is {value!r}, was {before!r}")
    present = {path for split in SPLITS for path in (data_dir / split).glob("*.txt")}
    recorded = {data_dir / entry["path"]: entry for entry in listed(manifest, "text")}
    for path in sorted(present | recorded.keys()) if present else ():
        if path not in present:
            reasons.append(f"{path}: removed")
        elif path not in recorded:
            reasons.append(f"{path}: new")
        elif has_changed(path, recorded[path]):
            reasons.append(f"{path}: changed")
    return reasons or (altered_shards(data_dir, manifest) if contents else [])


def has_changed(path: Path, recorded: dict) -> bool:
    """Return whether a text file is another than the one recorded; equal size and time mean no."""
    stat = path.stat()
    if (stat.st_size, stat.st_mtime_ns) == (recorded["size"], recorded["mtime_ns"]):
        return False
    return stat.st_size != recorded["size"] or sha256_file(path) != recorded["sha256"]


def refresh(data_dir: Path, tokenizer_dir: Path, contents: bool = True, wait: bool = False) -> None:
    """Make the shards again, with the options that they were made with, if they are stale.

    `contents` and `wait` as of `stale_reasons` and `prepare`.
    """
    if reasons := stale_reasons(data_dir, tokenizer_dir, contents=contents):
        if (data_dir / MANIFEST).is_file() and not any((data_dir / "train").glob("*.txt")):
            reason = reasons[0].removesuffix(f"; {RUN_AGAIN}")
            raise ValueError(f"{reason}; and {data_dir / 'train'} has no text to make it again from")
        options = {}
        with contextlib.suppress(ValueError, KeyError, TypeError):  # no manifest, or a damaged one
            before = read_json(data_dir / MANIFEST)["options"]
            options = {name: before[name] for name in OPTIONS if before.get(name) is not None}
        prepare(PrepareSettings(data_dir=data_dir, tokenizer_dir=tokenizer_dir, **options), wait)
