"""Make the shards of a data directory match its text, tokenizer and options."""

import contextlib
import importlib.metadata
from collections import Counter
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from litgpt_moe import __version__
from litgpt_moe.checkpoints.layout import check_no_place_of_run
from litgpt_moe.cli import note
from litgpt_moe.data.demo_stories import write_demo_corpus
from litgpt_moe.data.download import download_tinystories
from litgpt_moe.data.foreign_tokenizer import bring_tokenizer, carry_tokenizer, is_foreign
from litgpt_moe.data.forms import FORMS, HUB_RECORD, text_in
from litgpt_moe.data.freshness import stale_reasons
from litgpt_moe.data.hub_dataset import as_before, open_dataset
from litgpt_moe.data.hub_progress import PROGRESS
from litgpt_moe.data.inputs import (
    Inputs,
    list_paths,
    list_text,
    outside_paths,
    recorded_paths,
    relative_name,
)
from litgpt_moe.data.make_tokenizer import ensure_tokenizer
from litgpt_moe.data.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    RUN_AGAIN,
    Manifest,
    check_own,
    read_manifest,
    record_times,
    special_tokens,
    text_forms,
)
from litgpt_moe.data.mix import folder_of, make_mix, open_parts, read_mix
from litgpt_moe.data.settings import (
    DEFAULT_TOKENIZER_DIR,
    SPLITS,
    PrepareSettings,
    check_settings,
    is_hub_name,
)
from litgpt_moe.data.shards import check_stories, clean, write_splits
from litgpt_moe.data.text import FileReader
from litgpt_moe.data.tokenizer import StoryEncoder, TokenizerFacts
from litgpt_moe.data.tokenizer_folder import TOKENIZER_FOLDER, choose_tokenizer, find_tokenizer
from litgpt_moe.data.workers import check_memory_limit
from litgpt_moe.files import check_no_links, is_link, read_json, write_json
from litgpt_moe.locks import locked_folder, remove_left_over

OPTIONS = (
    "separator",
    "on_bad_utf8",
    "text_column",
    "val_fraction",
)  # the settings on which the shards depend
BLOCK_SIZE = 1024  # of model_config.yaml, the default
WAIT = "wait for it to end, then run again"


def prepare(settings: PrepareSettings, wait: bool = False) -> Manifest:
    """Return the manifest of a data directory after making what is missing: text, tokenizer, stale shards.

    If that fails, the earlier shards and manifest remain. FolderInUse if another process prepares the folder,
    unless told to `wait` for it.
    """
    check_settings(settings)
    check_memory_limit()
    if settings.mix:
        if settings.paths or settings.dataset != "custom":
            raise ValueError("mix: it draws from prepared data; drop PATH and --dataset")
        _prepare_hub_parts(settings, wait)
        open_parts(settings)  # before the lock makes a folder
        with locked_folder(settings.data_dir, "prepare", "prepare_data.py is at work", WAIT, wait):
            return make_mix(settings)
    check_no_place_of_run(settings.data_dir)
    settings = _with_inputs(settings)
    if settings.dataset == "custom":
        list_inputs(settings)  # the lock below would create a folder with a mistyped name
    elif settings.paths:
        raise ValueError(f"{settings.paths[0]}: a PATH and --dataset exclude each other; drop one")
    settings = _place_tokenizer(settings)
    # TinyStories is downloaded together with a tokenizer
    is_download = settings.dataset == "tinystories" and not (settings.data_dir / MANIFEST).exists()
    if settings.train_tokenizer is None and not settings.tokenizer and not is_download:
        folder = choose_tokenizer(settings.data_dir, settings.tokenizer_dir)
        settings = replace(settings, tokenizer_dir=folder)
    check_own(settings.data_dir)
    _check_folders(settings.data_dir)
    with locked_folder(settings.data_dir, "prepare", "prepare_data.py is at work", WAIT, wait):
        try:
            return _prepare(settings, wait)
        finally:
            for folder in (settings.data_dir / split for split in SPLITS):
                with contextlib.suppress(OSError):
                    if not is_link(folder):  # behind it are somebody else's
                        (folder / folder.name).rmdir()  # fails unless it is empty


def _prepare(settings: PrepareSettings, wait: bool) -> Manifest:
    data_dir = settings.data_dir
    inputs, facts = _make_inputs(settings, wait)
    text = inputs.text
    options = {name: getattr(settings, name) for name in OPTIONS}
    options |= {"val_fraction": None} if text["val"] else {}
    reasons = stale_reasons(data_dir, settings.tokenizer_dir, options, inputs=inputs)
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
        splits, readers = write_splits(settings, text, facts)
    except BrokenExecutor as error:
        way_out = "free memory or raise its limit, or try fewer --workers"
        raise OSError(f"a worker process ended early (out of memory, or killed); {way_out}") from error
    if sentence := special_tokens(splits):
        note(f"{data_dir}: {sentence}")
    # for information only: another version makes no shard stale
    versions = {name: importlib.metadata.version(name) for name in ("litgpt", "tokenizers")}
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": facts.dtype.name,
        "options": options,
        "code": {"litgpt_moe": __version__, **versions},
        "tokenizer": facts.record(data_dir),
        "text_forms": list(_forms_of(data_dir)),
        "input": _input_record(settings, inputs, readers),
        "splits": splits,
    }
    # before the manifest, behind which nothing is made again
    carry_tokenizer(facts.folder, data_dir / TOKENIZER_FOLDER)
    write_json(data_dir / MANIFEST, manifest)
    clean(data_dir)
    remove_left_over(*(data_dir / name for name in (MANIFEST, HUB_RECORD, PROGRESS)))
    if (n_tokens := splits["val"]["n_tokens"]) <= BLOCK_SIZE:
        few = f"{data_dir / 'val'}: {n_tokens:,} tokens, too few for one sequence of {BLOCK_SIZE:,}"
        more = "put more text there" if text["val"] else "give more text or a larger --val_fraction"
        note(f"{few} (MoE-200M; the demo model's have 256), which a validation needs; {more}")
    return manifest


def _written_folders(data_dir: Path) -> list[Path]:
    return [data_dir / folder for split in SPLITS for folder in (split, f"{split}/{split}")]


def _check_folders(data_dir: Path) -> None:
    """Raise ValueError if a file has the name of a folder of text or of shards."""
    for folder in _written_folders(data_dir):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, where a folder belongs; move it elsewhere, or rename it")


def _prepare_hub_parts(settings: PrepareSettings, wait: bool) -> None:
    """Prepare the data sets of the hub that a mix names, with the tokenizer of its other sources."""
    folders = {name: folder_of(name) for name in read_mix(list(settings.mix))}
    known = next((find_tokenizer(folder, None) for folder in folders.values() if folder), None)
    for name, folder in folders.items():
        if folder is None and is_hub_name(name):
            data_dir = Path("data") / name.rpartition("/")[2]
            own = replace(settings, mix=(), dataset=name, data_dir=data_dir)
            prepare(replace(own, tokenizer_dir=known) if known else own, wait)
            known = known or find_tokenizer(data_dir, None)


def _place_tokenizer(settings: PrepareSettings) -> PrepareSettings:
    """Return the settings with a tokenizer that is to be made or copied placed in the data directory."""
    inside, folder = settings.data_dir / TOKENIZER_FOLDER, settings.tokenizer_dir
    is_default = folder == DEFAULT_TOKENIZER_DIR
    if settings.tokenizer or (
        is_default and settings.train_tokenizer and (settings.paths or is_hub_name(settings.dataset))
    ):
        check_no_links(inside)
        return replace(settings, tokenizer_dir=inside)
    if settings.train_tokenizer is None and not is_default and is_foreign(folder):
        check_no_links(inside)
        return replace(settings, tokenizer_dir=inside, tokenizer=str(folder))
    return settings


def _with_inputs(settings: PrepareSettings) -> PrepareSettings:
    """Return the settings with the PATHs, or the data set of the hub, that the data were made from before."""
    if settings.dataset != "custom":
        return settings
    settings = replace(settings, paths=tuple(_paths_of(settings)))
    has_text = settings.paths or text_in(settings.data_dir / "train")
    return settings if has_text else as_before(settings)


def _paths_of(settings: PrepareSettings) -> list[Path]:
    """Return the PATHs to read: the named ones, else those from which the data directory was prepared."""
    paths = outside_paths(settings.data_dir, settings.paths)
    if paths or settings.paths or text_in(settings.data_dir / "train"):
        return paths
    with contextlib.suppress(FileNotFoundError, ValueError):  # no manifest, or a damaged one
        return recorded_paths(settings.data_dir, read_json(settings.data_dir / MANIFEST))
    return []


def _forms_of(data_dir: Path) -> tuple[str, ...]:
    """Return the forms of text read in a data directory: an earlier version's stays as it was."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # no manifest, or a damaged one
        return text_forms(read_manifest(data_dir, check_shards=False))
    return FORMS


def list_inputs(settings: PrepareSettings) -> Inputs:
    """Return the files of text; FileNotFoundError or ValueError if there are none that can be used."""
    if settings.paths:
        return list_paths(list(settings.paths), settings.data_dir)
    return list_text(settings.data_dir, _forms_of(settings.data_dir))


def _input_record(settings: PrepareSettings, inputs: Inputs, readers: list[FileReader]) -> dict[str, Any]:
    """Return the manifest's entry on the files that were read, and on what was not."""
    rows = sum((reader.skipped for reader in readers), Counter())
    return {
        "paths": [relative_name(path, settings.data_dir) for path in settings.paths],
        "n_files": len(readers),
        "columns": sorted({reader.column for reader in readers if reader.column}),
        "links": [Path(name).name for name in inputs.links],
        "skipped_files": {reason: len(names) for reason, names in inputs.skipped.items()},
        "skipped_rows": dict(rows),
    }


def _make_inputs(settings: PrepareSettings, wait: bool) -> tuple[Inputs, TokenizerFacts]:
    """Return the text files and the tokenizer, written, downloaded or trained unless they are there."""
    if settings.dataset != "custom":
        check_no_links(*_written_folders(settings.data_dir))
    inputs = None
    if settings.dataset == "demo":
        write_demo_corpus(settings)
    elif settings.dataset == "tinystories":
        download_tinystories(settings.data_dir)
    elif is_hub_name(settings.dataset):
        inputs = open_dataset(settings)
    inputs = inputs or list_inputs(settings)
    for sentence in inputs.sentences(settings.paths[0] if settings.paths else settings.data_dir):
        note(sentence)
    with lock_tokenizer(settings, wait):
        if settings.tokenizer:
            read = partial(check_stories, settings, inputs.text)
            bring_tokenizer(settings.tokenizer, settings.tokenizer_dir, read, settings.overwrite)
        if settings.train_tokenizer or not (settings.tokenizer_dir / "tokenizer.json").is_file():
            check_stories(settings, inputs.text)
        return inputs, ensure_tokenizer(settings, inputs.text["train"])


def lock_tokenizer(settings: PrepareSettings, wait: bool) -> contextlib.AbstractContextManager[None]:
    """Return the lock of a tokenizer folder for the time in which a tokenizer may be made there."""
    folder = settings.tokenizer_dir
    if (folder / "tokenizer.json").is_file() and settings.train_tokenizer is None:
        return contextlib.nullcontext()
    return locked_folder(folder, "tokenizer", "another command makes a tokenizer", WAIT, wait)


def refresh(data_dir: Path, tokenizer_dir: Path, contents: bool = True, wait: bool = False) -> None:
    """Rebuild stale shards with their recorded options; see `stale_reasons` and `prepare`."""
    tokenizer_dir = choose_tokenizer(data_dir, tokenizer_dir)
    reasons = stale_reasons(data_dir, tokenizer_dir, contents=contents)
    if not reasons:
        return
    before: Manifest = {}
    with contextlib.suppress(ValueError):  # a damaged manifest
        before = read_json(data_dir / MANIFEST)
    paths = recorded_paths(data_dir, before)
    if before.get("mix"):
        raise ValueError(f"{reasons[0].removesuffix(f'; {RUN_AGAIN}')}; mix again with prepare_data.py --mix")
    if before and not (text_in(data_dir / "train") or any(path.exists() for path in paths)):
        reason = reasons[0].removesuffix(f"; {RUN_AGAIN}")
        way_out = f"; prepare_data.py --data_dir {data_dir} reads it again on the hub"
        way_out = way_out if (data_dir / HUB_RECORD).is_file() else ""
        raise ValueError(f"{reason}; and {data_dir / 'train'} has no text to make it again from{way_out}")
    options = before.get("options")
    kinds = {"separator": str, "on_bad_utf8": str, "text_column": str, "val_fraction": float}
    options = options if isinstance(options, dict) else {}
    options = {name: value for name, value in options.items() if type(value) is kinds.get(name)}
    prepare(PrepareSettings(data_dir=data_dir, tokenizer_dir=tokenizer_dir, **options), wait)
