"""Read a mapping from a YAML file: duplicate keys are refused, values converted to a dataclass's types."""

import contextlib
import difflib
import re
from collections import Counter
from dataclasses import fields
from datetime import date
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser

NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python shows the bytes of a name that is not UTF-8
MAX_YAML_BYTES = 1 << 17  # reading time and memory grow faster than the file
# numbers that YAML 1.1 reads in base 8 (010 is 8) or in base 60 (1:30 is 90), which nobody means
MISREAD = re.compile(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_]+)+(\.[0-9_]*)?)")
PLAINLY = "without leading zeros or colons, which YAML reads in base 8 or 60"
# PyYAML does not catch what int(), date() and others raise
YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, ArithmeticError, RecursionError, LookupError)
TYPE_WORDS = {  # how messages describe a type
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    bool: "true or false",
    dict: "`key: value` lines",
    list: "a list",
    tuple: "a list",
    None: "null",  # an argument without annotation takes anything
    NoneType: "null",
}


class UniqueKeyLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses duplicate keys, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping; YAMLError on a duplicate key."""
        if isinstance(node, yaml.MappingNode):  # else PyYAML has a message, as for `!!map text`
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [name for name, times in Counter(names).items() if times > 1]:
                raise yaml.YAMLError(f"the key {twice[0]} is given twice; keep one of them")
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Return the number; YAMLError if YAML 1.1 means another one than the digits say."""
        if MISREAD.fullmatch(node.value):
            line = f"line {node.start_mark.line + 1} has {node.value}"
            raise yaml.YAMLError(f"{line}; write a number {PLAINLY}, and a text in quotes")
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    UniqueKeyLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", UniqueKeyLoader.construct_number)


class ForeignLoader(UniqueKeyLoader):
    """The loader for a checkpoint's files; no aliases ("billion laughs": 10 lines mean 10**9 values)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; YAMLError if it is an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias, which no checkpoint of ours does; write its value out")
        return super().compose_node(parent, index)


def read_mapping(path: Path, is_foreign: bool = False) -> dict[str, Any]:
    """Return the mapping in a YAML file; in a foreign one (a checkpoint's) aliases are refused."""
    if not path.is_file():
        text = f"{path}: no such configuration file"
        raise FileNotFoundError(f"{text}; name one that is there, such as those in configs/")
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a configuration has {MAX_YAML_BYTES:,} at most")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), ForeignLoader if is_foreign else UniqueKeyLoader)
    except YAML_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not readable YAML: {reason[:300]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no `key: value` lines; write some into it")
    if odd := [key for key in values if not isinstance(key, str)]:
        text = f"{path}: the key {odd[0]!r:.80} is no text"
        raise ValueError(f"{text}; see litgpt.Config or --help for the keys")
    return values


def typed(values: dict[str, Any], kind: type, path: Path) -> dict[str, Any]:
    """Return `values` converted to the annotations of the dataclass `kind`; plain YAML reads 1e-5 as text.

    ValueError has one line per unknown key or wrong value.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    types = {item.name: item.type for item in fields(kind) if item.init}
    # jsonargparse takes null for anything; and with an unknown key nothing is parsed
    odd = [key for key, value in values.items() if key not in types or _is_wrongly_null(types[key], value)]
    with contextlib.suppress(ArgumentError):  # it names only the first problem
        if not odd:
            parsed = parser.parse_object(values)
            check_numbers(values, parsed)
            return {key: parsed[key] for key in values}
    problems = [_key_problem(parser, types, key, value) for key, value in values.items()]
    raise ValueError("\n".join(f"{path}: {text}" for text in problems if text))


def _is_wrongly_null(kind: Any, value: Any) -> bool:
    return value is None and "Optional" not in str(kind) and "None" not in str(kind)


def _key_problem(parser: ArgumentParser, types: dict[str, Any], key: str, value: Any) -> str | None:
    if key not in types:
        near = difflib.get_close_matches(str(key), types, n=1)
        way_out = f"did you mean {near[0]}?" if near else "see litgpt.Config for the keys"
        return f"unknown key {key!r}; {way_out}"
    with contextlib.suppress(ArgumentError):
        check_numbers({key: value}, parser.parse_object({key: value}))
        if not _is_wrongly_null(types[key], value):
            return None
    return must_be(key, value, type_words(types[key]))


def check_numbers(values: dict[str, Any], parsed: Any) -> None:
    """Raise ArgumentError if a value given as text was parsed to another number than its digits say."""
    for key, value in values.items():
        if (
            isinstance(value, str)
            and isinstance(parsed[key], int | float)
            and MISREAD.fullmatch(value.strip())
        ):
            raise ArgumentError(None, PLAINLY)


def must_be(key: str, value: Any, words: str) -> str:
    """Return the sentence on a value of the wrong type; `words` describe the right one."""
    shown = str(value) if isinstance(value, date) else repr(value)
    if isinstance(value, str) and NOT_UTF8.search(value):
        return f"{key} is {shown}, which is not UTF-8; rename it, or name another"
    if isinstance(value, str) and MISREAD.fullmatch(value.strip()):
        words += f", {PLAINLY}"
    elif isinstance(value, bool | int | float | date) and words.startswith(("text", "a path")):
        words += (
            "; put it in quotes if it is meant as that"  # YAML reads no, 0x1 and 2024-01-01 as other things
        )
    return f"{key} is {shown}; it must be {words}"


def type_words(kind: Any) -> str:
    """Return how a message describes an annotated type: "a number or null"."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple and parts and ... not in parts:
        return f"a list of {len(parts)} values"
    if origin in TYPE_WORDS:
        return TYPE_WORDS[origin]
    words = dict.fromkeys(type_words(part) for part in parts)  # a union; null comes last
    known = [text for text in words if text in TYPE_WORDS.values() or text.startswith(("one of", "a list"))]
    return " or ".join(known or words) or getattr(kind, "__name__", str(kind))
