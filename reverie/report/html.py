"""Fragments of HTML that the sections of a report share."""

import base64
import html
from collections.abc import Iterable

import numpy as np

from reverie.evaluation import video
from reverie.report.run import RunFiles, labels

escape = html.escape


def missing(run: RunFiles, name: str, what: str) -> str:
    """Note that `what` is not shown because the file `name` lacks it."""
    note = run.notes.get(name, f'{name} of this run does not hold them.')
    return f'<p class="missing">No {escape(what)}. {escape(note)}</p>'


def image(data: bytes, alt: str) -> str:
    """A PNG file as an inline image."""
    uri = base64.b64encode(data).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{uri}">'


def picture(rgb: np.ndarray, alt: str) -> str:
    """Pixels uint8 [h, w, 3] as an inline image."""
    return image(video.png(rgb), alt)


def figure(title: str, value: str, chart: str) -> str:
    """A chart under its title and a value."""
    caption = f'<b>{escape(title)}</b><span>{escape(value)}</span>'
    return f'<figure><figcaption>{caption}</figcaption>{chart}</figure>'


def line_key(*items: tuple[str, str]) -> str:
    """Key of the charts below: (kind of line, meaning) each."""
    spans = ''.join(f'<span><i class="{k}"></i>{escape(v)}</span>' for k, v in items)
    return f'<div class="key">{spans}</div>'


def legend(run: RunFiles, channels: int) -> str:
    """Colour of each channel of a symbolic grid; empty for images."""
    if channels in (1, 3):
        return ''
    names = labels(run, 'channels')
    names += [f'channel {i}' for i in range(len(names), channels)]
    cells = []
    for i in range(channels):
        colour = tuple(int(x) for x in video.PALETTE[i % len(video.PALETTE)])
        style = f'background:rgb{colour}'
        cells.append(f'<span><i class="cell" style="{style}"></i>{escape(names[i])}</span>')
    empty = '<span><i class="cell" style="background:#000"></i>empty</span>'
    return f'<div class="key">{"".join(cells)}{empty}</div>'


def cell(text: str, kind: str = '') -> str:
    """A table cell of text."""
    attribute = f' class="{kind}"' if kind else ''
    return f'<td{attribute}>{escape(text)}</td>'


def row(cells: Iterable[str], kind: str = '') -> str:
    """A table row of cells that are HTML."""
    attribute = f' class="{kind}"' if kind else ''
    return f'<tr{attribute}>{"".join(cells)}</tr>'


def table(head: Iterable[str], body: Iterable[str]) -> str:
    """A table that scrolls sideways. head: names of the columns, or rows of HTML; body: rows."""
    rows = list(head)
    if not rows[0].startswith('<tr'):
        rows = [row(f'<th>{name}</th>' for name in rows)]
    thead, tbody = f'<thead>{"".join(rows)}</thead>', f'<tbody>{"".join(body)}</tbody>'
    return f'<div class="scroll"><table>{thead}{tbody}</table></div>'
