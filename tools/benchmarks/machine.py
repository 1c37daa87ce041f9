"""What the figures of a benchmark depend on, for all of them. Nothing to run here."""

import argparse
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path


def machine() -> dict[str, str | int]:
    """Return processor, GPU where there is one, threads, system and versions."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    } | {name: version(name) for name in ("torch", "litgpt", "tokenizers")}


def count(text: str) -> int:
    """Return the number of 1 or more that a flag's text is, for argparse."""
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a number of 1 or more")
    return int(text)


def results_path(script: str, device: str) -> Path:
    """Return where a benchmark's JSON lies: beside its script, named by the GPU if `device` is one."""
    import torch

    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    return Path(script).with_name("_".join([Path(script).stem, *re.findall(r"\w+", gpu.lower())]) + ".json")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
