"""Text files -> stories: read in blocks, bad UTF-8 reported, overlong stories cut, duplicates found."""

import codecs
import contextlib
import hashlib
import io
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from litgpt_moe.cli import note
from litgpt_moe.data.encodings import known_format, likely_encoding, nul_problem
from litgpt_moe.data.forms import Source, open_unpacked
from litgpt_moe.data.settings import PrepareSettings

BLOCK_BYTES = 4 << 20  # text read at once
MAX_STORY_CHARS = 1 << 20  # a longer story is cut: whole, it may not fit in memory
CUTS = ("\n\n", "\n", " ")  # where it is cut: at a paragraph, else at a line, else at a word
END_OF_TEXT = "<|endoftext|>"  # the separator of TinyStories and of GPT-2's training data
MAX_REPORTS = 10  # lines with bad UTF-8 that are reported of one file
MIN_REPLACED, MAX_REPLACED = 50, 0.1  # number and share of bad bytes above which a file is refused
SAMPLE_BYTES = 1 << 14  # of lines that are not UTF-8, from which the encoding is guessed
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # in a file name: how Python shows bytes that are not UTF-8
BAD_BYTES = re.compile("[\udc80-\udcff]+")  # how "surrogateescape" shows bytes that are not UTF-8


def check_text_file(path: Path) -> None:
    """Raise ValueError or FileNotFoundError if `path` is no file of text."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a text file in it")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such text file; name one that is there")
    if not path.is_file():  # it is read twice, for its text and for its digest
        raise ValueError(f"{path} is a device, pipe or socket; save its text to a file and name that")


def nearest_cut(text: str, at: int) -> int:
    """Return the end of the paragraph, else line, else word that is nearest to a position in a text."""
    for mark in CUTS:
        ends = (text.rfind(mark, at // 2, at), text.find(mark, at, at * 3 // 2))
        if found := [end for end in ends if end > 0]:
            return min(found, key=lambda end: abs(end - at))
    return at


@dataclass(frozen=True)
class Reading:
    """How files are read; the settings of the same names."""

    separator: str = END_OF_TEXT
    on_bad_utf8: str = "replace"
    text_column: str | None = None
    scratch: Path | None = None
    """Folder for a packed Parquet file while it is read; None: the system's."""
    is_quiet: bool = False
    """Report nothing; another reading of the same file will."""

    @classmethod
    def of(cls, settings: PrepareSettings, is_quiet: bool = False) -> "Reading":
        """Return how a preparation reads its files."""
        options = (settings.separator, settings.on_bad_utf8, settings.text_column, settings.data_dir)
        return cls(*options, is_quiet)


def cut_long(text: str) -> tuple[list[str], str]:
    """Return what is cut off the beginning of an overlong text, at paragraphs if it has any, and the rest."""
    parts, start = [], 0
    while len(text) - start > MAX_STORY_CHARS:
        middle, limit = start + MAX_STORY_CHARS // 2, start + MAX_STORY_CHARS
        ends = (text.rfind(mark, middle, limit) for mark in CUTS)
        end = next((end for end in ends if end > 0), limit)
        parts.append(text[start:end])
        start = end
    return parts, text[start:] if start else text


class FileReader(ABC):
    """Reads a file in blocks of UTF-8 text; reports and counts what it had to replace."""

    def __init__(self, source: Source, reading: Reading) -> None:
        self.source, self.path, self.reading = source, source.path, reading
        self.report = (lambda _: None) if reading.is_quiet else note
        self.stat = None if source.on_hub else self.path.stat()
        self.size = source.size
        self.sha256 = hashlib.sha256()
        self.n_replaced_bytes = self.n_bad_lines = self.n_cuts = 0
        self.skipped: Counter[str] = Counter()  # rows by the reason for which they were not used
        self.column: str | None = None  # which held the text
        self._bad_text = b""

    @abstractmethod
    def story_lists(self, progress: "tqdm[Any]") -> Iterator[list[str]]:
        """Yield the stories in order, stripped and never empty, some megabytes at a time."""

    def report_faults(self) -> None:
        """Report at the end of the file what was replaced, cut or not used."""
        if self.n_bad_lines > MAX_REPORTS:
            self.report(f"{self.path}: {self.n_bad_lines - MAX_REPORTS} more lines that are not UTF-8")
        if self.n_bad_lines and (name := likely_encoding(self._bad_text)):
            self.report(f"{self.path}: looks like {name} text; save it as UTF-8 to keep what was replaced")
        if self.n_cuts:
            cut = f"stories of over {MAX_STORY_CHARS:,} characters were cut {self.n_cuts} times"
            self.report(f"{self.path}: {cut}")

    def record(self) -> dict[str, Any]:
        """Return the manifest's entry of the file; ValueError if it changed while it was read."""
        if hub := self.source.on_hub:
            return {"path": self.source.name, "size": hub.size, "mtime_ns": 0, "sha256": hub.digest}
        stat, now = self.stat, self.path.stat()
        assert stat is not None
        if (now.st_size, now.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            raise ValueError(f"{self.path}: changed while it was read; run again when it is complete")
        sha256 = self.sha256.hexdigest()
        return {
            "path": self.source.name,
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": sha256,
        }

    def blocks(self, progress: "tqdm[Any]") -> Iterator[str]:
        """Yield the text, unpacked, some megabytes at a time, with a line break added at its end."""
        # "-sig" drops the byte order mark of Windows editors, "surrogateescape" keeps bytes that are no UTF-8
        decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        decode = io.IncrementalNewlineDecoder(decoder, translate=True).decode
        n_lines = n_bytes = 0
        with open_unpacked(self.source, lambda part: self._count(part, progress)) as file:
            while chunk := file.read(BLOCK_BYTES):
                if n_bytes == 0 and (problem := known_format(chunk[:8])):
                    raise ValueError(f"{self.path}: {problem}")
                if problem := nul_problem(chunk):
                    raise ValueError(f"{self.path}: {problem}")
                n_bytes += len(chunk)
                text = decode(chunk)
                yield self._mend(text, n_lines + 1)
                n_lines += text.count("\n")
                self._refuse_other_encodings(n_bytes)
        yield self._mend(decode(b"", final=True), n_lines + 1) + "\n"

    def _count(self, part: memoryview, progress: "tqdm[Any]") -> None:
        self.sha256.update(part)
        progress.update(len(part))

    def _refuse_other_encodings(self, n_bytes: int) -> None:
        if self.n_replaced_bytes > max(MIN_REPLACED, MAX_REPLACED * n_bytes):
            name = likely_encoding(self._bad_text)
            what = f"looks like {name} text" if name else "not UTF-8 text"
            share = f"{self.n_replaced_bytes:,} of {n_bytes:,} bytes are not UTF-8"
            raise ValueError(f"{self.path}: {what} ({share}); save it as UTF-8, or remove it")

    def _mend(self, text: str, first_line: int) -> str:
        with contextlib.suppress(UnicodeEncodeError):
            text.encode("utf-8")  # fails on escaped bytes; much faster than a search for them
            return text
        for number, line in enumerate(text.split("\n"), first_line):
            if not (n_bytes := sum(map(len, BAD_BYTES.findall(line)))):
                continue
            where = f"{self.path}:{number}: {n_bytes} bytes are not UTF-8"
            if self.reading.on_bad_utf8 == "refuse":
                raise ValueError(f"{where}; repair the file, or replace them with --on_bad_utf8 replace")
            self.n_replaced_bytes += n_bytes
            self.n_bad_lines += 1
            if len(self._bad_text) < SAMPLE_BYTES:
                self._bad_text += line[:SAMPLE_BYTES].encode("utf-8", "surrogateescape") + b"\n"
            if self.n_bad_lines <= MAX_REPORTS:
                self.report(f"{where}, replaced by U+FFFD")
        return BAD_BYTES.sub("\ufffd", text)


class TextReader(FileReader):
    """Yields the stories of a text file, which a separator parts."""

    def __init__(self, source: Source | Path, reading: Reading | None = None) -> None:
        if isinstance(source, Path):
            source = Source(source, ".txt", "", source.name)
        super().__init__(source, reading or Reading())
        separator = self.reading.separator
        line = re.escape(separator) + r"[ \t]*" if separator else ""
        self.separator, self.in_lines = re.compile(rf"\n[ \t]*{line}(?=\n)"), separator
        if separator == END_OF_TEXT:  # no story contains it as text: it also separates inside a line
            self.separator, self.in_lines = re.compile(re.escape(separator)), ""
        self.n_in_lines = 0

    def story_lists(self, progress: "tqdm[Any]") -> Iterator[list[str]]:
        """Yield the stories in order, stripped and never empty, some megabytes at a time."""
        carry = "\n"
        for block in self.blocks(progress):
            *stories, carry = self.separator.split(carry + block)
            parts, carry = cut_long(carry)
            self.n_cuts += len(parts)
            yield self._stripped(stories + parts)
        yield self._stripped([carry])
        if self.n_in_lines:
            inside = f"{self.in_lines!r} is inside {self.n_in_lines:,} lines"
            self.report(f"{self.path}: {inside}, where it separates no stories; make it a line of its own")
        self.report_faults()

    def _stripped(self, stories: list[str]) -> list[str]:
        if self.in_lines:
            self.n_in_lines += sum(story.count(self.in_lines) for story in stories)
        return [story for story in map(str.strip, stories) if story]


class SeenStories:
    """The 64-bit hashes of all stories so far: two of 2 million are equal by chance once in 10^7."""

    PARTS = 16  # by their first bits: to merge two runs takes as much memory again as they have

    def __init__(self) -> None:
        # sorted arrays, each at least twice as long as the next: few to search and cheap to merge
        self._runs: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(self.PARTS)]

    def runs(self) -> list[np.ndarray[Any, Any]]:
        """Return all hashes so far, in several arrays."""
        return [run for runs in self._runs for run in runs]

    def add(self, hashes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return which of the hashes are new, as booleans, and remember them."""
        new = np.zeros(len(hashes), dtype=bool)
        parts = hashes // np.uint64(2**64 // self.PARTS)
        for part, runs in enumerate(self._runs):
            (places,) = np.nonzero(parts == part)
            if len(places):
                new[places] = self._add(runs, hashes[places])
        return new

    @staticmethod
    def _add(runs: list[np.ndarray[Any, Any]], hashes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        new = np.zeros(len(hashes), dtype=bool)
        new[np.unique(hashes, return_index=True)[1]] = True
        for run in runs:
            at = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            new &= run[at] != hashes
        if new.any():
            runs.append(np.sort(hashes[new]))
        while len(runs) > 1 and len(runs[-2]) < 2 * len(runs[-1]):
            runs[-2:] = [np.sort(np.concatenate(runs[-2:]), kind="stable")]
        return new
