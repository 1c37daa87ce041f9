"""Files in which a row is a document: JSON lines, JSON arrays, CSV and TSV."""

import csv
import itertools
import json
import re
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from litgpt_moe.cli import first_line
from litgpt_moe.data.text import FileReader, cut_long

SAMPLE_ROWS = 100  # from which the column of the text is chosen
MAX_ROW_BYTES = 48 << 20  # a row that takes more memory is refused: it is held about four times
MAX_DEPTH = 10_000  # of JSON values in one another: each takes some hundred bytes
MAX_FIELD_CHARS = 16 << 20  # of a CSV field, which Python's reader holds with 4 bytes a character
MAX_NAMED = 8  # columns that a message lists
LIST_CHARS = 1 << 20  # text that is passed on at once
# numbers, dates and times; possessive, since many spaces could be divided in too many ways
NUMBER = re.compile(r"\s*+[-+]?+[\d.,:/ eE-]*+\s*+")
HALF_PAIRS = re.compile("[\ud800-\udfff]+")  # JSON can spell half of a character: "\ud83d"
DELIMITERS = ",;\t|"

Row = tuple[str, Any]  # where it stands ("row 7"), and what it holds: a dict, or a text itself


class RowReader(FileReader):
    """Yields the text column of a file's rows; rows without text are counted by reason."""

    @abstractmethod
    def rows(self, progress: "tqdm[Any]") -> Iterator[Row]:
        """Yield the rows; ValueError with file and row for one that is broken."""

    def story_lists(self, progress: "tqdm[Any]") -> Iterator[list[str]]:
        """Yield the stories in order, stripped and never empty, some megabytes at a time."""
        rows = self.rows(progress)
        sample = list(itertools.islice(rows, SAMPLE_ROWS))
        self.column = self.choose_column([row for _, row in sample])
        stories, n_chars = [], 0
        first_skipped = ""
        # the sample is freed row by row: a row may be large
        for where, row in itertools.chain((sample.pop(0) for _ in range(len(sample))), rows):
            text, reason = self.text_of(row)
            if not text:
                self.skipped[reason] += 1
                first_skipped = first_skipped or where
                continue
            parts, last = cut_long(text)
            self.n_cuts += len(parts)
            stories += [story for story in map(str.strip, [*parts, last]) if story]
            n_chars += len(text)
            if n_chars >= LIST_CHARS:
                yield stories
                stories, n_chars = [], 0
        yield stories
        if self.skipped:
            counts = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
            self.report(f"{self.path}: rows without text are skipped: {counts}; the first is {first_skipped}")
        self.report_faults()

    def text_of(self, row: Any) -> tuple[str, str]:
        """Return the text of a row, and the reason if there is none."""
        value = row
        if isinstance(row, dict):
            assert self.column is not None
            value = value_at(row, self.column)
            if value is None:
                return "", "null" if has(row, self.column) else f"without the column {self.column!r}"
        if not isinstance(value, str):
            return "", f"with text of type {type(value).__name__}"
        value = value.replace("\r\n", "\n").replace("\r", "\n").strip()
        if HALF_PAIRS.search(value):
            self.n_replaced_bytes += sum(map(len, HALF_PAIRS.findall(value)))
            value = HALF_PAIRS.sub("\ufffd", value)
        return value, "empty"

    def choose_column(self, rows: list[Any]) -> str:
        """Return the column of the text: the named one, else "text", else the only one that holds strings."""
        dicts = [row for row in rows if isinstance(row, dict)]
        columns = list(dict.fromkeys(key for row in dicts for key in row))
        strings = [key for key in columns if any(is_text(row.get(key)) for row in dicts)]
        asked = self.reading.text_column
        if asked is not None:
            if dicts and not any(has(row, asked) for row in dicts):
                raise ValueError(
                    f"{self.path}: has no column {asked!r} but {_named(columns)}; name one of those"
                )
            return asked
        if not dicts or "text" in columns:
            return "text"
        if len(strings) != 1:
            found = (
                f"its columns with strings are {_named(strings)}" if strings else "no column holds strings"
            )
            found += "" if strings else f" ({_named(columns)})"
            raise ValueError(f"{self.path}: has no column 'text', and {found}; name one with --text_column")
        return strings[0]

    def lines(self, progress: "tqdm[Any]") -> Iterator[str]:
        """Yield the lines of the file with their ends; ValueError for one that is too long."""
        carry, n_lines = "", 0
        for block in self.blocks(progress):
            *lines, carry = (carry + block).split("\n")
            n_lines += len(lines)
            for line in lines:
                yield line + "\n"
            self.check_size(sys.getsizeof(carry), f"line {n_lines + 1}")
        if carry:
            yield carry

    def check_size(self, n_bytes: int, where: str) -> None:
        """Raise ValueError if a row is too long to be held in memory."""
        if n_bytes > MAX_ROW_BYTES:
            limit = f"is longer than {MAX_ROW_BYTES >> 20} MB"
            raise ValueError(f"{self.path}: {where} {limit}; split it, or save the text as .txt")

    def broken(self, where: str, error: Exception | str) -> ValueError:
        """Return the error for a row that cannot be read."""
        reason = error if isinstance(error, str) else first_line(error)
        return ValueError(f"{self.path}: {where} is broken ({reason}); repair or remove it")


class JsonLinesReader(RowReader):
    """One JSON object (or string) a line."""

    def rows(self, progress: "tqdm[Any]") -> Iterator[Row]:
        """Yield the rows; ValueError with file and row for one that is broken."""
        for number, line in enumerate(self.lines(progress), start=1):
            if not line.isspace():
                try:
                    yield f"row {number}", json.loads(line.strip())
                except (ValueError, RecursionError) as error:
                    raise self.broken(f"row {number}", error) from None


class JsonReader(RowReader):
    """An array of JSON objects (or strings), or one object after another."""

    def rows(self, progress: "tqdm[Any]") -> Iterator[Row]:
        """Yield the rows; ValueError with file and row for one that is broken."""
        import ijson  # not at the top: it starts a search for its fastest backend, in worker processes too

        found: list[Any] = []
        parser, n_rows, waiting, depth = None, 0, 0, 0
        try:
            for block in self.blocks(progress):
                if parser is None and block.strip():
                    is_array = block.lstrip().startswith("[")
                    prefix = "item" if is_array else ""
                    parser = ijson.items_coro(_Receiver(found), prefix, multiple_values=not is_array)
                if parser is None:
                    continue
                # brackets in strings count too: an estimate is enough, since few texts hold as many
                depth = 0 if not waiting else depth
                depth += sum(block.count(mark) for mark in "[{") - sum(block.count(mark) for mark in "]}")
                if depth > MAX_DEPTH:
                    raise self.broken(f"row {n_rows + 1}", f"nested more than {MAX_DEPTH:,} deep")
                parser.send(block.encode("utf-8"))
                waiting = 0 if found else waiting + sys.getsizeof(block)
                self.check_size(waiting, f"row {n_rows + 1}")
                for row in found:
                    n_rows += 1
                    yield f"row {n_rows}", row
                found.clear()
            if parser is not None:
                parser.close()
        except (ijson.JSONError, RecursionError) as error:
            raise self.broken(f"row {n_rows + len(found) + 1}", error) from None


class _Receiver:
    """Takes what ijson finds."""

    def __init__(self, found: list[Any]) -> None:
        self.send = found.append


class TableReader(RowReader):
    """CSV or TSV with the names of the columns in its first row."""

    def rows(self, progress: "tqdm[Any]") -> Iterator[Row]:
        """Yield the rows; ValueError with file and row for one that is broken."""
        lines = self.lines(progress)
        first = next(lines, "")
        delimiter = "\t" if self.source.form == ".tsv" else max(DELIMITERS, key=first.count)
        csv.field_size_limit(MAX_FIELD_CHARS)  # of the whole process, in which nothing else reads CSV
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        header, number = None, 1
        try:
            for number, fields in enumerate(reader, start=1):
                if header is None:
                    header = fields
                elif fields:
                    if len(fields) != len(header):
                        counts = f"{len(fields)} fields, but {len(header)} in the first row"
                        raise csv.Error(f"{counts}; quote a text that holds {delimiter!r}")
                    yield f"row {number}", dict(zip(header, fields, strict=True))
        except csv.Error as error:
            where = f"row {number if 'fields, but' in str(error) else number + 1}"
            raise self.broken(f"{where} (line {reader.line_num})", error) from None


def is_text(value: Any) -> bool:
    """Return whether a value is text and not a number or a date spelled out."""
    return isinstance(value, str) and NUMBER.fullmatch(value) is None


def value_at(row: Any, column: str) -> Any:
    """Return a row's value in a column, which may lie in another: `meta.story`; None without one."""
    if isinstance(row, dict) and column in row:
        return row[column]
    first, _, others = column.partition(".")
    return value_at(row.get(first), others) if others and isinstance(row, dict) else None


def has(row: dict[str, Any], column: str) -> bool:
    """Return whether a row has the column, be it null."""
    return column in row or value_at(row, column) is not None


def _named(columns: Iterable[Any]) -> str:
    names = [repr(str(column)[:40]) for column in columns]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return (", ".join(names[:MAX_NAMED]) or "none") + more
