"""Output that cannot be written ends no training: the reader of a pipe has gone, or a disk is full."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from litgpt_moe.cli import is_closed_pipe


class LastingStream:
    """A text stream that drops what it cannot write, and raises nothing."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None
        """Why the latest write or flush failed, None if it did not."""

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if that is possible."""
        self._attempt(self.stream.flush)

    def _attempt(self, write: Any) -> None:
        try:
            write()
            self.error = None
        except OSError as error:
            self.error = error
            if is_closed_pipe(error):
                self.silence()

    def silence(self) -> None:
        """Send all later output nowhere: Python flushes the streams once more when it exits."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let no write to stdout or stderr raise an OSError in the block; an incomplete stdout is reported."""
    out, err = LastingStream(sys.stdout), LastingStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
        out.flush()
        # a closed pipe needs no words: its reader wanted no more
        if out.error is not None and not is_closed_pipe(out.error):
            print(f"Warning: stdout could not be written ({out.error.strerror}).", file=sys.stderr)
            out.silence()
