"""Objects from `class_path` and `init_args`, as LitGPT's YAML files name them, typed by jsonargparse."""

import difflib
import importlib
import re
import sys
from collections.abc import Iterable
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from litgpt.data import DataModule

from litgpt_moe.yaml_files import type_words

# keys whose value is a class: its base, the package of a bare name, and the usual class
CLASS_KEYS: dict[str, tuple[type, str, str]] = {
    "data": (DataModule, "litgpt.data", "prepare_data.TextShards"),
    "optimizer": (torch.optim.Optimizer, "torch.optim", "torch.optim.AdamW"),
}


class BadClass(ValueError):
    """A class or its arguments cannot be used; `keys` are the dotted settings that the text is about."""

    def __init__(self, text: str, keys: Iterable[str]) -> None:
        super().__init__(text)
        self.keys = list(keys)


def build(key: str, spec: dict[str, Any], *args: Any) -> Any:
    """Return the object that `spec` describes, made with `args` before its init_args.

    Raises:
        BadClass: the class is none that `key` takes, or an argument is wrong.
    """
    kind = find_class(key, spec)
    init_args = typed_arguments(key, kind, spec)
    try:
        return kind(*args, **init_args)
    except (ValueError, TypeError, ImportError) as error:
        named = [word for word in re.findall(r"\w+", str(error)) if word in init_args][:1]
        about = [f"{key}.init_args.{name}" for name in named or init_args] or [f"{key}.class_path"]
        path = spec["class_path"]
        raise BadClass(f"{key}: {path} does not take these init_args: {error}", about) from None


def find_class(key: str, spec: dict[str, Any]) -> type:
    """Return the class that the class_path of `spec` names; BadClass if `key` cannot take it."""
    base, package, usual = CLASS_KEYS[key]
    path, at = spec.get("class_path"), [f"{key}.class_path"]
    if not isinstance(path, str) or not path:
        raise BadClass(f"{key}.class_path is {path!r}; name a class, such as {usual}", at)
    module_name, _, name = (path if "." in path else f"{package}.{path}").rpartition(".")
    try:
        # importing some of Python's own modules does things
        if module_name.partition(".")[0] in sys.stdlib_module_names:
            raise TypeError(f"Python's own modules hold no {base.__name__}")
        kind = getattr(importlib.import_module(module_name), name)
        if not issubclass(kind, base):
            raise TypeError(f"not a {base.__name__}")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        text = f"{key}.class_path is {path}, which cannot be used: {error}; name another, such as {usual}"
        raise BadClass(text, at) from None
    return kind


def typed_arguments(key: str, kind: type, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the init_args of `spec` as `kind` annotates them: plain YAML reads 1e-5 as text.

    A null for an argument that the class does not have is left out: so a flag takes a YAML's argument back.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip={"params"} if key == "optimizer" else set())
    types = {action.dest: action for action in parser._actions}
    given = spec.get("init_args") or {}
    typed = {}
    for name, value in given.items():
        if name not in types and value is None:
            continue
        try:
            if name not in types:
                raise ArgumentError(None, "unknown")
            typed[name] = parser.parse_object({name: value}, defaults=False)[name]
        except ArgumentError:
            wrong = wrong_argument(key, spec["class_path"], name, value, types)
            raise BadClass(f"{key}.init_args: {wrong}", [f"{key}.init_args.{name}"]) from None
    return typed


def wrong_argument(key: str, class_path: str, name: str, value: Any, types: dict[str, Any]) -> str:
    """Return the sentence on one of init_args that a class does not take."""
    if name in types:
        return f"{name} is {value!r}; it must be {words_of_action(types[name])}"
    near = difflib.get_close_matches(name, types, n=1)
    if name in ("lr", "learning_rate") and "lr" in types:
        near = ["lr"]
    if near:
        return f"unknown key {name}; did you mean {near[0]}?"
    return f"unknown key {name}: {class_path} has none; leave it out, or add --{key}.{name} null"


def words_of_action(action: Any) -> str:
    """Return what a value of a jsonargparse argument looks like, as one says it."""
    return type_words(getattr(action, "_typehint", None) or action.type)
