"""Make the shards of a data directory match its text, tokenizer and options."""

import contextlib
import functools
import importlib.metadata
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from litgpt_moe import __version__
from litgpt_moe.checkpoints.layout import check_no_place_of_run
from litgpt_moe.cli import note
from litgpt_moe.data.demo_stories import write_demo_corpus
from litgpt_moe.data.download import download_tinystories
from litgpt_moe.data.make_tokenizer import ensure_tokenizer
from litgpt_moe.data.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    RUN_AGAIN,
    Manifest,
    altered_shards,
    check_own,
    listed,
    read_manifest,
    record_times,
)
from litgpt_moe.data.settings import SPLITS, PrepareSettings, check_settings
from litgpt_moe.data.shards import check_memory_limit, check_stories, clean, write_splits
from litgpt_moe.data.text import list_text, not_read
from litgpt_moe.data.tokenizer import StoryEncoder, TokenizerFacts, read_tokenizer_facts
from litgpt_moe.data.tokenizer_folder import choose_tokenizer
from litgpt_moe.files import check_no_links, read_json, sha256_file, write_json
from litgpt_moe.locks import locked_folder
from litgpt_moe.processes import note_once

OPTIONS = ("separator", "on_bad_utf8", "val_fraction")  # the settings on which the shards depend
BLOCK_SIZE = 1024  # of model_config.yaml, the default
WAIT = "wait for it to end, then run again"


def prepare(settings: PrepareSettings, wait: bool = False) -> Manifest:
    """Return the manifest of a data directory after making what is missing: text, tokenizer, stale shards.

    If that fails, the earlier shards and manifest remain. FolderInUse if another process prepares the folder,
    unless told to `wait` for it.
    """
    check_settings(settings)
    check_memory_limit()
    check_no_place_of_run(settings.data_dir)
    if settings.dataset == "custom":
        list_text(settings.data_dir)  # the lock below would create a folder with a mistyped name
    # TinyStories is downloaded together with a tokenizer
    is_download = settings.dataset == "tinystories" and not (settings.data_dir / MANIFEST).exists()
    if settings.train_tokenizer is None and not is_download:
        folder = choose_tokenizer(settings.data_dir, settings.tokenizer_dir)
        settings = replace(settings, tokenizer_dir=folder)
    check_own(settings.data_dir)
    with locked_folder(settings.data_dir, "prepare", "prepare_data.py is at work", WAIT, wait):
        try:
            return _prepare(settings, wait)
        finally:
            for split in SPLITS:
                with contextlib.suppress(OSError):
                    (settings.data_dir / split / split).rmdir()  # fails unless it is empty


def _prepare(settings: PrepareSettings, wait: bool) -> Manifest:
    data_dir = settings.data_dir
    text, facts = _make_inputs(settings, wait)
    options = {name: getattr(settings, name) for name in OPTIONS}
    options |= {"val_fraction": None} if text["val"] else {}
    reasons = stale_reasons(data_dir, settings.tokenizer_dir, options)
    if not reasons:
        note(f"{data_dir}: the shards match text, tokenizer and options; nothing to do")
        return record_times(data_dir)
    if (data_dir / MANIFEST).exists():  # a first preparation needs no reason
        for reason in reasons:
            note(f"tokenizing again: {reason.removesuffix(f'; {RUN_AGAIN}')}")
    check_no_links(*_written_folders(data_dir))
    if example := StoryEncoder(facts).changed(check_stories(settings, text)):
        note(f"{settings.tokenizer_dir / 'tokenizer.json'}: {example}")
    try:
        splits = write_splits(settings, text, facts)
    except BrokenExecutor as error:
        way_out = "free memory or raise its limit, or try fewer --workers"
        raise OSError(f"a worker process ended early (out of memory, or killed); {way_out}") from error
    # for information only: another version makes no shard stale
    versions = {name: importlib.metadata.version(name) for name in ("litgpt", "tokenizers")}
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": facts.dtype.name,
        "options": options,
        "code": {"litgpt_moe": __version__, **versions},
        "tokenizer": facts.record(data_dir),
        "splits": splits,
    }
    write_json(data_dir / MANIFEST, manifest)
    clean(data_dir)
    if (n_tokens := splits["val"]["n_tokens"]) <= BLOCK_SIZE:
        few = f"{data_dir / 'val'}: {n_tokens:,} tokens, too few for one sequence of {BLOCK_SIZE:,}"
        more = "put more text there" if text["val"] else "give more text or a larger --val_fraction"
        note(f"{few} (MoE-200M; the demo model's have 256), which a validation needs; {more}")
    return manifest


def _written_folders(data_dir: Path) -> list[Path]:
    return [data_dir / folder for split in SPLITS for folder in (split, f"{split}/{split}")]


def _make_inputs(settings: PrepareSettings, wait: bool) -> tuple[dict[str, list[Path]], TokenizerFacts]:
    """Return the text files and the tokenizer, written, downloaded or trained unless they are there."""
    if settings.dataset != "custom":
        check_no_links(*_written_folders(settings.data_dir))
    if settings.dataset == "demo":
        write_demo_corpus(settings)
    elif settings.dataset == "tinystories":
        download_tinystories(settings.data_dir)
    text = list_text(settings.data_dir)
    for sentence in not_read(settings.data_dir):
        note(sentence)
    with lock_tokenizer(settings, wait):
        if settings.train_tokenizer or not (settings.tokenizer_dir / "tokenizer.json").is_file():
            check_stories(settings, text)
        return text, ensure_tokenizer(settings, text["train"])


def lock_tokenizer(settings: PrepareSettings, wait: bool) -> contextlib.AbstractContextManager[None]:
    """Return the lock of a tokenizer folder for the time in which a tokenizer may be made there."""
    folder = settings.tokenizer_dir
    if (folder / "tokenizer.json").is_file() and settings.train_tokenizer is None:
        return contextlib.nullcontext()
    return locked_folder(folder, "tokenizer", "another command makes a tokenizer", WAIT, wait)


def stale_reasons(
    data_dir: Path, tokenizer_dir: Path, options: dict[str, Any] | None = None, contents: bool = True
) -> list[str]:
    """Return why the shards no longer match text, tokenizer, options (None: any) or format; [] if they do.

    `contents`: also hash the shards; False where another process of the run does. Shards whose text was
    deleted altogether, to save space, still match.
    """
    try:
        manifest = read_manifest(data_dir)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    reasons = []
    facts = read_tokenizer_facts(tokenizer_dir)
    if not facts.made(manifest["tokenizer"]):
        reasons.append(f"{tokenizer_dir / 'tokenizer.json'}: not the tokenizer that made the shards")
    elif manifest["tokenizer"]["sha256"] != facts.sha256:  # an earlier version made them
        _warn_of_cut_stories(data_dir)
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


@functools.cache  # once in a process
def _warn_of_cut_stories(data_dir: Path) -> None:
    cut = "truncation or padding in its tokenizer.json cut or padded the stories"
    note_once(f"{data_dir}: {cut}; delete {MANIFEST} and run prepare_data.py to have them whole")


def has_changed(path: Path, recorded: dict[str, Any]) -> bool:
    """Return whether a text differs from its record; it is hashed if only its time stamp differs."""
    stat = path.stat()
    is_touched = stat.st_mtime_ns != recorded["mtime_ns"]
    return stat.st_size != recorded["size"] or (is_touched and sha256_file(path) != recorded["sha256"])


def refresh(data_dir: Path, tokenizer_dir: Path, contents: bool = True, wait: bool = False) -> None:
    """Rebuild stale shards with their recorded options; see `stale_reasons` and `prepare`."""
    tokenizer_dir = choose_tokenizer(data_dir, tokenizer_dir)
    reasons = stale_reasons(data_dir, tokenizer_dir, contents=contents)
    if not reasons:
        return
    if (data_dir / MANIFEST).is_file() and not any((data_dir / "train").glob("*.txt")):
        reason = reasons[0].removesuffix(f"; {RUN_AGAIN}")
        raise ValueError(f"{reason}; and {data_dir / 'train'} has no text to make it again from")
    options: dict[str, Any] = {}
    with contextlib.suppress(ValueError, KeyError, TypeError):  # no manifest, or a damaged one
        before = read_json(data_dir / MANIFEST)["options"]
        usual = {name: getattr(PrepareSettings, name) for name in OPTIONS}
        options = {name: before[name] for name in OPTIONS if type(before.get(name)) is type(usual[name])}
    prepare(PrepareSettings(data_dir=data_dir, tokenizer_dir=tokenizer_dir, **options), wait)
