"""Flags: those of a dataclass, with hyphens or underscores, and one sentence for what is wrong with them.

Nothing heavy is imported here, so `--help` answers at once.
"""

import argparse
import contextlib
import itertools
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from docstring_parser import parse_from_object

from litgpt_moe.cli import explain, fail, is_closed_pipe, say, set_quiet, silence_stdout
from litgpt_moe.shell import with_home
from litgpt_moe.words import choose_one, config_file, near, whole_number

CHOICE = re.compile(r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)")
# of long helps; the widths are argparse's own
HELP_POSITION = 30
ALL = "--help_all"
FLAG = re.compile(r"\A--[A-Za-z][\w.-]*(?==|$)")
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
PLAIN_WORDS = {  # from argparse's messages (Python 3.12, 3.13) to ours
    r"argument (\S+): invalid int value: (.*)": r"\1 is \2; it must be a whole number",
    r"argument (\S+): invalid float value: (.*)": r"\1 is \2; it must be a number",
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


def config_from_flag(text: str) -> Path:
    """Return the configuration file of this path, or of this name in configs/."""
    try:
        return config_file(path_from_flag(text))
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class FlagParser(argparse.ArgumentParser):
    """argparse's parser with one-sentence errors; hyphens and underscores in flags are the same.

    Every command has --quiet. --help shows the flags that `common` names, if it names any; --help_all all.
    """

    def __init__(self, common: Collection[str] = (), **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)
        self.register("type", Path, path_from_flag)
        self.register("type", int, whole_number)
        set_quiet(False)
        self.common, self._positional = {"help", "help_all", "quiet", *common} if common else set(), ""
        quiet = "only warnings and the result"
        everything = "show all flags and exit" if common else argparse.SUPPRESS
        self.add_argument(ALL, action="help", default=argparse.SUPPRESS, help=everything)
        self.add_argument("--quiet", action=_Quiet, nargs=0, default=argparse.SUPPRESS, help=quiet)

    def accept_positional(self, name: str, is_required: bool = False) -> None:
        """Take the value of the flag --`name`, which is declared already, without its name too."""
        kind: Any = self._option_string_actions[f"--{name}"].type
        same = f"the same as --{name}"
        self.add_argument(f"{name}_", nargs="?", type=kind, metavar=name.upper(), help=same)
        self._positional, self._is_required = name, is_required

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; of a flag that may stand without its name, take the one that is given."""
        if not (name := self._positional):
            return super().parse_args(args, namespace)
        # else `CHECKPOINT --flag OUT` would give the first word to OUT, as CHECKPOINT may be missing
        found = super().parse_intermixed_args(args, namespace)
        if (place := vars(found).pop(f"{name}_")) is not None:
            if getattr(found, name) != self.get_default(name):
                self.error(f"--{name} is {getattr(found, name)} and {place} is given too; drop one")
            setattr(found, name, place)
        if self._is_required and getattr(found, name) is None:
            self.error(f"missing: --{name}; see --help")
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but report an unknown flag first; argparse would report it last."""
        args = normalize_flags(sys.argv[1:] if args is None else args)
        if ALL in args:
            self.common.clear()
        actions = self._option_string_actions
        args = join_switches(args, {flag for flag, action in actions.items() if isinstance(action, _Switch)})
        for arg in itertools.takewhile(lambda arg: arg != "--", args):
            if (flag := FLAG.match(arg)) and flag[0] not in actions:
                self.error(f"{flag[0]} is no flag; {near(flag[0], actions) or 'see --help for the flags'}")
        return super().parse_known_args(args, namespace)

    @contextlib.contextmanager
    def _only_common(self) -> Iterator[None]:
        """Hide the other flags in the block; an action whose help is SUPPRESS stands in no help."""
        helps = [(action, action.help) for action in self._actions]
        for action in self._actions:
            if self.common and action.option_strings and action.dest not in self.common:
                action.help = argparse.SUPPRESS
        try:
            yield
        finally:
            for action, text in helps:
                action.help = text

    def format_usage(self) -> str:
        """Return the line of usage, as argparse does."""
        with self._only_common():
            return super().format_usage()

    def format_help(self) -> str:
        """Return the help, as argparse does."""
        with self._only_common():
            return super().format_help()

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
        if match := CHOICE.fullmatch(text):
            flag, value, names = match.groups()
            self.exit(fail(f"{flag} is {value}; {choose_one(value.strip("'"), names.split(', '))}", 2))
        for pattern, sentence in PLAIN_WORDS.items():
            if match := re.fullmatch(pattern, text):
                text = match.expand(sentence)
                break
        self.exit(fail(text, 2))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's, with a wider column of flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_POSITION)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _Switch):
            return f"--[no_]{action.dest}"
        return super()._format_action_invocation(action)


class _Quiet(argparse.Action):
    """`--quiet`, which holds from here on."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        set_quiet(True)


class _Switch(argparse.Action):
    """`--name`, `--no_name`, `--name=true` or `--name=false`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is not None and str(values).lower() not in ("true", "false"):
            parser.error(f"{option_string} is {values!r}; a switch takes true, false or nothing")
        is_no = str(option_string).startswith("--no_")
        setattr(namespace, self.dest, (str(values).lower() != "false") is not is_no)


def add_flags(
    parser: argparse._ActionsContainer,
    kind: type,
    prefix: str = "",
    leave_out: str | None = None,
    values: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Declare a flag for each field of the dataclass `kind`; the text under a field is the flag's help.

    Fields whose text begins with `leave_out` get none. `values` are in force in place of the defaults.
    """
    # a class's own text has no fields of the classes it inherits from
    texts = [parse_from_object(each).params for each in reversed(kind.__mro__) if is_dataclass(each)]
    helps = {param.arg_name: param.description or "" for param in itertools.chain.from_iterable(texts)}
    defaults = vars(kind())
    for item in fields(kind):
        name, text = f"{prefix}{item.name}", helps.get(item.name, "").replace("%", "%%")
        if isinstance(item.type, type) and is_dataclass(item.type):
            add_flags(parser, item.type, f"{name}.", leave_out, values)  # with a dot: --train.max_tokens
            continue
        if leave_out is not None and text.startswith(leave_out):
            continue
        default, (flags, options) = defaults[item.name], _flag_options(name, item.type)
        if (value := values.get(name)) not in (None, default):
            text = f"{text.rstrip('.')} (now {value})".replace("%", "%%")
        elif default not in (None, []) and not isinstance(default, bool) and "default" not in text:
            text = f"{text.rstrip('.')} (default %(default)s)"
        parser.add_argument(*flags, **{"dest": name, "default": default, "help": text} | options)


def _flag_options(name: str, kind: Any) -> tuple[list[str], dict[str, Any]]:
    if kind is bool:
        return [f"--{name}", f"--no_{name}"], {"action": _Switch, "nargs": "?", "metavar": "BOOL"}
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        return [f"--{name}"], {"choices": get_args(kind)}
    if kind is Path and name.endswith("model_config"):
        return [f"--{name}"], {"type": config_from_flag, "metavar": "NAME"}
    options: dict[str, Any] = {}
    if get_origin(kind) is list:
        (kind,), options = get_args(kind), {"action": "append", "default": None}
    read = kind
    # Annotated names the function that reads the text
    if get_origin(kind) is Annotated:
        kind, read = get_args(kind)
    return [f"--{name}"], options | {"type": read, "metavar": METAVARS.get(kind)}


def from_flags(kind: type, args: argparse.Namespace) -> Any:
    """Return a `kind` with the parsed values of the flags that `add_flags` declared for it."""
    values = {item.name: getattr(args, item.name) for item in fields(kind)}
    # None: the flag was not given, so the dataclass default applies
    return kind(**{name: value for name, value in values.items() if value is not None})
