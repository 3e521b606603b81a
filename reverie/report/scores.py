"""The head of a report with the run in one sentence, and its scores."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from reverie.evaluation.statistics import BOOTSTRAP_FROM, UNTRAINED
from reverie.evaluation.tables import Row, difference_rows, interval_label, name_of, score_rows
from reverie.report import html, recordings
from reverie.report.charts import bar, bar_axis, scale_of
from reverie.report.html import cell, escape, missing
from reverie.report.run import RunFiles
from reverie.text import Number, duration, number

OURS = ('bc', 'wm_bc', 'imagination', 'agent')  # read-outs this run trained


def read_outs(run: RunFiles) -> dict[str, Row]:
    """The measured read-outs, in the order of the page."""
    return {row.key: row for row in score_rows(run.scores)}


def hero(run: RunFiles) -> str | None:
    """The read-out the run is about: the one furthest along its own training."""
    scores = read_outs(run)
    return next((k for k in ('agent', 'imagination', 'wm_bc', 'bc') if k in scores), None)


def sentence(run: RunFiles) -> str:
    """The run in one sentence."""
    scores, key = read_outs(run), hero(run)
    if key is None:
        if recorded := run.scores.get('recordings'):
            return recordings.sentence(recorded)
        if not run.metrics:
            return 'This run has neither scores nor curves yet.'
        phase, rows = list(run.metrics.items())[-1]
        return (
            f'This run has no scores yet; it has reached step {max(rows):,} of the phase {phase}.'
        )
    own = scores[key].sampled
    episodes = sum(map(len, own['per_seed']))
    bounds = 'no interval'
    if own['ci95']:
        bounds = f'95% interval {" to ".join(map(number, own["ci95"]))}, {interval_label(own)}'
    text = f'{name_of(key)} scores {number(own["mean"])} per episode in the real game '
    text += f'({bounds}; {episodes:,} episodes)'
    others = {'data': 'the mean of the data it learnt from', 'random': 'random play'}
    times = []
    for name, what in others.items():
        if name in scores and scores[name].sampled['mean'] > 0:
            times.append(f'{number(own["mean"] / scores[name].sampled["mean"], 2)} times {what}')
    return text + (': ' + ' and '.join(times) if times else '') + '.'


def head(run: RunFiles) -> str:
    """Title, sentence and the facts of the run."""
    config, scores = run.config, run.scores
    frames, seconds = scores.get('env_frames'), scores.get('seconds')
    updates = sum((scores.get('gradient_steps') or {}).values())
    seeds = scores.get('seeds', config.get('seeds'))
    if isinstance(seeds, list):
        seeds = f'{len(seeds)} ({", ".join(map(str, seeds))})'
    facts = {
        'Frames of experience': number(frames, 3, True) if frames else None,
        'Updates': number(updates, 3, True) if scores else None,
        'Training time': duration(seconds) if seconds else None,
        'Seeds': seeds,
        'Device': scores.get('device', config.get('device')),
        'Date': scores.get('date', config.get('date')),
    }
    known = {name: str(value) for name, value in facts.items() if value not in (None, '')}
    items = [f'<div><dt>{name}</dt><dd>{escape(text)}</dd></div>' for name, text in known.items()]
    return (
        f'<header><p class="eyebrow">Reverie run report</p><h1>{escape(run.title)}</h1>'
        f'<p class="lead">{escape(sentence(run))}</p><dl class="facts">{"".join(items)}</dl></header>'
    )


def points(x: Number | None) -> str:
    """A score with two decimals, so that a column of them aligns."""
    return '–' if x is None else f'{x:,.2f}'.replace('-', '−')


def _bounds(s: Mapping[str, Any]) -> str:
    return ' – '.join(map(points, s['ci95'])) if s['ci95'] else '–'


def _score_cells(s: Mapping[str, Any]) -> list[str]:
    episodes = [x for seed in s['per_seed'] for x in seed]
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
    means = [row.sampled['mean'] for row in rows]
    bounds = [row.sampled['ci95'] or (mean, mean) for row, mean in zip(rows, means, strict=True)]
    limits = scale_of([(mean, *ends) for mean, ends in zip(means, bounds, strict=True)])
    out = ['<div class="bars">']
    for row, mean, (low, high) in zip(rows, means, bounds, strict=True):
        kind = 'best' if row.key == best else 'own' if row.key in OURS else 'other'
        runs = row.sampled['per_seed']
        seeds = len(runs) > 1 and row.key not in UNTRAINED
        dots = [float(np.mean(run)) for run in runs] if seeds else []
        name = f'<b>{escape(row.name)}</b>' if row.key == best else escape(row.name)
        out.append(f'<span class="label">{name}</span>{bar(mean, low, high, dots, limits, kind)}')
        out.append(f'<span class="value">{points(mean)}</span>')
    pad = '<span class="axis-pad"></span>'
    return ''.join([*out, f'{pad}{bar_axis(limits)}{pad}</div>'])


def _table(
    heads: Sequence[str], rows: Sequence[Row], cells: Callable[..., list[str]], best: str | None
) -> str:
    """Sampled and greedy figures of each row, under `heads`.

    cells: a figure -> its cells after name and actions.
    """
    lines = []
    for row in rows:
        mode = 'sampled' if row.greedy else '–'
        lines.append(('best' if row.key == best else '', [row.name, mode, *cells(row.sampled)]))
        if row.greedy:
            lines.append(('greedy', ['', 'greedy', *cells(row.greedy)]))
    return html.table(heads, [html.row(map(cell, texts), kind) for kind, texts in lines])


def _note(run: RunFiles) -> str:
    """Note on the whiskers, the normalised column and the read-outs that are not there."""
    scores = read_outs(run)
    note = 'Mean return per episode; whiskers are 95% intervals, dots are seeds. '
    note += (
        f'Over seeds the interval is Student’s t below {BOOTSTRAP_FROM}, a bootstrap from there '
    )
    note += 'on; over the episodes of one seed it says nothing of other seeds.'
    if (reference := run.scores.get('reference')) is not None:
        note += f' Normalised: 0 is random play, 1 the reference PPO ({number(reference)}).'
    expected = () if 'agent' in scores else ('bc', 'wm_bc', 'imagination')
    if absent := [name_of(k) for k in expected if k not in scores]:
        note += f' Not measured in this run: {", ".join(absent)}.'
    return f'<p class="note">{escape(note)}</p>'


def section(run: RunFiles) -> str:
    """Scores of the first task, or the only one, then those of the others."""
    out = ['<section><h2>Scores in the real environment</h2>']
    if not read_outs(run):
        return ''.join([*out, missing(run, 'scores.json', 'scores'), '</section>'])
    for told in (run, *(dataclasses.replace(run, scores=scores) for scores in run.other_tasks)):
        if (task := told.scores.get('task')) is not None:
            out.append(f'<h3>Told the task {escape(task)}, in {escape(told.scores["env"])}</h3>')
        out += _figures(told)
    out += [
        f'<p class="missing">{escape(note)}</p>'
        for name, note in run.notes.items()
        if name.startswith('scores-')
    ]
    return ''.join([*out, '</section>'])


def _figures(run: RunFiles) -> list[str]:
    """Bars with intervals, then every number; then the paired differences of read-outs that share
    world models.
    """
    best = hero(run)
    rows = list(read_outs(run).values())
    heads = ['Read-out', 'Actions', 'Mean', '95% interval', 'Kind']
    more = ['Normalised', 'Min', 'Max', 'Episodes']
    out = [_bars(rows, best), _note(run), _table([*heads, *more], rows, _score_cells, best)]
    if pairs := difference_rows(run.scores):
        heads[0] = 'Difference'
        note = 'Seed by seed: read-outs of one seed share its world model or its data, and what '
        note += 'they share cancels.'
        out += ['<h3>Paired differences</h3>', f'<p class="note">{note}</p>']
        out.append(_table([*heads, 'Each seed'], pairs, _difference_cells, None))
    return out
