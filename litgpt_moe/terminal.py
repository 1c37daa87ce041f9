"""What a terminal shows and a file does not: colour, lines that fit, a clock while something lasts."""

import contextlib
import os
import re
import shutil
import sys
import threading
import unicodedata
from typing import Any, TextIO

from tqdm import tqdm

# codes of ECMA-48, which terminals have in common
STYLES = {"error": "1;31", "warning": "33", "title": "1", "command": "36"}
MIN_COLUMNS = 20
TICK_S = 1.0


def has_colour(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that knows colours, and whose user wants them (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return False
    # the old console of Windows writes the codes out; newer terminals are known by these
    return sys.platform != "win32" or any(name in os.environ for name in ("WT_SESSION", "TERM_PROGRAM"))


def shows_bars(stream: TextIO) -> bool:
    """Return whether a stream is a terminal of a known size; a container's may have none, and tqdm hides."""
    if not stream.isatty():
        return False
    with contextlib.suppress(OSError, ValueError):
        return min(os.get_terminal_size(stream.fileno())) > 0
    return True


def paint(text: str, style: str, stream: TextIO) -> str:
    """Return the text in one of STYLES if the stream shows colours. Call it after `cli.printable`."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if text and has_colour(stream) else text


def paint_report(text: str, stream: TextIO) -> str:
    """Return a report with its titles and the commands to paste painted."""
    if not has_colour(stream):
        return text
    text = re.sub(r"(?m)^[A-Z][^\n]*:$", lambda title: paint(title[0], "title", stream), text)
    return re.sub(r"(?m)(?<= )uv run [^\n]*$", lambda command: paint(command[0], "command", stream), text)


def columns() -> int:
    """Return the columns for text on the terminal; the last one stays free, as some break the line there."""
    return max(MIN_COLUMNS, shutil.get_terminal_size().columns - 1)


def width_of(text: str) -> int:
    """Return the columns that a text takes: two for each letter of Chinese, Japanese and Korean."""
    return sum(map(_width_of_character, text))


def _width_of_character(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class WordWrapper:
    """Breaks text that comes in pieces into lines of at most `width` columns, between words."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._column = 0
        # what waits: whether the word fits into this line is known at its end
        self._spaces = self._word = ""

    def put(self, text: str) -> str:
        """Take the next piece; return what can be written now."""
        return "".join(map(self._take, text))

    def end(self) -> str:
        """Return the last word."""
        return self._flush()

    def _take(self, character: str) -> str:
        if character == "\n":
            text = self._flush() + character
            self._column, self._spaces = 0, ""
            return text
        if character.isspace():
            text = self._flush()
            self._spaces += character
            return text
        # a line may break on both sides of a wide letter
        is_wide = _width_of_character(character) == 2
        text = self._flush() if is_wide else ""
        self._word += character
        return text + (self._flush() if is_wide or width_of(self._word) >= self.width else "")

    def _flush(self) -> str:
        if not self._word:
            return ""
        before, size = self._spaces, width_of(self._word)
        if self._column and self._column + len(before) + size > self.width:
            before, self._column = "\n", 0
        else:
            self._column += len(before)
        text = before + self._word
        self._column, self._spaces, self._word = self._column + size, "", ""
        return text


def wrapped(text: str, stream: TextIO) -> str:
    """Return the text with lines of the terminal's width if the stream is one, else as it is."""
    if not stream.isatty():
        return text
    wrapper = WordWrapper(columns())
    return wrapper.put(text) + wrapper.end()


class Ticker:
    """Draws a bar again each second, so that its clock goes on while nothing else happens."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        self.bar, self._ended = bar, threading.Event()
        self._thread = threading.Thread(target=self._run, name="ticker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # a terminal that is closed ends it
        with contextlib.suppress(OSError, ValueError):
            while not self._ended.wait(TICK_S):
                self.bar.refresh()

    def stop(self) -> None:
        """Stop, and remove or leave the bar as it says itself."""
        self._ended.set()
        self._thread.join()
        self.bar.close()
