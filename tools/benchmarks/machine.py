"""What the figures of a benchmark depend on, and where they are kept."""

import argparse
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]


class Count(int):
    """A number of 1 or more, for a flag."""

    def __new__(cls, text: str | int) -> Self:
        """Return the number that a flag's text is, for argparse."""
        if not str(text).isdecimal() or not 1 <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{str(text)[:20]!r} is not a number of 1 or more")
        return super().__new__(cls, text)


def machine() -> dict[str, str | int]:
    """Return processor, GPU where there is one, threads, system and versions."""
    import torch  # for the figures alone: --help must answer at once

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    } | {name: version(name) for name in ("torch", "litgpt", "tokenizers")}


def results_path(script: str, device: str) -> Path:
    """Return where a benchmark's JSON lies: in results/ beside its script, named by the GPU if it has one."""
    import torch  # see above

    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    name = "_".join([Path(script).stem, *re.findall(r"\w+", gpu.lower())])
    return Path(script).parent / "results" / f"{name}.json"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
