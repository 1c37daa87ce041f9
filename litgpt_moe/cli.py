"""What every command shares: flags from a dataclass, and one convention for errors, exit status and Ctrl-C.

Nothing heavy is imported here, so `--help` answers at once.
Exit status: 0; 1 for failed work (no network, full disk); 2 for bad input; 130 after Ctrl-C.
"""

import argparse
import contextlib
import difflib
import errno
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from docstring_parser import parse_from_object
from tqdm import tqdm

from litgpt_moe.shell import command_line, with_home

# what a terminal obeys, what reorders a line, and half surrogate pairs, as of file names that are not UTF-8
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
MAX_WINDOWS_PATH = 259  # characters, unless LongPathsEnabled is set in the registry
STDOUT = "standard output"
INTERRUPTED = 130  # a shell reports this status for a command that Ctrl-C ended
FLAG = re.compile(r"--[A-Za-z][\w.-]*(?==|$)")
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
PLAIN_WORDS = {  # from argparse's messages (Python 3.12, 3.13) to ours
    r"argument (\S+): invalid int value: (.*)": r"\1 is \2; it must be a whole number",
    r"argument (\S+): invalid float value: (.*)": r"\1 is \2; it must be a number",
    r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)": r"\1 is \2; choose one of \3",
    r"argument (\S+): expected .*": r"\1 needs a value; see --help",
    r"argument (\S+): not allowed with argument (\S+)": r"\1 and \2 exclude each other; drop one",
    r"argument (\S+): (.*)": r"\1: \2",
    r"the following arguments are required: (.*)": r"missing: \1; see --help",
    r"unrecognized arguments: (.*)": r"unexpected argument: \1; see --help",
}


class WorkFailed(RuntimeError):
    """The work failed although its input was right; the text is one sentence for the user."""


def normalize_flags(argv: list[str]) -> list[str]:
    """Return `argv` with underscores for hyphens in the names of flags; values stay unchanged."""
    return [FLAG.sub(lambda flag: "--" + flag[0][2:].replace("-", "_"), arg, count=1) for arg in argv]


def join_switches(argv: list[str], switches: set[str]) -> list[str]:
    """Return `argv` with `--progress=false` for `--progress false`.

    With nargs="?" alone, argparse would take whatever word follows a switch as its value.
    """
    joined: list[str] = []
    for word in argv:
        if word.lower() in ("true", "false") and joined and joined[-1] in switches:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return [f"{word}=true" if word in switches else word for word in joined]


def path_from_flag(text: str) -> Path:
    """Return the path; an empty text (an unset shell variable) is refused, Path would read it as "."."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"the path is {text!r}; name one, '.' is the current folder")
    return Path(with_home(text))


class FlagParser(argparse.ArgumentParser):
    """argparse's parser with one-sentence errors; hyphens and underscores in flags are the same."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("type", Path, path_from_flag)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but report an unknown flag first; argparse would report it last."""
        args = normalize_flags(sys.argv[1:] if args is None else args)
        actions = self._option_string_actions
        args = join_switches(args, {flag for flag, action in actions.items() if isinstance(action, _Switch)})
        for arg in itertools.takewhile(lambda arg: arg != "--", args):
            if (flag := FLAG.match(arg)) and flag[0] not in actions:
                near = difflib.get_close_matches(flag[0], actions, n=1)
                way_out = f"did you mean {near[0]}?" if near else "see --help for the flags"
                self.error(f"{flag[0]} is no flag; {way_out}")
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse would end with status 0 where it cannot be written."""
        try:
            say(self.format_help().rstrip())
        except OSError as error:
            if not is_closed_pipe(error):
                self.exit(fail(*explain(error)))
            silence_stdout()

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one sentence; argparse would print the usage too."""
        what, choose, choices = " ".join(message.split()).partition("(choose from ")
        text = what + choose + choices.replace("'", "")
        for pattern, sentence in PLAIN_WORDS.items():
            if match := re.fullmatch(pattern, text):
                text = match.expand(sentence)
                break
        self.exit(2, f"error: {printable(text)}\n")


class _Switch(argparse.Action):
    """`--name`, `--no_name`, `--name=true` or `--name=false`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is not None and str(values).lower() not in ("true", "false"):
            parser.error(f"{option_string} is {values!r}; a switch takes true, false or nothing")
        is_no = str(option_string).startswith("--no_")
        setattr(namespace, self.dest, (str(values).lower() != "false") is not is_no)


def add_flags(parser: argparse._ActionsContainer, kind: type, prefix: str = "") -> None:
    """Declare a flag for each field of the dataclass `kind`; the text under a field is the flag's help."""
    helps = {param.arg_name: param.description or "" for param in parse_from_object(kind).params}
    defaults = vars(kind())
    for item in fields(kind):
        name, text = f"{prefix}{item.name}", helps.get(item.name, "").replace("%", "%%")
        if isinstance(item.type, type) and is_dataclass(item.type):
            add_flags(parser, item.type, f"{name}.")  # with a dot: --train.max_tokens
            continue
        default, (flags, options) = defaults[item.name], _flag_options(name, item.type)
        if default not in (None, []) and not isinstance(default, bool) and "default" not in text:
            text = f"{text.rstrip('.')} (default %(default)s)"
        parser.add_argument(*flags, **{"dest": name, "default": default, "help": text} | options)


def _flag_options(name: str, kind: Any) -> tuple[list[str], dict[str, Any]]:
    if kind is bool:
        return [f"--{name}", f"--no_{name}"], {"action": _Switch, "nargs": "?", "metavar": "BOOL"}
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        return [f"--{name}"], {"choices": get_args(kind)}
    options: dict[str, Any] = {}
    if get_origin(kind) is list:
        (kind,), options = get_args(kind), {"action": "append", "default": None}
    return [f"--{name}"], options | {"type": kind, "metavar": METAVARS.get(kind)}


def from_flags(kind: type, args: argparse.Namespace) -> Any:
    """Return a `kind` with the parsed values of the flags that `add_flags` declared for it."""
    values = {item.name: getattr(args, item.name) for item in fields(kind)}
    # None: the flag was not given, so the dataclass default applies
    return kind(**{name: value for name, value in values.items() if value is not None})


def variable(name: str) -> str | None:
    """Return the value of an environment variable, None if it is unset or blank."""
    return os.environ.get(name, "").strip() or None


def words_of(name: str) -> list[str] | None:
    """Return the comma-separated words of a variable such as WANDB_TAGS=a,b, None if there are none."""
    return [word.strip() for word in os.environ.get(name, "").split(",") if word.strip()] or None


def train_command(*flags: object) -> str:
    """Return the command that trains with `flags`."""
    return command_line("uv", "run", "python", "run_train.py", *flags)


def note(text: str) -> None:
    """Print a line on stderr, without breaking a progress bar; a full disk there ends no work."""
    with contextlib.suppress(OSError):
        tqdm.write(printable(text), file=sys.stderr)


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
            say(printable(str(text)))
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
            print(f"error: {printable(line)}", file=sys.stderr)
    return status


def say(text: str) -> None:
    """Print a result at once; an OSError names standard output, as that of a file names the file."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from None


def silence_stdout() -> None:
    """Redirect stdout to the null device: its reader has gone, and Python flushes it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
