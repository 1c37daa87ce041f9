"""Read the logs of a run: metrics, load of the experts, stories, spikes, settings.

A log may be older than this code, incomplete because the run still writes it, or damaged: missing parts are
left out, and an unreadable file raises an error of one sentence.
"""

import base64
import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_moe.checkpoints.layout import FINAL, steps_of
from litgpt_moe.cli import command_line, note
from litgpt_moe.files import read_json
from litgpt_moe.report.results import RESULTS_FILE, results_of
from litgpt_moe.yaml_files import read_mapping

MAX_HEAT_CELLS = 150_000  # of a run's heat maps: 200 kB of the page
MAX_STRETCHES = 120  # columns of a heat map, each a range of steps
MAX_LOAD_STEPS = 2_000  # read from logs/expert_load.csv, evenly spread
MAX_STORIES, MAX_SPIKES = 40, 200
MAX_TEXT = 4_000  # characters of a story
COUNT = re.compile(r"[0-9]{1,15}")  # what a float holds exactly
METRICS = "logs/csv/metrics.csv"
FACTS = "logs/run.json"
AXES = {"step": "step", "total_tokens": "tokens", "time_s": "time", "flops": "flops"}
CURVES = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "norm",
    "tokens_per_s": "rate",
    "mfu": "mfu",
    "peak_memory_gb": "memory",
    "skipped_steps": "skipped",
    "remaining_time": "left",
    "epoch": "epoch",
}
VALIDATION = {"val_loss": "loss", "val_ppl": "ppl"}
LAYERS = {"load_imbalance": ("imbalance", np.max), "dead_experts": ("dead", np.sum)}  # over a row's layers

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class RunLog:
    """The logs of one run; arrays have one entry per row."""

    name: str
    folder: Path
    train: Columns
    """By the short names of AXES, CURVES and LAYERS; NaN where a row has no value."""
    val: Columns
    heat: dict[str, Any] | None
    stories: list[dict[str, Any]]
    spikes: list[dict[str, Any]]
    results: list[dict[str, Any]]
    settings: dict[str, Any]
    command: str
    versions: dict[str, str]
    facts: dict[str, Any]
    """What logs/run.json holds, unchecked."""


def find_run(path: Path) -> Path:
    """Return the out_dir that `path` is, or that the checkpoint `path` belongs to."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; name the out_dir of a run")
    for folder in (path, path.absolute().parent):
        if (folder / METRICS).is_file():
            return folder
    # a run writes run.json when it starts, and metrics.csv with its first row
    has_begun = (path / FACTS).is_file()
    way_out = "wait for the run's first row" if has_begun else "name the out_dir of a run"
    raise FileNotFoundError(f"{path}: no {METRICS} in it; {way_out}")


def read_run(folder: Path, name: str, results_file: Path) -> RunLog:
    """Return the run's logs and its rows of `results_file`. ValueError or OSError has one sentence."""
    train, val = read_metrics(folder / METRICS)
    if "loss" not in train or not len(train["loss"]):
        way_out = "wait for the run's first one (train.log_interval)"
        raise ValueError(f"{folder / METRICS} has no row yet; {way_out}")
    heat = read_heat(folder / "logs/expert_load.csv", len(train["loss"]))
    # if the last step is also a step of eval.interval, the final validation writes its story twice
    last_stories = {row.get("step"): row for row in read_dicts(folder / "logs/stories.csv")}
    stories = spread(list(last_stories.values()), MAX_STORIES)
    spikes = spread(read_dicts(folder / "logs/spikes.csv"), MAX_SPIKES)
    results = results_of(folder, [results_file, folder / RESULTS_FILE])
    facts = _read(read_json, folder / FACTS)
    settings, command, versions = read_facts(folder, facts)
    logs = (train, val, heat, stories, spikes, results)
    return RunLog(name, folder, *logs, settings, command, versions, facts)


def whole_lines(path: Path) -> Iterator[str]:
    """Yield the complete lines of a log; the run may still be writing the last one."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for line in file:
            if line.endswith("\n"):
                yield line.replace("\0", "")


def read_rows(path: Path) -> Iterator[list[str]]:
    """Yield the header and the complete rows of a CSV log. ValueError if it is no CSV."""
    try:
        rows = csv.reader(whole_lines(path))
        yield (header := next(rows, []))
        yield from (row for row in rows if len(row) == len(header))
    except csv.Error as error:
        raise ValueError(f"{path} is damaged ({error}); take a whole copy of the log") from None


def read_dicts(path: Path) -> list[dict[str, str]]:
    """Return the rows of a small log, [] if there is none."""
    if not path.is_file():
        return []
    header, *rows = read_rows(path)
    return [dict(zip(header, row, strict=True)) for row in rows]


def read_metrics(path: Path) -> tuple[Columns, Columns]:
    """Return the columns of the training rows and of the validation rows of a metrics.csv."""
    rows = read_rows(path)
    header = next(rows, [])
    at = {name: i for i, name in enumerate(header)}
    losses = at.get("loss"), at.get("val_loss")
    numbers, filled = [], []
    for row in rows:
        numbers.append(np.fromiter(map(_number, row), float, len(row)))
        filled.append([i is not None and row[i] != "" for i in losses])
    table = np.array(numbers).reshape(len(numbers), len(header))
    is_train, is_val = np.array(filled, bool).reshape(len(filled), 2).T
    train, val = (
        {short: table[part, at[name]] for name, short in (AXES | names).items() if name in at}
        for part, names in ((is_train, CURVES), (is_val, VALIDATION))
    )
    for name, (short, reduce) in LAYERS.items():
        if places := [i for column, i in at.items() if column.startswith(f"moe/{name}/layer_")]:
            train[short] = reduce(table[is_train][:, places], axis=1)
    return train, val


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def read_heat(path: Path, n_rows: int) -> dict[str, Any] | None:
    """Return the load of each expert in at most 120 stretches of training, or None if it was not logged.

    "codes" is base64 of bytes (layers, stretches, experts): 0 for no token, else 128 + 32 log2(load / even).
    """
    if not path.is_file():
        return None
    loads, n_expert = read_loads(path, max(1, n_rows // MAX_LOAD_STEPS))
    layers = sorted(set().union(*loads.values()))
    if not layers or n_expert < 1:
        return None
    zeros = [0] * n_expert
    counts_SLE = np.array([[loads[step].get(layer, zeros) for layer in layers] for step in sorted(loads)])
    n_stretches = min(len(loads), MAX_STRETCHES, max(20, MAX_HEAT_CELLS // (len(layers) * n_expert)))
    edges = np.linspace(0, len(loads), n_stretches + 1).astype(int)
    counts_SLE = np.add.reduceat(counts_SLE.astype(float), edges[:-1], axis=0)
    mean_SL1 = counts_SLE.mean(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = 128 + 32 * np.log2(counts_SLE / mean_SL1)
    codes = np.where(counts_SLE > 0, np.nan_to_num(codes).clip(1, 255), 0).round().astype(np.uint8)
    return {
        "layers": layers,
        "n_expert": n_expert,
        "steps": np.array(sorted(loads))[edges[1:] - 1].tolist(),
        "codes": base64.b64encode(codes.transpose(1, 0, 2).tobytes()).decode(),
    }


def read_loads(path: Path, stride: int) -> tuple[dict[int, dict[int, list[int]]], int]:
    """Return step -> layer -> tokens of each expert for every `stride`-th step, and the number of experts."""
    lines = whole_lines(path)
    n_expert = next(lines, "").count(",") - 1
    loads: dict[int, dict[int, list[int]]] = {}
    # csv is not needed for whole numbers, and is slow on a hundred thousand steps
    steps = itertools.groupby(lines, key=lambda line: line.partition(",")[0])
    for _, rows in itertools.islice(steps, 0, None, stride):
        for row in rows:
            cells = [cell.strip() for cell in row.split(",")]
            if len(cells) == n_expert + 2 and all(map(COUNT.fullmatch, cells)):
                step, layer, *counts = map(int, cells)
                loads.setdefault(step, {})[layer] = counts
    return loads, n_expert


def read_facts(folder: Path, facts: dict[str, Any]) -> tuple[dict[str, str], str, dict[str, str]]:
    """Return a run's settings, command and versions, from its logs/run.json and the newest checkpoint."""
    checkpoints = [folder / FINAL, *reversed(steps_of(folder).values())]

    def newest(name: str) -> dict[str, Any]:
        path = next((folder / name for folder in checkpoints if (folder / name).is_file()), None)
        return _read(lambda path: read_mapping(path, is_foreign=True), path) if path else {}

    def fact(name: str, kind: type) -> Any:
        value = facts.get(name)
        return value if isinstance(value, kind) else kind()

    settings = flatten(fact("settings", dict) or newest("train_config.yaml"))
    settings |= flatten(newest("model_config.yaml"), "model.")
    versions = {key: str(value) for key, value in fact("versions", dict).items()}
    if device := facts.get("device"):
        versions["device"] = str(device)
    return settings, command_line(*fact("command", list)), versions


def _read(read: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    """Return what `read` does, or {} with a note: the curves can be shown without it."""
    try:
        return read(path)
    except (ValueError, OSError) as error:
        note(f"left out: {error}")
        return {}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return dotted key -> value as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            try:
                text = value if isinstance(value, str) else json.dumps(value, default=str)
            except TypeError:  # a date as a key
                text = str(value)
            flat[f"{prefix}{key}"] = text[:MAX_TEXT]
    return flat


def spread(items: list[Any], most: int) -> list[Any]:
    """Return at most `most` of `items`, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
