"""Settings from a command line: flag > environment variable > YAML > default, typed, with their places."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from litgpt_moe.cli import first_line, train_command
from litgpt_moe.config import MoEConfig
from litgpt_moe.flags import join_switches
from litgpt_moe.hardware import has_cuda
from litgpt_moe.shell import with_home
from litgpt_moe.training.class_path import (
    CLASS_KEYS,
    BadClass,
    arguments_of,
    check_class_key,
    without_foreign_arguments,
)
from litgpt_moe.training.given import has_own_data, resumed_model, with_one_length
from litgpt_moe.training.settings import Settings
from litgpt_moe.training.sources import FLAG_TO_KEY, OLD_KEYS, Given, choose_configs, read_variables
from litgpt_moe.words import config_file, near, seconds, whole_number
from litgpt_moe.yaml_files import YAML_ERRORS, UniqueKeyLoader, check_numbers, must_be, read_mapping

# fields that are dataclasses: in YAML they have `key: value` lines of their own
GROUPS = {f.name: f.type for f in fields(Settings) if isinstance(f.type, type) and is_dataclass(f.type)}
SWITCHES = {f.name for f in fields(Settings) if f.type is bool} | {
    f"{group}.{f.name}" for group, kind in GROUPS.items() for f in fields(kind) if f.type is bool
}
SWITCH_FLAGS = {f"--{name}" for name in SWITCHES}
# in these ~ is the home folder, as a shell has it only before a space
PATHS = {f.name for f in fields(Settings) if "Path" in str(f.type)} | {"resume"}
PATHS |= {f"data.init_args.{name}" for name in ("train_data_path", "val_data_path", "tokenizer_dir")}


@dataclass
class Parsed:
    """Typed settings, the place each value came from, and their problems, reported all at once."""

    settings: Settings
    places: dict[str, str]
    """Dotted key -> the YAML file, `$VARIABLE` or `--flag` that set it; defaults are absent."""
    is_model_named: bool
    """Whether a flag or a settings file names the model's file; else it is a default."""
    problems: list[str] = field(default_factory=list)

    def add(self, problems: list[str]) -> None:
        """Add problems, each prefixed with the places of the keys that it names ("KEY is VALUE")."""
        for problem in problems:
            named = re.findall(r"(?:^|and |but )([\w.]+)(?= is )", problem)
            keys = [key for key in named if key in self.places]
            self.problems.append(f"{self._places_of(keys)}: {problem}" if keys else problem)

    def attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`, or add its error and return None."""
        try:
            return function(*args)
        except BadClass as error:
            self.problems.append(f"{self._places_of(error.keys)}: {error}")
        except (ValueError, OSError) as error:
            self.add(str(error).splitlines())
        return None

    def raise_all(self) -> None:
        """Raise ValueError with all problems, if there are any."""
        if self.problems:
            raise ValueError("\n".join(self.problems))

    def _places_of(self, keys: list[str]) -> str:
        known = dict.fromkeys(self.places[key] for key in keys if key in self.places)
        return ", ".join(known) or str(self.settings.config)


def load_settings(argv: list[str]) -> Parsed:
    """Return the typed settings of a command line with hyphens made underscores (normalize_flags).

    ValueError has one line per problem, naming the place, the key, the value and the way out.
    """
    given = from_home({**read_variables(), **read_flags(argv)})
    if "config" in given:  # its model_config may name the model's file
        given = {**read_settings_file(config_file(Path(given["config"][0]))), **given}
    is_model_named = "model_config" in given
    config, model_config = choose_configs(given, has_cuda, has_own_data, resumed=resumed_model(given))
    if "config" not in given:
        given = {**read_settings_file(config), **given}
    given = without_foreign_arguments(with_one_length(given), str(config))
    given["config"], given["model_config"] = (str(config), "--config"), (str(model_config), "--model_config")
    places = {key: place for key, (_, place) in given.items()}
    return Parsed(typed_settings(given), places, is_model_named)


def read_flags(argv: list[str]) -> Given:
    """Return the values of `--key value`, `--key=value`, `--switch` and `--no_switch`."""
    given: Given = {}
    for token in (tokens := iter(join_switches(argv, SWITCH_FLAGS))):
        if not re.fullmatch(r"--\w+(\.\w+)*(=.*)?", token, re.DOTALL):
            raise ValueError(f"{token!r} is not a flag; write --key value (see --help)")
        name, equals, value = token[2:].partition("=")
        key = FLAG_TO_KEY.get(name, name)
        if not equals and name.removeprefix("no_") in SWITCHES:
            key, value = name.removeprefix("no_"), str(not name.startswith("no_"))
        elif not equals and (value := next(tokens, None)) is None:
            raise ValueError(f"--{name} needs a value (see --help)")
        group, _, argument = key.partition(".")
        if group in CLASS_KEYS and argument:
            # --optimizer.lr means --optimizer.init_args.lr, as on LitGPT's command line
            if argument != "class_path":
                key = f"{group}.init_args.{argument.removeprefix('init_args.')}"
            try:
                value = yaml.load(value, UniqueKeyLoader)
            except YAML_ERRORS as error:
                text = f"--{name}: {value!r} is not readable as a YAML value"
                raise ValueError(f"{text} ({first_line(error)[:200]}); quote it") from None
        given[f"{key}.class_path" if key in CLASS_KEYS else key] = (value, f"--{name}")
    return given


def read_yaml(path: Path, is_foreign: bool = False) -> Given:
    """Return the values in a train_config.yaml; with `is_foreign` (a checkpoint's) aliases are refused."""
    must_be_groups = (*(f"{key}.init_args" for key in CLASS_KEYS), *GROUPS)
    given: Given = {}

    def flatten(prefix: str, mapping: dict[Any, Any]) -> None:
        for name, value in mapping.items():
            key = f"{prefix}{name}"
            if key in must_be_groups and not isinstance(value, dict):
                raise ValueError(
                    f"{path}: {key} is {value!r}; write `key: value` lines under it, or remove it"
                )
            if key in (*CLASS_KEYS, *must_be_groups) and isinstance(value, dict):
                flatten(f"{key}.", value)
            elif isinstance(value, str) and "\0" in value:  # which no path may hold
                raise ValueError(f"{path}: {key} is {value!r:.80}; a zero byte is in it, take it out")
            else:
                if (key := OLD_KEYS.get(key, key)) in given:
                    raise ValueError(f"{path}: {key} is given twice, under its old name too; keep one")
                given[f"{key}.class_path" if key in CLASS_KEYS else key] = (value, str(path))

    flatten("", read_mapping(path, is_foreign))
    return given


def read_settings_file(path: Path) -> Given:
    """Return the values in the train_config.yaml of a run, whose model_config may name the model's file."""
    given = read_yaml(path)
    config, model_config = (given.pop(key, (None, ""))[0] for key in ("config", "model_config"))
    if config is not None:
        raise ValueError(f"{path}: config is {config!r}; settings name no other settings file: remove it")
    if isinstance(model_config, dict):
        raise ValueError(
            f"{path}: model_config is a mapping; put its lines into a file of their own and name that, "
            "here or with --model_config"
        )
    if model_config is not None and not (isinstance(model_config, str) and model_config):
        raise ValueError(f"{path}: model_config is {model_config!r}; it must be a path or null")
    return from_home(given if model_config is None else {**given, "model_config": (model_config, str(path))})


def from_home(given: Given) -> Given:
    """Return the values with `~` at the beginning of a path replaced by the user's home folder."""
    return {
        key: (with_home(value), place) if key in PATHS and isinstance(value, str) else (value, place)
        for key, (value, place) in given.items()
    }


def typed_settings(given: Given) -> Settings:
    """Return the settings with each value as its field annotates it; ValueError has a line per problem."""
    parser, words = arguments_of(Settings)
    values, problems = Namespace(), []
    for key, (value, place) in given.items():
        try:
            check_class_key(key)
            # init_args are typed in class_path.py, where their class is known
            values[key] = value if key.split(".")[0] in CLASS_KEYS else _typed(parser, words, key, value)
        except ArgumentError:
            problems.append(f"{place}: {_wrong(key, value, words)}")
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    for key, (_, _, usual) in CLASS_KEYS.items():
        # init_args alone are those of the usual class
        if key in values and f"{key}.class_path" not in values:
            values[f"{key}.class_path"] = usual
    typed = parser.instantiate_classes(parser.parse_object(values.as_dict()))
    return Settings(**{f.name: typed[f.name] for f in fields(Settings)})


def _typed(parser: ArgumentParser, words: dict[str, str], key: str, value: Any) -> Any:
    # jsonargparse accepts three wrong things: an unknown key with the value {}, null, and "" for a path
    if key not in words:
        raise ArgumentError(None, "unknown")
    value = _number(key, value, words)
    # only a whole group needs the defaults; without them parsing takes a fortieth of the time
    typed = parser.parse_object(Namespace({key: value}).as_dict(), defaults=key in GROUPS)[key]
    check_numbers({key: value}, {key: typed})
    if (value is None and "null" not in words[key]) or (value == "" and "a path" in words[key]):
        raise ArgumentError(None, words[key])
    return typed


def _number(key: str, value: Any, words: dict[str, str]) -> Any:
    """Return the number of a text such as 10k or 1.5M, and of 3h for a time; anything else as it is."""
    read = seconds if key == "train.max_time" else whole_number
    is_number = key == "train.max_time" or words[key].startswith("a whole number")
    # what is no number is refused with its own text
    with contextlib.suppress(ValueError):
        if is_number and "text" not in words[key] and isinstance(value, str) and value[-1:].isalpha():
            return read(value)
    return value


def _wrong(key: str, value: Any, words: dict[str, str]) -> str:
    if key in GROUPS:
        return f"{key} is {value!r}; give one of its keys, as in --{key}.KEY VALUE"
    if key in words:
        names = re.search(r"one of (.*?)( or null)?$", words[key])
        meant = near(str(value), names[1].split(", ")) if names else ""
        return must_be(key, value, words[key]) + (f"; {meant}" if meant else "")
    if key in MoEConfig.__dataclass_fields__:
        return f"unknown key {key}; it describes the model: set it in the file of --model_config"
    meant = near(key, words)
    # the nearest key is train.min_lr, which is not what the user means
    if key.rpartition(".")[2] in ("lr", "learning_rate"):
        meant = "did you mean optimizer.init_args.lr?"
    return f"unknown key {key}; {meant or 'see --help_all for the keys'}"


def resume_command(argv: list[str], micro_batch_size: int | None = None) -> str:
    """Return the command that resumes the run that `argv` started, with another micro-batch size if given."""
    replaced, added = ["--resume", "--initial_checkpoint_dir"], ["--resume", "auto"]
    if micro_batch_size is not None:
        replaced += ["--micro_batch_size", "--train.micro_batch_size"]
        added = ["--micro_batch_size", str(micro_batch_size), *added]
    kept = []
    for flag in (flags := iter(join_switches(argv, SWITCH_FLAGS))):
        name, equals, _ = flag.partition("=")
        if name in replaced:
            _ = equals or next(flags, None)
        elif name not in ("--overwrite", "--no_overwrite"):
            kept.append(flag)
    return train_command(*kept, *added)
