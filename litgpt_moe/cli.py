"""What every command shares: notes on stderr, one convention for errors, exit status and Ctrl-C.

Nothing heavy is imported here, so `--help` answers at once.
Exit status: 0; 1 for failed work (no network, full disk); 2 for bad input; 130 after Ctrl-C.
"""

import contextlib
import errno
import faulthandler
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from litgpt_moe.shell import command_line
from litgpt_moe.terminal import Ticker, paint, paint_report, shows_bars

# what a terminal obeys, what reorders a line, and half surrogate pairs, as of file names that are not UTF-8
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
MAX_WINDOWS_PATH = 259  # characters, unless LongPathsEnabled is set in the registry
STDOUT = "standard output"
WARNING = "Warning:"
INTERRUPTED = 130  # a shell reports this status for a command that Ctrl-C ended


class WorkFailed(RuntimeError):
    """The work failed although its input was right; the text is one sentence for the user."""


def variable(name: str) -> str | None:
    """Return the value of an environment variable, None if it is unset or blank."""
    return os.environ.get(name, "").strip() or None


def words_of(name: str) -> list[str] | None:
    """Return the comma-separated words of a variable such as WANDB_TAGS=a,b, None if there are none."""
    return [word.strip() for word in os.environ.get(name, "").split(",") if word.strip()] or None


def train_command(*flags: object) -> str:
    """Return the command that trains with `flags`."""
    return command_line("uv", "run", "python", "run_train.py", *flags)


def new_run_on(data_dir: Path) -> list[object]:
    """Return the flags of a run on these data in a folder of its own: the default one may hold a run."""
    return ["--data_dir", data_dir, "--out_dir", Path("checkpoints", data_dir.resolve().name)]


class _Voice:
    """What this process says of itself."""

    is_quiet = False


def set_quiet(is_quiet: bool) -> None:
    """Let `note` say warnings alone, and bars stay away, or go back to saying everything."""
    _Voice.is_quiet = is_quiet


def no_bar() -> bool | None:
    """Return what tqdm takes as `disable`: None lets it show a bar on a terminal."""
    return True if _Voice.is_quiet else None


@contextlib.contextmanager
def status(text: str, is_shown: bool = True) -> Iterator[None]:
    """Show what is going on, and for how long, on a terminal in the block; nothing of it stays."""
    if not is_shown or no_bar() or not shows_bars(sys.stderr):
        yield
        return
    # {elapsed} is the block's time as 00:12
    bar = tqdm(desc=text, bar_format="{desc} {elapsed}", leave=False, dynamic_ncols=True)
    ticker = Ticker(bar)
    try:
        yield
    finally:
        ticker.stop()


def note(text: str) -> None:
    """Print a line on stderr, without breaking a bar; a full disk there ends no work. See `set_quiet`."""
    if _Voice.is_quiet and not text.startswith(WARNING):
        return
    text = printable(text)
    if text.startswith(WARNING):
        text = paint(WARNING, "warning", sys.stderr) + text.removeprefix(WARNING)
    with contextlib.suppress(OSError):
        tqdm.write(text, file=sys.stderr)


def printable(text: str) -> str:
    """Return `text` with control characters (but for line breaks and tabs) and marks of direction escaped."""
    return CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; in most libraries it holds the whole reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def run_script(main: Callable[[], int]) -> int:
    """Set up signals and streams for a script, run its `main` and return the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C during the imports ends the process without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.environ.get("MPLBACKEND", "").startswith("module:"):  # a Jupyter kernel's: other packages lack it
        del os.environ["MPLBACKEND"]
    # a closed stream (`>&-`) is None, and a file opened later would get its number
    while (free := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(free)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # open until the process ends
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # Windows code pages lack many characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    # where compiled code ends the process, the Python stacks of all threads say where it was
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        faulthandler.enable()
    return main()


def hear_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, now that the imports are done; see `run_script`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command(work: Callable[[], object], interrupted: str = "") -> int:
    """Run `work`, print its result unless it is None, and return the exit status.

    An error becomes one sentence, Ctrl-C the line `interrupted`. Our own bugs keep their traceback.
    """
    try:
        hear_ctrl_c()
        if (text := work()) is not None:
            say_result(str(text))
    except KeyboardInterrupt:
        return fail(interrupted, INTERRUPTED)
    except (ValueError, OSError, WorkFailed) as error:
        if not is_closed_pipe(error):
            return fail(*explain(error))
        silence_stdout()  # `| head`: the reader has seen enough
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        way_out = "close other programs, or choose a smaller model, text or batch"
        return fail(f"out of memory ({first_line(error)[:120]}); {way_out}", 1)
    return 0


def is_closed_pipe(error: BaseException) -> bool:
    """Return whether a write failed because the reader of the pipe has gone; Windows says EINVAL for that."""
    is_einval = (
        isinstance(error, OSError) and error.errno == errno.EINVAL and error.filename in (None, STDOUT)
    )
    return isinstance(error, BrokenPipeError) or (sys.platform == "win32" and is_einval)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory of the machine or of the GPU ran out; torch has a class for the latter alone."""
    words = ("out of memory", "DefaultCPUAllocator", "_STATUS_ALLOC_FAILED")
    is_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, MemoryError) or is_torch


def explain(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit status for an error: 1 for failed work, 2 for bad input."""
    if isinstance(error, WorkFailed | ConnectionError):
        return str(error), 1
    if isinstance(error, OSError) and error.strerror:
        name, reason = error.filename, error.strerror
        if name == STDOUT:
            return f"{name} could not be written ({reason}); make room, or send it elsewhere", 1
        if "; " in reason:  # a whole sentence of ours about a disk
            return reason, 1
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{name or 'the file'} could not be written, the disk is full; make room there", 1
        if error.errno in (errno.EIO, errno.ENOMEM, errno.ESTALE):
            return f"{name or 'a file'}: {reason}; try again", 1
        n_chars = len(str(Path(str(name)).absolute()))
        if name and sys.platform == "win32" and n_chars > MAX_WINDOWS_PATH:
            rule = f"Windows takes {MAX_WINDOWS_PATH} unless long paths are switched on"
            return f"{name}: the path has {n_chars} characters and {rule}; use a shorter folder", 2
        if name:
            return f"{name}: {reason}; check the path and its permissions", 2
    return str(error), 2


def fail(error: object, status: int) -> int:
    """Print each line of `error` on stderr and return `status`."""
    with contextlib.suppress(OSError):
        for line in str(error).splitlines():
            print(paint("error:", "error", sys.stderr), printable(line), file=sys.stderr)
    return status


def say(text: str) -> None:
    """Print a result at once; an OSError names standard output, as that of a file names the file."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from None


def say_result(text: str) -> None:
    """Print what a command has made, with the commands to go on painted on a terminal that has colours."""
    say(paint_report(printable(text), sys.stdout))


def silence_stdout() -> None:
    """Redirect stdout to the null device: its reader has gone, and Python flushes it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
