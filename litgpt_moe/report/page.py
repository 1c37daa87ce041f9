"""One HTML page of one run's logs, or of several runs side by side; it needs no network and no other file."""

import json
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_moe.report.about import about
from litgpt_moe.report.read import AXES, MAX_TEXT, Columns, RunLog

MAX_POINTS = 600  # of a curve: about one for each pixel of a chart
TEMPLATE = Path(__file__).with_name("report.html")
MARK = '<meta name="generator" content="tools/report.py">'
HIGHEST = {*AXES.values(), "memory", "skipped", "dead", "epoch"}  # downsampled by maximum, others by mean


def _run_data(run: RunLog) -> dict[str, Any]:
    logs, figures = dict(vars(run)), summary(run)
    facts = logs.pop("facts")
    return {
        **logs,
        "folder": str(run.folder),
        "done": (run.folder / "final").is_dir(),
        "summary": figures,
        "about": about(facts, run.settings, figures["tokens"], run.results),
        "train": as_json(thin(run.train, MAX_POINTS)),
        "val": as_json(thin(run.val, MAX_POINTS)),
        "stories": [{key: text[:MAX_TEXT] for key, text in story.items()} for story in run.stories],
    }


def make_page(runs: list[RunLog]) -> str:
    """Return the whole page; its script shows names and stories as plain text, never as HTML."""
    content = {"made": time.strftime("%Y-%m-%d %H:%M"), "runs": [_run_data(run) for run in runs]}
    data = json.dumps(content, ensure_ascii=False, allow_nan=False)
    data = data.encode(errors="replace").decode()  # half surrogate pairs, as of a file name that is not UTF-8
    # inside <script> only "<" can end or comment out the data
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA_HERE", data.replace("<", "\\u003c"), 1)


def is_page(path: Path) -> bool:
    """Return whether a file is a page that this module made."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.read(1000)


def thin(columns: Columns, most: int) -> Columns:
    """Return `columns` downsampled to `most` rows: means (HIGHEST: maxima), for three also the extremes."""
    n = len(next(iter(columns.values()), ()))
    if n <= most:
        return columns
    starts = np.linspace(0, n, most + 1).astype(int)[:-1]
    thinned: Columns = {}
    for name, values in columns.items():
        known = ~np.isnan(values)
        highest = np.fmax.reduceat(values, starts)
        if name in HIGHEST:
            thinned[name] = highest
            continue
        with np.errstate(invalid="ignore"):
            sums = np.add.reduceat(np.where(known, values, 0), starts)
            thinned[name] = sums / np.add.reduceat(known, starts, dtype=float)
        if name in ("loss", "norm", "imbalance"):
            thinned[f"{name}_low"], thinned[f"{name}_high"] = np.fmin.reduceat(values, starts), highest
    return thinned


def as_json(columns: Columns) -> dict[str, list[float | None]]:
    """Return columns of numbers with six digits, None for NaN and infinity."""
    return {
        name: [float(f"{v:.6g}") if ok else None for v, ok in zip(values, np.isfinite(values), strict=True)]
        for name, values in columns.items()
    }


def summary(run: RunLog) -> dict[str, float | None]:
    """Return the figures of the page's table."""

    def of(name: str, pick: Callable[[np.ndarray], Any], columns: Columns = run.train) -> float | None:
        values = columns.get(name, np.empty(0))
        values = values[np.isfinite(values)]
        return float(f"{pick(values):.6g}") if len(values) else None

    last = operator.itemgetter(-1)
    figures = {name: of(name, last) for name in ("flops", "loss", "left")}
    for name in ("step", "tokens", "time"):  # the last validation may come after the last row of training
        both = (of(name, last, part) for part in (run.train, run.val))
        figures[name] = max(filter(None, both), default=None)
    figures |= {name: of(name, np.median) for name in ("rate", "mfu")}
    figures |= {name: of(name, np.max) for name in ("memory", "skipped", "dead", "imbalance")}
    figures |= {"imbalance_now": of("imbalance", last)}
    return figures | {"val": of("loss", last, run.val), "best_val": of("loss", np.min, run.val)}
