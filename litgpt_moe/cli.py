"""What every command shares: flags from a dataclass, and one convention for errors, exit status and Ctrl-C.

Nothing heavy is imported here, so that `--help` answers at once.
Exit status: 0, 1 for work that failed (no network, full disk), 2 for bad input, 130 after Ctrl-C.
"""

import argparse
import difflib
import errno
import io
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from docstring_parser import parse_from_object
from tqdm import tqdm

INTERRUPTED = 130  # the shell's own status of a command that Ctrl-C ended
FLAG = re.compile(r"--[A-Za-z][\w.-]*(?==|$)")
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
PLAIN_WORDS = {  # what argparse says (3.12, 3.13), and how we do
    r"argument (\S+): invalid int value: (.*)": r"\1 is \2; it must be a whole number",
    r"argument (\S+): invalid float value: (.*)": r"\1 is \2; it must be a number",
    r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)": r"\1 is \2; choose one of \3",
    r"argument (\S+): expected .*": r"\1 needs a value; see --help",
    r"argument (\S+): not allowed with argument (\S+)": r"\1 and \2 exclude each other; drop one",
    r"argument (\S+): (.*)": r"\1: \2",
    r"the following arguments are required: (.*)": r"missing: \1; see --help",
    r"unrecognized arguments: (.*)": r"nothing is to be done with \1; see --help",
}


class WorkFailed(RuntimeError):
    """The work itself failed, not its input; the text is one sentence for the user."""


def normalize_flags(argv: list[str]) -> list[str]:
    """Return `argv` with hyphens in flag names made underscores; values stay as they are."""
    return [FLAG.sub(lambda flag: "--" + flag[0][2:].replace("-", "_"), arg, count=1) for arg in argv]


def join_switches(argv: list[str], switches: set[str]) -> list[str]:
    """Return `argv` with `--progress false` as one word: argparse would take any word behind for a value."""
    joined: list[str] = []
    for word in argv:
        if word.lower() in ("true", "false") and joined and joined[-1] in switches:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return [f"{word}=true" if word in switches else word for word in joined]


def path_from_flag(text: str) -> Path:
    """Return the path; an empty text, of a variable that is not set, would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"the path is {text!r}; name one, '.' is the current folder")
    return Path(text)


class FlagParser(argparse.ArgumentParser):
    """argparse's parser, with hyphens and underscores alike, that says what is wrong in one sentence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("type", Path, path_from_flag)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return what argparse does, after a look for flags that do not exist: it reports those last."""
        args = normalize_flags(sys.argv[1:] if args is None else args)
        actions = self._option_string_actions
        args = join_switches(args, {flag for flag, action in actions.items() if isinstance(action, _Switch)})
        for arg in itertools.takewhile(lambda arg: arg != "--", args):
            if (flag := FLAG.match(arg)) and flag[0] not in actions:
                near = difflib.get_close_matches(flag[0], actions, n=1)
                way_out = f"did you mean {near[0]}?" if near else "see --help for the flags"
                self.error(f"{flag[0]} is no flag; {way_out}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with status 2 and the sentence, without the usage."""
        what, choose, choices = " ".join(message.split()).partition("(choose from ")
        text = what + choose + choices.replace("'", "")
        for pattern, sentence in PLAIN_WORDS.items():
            if match := re.fullmatch(pattern, text):
                text = match.expand(sentence)
                break
        self.exit(2, f"error: {text}\n")


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
        if isinstance(item.type, type) and is_dataclass(item.type):
            add_flags(parser, item.type, f"{prefix}{item.name}.")  # with a dot: --train.max_tokens
        else:
            text = helps.get(item.name, "")
            _add_flag(parser, f"{prefix}{item.name}", item.type, defaults[item.name], text)


def _add_flag(parser: argparse._ActionsContainer, name: str, kind: Any, default: Any, text: str) -> None:
    text = text.replace("%", "%%")
    if default not in (None, []) and not isinstance(default, bool) and "default" not in text:
        text = f"{text.rstrip('.')} (default %(default)s)"
    if kind is bool:
        options = {"action": _Switch, "nargs": "?", "metavar": "BOOL", "default": default, "help": text}
        parser.add_argument(f"--{name}", f"--no_{name}", dest=name, **options)
        return
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        parser.add_argument(f"--{name}", choices=get_args(kind), default=default, help=text)
    elif get_origin(kind) is list:
        (part,) = get_args(kind)
        parser.add_argument(f"--{name}", action="append", type=part, metavar=METAVARS.get(part), help=text)
    else:
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=METAVARS.get(kind), help=text)


def from_flags(kind: type, args: argparse.Namespace, prefix: str = "") -> Any:
    """Return the dataclass `kind` with the values that the flags of `add_flags` have in `args`."""
    values = {}
    for item in fields(kind):
        if isinstance(item.type, type) and is_dataclass(item.type):
            values[item.name] = from_flags(item.type, args, f"{prefix}{item.name}.")
        elif (value := getattr(args, f"{prefix}{item.name}")) is not None:  # else the field's own default
            values[item.name] = value
    return kind(**values)


def variable(name: str) -> str | None:
    """Return an environment variable's value, None where it is unset or blank."""
    return os.environ.get(name, "").strip() or None


def words_of(name: str) -> list[str] | None:
    """Return the parts of a variable such as WANDB_TAGS=a,b, None where it has none."""
    return [word.strip() for word in os.environ.get(name, "").split(",") if word.strip()] or None


def command_line(*words: object) -> str:
    """Return the words as one types them in this system's shell: a path with a space in it is quoted."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if sys.platform == "win32" else shlex.join(texts)


def train_command(*flags: object) -> str:
    """Return the command that trains with `flags`."""
    return command_line("uv", "run", "python", "run_train.py", *flags)


def note(text: str) -> None:
    """Print a line on stderr, without breaking a progress bar."""
    tqdm.write(text, file=sys.stderr)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, which for other people's errors is the whole reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def run_script(main: Callable[[], int]) -> int:
    """Return what `main` returns; for the guard at the end of a script, where `main` is the whole process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C ends the imports that `main` begins with, and leaves no traceback of them
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):  # a story may hold what a Windows code page lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    return main()


def hear_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, once what `run_script` shields has been imported."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command(work: Callable[[], object], interrupted: str = "") -> int:
    """Print what `work` returns, unless None, or one sentence for what ended it; return the exit status.

    `interrupted` is the line for Ctrl-C. Errors that only a bug of ours can cause keep their traceback.
    """
    try:
        hear_ctrl_c()
        if (text := work()) is not None:
            print(text, flush=True)
    except KeyboardInterrupt:
        return fail(interrupted, INTERRUPTED)
    except BrokenPipeError:
        silence_stdout()  # `| head`: the reader has seen enough
    except (ValueError, OSError, WorkFailed) as error:
        return fail(*explain(error))
    return 0


def explain(error: BaseException) -> tuple[str, int]:
    """Return the sentence and the exit status for an error: 1 for failed work, 2 for bad input."""
    if isinstance(error, WorkFailed | ConnectionError):
        return str(error), 1
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        name = error.filename or "the file"
        text = f"{name} could not be written, the disk is full; make room there"
        return str(error) if "; " in str(error) else text, 1  # files.DiskFull is a whole sentence already
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}; check the path and its permissions", 2
    return str(error), 2


def fail(error: object, status: int) -> int:
    """Print each line of `error` on stderr and return `status`."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return status


def silence_stdout() -> None:
    """Send stdout nowhere: Python flushes it once more at exit, where its reader is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
