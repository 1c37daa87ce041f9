"""A data directory mixed from prepared ones: stories drawn in turn by weight, small sources repeated."""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from litgpt_moe import __version__
from litgpt_moe.cli import note
from litgpt_moe.data.foreign_tokenizer import carry_tokenizer
from litgpt_moe.data.forms import text_in
from litgpt_moe.data.inputs import relative_name
from litgpt_moe.data.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    RUN_AGAIN,
    Manifest,
    altered_shards,
    check_own,
    manifest_fingerprint,
    read_manifest,
)
from litgpt_moe.data.settings import SPLITS, PrepareSettings
from litgpt_moe.data.shards import clean
from litgpt_moe.data.tokenizer_folder import TOKENIZER_FOLDER, find_tokenizer
from litgpt_moe.files import check_no_links, fits, open_whole, write_json
from litgpt_moe.yaml_files import read_mapping

# Muennighoff et al. 2023 (arXiv 2305.16264): up to four passes are nearly as good as fresh text
MAX_PASSES = 4
SHARD_TOKENS = 8 << 20


@dataclass(frozen=True)
class Part:
    """A source of a mix: a prepared data directory and its weight, of a sum of 1."""

    folder: Path
    weight: float
    manifest: Manifest

    def tokens(self, split: str) -> int:
        """Return the tokens of a split."""
        return self.manifest["splits"][split]["n_tokens"]


def read_mix(words: list[str]) -> dict[str, float]:
    """Return name -> weight of `--mix a=0.7 b=0.3` or of a YAML file; ValueError for another form."""
    if len(words) == 1 and words[0].lower().endswith((".yaml", ".yml")):
        pairs = list(read_mapping(Path(words[0])).items())
    else:
        pairs = [(name, weight) for name, _, weight in (word.rpartition("=") for word in words)]
    weights: dict[str, float] = {}
    for name, value in pairs:
        try:
            weight = float(value)
        except (TypeError, ValueError):
            weight = math.nan
        if not name or name in weights or not 0 < weight < math.inf:
            raise ValueError(f"mix: {name}={value}; write each name once, with a weight above 0: NAME=0.7")
        weights[str(name)] = weight
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _places(name: str) -> list[Path]:
    return list(dict.fromkeys([Path(name), Path("data") / name, Path("data") / name.rpartition("/")[2]]))


def folder_of(name: str) -> Path | None:
    """Return the prepared data directory that a name of a mix means, None if there is none."""
    return next((folder for folder in _places(name) if (folder / MANIFEST).is_file()), None)


def open_parts(settings: PrepareSettings) -> list[Part]:
    """Return the sources of a mix; ValueError or FileNotFoundError if they do not go together."""
    parts = []
    for name, weight in read_mix(list(settings.mix)).items():
        if (folder := folder_of(name)) is None:
            places = " or ".join(str(place) for place in _places(name))
            raise FileNotFoundError(f"mix: {name}: no prepared data in {places}; prepare it first")
        if folder.resolve() == settings.data_dir.resolve():
            raise ValueError(f"mix: {folder} is the folder to be made; name another with --data_dir")
        parts.append(Part(folder, weight, read_manifest(folder)))
    first = parts[0]
    for part in parts[1:]:
        for key in ("sha256", "vocab_size", "bos_id", "eos_id"):
            if part.manifest["tokenizer"][key] != first.manifest["tokenizer"][key]:
                way_out = f"prepare {part.folder} with --tokenizer_dir {find_tokenizer(first.folder, None)}"
                raise ValueError(f"mix: {part.folder} and {first.folder} have other tokenizers; {way_out}")
    return parts


def make_mix(settings: PrepareSettings) -> Manifest:
    """Return the manifest of the mixed data directory, made anew unless it is of the same parts already."""
    data_dir, parts = settings.data_dir, open_parts(settings)
    check_own(data_dir)
    check_no_links(*(data_dir / place for split in SPLITS for place in (split, f"{split}/{split}")))
    if any(text_in(data_dir / split) for split in SPLITS):
        raise ValueError(f"{data_dir}: has text of its own; name another folder with --data_dir")
    made_of = [
        {
            "folder": relative_name(part.folder, data_dir),
            "weight": part.weight,
            "fingerprint": manifest_fingerprint(part.manifest),
        }
        for part in parts
    ]
    # a damaged one is made anew
    with contextlib.suppress(ValueError, OSError):
        before, keys = read_manifest(data_dir), made_of[0].keys()
        is_same = [{key: entry.get(key) for key in keys} for entry in before.get("mix", [])] == made_of
        if is_same and not altered_shards(data_dir, before):
            note(f"{data_dir}: is this mix already; nothing to do")
            return before
    totals = [part.tokens("train") / part.weight for part in parts]
    total = min(MAX_PASSES * min(totals), max(totals))
    wanted = [max(1, round(part.weight * total)) for part in parts]
    in_val = {_hash(ids) for part in parts for ids in _stories(part, "val")}
    train, drawn = _write(data_dir, "train", parts, _draw(parts, wanted, in_val))
    # all of each: its text is known to the byte, by which a loss is divided
    held_out = ((i, ids) for i, part in enumerate(parts) for ids in _stories(part, "val"))
    val, _ = _write(data_dir, "val", parts, held_out)
    for entry, part, count in zip(made_of, parts, drawn, strict=True):
        entry |= {"n_tokens": part.tokens("train"), "n_drawn": count, "passes": count / part.tokens("train")}
    first = parts[0].manifest
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": first["dtype"],
        "options": {},
        "code": {"litgpt_moe": __version__},
        "tokenizer": {key: first["tokenizer"][key] for key in ("sha256", "vocab_size", "bos_id", "eos_id")},
        "mix": made_of,
        "splits": {"train": train, "val": val},
    }
    carry_tokenizer(find_tokenizer(parts[0].folder, None), data_dir / TOKENIZER_FOLDER)
    write_json(data_dir / MANIFEST, manifest)
    clean(data_dir)
    return manifest


def _stories(part: Part, split: str) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the ids of each story of a split, in order."""
    facts = part.manifest["tokenizer"]
    dtype = np.dtype(part.manifest["dtype"]).newbyteorder("<")
    for entry in part.manifest["splits"][split]["shards"]:
        # not mapped: to touch what another program cuts off meanwhile would end the process with SIGBUS
        ids = np.fromfile(path := part.folder / entry["path"], dtype)
        if len(ids) != entry["n_tokens"]:
            raise OSError(f"{path}: cut short while it was read; {RUN_AGAIN}")
        # EOS before BOS, which may be the same token, or at the end; no story crosses a shard
        ends = np.flatnonzero((ids[:-1] == facts["eos_id"]) & (ids[1:] == facts["bos_id"])) + 1
        yield from np.split(ids, ends)


def _hash(ids: np.ndarray[Any, Any]) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=8).digest()


def _endless(part: Part, in_val: set[bytes]) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the training stories that no val split has, pass after pass."""
    n_new = 1
    while n_new:
        n_new = 0
        for story in _stories(part, "train"):
            if _hash(story) not in in_val:
                n_new += 1
                yield story
    raise ValueError(f"mix: every story of {part.folder} is in a val split of the mix too; leave it out")


def _draw(
    parts: list[Part], wanted: list[int], in_val: set[bytes]
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """Yield source and story, each time of the source furthest behind its share, until all have theirs."""
    drawn, stories = [0] * len(parts), [_endless(part, in_val) for part in parts]
    while True:
        behind = min(range(len(parts)), key=lambda i: drawn[i] / wanted[i])
        if drawn[behind] >= wanted[behind]:
            return
        story = next(stories[behind])
        drawn[behind] += len(story)
        yield behind, story


def _write(
    data_dir: Path, split: str, parts: list[Part], drawn: Iterator[tuple[int, np.ndarray[Any, Any]]]
) -> tuple[Manifest, list[int]]:
    """Write the shards of a split; return the manifest's entry of it, and the tokens of each source."""
    tokens, shards = [0] * len(parts), []
    waiting: list[np.ndarray[Any, Any]] = []
    n_waiting = 0

    def flush() -> None:
        nonlocal waiting, n_waiting
        data = np.concatenate(waiting).tobytes()
        digest = hashlib.sha256(data).hexdigest()
        name = f"{split}/{split}/{len(shards):05d}-{digest[:16]}.bin"
        with open_whole(data_dir / name) as file:
            file.write(data)
        shards.append(
            {"path": name, "sha256": digest, "n_tokens": n_waiting, "n_stories": len(waiting), "n_bytes": 0}
        )
        waiting, n_waiting = [], 0

    for source, story in drawn:
        waiting.append(story)
        n_waiting += len(story)
        tokens[source] += len(story)
        if n_waiting >= SHARD_TOKENS:
            flush()
    if waiting:
        flush()
    # of a part of a source the bytes are not known: in proportion to its tokens
    sources = [(part.manifest["splits"][split], count) for part, count in zip(parts, tokens, strict=True)]
    n_bytes = sum(round(entry["n_bytes"] * count / entry["n_tokens"]) for entry, count in sources)
    sums = {key: sum(shard[key] for shard in shards) for key in ("n_stories", "n_tokens")}
    sums |= {"n_bytes": n_bytes, "n_duplicates": 0, "n_replaced_bytes": 0}
    return {**sums, "text": [], "read": [], "shards": shards}, tokens


def changed_parts(data_dir: Path, manifest: Manifest) -> list[str]:
    """Return a sentence for each source that was prepared anew since it was mixed."""
    reasons = []
    for entry in manifest.get("mix", ()):
        # a network share in a foreign manifest would be sent this user's name
        if not fits(entry, {"folder": str, "fingerprint": str}) or PureWindowsPath(entry["folder"]).anchor:
            continue
        folder = data_dir / entry["folder"]
        if (folder / MANIFEST).is_file():
            now = manifest_fingerprint(read_manifest(folder, check_shards=False))
            if now != entry["fingerprint"]:
                reasons.append(f"{folder}: prepared anew since it was mixed")
    return reasons
