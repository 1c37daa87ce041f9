"""Flags: those of a dataclass, with hyphens or underscores, and one sentence for what is wrong with them.

Nothing heavy is imported here, so `--help` answers at once.
"""

import argparse
import difflib
import itertools
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from docstring_parser import parse_from_object

from litgpt_moe.cli import explain, fail, is_closed_pipe, printable, say, silence_stdout
from litgpt_moe.shell import with_home

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
