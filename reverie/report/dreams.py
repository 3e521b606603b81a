"""The dream section of a report: what happened beside a dream under the same actions."""

import numpy as np
from jaxtyping import Int, UInt8

from reverie.evaluation import video
from reverie.report.charts import Line, curves
from reverie.report.html import escape, figure, image, legend, line_key, missing, picture
from reverie.report.run import RunFiles, labels
from reverie.text import number

FILMS = 4  # dreams shown moving
FRAMES = 36  # of the strip
PLOTS = 2  # dreams with plots
NUMBERS = 12  # of an observation's numbers, how many are plotted
DRAWN = 50.0  # highest dB drawn
NEEDED = ('dream/truth', 'dream/dream', 'dream/context')
# rows of 3 bits, top to bottom: the frame counter's digits
GLYPHS = {
    '0': '75557', '1': '26227', '2': '71747', '3': '71717', '4': '55711', '5': '74717',
    '6': '74757', '7': '71111', '8': '75757', '9': '75717', '/': '11244',
}  # fmt: skip
GROUND = np.array((26, 28, 33), np.uint8)
DIM = np.array((78, 82, 92), np.uint8)
LIGHT = np.array((214, 214, 210), np.uint8)
ACCENT = np.array((86, 180, 233), np.uint8)


def write_text(image: UInt8[np.ndarray, 'h w 3'], text: str, x: int, y: int) -> None:
    """Draw digits and '/' at double size into `image`, in place."""
    for i, letter in enumerate(text):
        bits = np.array([[int(row) >> s & 1 for s in (2, 1, 0)] for row in GLYPHS[letter]], bool)
        bits = bits.repeat(2, 0).repeat(2, 1)
        image[y : y + 10, x + 8 * i : x + 8 * i + 6][bits] = LIGHT


def film(
    truth: UInt8[np.ndarray, 't h w 3'],
    dream: UInt8[np.ndarray, 't h w 3'],
    action: Int[np.ndarray, ' t'],
    actions: int,
    context: int,
) -> UInt8[np.ndarray, 't H W 3']:
    """Truth above, dream below; under them the frame counter, the action taken and the progress.

    The dream's frames have a dim edge while they are given (t < context) and a bright one once they
    are dreamed.
    """
    scale = max(1, 144 // truth.shape[1])
    edge, line = 3, 30  # pixels
    truth, dream = video.enlarge(truth, scale), video.enlarge(dream, scale)
    t, h, w, _ = truth.shape
    out = np.broadcast_to(GROUND, (t, 2 * h + 5 * edge + line, w + 2 * edge, 3)).copy()
    top, cell = 2 * h + 5 * edge, min(10, (w - 50) // max(actions, 1))
    for i, frame in enumerate(out):
        colour = DIM if i < context else ACCENT
        frame[edge : edge + h, edge:-edge] = truth[i]
        frame[2 * edge + h : 4 * edge + 2 * h] = colour
        frame[3 * edge + h : 3 * edge + 2 * h, edge:-edge] = dream[i]
        write_text(frame, f'{i + 1}/{t}', edge, top + 4)
        for a in range(actions if cell > 2 else 0):
            x = w + edge - cell * (actions - a)
            frame[top + 4 : top + 14, x + 1 : x + cell] = LIGHT if a == action[i] else DIM
        frame[top + 20 : top + 23, edge:-edge] = DIM
        frame[top + 20 : top + 23, edge : edge + max(1, w * (i + 1) // t)] = colour
    return out


def _strip(
    truth: np.ndarray, dream: np.ndarray, decibel: np.ndarray, likeness: np.ndarray, context: int
) -> str:
    """Frames of one dream, evenly spaced if there are many; [t, h, w, 3] colours, [t] PSNR and
    SSIM.
    """
    t = len(truth)
    first = max(0, context - 2)
    shown = np.unique(np.linspace(first, t - 1, min(FRAMES, t - first)).round().astype(int))
    cells = []
    for i in shown:
        given = i < context
        pair = picture(truth[i], f'truth, frame {i + 1}')
        pair += picture(dream[i], f'dream, frame {i + 1}')
        under = 'given' if given else f'{decibel[i]:.1f} dB<br>{likeness[i]:.2f}'
        caption = f'<figcaption>{i + 1}<br>{under}</figcaption>'
        cells.append(f'<figure class="{"given" if given else ""}">{pair}{caption}</figure>')
    return '<div class="frames">' + ''.join(cells) + '</div>'


def _fidelity(title: str, unit: str, dreamed: np.ndarray, held: np.ndarray, context: int) -> str:
    """Curves of a measure [n, t] of dreamed frames, beside holding the last given frame still."""
    x = np.arange(1, dreamed.shape[1] + 1)[context:]
    lines = [Line(x, row[context:], 'seed') for row in dreamed] if len(dreamed) <= 16 else []
    lines += [Line(x, held[:, context:].mean(0), 'base'), Line(x, dreamed[:, context:].mean(0))]
    lines = [line._replace(y=np.clip(line.y, 0.0, DRAWN)) for line in lines]
    chart = curves(lines, 'frame', f'{title} of each dreamed frame', False, limits=(0.0, None))
    digits = '.1f' if unit else '.3f'
    means = [f'{values[:, context:].mean():{digits}}' for values in (dreamed, held)]
    return figure(f'{title}{unit}', f'mean {means[0]}, still {means[1]}', chart)


def _starts(run: RunFiles, i: int) -> list[float]:
    """Frames of window i, counted from one, at which a new episode starts."""
    first = run.samples.get('dream/is_first')
    return [] if first is None else (np.flatnonzero(first[i, 1:]) + 2.0).tolist()


def _prediction_figures(run: RunFiles, i: int, context: int) -> str:
    """Reward, value and continuation of dream i against what happened, those that are there."""
    s, out = run.samples, []
    pairs = (
        ('reward', 'dream/reward_true', 'dream/reward_pred'),
        ('value', 'dream/return_true', 'dream/value_pred'),
        ('probability to continue', None, 'dream/cont_pred'),
    )
    for title, truth, pred in pairs:
        if pred not in s:
            continue
        x = np.arange(1, s[pred].shape[1] + 1)
        lines = [Line(x, s[truth][i], 'truth')] if truth in s else []
        lines.append(Line(x, s[pred][i]))
        limits = (0.0, 1.05) if pred == 'dream/cont_pred' else (None, None)
        shade = (1.0, float(context))
        chart = curves(lines, 'frame', title, False, shade, _starts(run, i), limits)
        out.append(figure(f'dream {i + 1}: {title}', '', chart))
    return f'<div class="charts">{"".join(out)}</div>' if out else ''


def _agreement(run: RunFiles, context: int) -> str:
    """One sentence of numbers on the dreamed frames' rewards and values."""
    s, out = run.samples, []
    if {'dream/reward_true', 'dream/reward_pred'} <= s.keys():
        error = np.abs(s['dream/reward_true'] - s['dream/reward_pred'])[:, context:].mean()
        out.append(f'mean absolute error of the reward {number(float(error))}')
    if {'dream/return_true', 'dream/value_pred'} <= s.keys():
        a, b = (s[k][:, context:].ravel() for k in ('dream/return_true', 'dream/value_pred'))
        if a.std() > 0 and b.std() > 0:
            out.append(f'correlation of value and return {np.corrcoef(a, b)[0, 1]:.2f}')
    return f'<p class="note">Over the dreamed frames: {escape(", ".join(out))}.</p>' if out else ''


def section(run: RunFiles) -> str:
    """Dreams beside what happened, and the rewards and values that were expected."""
    title, s = '<section><h2>Real and dreamed</h2>', run.samples
    if not all(name in s for name in NEEDED):
        return title + missing(run, 'samples.npz', 'dreams') + '</section>'
    truth, context = s['dream/truth'], int(s['dream/context'])
    n, t = truth.shape[:2]
    if context >= t:
        why = f'No dreams: all {t} frames of the samples are given ones.'
        return f'{title}<p class="missing">{why}</p></section>'
    out = [title]
    out.append(
        f'<p>The model is given {context} frames; from then on it dreams alone, under the actions really taken. '
        'The games have chance of their own, so a possible dream need not be the one that happened.</p>'
    )
    out += _numbers(run, context) if truth.ndim == 3 else _images(run, context)
    plots = ''.join(_prediction_figures(run, i, context) for i in range(min(n, PLOTS)))
    if plots:
        note = 'Shaded: given frames. Dotted: a new episode starts.'
        out.append(f'<h3>What it expects</h3><p class="note">{note}</p>')
    return ''.join([*out, plots, _agreement(run, context), '</section>'])


def _numbers(run: RunFiles, context: int) -> list[str]:
    """Observations that are numbers [n, t, k]: each of the first dreams' against what happened."""
    s, out = run.samples, [line_key(('main', 'dreamed'), ('truth', 'what happened'))]
    truth, dream = s['dream/truth'], s['dream/dream']
    x = np.arange(1, truth.shape[1] + 1)
    names = labels(run, 'channels')
    names += [f'observation {k + 1}' for k in range(len(names), truth.shape[2])]
    shade = (1.0, float(context))
    for i in range(min(len(truth), PLOTS)):
        charts = []
        for k in range(min(truth.shape[2], NUMBERS)):
            lines = [Line(x, truth[i, :, k], 'truth'), Line(x, dream[i, :, k])]
            chart = curves(lines, 'frame', names[k], False, shade, _starts(run, i))
            charts.append(figure(f'dream {i + 1}: {names[k]}', '', chart))
        out.append(f'<div class="charts">{"".join(charts)}</div>')
    more = truth.shape[2] - NUMBERS
    note = f' The first {NUMBERS} of {truth.shape[2]} numbers.' if more > 0 else ''
    return [*out, f'<p class="note">Shaded: given frames. Dotted: a new episode starts.{note}</p>']


def _images(run: RunFiles, context: int) -> list[str]:
    """Animated dreams, the strip, PSNR and SSIM per step."""
    s, out = run.samples, ['<p>What happened is above, the dream below.</p>']
    truth, dream = s['dream/truth'], s['dream/dream']
    n, t = truth.shape[:2]
    action = np.nan_to_num(s.get('dream/action', np.full((n, t), -1))).astype(int)
    actions = max(len(names := labels(run, 'actions')), int(action.max()) + 1)
    rgb_truth, rgb_dream = video.colourise(truth), video.colourise(dream)
    still = np.repeat(truth[:, [max(context - 1, 0)]], t, 1)
    decibel, likeness = video.psnr(truth, dream), video.ssim(truth, dream)
    out += [legend(run, truth.shape[-1]), '<h3>Moving</h3><div class="films">']
    for i in range(min(n, FILMS)):
        frames = film(rgb_truth[i], rgb_dream[i], action[i], actions, context)
        moving = image(video.apng(frames, holds=(t - 1,)), f'dream {i + 1}, animated')
        out.append(f'<figure>{moving}</figure>')
    cells = ', '.join(names)
    out.append(
        '</div><p class="note">Blue edge: dreamed; grey edge: given. Lit cell at the lower right: the action '
        f'that led to the frame{escape(f" (from the left: {cells})") if cells else ""}.</p>'
    )
    strip = _strip(rgb_truth[0], rgb_dream[0], decibel[0], likeness[0], context)
    out += ['<h3>Frame by frame</h3>', strip]
    out.append(
        f'<p class="note">Dream 1: number of the frame, PSNR (identical frames: {video.PSNR_CAP:.0f} dB; the curve '
        f'below is drawn to {DRAWN:.0f}), SSIM (identical frames: 1).</p>'
    )
    out.append('<h3>How far the dream holds</h3>')
    meanings = {
        'main': 'mean, or prediction', 'seed': 'each dream', 'truth': 'what happened',
        'base': 'last given frame held still',
    }  # fmt: skip
    out.append(line_key(*meanings.items()))
    charts = _fidelity('PSNR', ', dB', decibel, video.psnr(truth, still), context)
    charts += _fidelity('SSIM', '', likeness, video.ssim(truth, still), context)
    out.append(f'<div class="charts">{charts}</div>')
    return out
