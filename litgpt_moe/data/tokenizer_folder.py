"""Which folder holds the tokenizer of a data directory: the named one, or the one that made its shards."""

import contextlib
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from litgpt_moe.checkpoints.tokenizer_files import is_tokenizer
from litgpt_moe.data.manifest import MANIFEST, read_manifest
from litgpt_moe.data.settings import DEFAULT_TOKENIZER_DIR
from litgpt_moe.files import MAX_JSON_BYTES, fits, read_json

TOKENIZER_FOLDER = "tokenizer"  # its name in an artifact, and the usual one in or beside a data directory


def find_tokenizer(data_dir: Path, tokenizer_dir: Path | None) -> Path:
    """Return the folder of the tokenizer that made the shards: `tokenizer_dir`, or one near `data_dir`."""
    recorded = read_manifest(data_dir, check_shards=False)["tokenizer"]
    if tokenizer_dir is None:
        return _search(data_dir, recorded)
    path = tokenizer_dir / "tokenizer.json"
    if _matches(path, recorded):
        return tokenizer_dir
    what = "not the one" if path.is_file() else "not found, so not the one"
    raise ValueError(f"{path}: {what} that made {data_dir}; name that one's folder with --tokenizer_dir")


def _search(data_dir: Path, recorded: dict[str, Any]) -> Path:
    near = [folder / TOKENIZER_FOLDER / "tokenizer.json" for folder in (data_dir, data_dir.parent)]
    beside = sorted(data_dir.parent.glob("*/tokenizer.json"))
    elsewhere = [folder / "tokenizer.json" for folder in recorded_folder(data_dir, recorded)]
    for path in [*near, *beside, *elsewhere]:
        with contextlib.suppress(PermissionError):  # another user's folder
            if _matches(path, recorded):
                return path.parent
    missing = f"the tokenizer that made it is not in {near[0].parent}, nor in a folder beside {data_dir}"
    raise ValueError(f"{data_dir}: {missing}; name its folder with --tokenizer_dir")


def _matches(path: Path, recorded: dict[str, Any]) -> bool:
    is_readable = path.is_file() and path.stat().st_size <= MAX_JSON_BYTES
    return is_readable and is_tokenizer(path.read_bytes(), recorded["sha256"])


def recorded_folder(data_dir: Path, recorded: dict[str, Any]) -> list[Path]:
    """Return the folder from which the tokenizer made the shards, [] if the manifest's entry lacks it."""
    name = recorded.get("folder")
    # `TokenizerFacts.record` writes relative paths only; an absolute one could name a foreign network share
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        return []
    return [Path(os.path.normpath(data_dir.resolve() / name))]


def choose_tokenizer(data_dir: Path | None, tokenizer_dir: Path) -> Path:
    """Return the named folder, else that of the tokenizer that made the data, else the default folder."""
    path = tokenizer_dir / "tokenizer.json"
    if tokenizer_dir != DEFAULT_TOKENIZER_DIR:
        if path.is_file() or tokenizer_dir.is_file():  # other checks refuse a file
            return tokenizer_dir
        train = "train one there with prepare_data.py --train_tokenizer 4096"
        way_out = f"name a folder that has it with --tokenizer_dir, or {train}"
        raise FileNotFoundError(f"{path}: not found; {way_out}")
    if data_dir is None:
        return tokenizer_dir
    manifest, inside = data_dir / MANIFEST, data_dir / TOKENIZER_FOLDER
    recorded: Any = None
    with contextlib.suppress(ValueError, OSError):  # a damaged manifest may still have this entry
        recorded = read_json(manifest).get("tokenizer")
    if recorded is None or not fits(recorded, {"sha256": str}):
        if (inside / "tokenizer.json").is_file():
            return inside
        if manifest.is_file() and not path.is_file():
            way_out = "delete it, or name the tokenizer's folder with --tokenizer_dir"
            raise ValueError(f"{manifest}: damaged; {way_out}")
        return tokenizer_dir
    try:
        return _search(data_dir, recorded)
    except ValueError as error:
        if path.is_file() and tokenizer_dir.resolve() in recorded_folder(data_dir, recorded):
            return tokenizer_dir  # it was replaced since it made the shards, which are made again
        raise ValueError(f"{error}, or delete {manifest} to tokenize the text again") from None
