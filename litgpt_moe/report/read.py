"""Make one HTML page, and PNG pictures, of one run's logs or of several runs side by side.

Run: uv run python tools/report.py checkpoints     (2 s)

The page needs no network and no other file. A run that is still going can be shown at any time: make the page
again to see more. The PNGs, in a folder beside the page, need matplotlib (uv sync --extra report).
"""

import argparse
import base64
import csv
import itertools
import json
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe.cli import FlagParser

if TYPE_CHECKING:
    import numpy as np

MAX_POINTS = 600  # of a curve: about one for each pixel of a chart
MAX_HEAT_CELLS = 150_000  # of a run's heat maps: 200 kB of the page
MAX_LOAD_STEPS = 2_000  # of logs/expert_load.csv, evenly spread: a heat map has 120 columns
MAX_STORIES, MAX_SPIKES = 40, 200
MAX_TEXT = 4_000  # characters of a story
MAX_YAML_BYTES = 1 << 20
TEMPLATE = Path(__file__).with_suffix(".html")
MARK = '<meta name="generator" content="tools/report.py">'
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
LAYERS = {"load_imbalance": ("imbalance", max), "dead_experts": ("dead", sum)}  # over the layers of a row

HIGHEST = {*AXES.values(), "memory", "skipped", "dead", "epoch"}  # count up, or matter at their worst


@dataclass
class RunLog:
    """What the logs of one run say; arrays have one entry for a row."""

    name: str
    folder: Path
    train: "dict[str, np.ndarray]"
    """By the short names of AXES, CURVES and LAYERS; NaN where a row or an old run says nothing."""
    val: "dict[str, np.ndarray]"
    heat: dict[str, Any] | None = None
    stories: list[dict[str, Any]] = field(default_factory=list)
    spikes: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)


# --- reading ------------------------------------------------------------------------------------------------


def whole_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a log that may just be written: the last one counts once it has its end."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for line in file:
            if line.endswith("\n"):
                yield line.replace("\0", "")


def read_rows(path: Path) -> Iterator[list[str]]:
    """Yield the header and the rows of a CSV log. Raises ValueError naming the file where it is no CSV."""
    try:
        yield from csv.reader(whole_lines(path))
    except csv.Error as error:
        raise ValueError(f"{path} is damaged ({error}); take a whole copy of the log") from None


def number(text: str) -> float:
    """Return the number in a cell, NaN for none."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def read_metrics(path: Path) -> "tuple[dict[str, np.ndarray], dict[str, np.ndarray]]":
    """Return the columns of the training rows and of the validation rows of logs/csv/metrics.csv."""
    import numpy as np

    rows = read_rows(path)
    header = next(rows, [])
    at = {name: i for i, name in enumerate(header)}
    plain = [(short, at[name]) for name, short in (AXES | CURVES).items() if name in at]
    layers = [
        (short, reduce, [i for column, i in at.items() if column.startswith(f"moe/{name}/layer_")])
        for name, (short, reduce) in LAYERS.items()
    ]
    layers = [entry for entry in layers if entry[2]]
    axes = [(short, at[name]) for name, short in AXES.items() if name in at]
    validation = [*axes, *((short, at[name]) for name, short in VALIDATION.items() if name in at)]
    train: list[list[float]] = []
    val: list[list[float]] = []
    for row in rows:
        if len(row) != len(header):
            continue
        if "loss" in at and row[at["loss"]]:
            values = [number(row[i]) for _, i in plain]
            train.append(values + [reduce(number(row[i]) for i in found) for _, reduce, found in layers])
        if "val_loss" in at and row[at["val_loss"]]:
            val.append([number(row[i]) for _, i in validation])
    names = [short for short, _ in plain] + [short for short, *_ in layers]
    table = np.array(train).reshape(len(train), len(names))
    val_names = [short for short, _ in validation]
    val_table = np.array(val).reshape(len(val), len(val_names))
    return dict(zip(names, table.T, strict=True)), dict(zip(val_names, val_table.T, strict=True))


def read_heat(path: Path, n_rows: int) -> dict[str, Any] | None:
    """Return the load of each expert in at most 120 stretches of training, or None if it was not logged.

    "codes" is base64 of bytes (layers, stretches, experts): 0 for no token, else 128 + 32 log2(load / even).
    """
    import numpy as np

    if not path.is_file():
        return None
    lines = whole_lines(path)
    n_expert = next(lines, "").count(",") - 1
    stride = max(1, n_rows // MAX_LOAD_STEPS)
    loads: dict[int, dict[int, list[int]]] = {}
    # whole numbers alone: no need of csv, which takes its time on a hundred thousand steps
    for index, (_, group) in enumerate(itertools.groupby(lines, key=lambda line: line.partition(",")[0])):
        for row in (line.split(",") for line in group if index % stride == 0):
            cells = [cell.strip() for cell in row]
            if len(cells) == n_expert + 2 and all(cell.isdecimal() for cell in cells):
                step, layer, *counts = map(int, cells)
                loads.setdefault(step, {})[layer] = counts
    layers = sorted(set().union(*loads.values()))
    if not layers or n_expert < 1:
        return None
    zeros = [0] * n_expert
    counts_SLE = np.array([[loads[step].get(layer, zeros) for layer in layers] for step in sorted(loads)])
    n_stretches = min(len(loads), 120, max(20, MAX_HEAT_CELLS // (len(layers) * n_expert)))
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


def read_dicts(path: Path) -> list[dict[str, str]]:
    """Return the rows of a small log, [] if there is none."""
    if not path.is_file():
        return []
    rows = read_rows(path)
    header = next(rows, [])
    return [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]


def spread(items: list[Any], most: int) -> list[Any]:
    """Return at most `most` of `items`, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return dotted key -> value as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[f"{prefix}{key}"] = text[:MAX_TEXT]
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a checkpoint's settings, {} where they cannot be read: the curves do not depend on them."""
    # not moe_layers.read_mapping: it says what is wrong, but brings 10 s of torch and LitGPT
    import yaml

    try:
        text = path.read_bytes()[:MAX_YAML_BYTES]
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            return {}  # a few lines of them can stand for gigabytes
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def read_settings(run: RunLog) -> None:
    """Fill in the settings, the command and the versions, from logs/run.json and the newest checkpoint."""
    from litgpt_moe.files import read_json

    facts = read_json(run.folder / "logs/run.json")
    checkpoints = [run.folder / "final", *sorted(run.folder.glob("step-*"), reverse=True)]

    def newest(name: str) -> dict[str, Any]:
        path = next((folder / name for folder in checkpoints if (folder / name).is_file()), None)
        return read_yaml(path) if path else {}

    settings = facts.get("settings") or newest("train_config.yaml")
    run.settings = flatten(settings) | flatten(newest("model_config.yaml"), "model.")
    run.command = shlex.join(map(str, facts.get("command") or []))
    run.versions = {str(key): str(value) for key, value in (facts.get("versions") or {}).items()}
    if device := facts.get("device"):
        run.versions["device"] = str(device)


def find_run(path: Path) -> Path:
    """Return the out_dir that `path`, or the checkpoint it is, belongs to.

    Raises:
        FileNotFoundError: one sentence on what is not there.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; name the out_dir of a run")
    for folder in (path, path.absolute().parent):
        if (folder / "logs/csv/metrics.csv").is_file():
            return folder
    # a run writes run.json as it starts, and metrics.csv with its first row
    has_begun = (path / "logs/run.json").is_file()
    way = "wait for the run's first row" if has_begun else "name the out_dir of a run"
    raise FileNotFoundError(f"{path}: no logs/csv/metrics.csv in it; {way}")


def read_run(folder: Path, name: str) -> RunLog:
    """Return what the run's logs say. Raises ValueError or OSError with one sentence."""
    log = folder / "logs/csv/metrics.csv"
    train, val = read_metrics(log)
    if "loss" not in train or not len(train["loss"]):
        raise ValueError(f"{log} has no row yet; wait for the run's first one (train.log_interval)")
    run = RunLog(name, folder, train, val)
    run.heat = read_heat(folder / "logs/expert_load.csv", len(train["loss"]))
    # where the last step has a validation by the interval, the final one tells its story again
    stories = {row.get("step"): row for row in read_dicts(folder / "logs/stories.csv")}
    run.stories = spread(list(stories.values()), MAX_STORIES)
    run.spikes = spread(read_dicts(folder / "logs/spikes.csv"), MAX_SPIKES)
    read_settings(run)
    return run


# --- the page -----------------------------------------------------------------------------------------------


def thin(columns: "dict[str, np.ndarray]", most: int) -> "dict[str, np.ndarray]":
    """Return `columns` with at most `most` rows: means, or the highest for what counts up; and extremes."""
    import numpy as np

    n = len(next(iter(columns.values()), ()))
    if n <= most:
        return columns
    starts = np.linspace(0, n, most + 1).astype(int)[:-1]
    thinned: dict[str, np.ndarray] = {}
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


def as_json(columns: "dict[str, np.ndarray]") -> dict[str, list[float | None]]:
    """Return columns of numbers of six digits; null for what is no number."""
    import numpy as np

    return {
        name: [float(f"{v:.6g}") if ok else None for v, ok in zip(values, np.isfinite(values), strict=True)]
        for name, values in columns.items()
    }


def summary(run: RunLog) -> dict[str, float | None]:
    """Return the figures of the page's table."""
    import numpy as np

    def of(name: str, pick: "Callable[[np.ndarray], Any]", columns: "dict[str, np.ndarray]") -> float | None:
        values = columns.get(name, np.empty(0))
        values = values[np.isfinite(values)]
        return float(f"{pick(values):.6g}") if len(values) else None

    def last(values: "np.ndarray") -> float:
        return values[-1]

    figures = {name: of(name, last, run.train) for name in ("flops", "loss", "left")}
    for name in ("step", "tokens", "time"):  # the last validation may come after the last row of training
        figures[name] = max(
            filter(None, (of(name, last, part) for part in (run.train, run.val))), default=None
        )
    figures |= {name: of(name, np.median, run.train) for name in ("rate", "mfu")}
    figures |= {name: of(name, np.max, run.train) for name in ("memory", "skipped", "dead", "imbalance")}
    figures |= {"imbalance_now": of("imbalance", last, run.train)}
    return figures | {"val": of("loss", last, run.val), "best_val": of("loss", np.min, run.val)}


def page_data(runs: list[RunLog]) -> dict[str, Any]:
    """Return what the page's script draws."""
    return {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "done": (run.folder / "final").is_dir(),
                "summary": summary(run),
                "train": as_json(thin(run.train, MAX_POINTS)),
                "val": as_json(thin(run.val, MAX_POINTS)),
                "heat": run.heat,
                "stories": [{key: text[:MAX_TEXT] for key, text in story.items()} for story in run.stories],
                "spikes": run.spikes,
                "settings": run.settings,
                "command": run.command,
                "versions": run.versions,
            }
            for run in runs
        ],
    }


def make_page(content: dict[str, Any]) -> str:
    """Return the whole page; what users wrote is in it as data, which its script shows as text alone."""
    data = json.dumps(content, ensure_ascii=False, allow_nan=False)
    # inside <script> only "<" can end or comment out the data
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA_HERE", data.replace("<", "\\u003c"), 1)


def name_runs(paths: Iterable[Path]) -> list[str]:
    """Return a name for each run: its folder's, or the whole path where two are alike."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


# --- the command line ---------------------------------------------------------------------------------------


def check_out(out: Path, overwrite: bool) -> None:
    """Raise OSError if `out` cannot be written or holds something that this tool did not make."""
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; name a file with --out, like report.html")
    if out.is_file() and not overwrite:
        with out.open(encoding="utf-8", errors="replace") as file:
            if MARK not in file.read(1000):
                raise FileExistsError(f"{out} exists and is no report; add --overwrite or name another --out")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", default=[Path("checkpoints")], help="out_dirs of runs (checkpoints)")
    add("--out", type=Path, default=Path("report.html"), help="the page (%(default)s)")
    add("--overwrite", action="store_true", help="replace a file that is no report, too")
    return parser


def pictures_folder(out: Path) -> Path:
    """Return the folder beside the page `out` that its pictures go to."""
    return out.with_name(f"{out.stem}_pictures")


def make_pictures(content: dict[str, Any], out: Path) -> str:
    """Write the PNG pictures of the page `out`; return the sentence that says so, or why there are none."""
    if find_spec("matplotlib") is None:
        return "No PNG pictures: the package matplotlib is not installed; run uv sync --extra report."
    from tools.report_pictures import write_pictures

    paths = write_pictures(content["runs"], pictures_folder(out))
    return f"{pictures_folder(out)} holds the pictures {', '.join(path.name for path in paths)}."


def report(args: argparse.Namespace) -> list[str]:
    """Write the page and the pictures, and return the lines that say what was made.

    Raises:
        ValueError: one sentence on what is wrong with a log.
        OSError: a log or a place to write is missing.
    """
    check_out(args.out, args.overwrite)
    folders = {folder.resolve(): folder for folder in map(find_run, args.runs)}.values()
    runs = [read_run(folder, name) for folder, name in zip(folders, name_runs(folders), strict=True)]

    from litgpt_moe.files import write_whole

    content = page_data(runs)
    write_whole(args.out, make_page(content))
    size, names = args.out.stat().st_size / 1000, ", ".join(run.name for run in runs)
    pictures = make_pictures(content, args.out)
    where = args.out.resolve().as_uri()
    return [pictures, f"{args.out} ({size:,.0f} kB) shows {names}; open it in a browser: {where}"]


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    from litgpt_moe.cli import run_command

    return run_command(lambda: "\n".join(report(args)))


if __name__ == "__main__":
    raise SystemExit(main())
