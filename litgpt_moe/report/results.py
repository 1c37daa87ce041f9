"""The file of evaluation results, one JSON object a line: append to it, and find the results of a run."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from litgpt_moe.checkpoints.layout import CHECKPOINT_FILE, checkpoints_of, read_record
from litgpt_moe.cli import WorkFailed, note
from litgpt_moe.files import check_no_links, fits, is_network_share, open_no_link

RESULTS_FILE = "results.jsonl"
MAX_ROWS = 100  # of a run, the newest
MAX_LINE_BYTES = 1 << 20
MAX_TEXT = 300
ROW_FORM = {"checkpoint": {"path": str, "sha256": str}, "data": {}, "time": str}
FIGURES = ("loss", "loss_stderr", "perplexity", "bits_per_byte", "n_tokens")
QUALITY = {  # name on the page -> where it stands in a row
    "blimp": ("blimp", "accuracy"),
    **{
        name: ("stories", name)
        for name in ("n", "ended", "distinct_3", "repeated_4", "copied_longest", "known_words")
    },
    **{name: ("stories", "judge", name) for name in ("grammar", "creativity", "consistency", "plot")},
}


def check_file(path: Path) -> None:
    """Raise ValueError if `path` is there and no file of results: the row would spoil somebody's file."""
    check_no_links(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file with --results_file, or none")
    if path.is_file() and path.stat().st_size and not _is_row(path):
        raise ValueError(f"{path} holds something else than results; name another --results_file")


def _is_row(path: Path) -> bool:
    """Return whether the first line is a result, or the beginning of one that a full disk cut off."""
    with path.open("rb") as file:
        line = file.readline(MAX_LINE_BYTES)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith(b'{"') and not line.endswith(b"\n")
    return isinstance(row, dict) and "loss" in row


def append(result: dict[str, Any], path: Path) -> None:
    """Append a result to the file `path`; WorkFailed if that is impossible or `path` is a link."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_no_links(path)  # which, in a folder of somebody else's, may lead to any file of the user's
        with open(path, "ab+", opener=open_no_link) as file:
            # a row that a full disk cut off must not spoil this one
            is_torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
            file.write(b"\n" * is_torn + json.dumps(result).encode() + b"\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WorkFailed(f"{path}: not recorded ({reason}); name another --results_file") from error
    note(f"appended to {path}")


def results_of(run: Path, files: list[Path]) -> list[dict[str, Any]]:
    """Return the rows about the checkpoints of a run, known by digest or path, as the report shows them."""
    names = {}
    for folder in checkpoints_of(run):
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            names[read_record(folder)["files"][CHECKPOINT_FILE]["sha256"]] = folder.name
    rows: dict[str, dict[str, Any]] = {}
    for row in (row for path in files for row in json_rows(path, ROW_FORM)):
        place, name = Path(row["checkpoint"]["path"]), names.get(row["checkpoint"]["sha256"])
        with contextlib.suppress(ValueError, OSError):  # a zero byte, a loop of links
            if name is None and _may_look_at(place, run) and place.parent.resolve() == run.resolve():
                name = place.name + (" (replaced since)" if place.name in names.values() else "")
        if name is not None:
            shown = {"checkpoint": name, "time": row["time"][:40], "data": _describe(row["data"])}
            shown |= {key: row.get(key) if _is_number(row.get(key)) else None for key in FIGURES}
            shown["quality"] = _quality_of(row)
            rows.setdefault(json.dumps(shown), shown)  # the same row may stand in both files
    return sorted(rows.values(), key=lambda row: row["time"])[-MAX_ROWS:]


def _may_look_at(place: Path, run: Path) -> bool:
    """Return whether a path that a file names, perhaps a stranger's, is on no network share but the run's."""
    share, own = (PureWindowsPath(str(path)).drive.lower() for path in (place, run.resolve()))
    return not is_network_share(str(place)) or (share != "" and share == own)


def json_rows(path: Path, form: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines that have this form; a damaged row is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            with contextlib.suppress(ValueError, RecursionError):
                if fits(row := json.loads(line), form):
                    yield row


def _describe(data: dict[str, Any]) -> str:
    if not data:
        return "none"
    texts = data.get("text")
    if isinstance(texts, list):
        words = [str(text.get("path")) for text in texts if isinstance(text, dict)]
        return ", ".join(words)[:MAX_TEXT]
    return f"{data.get('data_dir')} {data.get('split')}"[:MAX_TEXT]


def _quality_of(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return what evaluate.py found beside the loss, None if that is nothing."""
    found = {}
    for name, keys in QUALITY.items():
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if _is_number(value):
            found[name] = value
    return found or None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # also false for NaN
