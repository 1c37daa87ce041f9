"""Stories in every form of file that is read."""

import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
from helpers.data import write_text
from pyarrow import parquet

from litgpt_moe.data.forms import form_of

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def write_rows(path: Path, stories: list[str], column: str = "text") -> Path:
    """Write stories in the form that the file's name tells, with a second column of numbers."""
    form, packing = form_of(path) or ("", "")
    rows = [{"id": i, column: story} for i, story in enumerate(stories)]
    plain = path.with_name("plain")
    path.parent.mkdir(parents=True, exist_ok=True)
    if form in (".txt", ".md"):
        write_text(plain, stories)
    elif form == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), plain, row_group_size=7)
    elif form in (".json", ".jsonl"):
        lines = [json.dumps(row) for row in rows]
        plain.write_text("\n".join(lines) if form == ".jsonl" else f"[{', '.join(lines)}]", encoding="utf-8")
    else:
        with plain.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["id", column], delimiter="\t" if form == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    path.write_bytes(PACK[packing](plain.read_bytes()))
    plain.unlink()
    return path
