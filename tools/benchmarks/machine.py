"""What all benchmarks share: their command line, the machine in their JSON, where that is kept."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from litgpt_moe.files import check_replaceable
from litgpt_moe.flags import FlagParser, add_flags, from_flags
from litgpt_moe.threads import limit_spinning

ROOT = Path(__file__).resolve().parents[2]


def parse(description: str | None, kind: type, argv: list[str] | None) -> Any:
    """Return the dataclass `kind` from its flags, checked; and limit spinning as run_train.py does."""
    parser = FlagParser(description=description)
    add_flags(parser, kind)
    settings = from_flags(kind, parser.parse_args(argv))
    check_counts(parser, settings)
    limit_spinning()
    return settings


def check_counts(parser: FlagParser, settings: Any) -> None:
    """End with status 2 if a whole number among the settings, the seed apart, is not 1 or more.

    Likewise if the file of figures would replace one that is no JSON.
    """
    for item in {"out", "json"} & set(vars(settings)):
        if (path := getattr(settings, item)) is not None:
            try:
                check_replaceable(path, ".json")
            except OSError as error:
                parser.error(f"--{item}: {error}")
    for item in fields(settings):
        value = getattr(settings, item.name)
        if type(value) is int and item.name != "seed" and not 1 <= value < 2**31:
            parser.error(f"--{item.name}: {value} is not a number of 1 or more")


def recorded(settings: Any) -> dict[str, Any]:
    """Return a benchmark's settings as its JSON has them: paths below the project's folder, or a name."""

    def plain(value: Any) -> Any:
        if not isinstance(value, Path):
            return value
        return value.relative_to(ROOT).as_posix() if value.is_relative_to(ROOT) else value.name

    return {name: plain(value) for name, value in vars(settings).items()}


def machine() -> dict[str, str | int]:
    """Return processor, GPU where there is one, threads, system and versions."""
    from litgpt_moe import hardware  # not at the top: it imports torch, which --help must not wait for

    return hardware.machine()


def results_path(script: str, device: str) -> Path:
    """Return where a benchmark's JSON lies: in results/ beside its script, named by the GPU if it has one."""
    import torch

    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    name = "_".join([Path(script).stem, *re.findall(r"\w+", gpu.lower())])
    return Path(script).parent / "results" / f"{name}.json"
