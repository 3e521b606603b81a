"""Small charts as inline SVG text: curves and bars with intervals. Colours and fonts come from the
page's style.
"""

import dataclasses
import html
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reverie.text import Number, number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 196, 46, 12, 10, 34  # of a chart, in SVG units
POINTS = 240  # of a line; longer ones are averaged down


@dataclasses.dataclass(frozen=True)
class Line:
    """y over x, both [n]; `kind` is its CSS class: main, seed, truth, base."""

    x: np.ndarray
    y: np.ndarray
    kind: str = 'main'


def ticks(low: Number, high: Number, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    return [
        round(float(i * step), 12)
        for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: Number, high: Number) -> list[float]:
    """Powers of ten inside [low, high], with their doubles and halves if there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 1.7 else (1,)
    inside = [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
    return inside[:: math.ceil(len(inside) / 5)] if inside else [low, high]


def wants_log(lines: Sequence[Line]) -> bool:
    """A log axis helps where positive values span a factor of 20 or more."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    return len(values) > 0 and bool(values.min() > 0 and values.max() > 20 * values.min())


def _thin(line: Line) -> Line:
    keep = np.isfinite(line.x) & np.isfinite(line.y)
    x, y = line.x[keep].astype(float), line.y[keep].astype(float)
    if len(x) > POINTS:
        x, y = (np.array([part.mean() for part in np.array_split(v, POINTS)]) for v in (x, y))
    return Line(x, y, line.kind)


def _limits(values: np.ndarray, log: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.15, high * 1.15
    if high == low:
        return low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    if 0 < low < 0.5 * high:  # an axis from zero, where that costs little room
        low = 0.0
    pad = 0.06 * (high - low)
    return low - (pad if low != 0 else 0), high + pad


def _axes(
    x_limits: tuple[float, float],
    y_limits: tuple[float, float],
    log: bool,
    px: Callable[..., Any],
    py: Callable[..., Any],
    x_label: str,
) -> list[str]:
    """Grid, tick labels and the name of x."""
    out = []
    for y in log_ticks(*y_limits) if log else ticks(*y_limits):
        at = float(py(y))
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        out.append(
            f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{number(y, 4, True)}</text>'
        )
    for x in ticks(*x_limits, 5):
        out.append(
            f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - 18}" text-anchor="middle">{number(x, 4, True)}</text>'
        )
    if log:
        out.append(
            f'<text class="axis" x="{LEFT - 6}" y="{HEIGHT - 4}" text-anchor="end">log</text>'
        )
    axis = html.escape(x_label)
    out.append(
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{axis}</text>'
    )
    return out


def curves(lines: Sequence[Line], x_label: str, label: str, log: bool | None = None,
           shade: tuple[Number, Number] | None = None, marks: Sequence[Number] = (),
           limits: tuple[Number | None, Number | None] = (None, None)) -> str:  # fmt: skip
    """A line chart; `shade` greys a span of x, `marks` are dotted verticals, `limits` fix an end of
    y.

    Later lines lie on top.
    """
    lines = [line for line in map(_thin, lines) if len(line.x)]
    if not lines:
        return '<p class="missing">No finite values.</p>'
    log = wants_log(lines) if log is None else log
    x_all, y_all = (np.concatenate([getattr(line, axis) for line in lines]) for axis in 'xy')
    x0, x1 = float(x_all.min()), float(x_all.max())
    x1 = x1 if x1 > x0 else x0 + 1
    y0, y1 = (
        float(auto if fixed is None else fixed)
        for auto, fixed in zip(_limits(y_all, log), limits, strict=True)
    )
    scale = np.log if log else np.asarray

    def px(x: np.ndarray | Number) -> Any:
        return LEFT + (np.asarray(x) - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: np.ndarray | Number) -> Any:
        return (
            HEIGHT
            - BOTTOM
            - (scale(y) - scale(y0)) / (scale(y1) - scale(y0)) * (HEIGHT - TOP - BOTTOM)
        )

    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">'
    ]
    if shade:
        a, b = (float(px(np.clip(v, x0, x1))) for v in shade)
        out.append(
            f'<rect class="shade" x="{a:.1f}" y="{TOP}" width="{b - a:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
        )
    out += _axes((x0, x1), (y0, y1), log, px, py, x_label)
    out += [
        f'<line class="mark" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        for x in marks
    ]
    for line in lines:
        points = ' '.join(f'{a:.1f},{b:.1f}' for a, b in zip(px(line.x), py(line.y), strict=True))
        single = len(line.x) == 1
        out.append(
            f'<circle class="{line.kind} dot" cx="{px(line.x[0]):.1f}" cy="{py(line.y[0]):.1f}" r="2.5"/>'
            if single
            else f'<polyline class="{line.kind}" points="{points}"/>'
        )
    return ''.join([*out, '</svg>'])


def scale_of(rows: Sequence[tuple[Number, Number, Number]]) -> tuple[float, float]:
    """Common limits of bars (mean, low, high): from zero to a little beyond the largest value."""
    low = min(0.0, *(min(row) for row in rows)) if rows else 0.0
    high = max(0.0, *(max(row) for row in rows)) if rows else 1.0
    return float(low), low + 1.06 * ((high - low) or 1.0)


def bar(
    mean: Number,
    low: Number,
    high: Number,
    dots: Sequence[Number],
    limits: tuple[Number, Number],
    kind: str,
) -> str:
    """One horizontal bar with its interval and a dot per run, as wide as the page allows."""

    def at(x: Number) -> float:
        return min(max(100 * (x - limits[0]) / (limits[1] - limits[0]), 0.0), 100.0)

    left, right = sorted((at(0), at(mean)))
    out = [f'<svg class="bar {kind}" width="100%" height="26" aria-hidden="true">']
    out += [
        f'<line class="grid" x1="{at(x):.2f}%" x2="{at(x):.2f}%" y1="0" y2="26"/>'
        for x in ticks(*limits, 6)
    ]
    out.append(f'<rect x="{left:.2f}%" width="{right - left:.2f}%" y="5" height="16" rx="1.5"/>')
    out += [f'<circle cx="{at(x):.2f}%" cy="13" r="2.5"/>' for x in dots]
    out.append(f'<line class="whisker" x1="{at(low):.2f}%" x2="{at(high):.2f}%" y1="13" y2="13"/>')
    out += [
        f'<line class="whisker" x1="{at(x):.2f}%" x2="{at(x):.2f}%" y1="9" y2="17"/>'
        for x in (low, high)
    ]
    return ''.join([*out, '</svg>'])


def bar_axis(limits: tuple[Number, Number]) -> str:
    """The numbers under a column of bars."""
    out = ['<svg class="bar" width="100%" height="18" aria-hidden="true">']
    for x in ticks(*limits, 6):
        at = 100 * (x - limits[0]) / (limits[1] - limits[0])
        anchor = 'start' if at < 2 else 'end' if at > 97 else 'middle'
        out.append(
            f'<text class="tick" x="{at:.2f}%" y="13" text-anchor="{anchor}">{number(x, 4, True)}</text>'
        )
    return ''.join([*out, '</svg>'])
