"""Texts, tokenizers and data directories for the tests of litgpt_moe.data."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from litgpt import Tokenizer

import prepare_data
from litgpt_moe.data.batches import TokenStream
from litgpt_moe.data.manifest import manifest_fingerprint, read_manifest
from litgpt_moe.files import sha256_file

SEPARATOR = "<|endoftext|>"
REFERENCE = "team/moe/stories:v3"


def make_text(n_stories: int, seed: int = 0) -> list[str]:
    """Return distinct stories of a few sentences."""
    rng = random.Random(seed)
    words = [
        "the",
        "a",
        "dog",
        "cat",
        "Tom",
        "Lily",
        "ran",
        "saw",
        "red",
        "ball",
        "and",
        "was",
        "happy",
        "home",
    ]
    return [
        f"Story {seed} {i}. " + " ".join(rng.choices(words, k=rng.randint(20, 60))) + "."
        for i in range(n_stories)
    ]


def write_text(path: Path, stories: list[str]) -> Path:
    """Write stories as TinyStories does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{story}\n{SEPARATOR}\n" for story in stories), encoding="utf-8", newline="")
    return path


def stories_of(
    data_dir: Path, tokenizer_dir: Path, split: str, load: Callable[[Path], Tokenizer] = Tokenizer
) -> list[str]:
    """Return the stories of a split, decoded by LitGPT's tokenizer from the shards' bytes."""
    tokenizer = load(tokenizer_dir)
    stream = TokenStream(data_dir, split)
    ids = stream.read(0, len(stream))
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    ends = np.flatnonzero(ids == tokenizer.eos_id) + 1
    return [tokenizer.decode(torch.from_numpy(part)) for part in np.split(ids, ends[:-1])]


def error_of(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Return the status and the one error line of a run of the script."""
    status = prepare_data.main([str(arg) for arg in args])
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return status, line


def change_tokenizer(source: Path, target: Path, **changes: object) -> Path:
    """Copy a tokenizer folder with some keys of tokenizer.json replaced."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    spec = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"] |= changes.pop("model", {})
    (target / "tokenizer.json").write_text(json.dumps(spec | changes), encoding="utf-8")
    return target


def fingerprint(data_dir: Path) -> str:
    """Return the fingerprint of a data directory."""
    return manifest_fingerprint(read_manifest(data_dir, check_shards=False))


def snapshot(data_dir: Path) -> dict[str, tuple[int, bytes]]:
    """Return time stamp and content of everything under a folder."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in data_dir.rglob("*") if p.is_file()}


def write_data(folder: Path, story: bytes = b"Once upon a time.", mtime_ns: int = 5) -> Path:
    """A small data directory with a whole manifest, and its tokenizer beside it."""
    files = {"train/a.txt": story, "train/train/00000.bin": b"\1\0\2\0", "val/val/00000.bin": b"\1\0"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    tokenizer = folder.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}", encoding="utf-8")

    def entry(name: str, **counts: int) -> dict[str, object]:
        return {"path": name, "sha256": sha256_file(folder / name), **counts}

    def split(shard: str, n_tokens: int, *text: dict[str, object]) -> dict[str, object]:
        counts = {"n_stories": 1, "n_tokens": n_tokens, "n_bytes": len(story)}
        mended = {"n_duplicates": 0, "n_replaced_bytes": 0}
        return {**counts, **mended, "text": [*text], "shards": [entry(shard, **counts)]}

    text = entry("train/a.txt", size=len(story), mtime_ns=mtime_ns)
    splits = {"train": split("train/train/00000.bin", 2, text), "val": split("val/val/00000.bin", 1)}
    facts = {"sha256": sha256_file(tokenizer / "tokenizer.json"), "vocab_size": 3, "bos_id": 1, "eos_id": 2}
    manifest = {"format_version": 1, "dtype": "uint16", "options": {}, "tokenizer": facts, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder
