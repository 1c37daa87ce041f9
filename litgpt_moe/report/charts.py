"""Line charts as SVG: text that a page can hold, and that is a picture of its own as a file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from litgpt_moe.words import short

# Okabe and Ito's colours, told apart by colour-blind eyes, for white and for black paper
COLOURS = ("#0080c8", "#d4651a", "#009a70", "#b8609a", "#a07a10", "#6a727d")
DASHES = ("", "6 4", "2 3")
WIDTH, HEIGHT = 620, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 44
GREY = "#7a808a"
N_TICKS = 6


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(
    series: list[Series], x_name: str, y_name: str, log_x: bool = False, dots: bool = False
) -> str:
    """Return a chart as SVG, with a legend; values that are not finite are left out."""
    kept = [Series(one.name, _finite(one.points, log_x)) for one in series]
    kept = [one for one in kept if one.points]
    if not kept:
        return "<p>Nothing to draw yet.</p>"
    xs, ys = zip(*(point for one in kept for point in one.points), strict=True)
    x_axis, y_axis = _Axis(xs, LEFT, WIDTH - RIGHT, log_x), _Axis(ys, HEIGHT - BOTTOM, TOP)
    height = HEIGHT + 18 * len(kept)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{GREY}">',
        f"<title>{escape(y_name)} over {escape(x_name)}</title>",
        *(_grid_x(x_axis, at) for at in x_axis.ticks()),
        *(_grid_y(y_axis, at) for at in y_axis.ticks()),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_name, "middle"),
        f'<g transform="rotate(-90)">{_text(-(TOP + HEIGHT - BOTTOM) / 2, 14, y_name, "middle")}</g>',
    ]
    for i, one in enumerate(kept):
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in one.points]
        parts += [_line(places, i, dots), _legend(one.name, i)]
    return "".join([*parts, "</svg>"])


def _finite(points: Sequence[tuple[float, float]], log_x: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)]


class _Axis:
    """Maps values to places between two ends of the picture."""

    def __init__(self, values: Sequence[float], start: float, end: float, is_log: bool = False) -> None:
        self.is_log, self.start, self.end = is_log, start, end
        low, high = min(map(self._scaled, values)), max(map(self._scaled, values))
        margin = 0.04 * (high - low) or 0.5
        self.low, self.high = low - margin, high + margin

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def place(self, value: float) -> float:
        """Return where a value is drawn."""
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Return round values for the marks: 1, 2 or 5 times a power of ten."""
        if self.is_log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            marks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            return [mark for mark in marks if self.low <= math.log10(mark) <= self.high]
        rough = (self.high - self.low) / N_TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]


def axis_number(value: float) -> str:
    """Return a number of tokens, FLOPs or another unit in four digits: 12,000,000 is 12M."""
    return short(value, 4, "kMGTP")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{GREY}" stroke-opacity="0.25"/>'


def _grid_x(axis: _Axis, at: float) -> str:
    x = axis.place(at)
    return _rule(x, TOP, x, HEIGHT - BOTTOM) + _text(x, HEIGHT - BOTTOM + 16, axis_number(at), "middle")


def _grid_y(axis: _Axis, at: float) -> str:
    y = axis.place(at)
    return _rule(LEFT, y, WIDTH - RIGHT, y) + _text(LEFT - 6, y + 4, axis_number(at), "end")


def _style(i: int) -> str:
    dash = DASHES[i // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[i % len(COLOURS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _line(places: list[tuple[float, float]], i: int, dots: bool) -> str:
    points = " ".join(f"{x},{y}" for x, y in places)
    line = f'<polyline points="{points}" fill="none" stroke-width="2" {_style(i)}/>'
    if not dots and len(places) > 1:
        return line
    colour = COLOURS[i % len(COLOURS)]
    return line + "".join(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in places)


def _legend(name: str, i: int) -> str:
    y = HEIGHT + 18 * i + 6
    line = f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + 26}" y2="{y}" stroke-width="2" {_style(i)}/>'
    return line + _text(LEFT + 34, y + 4, name, "start")
