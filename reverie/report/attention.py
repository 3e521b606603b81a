"""The attention section of a report: the past steps that a step attends to, on one episode."""

import numpy as np
from jaxtyping import Float, UInt8

from reverie.evaluation import video
from reverie.report.charts import Line, curves
from reverie.report.html import escape, figure, picture
from reverie.report.run import RunFiles

MAP = 360  # pixels of the large map
SMALL = 132  # pixels of a head's map
SHOWN = 8  # frames of a strip
STRIPS = 3
GROUND = np.array((255, 255, 255), float)
FULL = np.array((0, 72, 130), float)
NOT_YET = np.array((238, 238, 234), np.uint8)


def heat(weights: Float[np.ndarray, 'T T'], pixels: int) -> UInt8[np.ndarray, 'h w 3']:
    """A map about `pixels` wide: rows attend to columns; the root of a weight is its darkness."""
    t = len(weights)
    share = np.sqrt(np.clip(weights, 0, 1))[..., None]
    colours = (GROUND + share * (FULL - GROUND)).round().astype(np.uint8)
    colours[np.triu_indices(t, 1)] = NOT_YET
    picture: np.ndarray = video.enlarge(colours[None], max(1, pixels // t))[0]
    return picture


def attended_steps(weights: Float[np.ndarray, 'T T'], near: int = 2) -> Float[np.ndarray, ' T']:
    """Share of each step's attention that goes further back than `near` steps."""
    t = np.arange(len(weights))
    share: np.ndarray = (weights * (t[:, None] - t > near)).sum(1)
    return share


def _map(weights: np.ndarray, title: str, pixels: int) -> str:
    shown = picture(heat(weights, pixels), f'attention, {title}')
    return f'<figure><figcaption><b>{escape(title)}</b></figcaption>{shown}</figure>'


def _by_distance(weights: Float[np.ndarray, 'L heads T T']) -> str:
    """Mean attention by how many steps back it goes, one line for each layer.

    Only steps that have so many behind them count.
    """
    t = weights.shape[-1]
    reach = max(2, t // 2)
    mean = weights.mean(1)
    rows = [[np.diagonal(layer, -d)[reach - d :].mean() for d in range(reach)] for layer in mean]
    lines = [Line(np.arange(reach), np.array(row), 'seed') for row in rows] if len(rows) > 1 else []
    lines.append(Line(np.arange(reach), np.mean(rows, 0)))
    chart = curves(lines, 'steps back', 'attention', False, limits=(0.0, None))
    return figure('attention by distance', 'all layers, and each of them', chart)


def _strip(weights: Float[np.ndarray, 'T T'], frames: np.ndarray, step: int) -> str:
    """The frames that one step attends to most, in the order of time, with their shares."""
    most = np.sort(np.argsort(-weights[step, : step + 1], kind='stable')[:SHOWN])
    cells = []
    for i in most:
        back = f'{step - i} back' if i < step else 'itself'
        caption = f'<figcaption>{back}<br>{100 * weights[step, i]:.0f}%</figcaption>'
        cells.append(f'<figure>{picture(frames[i], f"frame {i + 1}")}{caption}</figure>')
    return f'<p class="note">Step {step + 1} looks at</p><div class="frames">{"".join(cells)}</div>'


def section(run: RunFiles) -> str:
    """Maps averaged and per head, the profile over distance, and the frames of single steps.

    Empty without attention.
    """
    s = run.samples
    if 'attention/weights' not in s:
        return ''
    weights = s['attention/weights'].astype(np.float32)  # [L, heads, T, T]
    layers, heads, t, _ = weights.shape
    mean = weights.mean((0, 1))
    out = ['<section><h2>What it looks at</h2>']
    out.append(
        f'<p>One episode of {t} steps, {layers} layers over time with {heads} heads each. A row is a step that looks, '
        'a column a step looked at, from the left and from the top; darker is more, and a row adds up to one. '
        'A step is the token of what was known when its frame arrived.</p>'
    )
    out.append(
        f'<div class="charts">{_map(mean, "mean of all heads", MAP)}{_by_distance(weights)}</div>'
    )
    truth = s.get('dream/truth')
    if truth is not None and truth.ndim == 5 and truth.shape[1] == t:  # images
        frames = video.colourise(truth[0])
        far = np.argsort(-attended_steps(mean)[: t - 1], kind='stable')[: STRIPS - 1]
        steps = [*sorted(int(i) for i in far), t - 1]
        out.append('<h3>The frames looked at most</h3>')
        out.append('<p class="note">The last step, and those that look back furthest.</p>')
        out += [_strip(mean, frames, step) for step in steps]
    maps = ''.join(
        _map(weights[i, j], f'layer {i + 1}, head {j + 1}', SMALL)
        for i in range(layers)
        for j in range(heads)
    )
    out.append(
        f'<details><summary>Every head ({layers * heads})</summary><div class="films">{maps}</div></details>'
    )
    return ''.join([*out, '</section>'])
