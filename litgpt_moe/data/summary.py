"""What prepare_data.py's summary says of what was read, and whether the next command may count on a GPU."""

import contextlib
import ctypes
import sys
from importlib.metadata import version
from typing import Any

from litgpt_moe.data.inputs import some


def what_was_read(manifest: dict[str, Any]) -> list[str]:
    """Return the lines on the files of text and on what was skipped; [] for data of an earlier version."""
    record = manifest.get("input")
    if not record:
        line = "mix    {folder}: weight {weight:.3g}, {n_drawn:,} of {n_tokens:,} tokens, {passes:.2f} passes"
        return [line.format(**entry) for entry in manifest.get("mix", ())]
    parts = manifest["splits"].values()
    n_bytes = sum(entry["size"] for part in parts for key in ("text", "read") for entry in part.get(key, ()))
    columns = "".join(f", column {column}" for column in record["columns"])
    n_stories = sum(part["n_stories"] + part["n_duplicates"] for part in parts)
    lines = [f"read   {record['n_files']:,} files, {n_bytes:,} bytes, {n_stories:,} stories{columns}"]
    for kind in ("files", "rows"):
        if skipped := record[f"skipped_{kind}"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
            lines.append(f"skip   {sum(skipped.values()):,} {kind}: {reasons}")
    if links := record.get("links"):  # earlier versions did not record them
        by = "1 file read through a link" if len(links) == 1 else f"{len(links):,} files read through links"
        lines.append(f"link   {by} out of its folder: {some(links)}")
    return lines


def sees_gpu() -> bool:
    """Return whether torch will find a CUDA device. The driver is asked: to import torch takes seconds."""
    if version("torch").endswith("+cpu"):
        return False
    count = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):  # there is no driver
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return cuda.cuInit(0) == 0 == cuda.cuDeviceGetCount(ctypes.byref(count)) and count.value > 0
    return False
