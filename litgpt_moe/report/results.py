"""The file of evaluation results, one JSON object a line: append to it, and find the results of a run."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litgpt_moe.checkpoints.layout import CHECKPOINT_FILE, checkpoints_of, read_record
from litgpt_moe.cli import WorkFailed, note
from litgpt_moe.files import fits

RESULTS_FILE = "results.jsonl"
MAX_ROWS = 100  # of a run, the newest
MAX_LINE_BYTES = 1 << 20
MAX_TEXT = 300
ROW_FORM = {"checkpoint": {"path": str, "sha256": str}, "data": {}, "time": str}
FIGURES = ("loss", "loss_stderr", "perplexity", "bits_per_byte", "n_tokens")


def append(result: dict[str, Any], path: Path) -> None:
    """Append a result to the file `path`; WorkFailed if that is impossible or `path` is a link."""
    # a link in a folder of somebody else's could lead to any file of the user's
    flags = (
        os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    )
    way_out = "name another --results_file"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise WorkFailed(f"{path}: not recorded (it is a link); {way_out}")
        with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise WorkFailed(f"{path}: not recorded (it is no file); {way_out}")
            file.write(json.dumps(result) + "\n")
    except OSError as error:
        raise WorkFailed(f"{path}: not recorded ({error.strerror or error}); {way_out}") from error
    note(f"appended to {path}")


def results_of(run: Path, files: list[Path]) -> list[dict[str, Any]]:
    """Return the rows about the checkpoints of a run, known by digest or path, as the report shows them."""
    names = {}
    for folder in checkpoints_of(run):
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            names[read_record(folder)["files"][CHECKPOINT_FILE]["sha256"]] = folder.name
    rows: dict[str, dict[str, Any]] = {}
    for row in (row for path in files for row in _read(path)):
        place, name = Path(row["checkpoint"]["path"]), names.get(row["checkpoint"]["sha256"])
        with contextlib.suppress(ValueError, OSError):  # a zero byte, a loop of links
            name = name or (place.name if place.parent.resolve() == run.resolve() else None)
        if name is not None:
            shown = {"checkpoint": name, "time": row["time"][:40], "data": _describe(row["data"])}
            shown |= {key: row.get(key) if _is_number(row.get(key)) else None for key in FIGURES}
            rows.setdefault(json.dumps(shown), shown)  # the same row may stand in both files
    return sorted(rows.values(), key=lambda row: row["time"])[-MAX_ROWS:]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a results file that have the form of ours; a damaged row is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            with contextlib.suppress(ValueError, RecursionError):
                if fits(row := json.loads(line), ROW_FORM):
                    yield row


def _describe(data: dict[str, Any]) -> str:
    texts = data.get("text")
    if isinstance(texts, list):
        words = [str(text.get("path")) for text in texts if isinstance(text, dict)]
        return ", ".join(words)[:MAX_TEXT]
    return f"{data.get('data_dir')} {data.get('split')}"[:MAX_TEXT]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # also false for NaN
