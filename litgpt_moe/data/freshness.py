"""Why the shards of a data directory no longer match their text, tokenizer, options or format."""

import functools
from pathlib import Path
from typing import Any

from litgpt_moe.data.forms import Source
from litgpt_moe.data.inputs import Inputs, list_paths, own_text, recorded_paths
from litgpt_moe.data.manifest import MANIFEST, Manifest, altered_shards, read_files, read_manifest, text_forms
from litgpt_moe.data.mix import changed_parts
from litgpt_moe.data.settings import SPLITS
from litgpt_moe.data.tokenizer import read_tokenizer_facts
from litgpt_moe.files import sha256_file
from litgpt_moe.processes import note_once


def stale_reasons(
    data_dir: Path,
    tokenizer_dir: Path,
    options: dict[str, Any] | None = None,
    contents: bool = True,
    inputs: Inputs | None = None,
) -> list[str]:
    """Return why the shards no longer match text, tokenizer, options (None: any) or format; [] if they do.

    `contents`: also hash the shards; False where another process of the run does. `inputs`: the text, listed
    already. Shards whose text was deleted altogether, to save space, still match.
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
    reasons += changed_parts(data_dir, manifest)
    reasons += _changes_of_text(data_dir, manifest, inputs)
    return reasons or (altered_shards(data_dir, manifest) if contents else [])


def _changes_of_text(data_dir: Path, manifest: Manifest, inputs: Inputs | None) -> list[str]:
    """Return a sentence for each file that was added, removed or changed; [] where all text is gone."""
    if inputs is None:
        paths = recorded_paths(data_dir, manifest)
        if paths and not any(path.exists() for path in paths):
            return []
        try:
            inputs = list_paths(paths, data_dir) if paths else own_text(data_dir, text_forms(manifest))
        except (FileNotFoundError, ValueError) as error:
            return [str(error)]
    present = {source.name: source for split in SPLITS for source in inputs.text[split]}
    recorded = {entry["path"]: entry for entry in read_files(manifest)}
    reasons = []
    for name in sorted(present.keys() | recorded.keys()) if present else ():
        if (source := present.get(name)) is None:
            reasons.append(f"{data_dir / name}: removed")
        elif name not in recorded:
            reasons.append(f"{source.path}: new")
        elif has_changed(source, recorded[name]):
            reasons.append(f"{source.path}: changed")
    return reasons


@functools.cache  # once in a process
def _warn_of_cut_stories(data_dir: Path) -> None:
    cut = "truncation or padding in its tokenizer.json cut or padded the stories"
    note_once(f"{data_dir}: {cut}; delete {MANIFEST} and run prepare_data.py to have them whole")


def has_changed(source: Source, recorded: dict[str, Any]) -> bool:
    """Return whether a text differs from its record; it is hashed if only its time stamp differs."""
    if source.on_hub:
        return source.on_hub.digest != recorded["sha256"]
    stat = source.path.stat()
    is_touched = stat.st_mtime_ns != recorded["mtime_ns"]
    return stat.st_size != recorded["size"] or (is_touched and sha256_file(source.path) != recorded["sha256"])
