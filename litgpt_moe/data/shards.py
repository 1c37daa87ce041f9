"""Stories -> token shards, made by worker processes; an interrupted run's finished shards are used again.

A worker process imports this module: it needs no torch, so that it is small and starts fast.
"""

import contextlib
import functools
import hashlib
import itertools
import re
from collections import Counter
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from litgpt_moe.cli import no_bar, note
from litgpt_moe.data.forms import Source
from litgpt_moe.data.hub_progress import HubProgress
from litgpt_moe.data.manifest import FORMAT_VERSION, MANIFEST, SHARD_FORM, Manifest, listed
from litgpt_moe.data.parquet import reader_of, text_bytes
from litgpt_moe.data.settings import SPLITS, PrepareSettings
from litgpt_moe.data.text import FileReader, Reading, SeenStories, nearest_cut
from litgpt_moe.data.tokenizer import StoryEncoder, TokenizerFacts
from litgpt_moe.data.workers import n_workers, start_pool
from litgpt_moe.files import check_inside, fits, open_whole, read_json, sha256_file, write_json

LONG_STORY = 10_000  # bytes; a longer one may be cut in two, for train and val
SHARD_BYTES = 8 << 20  # text per shard: the unit of work and of resuming; it bounds a worker's memory
STORIES_PER_WRITE = 1_000
SAMPLED_STORIES = 20  # on which a tokenizer is tried
OWN_FILE = re.compile(r"\d{5}-[0-9a-f]{16}\.(bin|json|\d+\.tmp)")  # no other files are deleted
Entry = dict[str, Any]  # a shard's entry in the manifest
encoder_of = functools.lru_cache(maxsize=1)(StoryEncoder)  # a worker makes many shards with one encoder


def write_shard(data_dir: Path, name: str, stories: list[bytes], facts: TokenizerFacts) -> Entry:
    """Write a shard whole, and its entry to a journal file beside it; return the entry."""
    encoder = encoder_of(facts)
    sha256, size, special = hashlib.sha256(), 0, Counter[str]()
    with open_whole(data_dir / name) as file:
        for some in itertools.batched(stories, STORIES_PER_WRITE):
            data = b"".join(encoder.pack([story.decode("utf-8") for story in some]))
            sha256.update(data)
            special += encoder.special_in(data, len(some))
            size += file.write(data)
    entry = {"path": name, "n_tokens": size // facts.dtype.itemsize, "n_stories": len(stories)}
    entry |= {"n_bytes": sum(map(len, stories)), "sha256": sha256.hexdigest()}
    entry |= {"special": dict(special)} if special else {}  # in the text itself, as "</s>"
    write_json((data_dir / name).with_suffix(".json"), entry)
    return entry


def finished_shards(data_dir: Path, width: int) -> dict[str, Entry]:
    """Return the entries of whole shards by key, from the manifest and an interrupted run's journal."""
    found = {}
    for path in (data_dir / MANIFEST, *data_dir.glob("*/*/*.json")):
        # the shard of a damaged entry is made again
        with contextlib.suppress(ValueError, KeyError, TypeError):
            content = read_json(path)
            for entry in listed(content, "shards") if path.name == MANIFEST else [content]:
                if not fits(entry, SHARD_FORM):
                    continue
                shard, size = data_dir / check_inside(entry["path"]), entry["n_tokens"] * width
                if OWN_FILE.fullmatch(shard.name) and shard.is_file() and shard.stat().st_size == size:
                    found[shard.stem[6:]] = entry  # its name is number-key.bin
    return found


def hash_of(story: bytes) -> bytes:
    """Return the 64 bits by which a story is known."""
    return hashlib.blake2b(story, digest_size=8).digest()


@dataclass(frozen=True)
class ValShare:
    """Which stories are set aside for validation where there is no text for it."""

    fraction: float
    n_bytes: int
    """Of the whole text."""

    def takes(self, number: int) -> bool:
        """Return whether a story goes to val: the first of every few, so that a small corpus has one too."""
        return number % max(2, round(1 / self.fraction)) == 0

    def cut(self, story: bytes) -> list[bytes]:
        """Return the story, or, where it is a book, the share of it for val and what is left for train."""
        share = round(self.fraction * self.n_bytes)
        if len(story) <= max(LONG_STORY, share):
            return [story]
        text = story.decode("utf-8")
        end = nearest_cut(text, max(1, share * len(text) // len(story)))
        return [part.encode("utf-8") for part in map(str.strip, (text[:end], text[end:])) if part]


class SplitWriter:
    """Assigns stories to the splits, without duplicates, and submits a shard whenever there are enough."""

    def __init__(self, data_dir: Path, facts: TokenizerFacts, workers: int, val: ValShare | None) -> None:
        self.data_dir, self.facts, self.workers, self.val = data_dir, facts, workers, val
        self.n_duplicates: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self.n_new = self.n_reused_bytes = 0
        self._seen = SeenStories()
        self._finished = finished_shards(data_dir, facts.dtype.itemsize)
        # stories that belong to no shard yet, each with its hash
        self._waiting: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in SPLITS}
        self._shards: dict[str, list[Entry | Future[Entry]]] = {split: [] for split in SPLITS}
        self._submitted: list[Future[Entry]] = []

    def add(self, split: str, stories: list[str], pool: Executor) -> None:
        """Add stories from the text of one split."""
        encoded = [story.encode("utf-8") for story in stories]
        hashes = [hash_of(story) for story in encoded]
        is_new = self._seen.add(np.frombuffer(b"".join(hashes), dtype="<u8")).tolist()
        self.n_duplicates[split] += is_new.count(False)
        for item in itertools.compress(zip(encoded, hashes, strict=True), is_new):
            if self.val is None or not self.val.takes(self.n_new):
                self._waiting[split].append(item)
            else:
                for name, part in zip(("val", split), self.val.cut(item[0]), strict=False):
                    self._waiting[name].append((part, hash_of(part)))
            self.n_new += 1
        for name, waiting in self._waiting.items():
            if sum(len(story) for story, _ in waiting) >= SHARD_BYTES:
                self._flush(name, pool)

    def settle(self, pool: Executor) -> dict[str, list[Entry]]:
        """Submit what waits, wait until all is written, and return the entries of each split."""
        for split, waiting in self._waiting.items():
            if waiting:
                self._flush(split, pool)
        for shards in self._shards.values():
            shards[:] = [s.result() if isinstance(s, Future) else s for s in shards]
        self._submitted.clear()
        return {split: [s for s in some if isinstance(s, dict)] for split, some in self._shards.items()}

    def note(self, progress: HubProgress, pool: Executor) -> None:
        """Note what has come of the text so far."""
        state = {"shards": self.settle(pool), "n_new": self.n_new, "n_duplicates": self.n_duplicates}
        progress.note(state, self._seen.runs())

    def go_on(self, progress: HubProgress) -> None:
        """Go on from what was noted, if there is anything."""
        seen = SeenStories()
        if (state := progress.load(seen.add)) is None:
            return
        self.n_new, self.n_duplicates = state["n_new"], state["n_duplicates"]
        self._shards = {split: list(state["shards"][split]) for split in SPLITS}
        self.n_reused_bytes = sum(entry["n_bytes"] for some in state["shards"].values() for entry in some)
        self._seen = seen

    def _flush(self, split: str, pool: Executor) -> None:
        """Submit the next shard, unless the same tokenizer has made one of the same stories."""
        stories, hashes = map(list, zip(*self._waiting[split], strict=True))
        self._waiting[split] = []
        facts, shards = self.facts, self._shards[split]
        made_by = f"{FORMAT_VERSION} {facts.dtype.name} {facts.bos_id} {facts.eos_id} {facts.sha256}"
        key = hashlib.blake2b(b"".join(hashes) + made_by.encode(), digest_size=8).hexdigest()
        made = self._finished.get(key)
        if made and sha256_file(self.data_dir / made["path"]) == made["sha256"]:
            shards.append(made)
            self.n_reused_bytes += made["n_bytes"]
            return
        if len(self._submitted) >= self.workers:  # memory holds no more text than the workers work on
            self._submitted[-self.workers].result()
        # with the key in its name a new shard never overwrites one that the present manifest lists
        name = f"{split}/{split}/{len(shards):05d}-{key}.bin"
        self._submitted.append(pool.submit(write_shard, self.data_dir, name, stories, facts))
        shards.append(self._submitted[-1])


def write_splits(
    settings: PrepareSettings, text: dict[str, list[Source]], facts: TokenizerFacts
) -> tuple[Manifest, list[FileReader]]:
    """Write the shards of both splits; return the manifest's entry of each split, and what read the files."""
    data_dir, reading = settings.data_dir, Reading.of(settings)
    # val first: a story of both splits then counts as a duplicate in train
    readers = {split: [reader_of(source, reading) for source in text[split]] for split in reversed(SPLITS)}
    total = sum(reader.size for some in readers.values() for reader in some)
    workers = n_workers(settings.workers, total // SHARD_BYTES)
    val = None if text["val"] else ValShare(settings.val_fraction, text_bytes(text["train"], settings))
    writer = SplitWriter(data_dir, facts, workers, val)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=no_bar())
    is_on_hub = any(source.on_hub for source in text["train"])
    hub = HubProgress(settings, facts, readers) if is_on_hub else None
    with start_pool(workers) as pool, bar as progress:
        shards = _write_all(readers, writer, pool, progress, hub)
    if writer.n_reused_bytes:
        note(f"{writer.n_reused_bytes:,} bytes of text were in finished shards, which are kept")
    if hub:
        hub.end()
    splits: Manifest = {}
    for split in SPLITS:
        if not shards[split]:
            clean(data_dir)
            raise ValueError(_no_story(data_dir, split, settings.separator, writer.n_duplicates[split]))
        counts = ("n_stories", "n_tokens", "n_bytes")
        splits[split] = {
            **{key: sum(shard[key] for shard in shards[split]) for key in counts},
            "n_duplicates": writer.n_duplicates[split],
            "n_replaced_bytes": sum(reader.n_replaced_bytes for reader in readers[split]),
            # what a command named by its PATH does not travel with the data directory: "read"
            "text": [reader.record() for reader in readers[split] if reader.source.is_own],
            "read": [reader.record() for reader in readers[split] if not reader.source.is_own],
            "shards": shards[split],
        }
    if not text["val"]:
        share = splits["val"]["n_bytes"] / sum(split["n_bytes"] for split in splits.values())
        note(f"{data_dir / 'val'}: no text; {share:.2%} of the text was set aside for it (--val_fraction)")
    return splits, [reader for some in readers.values() for reader in some]


def _write_all(
    readers: dict[str, list[FileReader]],
    writer: SplitWriter,
    pool: Executor,
    progress: "tqdm[Any]",
    hub: HubProgress | None,
) -> dict[str, list[Entry]]:
    """Write the stories of all files, val first, and return the entries of each split."""
    if hub:
        writer.go_on(hub)
    for split in readers:
        for reader in readers[split]:
            if hub and hub.is_done(reader):
                progress.update(reader.size)
                continue
            for stories in reader.story_lists(progress):
                writer.add(split, stories, pool)
            if hub and hub.end_file(reader):
                writer.note(hub, pool)
    return writer.settle(pool)


def check_stories(settings: PrepareSettings, text: dict[str, list[Source]]) -> list[str]:
    """Return some stories; ValueError if the beginning of a text shows that it cannot be used."""
    n_wanted = {"train": 1 if text["val"] else 2, "val": 1}
    found: dict[str, None] = {}  # in their order
    for split in filter(text.get, reversed(SPLITS)):
        found = {}
        for source in text[split]:
            if source.on_hub and len(found) >= n_wanted[split]:
                break  # a look into each would take a request for each
            reader = reader_of(source, Reading.of(settings, is_quiet=True))
            for stories in reader.story_lists(tqdm(disable=True)):
                # no more than are wanted of any of thousands of files: a list may be megabytes of text
                new = (story for story in stories if len(found) < SAMPLED_STORIES)
                found.update(dict.fromkeys(new))
                if len(found) >= n_wanted[split]:
                    break
        is_book = any(len(story) > LONG_STORY for story in found)  # which is cut for both splits
        if len(found) < (1 if is_book else n_wanted[split]):
            raise ValueError(_no_story(settings.data_dir, split, settings.separator, 0))
    return list(itertools.islice(found, SAMPLED_STORIES))


def _no_story(data_dir: Path, split: str, separator: str, n_duplicates: int) -> str:
    if split == "train" and n_duplicates:
        lack = f"no story for the train split that val does not have too ({n_duplicates:,} dropped)"
        return f"{data_dir}: {lack}; give it other text"
    end = f"end each story by a line {separator!r} (--separator names another, '' splits at blank lines)"
    return f"{data_dir}: no story for the {split} split; give more text, or {end}"


def clean(data_dir: Path) -> None:
    """Delete our own files that the manifest does not list: old shards, journals, temporary files."""
    keep: set[Path] = set()
    with contextlib.suppress(ValueError, KeyError, TypeError):  # no manifest, or a damaged one
        keep = {data_dir / entry["path"] for entry in listed(read_json(data_dir / MANIFEST), "shards")}
    for folder in (data_dir / split / split for split in SPLITS):
        for path in folder.glob("*"):
            if OWN_FILE.fullmatch(path.name) and path not in keep:
                # Windows refuses while a training run has the file open; the next preparation deletes it
                with contextlib.suppress(OSError):
                    path.unlink()
