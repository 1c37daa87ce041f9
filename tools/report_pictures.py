"""The PNG pictures of tools/report.py, by matplotlib from the figures of its page. Nothing to run here."""

import base64
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#c85400", "#00805d", "#b0568c", "#8f6a00", "#444b55")  # as in report.html
PANELS = {
    "lr": "Learning rate",
    "norm": "Gradient norm",
    "rate": "Tokens per second",
    "mfu": "MFU",
    "memory": "Peak memory, GB",
    "imbalance": "Worst imbalance (1 is even)",
    "dead": "Experts without a token",
    "skipped": "Skipped steps",
}
AXES = ("tokens", "time")
FEW, EVEN, MANY, NONE = "#005aaa", "#f6f6f3", "#cd5000", "black"  # of report.html: no blue is near black
INK, MUTED = "#1f2430", "#6b7280"


def _axes_style(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#ecece7")
    axes.set_axisbelow(True)


def time_unit(runs: list[dict[str, Any]]) -> tuple[str, float]:
    """Return the name and the seconds of the unit in which the longest run takes two or more."""
    longest = max((t for run in runs for t in run["train"].get("time") or [] if t is not None), default=0.0)
    units = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
    return next((unit for unit in units.items() if longest >= 2 * unit[1]), ("seconds", 1.0))


def _draw(axes: "Axes", runs: list[dict[str, Any]], part: str, key: str, along: str, **style: Any) -> None:
    """Draw one column of all runs over tokens or time; a run that lacks either is left out."""
    import numpy as np
    from matplotlib.ticker import EngFormatter

    name, unit = ("tokens", 1.0) if along == "tokens" else time_unit(runs)
    for i, run in enumerate(runs):
        x, y = run[part].get(along), run[part].get(key)
        if x is None or y is None:
            continue
        values = np.array(y, dtype=float)
        label = run["name"] if part == "train" else None
        mark = {"marker": "."} if len(values) == 1 else {}  # a line needs two points
        axes.plot(np.array(x, dtype=float) / unit, values, color=COLOURS[i % 6], label=label, **mark | style)
    axes.set_xlabel(name)
    if along == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_loss(runs: list[dict[str, Any]]) -> "Figure":
    """Return training (line) and validation loss (dots), over tokens and over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained", dpi=130)
    for axes, along in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
        _draw(axes, runs, "train", "loss", along, linewidth=1.2)
        _draw(axes, runs, "val", "loss", along, linewidth=1, linestyle="--", marker="o", markersize=3.5)
        _axes_style(axes, f"Loss over {along} (line: training, dots: validation)")
        if len(runs) > 1:
            axes.legend(frameon=False)
    return figure


def draw_training(runs: list[dict[str, Any]]) -> "Figure":
    """Return the other curves over tokens, a panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.5), layout="constrained", dpi=130)
    for axes, (key, title) in zip(figure.subplots(2, 4).flat, PANELS.items(), strict=True):
        _draw(axes, runs, "train", key, "tokens", linewidth=1.2)
        _axes_style(axes, title)
        if key not in ("imbalance", "norm"):
            axes.set_ylim(0, max(axes.get_ylim()[1] * 1.05, 0 if key not in ("dead", "skipped") else 1))
    if len(runs) > 1:
        figure.axes[0].legend(frameon=False)
    return figure


def draw_heat(run: dict[str, Any]) -> "Figure":
    """Return the load of each expert over training, a map for each layer."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    heat = run["heat"]
    codes = np.frombuffer(base64.b64decode(heat["codes"]), np.uint8)
    codes_LSE = codes.reshape(len(heat["layers"]), -1, heat["n_expert"]).astype(float)
    shade_LSE = np.where(codes_LSE > 0, (codes_LSE - 128) / 32, np.nan)
    n_rows = -(-len(heat["layers"]) // 3)
    n_columns = min(3, len(heat["layers"]))
    size = (4.6 * n_columns + 1, max(2.2, 0.09 * heat["n_expert"]) * n_rows + 0.6)
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    figure.suptitle(f"{run['name']}: tokens per expert, times even (black: none at all)", parse_math=False)
    colours = LinearSegmentedColormap.from_list("load", [FEW, EVEN, MANY])
    panels = figure.subplots(n_rows, n_columns, squeeze=False)
    for axes, layer, shade_SE in zip(panels.flat, heat["layers"], shade_LSE, strict=False):
        extent = (0, heat["steps"][-1], heat["n_expert"] - 0.5, -0.5)
        axes.set_facecolor(NONE)
        image = axes.imshow(shade_SE.T, aspect="auto", cmap=colours, vmin=-2, vmax=2, extent=extent)
        image.set_interpolation("nearest")
        axes.set_title(f"layer {layer}", loc="left", fontsize=10)
        axes.set(xlabel="step", ylabel="expert")
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    for axes in list(panels.flat)[len(heat["layers"]) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=panels, pad=0.01)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
    return figure


def write_pictures(runs: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write the pictures of `runs`, as in the page's data, into `folder`, and return their paths."""
    import matplotlib

    from litgpt_moe.files import open_whole

    colours = {"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED}
    paths = []
    # names of folders may hold "$", which would begin mathematics
    style = {**colours, "font.size": 9, "axes.edgecolor": "#c8ccd2", "text.parse_math": False}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a script that the font lacks becomes boxes
        figures = {"loss": draw_loss(runs), "training": draw_training(runs)}
        for number, run in enumerate(runs, 1):
            if run["heat"]:
                figures[f"load_{number}" if len(runs) > 1 else "load"] = draw_heat(run)
        for name, figure in figures.items():
            paths.append(folder / f"{name}.png")
            with open_whole(paths[-1]) as file:
                figure.savefig(file, format="png", facecolor="white")
    return paths
