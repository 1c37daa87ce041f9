"""Turn text into token shards that training reads directly, and hold the reader of those shards.

Run: uv run python prepare_data.py --dataset demo --train_tokenizer 2048      (3 s on two cores)

Text: *.txt in data/custom_text/{train,val}/, UTF-8. A file may hold many stories, split by a line
<|endoftext|> (or --separator); a file without that line is one story. Every story becomes BOS + ids + EOS
in a flat array of ids; manifest.json says what made it, and shards that no longer match are made again.
"""

import argparse
import bisect
import codecs
import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from litgpt_moe.cli import RUN_TRAIN, FlagParser, command_line, hear_ctrl_c, note, run_script
from litgpt_moe.files import (
    FolderInUse,
    FolderLock,
    check_inside,
    is_outside,
    open_whole,
    read_json,
    sha256_file,
    write_json,
    write_whole,
)
from litgpt_moe.processes import is_first_on_machine
from wandb_dataset import add_wandb_flags, push_from_flags

if TYPE_CHECKING:
    import torch
    from litgpt.data import TextFiles
    from torch.utils.data import DataLoader

SPLITS = ("train", "val")
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
RUN_AGAIN = "run prepare_data.py on that folder"
SHARD_BYTES = 8 << 20  # text per shard: the unit of work, of resuming, and of a worker's memory
BLOCK_BYTES = 4 << 20  # text read at once
MAX_STORY_CHARS = 1 << 20  # a longer story is cut at a paragraph, or it would have to fit in memory
MAX_REPORTS = 10  # lines of bad UTF-8 shown of one file
BAD_BYTES = re.compile("[\udc80-\udcff]+")  # how "surrogateescape" shows bytes that are not UTF-8
OPTIONS = ("separator", "on_bad_utf8", "val_fraction")  # what makes other shards of the same text
OWN_FILE = re.compile(r"\d{5}-[0-9a-f]{16}\.(bin|json|\d+\.tmp)")  # what we may delete

SPACE = "\u2581"  # how Llama's tokenizer writes a space
LLAMA_NORMALIZER = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
SPLIT_AT_SPACES = pre_tokenizers.Split(SPACE, "merged_with_next")
BYTE_PIECES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}  # ids where LitGPT's decoder expects them
NOT_PLAIN_BPE = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
# what BPE can encode one by one: a word with the spaces before it, spaces at the end, a newline
PIECE = r" *[^ \n]+| +|\n"
PIECE_OF_SPLIT = r" ?[^ \n]+| |\n"  # after SPLIT_AT_SPACES: with one space at most
WORD = (
    rf"{SPACE}?\p{{L}}+(?:['\u2019]\p{{L}}+)?|{SPACE}?\p{{N}}|{SPACE}?[^{SPACE}\s\p{{L}}\p{{N}}]+|{SPACE}|\n"
)
MAX_CACHED_PIECES = 100_000  # some 20 MB a worker
MAX_CACHED_CHARS = 40
STORIES_PER_WRITE = 1_000
MIN_VOCAB = 320  # 3 special pieces, 256 bytes, and letters
TRAINED_BY_US = "trained_vocab_size"  # key in tokenizer_config.json: the size that was asked for
MAX_TRAINING_BYTES = 100 << 20  # of text for a tokenizer; more hardly changes it

DATASETS = ("custom", "tinystories", "demo")
ON_BAD_UTF8 = ("replace", "refuse")
TINYSTORIES = ("roneneldan/TinyStories", {"train": "TinyStories-train.txt", "val": "TinyStories-valid.txt"})
TOKENIZER_REPO = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
PRONOUNS = {"girl": ("she", "her", "her", "herself"), "boy": ("he", "him", "his", "himself")}
GRAMMAR = Path(__file__).parent / "configs" / "demo_stories.yaml"
DEMO_MODEL = GRAMMAR.with_name("demo_model.yaml")


@dataclass
class PrepareSettings:
    """What one run prepares; the flags of the command line are these fields."""

    data_dir: Path = Path("data/custom_text")
    """folder with train/*.txt and, if wanted, val/*.txt; shards and manifest.json go there too"""
    dataset: str = "custom"
    """custom: your own text; tinystories: download it (2.2 GB); demo: write the built-in stories"""
    tokenizer_dir: Path = Path("data/tokenizer")
    """folder of tokenizer.json; TinyLlama's is downloaded into it if it has none"""
    train_tokenizer: int | None = None
    """pieces of a BPE tokenizer to train on the text (default: train none)"""
    separator: str = "<|endoftext|>"
    """line between two stories; '' splits at blank lines"""
    on_bad_utf8: str = "replace"
    """replace bytes that are not UTF-8 by U+FFFD, or refuse them; both report file and line"""
    val_fraction: float = 0.01
    """share of the stories for the val split if there is no val/*.txt"""
    workers: int = 0
    """processes that tokenize, about 100 MB each (0: one per core)"""
    demo_stories: int = 9_000
    """stories to write with --dataset demo (0.7 KB each)"""
    seed: int = 42
    """seed of the demo stories"""
    overwrite: bool = False
    """replace another tokenizer in tokenizer_dir, or an edited demo.txt"""


def check_settings(settings: PrepareSettings) -> None:
    """ValueError with all that is wrong with the settings, before anything is written."""
    s, vocab = settings, settings.train_tokenizer
    rules = (
        ("dataset", s.dataset in DATASETS, f"one of {', '.join(DATASETS)}"),
        ("on_bad_utf8", s.on_bad_utf8 in ON_BAD_UTF8, f"one of {', '.join(ON_BAD_UTF8)}"),
        ("val_fraction", 0 < s.val_fraction <= 0.5, "a number above 0, at most 0.5"),
        ("train_tokenizer", vocab is None or vocab >= MIN_VOCAB, f"{MIN_VOCAB} pieces or more"),
        ("workers", s.workers >= 0, "0 (one per core) or more"),
        ("demo_stories", s.demo_stories >= 2, "2 or more"),
        ("separator", len(s.separator.splitlines()) <= 1, "the text of one line"),
    )
    problems = [f"{name} is {getattr(settings, name)!r}; choose {rule}" for name, ok, rule in rules if not ok]
    problems += [
        f"{folder}: a file; name a folder with --{name}"
        for name in ("data_dir", "tokenizer_dir")
        if (folder := getattr(settings, name)).exists() and not folder.is_dir()
    ]
    if problems:
        raise ValueError("\n".join(problems))


# --- text -> stories ---------------------------------------------------------------------------------------


def list_text(data_dir: Path) -> dict[str, list[Path]]:
    """Return the text files of both splits; an error where there is nothing to train on."""
    text = {split: sorted((data_dir / split).glob("*.txt")) for split in SPLITS}
    train = data_dir / "train"
    if not text["train"]:
        missing = f"{train}: no .txt file there" if data_dir.is_dir() else f"{data_dir}: no such folder"
        way_out = (
            f"put UTF-8 text into {train}/*.txt, or fetch some with prepare_data.py --dataset demo "
            "or --dataset tinystories"
        )
        raise FileNotFoundError(f"{missing}; {way_out}")
    for path in text["train"] + text["val"]:
        if not path.is_file():
            raise ValueError(f"{path}: not a file; move it away, or put the text itself there")
        if path.stat().st_size < 1 << 16 and not path.read_bytes().strip():
            raise ValueError(f"{path}: empty; put text into it or remove it")
    if (train / "demo.json").is_file() and len(text["train"]) > 1:
        mixed = f"{train}: the demo corpus (demo.txt, demo.json) is beside other text"
        raise ValueError(f"{mixed}; remove those two files, or use another --data_dir")
    return text


def cut_story(text: str) -> int:
    """Return where to cut an overlong story: at a paragraph, a line, a word, or anywhere."""
    ends = (text.rfind(mark, MAX_STORY_CHARS // 2, MAX_STORY_CHARS) for mark in ("\n\n", "\n", " "))
    return next((end for end in ends if end > 0), MAX_STORY_CHARS)


class TextReader:
    """A text file read in blocks, as lists of whole stories; counts what was wrong with it."""

    def __init__(self, path: Path, separator: str, on_bad_utf8: str, quiet: bool = False) -> None:
        self.path, self.on_bad_utf8, self.report = path, on_bad_utf8, (lambda _: None) if quiet else note
        line = re.escape(separator) + r"[ \t]*" if separator else ""
        self.separator = re.compile(rf"\n[ \t]*{line}(?=\n)")
        self.stat = path.stat()
        self.sha256 = hashlib.sha256()
        self.n_replaced_bytes = self.n_bad_lines = self.n_cuts = 0

    def story_lists(self, progress: tqdm) -> Iterator[list[str]]:
        """Yield the stories in order, stripped and never empty, some megabytes at a time."""
        carry = "\n"
        for block in self._blocks(progress):
            *stories, carry = self.separator.split(carry + block)
            while len(carry) > MAX_STORY_CHARS:
                end = cut_story(carry)
                stories.append(carry[:end])
                carry = carry[end:]
                self.n_cuts += 1
            yield [story for story in map(str.strip, stories) if story]
        yield [carry.strip()] if carry.strip() else []
        if self.n_bad_lines > MAX_REPORTS:
            self.report(f"{self.path}: {self.n_bad_lines - MAX_REPORTS} more lines that are not UTF-8")
        if self.n_cuts:
            long = f"stories of over {MAX_STORY_CHARS:,} characters"
            self.report(f"{self.path}: {long} were cut {self.n_cuts} times")

    def record(self, data_dir: Path) -> dict:
        """Return the manifest's entry of the file read; ValueError if it was written to meanwhile."""
        size, mtime_ns = self.stat.st_size, self.stat.st_mtime_ns
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (size, mtime_ns):
            raise ValueError(f"{self.path}: changed while it was read; run again when it is complete")
        name = self.path.relative_to(data_dir).as_posix()
        return {"path": name, "size": size, "mtime_ns": mtime_ns, "sha256": self.sha256.hexdigest()}

    def _blocks(self, progress: tqdm) -> Iterator[str]:
        # "-sig" drops the mark that Windows editors put first; "surrogateescape" keeps what is not UTF-8
        decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        decode = io.IncrementalNewlineDecoder(decoder, translate=True).decode
        n_lines = 0
        with self.path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ValueError(f"{self.path}: UTF-16 text; save it as UTF-8")
            file.seek(0)
            while chunk := file.read(BLOCK_BYTES):
                self.sha256.update(chunk)
                progress.update(len(chunk))
                text = decode(chunk)
                yield self._mend(text, n_lines + 1)
                n_lines += text.count("\n")
        yield self._mend(decode(b"", final=True), n_lines + 1) + "\n"

    def _mend(self, text: str, first_line: int) -> str:
        with contextlib.suppress(UnicodeEncodeError):
            text.encode("utf-8")  # fails on escaped bytes, in a fraction of the time of looking for them
            return text
        for number, line in enumerate(text.split("\n"), first_line):
            if not (n_bytes := sum(map(len, BAD_BYTES.findall(line)))):
                continue
            where = f"{self.path}:{number}: {n_bytes} bytes are not UTF-8"
            if self.on_bad_utf8 == "refuse":
                raise ValueError(f"{where}; mend the file, or replace them with --on_bad_utf8 replace")
            self.n_replaced_bytes += n_bytes
            self.n_bad_lines += 1
            if self.n_bad_lines <= MAX_REPORTS:
                self.report(f"{where}, replaced by U+FFFD")
        return BAD_BYTES.sub("\ufffd", text)


class SeenStories:
    """The 64-bit hashes of all stories so far: 8 bytes a story, a false match once in 10^7 at 2 million."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []  # sorted, each at least twice as long as the next

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Return which of the hashes are new, as booleans, and remember them."""
        new = np.zeros(len(hashes), dtype=bool)
        new[np.unique(hashes, return_index=True)[1]] = True
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            new &= run[at] != hashes
        if new.any():
            self._runs.append(np.sort(hashes[new]))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]), kind="stable")]
        return new


# --- named data sets: demo, tinystories ---------------------------------------------------------------------


class StoryTeller:
    """Tells stories by the grammar of configs/demo_stories.yaml; the same seed tells the same stories."""

    SLOT = re.compile(r"\{(\w+)\}")

    def __init__(self, grammar: Path, seed: int) -> None:
        content = yaml.safe_load(grammar.read_text(encoding="utf-8"))
        self.cast, self.words = content["cast"], content["words"]
        self.phrases = {name: text.splitlines() for name, text in content["phrases"].items()}
        self.arcs = [[p.split("\n\n") for p in text.split("\n//\n")] for text in content["arcs"].values()]
        self._random = random.Random(seed)
        self._bound: dict[str, str] = {}

    def story(self) -> str:
        """Return one story, its characters and things the same from start to end."""
        number = self._random.randrange(len(self.arcs))
        self._bound = self._cast_of(number)
        told = (
            [self._fill(self._random.choice(lines.strip().split("\n"))) for lines in part]
            for part in self.arcs[number]
        )
        text = "\n".join(" ".join(filter(None, sentences)) for sentences in told)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

    def _cast_of(self, number: int) -> dict[str, str]:
        """Return the characters' names, kinds and pronouns, always the same ones for an arc.

        A small model learns which story has which heroes within the demo's thousand steps; to carry any name
        from the first line to the last takes it several times as many.
        """
        choose = random.Random(number).choice
        hero_is, friend_is = choose(("girl", "boy")), choose(("girl", "boy"))
        hero, parent = choose(self.cast[hero_is]), choose(self.cast["parent"])
        friend = choose([name for name in self.cast[friend_is] if name != hero])
        bound = {"hero": hero, "friend": friend, "parent": parent, "kind": hero_is, "friend_kind": friend_is}
        if number % 3 == 0:  # an animal, and so are its friends
            bound |= {"kind": choose(self.cast["animal"]), "friend_kind": choose(self.cast["animal"])}
        parent_is = "girl" if parent in ("Mom", "Grandma") else "boy"
        for prefix, is_ in (("", hero_is), ("friend_", friend_is), ("parent_", parent_is)):
            for slot, word in zip(PRONOUNS["boy"], PRONOUNS[is_], strict=True):
                bound[prefix + slot] = word
        return bound

    def _fill(self, line: str) -> str:
        return "" if line == "-" else self.SLOT.sub(lambda slot: self._value(slot[1]), line)

    def _value(self, slot: str) -> str:
        name = slot[0].lower() + slot[1:]
        if name in self.phrases:
            value = self._fill(self._random.choice(self.phrases[name]))
        else:
            value = self._bound.get(name) or self._draw(name)
        return value[0].upper() + value[1:] if slot[0].isupper() and value else value

    def _draw(self, name: str) -> str:
        first, value = name.rstrip("2"), None
        while value in (None, self._bound.get(first), self._bound.get(first + "2")):
            value = self._fill(self._random.choice(self.words[first]))
        self._bound[name] = value
        return value


def refuse_other_text(data_dir: Path, dataset: str, own: dict[str, str]) -> None:
    """ValueError if the folders of a named data set hold other text, which would be mixed with it."""
    text = [path for split in SPLITS for path in sorted((data_dir / split).glob("*.txt"))]
    if other := next((path for path in text if path.name != own.get(path.parent.name)), None):
        raise ValueError(
            f"{other}: other text is there already; give --dataset {dataset} a folder of its own "
            "with --data_dir, or leave --dataset out to use that text"
        )


def write_demo_corpus(
    data_dir: Path, n_stories: int = PrepareSettings.demo_stories, seed: int = 42, overwrite: bool = False
) -> Path:
    """Return train/demo.txt with that many stories; written if it is not there as asked for."""
    path, about = data_dir / "train" / "demo.txt", data_dir / "train" / "demo.json"
    refuse_other_text(data_dir, "demo", {"train": path.name})
    asked = {"n_stories": n_stories, "seed": seed, "grammar_sha256": sha256_file(GRAMMAR)}
    if path.is_file():
        written, sha256 = read_json(about), sha256_file(path)
        if written == asked | {"sha256": sha256}:
            return path
        if written.get("sha256") != sha256 and not overwrite:
            raise ValueError(f"{path}: edited since it was written; --overwrite writes the demo stories anew")
    note(f"writing {n_stories:,} stories to {path}")
    teller = StoryTeller(GRAMMAR, seed)
    text = "".join(f"{teller.story()}\n<|endoftext|>\n" for _ in range(n_stories))
    path.unlink(missing_ok=True)  # in this order a run that is killed here leaves nothing that looks edited
    write_json(about, asked | {"sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()})
    write_whole(path, text)
    return path


def download(repo: str, repo_type: str, name: str, folder: Path, way_out: str) -> None:
    """Fetch a file of a hub repository into `folder`; an interrupted download goes on where it stopped."""
    import httpx
    from huggingface_hub import constants, hf_hub_download  # read HF_ENDPOINT, HF_HUB_OFFLINE when imported

    note(f"downloading {name} of {repo} to {folder}")
    part = folder / ".download"
    try:
        path = hf_hub_download(repo, name, repo_type=repo_type, local_dir=part)
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        if not any(part.rglob("*.incomplete")):  # nothing to go on from
            shutil.rmtree(part, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        if isinstance(error, RuntimeError) and "closed" in reason:
            reason = "no connection to it"  # huggingface_hub 1.3 then tries again with a client it closed
        where = f"{name} of {repo} could not be downloaded from {constants.ENDPOINT}"
        raise ConnectionError(f"{where} ({reason}); {way_out}") from error
    Path(path).replace(folder / name)
    shutil.rmtree(part)


def download_tinystories(data_dir: Path) -> None:
    """Fetch the two text files of TinyStories that are not there yet."""
    repo, names = TINYSTORIES
    refuse_other_text(data_dir, "tinystories", names)
    way_out = (
        "run again to go on where it stopped, set HF_ENDPOINT to a mirror, "
        f"or put text of your own into {data_dir / 'train'} and leave out --dataset"
    )
    for split, name in names.items():
        if not (data_dir / split / name).is_file():
            download(repo, "dataset", name, data_dir / split, way_out)


# --- tokenizer ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerFacts:
    """What the shards and the processes that write them need to know of a tokenizer."""

    folder: Path
    sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    special_pieces: tuple[str, ...]
    piece: str | None
    """Regular expression of the pieces of text that can be encoded one by one, if there is one."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest little-endian type that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


def tokenizer_sha256(tokenizer_dir: Path) -> str:
    """Return the SHA-256 of tokenizer.json."""
    path = tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; name a folder that has it with --tokenizer_dir")
    return sha256_file(path)


def read_tokenizer(tokenizer_dir: Path) -> TokenizerFacts:
    """Return the facts as litgpt.Tokenizer finds them; ValueError where LitGPT would trip."""
    paths = [tokenizer_dir / name for name in ("tokenizer_config.json", "generation_config.json")]
    others = (sha256_file(path) if path.is_file() else None for path in paths)
    return _read_tokenizer(tokenizer_dir, tokenizer_sha256(tokenizer_dir), *others)


@functools.cache  # a run asks four times, and 32,000 pieces are read in a tenth of a second
def _read_tokenizer(tokenizer_dir: Path, sha256: str, *_: str | None) -> TokenizerFacts:
    path, config_path = tokenizer_dir / "tokenizer.json", tokenizer_dir / "tokenizer_config.json"
    spec, config = read_json(path), read_json(config_path)
    generation = read_json(tokenizer_dir / "generation_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer ({error}); replace the file") from None
    if config_path.is_file() and not isinstance(config.get("tokenizer_class"), str):
        raise ValueError(f"{config_path}: no tokenizer_class, which LitGPT needs; add it")
    ids = {}
    for key in ("bos", "eos"):
        token = config.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        ids[key] = generation.get(f"{key}_token_id") if token is None else tokenizer.token_to_id(str(token))
        if type(ids[key]) is not int or not 0 <= ids[key] < tokenizer.get_vocab_size():
            way_out = f"{key}_token must name a piece of {path.name}"
            raise ValueError(f"{config_path}: no {key.upper()} id; {way_out}")
    for key in ("added_tokens", "pre_tokenizer", "normalizer"):
        if key not in spec:
            raise ValueError(f"{path}: no {key}; replace the file by a whole one")
    special_pieces = tuple(token["content"] for token in spec["added_tokens"])
    bare, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    piece = None
    if can_split_at_spaces(spec) and whole in (bare, [ids["bos"], *bare], [ids["bos"], *bare, ids["eos"]]):
        piece = PIECE_OF_SPLIT if spec["pre_tokenizer"] else PIECE
    size = tokenizer.get_vocab_size()
    return TokenizerFacts(tokenizer_dir, sha256, size, ids["bos"], ids["eos"], special_pieces, piece)


def can_split_at_spaces(spec: dict) -> bool:
    """Return whether BPE gives the same ids when the text is first split before spaces and around newlines.

    True for Llama's tokenizer: spaces become "\u2581", and no merge makes a piece with "\u2581" after another
    character or with a newline in it, so no merge ever joins the two sides of such a place.
    """
    model = spec["model"]
    return (
        model["type"] == "BPE"
        and not any(model.get(key) for key in NOT_PLAIN_BPE)
        and not (spec.get("truncation") or spec.get("padding"))
        and spec["normalizer"] == json.loads(LLAMA_NORMALIZER.__getstate__())
        and spec["pre_tokenizer"] in (None, json.loads(SPLIT_AT_SPACES.__getstate__()))
        # else unknown characters side by side would become one
        and bool(model.get("byte_fallback") and BYTE_PIECES.keys() <= model["vocab"].keys())
        and not any(SPACE in token["content"] or " " in token["content"] for token in spec["added_tokens"])
        and not any(SPACE in p.lstrip(SPACE) or ("\n" in p and p != "\n") for p in model["vocab"])
    )


class PieceCache(dict[str, bytes]):
    """The bytes of a piece's ids; what is missing is encoded."""

    def __init__(self, facts: TokenizerFacts) -> None:
        # the model alone, without normalizer and the rest, takes half of the time
        self.model = Tokenizer.from_file(str(facts.folder / "tokenizer.json")).model
        self.dtype = facts.dtype

    def __missing__(self, piece: str) -> bytes:
        ids = [token.id for token in self.model.tokenize(piece.replace(" ", SPACE))]
        packed = np.array(ids, self.dtype).tobytes()
        if len(piece) <= MAX_CACHED_CHARS:
            if len(self) >= MAX_CACHED_PIECES:
                self.clear()  # the frequent pieces are back after a moment
            self[piece] = packed
        return packed


class StoryEncoder:
    """Text -> ids exactly as litgpt.Tokenizer.encode(text, bos=True, eos=True), many times as fast.

    One difference: a text that itself ends with EOS keeps it, where LitGPT drops it.
    """

    def __init__(self, facts: TokenizerFacts) -> None:
        self.facts = facts
        self._bos, self._eos = (np.array([i], facts.dtype).tobytes() for i in (facts.bos_id, facts.eos_id))
        self._find_pieces = re.compile(facts.piece or "").findall
        self.pieces = PieceCache(facts) if facts.piece else None

    @functools.cached_property  # most text never needs it
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.facts.folder / "tokenizer.json"))

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, BOS first and EOS last."""
        return np.frombuffer(b"".join(self.pack([text])), self.facts.dtype).astype(np.int64)

    def pack(self, stories: list[str]) -> list[bytes]:
        """Return the ids of each story as the bytes of a shard."""
        if self.pieces is not None:
            return [self._pack_pieces(story) for story in stories]
        return [self._close(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(stories)]

    def _pack_pieces(self, text: str) -> bytes:
        # a special piece spelled in the text is cut out before normalization; rare, so left to the library
        if not text or any(piece in text for piece in self.facts.special_pieces):
            return self._close(self._tokenizer.encode(text).ids)
        # the space in front is the one that the normalizer prepends; it maps "\u2581" and " " to the same
        pieces = self._find_pieces(" " + (text.replace(SPACE, " ") if SPACE in text else text))
        return b"".join([self._bos, *map(self.pieces.__getitem__, pieces), self._eos])

    def _close(self, ids: list[int]) -> bytes:
        bos, eos = self.facts.bos_id, self.facts.eos_id
        ids = ids if ids[:1] == [bos] else [bos, *ids]
        ids = ids if len(ids) > 1 and ids[-1] == eos else [*ids, eos]
        return np.array(ids, self.facts.dtype).tobytes()


def train_tokenizer(settings: PrepareSettings, paths: list[Path]) -> None:
    """Write a Llama-style BPE tokenizer of the text: byte fallback, so that any text encodes."""
    vocab_size = settings.train_tokenizer
    total = sum(path.stat().st_size for path in paths)
    every = 1 + total // MAX_TRAINING_BYTES  # every n-th story is enough to count pairs, and bounds memory
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = LLAMA_NORMALIZER
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    steps = (decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse())
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", *BYTE_PIECES],
        limit_alphabet=max(64, (vocab_size - 259) // 4),
        show_progress=False,
    )
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizer", disable=None) as progress:
        readers = (TextReader(path, settings.separator, "replace", quiet=True) for path in paths)
        stories = (story for reader in readers for some in reader.story_lists(progress) for story in some)
        tokenizer.train_from_iterator(itertools.islice(stories, 0, None, every), trainer)
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"] = None  # as Llama's: the merges alone decide
    # a byte is a piece but no special token: text that spells "<0x41>" must stay text
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 3]
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", TRAINED_BY_US: vocab_size}
    write_json(settings.tokenizer_dir / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(settings.tokenizer_dir / "tokenizer_config.json", config)
    write_whole(settings.tokenizer_dir / "tokenizer.json", json.dumps(spec, ensure_ascii=False))


def ensure_tokenizer(settings: PrepareSettings, paths: list[Path]) -> TokenizerFacts:
    """Return the facts of the tokenizer in tokenizer_dir, trained on the text or downloaded where asked."""
    folder, wanted = settings.tokenizer_dir, settings.train_tokenizer
    is_there = (folder / "tokenizer.json").is_file()
    if wanted is not None and (settings.overwrite or not is_there):
        note(f"training a tokenizer of {wanted:,} pieces into {folder}")
        train_tokenizer(settings, paths)
    elif wanted is not None and read_json(folder / "tokenizer_config.json").get(TRAINED_BY_US) != wanted:
        raise ValueError(
            f"{folder}: there is another tokenizer; --overwrite replaces it, --tokenizer_dir names "
            "another folder, and without --train_tokenizer it is used"
        )
    elif not is_there:
        note(f"{folder}: no tokenizer there")
        way_out = (
            "name a folder that has tokenizer.json with --tokenizer_dir, "
            "or train one on the text with prepare_data.py --train_tokenizer 4096"
        )
        for name in reversed(TOKENIZER_FILES):  # tokenizer.json last: with it the folder counts as whole
            download(TOKENIZER_REPO, "model", name, folder, way_out)
    return read_tokenizer(folder)


# --- shards and manifest -----------------------------------------------------------------------------------


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


story_encoder = functools.lru_cache(maxsize=1)(StoryEncoder)  # a worker makes many shards with one


def write_shard(data_dir: Path, name: str, stories: list[bytes], facts: TokenizerFacts) -> dict:
    """Return the manifest's entry of a shard, after it is written whole and the entry noted beside it."""
    encoder = story_encoder(facts)
    sha256, size = hashlib.sha256(), 0
    with open_whole(data_dir / name) as file:
        for some in itertools.batched(stories, STORIES_PER_WRITE):
            data = b"".join(encoder.pack([story.decode("utf-8") for story in some]))
            sha256.update(data)
            size += file.write(data)
    entry = {"path": name, "n_tokens": size // facts.dtype.itemsize, "n_stories": len(stories)}
    entry |= {"n_bytes": sum(map(len, stories)), "sha256": sha256.hexdigest()}
    write_json((data_dir / name).with_suffix(".json"), entry)
    return entry


def finished_shards(data_dir: Path, width: int) -> dict[str, dict]:
    """Return the entries of whole shards by key: the manifest's, and those an interrupted run noted."""
    found = {}
    for path in (data_dir / MANIFEST, *data_dir.glob("*/*/*.json")):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged or not ours: made again
            content = read_json(path)
            for entry in listed(content, "shards") if path.name == MANIFEST else [content]:
                if any(type(entry[key]) is not int for key in ("n_stories", "n_bytes", "n_tokens")):
                    raise TypeError("a count is no number")
                shard, size = data_dir / check_inside(entry["path"]), entry["n_tokens"] * width
                if OWN_FILE.fullmatch(shard.name) and shard.is_file() and shard.stat().st_size == size:
                    found[shard.stem[6:]] = entry  # by the key in its name
    return found


def start_worker() -> None:
    """Prepare a worker process: Ctrl-C is for the parent to handle, and it ends when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is enough

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def start_pool(workers: int) -> Executor:
    """Return what makes the shards: processes, or for one at a time a thread, which starts at once."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    # spawn: the only way on Windows, and safe beside threads; workers import no torch
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)


class SplitWriter:
    """Deals stories out to the splits: drops duplicates, cuts the val split, has full shards made."""

    def __init__(self, data_dir: Path, facts: TokenizerFacts, workers: int, val_every: int | None) -> None:
        self.data_dir, self.facts, self.workers, self.val_every = data_dir, facts, workers, val_every
        self.n_duplicates = dict.fromkeys(SPLITS, 0)
        self.n_new = self.n_reused_bytes = 0
        self._seen = SeenStories()
        self._finished = finished_shards(data_dir, facts.dtype.itemsize)
        self._waiting = {split: ([], []) for split in SPLITS}  # stories and their hashes
        self._shards: dict[str, list[dict | Future]] = {split: [] for split in SPLITS}
        self._submitted: list[Future] = []

    def add(self, split: str, stories: list[str], pool: Executor) -> None:
        """Take stories read from the text of one split."""
        encoded = [story.encode("utf-8") for story in stories]
        hashes = [hashlib.blake2b(story, digest_size=8).digest() for story in encoded]
        is_new = self._seen.add(np.frombuffer(b"".join(hashes), dtype="<u8")).tolist()
        self.n_duplicates[split] += is_new.count(False)
        for item in itertools.compress(zip(encoded, hashes, strict=True), is_new):
            # the first story of each val_every, so that the smallest corpus has a val story too
            to_val = self.val_every is not None and self.n_new % self.val_every == 0
            self.n_new += 1
            for waiting, part in zip(self._waiting["val" if to_val else split], item, strict=True):
                waiting.append(part)
        for name, (waiting, _) in self._waiting.items():
            if sum(map(len, waiting)) >= SHARD_BYTES:
                self._flush(name, pool)

    def finish(self, pool: Executor) -> dict[str, list[dict]]:
        """Return the entries of all shards, the last ones included, once they are written."""
        for split, (waiting, _) in self._waiting.items():
            if waiting:
                self._flush(split, pool)
        shards = self._shards.items()
        return {name: [s.result() if isinstance(s, Future) else s for s in some] for name, some in shards}

    def _is_whole(self, entry: dict) -> bool:
        return sha256_file(self.data_dir / entry["path"]) == entry.get("sha256")

    def _flush(self, split: str, pool: Executor) -> None:
        """Have the next shard made, unless one was made of the same stories by the same tokenizer."""
        stories, hashes = self._waiting[split]
        self._waiting[split] = ([], [])
        facts, shards = self.facts, self._shards[split]
        made_by = f"{FORMAT_VERSION} {facts.dtype.name} {facts.bos_id} {facts.eos_id} {facts.sha256}"
        key = hashlib.blake2b(b"".join(hashes) + made_by.encode(), digest_size=8).hexdigest()
        if (made := self._finished.get(key)) and self._is_whole(made):
            shards.append(made)
            self.n_reused_bytes += made["n_bytes"]
            return
        if len(self._submitted) >= self.workers:  # no more text in memory than is worked on
            self._submitted[-self.workers].result()
        # the key in the name: a new shard never overwrites one that the manifest in place lists
        name = f"{split}/{split}/{len(shards):05d}-{key}.bin"
        self._submitted.append(pool.submit(write_shard, self.data_dir, name, stories, facts))
        shards.append(self._submitted[-1])


def write_splits(settings: PrepareSettings, text: dict[str, list[Path]], facts: TokenizerFacts) -> dict:
    """Return the manifest's entry of each split after its shards are written."""
    data_dir, reading = settings.data_dir, (settings.separator, settings.on_bad_utf8)
    # val first, so that what is in both is dropped from train
    readers = {split: [TextReader(path, *reading) for path in text[split]] for split in reversed(SPLITS)}
    total = sum(reader.stat.st_size for some in readers.values() for reader in some)
    # starting a process costs as much as some megabytes of text
    workers = min(settings.workers or os.cpu_count() or 1, 1 + total // (2 * SHARD_BYTES))
    val_every = None if text["val"] else max(2, round(1 / settings.val_fraction))
    writer = SplitWriter(data_dir, facts, workers, val_every)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with start_pool(workers) as pool, bar as progress:
        for split in readers:
            for stories in itertools.chain.from_iterable(r.story_lists(progress) for r in readers[split]):
                writer.add(split, stories, pool)
        shards = writer.finish(pool)
    if writer.n_reused_bytes:
        note(f"{writer.n_reused_bytes:,} bytes of text were in finished shards, which are kept")
    splits = {}
    for split in SPLITS:
        if not shards[split]:
            clean(data_dir, listed_in_place(data_dir))
            raise ValueError(_no_story(data_dir, split, settings.separator, writer.n_duplicates[split]))
        entry = {key: sum(s[key] for s in shards[split]) for key in ("n_stories", "n_tokens", "n_bytes")}
        entry["n_duplicates"] = writer.n_duplicates[split]
        entry["n_replaced_bytes"] = sum(reader.n_replaced_bytes for reader in readers[split])
        entry["text"] = [reader.record(data_dir) for reader in readers[split]]
        splits[split] = entry | {"shards": shards[split]}
    return splits


def _no_story(data_dir: Path, split: str, separator: str, n_duplicates: int) -> str:
    if split == "train" and n_duplicates:
        return (
            f"{data_dir}: no story for the train split that val does not have too "
            f"({n_duplicates:,} dropped); give it other text"
        )
    return (
        f"{data_dir}: no story for the {split} split; give more text, or end each story by a line "
        f"{separator!r} (--separator names another, '' splits at blank lines)"
    )


def listed_in_place(data_dir: Path) -> list[dict]:
    """Return the entries of the shards that the manifest in place lists, [] if it is damaged or not there."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return [entry for entry in listed(read_json(data_dir / MANIFEST), "shards") if entry["path"]]
    return []


def clean(data_dir: Path, shards: list[dict]) -> None:
    """Remove our own files but these shards: old ones, journals, parts of killed runs."""
    keep = {data_dir / shard["path"] for shard in shards}
    for folder in shard_folders(data_dir):
        for path in folder.glob("*"):
            if OWN_FILE.fullmatch(path.name) and path not in keep:
                with contextlib.suppress(OSError):  # Windows: still mapped by a training run; next time
                    path.unlink()


def shard_folders(data_dir: Path) -> list[Path]:
    """Return where the shards of each split are."""
    return [data_dir / split / split for split in SPLITS]


def lock_data(data_dir: Path) -> FolderLock:
    """Return what keeps a second preparation out of a data directory."""
    return FolderLock(data_dir, "prepare", "prepare_data.py is at work", "wait for it to end, then run again")


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


# --- shards -> batches -------------------------------------------------------------------------------------


def allow_open_files(n_files: int) -> None:
    """Raise the limit of open files (1,024 on most Linux) where mapped shards would exceed it."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < n_files + 256:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(n_files + 256, hard), hard))


class TokenStream:
    """The token ids of a split as one long array; its shards stay on disk and are read where needed."""

    def __init__(self, data_dir: Path, split: str) -> None:
        manifest = read_manifest(data_dir)
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        shards = manifest["splits"][split]["shards"]
        allow_open_files(2 * len(shards))
        # a plain array over the mapped file: slicing a memmap itself is several times slower
        self._shards = [np.asarray(np.memmap(data_dir / s["path"], dtype, mode="r")) for s in shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards]).tolist()
        self.vocab_size = manifest["tokenizer"]["vocab_size"]
        self.place, self._args = data_dir / split / split, (data_dir, split)

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return TokenStream, self._args  # a worker process maps the files itself

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the ids from `start` up to `stop` as int64."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        ids = np.empty(stop - start, dtype=np.int64)
        self.read_into(ids, start)
        return ids

    def read_into(self, ids: np.ndarray, start: int) -> None:
        """Fill `ids` with the tokens from `start` on."""
        index, filled = bisect.bisect_right(self._ends, start), 0
        while filled < len(ids):
            shard = self._shards[index]
            offset = start + filled - (self._ends[index] - len(shard))
            part = shard[offset : offset + len(ids) - filled]
            ids[filled : filled + len(part)] = part
            filled += len(part)
            index += 1


@dataclass
class TokenBatches:
    """Batches of T + 1 token ids: sequence i is tokens i*T to i*T + T, so each token is predicted once.

    With a seed (training): an endless flow of all sequences, in a new order each epoch, dealt out to the
    ranks so that the same sequences make up a step whatever the number of ranks; a batch may reach into the
    next epoch. Iterating goes on where the last iteration or `load_state_dict` left off.
    Without (validation): in order and to the end, the same on every rank, since LitGPT logs rank 0's loss.
    """

    stream: TokenStream
    batch_size: int
    block_size: int
    seed: int | None
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0

    def __post_init__(self) -> None:
        self.n_sequences = max(0, len(self.stream) - 1) // self.block_size
        self.epoch = self.n_used = 0  # sequences of this epoch that all ranks together have had

    def __len__(self) -> int:
        if self.seed is None:
            return math.ceil(self.n_sequences / self.batch_size)
        return self.n_sequences // (self.batch_size * self.world_size)

    def __iter__(self) -> "Iterator[torch.Tensor]":
        return self._in_order() if self.seed is None else self._endless()

    def _in_order(self) -> "Iterator[torch.Tensor]":
        for start in range(0, self.n_sequences, self.batch_size):
            yield self._checked(self._load(range(start, min(start + self.batch_size, self.n_sequences))))

    def _endless(self) -> "Iterator[torch.Tensor]":
        plan = self._plan(self.epoch * self.n_sequences + self.n_used)
        for batch in _read_ahead(self, plan) if self.num_workers else map(self._load, plan):
            # before the batch is out: a checkpoint made after it does not repeat it
            used = self.n_used + self.batch_size * self.world_size
            self.epoch, self.n_used = self.epoch + used // self.n_sequences, used % self.n_sequences
            yield self._checked(batch)

    def _checked(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Return the batch; OSError if it holds a token that no tokenizer made (an index error, later on)."""
        if (highest := int(batch.max())) >= self.stream.vocab_size:
            place, size = self.stream.place, self.stream.vocab_size
            raise OSError(f"{place}: damaged: token {highest} of a vocabulary of {size}; {RUN_AGAIN}")
        return batch

    def _plan(self, start: int) -> Iterator[list[int]]:
        """Yield this rank's sequences for each batch, from the `start`-th of the endless flow on."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            sequences = []
            for place in range(
                start + self.rank * self.batch_size, start + (self.rank + 1) * self.batch_size
            ):
                if place // self.n_sequences != epoch:
                    epoch = place // self.n_sequences
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.n_sequences)
                sequences.append(int(order[place % self.n_sequences]))
            yield sequences
            start += self.batch_size * self.world_size

    def _load(self, sequences: "list[int] | range") -> "torch.Tensor":
        import torch

        ids = np.empty((len(sequences), self.block_size + 1), dtype=np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            self.stream.read_into(row, sequence * self.block_size)
        return torch.from_numpy(ids)

    __getitem__ = _load  # what a worker process asks a data set for

    def state_dict(self) -> dict[str, int]:
        """Return the position; it holds for another batch size or number of ranks too."""
        return {"epoch": self.epoch, "n_used": self.n_used, "n_sequences": self.n_sequences}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position; with other data or another block size, at the start of the next epoch."""
        self.epoch, self.n_used = state["epoch"], state["n_used"]
        if state["n_sequences"] != self.n_sequences:
            note(f"the data had {state['n_sequences']:,} sequences, now {self.n_sequences:,}: new epoch")
            self.epoch, self.n_used = self.epoch + 1, 0


def _read_ahead(batches: TokenBatches, plan: Iterator[list[int]]) -> "Iterator[torch.Tensor]":
    """Yield the batches of `plan`, read by worker processes."""
    import torch
    from torch.utils.data import DataLoader

    # a generator of its own: the default one is the run's, whose state must not depend on num_workers
    generator = torch.Generator().manual_seed(0)
    return iter(
        DataLoader(
            batches, batch_size=None, sampler=plan, num_workers=batches.num_workers, generator=generator
        )
    )


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


def refresh_once(data: "TextFiles") -> None:
    """Refresh a data module's shards, which are hashed once in a run on each machine.

    LitGPT asks for it in every process, and run_train.py before.
    """
    contents = not data.is_checked and is_first_on_machine()
    refresh(data.data_dir, Path(data.tokenizer_dir), contents, wait=is_one_of_many())
    data.is_checked = True


def is_one_of_many() -> bool:
    """Return whether this process trains together with others."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def open_split(data: "TextFiles", split: str, seed: int | None) -> "DataLoader":
    """Return the loader of a split; ValueError if its text is too short for one batch (val: one sequence)."""
    from torch import distributed
    from torch.utils.data import ChainDataset, DataLoader

    ranked = seed is not None and is_one_of_many()
    ranks = (distributed.get_rank(), distributed.get_world_size()) if ranked else (0, 1)
    stream = TokenStream(data.data_dir, split)
    batches = TokenBatches(
        stream, data.batch_size, data.max_seq_length - 1, seed, *ranks, num_workers=data.num_workers
    )
    n_wanted = 1 if seed is None else batches.batch_size * batches.world_size
    if batches.n_sequences < n_wanted:
        raise ValueError(
            f"{data.data_dir}: the {split} split has {len(stream):,} tokens, {batches.n_sequences} sequences "
            f"of {batches.block_size}, but {n_wanted} are needed; choose a smaller micro_batch_size or "
            "max_seq_length, or give more text (val: or prepare with a larger --val_fraction)"
        )

    class ShardLoader(DataLoader):
        state_dict, load_state_dict = batches.state_dict, batches.load_state_dict  # for LitGPT's checkpoints

        def __iter__(self) -> "Iterator[torch.Tensor]":
            return iter(batches)  # DataLoader's own draws from the global random state, and takes 50 us

        def __len__(self) -> int:
            return len(batches)

    # an iterable data set, here an empty one, is what Fabric does not sample anew
    return ShardLoader(ChainDataset([]), batch_size=None)


@functools.cache
def text_shards_class() -> type:
    """Return TextShards, which can only be defined once torch and LitGPT are imported."""
    from litgpt.data import TextFiles

    @dataclass
    class TextShards(TextFiles):
        """LitGPT's TextFiles on our shards: stories with BOS and EOS, exact resume, no litdata."""

        train_data_path: Path = Path("data/custom_text/train")
        """Folder of the training text; its parent is the data directory with manifest.json."""
        val_data_path: Path | None = None
        """Folder of the validation text: val beside train_data_path, and nothing else."""
        seed: int = 42
        """Seed of the order of the training sequences."""
        num_workers: int = 0
        """Processes that read ahead. 0 is fastest on a local disk: reading takes less than asking another."""
        tokenizer_dir: Path = Path("data/tokenizer")
        """Folder of the tokenizer that the shards must have been made with."""

        def __post_init__(self) -> None:
            train, val = Path(self.train_data_path), self.val_data_path
            if train.name != "train" or (val is not None and Path(val) != train.parent / "val"):
                given = f"train_data_path is {train}, val_data_path {val}"
                raise ValueError(f"data: {given}; choose FOLDER/train and FOLDER/val")
            if self.num_workers < 0:
                raise ValueError(f"data: num_workers is {self.num_workers}; choose 0 or more")
            self.train_data_path, self.data_dir, self.is_checked = train, train.parent, False
            super().__post_init__()

        def prepare_data(self) -> None:
            refresh_once(self)

        def train_dataloader(self) -> "DataLoader":
            return open_split(self, "train", self.seed)

        def val_dataloader(self) -> "DataLoader":
            return open_split(self, "val", None)

    TextShards.__module__, TextShards.__qualname__ = __name__, "TextShards"
    return TextShards


def __getattr__(name: str) -> type:
    if name == "TextShards":
        return text_shards_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- command line ------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; names, types, defaults and help of most flags come from PrepareSettings."""
    from docstring_parser import parse_from_object  # reads the text under each field

    parser = FlagParser(description=__doc__)
    helps = {param.arg_name: param.description for param in parse_from_object(PrepareSettings).params}
    for setting in fields(PrepareSettings):
        name, default, text = f"--{setting.name}", setting.default, helps[setting.name]
        if setting.type is bool:
            parser.add_argument(name, action="store_true", help=text)
            continue
        text += "" if default is None else " (default %(default)s)"
        kind = int if default is None else setting.type
        parser.add_argument(name, type=kind, default=default, metavar=kind.__name__.upper(), help=text)
    on = os.environ.get("WANDB_LOG_DATASET", "").lower() in ("1", "true", "yes", "on")
    log_help = "upload the data directory to Weights & Biases (default WANDB_LOG_DATASET)"
    parser.add_argument("--log_to_wandb", action="store_true", default=on, help=log_help)
    parser.add_argument("--no_log_to_wandb", dest="log_to_wandb", action="store_false", help="do not")
    add_wandb_flags(parser)
    return parser


def summary(manifest: dict, settings: PrepareSettings, seconds: float | None) -> str:
    """Return what there is now and what to do next."""
    line = (
        "{split:5}  {n_stories:,} stories, {n_tokens:,} tokens, {n_bytes:,} bytes of text "
        "({n_duplicates:,} duplicates dropped, {n_replaced_bytes:,} bytes replaced), shards: {n_shards:,}"
    )
    splits = manifest["splits"].items()
    lines = [line.format(split=split, n_shards=len(entry["shards"]), **entry) for split, entry in splits]
    n_tokens = sum(entry["n_tokens"] for entry in manifest["splits"].values())
    where = f"{settings.data_dir / MANIFEST}, tokenizer {settings.tokenizer_dir}"
    lines.append(f"where  {where} ({manifest['tokenizer']['vocab_size']:,} pieces)")
    if seconds is not None:
        lines.append(f"time   {seconds:.1f} s, {n_tokens / seconds:,.0f} tokens/s from the start to the end")
    flags = {"dataset_dir": settings.data_dir, "tokenizer_dir": settings.tokenizer_dir}
    defaults = {"dataset_dir": PrepareSettings.data_dir, "tokenizer_dir": PrepareSettings.tokenizer_dir}
    named = [word for flag, path in flags.items() if path != defaults[flag] for word in (f"--{flag}", path)]
    demo_model = yaml.safe_load(DEMO_MODEL.read_text(encoding="utf-8"))
    if manifest["tokenizer"]["vocab_size"] > demo_model["padded_vocab_size"]:
        # without CUDA the demo's model would be taken, which has no room for so many pieces
        named += ["--model_config", "model_config.yaml", "--config", "train_config.yaml"]
    return "\n".join(lines) + f"\nnext   {command_line(*RUN_TRAIN, *named)}"


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work (full disk, no hub), 2 for bad settings or text."""
    args = build_parser().parse_args(argv)
    settings = PrepareSettings(**{item.name: getattr(args, item.name) for item in fields(PrepareSettings)})
    start, start_ns = time.perf_counter(), time.time_ns()
    try:
        hear_ctrl_c()
        manifest = prepare(settings)
        is_new = (settings.data_dir / MANIFEST).stat().st_mtime_ns >= start_ns
        print(summary(manifest, settings, time.perf_counter() - start if is_new else None))
        if args.log_to_wandb:
            print(push_from_flags(args, settings.data_dir, settings.tokenizer_dir))
    except (ValueError, FileNotFoundError, NotADirectoryError, FolderInUse) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
        print(f"error: {reason}; what was finished is kept, run again when that is mended", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; finished shards are kept, run again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(run_script(main))
