"""A results record as rows: every figure beside its interval, what kind that is, and n."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reverie.evaluation.statistics import figure_interval

NAMES = {
    'random': 'Random',
    'data': 'Data mean',
    'bc': 'BC from scratch',
    'wm_bc': 'WM + BC',
    'imagination': 'Imagination RL',
    'agent': 'Agent',
    'ppo': 'PPO',
}


class Row(NamedTuple):
    """One read-out, or the difference of two; figures are entries of the results file."""

    key: str  # 'imagination', 'imagination - wm_bc'
    name: str
    sampled: Mapping[str, Any]
    greedy: Mapping[str, Any] | None


def name_of(key: str) -> str:
    """A read-out as people call it; of 'a - b' it is 'a minus b'."""
    return ' minus '.join(NAMES.get(part, part) for part in key.split(' - '))


def interval_label(figure: Mapping[str, Any]) -> str:
    """Kind and n of a figure's interval, e.g. 't over 3 seeds'."""
    ci = figure_interval(figure)
    return ci.label if ci else 'none, n = 1'


def _rows(figures: Mapping[str, Any]) -> list[Row]:
    return [Row(key, name_of(key), figure, figure.get('greedy')) for key, figure in figures.items()]


def score_rows(record: Mapping[str, Any]) -> list[Row]:
    """The read-outs with scores, in the order of NAMES."""
    score = {k: v for k, v in (record.get('score') or {}).items() if any(v['per_seed'])}
    known = {k: score[k] for k in NAMES if k in score}
    return _rows(known | score)  # those without a place among NAMES come last


def difference_rows(record: Mapping[str, Any]) -> list[Row]:
    """The paired differences of read-outs that share world models."""
    return _rows(record.get('differences') or {})


def number(x: float) -> str:
    """Two decimals below 100, none from there on."""
    return f'{x:.{2 if abs(x) < 100 else 0}f}'


def bounds(figure: Mapping[str, Any]) -> str:
    """The interval as '2.70 to 3.90'."""
    return ' to '.join(map(number, figure['ci95'])) if figure['ci95'] else ''


def text(figure: Mapping[str, Any]) -> str:
    """A figure in a line of text: '3.30 (2.70 to 3.90, t over 3 seeds)'."""
    mean = number(figure['mean'])
    if not figure['ci95']:
        return f'{mean} (n = 1)'
    return f'{mean} ({bounds(figure)}, {interval_label(figure)})'


def markdown(
    rows: Sequence[Row], title: str = 'read-out', names: Mapping[str, str] | None = None
) -> str:
    """A Markdown table of rows for the documentation; `names` replaces those of some keys."""
    heads = (title, 'sampled', '95% interval', 'greedy', '95% interval', 'the intervals are')
    lines = [f'| {" | ".join(heads)} |', '|---|---:|---:|---:|---:|---|']
    for key, name, sampled, greedy in rows:
        kinds = dict.fromkeys(interval_label(figure) for figure in (sampled, greedy) if figure)
        cells = [(names or {}).get(key, name)]
        for figure in (sampled, greedy):
            cells += [number(figure['mean']), bounds(figure)] if figure else ['', '']
        lines.append('| ' + ' | '.join([*cells, '; '.join(kinds)]) + ' |')
    return '\n'.join(lines) + '\n'
