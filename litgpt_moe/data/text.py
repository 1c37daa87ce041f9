"""Text files -> stories: read in blocks, bad UTF-8 reported, overlong stories cut, duplicates found."""

import codecs
import contextlib
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from litgpt_moe.cli import note
from litgpt_moe.data.encodings import known_format, likely_encoding, nul_problem
from litgpt_moe.data.settings import SPLITS

BLOCK_BYTES = 4 << 20  # text read at once
MAX_STORY_CHARS = 1 << 20  # a longer story is cut: whole, it may not fit in memory
CUTS = ("\n\n", "\n", " ")  # where it is cut: at a paragraph, else at a line, else at a word
END_OF_TEXT = "<|endoftext|>"  # the separator of TinyStories and of GPT-2's training data
MAX_NAMES = 5  # of files that are not read
MAX_REPORTS = 10  # lines with bad UTF-8 that are reported of one file
MIN_REPLACED, MAX_REPLACED = 50, 0.1  # number and share of bad bytes above which a file is refused
SAMPLE_BYTES = 1 << 14  # of lines that are not UTF-8, from which the encoding is guessed
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # in a file name: how Python shows bytes that are not UTF-8
BAD_BYTES = re.compile("[\udc80-\udcff]+")  # how "surrogateescape" shows bytes that are not UTF-8


def text_files(folder: Path) -> list[Path]:
    """Return the text files in a folder in an order that is the same on every system."""
    # paths compare without regard to case on Windows, and the shards depend on the order
    return sorted(folder.glob("*.txt"), key=lambda path: path.name)


def list_text(data_dir: Path) -> dict[str, list[Path]]:
    """Return the text files of both splits; FileNotFoundError or ValueError if they cannot be used."""
    text = {split: text_files(data_dir / split) for split in SPLITS}
    train = data_dir / "train"
    if not text["train"]:
        missing = f"{train}: no .txt file there" if data_dir.is_dir() else f"{data_dir}: no such folder"
        others = "".join(f" ({problem})" for problem in not_read(data_dir))
        fetch = "fetch some with prepare_data.py --dataset demo or --dataset tinystories"
        raise FileNotFoundError(f"{missing}{others}; put UTF-8 text into {train}/*.txt, or {fetch}")
    for path in text["train"] + text["val"]:
        if NOT_UTF8.search(path.name):  # the manifest could not hold it
            raise ValueError(f"{path.parent}: the file name {path.name!a} is not UTF-8; rename it")
        if not path.is_file():
            raise ValueError(f"{path}: not a file; move it away, or put the text itself there")
        if path.stat().st_size < 1 << 16 and not path.read_bytes().strip():
            raise ValueError(f"{path}: empty; put text into it or remove it")
    if (train / "demo.json").is_file() and len(text["train"]) > 1:
        mixed = f"{train}: the demo corpus (demo.txt, demo.json) is beside other text"
        raise ValueError(f"{mixed}; remove those two files, or use another --data_dir")
    return text


def check_text_file(path: Path) -> None:
    """Raise ValueError or FileNotFoundError if `path` is no file of text."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a text file in it")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such text file; name one that is there")
    if not path.is_file():  # it is read twice, for its text and for its digest
        raise ValueError(f"{path} is a device, pipe or socket; save its text to a file and name that")


def not_read(data_dir: Path) -> list[str]:
    """Return a sentence for each folder with files or folders that could hold text but are not read."""
    others = {}
    for split in SPLITS:
        paths = (data_dir / split).glob("[!.]*")
        own = ("demo.json", split)  # the folder train/train holds shards
        others[data_dir / split] = [p for p in paths if not p.match("*.txt") and p.name not in own]
    beside = (p for p in data_dir.glob("[!.]*") if p.name not in SPLITS)
    others[data_dir] = [p for p in beside if p.suffix.lower() == ".txt" or any(p.glob("*.txt"))]
    sentences = []
    for folder, paths in others.items():
        names = ", ".join(sorted(f"{path.name}{'/' if path.is_dir() else ''}" for path in paths)[:MAX_NAMES])
        more = f" and {len(paths) - MAX_NAMES} more" if len(paths) > MAX_NAMES else ""
        rule = "only *.txt in the folders train and val are"
        sentences += [f"{folder}: {len(paths)} not read: {names}{more}; {rule}"] if paths else []
    return sentences


def refuse_other_text(data_dir: Path, dataset: str, own: dict[str, str]) -> None:
    """Raise ValueError if other text in the folders of a named data set would be mixed with it."""
    text = [path for split in SPLITS for path in text_files(data_dir / split)]
    if other := next((path for path in text if path.name != own.get(path.parent.name)), None):
        raise ValueError(
            f"{other}: other text is there already; give --dataset {dataset} a folder of its own "
            "with --data_dir, or leave --dataset out to use that text"
        )


def nearest_cut(text: str, at: int) -> int:
    """Return the end of the paragraph, else line, else word that is nearest to a position in a text."""
    for mark in CUTS:
        ends = (text.rfind(mark, at // 2, at), text.find(mark, at, at * 3 // 2))
        if found := [end for end in ends if end > 0]:
            return min(found, key=lambda end: abs(end - at))
    return at


class TextReader:
    """Reads a text file in blocks and yields lists of whole stories; counts the bytes it replaced."""

    def __init__(self, path: Path, separator: str, on_bad_utf8: str, is_quiet: bool = False) -> None:
        self.path, self.on_bad_utf8 = path, on_bad_utf8
        self.report = (lambda _: None) if is_quiet else note
        line = re.escape(separator) + r"[ \t]*" if separator else ""
        self.separator, self.in_lines = re.compile(rf"\n[ \t]*{line}(?=\n)"), separator
        if separator == END_OF_TEXT:  # no story contains it as text: it also separates inside a line
            self.separator, self.in_lines = re.compile(re.escape(separator)), ""
        self.stat = path.stat()
        self.sha256 = hashlib.sha256()
        self.n_replaced_bytes = self.n_bad_lines = self.n_cuts = self.n_in_lines = 0
        self._bad_text = b""

    def story_lists(self, progress: "tqdm[Any]") -> Iterator[list[str]]:
        """Yield the stories in order, stripped and never empty, some megabytes at a time."""
        carry = "\n"
        for block in self._blocks(progress):
            *stories, carry = self.separator.split(carry + block)
            while len(carry) > MAX_STORY_CHARS:
                ends = (carry.rfind(mark, MAX_STORY_CHARS // 2, MAX_STORY_CHARS) for mark in CUTS)
                end = next((end for end in ends if end > 0), MAX_STORY_CHARS)
                stories.append(carry[:end])
                carry = carry[end:]
                self.n_cuts += 1
            yield self._stripped(stories)
        yield self._stripped([carry])
        self._report_faults()

    def _stripped(self, stories: list[str]) -> list[str]:
        if self.in_lines:
            self.n_in_lines += sum(story.count(self.in_lines) for story in stories)
        return [story for story in map(str.strip, stories) if story]

    def _report_faults(self) -> None:
        if self.n_bad_lines > MAX_REPORTS:
            self.report(f"{self.path}: {self.n_bad_lines - MAX_REPORTS} more lines that are not UTF-8")
        if self.n_bad_lines and (name := likely_encoding(self._bad_text)):
            self.report(f"{self.path}: looks like {name} text; save it as UTF-8 to keep what was replaced")
        if self.n_in_lines:
            inside = f"{self.in_lines!r} is inside {self.n_in_lines:,} lines"
            self.report(f"{self.path}: {inside}, where it separates no stories; make it a line of its own")
        if self.n_cuts:
            cut = f"stories of over {MAX_STORY_CHARS:,} characters were cut {self.n_cuts} times"
            self.report(f"{self.path}: {cut}")

    def record(self, data_dir: Path) -> dict[str, Any]:
        """Return the manifest's entry of the file; ValueError if it changed while it was read."""
        stat, now = self.stat, self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            raise ValueError(f"{self.path}: changed while it was read; run again when it is complete")
        name, sha256 = self.path.relative_to(data_dir).as_posix(), self.sha256.hexdigest()
        return {"path": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}

    def _blocks(self, progress: "tqdm[Any]") -> Iterator[str]:
        # "-sig" drops the byte order mark of Windows editors, "surrogateescape" keeps bytes that are no UTF-8
        decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        decode = io.IncrementalNewlineDecoder(decoder, translate=True).decode
        n_lines = 0
        with self.path.open("rb") as file:
            if problem := known_format(file.read(8)):
                raise ValueError(f"{self.path}: {problem}")
            file.seek(0)
            while chunk := file.read(BLOCK_BYTES):
                if problem := nul_problem(chunk):
                    raise ValueError(f"{self.path}: {problem}")
                self.sha256.update(chunk)
                progress.update(len(chunk))
                text = decode(chunk)
                yield self._mend(text, n_lines + 1)
                n_lines += text.count("\n")
                self._refuse_other_encodings(file.tell())
        yield self._mend(decode(b"", final=True), n_lines + 1) + "\n"

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
            if self.on_bad_utf8 == "refuse":
                raise ValueError(f"{where}; repair the file, or replace them with --on_bad_utf8 replace")
            self.n_replaced_bytes += n_bytes
            self.n_bad_lines += 1
            if len(self._bad_text) < SAMPLE_BYTES:
                self._bad_text += line[:SAMPLE_BYTES].encode("utf-8", "surrogateescape") + b"\n"
            if self.n_bad_lines <= MAX_REPORTS:
                self.report(f"{where}, replaced by U+FFFD")
        return BAD_BYTES.sub("\ufffd", text)


class SeenStories:
    """The 64-bit hashes of all stories so far: two of 2 million are equal by chance once in 10^7."""

    def __init__(self) -> None:
        # sorted arrays, each at least twice as long as the next: few to search and cheap to merge
        self._runs: list[np.ndarray[Any, Any]] = []

    def add(self, hashes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
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
