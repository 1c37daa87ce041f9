"""The figure of tools/inspect_routing.py, drawn with matplotlib, which the extra `report` installs."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from litgpt_moe.routing import N_TYPICAL, Layer

INK, MUTED, ACCENT = "#1f2430", "#6b7280", "#3b6ea8"


def draw(title: str, layers: list[Layer], table_LL: list[list[float]], shown: Layer) -> Figure:
    """Return the figure: load and overlap above, typical tokens of `shown` and "token tells" below."""
    n_layer, n_expert = len(layers), len(shown.experts)
    left, above, below = max(6.5, 0.42 * n_expert), max(2.6, 0.42 * n_layer), max(2.6, 0.27 * n_expert)
    style: dict[Any, Any] = {"font.size": 9, "axes.edgecolor": "#c8ccd2", "text.color": INK}
    style |= dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), MUTED)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(left + 4.6, above + below + 1.6), layout="constrained", dpi=130)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
        ratios = {"width_ratios": (left, 3.6), "height_ratios": (above, below)}
        ((load, overlap), (tokens, tells)) = figure.subplots(2, 2, gridspec_kw=ratios)
        _draw_load(figure, load, layers)
        _draw_overlap(figure, overlap, layers, table_LL)
        _draw_tokens(tokens, shown)
        _draw_tells(tells, layers, shown)
    return figure


def _head(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, parse_math=False)


def _write_cells(axes: Axes, form: str, values: np.ndarray, is_dark: np.ndarray) -> None:
    for (y, x), value in np.ma.ndenumerate(values):  # skips masked cells
        ink = "white" if is_dark[y, x] else INK
        axes.text(x, y, form.format(value), ha="center", va="center", fontsize=7, color=ink)


def _draw_load(figure: Figure, axes: Axes, layers: list[Layer]) -> None:
    n_expert = len(layers[0].experts)
    load_LE = np.array([[expert.share * n_expert for expert in layer.experts] for layer in layers])
    shade_LE = np.log2(load_LE.clip(0.125, 8))
    limit = max(1.0, float(np.abs(shade_LE).max()))
    image = axes.imshow(shade_LE, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    _head(axes, "Load: tokens per expert, relative to an even split")
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_yticks(range(len(layers)), [str(layer.index) for layer in layers])
    axes.set_xticks(range(n_expert) if n_expert <= 40 else range(0, n_expert, 8))
    if n_expert <= 40:
        _write_cells(axes, "{:.1f}", load_LE, abs(shade_LE) > 0.65 * limit)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
    ticks = [t for t in (-3, -2, -1, 0, 1, 2, 3) if abs(t) <= limit]
    bar.set_ticks(ticks, labels=[f"{2.0**t:g}" for t in ticks])
    bar.outline.set_visible(False)


def _draw_overlap(figure: Figure, axes: Axes, layers: list[Layer], table_LL: list[list[float]]) -> None:
    values = np.array(table_LL)
    others = np.ma.masked_where(np.eye(len(values), dtype=bool), values)
    highest = max(0.2, float(others.filled(0).max()))
    image = axes.imshow(others, cmap="Blues", vmin=0.0, vmax=highest)
    _head(axes, "Overlap of first choices")
    names = [str(layer.index) for layer in layers]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="layer")
    if len(names) <= 8:
        _write_cells(axes, "{:.2f}", others, values > 0.6 * highest)
    figure.colorbar(image, ax=axes, pad=0.02, aspect=30).outline.set_visible(False)


def _draw_tokens(axes: Axes, shown: Layer) -> None:
    """Write the typical tokens, darker the larger the share of their occurrences is."""
    _head(axes, f"Layer {shown.index}: most typical tokens of each expert (darker: more of them go there)")
    n_expert = len(shown.experts)
    axes.set(xlim=(0, N_TYPICAL), ylim=(n_expert - 0.5, -0.5), ylabel="expert", xticks=[])
    axes.set_yticks(range(n_expert))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for e, expert in enumerate(shown.experts):
        for place, token in enumerate(expert.typical):
            shade = {"facecolor": ACCENT, "alpha": 0.08 + 0.62 * token["share"], "edgecolor": "none"}
            box, piece = {"boxstyle": "round,pad=0.25", **shade}, token["piece"][:12]
            axes.text(place + 0.05, e, piece, va="center", fontsize=8, parse_math=False, bbox=box)


def _draw_tells(axes: Axes, layers: list[Layer], shown: Layer) -> None:
    names = [str(layer.index) for layer in layers]
    colours = [ACCENT if layer is shown else "#a9bfd6" for layer in layers]
    bars = axes.barh(names, [100 * layer.token_tells for layer in layers], color=colours, height=0.55)
    axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=8)
    _head(axes, "Routing explained by the token alone")
    axes.set(xlabel="% of the experts' entropy", ylabel="layer", xlim=(0, 110))
    axes.set_xticks(range(0, 101, 25))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
