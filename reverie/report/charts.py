"""Small charts as inline SVG: curves, and bars with intervals.

Colours and fonts come from the page's style.
"""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from reverie.text import Number, number

WIDTH, HEIGHT = 340, 196  # of a chart, in SVG units
LEFT, RIGHT = 46, 12  # its margins
TOP, BOTTOM = 10, 34
INNER_WIDTH = WIDTH - LEFT - RIGHT
INNER_HEIGHT = HEIGHT - TOP - BOTTOM
POINTS = 240  # of a line; longer ones are averaged down

Limits = tuple[Number | None, Number | None]


class Line(NamedTuple):
    """y over x, both [n]; `kind` is its CSS class: main, seed, truth, base."""

    x: np.ndarray
    y: np.ndarray
    kind: str = 'main'


def ticks(low: Number, high: Number, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(float(i * step), 12) for i in range(first, last + 1)]


def log_ticks(low: Number, high: Number) -> list[float]:
    """Powers of ten inside [low, high], with their doubles and halves if there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 1.7 else (1,)
    inside = [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
    return inside[:: math.ceil(len(inside) / 5)] if inside else [low, high]


def wants_log(lines: Sequence[Line]) -> bool:
    """Whether a log axis helps: positive values span a factor of more than 20."""
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


def _text(kind: str, x: str | Number, y: str | Number, anchor: str, text: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _line(kind: str, x1: str | Number, x2: str | Number, y1: str | Number, y2: str | Number) -> str:
    return f'<line class="{kind}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'


def _tick(x: float) -> str:
    return number(x, 4, True)


@dataclasses.dataclass(frozen=True)
class Axes:
    """Limits of x and y, and the pixels they stand at."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool  # y

    def px(self, x: np.ndarray | Number) -> Any:
        return LEFT + (np.asarray(x) - self.x[0]) / (self.x[1] - self.x[0]) * INNER_WIDTH

    def py(self, y: np.ndarray | Number) -> Any:
        scale = np.log if self.log else np.asarray
        low, high = map(scale, self.y)
        return HEIGHT - BOTTOM - (scale(y) - low) / (high - low) * INNER_HEIGHT

    def draw(self, x_label: str) -> list[str]:
        """Grid, tick labels and the name of x."""
        out = []
        for y in log_ticks(*self.y) if self.log else ticks(*self.y):
            at = float(self.py(y))
            out.append(_line('grid', LEFT, WIDTH - RIGHT, f'{at:.1f}', f'{at:.1f}'))
            out.append(_text('tick', LEFT - 6, f'{at + 3.5:.1f}', 'end', _tick(y)))
        for x in ticks(*self.x, 5):
            out.append(_text('tick', f'{self.px(x):.1f}', HEIGHT - 18, 'middle', _tick(x)))
        if self.log:
            out.append(_text('axis', LEFT - 6, HEIGHT - 4, 'end', 'log'))
        out.append(_text('axis', WIDTH - RIGHT, HEIGHT - 4, 'end', html.escape(x_label)))
        return out


def _axes(lines: Sequence[Line], log: bool, limits: Limits) -> Axes:
    x_all, y_all = (np.concatenate([getattr(line, axis) for line in lines]) for axis in 'xy')
    left, right = float(x_all.min()), float(x_all.max())
    low, high = _limits(y_all, log)
    low = low if limits[0] is None else float(limits[0])
    high = high if limits[1] is None else float(limits[1])
    return Axes((left, right if right > left else left + 1), (low, high), log)


def curves(lines: Sequence[Line], x_label: str, label: str, log: bool | None = None,
           shade: tuple[Number, Number] | None = None, marks: Sequence[Number] = (),
           limits: Limits = (None, None)) -> str:  # fmt: skip
    """A line chart; later lines lie on top.

    shade: a grey span of x. marks: dotted verticals. limits: fixed ends of y, None for automatic.
    """
    lines = [line for line in map(_thin, lines) if len(line.x)]
    if not lines:
        return '<p class="missing">No finite values.</p>'
    axes = _axes(lines, wants_log(lines) if log is None else log, limits)
    box, name = f'0 0 {WIDTH} {HEIGHT}', html.escape(label)
    out = [f'<svg class="chart" viewBox="{box}" role="img" aria-label="{name}">']
    if shade:
        a, b = (float(axes.px(np.clip(x, *axes.x))) for x in shade)
        size = f'width="{b - a:.1f}" height="{INNER_HEIGHT}"'
        out.append(f'<rect class="shade" x="{a:.1f}" y="{TOP}" {size}/>')
    out += axes.draw(x_label)
    for x in marks:
        at = f'{axes.px(x):.1f}'
        out.append(_line('mark', at, at, TOP, HEIGHT - BOTTOM))
    for line in lines:
        places = zip(axes.px(line.x), axes.py(line.y), strict=True)
        points = [(f'{left:.1f}', f'{top:.1f}') for left, top in places]
        if len(points) == 1:
            left, top = points[0]
            out.append(f'<circle class="{line.kind} dot" cx="{left}" cy="{top}" r="2.5"/>')
        else:
            joined = ' '.join(map(','.join, points))
            out.append(f'<polyline class="{line.kind}" points="{joined}"/>')
    return ''.join([*out, '</svg>'])


def scatter(places: Sequence[tuple[str, Number, Number]], x_label: str, label: str) -> str:
    """Named points (name, x, y) beside the line y = x; a name is shown where one points at it."""
    x, y = np.array([at[1:] for at in places], float).T
    both = np.concatenate([x, y])
    diagonal = Line(np.array([both.min(), both.max()]), np.array([both.min(), both.max()]), 'base')
    axes = _axes([Line(x, y), diagonal], False, (None, None))
    box, name = f'0 0 {WIDTH} {HEIGHT}', html.escape(label)
    out = [f'<svg class="chart" viewBox="{box}" role="img" aria-label="{name}">']
    out += axes.draw(x_label)
    ends = zip(axes.px(diagonal.x), axes.py(diagonal.y), strict=True)
    out.append(f'<polyline class="base" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in ends)}"/>')
    for name, at_x, at_y in places:
        spot = f'cx="{axes.px(at_x):.1f}" cy="{axes.py(at_y):.1f}" r="3"'
        said = f'{html.escape(name)}: {number(at_x)}, {number(at_y)}'
        out.append(f'<g><title>{said}</title><circle class="main dot" {spot}/></g>')
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

    def percent(x: Number) -> str:
        return f'{at(x):.2f}%'

    left, right = sorted((at(0), at(mean)))
    out = [f'<svg class="bar {kind}" width="100%" height="26" aria-hidden="true">']
    out += [_line('grid', percent(x), percent(x), 0, 26) for x in ticks(*limits, 6)]
    out.append(f'<rect x="{left:.2f}%" width="{right - left:.2f}%" y="5" height="16" rx="1.5"/>')
    out += [f'<circle cx="{percent(x)}" cy="13" r="2.5"/>' for x in dots]
    out.append(_line('whisker', percent(low), percent(high), 13, 13))
    out += [_line('whisker', percent(x), percent(x), 9, 17) for x in (low, high)]
    return ''.join([*out, '</svg>'])


def bar_axis(limits: tuple[Number, Number]) -> str:
    """The numbers under a column of bars."""
    out = ['<svg class="bar" width="100%" height="18" aria-hidden="true">']
    for x in ticks(*limits, 6):
        at = 100 * (x - limits[0]) / (limits[1] - limits[0])
        anchor = 'start' if at < 2 else 'end' if at > 97 else 'middle'
        out.append(_text('tick', f'{at:.2f}%', 13, anchor, _tick(x)))
    return ''.join([*out, '</svg>'])
