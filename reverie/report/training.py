"""The training section of a report: curves of every phase."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reverie.report.charts import Line, curves
from reverie.report.html import escape, figure, line_key, missing
from reverie.report.run import RunFiles
from reverie.text import duration, number

Rows = Mapping[int, Mapping[str, Any]]  # lines of a phase by update


def _series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and values [n, seeds] of one metric.

    Lines of another width than the last are left out.
    """
    found = {}
    for step, row in sorted(rows.items()):
        try:
            found[step] = np.atleast_1d(np.asarray(row[name], float))
        except (KeyError, TypeError, ValueError):
            continue
    width = next(reversed(found.values())).shape if found else (0,)
    found = {step: v for step, v in found.items() if v.shape == width and v.ndim == 1}
    values = np.array(list(found.values()), float).reshape(len(found), -1)
    return np.array(list(found), float), values


def _mean_and_seeds(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, list[Line]]:
    """The mean over seeds of values [n, seeds], and its lines: each seed, then the mean."""
    with np.errstate(invalid='ignore'):
        mean = values.mean(1)
    seeds = [Line(x, seed, 'seed') for seed in values.T] if values.shape[1] > 1 else []
    return mean, [*seeds, Line(x, mean)]


def _metric_figure(rows: Rows, name: str) -> str:
    steps, values = _series(rows, name)
    if not values.size or not np.isfinite(values).any():
        return figure(name, '', '<p class="missing">No finite values.</p>')
    mean, lines = _mean_and_seeds(steps, values)
    return figure(name, number(float(mean[-1])), curves(lines, 'update', name))


def _score_curve(run: RunFiles) -> str:
    """Returns while training against environment frames; empty where none were taken."""
    curve = run.scores.get('curve') or {}
    returns = curve.get('return_per_seed') or []
    if not (curve.get('env_frames') and returns and returns[0]):
        return ''
    frames, values = np.array(curve['env_frames'], float), np.array(returns, float)
    mean, lines = _mean_and_seeds(frames, values.T)
    title = 'score during training'
    chart = curves(lines, 'environment frames', title, log=False)
    return f'<div class="charts">{figure(title, number(mean[-1]), chart)}</div>'


def _phase(name: str, rows: Rows) -> str:
    """Losses of a phase, its other metrics folded away."""
    names = dict.fromkeys(metric for row in rows.values() for metric in row if '/' in metric)
    seconds = [r['seconds'] for r in rows.values() if isinstance(r.get('seconds'), int | float)]
    took = f', {duration(max(seconds))} after the start' if seconds else ''
    losses = [metric for metric in names if metric.startswith('loss/')]
    others = [metric for metric in names if metric not in losses]
    note = f'<span class="note">to update {max(rows):,}{took}</span>'

    def charts(metrics: Sequence[str]) -> str:
        return ''.join(_metric_figure(rows, metric) for metric in metrics)

    out = f'<h3>{escape(name)} {note}</h3><div class="charts">{charts(losses)}</div>'
    if others:
        title = f'<summary>More curves of {escape(name)} ({len(others)})</summary>'
        out += f'<details>{title}<div class="charts">{charts(others)}</div></details>'
    return out


def section(run: RunFiles) -> str:
    """Scores during training, losses of each phase, and the other metrics folded away."""
    out = ['<section><h2>Training</h2>', _score_curve(run)]
    if not run.metrics:
        return ''.join([*out, missing(run, 'metrics.jsonl', 'training curves'), '</section>'])
    if 'metrics.jsonl' in run.notes:
        out.append(f'<p class="missing">{escape(run.notes["metrics.jsonl"])}</p>')
    note = 'One chart per loss term and phase; the number is its last value.'
    out += [f'<p class="note">{note}</p>', line_key(('main', 'mean'), ('seed', 'each seed'))]
    out += [_phase(name, rows) for name, rows in run.metrics.items()]
    return ''.join([*out, '</section>'])
