"""A run as one self-contained HTML page: scores, curves, reconstructions, dreams, configuration.

The page is made from four files of the run folder alone (`config.json`, `metrics.jsonl`,
`scores.json`, `samples.npz`) and asks nothing of the network: charts are inline SVG, images are
data URIs. What a run does not have yet is said in its place.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import reverie
from reverie.evaluation import trust, video
from reverie.evaluation.statistics import BOOTSTRAP_FROM, UNTRAINED
from reverie.evaluation.tables import Row, difference_rows, interval_label, name_of, score_rows
from reverie.io import atomic
from reverie.report import attention, dreams
from reverie.report.charts import Line, bar, bar_axis, curves, scale_of
from reverie.report.page import Run, escape, figure, image, legend, line_key, missing, read
from reverie.text import Number, duration, number

OURS = ('bc', 'wm_bc', 'imagination', 'agent')  # read-outs this run trained
ROWS = 8  # reconstructed frames in a row


def read_outs(run: Run) -> dict[str, Row]:
    """The measured read-outs, in the order of the page."""
    return {row.key: row for row in score_rows(run.scores)}


def hero(run: Run) -> str | None:
    """The read-out the run is about: the one furthest along its own training."""
    scores = read_outs(run)
    return next((k for k in ('agent', 'imagination', 'wm_bc', 'bc') if k in scores), None)


def sentence(run: Run) -> str:
    """The run in one sentence."""
    scores, key = read_outs(run), hero(run)
    if key is None:
        if not run.metrics:
            return 'This run has neither scores nor curves yet.'
        phase, rows = list(run.metrics.items())[-1]
        return (
            f'This run has no scores yet; it has reached step {max(rows):,} of the phase {phase}.'
        )
    own = scores[key].sampled
    rows = own['per_seed']
    bounds = 'no interval'
    if own['ci95']:
        bounds = f'95% interval {" to ".join(map(number, own["ci95"]))}, {interval_label(own)}'
    text = f'{name_of(key)} scores {number(own["mean"])} per episode in the real game '
    text += f'({bounds}; {sum(map(len, rows)):,} episodes)'
    times = [
        f'{number(own["mean"] / scores[k].sampled["mean"], 2)} times {what}'
        for k, what in (('data', 'the mean of the data it learnt from'), ('random', 'random play'))
        if k in scores and scores[k].sampled['mean'] > 0
    ]
    return text + (': ' + ' and '.join(times) if times else '') + '.'


def head(run: Run) -> str:
    config, scores = run.config, run.scores
    title = f'{config.get("preset", "run")} on {config.get("env", "an unnamed environment")}'
    seeds = scores.get('seeds', config.get('seeds'))
    facts = {
        'Frames of experience': number(scores.get('env_frames'), 3, True)
        if scores.get('env_frames')
        else None,
        'Updates': number(sum((scores.get('gradient_steps') or {}).values()), 3, True)
        if scores
        else None,
        'Training time': duration(scores.get('seconds')) if scores.get('seconds') else None,
        'Seeds': f'{len(seeds)} ({", ".join(map(str, seeds))})'
        if isinstance(seeds, list)
        else seeds,
        'Device': scores.get('device', config.get('device')),
        'Date': scores.get('date', config.get('date')),
    }
    items = ''.join(
        f'<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>'
        for k, v in facts.items()
        if v not in (None, '')
    )
    return (
        f'<header><p class="eyebrow">Reverie run report</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(sentence(run))}</p><dl class="facts">{items}</dl></header>'
    )


def points(x: Number | None) -> str:
    """A score with two decimals, so that a column of them aligns."""
    return '–' if x is None else f'{x:,.2f}'.replace('-', '−')


def _bounds(s: Mapping[str, Any]) -> str:
    return ' – '.join(map(points, s['ci95'])) if s['ci95'] else '–'


def _score_cells(s: Mapping[str, Any]) -> list[str]:
    episodes = [x for row in s['per_seed'] for x in row]
    return [
        points(s['mean']),
        _bounds(s),
        interval_label(s),
        points(s['normalised']),
        number(min(episodes), 4, True),
        number(max(episodes), 4, True),
        f'{len(episodes):,}',
    ]


def _difference_cells(s: Mapping[str, Any]) -> list[str]:
    return [points(s['mean']), _bounds(s), interval_label(s), ', '.join(map(points, s['per_seed']))]


def _bars(rows: Sequence[Row], best: str | None) -> str:
    """A bar with its interval for each read-out, and a dot per seed where several were trained."""
    figures = [row.sampled for row in rows]
    bounds = [s['ci95'] or (s['mean'], s['mean']) for s in figures]
    limits = scale_of(
        [(s['mean'], low, high) for s, (low, high) in zip(figures, bounds, strict=True)]
    )
    out = ['<div class="bars">']
    for row, (low, high) in zip(rows, bounds, strict=True):
        kind = 'best' if row.key == best else 'own' if row.key in OURS else 'other'
        mean, runs = row.sampled['mean'], row.sampled['per_seed']
        dots = (
            [float(np.mean(run)) for run in runs]
            if len(runs) > 1 and row.key not in UNTRAINED
            else []
        )
        name = f'<b>{escape(row.name)}</b>' if row.key == best else escape(row.name)
        out.append(f'<span class="label">{name}</span>{bar(mean, low, high, dots, limits, kind)}')
        out.append(f'<span class="value">{points(mean)}</span>')
    return ''.join(
        [
            *out,
            f'<span class="axis-pad"></span>{bar_axis(limits)}<span class="axis-pad"></span></div>',
        ]
    )


def _table(
    heads: Sequence[str], rows: Sequence[Row], cells: Callable[..., list[str]], best: str | None
) -> str:
    """Sampled and greedy figures of each row, under `heads`; cells: a figure -> its cells after
    name and actions.
    """
    lines = []
    for row in rows:
        mode = 'sampled' if row.greedy else '–'
        lines.append(('best' if row.key == best else '', [row.name, mode, *cells(row.sampled)]))
        lines += [('greedy', ['', 'greedy', *cells(row.greedy)])] if row.greedy else []
    head = ''.join(f'<th>{h}</th>' for h in heads)
    body = ''.join(
        f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in line)}</tr>'
        for kind, line in lines
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def score_section(run: Run) -> str:
    """Bars with intervals, then every number; then the paired differences of read-outs that share
    world models.
    """
    title, scores, best = (
        '<section><h2>Scores in the real environment</h2>',
        read_outs(run),
        hero(run),
    )
    if not scores:
        return title + missing(run, 'scores.json', 'scores') + '</section>'
    rows = list(scores.values())
    note = 'Mean return per episode; whiskers are 95% intervals, dots are seeds. Over seeds the interval is Student’s '
    note += f't below {BOOTSTRAP_FROM}, a bootstrap from there on; over the episodes of one seed it says nothing of '
    note += 'other seeds.'
    if (reference := run.scores.get('reference')) is not None:
        note += f' Normalised: 0 is random play, 1 the reference PPO ({number(reference)}).'
    absent = [
        name_of(k)
        for k in ('bc', 'wm_bc', 'imagination')
        if k not in scores and 'agent' not in scores
    ]
    if absent:
        note += f' Not measured in this run: {", ".join(absent)}.'
    heads = [
        'Read-out',
        'Actions',
        'Mean',
        '95% interval',
        'Kind',
        'Normalised',
        'Min',
        'Max',
        'Episodes',
    ]
    out = [
        title,
        _bars(rows, best),
        f'<p class="note">{escape(note)}</p>',
        _table(heads, rows, _score_cells, best),
    ]
    if pairs := difference_rows(run.scores):
        heads = ['Difference', 'Actions', 'Mean', '95% interval', 'Kind', 'Each seed']
        note = 'Seed by seed: read-outs of one seed share its world model or its data, and what they share cancels.'
        out += ['<h3>Paired differences</h3>', f'<p class="note">{note}</p>']
        out.append(_table(heads, pairs, _difference_cells, None))
    return ''.join([*out, '</section>'])


def _series(rows: Mapping[int, Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """-> (steps [n], values [n, seeds]) of one metric; lines of another width than the last are
    left out.
    """
    found = {}
    for step, row in sorted(rows.items()):
        try:
            found[step] = np.atleast_1d(np.asarray(row[name], float))
        except (KeyError, TypeError, ValueError):
            continue
    width = next(reversed(found.values())).shape if found else (0,)
    found = {step: v for step, v in found.items() if v.shape == width and v.ndim == 1}
    return np.array(list(found), float), np.array(list(found.values()), float).reshape(
        len(found), -1
    )


def _metric_figure(rows: Mapping[int, Mapping[str, Any]], name: str) -> str:
    steps, values = _series(rows, name)
    if not values.size or not np.isfinite(values).any():
        return figure(name, '', '<p class="missing">No finite values.</p>')
    with np.errstate(invalid='ignore'):
        mean = values.mean(1)
    lines = (
        [Line(steps, values[:, i], 'seed') for i in range(values.shape[1])]
        if values.shape[1] > 1
        else []
    )
    return figure(
        name, number(float(mean[-1])), curves([*lines, Line(steps, mean)], 'update', name)
    )


def curve_section(run: Run) -> str:
    """Losses of each phase, and the other metrics folded away."""
    out = ['<section><h2>Training</h2>']
    curve = run.scores.get('curve') or {}
    returns = curve.get('return_per_seed') or []
    if curve.get('env_frames') and returns and returns[0]:
        x, y = np.array(curve['env_frames'], float), np.array(returns, float)
        lines = [Line(x, row, 'seed') for row in y] if len(y) > 1 else []
        chart = curves(
            [*lines, Line(x, y.mean(0))], 'environment frames', 'score during training', log=False
        )
        out.append(
            f'<div class="charts">{figure("score during training", number(y.mean(0)[-1]), chart)}</div>'
        )
    if not run.metrics:
        return ''.join([*out, missing(run, 'metrics.jsonl', 'training curves'), '</section>'])
    if 'metrics.jsonl' in run.notes:
        out.append(f'<p class="missing">{escape(run.notes["metrics.jsonl"])}</p>')
    out.append(
        '<p class="note">One chart per loss term and phase; the number is its last value.</p>'
    )
    out.append(line_key(('main', 'mean'), ('seed', 'each seed')))
    for phase, rows in run.metrics.items():
        names = dict.fromkeys(name for row in rows.values() for name in row if '/' in name)
        seconds = [
            row['seconds'] for row in rows.values() if isinstance(row.get('seconds'), int | float)
        ]
        took = f', {duration(max(seconds))} after the start' if seconds else ''
        out.append(
            f'<h3>{escape(phase)} <span class="note">to update {max(rows):,}{took}</span></h3>'
        )
        losses = [name for name in names if name.startswith('loss/')]
        out.append(
            '<div class="charts">'
            + ''.join(_metric_figure(rows, name) for name in losses)
            + '</div>'
        )
        if others := [name for name in names if name not in losses]:
            charts = ''.join(_metric_figure(rows, name) for name in others)
            title = f'<summary>More curves of {escape(phase)} ({len(others)})</summary>'
            out.append(f'<details>{title}<div class="charts">{charts}</div></details>')
    return ''.join([*out, '</section>'])


def recon_section(run: Run) -> str:
    """Tokenizer: truth, what the encoder saw, output; one block per mask rate."""
    if 'env_options' in run.config:  # an agent that plays has no tokenizer
        return ''
    out, s = '<section><h2>Tokenizer reconstructions</h2>', run.samples
    names = ('recon/truth', 'recon/mask_rates', 'recon/output', 'recon/mask')
    if not all(name in s for name in names):
        return out + missing(run, 'samples.npz', 'reconstructions') + '</section>'
    truth, rates, output, mask = (s[name] for name in names)
    n = min(len(truth), ROWS)
    parts = [
        out,
        '<p class="note">The encoder is shown what is not grey, the decoder returns the whole frame.</p>',
    ]
    parts += [legend(run, truth.shape[-1]), f'<div class="recon" style="--n:{n}">']

    def row(label: str, frames: np.ndarray) -> str:
        cells = ''.join(image(video.png(f), f'{label} {i + 1}') for i, f in enumerate(frames))
        return f'<span class="label">{label}</span>{cells}'

    rgb = video.colourise(truth[:n])
    for i, rate in enumerate(np.ravel(rates)):
        decibel = float(video.psnr(truth, output[i]).mean())
        parts.append(
            f'<div class="rate">{100 * float(rate):.0f}% hidden: PSNR {decibel:.1f} dB over {len(truth)} frames</div>'
        )
        parts += [row('truth', rgb)] if i == 0 else []
        parts += [
            row('shown', video.hide(rgb, mask[i, :n])),
            row('output', video.colourise(output[i, :n])),
        ]
    return ''.join([*parts, '</div></section>'])


def config_section(run: Run) -> str:
    """The command, the whole configuration and the versions, to do it again."""
    command = run.scores.get('command', run.config.get('command'))
    versions = run.scores.get('versions', run.config.get('versions')) or {}
    commit = run.scores.get('commit', run.config.get('commit'))
    out = ['<section><h2>Command and configuration</h2>']
    out.append(
        f'<pre>{escape(str(command))}</pre>' if command else missing(run, 'config.json', 'command')
    )
    text = (
        ', '.join(f'{k} {v}' for k, v in versions.items())
        if isinstance(versions, dict)
        else str(versions)
    )
    out.append(f'<p class="note">Commit {escape(str(commit))}. {escape(text)}</p>')
    config = json.dumps(run.config.get('config', run.config), indent=2, ensure_ascii=False)
    out.append(
        f'<details><summary>The whole configuration</summary><pre>{escape(config)}</pre></details>'
    )
    return ''.join([*out, '</section>'])


def origin_section(run: Run) -> str:
    """The runs that this one took phases or weights from, back to the first; nothing if there are
    none.
    """
    rows, record = [], run.config.get('from')
    while isinstance(record, dict):
        of = record.get('of') or {}
        rows.append(_origin(record, of))
        record = record.get('from')
    if not rows:
        return ''
    note = 'What was not taken began fresh, with a seed of its own. The topmost run is the one this run took from.'
    heads = ('Run', 'Taken', 'Seeds', 'Preset', 'Environment', 'Dataset', 'Commit', 'Trained for')
    head = ''.join(f'<th>{h}</th>' for h in heads)
    body = ''.join(
        '<tr>' + ''.join(f'<td>{escape(cell)}</td>' for cell in row) + '</tr>' for row in rows
    )
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f'<section><h2>Where it comes from</h2><p class="note">{note}</p>{table}</section>'


def _origin(record: Mapping[str, Any], of: Mapping[str, Any]) -> list[str]:
    """One row of the table of runs taken from."""
    phases = [
        *record.get('phases', ()),
        *(f'{name}, trained on' for name in record.get('extended', ())),
    ]
    groups = ', '.join(record.get('groups', ()))
    return [
        pathlib.PurePath(str(record.get('run'))).name,
        f'{", ".join(phases)} ({groups})' if phases else groups,
        ' '.join(map(str, record.get('seeds', ()))),
        *(str(of.get(name, '–')) for name in ('preset', 'env')),
        *(str(of.get(name, '–'))[:12] for name in ('dataset', 'commit')),
        duration(record.get('seconds')),
    ]


def render(run: Run) -> str:
    """The page as text."""
    style = pathlib.Path(__file__).with_name('report.css').read_text(encoding='utf-8')
    title = escape(f'{run.config.get("preset", "run")} on {run.config.get("env", "?")}')
    # the policy makes the browser itself refuse anything from the network, should a hostile name
    # slip through
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    sections = (
        head,
        score_section,
        trust.section,
        curve_section,
        recon_section,
        dreams.section,
        attention.section,
        origin_section,
        config_section,
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>\n<body>'
        + '\n'.join(section(run) for section in sections)
        + f'\n<footer>Made by reverie {escape(reverie.__version__)} from the files of this run alone.</footer>'
        '</body></html>\n'
    )


def write(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes `report.html` into a run folder and returns its path.

    Raises UserError if `folder` is not a run.
    """
    run = read(folder)
    path = run.folder / 'report.html'
    with atomic(path) as file:
        file.write(render(run))
    return path
