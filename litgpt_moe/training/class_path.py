"""Objects from `class_path` and `init_args` in LitGPT's YAML files, typed by jsonargparse."""

import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from litgpt.data import DataModule

from litgpt_moe.processes import note_once
from litgpt_moe.words import near
from litgpt_moe.yaml_files import check_numbers, must_be, type_words

# keys whose value names a class: its base class, the package of a name without dots, the usual class
CLASS_KEYS: dict[str, tuple[type, str, str]] = {
    "data": (DataModule, "litgpt.data", "prepare_data.TextShards"),
    "optimizer": (torch.optim.Optimizer, "torch.optim", "torch.optim.AdamW"),
}


class BadClass(ValueError):
    """A class or its arguments cannot be used; `keys` are the dotted settings that the text is about."""

    def __init__(self, text: str, keys: list[str]) -> None:
        super().__init__(text)
        self.keys = keys


def build(key: str, spec: dict[str, Any], *args: Any) -> Any:
    """Return the object that `spec` describes, built from `args` and its init_args; or raise BadClass."""
    kind = find_class(key, spec)
    init_args = typed_arguments(key, kind, spec)
    with refused_arguments(key, spec, init_args):
        return kind(*args, **init_args)


@contextlib.contextmanager
def refused_arguments(key: str, spec: dict[str, Any], init_args: dict[str, Any]) -> Iterator[None]:
    """Turn what the class of `spec` raises on its `init_args` into BadClass, about the one that it names."""
    try:
        yield
    # anybody's class may stand here, and torch's raise RuntimeError and AssertionError too
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        named = [word for word in re.findall(r"\w+", reason) if word in init_args][:1]
        about = [f"{key}.init_args.{name}" for name in named or init_args] or [f"{key}.class_path"]
        text = f"{key}: {spec['class_path']} does not take these init_args: {reason}"
        raise BadClass(text, about) from error


def check_class_key(key: str) -> None:
    """Raise ValueError if a dotted key stands beside class_path and init_args, where nothing reads it."""
    group, _, name = key.partition(".")
    if group in CLASS_KEYS and name.partition(".")[0] not in ("class_path", "init_args"):
        meant = near(name, ("class_path", "init_args")) or f"did you mean init_args.{name}?"
        raise ValueError(f"unknown key {key}; {meant.replace('mean ', f'mean {group}.')}")


def find_class(key: str, spec: dict[str, Any]) -> type:
    """Return the class that the class_path of `spec` names; BadClass unless it is a class for `key`."""
    base, package, usual = CLASS_KEYS[key]
    path, at = spec.get("class_path"), [f"{key}.class_path"]
    if not path or not isinstance(path, str):
        raise BadClass(f"{key}.class_path is {path!r}; name a class, such as {usual}", at)
    module_name, _, name = (path if "." in path else f"{package}.{path}").rpartition(".")
    try:
        # importing some modules of the standard library has side effects
        if module_name.partition(".")[0] in sys.stdlib_module_names:
            raise TypeError(f"Python's own modules hold no {base.__name__}")
        kind = getattr(importlib.import_module(module_name), name)
        if not issubclass(kind, base):
            raise TypeError(f"not a {base.__name__}")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        way_out = near(name, names_in(module_name, base)) or f"name another, such as {usual}"
        text = f"{key}.class_path is {path}, which cannot be used: {error}; {way_out}"
        raise BadClass(text, at) from None
    if problem := _data_problem(kind):
        raise BadClass(f"{key}.class_path is {path}, {problem}, or use {usual}", at)
    return kind


def names_in(module_name: str, base: type) -> list[str]:
    """Return the names of the classes of this base in a module that is imported already."""
    found = vars(sys.modules.get(module_name, object)).items()
    return [name for name, kind in found if isinstance(kind, type) and issubclass(kind, base)]


def _data_problem(kind: type) -> str:
    """Return why a data module of LitGPT cannot be trained on, "" if it can."""
    if not kind.__module__.startswith("litgpt.data."):
        return ""
    # finetuning masks prompts, and its batches are not what the loop for pretraining takes
    if "mask_prompt" in inspect.signature(kind).parameters:
        return "which is for finetuning; name one for pretraining"
    # imported by LitGPT when the data are used, after the checks
    source = Path(inspect.getfile(kind)).read_text(encoding="utf-8")
    if "litdata" in source and importlib.util.find_spec("litdata") is None:
        return "which needs the package litdata; install it with: uv sync --extra litdata"
    return ""


def typed_arguments(key: str, kind: type, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the init_args of `spec`, typed as `kind` annotates them: plain YAML reads 1e-5 as text."""
    parser, words = arguments_of(kind)
    typed = {}
    for name, value in (spec.get("init_args") or {}).items():
        try:
            if name not in words:
                raise ArgumentError(None, "unknown")
            typed[name] = parser.parse_object({name: value}, defaults=False)[name]
            check_numbers({name: value}, typed)
        except ArgumentError:
            wrong = _wrong_argument(spec["class_path"], name, value, words)
            raise BadClass(f"{key}.init_args: {wrong}", [f"{key}.init_args.{name}"]) from None
    return typed


def arguments_of(kind: type) -> tuple[ArgumentParser, dict[str, str]]:
    """Return a parser of a class's arguments, and the words for each one's type: "a number or null"."""
    parser = ArgumentParser(exit_on_error=False)
    # params, an optimizer's weights, come from the model
    parser.add_class_arguments(kind, skip={"params"} if issubclass(kind, torch.optim.Optimizer) else set())
    kinds = {action.dest: getattr(action, "_typehint", None) or action.type for action in parser._actions}
    return parser, {name: type_words(kind) for name, kind in kinds.items()}


def _wrong_argument(class_path: str, name: str, value: Any, words: dict[str, str]) -> str:
    if name in words:
        return must_be(name, value, words[name])
    meant = near(name, words)
    if name in ("lr", "learning_rate") and "lr" in words:
        meant = "did you mean lr?"
    return f"unknown key {name}" + (f"; {meant}" if meant else f": {class_path} has none; leave it out")


def without_foreign_arguments(given: dict[str, tuple[Any, str]], config: str) -> dict[str, tuple[Any, str]]:
    """Return `given` without init_args of the YAML file `config` that a class named by a flag does not take.

    They were written for the YAML's own class; those that both classes take (lr, weight_decay) stay. `given`
    holds the value of each dotted key and the place that gave it. A note says what was left out.
    """
    for key in CLASS_KEYS:
        class_path, place = given.get(f"{key}.class_path", (None, config))
        if place == config:
            continue
        prefix = f"{key}.init_args."
        written = [name for name, (_, place) in given.items() if place == config and name.startswith(prefix)]
        # a class that cannot be used is reported when it is built
        with contextlib.suppress(BadClass):
            known = arguments_of(find_class(key, {"class_path": class_path}))[1]
            foreign = [name for name in written if name.removeprefix(prefix) not in known]
            if foreign:
                what = ", ".join(name.removeprefix(prefix) for name in foreign)
                note_once(f"{class_path} has no {what}: left out what {config} says under {key}.init_args.")
                given = {name: value for name, value in given.items() if name not in foreign}
    return given
